"""Which engine runs a network fastest here: all are timed in turn, each in a process of its own.

    eager     PyTorch, every layer decoded        compile   the same under torch.compile
    packed    PyTorch, each layer packed or decoded as `tune` finds faster
    onnx      ONNX Runtime                        openvino  OpenVINO, at the precision that it likes
    openvino+taut    the same, with layers that stay compressed, in Taut's operations

The first three run what torch.export makes of the network. An engine whose answers are off, that
is not installed or that lacks an operation is told of, and takes no part.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taut.engine_ops import operation_of
from taut.errors import ExportError, TautError, did_you_mean
from taut.export import export, resized
from taut.export.check import allowed, difference, length
from taut.export.job import as_example, bound
from taut.export.turns import Worker
from taut.layers import packed_layers, run_dense
from taut.pack import packed_copy
from taut.task import Task
from taut.timing import told
from taut.trace import Example
from taut.tune import tune
from taut.types import Latency

KEEPS = "openvino+taut"
ENGINES = ("eager", "compile", "packed", "onnx", "openvino", KEEPS)
_FILES = {"eager": "dense.pt2", "compile": "dense.pt2", "packed": "packed.pt2",
          "onnx": "net.onnx", "openvino": "net.xml", KEEPS: "kept.xml"}  # fmt: skip
_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Race:
    """How long one forward took in each engine, fastest first; and why others took no part."""

    latencies: tuple[Latency, ...]
    refused: Mapping[str, str]

    def table(self) -> Table:
        """As it is printed."""
        table = Table()
        for column in ("engine", "batch", "threads", r"median \[ms]", r"quartiles apart \[ms]"):
            table.add_column(column, justify="left" if column == "engine" else "right")
        for t in self.latencies:
            table.add_row(
                t.engine, f"{t.batch}", f"{t.threads}", f"{t.median_ms:.4f}", f"{t.iqr_ms:.4f}"
            )
        for engine, why in self.refused.items():
            table.add_row(engine, "", "", "", Text(why))
        return table


class Fastest(nn.Module):
    """A network in its fastest engine: called like the original, answering alike.

    engine: its name; race: what was measured. run: takes inputs of as many examples as were timed;
    for others, `other` makes what runs them, the first time that they come.
    """

    def __init__(
        self, engine: str, race: Race, run: nn.Module, other: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.engine, self.race, self.run = engine, race, run
        self._other, self._batch = other, race.latencies[0].batch

    @cached_property
    def _any(self) -> nn.Module:
        return self._other().eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        alike = length(args, kwargs) == self._batch
        return (self.run if alike else self._any)(*args, **kwargs)


def fastest(
    net: nn.Module,
    example: Any,
    *,
    batch: int | None = None,
    threads: int | None = None,
    engines: Iterable[str] = ENGINES,
    seconds: float = 1.0,
    show: bool = True,
    task: Task | None = None,
) -> Fastest:
    """Time a network in every engine, and return it in the fastest.

    net: packed, with forms, or plain. example: an input, as `taut.export` takes it; batch: repeats
    or cuts it to so many examples. threads: of each engine in the race, by default PyTorch's;
    what is returned uses PyTorch's. seconds: that each is timed, in turns of a fifth. show: whether
    the table is printed. task: as `taut.export` takes it: with its data, engines stay in whole
    numbers between layers whose inputs are rounded.

    Raises ExportError where no engine could run it.
    """
    race, folder, packed, given = _race(net, example, batch, threads, engines, seconds, task)
    if show:
        Console().print(race.table())
    if not race.latencies:
        shutil.rmtree(folder)
        whys = "; ".join(f"{e}: {why}" for e, why in race.refused.items())
        raise ExportError(f"fastest: no engine runs the network: {whys}")
    best = race.latencies[0].engine
    run: nn.Module = packed

    def written(any_batch: bool) -> nn.Module:
        path = folder / ("any" if any_batch else "best") / _FILES[best]
        keep = "all" if best == KEEPS else "none"
        made = export(packed, path, given, task=task, dynamic_batch=any_batch, keep=keep).network
        assert made is not None
        return made

    filed = best in ("onnx", "openvino", KEEPS)
    if filed:
        run = written(False)
    elif best == "packed":
        tune(packed, given)
    else:
        run_dense(packed, True)
        run = cast(nn.Module, torch.compile(packed)) if best == "compile" else packed
    other = partial(written, True) if filed else lambda: run
    found = Fastest(best, race, run.eval(), other)
    weakref.finalize(
        found, shutil.rmtree, folder, ignore_errors=True
    )  # OpenVINO reads it as it runs
    return found


def race(
    net: nn.Module, example: Any, *, batch: int | None = None, threads: int | None = None,
    engines: Iterable[str] = ENGINES, seconds: float = 1.0, task: Task | None = None,
) -> Race:  # fmt: skip
    """What `fastest` measures, alone."""
    found, folder, _, _ = _race(net, example, batch, threads, engines, seconds, task)
    shutil.rmtree(folder, ignore_errors=True)
    return found


def latencies(
    net: nn.Module, task: Task, engine: str, batches: Iterable[int], threads: int | None = None
) -> tuple[Latency, ...]:
    """A network's latency in one engine, or by `auto` in all of them, fastest first, at each batch.

    A network without packed layers runs eager for `packed`. threads: by default PyTorch's.

    Raises ExportError where the engine does not run it.
    """
    engines = {"auto": ENGINES, "packed": ("packed", "eager")}.get(engine, (engine,))
    found: list[Latency] = []
    for batch in batches:
        run = race(
            net, task.example(batch), batch=batch, threads=threads, engines=engines, task=task
        )
        if not run.latencies:
            raise ExportError(
                f"{engine} does not run the network: {'; '.join(run.refused.values())}"
            )
        named = [t for t in run.latencies if t.engine == engine] or run.latencies[:1]
        found += run.latencies if engine == "auto" else named
    return tuple(found)


def _race(
    net: nn.Module, example: Any, batch: int | None, threads: int | None, engines: Iterable[str],
    seconds: float, task: Task | None,
) -> tuple[Race, Path, nn.Module, Example]:  # fmt: skip
    wanted = list(dict.fromkeys(engines))
    for engine in wanted:
        if engine not in ENGINES:
            raise ExportError(
                f"fastest: there is no engine {engine!r}{did_you_mean(engine, ENGINES)}"
            )
    if not wanted or (batch is not None and batch < 1) or (threads is not None and threads < 1):
        raise ExportError(
            f"fastest: at least one engine, one example and one thread are needed, got {wanted}, "
            f"batch={batch} and threads={threads}"
        )
    packed = packed_copy(net)
    given = bound(packed, as_example(example))
    if batch is not None:
        given = resized(given, batch)
    folder = Path(tempfile.mkdtemp(prefix="taut-"))
    try:
        refused = _write(packed, given, wanted, folder, task)
        entered = [e for e in wanted if e not in refused]
        latencies = _timed(packed, given, entered, folder, threads, seconds, refused)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    order = tuple(sorted(latencies, key=lambda t: t.median_ms))
    return Race(latencies=order, refused=refused), folder, packed, given


def _write(
    packed: nn.Module, given: Example, engines: list[str], folder: Path, task: Task | None
) -> dict[str, str]:
    """The files that the engines run. Returns why some have none."""
    refused: dict[str, str] = {}
    for engine in engines:
        path = folder / _FILES[engine]
        if engine == "packed" and not any(p.multiplies for p in packed_layers(packed).values()):
            refused[engine] = "the network has no packed layers"
            continue
        if engine == KEEPS and not any(map(operation_of, packed_layers(packed).values())):
            refused[engine] = "no layer is one of Taut's operations"
            continue
        if path.exists():
            continue
        if engine == "packed":
            tune(packed, given)
        else:
            run_dense(packed, True)
        try:
            keep = "all" if engine == KEEPS else "none"
            export(packed, path, given, task=task, dynamic_batch=False, keep=keep)
        except TautError as error:
            refused[engine] = str(error)
    return refused


@torch.no_grad()
def _timed(
    packed: nn.Module, given: Example, engines: list[str], folder: Path, threads: int | None,
    seconds: float, refused: dict[str, str],
) -> list[Latency]:  # fmt: skip
    run_dense(packed, True)
    wanted = tree_leaves(packed(*given[0], **given[1]))
    tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
    torch.save(tensors, folder / "inputs.pt")
    threads = threads or torch.get_num_threads()
    most = allowed(packed, [given], "bfloat16")
    workers = {engine: _worker(engine, folder, threads) for engine in engines}
    times: dict[str, list[float]] = {}
    try:
        for engine, worker in workers.items():
            answers = worker.line()
            if answers is None:
                refused[engine] = f"it does not run: {worker.complaint()}"
                continue
            _, error = difference(torch.load(answers, weights_only=True), wanted)
            if error > most:
                refused[engine] = f"its answers are off by {error:.1%}, where {most:.1%} may be"
                continue
            times[engine] = []
        for _ in range(_ROUNDS):
            for engine, taken in times.items():
                taken += workers[engine].go(seconds / _ROUNDS)
    finally:
        for worker in workers.values():
            worker.stop()
    size = length(*given)
    return [
        told(found, batch=size, threads=threads, engine=engine) for engine, found in times.items()
    ]


def _worker(engine: str, folder: Path, threads: int) -> Worker:
    """A process that runs one engine's file."""
    given = [folder / _FILES[engine], folder / "inputs.pt", threads]
    command = [sys.executable, "-m", "taut.export.worker", engine, *map(str, given)]
    environment = {"OMP_NUM_THREADS": str(threads)}
    return Worker(f"fastest: {engine}", command, folder / f"{engine}.log", environment)
