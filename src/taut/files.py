"""Writing files so that a reader finds the old one or the new one, never half of one.

And reading a run's own files back.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from taut.errors import RunError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object] | bytes) -> int:
    """Write a file under its final name only once it is whole; returns its size in bytes.

    write: the contents, or a function that writes them. Raises RunError where the folder cannot
    be written or the disk is full; nothing is left under the final name then.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(write) if isinstance(write, bytes) else write(file)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "folder (--run-folder)"
        ) from error
    return size


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a run wrote. Raises RunError where there is none any more."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return data


def check_asked(
    whose: str, old: Mapping[str, Any], asked: Mapping[str, Any], kind: str,
    other: str = "another folder",
) -> None:  # fmt: skip
    """Raise RunError where something was begun for other than what is asked of it now."""
    for name, value in asked.items():
        if old.get(name) != value:
            raise RunError(
                f"{whose} belongs to another {kind} (its {name} is {old.get(name)!r}, not "
                f"{value!r}); choose {other}, or use --fresh"
            )


def clear(folder: Path, names: Iterable[str]) -> None:
    """Remove these files and folders of a run, and nothing else that lies there."""
    try:
        for name in names:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot clear {folder}: {error}; choose another folder") from error


def unreadable(path: Path, error: Exception) -> RunError:
    """What to raise for a file of a run that is damaged."""
    return RunError(f"cannot read {path}: {error}; start over with --fresh")
