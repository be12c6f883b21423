"""Tournaments: many recipes train a little, the better ones train on.

    successive halving   n recipes train r epochs, the best n/eta go on to eta·r, and so on to R
    Hyperband            brackets of it, from many recipes and few epochs to few and R at once

Jamieson and Talwalkar: Non-stochastic best arm identification (AISTATS 2016). Li et al.: Hyperband
(JMLR 2018). Here survival goes by non-dominated rank, then by crowding distance (Deb et al.:
NSGA-II, 2002), so several objectives are kept open at once. A survivor trains on from where it was:
its recipe grows by `recover(epochs=eta·r - r)`, so that it says what was done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

ETA = 3
KINDS = ("none", "halving", "hyperband")


def rungs(epochs: int, eta: int = ETA) -> list[int]:
    """The epochs at which it is decided who trains on, the last one all of them.

    >>> rungs(9), rungs(10), rungs(1)
    ([1, 3, 9], [1, 3, 10], [1])
    """
    count = int(math.log(epochs, eta) + 1e-9)
    return [max(1, epochs // eta**i) for i in range(count, -1, -1)]


def brackets(kind: str, epochs: int, eta: int = ETA) -> Iterator[tuple[int, int]]:
    """Bracket after bracket without end: how many recipes, and the rung at which they begin.

    >>> [next(b) for b in [brackets("hyperband", 9)] for _ in range(4)]
    [(9, 0), (5, 1), (3, 2), (9, 0)]
    """
    top = len(rungs(epochs, eta)) - 1
    if kind == "halving":
        yield from itertools.repeat((eta ** (top + 1), 0))
    for start in itertools.cycle(range(top + 1)):
        left = top - start
        yield math.ceil((top + 1) / (left + 1) * eta**left), start


def survivors(count: int, rung: int, last: bool = False, eta: int = ETA) -> int:
    """How many of a bracket's `count` recipes go on after so many rungs of it, at least one.

    last: whether they then train to the end. Unlike in the papers, which look for one recipe, twice
    as many do, where they were chosen twice: a frontier is made of several.

    >>> survivors(18, 1), survivors(18, 2), survivors(18, 2, last=True)
    (6, 2, 4)
    """
    several = 2 if last and rung > 1 else 1
    return max(1, several * count // int(eta**rung))


def ranked(points: Sequence[Sequence[float]]) -> list[int]:
    """The places of points, best first, each coordinate the less the better.

    By non-dominated rank; within a rank those come first around which there is most room.
    """
    each = np.asarray(points, dtype=float)
    if not len(each):
        return []
    ranks = non_dominated_ranks(each)
    room = np.zeros(len(each))
    for rank in range(int(ranks.max()) + 1):
        members = np.flatnonzero(ranks == rank)
        room[members] = crowding(each[members])
    return sorted(range(len(each)), key=lambda i: (ranks[i], -room[i], i))


def non_dominated_ranks(points: NDArray[np.float64]) -> NDArray[np.int64]:
    """0 for points that none dominates, 1 for those that only they dominate, and so on."""
    ranks = np.full(len(points), -1)
    no_worse = np.all(points[:, None] <= points[None], axis=2)
    dominates = np.logical_and(no_worse, np.any(points[:, None] < points[None], axis=2))
    for rank in itertools.count():
        open_ = ranks < 0
        if not open_.any():
            return ranks
        beaten = dominates[open_].any(0)
        ranks[open_ & ~beaten] = rank
    raise AssertionError("unreachable")


def crowding(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance between each point's neighbours, summed over the axes; infinite at the ends."""
    count, axes = points.shape
    total = np.zeros(count)
    for axis in range(axes):
        order = np.argsort(points[:, axis], kind="stable")
        values = points[order, axis]
        span = values[-1] - values[0] if np.isfinite(values).all() else 0.0
        total[order[[0, -1]]] = math.inf
        if span > 0 and count > 2:
            total[order[1:-1]] += (values[2:] - values[:-2]) / span
    return total


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The area that points dominate, up to a reference point; two axes, the less the better.

    >>> hypervolume([(1, 2), (2, 1), (3, 3)], (4, 4))
    8.0
    """
    area, least = 0.0, float(reference[1])
    inside = sorted((x, y) for x, y in points if x < reference[0] and y < reference[1])
    for x, y in inside:
        if y < least:
            area += (reference[0] - x) * (least - y)
            least = y
    return float(area)
