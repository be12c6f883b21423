"""The way out: a network as a file that another engine runs, compared with the network first.

    net = taut.load("net.taut", MyNet())
    taut.export(net, "net.onnx", example)           ONNX Runtime; OpenVINO reads it too
    taut.export(net, "net.xml", example)            OpenVINO, with Taut's own operations in it
    taut.export(net, "net.pt2", example)            torch.export, with Taut's own products
    taut.export(net, "net.pte", example)            ExecuTorch
    taut.export(net, "net.safetensors", example)    only the tensors, for other tools

Reshaped networks go out as they are, quantized ones as whole numbers that the engine multiplies,
everything else decoded (plain.py says how); for OpenVINO, layers of bits, indices, sparse rows and
hashed buckets stay compressed (engine_ops.py).
"""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_unflatten

from taut.engine_ops import operation_of
from taut.errors import ExportError, RunError
from taut.export.check import Agreement, agreement, first_apart, refuse
from taut.export.job import (
    Job,
    answers,
    as_example,
    at_least_two,
    bound,
    check_precision,
    longest,
)
from taut.export.targets import LIBRARY, TARGETS, Runner, Target, check_keep, target_of
from taut.kernels.openvino import extension
from taut.layers import packed_layers
from taut.pack import packed_copy
from taut.task import Task
from taut.trace import Example

__all__ = ["TARGETS", "Exported", "Running", "answers_of", "export", "resized", "target_of"]

_SAMPLES = 4  # batches that are compared
_CALIBRATED = 256  # examples on which ranges are found


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An exported file that agrees with its network.

    network: runs the file in its engine, called like the original; None where it holds tensors
    only. score, packed_score: on the task's test data, in the engine and of the packed network;
    None without a task, and where the batch is fixed. size_bytes: of the file and its weights.
    kept: the layers that stay compressed, by path, with the names of their operations; library: the
    file of these, for `core.add_extension`. decoded: why none stays, where some could.
    """

    path: Path
    engine: str
    size_bytes: int
    agreement: Agreement | None
    network: nn.Module | None
    score: float | None = None
    packed_score: float | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    library: Path | None = None
    decoded: str = ""


class Running(nn.Module):
    """A network that an engine runs: called like the original, answering alike."""

    def __init__(
        self, run: Runner, like: nn.Module, outputs: Sequence[Any], spec: TreeSpec
    ) -> None:
        super().__init__()
        self._run, self._spec = run, spec
        self._kept = [None if isinstance(o, Tensor) else (o,) for o in outputs]
        self._like = [like]  # in a list: its parameters are not this network's
        kinds = [p.kind for p in inspect.signature(like.forward).parameters.values()]
        self._single = len(kinds) == 1 and kinds[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._single and len(args) == 1 and isinstance(args[0], Tensor) and not kwargs:
            tensors = list(args)  # without the time that binding takes
        else:
            args, kwargs = bound(self._like[0], (args, kwargs))
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        found = iter(self._run(tensors))
        leaves = [next(found) if kept is None else kept[0] for kept in self._kept]
        return tree_unflatten(leaves, self._spec)


def export(
    net: nn.Module,
    path: str | Path,
    example: Any = None,
    *,
    to: str | None = None,
    task: Task | None = None,
    dynamic_batch: bool = True,
    dynamic_length: bool = False,
    precision: str = "float32",
    round_between: bool = True,
    keep: str = "auto",
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a network for another engine, run it there, and compare before it gets its name.

    net: packed, with forms, or plain; it stays untouched. path: .onnx, .xml (OpenVINO), .pt2
    (torch), .pte (ExecuTorch); to: the engine, where the name does not tell. example: an input, a
    tensor, a tuple, a dict or (args, kwargs); by default the task's. task: gives real samples to
    compare on, and the score. dynamic_batch, dynamic_length: whether the first and the second
    dimension of the inputs take any size (one step beside longer inputs, the next one after what is
    kept of others, stays one); in ExecuTorch, which plans its memory ahead, none does.
    precision: of the floats in the file: float32, float16 or bfloat16; they are computed with as
    the engine likes. round_between: whether sums, pools and products between layers whose inputs
    are rounded read rounded numbers, too, so that the engine never leaves whole numbers
    (between.py); that takes a task, whose training data give the ranges. keep: whether layers for
    which Taut has an operation stay compressed in OpenVINO, which then needs Taut's library, put
    beside the file: auto, where it can be built here; all, which fails where it cannot; none.
    about: what the file is to tell of itself, as JSON.

    Raises ExportError for an engine that is not installed or lacks an operation, for a size that
    the network fixes, and for a file that does not agree: it is kept under another name then.
    """
    path = Path(path)
    target = target_of(path, to)
    check_precision(precision)
    if dynamic_length and not target.any_size:
        raise ExportError(
            f"export: files for {target.name} have a fixed length, got dynamic_length=True; leave "
            "it out, and write a file for each length"
        )
    check_keep(keep, target)
    module = target.module()
    dynamic_batch = dynamic_batch and target.any_size
    if example is None and task is None:
        raise ExportError("export: give an example, the input of one forward, or a task")
    packed = packed_copy(net)
    given = bound(packed, as_example(task.example() if example is None and task else example))
    outputs, spec = answers(packed, given)
    kept, decoded = _keeps(packed, keep) if target.keeps else (False, "")
    fixed = None if dynamic_batch else given
    job = Job(
        packed=packed, example=at_least_two(given) if dynamic_batch else given,
        dynamic_batch=dynamic_batch, dynamic_length=dynamic_length, precision=precision,
        about={**(task.about if task else {}), **(about or {})},
        calibration=_calibration(packed, task, fixed) if task and round_between else (),
        keep=kept,
    )  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            made = Path(folder) / path.name
            module.write(job, made)
            if target.runs:
                run = module.opened(made, precision="float32")
                running = Running(run, packed, outputs, spec).eval()
                samples = _samples(job, given, task)
                found = agreement(job, running, samples)
            else:
                found, running = module.compared(job, made), None
            if not found.holds:
                where = (
                    first_apart(job, target, samples[0], found.allowed)
                    if running is not None
                    else None
                )
                raise refuse(found, _named(target, made, path, ".disagrees"), where)
            score = packed_score = None
            if task is not None and running is not None and dynamic_batch:
                score, packed_score = task.evaluate(running), task.evaluate(packed)
            run = running = None
            _named(target, made, path)
            library = path.with_suffix(LIBRARY) if kept else None
            if library is not None:
                os.replace(shutil.copy(extension(), made.with_suffix(LIBRARY)), library)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another "
            "folder"
        ) from error
    return Exported(
        path=path, engine=target.name, agreement=found, score=score, packed_score=packed_score,
        size_bytes=sum(f.stat().st_size for f in target.files(path) if f.exists()),
        kept=job.plain.kept if kept else {}, decoded=decoded,
        library=library,
        network=Running(module.opened(path, precision="auto"), packed, outputs, spec).eval()
        if target.runs
        else None,
    )  # fmt: skip


