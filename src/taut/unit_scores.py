"""How much a unit matters (a channel, a head, a hidden unit): scores by which they are ranked.

    l1, l2            Σ |w|, sqrt(Σ w²) of the rows that make it (Li et al.: Pruning Filters for
                      Efficient ConvNets, ICLR 2017)
    group             sqrt(Σ w²) of all that goes with it, what reads it too (Fang et al.: DepGraph,
                      CVPR 2023)
    scale             Σ |gamma| of its norms (Liu et al.: Network Slimming, ICCV 2017)
    taylor            (Σ g · w)² over all its weights (Molchanov et al., CVPR 2019)
    obd               ½ Σ h · w² over all its weights (LeCun, Denker, Solla, 1989)
    geometric_median  Σ over the other units of the distance between the rows that make them (He et
                      al.: Filter Pruning via Geometric Median, CVPR 2019)
    random            uniform, from PyTorch's generator

Shapes: [units]. taylor and obd estimate the loss that a unit's end adds; the others say nothing
beyond their group. g and h: mean and mean square of the gradients of single examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.groups import Group, Member
from taut.importance import obd
from taut.modules import tensor_at
from taut.statistics import Statistics
from taut.types import Site

ABSOLUTE = ("taylor", "obd")
"""Criteria in units of the loss: they compare units of different groups as they are."""


@dataclass(frozen=True, eq=False)
class _Units:
    """A group in a network, and what the data tell."""

    model: nn.Module
    group: Group
    statistics: Statistics

    @property
    def members(self) -> list[Member]:
        return [m for m in self.group.members if m.trained]

    @property
    def makers(self) -> list[Member]:
        """The matrices whose rows are the units; all members where there are none."""
        matrices = [m for m in self.members if len(self.weight(m).shape) > 1]
        return [m for m in matrices if m.dim == 0] or matrices or self.members

    def weight(self, member: Member) -> Tensor:
        return tensor_at(self.model, member.name).detach().cpu().double()

    def rows(self, member: Member, values: Tensor | None = None) -> Tensor:
        """What each unit has in a member: [units, numbers]."""
        values = self.weight(member) if values is None else values
        return values.movedim(member.dim, 0)[torch.from_numpy(member.places)].flatten(1)

    def of_loss(self, score: Callable[[Tensor, Site], Tensor]) -> list[Tensor]:
        """A score of every weight in a matrix, by unit."""
        found = []
        for member in self.members:
            weight = self.weight(member)
            if weight.dim() > 1:
                site = Site(name=member.name, kind="linear", shape=tuple(weight.shape), macs=0,
                            aliases=member.names[1:])  # fmt: skip
                found.append(self.rows(member, score(weight, site)).sum(1))
        return found


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _scale(units: _Units) -> Tensor:
    norms = [
        m for m in units.members if m.name.endswith("weight") and len(units.weight(m).shape) == 1
    ]
    if not norms:
        raise RecipeError(
            f"criterion 'scale' needs a norm behind every group, got none in "
            f"{units.group.name!r}; leave it out by only='!{units.members[0].name}' or choose "
            "'group'"
        )
    return _total([units.rows(m).abs().sum(1) for m in norms])


def _median(units: _Units) -> Tensor:
    rows = torch.cat([units.rows(m) for m in units.makers], 1)
    return torch.cdist(rows, rows).sum(1)


def _gradient(units: _Units, weight: Tensor, site: Site) -> Tensor:
    return units.statistics.gradients(site).mean * weight


UNIT_CRITERIA: dict[str, Callable[[_Units], Tensor]] = {
    "group": lambda u: _total([u.rows(m).square().sum(1) for m in u.members]).sqrt(),
    "l1": lambda u: _total([u.rows(m).abs().sum(1) for m in u.makers]),
    "l2": lambda u: _total([u.rows(m).square().sum(1) for m in u.makers]).sqrt(),
    "scale": _scale,
    "taylor": lambda u: _total(u.of_loss(lambda w, site: _gradient(u, w, site))).square(),
    "obd": lambda u: _total(
        u.of_loss(lambda w, site: obd(w, u.statistics.gradients(site).squares))
    ),
    "geometric_median": _median,
    "random": lambda u: torch.rand(u.group.units, dtype=torch.float64),
}
"""The score that each criterion gives the units of a group, the larger the more it matters."""


def unit_scores(criterion: str, model: nn.Module, group: Group, statistics: Statistics) -> Tensor:
    """[units] float64. Raises RecipeError for weights that are no numbers."""
    units = _Units(model, group, statistics)
    scores = UNIT_CRITERIA[criterion](units)
    if not bool(scores.isfinite().all()):
        raise RecipeError(f"group {group.name!r} holds NaN or infinite weights")
    return scores
