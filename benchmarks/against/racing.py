"""Files of several libraries, timed by turns, each in a process of its own on the same threads."""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from taut.errors import ExportError
from taut.export.targets import Runner
from taut.export.turns import Worker
from taut.export.worker import runner

TORCHAO = "torchao"  # a program that torchao's quantizer made, under torch.compile
_ROUNDS = 10


@dataclass(frozen=True)
class Entry:
    """What runs: who made it, in which engine, from which file."""

    who: str
    engine: str
    path: Path


@dataclass(frozen=True)
class Time:
    """Milliseconds of one forward: the median, and how far the quartiles are apart."""

    entry: Entry
    median_ms: float
    iqr_ms: float

    def __str__(self) -> str:
        return f"{self.entry.who} {self.median_ms:.3g} ± {self.iqr_ms / 2:.1g} ms"


Make = Callable[[Path], Entry]


def made(makers: Mapping[str, Make], folder: Path) -> tuple[list[Entry], dict[str, str]]:
    """What each library makes, in folders of their own; and why some make nothing."""
    entries, failed = [], dict[str, str]()
    for who, make in makers.items():
        into = folder / who.replace(" ", "-")
        into.mkdir(parents=True, exist_ok=True)
        try:
            entries.append(make(into))
        except Exception as error:  # a peer's own: it is told
            failed[who] = brief(error)
    return entries, failed


def brief(error: BaseException | str) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines() or ["no word"]
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return f"{kind}{lines[0]}"[:120].replace("|", "/")


def race(
    entries: Sequence[Entry], inputs: Sequence[Tensor], folder: Path, threads: int, seconds: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[Time], dict[str, str]]:  # fmt: skip
    """How long each takes, fastest first, in turns of a tenth of the seconds; and who fails.

    environment: variables that all of them find set.
    """
    torch.save(list(inputs), folder / "inputs.pt")
    failed: dict[str, str] = {}
    workers: list[tuple[Entry, Worker]] = []
    times: list[list[float]] = []
    try:
        for entry in entries:
            worker = _worker(entry, folder / "inputs.pt", threads, environment or {})
            workers.append((entry, worker))
            times.append([])
            if worker.line() is None:
                failed[entry.who] = brief(worker.complaint())
        for _ in range(_ROUNDS):
            for (entry, worker), taken in zip(workers, times, strict=True):
                if entry.who in failed:
                    continue
                try:
                    taken += worker.go(seconds / _ROUNDS)
                except ExportError as error:
                    failed[entry.who] = brief(error)
    finally:
        for _, worker in workers:
            worker.stop()
    found = [
        Time(entry, statistics.median(taken), quartiles[2] - quartiles[0])
        for (entry, _), taken in zip(workers, times, strict=True)
        if entry.who not in failed and (quartiles := statistics.quantiles(taken, n=4))
    ]
    return sorted(found, key=lambda t: t.median_ms), failed


def _worker(entry: Entry, inputs: Path, threads: int, environment: Mapping[str, str]) -> Worker:
    """A process that runs one file and times it when it is told to."""
    command = [sys.executable, __file__, entry.engine, str(entry.path), str(inputs), str(threads)]
    given = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_FREEZING": "1", **environment}
    return Worker(entry.who, command, entry.path.with_suffix(f".{entry.engine}.log"), given)


def _runner(engine: str, path: Path, threads: int) -> Runner:
    if engine != TORCHAO:
        return runner(engine, path, threads)
    import torchao.quantization.pt2e  # noqa: F401  # its operations

    module = torch.compile(torch.export.load(str(path)).module())

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [module(*tensors)]

    return run


def _serve() -> None:
    """Answer each line of seconds by the milliseconds of the runs that they gave time for."""
    engine, path, inputs, threads = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(threads))
    run, tensors = _runner(engine, Path(path), int(threads)), torch.load(inputs)
    for _ in range(5):
        run(tensors)
    print("ready", flush=True)
    for line in sys.stdin:
        end, times = time.perf_counter() + float(line), list[float]()
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run(tensors)
            times.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    _serve()
