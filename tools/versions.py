"""Tries Taut on every Python and the lowest, the pinned and the newest PyTorch that it allows.

    python tools/versions.py [--most-mb 400] [--only 3.12]

For each pair: pip finds everything that the wheel asks for; what there is to download is added up,
and where that is more than --most-mb (PyTorch for a GPU takes gigabytes) or that Python is not
here, the pair is left out, and the table says why. Else the wheel goes into a new environment,
is used there (smoke.py), and the part of the tests named in TESTS is run on it. A Python that is
here reads all sources, whatever became of its pairs. Exit code 1: something failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from wheel import ROOT, built, digits, has_kernels

PYTHONS = ("3.11", "3.12", "3.13")
TESTS = ("types", "goal", "recipe", "technique", "golden", "pack", "layers", "trace", "cli")
NEEDS = ("hypothesis", "pytest", "pytest-timeout", "scikit-learn", "torchmetrics")
READ = "import sys, pathlib\nfor p in pathlib.Path(sys.argv[1]).rglob('*.py'):"
READ += " compile(p.read_text('utf-8'), str(p), 'exec')"


@dataclass(frozen=True)
class Row:
    """What became of one pair. failed: whether it is to blame."""

    python: str
    torch: str
    told: str
    failed: bool = False


class FailedError(Exception):
    """A command that did not go well, with the end of its output."""


def call(*command: str | Path, **options: object) -> str:
    """What a command prints. Raises FailedError."""
    done = subprocess.run(
        [*map(str, command)], check=False, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, **options,
    )  # fmt: skip
    if done.returncode:
        raise FailedError("\n".join(done.stdout.strip().splitlines()[-12:]))
    return done.stdout


def pip(*arguments: str | Path) -> str:
    """Of this environment's pip, by no other constraints than are given."""
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return call(sys.executable, "-m", "pip", *arguments, env=environment)


def torches() -> list[str]:
    """The lowest PyTorch that pyproject.toml allows, the one tested with, and the newest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (lowest,) = [d.partition(">=")[2] for d in project["dependencies"] if d.startswith("torch>=")]
    lowest += ".0" * (2 - lowest.count("."))
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    newest = re.search(r"^torch \(([\d.]+)\)", pip("index", "versions", "torch"), re.MULTILINE)
    found = [lowest, pinned[1], newest[1] if newest else pinned[1]]
    return list(dict.fromkeys(found))


def interpreter(version: str) -> str | None:
    """A Python of this version: on the path, or one that pyenv or uv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(kept.glob(f"{version}.*/bin/python3"))]
    if shutil.which("uv"):
        found = subprocess.run(
            ["uv", "python", "find", version], capture_output=True, text=True, check=False
        )
        candidates.append(found.stdout.strip() or None)
    for path in candidates:
        ask = [str(path), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            if path and call(*ask).strip() == version:
                return str(path)
        except FailedError:  # pyenv's stand-in for one that is not chosen
            continue
    return None


def megabytes(python: str, wheel: Path, torch: str) -> float:
    """How much pip would download for the wheel with this PyTorch. Raises FailedError."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        pip("install", "--dry-run", "--ignore-installed", "--report", report, "--quiet",
            "--python-version", python, "--only-binary=:all:", "--target", place,
            wheel, f"torch=={torch}", *NEEDS)  # fmt: skip
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    urls = [i["download_info"]["url"] for i in found]
    return sum(_length(u) for u in urls if not u.startswith("file:")) / 1e6


def _length(url: str) -> int:
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.headers["Content-Length"])


def tried(python: str, torch: str, wheel: Path, most_mb: float) -> Row:
    """One pair."""
    path = interpreter(python)
    if path is None:
        return Row(python, torch, "left out: no such Python is here")
    try:
        size = megabytes(python, wheel, torch)
        if size > most_mb:
            return Row(python, torch, f"left out: resolved, but {size:,.0f} MB to download")
        with tempfile.TemporaryDirectory() as place:
            return Row(python, torch, used(path, torch, wheel, Path(place)))
    except FailedError as error:
        return Row(python, torch, str(error), failed=True)


def used(path: str, torch: str, wheel: Path, folder: Path) -> str:
    """Install into a new environment, use and test; what it came to."""
    call(path, "-m", "venv", "--without-pip", folder / "environment")
    python = folder / "environment" / "bin" / "python"
    pip("--python", python, "install", "-q", wheel, f"torch=={torch}", *NEEDS)
    digits(folder)
    plain = () if has_kernels(wheel) else ("--plain",)
    told = call(python, "-I", ROOT / "tools" / "smoke.py", folder, *plain, cwd=folder)
    files = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    printed = call(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, cwd=ROOT)
    return f"{told.strip()}; tests: {printed.strip().splitlines()[-1]}"


def reads(python: str) -> Iterator[Row]:
    """Whether a Python that is here reads every source without a warning."""
    path = interpreter(python)
    if path is not None:
        try:
            call(path, "-W", "error", "-c", READ, ROOT / "src")
            yield Row(python, "-", "reads all sources")
        except FailedError as error:
            yield Row(python, "-", str(error), failed=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most-mb", type=float, default=400, help="of one pair's download")
    parser.add_argument("--only", default="", help="this Python alone")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        wheel = built(Path(place))
        for python in PYTHONS:
            if options.only in python:
                rows += reads(python)
                rows += [tried(python, t, wheel, options.most_mb) for t in torches()]
    table = Table("Python", "PyTorch", "")
    for row in rows:
        table.add_row(row.python, row.torch, ("FAILED: " if row.failed else "") + row.told)
    Console().print(table)
    sys.exit(any(r.failed for r in rows))


if __name__ == "__main__":
    main()
