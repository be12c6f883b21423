"""Times of several networks, taken by turns, and how far one must be reduced to be fast enough.

By turns, so that what disturbs a machine falls on all of them alike; each time is the best of a few
in a row, and their median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taut.modules import device_of, to_device
from taut.trace import Example, batch_of

_ROUNDS, _REPEATS = 5, 3
_HALVINGS = 6


@torch.no_grad()
def race(models: Sequence[nn.Module], example: Example, seconds: float = 0.1) -> list[float]:
    """Median milliseconds of one forward of each network, at PyTorch's present number of threads.

    They run in eval mode and are left in it. seconds: for each of them, at least; what takes longer
    is still timed over five turns.
    """

    def once(model: nn.Module) -> float:
        start = time.perf_counter()
        model(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    device = device_of(models[0])
    args, kwargs = to_device(example[0], device), to_device(example[1], device)
    times: list[list[float]] = [[] for _ in models]
    spent = 0.0
    for model in models:
        once(model.eval())
    while len(times[0]) < _ROUNDS or spent < 1e3 * seconds * len(models):
        for model, mine in zip(models, times, strict=True):
            once(model)  # its weights come back into the caches
            many = [once(model) for _ in range(_REPEATS)]
            mine.append(min(many))
            spent += sum(many)
    return [statistics.median(mine) for mine in times]


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
