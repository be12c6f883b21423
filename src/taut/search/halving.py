"""Tournaments: many recipes train a little, the better ones train on.

    successive halving   n recipes train r epochs, the best n/eta go on to eta·r, and so on to R
    Hyperband            brackets of it, from many recipes and few epochs to few and R at once

Jamieson and Talwalkar: Non-stochastic best arm identification (AISTATS 2016). Li et al.: Hyperband
(JMLR 2018). Here survival goes by non-dominated rank (Deb et al.: NSGA-II, 2002), then by the
hypervolume that each adds (Beume et al.: SMS-EMOA, EJOR 2007), so several objectives are kept open
at once. Unlike there, volumes end at the median score: of the worse half, however tiny its files,
a network survives only where there is room. A survivor trains on from where it was; its recipe
grows by `recover(epochs=eta·r - r)`, and says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from taut.recipe import Recipe
from taut.recover import Recover

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


def grown(recipe: str, steps: Sequence[int]) -> str:
    """A recipe that trained steps[0] epochs, trained on to the last of the steps."""
    more = [Recover(epochs=b - a) for a, b in itertools.pairwise(steps)]
    return str(Recipe((*Recipe.parse(recipe).steps, *more)))


def ranked(points: Sequence[Sequence[float]]) -> list[int]:
    """The places of points, best first: a score, then logarithms of costs, the less the better.

    By non-dominated rank; within a rank that comes next which adds most to the volume of those
    before it, and where none adds anything, the best score.
    """
    if not len(points):
        return []
    each = np.asarray(points, dtype=float)
    each = np.where(np.isnan(each), math.inf, each)
    ranks = non_dominated_ranks(each)
    corner = _corner(each, ranks)
    order: list[int] = []
    for rank in range(int(ranks.max()) + 1):
        left, chosen = list(np.flatnonzero(ranks == rank)), list[tuple[float, ...]]()
        while left:
            volumes = {i: hypervolume([*chosen, tuple(each[i])], corner) for i in left}
            best = max(left, key=lambda i: (volumes[i], *-each[i]))
            if np.all(each[best] < corner):  # what lies outside adds nothing
                chosen.append(tuple(each[best]))
            order.append(int(best))
            left.remove(best)
    return order


def _corner(each: NDArray[np.float64], ranks: NDArray[np.int64]) -> tuple[float, ...]:
    """Where volumes end: the median score, and beyond the costs of all that none dominates."""
    finite = np.isfinite(each).all(1)
    if not finite.any():
        return (-math.inf,) * int(each.shape[1])
    costs = each[finite & (ranks == ranks[finite].min()), 1:]
    ends = costs.max(0) + np.maximum(np.ptp(costs, axis=0), _TWICE)
    return (float(np.median(each[finite, 0])), *map(float, ends))


_TWICE = math.log(2)  # the least that the most expensive one of a front lies inside


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


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume that points dominate, up to a reference point; each axis the less the better.

    >>> hypervolume([(1, 2), (2, 1), (3, 3)], (4, 4))
    8.0
    """
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=False))]
    if not inside or not len(reference):
        return 0.0
    if len(reference) == 1:
        return float(reference[0] - min(p[0] for p in inside))
    last = len(reference) - 1
    ends = [*sorted({p[last] for p in inside}), reference[last]]
    return sum(  # slice by slice along the last axis
        (above - at) * hypervolume([p[:last] for p in inside if p[last] <= at], reference[:last])
        for at, above in itertools.pairwise(ends)
    )
