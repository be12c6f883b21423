"""More units than the network had, for layers whose weights will have few bits.

    W'[u'] = W[u],    W'[·, u'] = W[·, u] / r[u]    for each of the r[u] copies u' of a unit u

What makes a unit is copied and what reads it is divided among the copies, so that the network
computes what it did; a little noise on what makes the copies lets training tell them apart. A
binary layer of one and a half times the width takes 2.25 bits for every weight it had.

Chen, Goodfellow, Shlens: Net2Net (ICLR 2016), section 2.1, for the copies; Mishra and others: WRPN,
Wide Reduced-Precision Networks (ICLR 2018), for more units where bits are few. Where we differ: the
units come from the exported graph (groups), and a width whose change alters what the network
computes (a layer norm, a residual sum that reads it unevenly) is left as it was.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taut import edits
from taut.errors import RecipeError
from taut.groups import Cuts, Group, Groups, cut
from taut.modules import clone, tensor_at
from taut.reshaping import Reshaping
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Example, Trace
from taut.types import Cost, Site
from taut.unit_cuts import chosen_groups

_log = logging.getLogger("taut")
TOLERANCE = 1e-3
"""How far outputs may move, of the largest one: sums in another order, no more."""


@register_step
@dataclass(frozen=True, kw_only=True)
class Widen(Reshaping):
    """Copy units, so that layers become wider and compute the same: before `binarize`, say.

    `widen(ratio=1.5) > binarize() > recover(epochs=5)`. A network is widened once.

    only: patterns of weights: a group is widened where they match all weights whose rows its units
    are, and `!` leaves every group as it is that goes through what it names.
    """

    ratio: float = option(1.5, low=1, high=2, help="units after, to units before")
    noise: float = option(
        0.05, low=0, high=1, help="on what makes a copy, in standard deviations of each weight"
    )
    round_to: int = option(1, low=1, high=1024, help="widths become multiples of this")
    seed: int = option(0, low=0, high=2**31 - 1, help="of the units copied, and of the noise")

    def predict(self, site: Site) -> Cost:
        """Bytes at two a number, and MACs, where both widths of a site grow."""
        return Cost(
            size_bytes=2.0 * site.numel * self.ratio**2, macs=round(site.macs * self.ratio**2)
        )

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        if any(isinstance(e, edits.Widen) for e in edits.of(model)):
            raise RecipeError("widen: a network is widened once; ask for the whole ratio at once")
        groups = Groups(model, trace.example)
        rng = np.random.default_rng(self.seed)
        wanted = {g.name: self._units(g, rng) for g in chosen_groups(self.name, self.only, groups)}
        asked = {n: k for n, k in wanted.items() if len(k) > groups[n].units}
        example = trace.example_on(model)
        before = _outputs(model, example)
        keep = {}
        for name, units in asked.items():
            why = _changes(clone(model), groups, {name: units}, example, before)
            if why:
                _log.warning("widen: %s stays as it was: %s", name, why)
            else:
                keep[name] = units
                _log.info("widen: %s: %d units of %d", name, len(units), groups[name].units)
        why = _changes(clone(model), groups, keep, example, before) if keep else "no group"
        if why:
            raise RecipeError(
                f"widen: no width of this network can change by {self.ratio:g} alone ({why}); name "
                "layers by only=, or leave it out"
            )
        cut(model, groups, keep)
        _share(model, groups, keep)
        self._disturb(model, groups, keep)
        return model

    def _units(self, group: Group, rng: np.random.Generator) -> list[int]:
        """All units in their order, those drawn twice."""
        width = min(m.places.shape[1] for m in group.members if m.trained)
        step = self.round_to // math.gcd(self.round_to, width)
        most = min(2 * group.units, 2 * group.units // step * step)
        count = min(math.ceil(round(self.ratio * group.units) / step) * step, most)
        extra = max(count - group.units, 0)
        return sorted([*range(group.units), *rng.permutation(group.units)[:extra].tolist()])

    @torch.no_grad()
    def _disturb(self, model: nn.Module, groups: Groups, keep: Cuts) -> None:
        """Noise on the rows of the second copies."""
        generator = torch.Generator().manual_seed(self.seed)
        times = groups.times(keep)
        for name in dict.fromkeys(
            m.name for g in keep for m in groups[g].members if m.trained and m.dim == 0
        ):
            weight = tensor_at(model, name)
            places = groups.kept(groups.tensors[name][2][0], times)
            again = torch.ones(len(places), dtype=torch.bool)
            again[np.unique(places, return_index=True)[1]] = False
            if weight.dim() > 1:
                drawn = torch.randn(weight[again].shape, generator=generator)
                weight[again] += self.noise * weight.std() * drawn.to(weight)


def _changes(
    model: nn.Module, groups: Groups, keep: Cuts, example: Example, before: list[Tensor]
) -> str:
    """Why a copy of the network computes something else with these units; empty if it does not."""
    try:
        cut(model, groups, keep)
    except RecipeError as error:
        return str(error)
    _share(model, groups, keep)
    for was, now in zip(before, _outputs(model, example), strict=True):
        moved = float((was - now).abs().max()) if was.numel() else 0.0
        if not moved <= TOLERANCE * max(float(was.abs().max()), 1e-6):
            return f"outputs would move by {moved:.2g}: what reads its units is not a weight alone"
    return ""


@torch.no_grad()
def _share(model: nn.Module, groups: Groups, keep: Cuts) -> None:
    """Divide what reads a unit among its copies: the columns of weights, not their rows."""
    times = groups.times(keep)
    for name in dict.fromkeys(m.name for g in keep for m in groups[g].members if m.trained):
        weight = tensor_at(model, name)
        for dim, labels in enumerate(groups.tensors[name][2]):
            if dim and weight.shape[dim] > 1:
                each = times[groups.flow.symbols.find(labels)][groups.kept(labels, times)]
                shares = torch.from_numpy(each).to(weight)
                weight /= shares.reshape([-1 if d == dim else 1 for d in range(weight.dim())])


@torch.no_grad()
def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """What a network in eval mode gives for its example; its mode is left as it was."""
    training = {m: m.training for m in model.modules()}
    try:
        out = model.eval()(*example[0], **example[1])
    finally:
        for module, was in training.items():
            module.training = was
    leaves = pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
