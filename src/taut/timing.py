"""How long things take: whatever is timed in this package is timed here.

    latency      one network, called as it is used: the figure that is told
    in_turn      the same of several networks, round after round: figures that can be compared
    by_turns     which of several is faster: of a few calls in a row the best counts
    repeated     one thing, call after call
    reduced_to   how far a network must be reduced to be fast enough

By turns, so that what disturbs a machine falls on all alike.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer

from taut.modules import device_of, to_device
from taut.trace import Example, batch_of
from taut.types import Latency

Run = Callable[[], object]

_ROUNDS, _REPEATS = 5, 3
_LEAST = 2  # one run has no spread
_HALVINGS = 6


@torch.no_grad()
def latency(model: nn.Module, example: Example, batch: int, seconds: float = 0.25) -> Latency:
    """Time one forward at PyTorch's present number of threads, after a warm-up."""
    device = device_of(model)
    args, kwargs = to_device(example[0], device), to_device(example[1], device)
    timer = Timer(
        "model(*args, **kwargs)", globals={"model": model, "args": args, "kwargs": kwargs},
        num_threads=torch.get_num_threads(),
    )  # fmt: skip
    timer.timeit(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a noisy machine shows in the spread
        found = timer.blocked_autorange(min_run_time=seconds)
    times = found.times
    while len(times) < _LEAST:  # one stalled block can take up all of the time
        times = [*times, *timer.timeit(found.number_per_run).times]
    return told(
        [1e3 * t for t in times], batch=batch, threads=torch.get_num_threads(), engine="pytorch"
    )


def in_turn(
    nets: Sequence[Callable[[], nn.Module]], example: Example, batch: int, *,
    rounds: int = _ROUNDS, seconds: float = 0.05,
) -> list[Latency]:  # fmt: skip
    """The latency of each network: in each round each of them is timed once.

    nets: each gives its network, ready to run. seconds: of one network in one round. Each figure is
    the median of the rounds' medians; its spread is their interquartile range, or the median one
    within a round where that is wider.
    """
    found = [[latency(ready(), example, batch, seconds) for ready in nets] for _ in range(rounds)]
    return [_together(each) for each in zip(*found, strict=True)]


def _together(rounds: Sequence[Latency]) -> Latency:
    found = told(
        [r.median_ms for r in rounds], batch=rounds[0].batch, threads=rounds[0].threads,
        engine=rounds[0].engine,
    )  # fmt: skip
    within = statistics.median(r.iqr_ms for r in rounds)
    return replace(found, iqr_ms=max(found.iqr_ms, within), runs=sum(r.runs for r in rounds))


def told(times: Sequence[float], *, batch: int, threads: int, engine: str) -> Latency:
    """What milliseconds come to: their median and interquartile range."""
    spread = 0.0
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        spread = high - low
    return Latency(
        batch=batch, threads=threads, engine=engine, median_ms=statistics.median(times),
        iqr_ms=spread, runs=len(times),
    )  # fmt: skip


def repeated(run: Run, seconds: float, least: int = 1) -> list[float]:
    """Milliseconds of one call after another for so many seconds; at least so many calls."""
    end, times = time.perf_counter() + seconds, list[float]()
    while len(times) < least or time.perf_counter() < end:
        times.append(_once(run))
    return times


@torch.no_grad()
def by_turns(
    runs: Sequence[Callable[[], Run]], device: torch.device, *, seconds: float,
    least: int = _ROUNDS, most: int | None = None, repeats: int = _REPEATS,
) -> list[float]:  # fmt: skip
    """Median milliseconds of each run; in its turn the best of `repeats` in a row counts.

    runs: each makes itself ready and gives what is timed, which is called once before that brings
    its weights back into the caches. seconds: for each of them, at least. least, most: rounds.
    """
    times: list[list[float]] = [[] for _ in runs]
    spent, rounds = 0.0, 0
    while rounds < least or (spent < 1e3 * seconds * len(runs) and rounds < (most or 2**31)):
        for ready, mine in zip(runs, times, strict=True):
            run = ready()
            _once(run, device)
            many = [_once(run, device) for _ in range(repeats)]
            mine.append(min(many))
            spent += sum(many)
        rounds += 1
    return [statistics.median(mine) for mine in times]


def _once(run: Run, device: torch.device | None = None) -> float:
    waits = device is not None and device.type == "cuda"
    if waits:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if waits:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def race(models: Sequence[nn.Module], example: Example, seconds: float = 0.1) -> list[float]:
    """Median milliseconds of one forward of each network, at PyTorch's present number of threads.

    They run in eval mode and are left in it. seconds: for each of them, at least; what takes longer
    is still timed over five turns.
    """
    device = device_of(models[0])
    args, kwargs = to_device(example[0], device), to_device(example[1], device)

    def ready(model: nn.Module) -> Callable[[], Run]:
        return lambda: partial(model.eval(), *args, **kwargs)

    return by_turns([ready(model) for model in models], device, seconds=seconds)


def reduced_to(
    model: nn.Module, reduced: Callable[[float], nn.Module], example: Example, share: float
) -> tuple[float, float]:
    """The least reduction that brings a network's latency at batch 1 down to this share of it.

    reduced: the network at a reduction from 0 to 1. Returns the reduction, to 1/64, and the share
    that was measured at it; where not even 1 will do, 1 and the share there.
    """
    one = first_of(example)

    def at(reduction: float) -> float:
        whole, part = race([model, reduced(reduction)], one)
        return part / whole

    low, high, reached = 0.0, 1.0, at(1.0)
    for _ in range(_HALVINGS if reached <= share else 0):
        middle = (low + high) / 2
        found = at(middle)
        if found <= share:
            high, reached = middle, found
        else:
            low = middle
    return high, reached


def first_of(example: Example) -> Example:
    """The first of the examples in a batch, as a batch of its own."""
    count = batch_of(*example)

    def cut(value: object) -> object:
        batched = isinstance(value, Tensor) and value.dim() and len(value) == count
        return value[:1] if batched else value  # type: ignore[index]

    args, kwargs = tree_map(cut, example)
    return args, kwargs
