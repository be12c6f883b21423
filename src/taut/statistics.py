"""What calibration data tell about each site: how much the loss grows as it is pruned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from taut.errors import TaskError
from taut.modules import plain_copy, tensor_at
from taut.types import Site

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss against sparsity for one site, every other site left whole."""

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]
    baseline: float

    def slopes(self, numel: int) -> list[tuple[float, float]]:
        """(damage a weight, weights) of the curve's lower convex hull, in rising order.

        Where a step costs less than the one before, the two are joined; where the loss falls
        again, that is read as luck.
        """
        points = [(0.0, 0.0), *zip(self.sparsities, self.losses, strict=True)]
        worst, hull = 0.0, list[tuple[float, float]]()  # (damage, weights) of each segment
        for (before, _), (sparsity, loss) in itertools.pairwise(points):
            damage = max(0.0, loss - self.baseline - worst)
            worst += damage
            hull.append((damage, (sparsity - before) * numel))
            while len(hull) > 1 and hull[-1][0] * hull[-2][1] <= hull[-2][0] * hull[-1][1]:
                last = hull.pop()
                hull[-1] = (hull[-1][0] + last[0], hull[-1][1] + last[1])
        return [(damage / weights, weights) for damage, weights in hull]


class Statistics:
    """Facts about a model's sites, gathered when they are first asked for.

    model: copied, never touched. loss: gives a network's loss on the calibration data; without it
    whatever needs data refuses.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], float] | None = None) -> None:
        self._model = model
        self._loss = loss
        self._curves: dict[str, Curve] = {}

    def loss(self, model: nn.Module) -> float:
        """The loss of any network on the calibration data. Raises TaskError without data."""
        if self._loss is None:
            raise TaskError(
                "a search for what to keep needs a task with data, got none; without data choose "
                "prune_weights(scope='layer') or scope='global'"
            )
        return self._loss(model)

    def sensitivity(self, site: Site) -> Curve:
        """The loss as this site alone is pruned by magnitude, without recovery."""
        if site.name not in self._curves:
            self._curves[site.name] = self._scan(site)
        return self._curves[site.name]

    def least_damage(self, sites: tuple[Site, ...], sparsity: float) -> dict[str, float]:
        """Sparsities that remove `sparsity` of all the weights at the least summed damage.

        The weights go in the order of what they cost, so that at the end one more weight would
        cost the same at every site.
        """
        steps = sorted(
            (slope, i, weights)
            for i, site in enumerate(sites)
            for slope, weights in self.sensitivity(site).slopes(site.numel)
        )
        total = sum(s.numel for s in sites)
        left = sparsity * total
        removed = [0.0] * len(sites)
        for _, i, weights in steps:
            taken = min(weights, left)
            removed[i] += taken
            left -= taken
        each = {s.name: r / s.numel for s, r in zip(sites, removed, strict=True)}
        if left > 0:  # beyond the last point scanned all sites shrink alike
            kept = (1 - sparsity) * total / (total - sum(removed))
            each = {n: 1 - (1 - s) * kept for n, s in each.items()}
        return each

    @torch.no_grad()
    def _scan(self, site: Site) -> Curve:
        if self._loss is None:
            raise TaskError(
                "a sensitivity scan needs a task with data, got none; without data choose "
                "prune_weights(scope='layer') or scope='global'"
            )
        probe = plain_copy(self._model)
        weight = tensor_at(probe, site.name)
        flat = weight.flatten()  # a copy where the weight is not contiguous
        order = flat.abs().argsort()
        baseline, losses = self._loss(probe), []
        if not math.isfinite(baseline):
            raise TaskError(f"the network's loss on the training data is {baseline}, not a number")
        for sparsity in SPARSITIES:
            flat[order[: round(sparsity * order.numel())]] = 0.0
            weight.copy_(flat.view(weight.shape))
            loss = self._loss(probe)
            losses.append(loss if math.isfinite(loss) else math.inf)
        return Curve(sparsities=SPARSITIES, losses=tuple(losses), baseline=baseline)