def answers_of(net: nn.Module, given: Any) -> list[Tensor]:
    """The tensors that a network answers an input, a tensor, a tuple or (args, kwargs)."""
    found, _ = answers(net, bound(net, as_example(given)))
    return [t for t in found if isinstance(t, Tensor)]


def _keeps(packed: nn.Module, keep: str) -> tuple[bool, str]:
    """Whether layers stay compressed; and if not, but could, why."""
    if not any(operation_of(layer) for layer in packed_layers(packed).values()):
        return False, ""
    if keep == "none":
        return False, "keep='none'"
    try:
        extension()
    except ExportError as error:
        if keep == "all":
            raise
        return False, str(error)
    return True, ""


def _samples(job: Job, given: Example, task: Task | None) -> list[Example]:
    """What the file is compared on: batches of the test data, else the example at other sizes."""
    if task is not None:
        batches = itertools.islice(task.batches("test"), _SAMPLES)
        samples = [bound(job.packed, (b.args, b.kwargs)) for b in batches]
        return samples if job.dynamic_batch else [resized(s, _rows(given)) for s in samples]
    if not job.dynamic_batch:
        return [given]
    samples = [job.example, _longer(job.example, 0)]
    return [*samples, _longer(job.example, 1)] if job.dynamic_length else samples


def _calibration(packed: nn.Module, task: Task, fixed: Example | None) -> list[Example]:
    """Batches of the training data, of so many examples together.

    fixed: an example whose number of rows they all get.
    """
    found, seen, rows = [], 0, _rows(fixed)
    for batch in task.batches("train"):
        each = list(batch.examples()) if rows == 1 else [batch]
        for part in each:
            example = bound(packed, (part.args, part.kwargs))
            found.append(resized(example, rows) if rows else example)
        seen += batch.size
        if seen >= _CALIBRATED:
            break
    return found


def _rows(example: Example | None) -> int:
    """How many examples an example is of; 0 for none."""
    tensors = [t for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim()]
    return len(tensors[0]) if tensors else 0


def resized(example: Example, batch: int) -> Example:
    """The example repeated, or cut, to so many examples."""
    tensors = [t for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim()]
    size = len(tensors[0]) if tensors else 0

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
            return value
        return value.repeat(-(-batch // max(size, 1)), *[1] * (value.dim() - 1))[:batch]

    args, kwargs = tree_map(fit, example)
    return args, kwargs


def _longer(example: Example, dim: int) -> Example:
    """The example with one more along a dimension, wherever its largest size stands there."""
    size = longest(example, dim)

    def more(value: Any) -> Any:
        whole = isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == size
        return torch.cat([value, value.narrow(dim, 0, 1)], dim) if whole else value

    args, kwargs = tree_map(more, example)
    return args, kwargs


def _named(target: Target, made: Path, path: Path, more: str = "") -> Path:
    """Give a file, and what belongs to it, its name."""
    for new, name in zip(target.files(made), target.files(path), strict=True):
        if new.exists():
            os.chmod(new, 0o644)
            os.replace(new, f"{name}{more}")
    return Path(f"{path}{more}")
