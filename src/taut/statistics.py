"""What calibration data tell about each site: how much the loss grows as it is pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from taut.errors import TaskError
from taut.modules import plain_copy, tensor_at
from taut.types import Site

SPARSITIES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss against sparsity for one site, every other site left whole."""

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]
    baseline: float

    def sparsity_at(self, damage: float) -> float:
        """The largest sparsity up to which the loss grows by at most `damage`."""
        last_sparsity, last_damage = 0.0, 0.0
        worst = 0.0  # the curve is read as rising: later dips are luck
        for sparsity, loss in zip(self.sparsities, self.losses, strict=True):
            worst = max(worst, loss - self.baseline)
            if worst > damage:
                share = (damage - last_damage) / max(worst - last_damage, 1e-12)
                return last_sparsity + share * (sparsity - last_sparsity)
            last_sparsity, last_damage = sparsity, worst
        return last_sparsity


class Statistics:
    """Facts about a model's sites, gathered when they are first asked for.

    model: copied, never touched. loss: gives a network's loss on the calibration data; without it
    whatever needs data refuses.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module], float] | None = None) -> None:
        self._model = model
        self._loss = loss
        self._curves: dict[str, Curve] = {}

    def sensitivity(self, site: Site) -> Curve:
        """The loss as this site alone is pruned by magnitude, without recovery."""
        if site.name not in self._curves:
            self._curves[site.name] = self._scan(site)
        return self._curves[site.name]

    def equal_damage(self, sites: tuple[Site, ...], sparsity: float) -> dict[str, float]:
        """Sparsities whose damages are equal and which remove `sparsity` of all the weights."""
        curves = {s.name: self.sensitivity(s) for s in sites}
        total = sum(s.numel for s in sites)

        def removed(damage: float) -> float:
            return sum(curves[s.name].sparsity_at(damage) * s.numel for s in sites) / total

        low, high = 0.0, max(max(c.losses) for c in curves.values()) + 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if removed(middle) < sparsity else (low, middle)
        each = {name: curve.sparsity_at(high) for name, curve in curves.items()}
        reached = removed(high)
        if reached < sparsity:  # beyond the last point scanned all sites shrink alike
            each = {n: 1 - (1 - s) * (1 - sparsity) / (1 - reached) for n, s in each.items()}
        return each

    @torch.no_grad()
    def _scan(self, site: Site) -> Curve:
        if self._loss is None:
            raise TaskError(
                "a sensitivity scan needs a task with data, got none; without data choose "
                "prune_weights(scope='layer') or scope='global'"
            )
        probe = plain_copy(self._model)
        flat = tensor_at(probe, site.name).view(-1)
        order = flat.abs().argsort()
        baseline, losses = self._loss(probe), []
        for sparsity in SPARSITIES:
            flat[order[: round(sparsity * order.numel())]] = 0.0
            losses.append(self._loss(probe))
        return Curve(sparsities=SPARSITIES, losses=tuple(losses), baseline=baseline)
