"""Which units can be told from others, and by how much of which: the arithmetic of merging.

A weight reads units a[u], so that its layer gives y = Σ over u of W[u] · a[u] (+ bias). A unit that
goes is told by those that stay,

    a[j] ≈ Σ over i that stay of mix[i, j] · a[i] (+ shift[j])
    W'[i] = W[i] + Σ over j that go of mix[i, j] · W[j]

with the shift where the layer has a bias to take it, bias' = bias + Σ shift[j] · W[j]. A unit's
angle is that between a[j] and what tells it, over the data: sin² = |a[j] − told|² / |a[j]|².

    pairs           one unit tells it, the same for every weight: mix[i, j] = a[i]·a[j] / |a[i]|².
                    Which ones stay is chosen greedily, as medoids are: the next unit to go is the
                    one whose going adds least to Σ |W[j]|² · |a[j] − told|² over all that are gone.
    least_squares   all that stay tell it. The next to go adds least to the error of the outputs
                    after the others made up for it: |W'[j]|² / inverse(moments)[j, j], as in
                    Optimal Brain Surgeon (Hassibi, Stork, NIPS 1992), with whole units for weights.

Errors of several weights that read the same units are added, each relative to its own outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """One weight and the units that it reads.

    moments: [units, units] float64, means over the data of a[u] · a[v], about the means where
    there is a bias. means: [units] float64, zeros without a bias. weight: [units, numbers] float64.
    """

    moments: Tensor
    means: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Joined:
    """keep: the units that stay, rising. mixes: for each reading, [stay, gone] float64.

    angle: the widest between a unit that is gone and what tells it, in degrees. error: of the
    outputs, relative, in the square, summed over the readings.
    """

    keep: list[int]
    gone: list[int]
    mixes: list[Tensor]
    angle: float
    error: float

    def shift(self, reading: Reading, mix: Tensor) -> Tensor:
        """[gone]: what a bias has to make up for."""
        return reading.means[self.gone] - reading.means[self.keep] @ mix


def pairs(readings: Sequence[Reading], count: int, angle: float) -> Joined:
    """Let all but `count` units go, or fewer, each told by one unit within the angle (degrees)."""
    units = len(readings[0].weight)
    away = torch.zeros(units, units, dtype=torch.float64)  # [i tells, j is told] sin²
    harm = torch.zeros_like(away)
    for r in readings:
        power = r.moments.diagonal()
        left = power - r.moments.square() / power.clamp(min=_least(power))[:, None]
        left = left.clamp(min=0)
        away = torch.maximum(away, left / power.clamp(min=_least(power)))
        harm += left * r.weight.square().sum(1) / _energy(r)
    harm = harm.masked_fill(away > _sine(angle), math.inf)
    harm.fill_diagonal_(0)
    keep, teller = _medoids(harm, count)
    gone = [j for j in range(units) if j not in set(keep)]
    tells = teller[gone]
    place = {u: k for k, u in enumerate(keep)}
    rows = torch.tensor([place[int(t)] for t in tells], dtype=torch.int64)
    mixes = []
    for r in readings:
        power = r.moments.diagonal()
        mix = torch.zeros(len(keep), len(gone), dtype=torch.float64)
        each = r.moments[tells, gone] / power[tells].clamp(min=_least(power))
        mix[rows, torch.arange(len(gone))] = each
        mixes.append(mix)
    return _joined(keep, gone, mixes, away[tells, gone], harm[tells, gone].sum())


def _medoids(harm: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Columns that stay, and who tells each: backward, the cheapest to go first.

    harm: [i tells, j is told], 0 on the diagonal, infinite where it may not be. The price of a unit
    is what it costs to tell it, and all that it tells, by the next best.
    """
    harm, units = harm.clone(), len(harm)
    alive = torch.ones(units, dtype=torch.bool)
    cost, best = (t.clone() for t in harm.topk(min(2, units), dim=0, largest=False))
    own = torch.arange(units)
    while int(alive.sum()) > count and units > 1:
        price = torch.zeros(units, dtype=torch.float64)
        price.index_add_(0, best[0], cost[1] - cost[0])
        price = price.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(~alive, math.inf)
        leaves = int(price.argmin())
        if not math.isfinite(float(price[leaves])):
            break
        alive[leaves] = False
        harm[leaves] = math.inf
        again = (best == leaves).any(0)
        cost[:, again], best[:, again] = harm[:, again].topk(2, dim=0, largest=False)
    teller = torch.where(alive, own, best[0])
    return alive.nonzero()[:, 0].tolist(), teller


