"""Units that say what others say are joined with them: what read them reads those that stay.

    a[j] ≈ Σ over stays i of mix[i, j] · a[i],    W'[:, i] = W[:, i] + Σ over j mix[i, j] · W[:, j]

Channels, neurons, heads and hidden units whose outputs are nearly parallel on the calibration data
need not all be computed. Each unit that goes is told by one that stays, or by all (least squares;
joining.py has the formulas), and every weight that read it is changed by what that weight itself
meets in the data, so that this is right behind sums, pools and activations of any kind. The bias
of the reading layer, or the batch norm behind it, takes the difference of the means. Then the unit
is cut as in prune_channels. Units that have ended (always zero) go first, and cost nothing.

Srinivas, Babu: Data-free parameter pruning for deep neural networks (BMVC 2015), which joins
neurons of equal incoming weights; Mariet, Sra: Diversity networks (ICLR 2016), whose reweighting
by the data is the least squares here; He et al.: Channel pruning (ICCV 2017). Where we differ: what
is compared are outputs on data, at each weight that reads them; the choice of units and the change
of weights serve one and the same error, that of the reading layers' outputs; groups come from the
exported graph, so that residual sums and recurrent layers take part. Where something else than
weights looks at the units together (a layer norm, a softmax), the group stays whole and the log
says why. All is fitted to the network as it was: after joining much, recover.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.errors import RecipeError, TaskError
from taut.groups import Group, Groups, Reader, readers
from taut.joining import FITS, Joined, Reading
from taut.modules import tensor_at
from taut.products import UnitMoments
from taut.reshaping import Reshaping
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Trace
from taut.unit_cuts import chosen_groups, cut_units, refuse_packed, rounded

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class MergeNeurons(Reshaping):
    """Join units whose outputs are nearly parallel on the data, and fold what read them.

    `merge_neurons(ratio=0.9, angle=5)` joins whatever is within five degrees of what stays;
    `merge_neurons(ratio=0.3)` joins the 30 % that cost least. only: as in prune_channels.
    """

    ratio: float = option(0.25, low=0, below=1, help="the most of each group's units that go")
    angle: float = option(
        90.0, low=0, high=90, unit="degree",
        help="units go only within this angle of what tells them; 90 is no limit",
    )  # fmt: skip
    fit: str = option(
        "least_squares", choices=tuple(FITS),
        help="what tells a unit that goes: one that stays (pairs) or all that stay",
    )  # fmt: skip
    round_to: int = option(1, low=1, high=1024, help="widths that are cut become multiples of this")
    as_graph: bool = option(
        True,
        help="where sizes stand in the network's code as plain numbers: let its exported graph, "
        "without dropout, take its place (else those groups stay whole)",
    )

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        refuse_packed(self.name, model)
        groups = Groups(model, trace.example)
        joined = self._joined(groups, self._readers(groups), statistics)
        keep = {name: j.keep for name, (j, _) in joined.items() if j.gone}
        if not keep:
            _log.warning(
                "merge_neurons: no unit lies within angle=%g of what stays (ratio=%g): every group "
                "stays whole", self.angle, self.ratio,
            )  # fmt: skip
            return model
        model, done = cut_units(self.name, model, groups, keep, self.as_graph)
        _fold(model, groups, done, joined)
        return model

    def _readers(self, groups: Groups) -> dict[str, list[Reader]]:
        """The weights that read each group that can be joined; the others are named in the log."""
        found, reasons = dict[str, list[Reader]](), dict[str, str]()
        for group in chosen_groups(self.name, self.only, groups):
            read, why = readers(groups, group)
            if why:
                reasons[group.name] = why
                _log.info("merge_neurons: %s stays whole: %s", group.name, why)
            else:
                found[group.name] = read
        if not found:
            told = "; ".join(f"{n}: {why}" for n, why in list(reasons.items())[:3])
            raise RecipeError(
                f"merge_neurons: no group of only={self.only!r} can be joined ({told}); use "
                "prune_channels"
            )
        return found

    def _joined(
        self, groups: Groups, read: dict[str, list[Reader]], statistics: Statistics
    ) -> dict[str, tuple[Joined, list[tuple[Reader, Reading]]]]:
        """What becomes of every group's units."""
        wanted = [(r.name, r.dim, torch.from_numpy(r.places)) for rs in read.values() for r in rs]
        try:
            seen = iter(statistics.units(wanted))
        except TaskError as error:
            raise RecipeError(f"merge_neurons: {error}; or use prune_channels") from error
        found = {}
        for name, its in read.items():
            each = []
            for reader in its:
                moments = next(seen)
                if moments.rows:
                    weight = groups.tensors[reader.name][1].detach().double().cpu()
                    each.append((reader, _reading(reader, moments, weight)))
            if len(each) < len(its):
                _log.info("merge_neurons: %s stays whole: the data do not reach %s", name,
                          ", ".join({r.name for r in its} - {r.name for r, _ in each}))  # fmt: skip
                continue
            joined = self._choose(groups[name], [reading for _, reading in each])
            found[name] = joined, each
            _log.info(
                "merge_neurons: %s: %d of %d units are told by the others, at most %.1f degrees "
                "off; outputs change by %.2g of their size",
                name, len(joined.gone), groups[name].units, joined.angle, joined.error**0.5,
            )  # fmt: skip
        return found

    def _choose(self, group: Group, readings: list[Reading]) -> Joined:
        least = rounded(group, group.units - round(self.ratio * group.units), 0.0, self.round_to)
        joined = FITS[self.fit](readings, least, self.angle)
        count = rounded(group, len(joined.keep), 0.0, self.round_to)
        if count != len(joined.keep):  # the angle left a width that is no multiple
            joined = FITS[self.fit](readings, count, self.angle)
        return joined


