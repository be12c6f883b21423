"""The engines that a network can be exported to, and what runs their files.

Each has a module of its own, to_<name>.py, which is imported when it is asked for:

    write(job, path)                   the file of a network, and what belongs to it
    opened(path, threads, precision)   a Runner of such a file
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from taut.errors import ExportError, did_you_mean

LIBRARY = ".taut.so"
"""Ends the library of Taut's operations, which lies beside an OpenVINO file that needs it."""

KEEP = ("auto", "all", "none")
"""Which layers stay compressed: those that can, or else fail; none."""

Runner = Callable[[Sequence[Tensor]], list[Tensor]]
"""Runs a file: the tensors that the forward takes, in order → the tensors that it gives."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine: what it is called, how its files end, the packages it needs, and their extra.

    runs: whether its files can be run here, so that they are compared; some only hold numbers.
    keeps: whether it takes Taut's operations, so that layers stay compressed. any_size: whether its
    files can leave the batch and the length free.
    """

    name: str
    suffix: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    beside: tuple[str, ...] = ()
    runs: bool = True
    keeps: bool = False
    any_size: bool = True

    def module(self) -> Any:
        """Its module. Raises ExportError, with the command that installs what is missing."""
        missing = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if missing:
            raise ExportError(
                f"{self.name} needs {', '.join(missing)}, which is not installed here: "
                f"pip install taut[{self.extra}]"
            )
        return importlib.import_module(f"taut.export.to_{self.name}")

    def files(self, path: Path) -> list[Path]:
        """The file, and those of its weights."""
        return [path, *(path.with_suffix(s) for s in self.beside)]


TARGETS = {
    t.name: t
    for t in (
        Target(
            name="onnx", suffix=".onnx", packages=("onnx", "onnxruntime", "onnxscript"),
            extra="onnx",
        ),
        Target(
            name="openvino", suffix=".xml", packages=("onnx", "onnxscript", "openvino"),
            extra="openvino", beside=(".bin",), keeps=True,
        ),
        Target(name="torch", suffix=".pt2"),
        Target(name="aoti", suffix=".pt2"),
        Target(
            name="executorch", suffix=".pte", packages=("executorch",), extra="executorch",
            any_size=False,
        ),
        Target(name="safetensors", suffix=".safetensors", runs=False),
    )
}  # fmt: skip


def target_of(path: Path, name: str | None) -> Target:
    """The target of this name, or the one whose files end so."""
    if name is None:
        by_suffix = {t.suffix: t for t in reversed(TARGETS.values())}  # the first of two
        if path.suffix not in by_suffix:
            ends = ", ".join(reversed(by_suffix))
            raise ExportError(
                f"export: {path.name} must end in {ends}, or name the engine: "
                f"to={' | '.join(TARGETS)}"
            )
        return by_suffix[path.suffix]
    if name not in TARGETS:
        raise ExportError(f"export: there is no engine {name!r}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]


def check_keep(keep: str, target: Target) -> None:
    """Raise ExportError for a choice that there is not, or that an engine does not have."""
    if keep not in KEEP:
        raise ExportError(
            f"export: keep must be {', '.join(KEEP)}, got {keep!r}{did_you_mean(keep, KEEP)}"
        )
    if keep == "all" and not target.keeps:
        raise ExportError(
            f"export: {target.name} takes none of Taut's operations, so keep='all' is not for it; "
            "only OpenVINO's files (.xml) have them"
        )


def check_count(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ExportError where there are more or fewer tensors than the file takes."""
    if len(tensors) != len(names):
        raise ExportError(
            f"the file takes {len(names)} tensors ({', '.join(names)}), got {len(tensors)}"
        )