def least_squares(readings: Sequence[Reading], count: int, angle: float) -> Joined:
    """Let all but `count` units go, or fewer, told by all that stay within the angle (degrees)."""
    states = [_Eliminated(r) for r in readings]
    units, most = len(readings[0].weight), _sine(angle)
    alive = torch.ones(units, dtype=torch.bool)
    gone: list[int] = []
    error = 0.0
    while units - len(gone) > max(count, 1):
        price = sum((s.price() for s in states), torch.zeros(units, dtype=torch.float64))
        for s in states if most < 1 else ():
            price = price.masked_fill(s.away(gone) > most, math.inf)
        leaves = int(price.masked_fill(~alive, math.inf).argmin())
        if not (alive[leaves] and math.isfinite(float(price[leaves]))):
            break
        error += float(price[leaves])
        for s in states:
            s.remove(leaves, gone)
        alive[leaves] = False
        gone.append(leaves)
    keep = alive.nonzero()[:, 0].tolist()
    away = torch.zeros(len(gone), dtype=torch.float64)
    for s in states:
        away = torch.maximum(away, s.left[gone] / s.power[gone])
    order = sorted(range(len(gone)), key=lambda i: gone[i])
    gone = [gone[i] for i in order]
    mixes = [s.mix[keep][:, gone] for s in states]
    return _joined(keep, gone, mixes, away, error)


class _Eliminated:
    """One reading as its units go one by one: inverse, weights made up for, and mixes.

    left: [units] what of a unit that is gone is not told.
    """

    def __init__(self, reading: Reading) -> None:
        power = reading.moments.diagonal()
        steady = _STEADY * power.mean().clamp(min=1e-30)
        self.moments = reading.moments + steady * torch.eye(len(power), dtype=torch.float64)
        self.power = self.moments.diagonal().clone()
        self.inverse = torch.linalg.inv(self.moments)
        self.weight = reading.weight.clone()
        self.energy = _energy(reading)
        self.mix = torch.zeros_like(self.moments)  # [stays, gone]
        self.left = torch.zeros_like(self.power)

    def alone(self) -> Tensor:
        """[units]: what of each is not told by all others that stay."""
        alone: Tensor = 1 / self.inverse.diagonal().clamp(min=1e-300)
        return alone

    def price(self) -> Tensor:
        """[units]: what the outputs lose if it goes."""
        price: Tensor = self.weight.square().sum(1) * self.alone() / self.energy
        return price

    def away(self, gone: list[int]) -> Tensor:
        """[units]: the largest sin² if it went, its own or that of one that is gone."""
        alone = self.alone()
        worst = alone / self.power
        if gone:
            more = self.left[gone] + self.mix[:, gone].square() * alone[:, None]
            worst = torch.maximum(worst, (more / self.power[gone]).amax(1))
        return worst

    def remove(self, leaves: int, gone: list[int]) -> None:
        column = self.inverse[:, leaves].clone()
        alone = 1 / column[leaves]
        told = -column * alone  # by those that stay
        told[[leaves, *gone]] = 0
        self.weight += told[:, None] * self.weight[leaves]
        self.weight[leaves] = 0
        before = self.mix[leaves].clone()
        self.left += before.square() * alone
        self.left[leaves] = alone
        self.mix += told[:, None] * before
        self.mix[:, leaves] = told
        self.mix[leaves] = 0
        self.inverse -= column[:, None] * column * alone
        self.inverse[leaves] = self.inverse[:, leaves] = 0


_STEADY = 1e-9
"""Of the mean power, added to each unit's, so that units that are the same can be told apart."""

FITS: dict[str, Callable[[Sequence[Reading], int, float], Joined]] = {
    "pairs": pairs,
    "least_squares": least_squares,
}
"""How a unit that goes is told by those that stay."""


def _joined(
    keep: list[int], gone: list[int], mixes: list[Tensor], away: Tensor, error: Tensor | float
) -> Joined:
    widest = float(away.max()) if len(away) else 0.0
    degrees = math.degrees(math.asin(math.sqrt(min(max(widest, 0.0), 1.0))))
    return Joined(keep=keep, gone=gone, mixes=mixes, angle=degrees, error=float(error))


def _sine(angle: float) -> float:
    """The square of the sine, with room for rounding; no limit from 90 degrees on."""
    return math.inf if angle >= 90 else math.sin(math.radians(angle)) ** 2 + 1e-6


def _least(power: Tensor) -> float:
    """What counts as nothing beside the loudest unit."""
    return max(1e-12 * float(power.max()), 1e-300)


def _energy(reading: Reading) -> Tensor:
    """The mean square of what the weight gives, as if each column met its unit alone."""
    told = (reading.weight.T @ reading.moments) * reading.weight.T
    return told.sum().clamp(min=1e-300)