def _units(reader: Reader, weight: Tensor) -> Tensor:
    """[units, places of each, ...]: what a weight has for each unit; a copy."""
    return weight.movedim(reader.dim, 0)[torch.from_numpy(reader.places)]


def _reading(reader: Reader, seen: UnitMoments, weight: Tensor) -> Reading:
    if not bool(weight.isfinite().all()):
        raise RecipeError(f"merge_neurons: {reader.name!r} holds NaN or infinite weights")
    moments, means = seen.moments.cpu() / seen.rows, seen.sums.cpu() / seen.rows
    if reader.bias or reader.mean:
        moments = moments - means[:, None] * means
    else:
        means = torch.zeros_like(means)
    return Reading(moments=moments, means=means, weight=_units(reader, weight).flatten(1))


@torch.no_grad()
def _fold(
    model: nn.Module, groups: Groups, done: dict[str, list[int]],
    joined: dict[str, tuple[Joined, list[tuple[Reader, Reading]]]],
) -> None:  # fmt: skip
    """Write into the network, which is cut, what its weights become."""
    full: dict[str, Tensor] = {}

    def held(name: str) -> Tensor:
        if name not in full:
            full[name] = groups.tensors[name][1].detach().double().clone()
        return full[name]

    for name in done:
        found, each = joined[name]
        for (reader, reading), mix in zip(each, found.mixes, strict=True):
            rows = held(reader.name).movedim(reader.dim, 0)  # a view: [places, ...]
            places = torch.from_numpy(reader.places)
            lost = rows[places[found.gone]]  # [gone, places of each, ...]
            mix = mix.to(rows.device)
            rows[places[found.keep]] += torch.einsum("kg,g...->k...", mix, lost)
            if after := reader.bias or reader.mean:
                shift = found.shift(reading, mix.cpu()).to(rows.device)
                told = torch.einsum("g,gpo...->o...", shift, lost)
                held(after).add_(told.reshape(len(told), -1).sum(1), alpha=1 if reader.bias else -1)
    times = groups.times(done)
    for name, value in full.items():
        for dim, labels in enumerate(groups.tensors[name][2]):
            kept = torch.from_numpy(groups.kept(labels, times)).to(value.device)
            value = value.index_select(dim, kept)
        target = tensor_at(model, name)
        target.copy_(value.to(target.dtype))
