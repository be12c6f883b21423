"""Units removed for good: channels, attention heads, hidden units, the width of an embedding.

    W' = W[kept rows][:, kept columns]    for every parameter that a unit goes through

What must go together is read off the exported graph (groups), so that what is left is an ordinary
network of smaller layers. In each group the units of the smallest score go (unit_scores.py).

Li et al. (ICLR 2017); Fang et al.: DepGraph (CVPR 2023) and Isomorphic Pruning (ECCV 2024), which
ranks groups of the same structure together. Where we differ: groups come from symbols on every
place of every dimension in PyTorch's own graph, and a cut is checked by running what it leaves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.groups import Cuts, Group, Groups
from taut.modules import clone
from taut.reshaping import Reshaping
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.timing import reduced_to
from taut.trace import Trace
from taut.unit_cuts import Keep, chosen_groups, cut_units, refuse_packed, rounded
from taut.unit_scores import ABSOLUTE, UNIT_CRITERIA, unit_scores

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class PruneChannels(Reshaping):
    """Remove the units that matter least: channels, heads, hidden units, embedding widths.

    To go step by step, write it several times with a recovery between:
    `prune_channels(ratio=0.2) > recover(epochs=2) > prune_channels(ratio=0.2) > recover(epochs=5)`.
    Network Slimming is `regularise(kind="slimming") > recover(epochs=5) >
    prune_channels(criterion="scale", ranking="global") > recover(epochs=5)`.

    only: patterns of weights: a group is cut where they match all weights whose rows its units are,
    and `!` leaves every group whole that goes through what it names.
    """

    ratio: float = option(0.5, low=0, below=1, help="the fraction removed")
    of: str = option(
        "units", choices=("units", "macs", "parameters", "latency"),
        help="what the fraction is of: units, or at least so much of the network's work, size or "
        "time for one example, measured here and now",
    )  # fmt: skip
    criterion: str = option(
        "group", choices=tuple(UNIT_CRITERIA),
        help="the score: norm of all its weights (group), of what makes it (l1, l2), scale of its "
        "norm (scale), gradient · weight (taylor), diagonal Hessian (obd), distance from the other "
        "units (geometric_median), or random",
    )  # fmt: skip
    ranking: str = option(
        "local", choices=("local", "isomorphic", "global"),
        help="what units are ranked among: those of their group, of groups of the same structure, "
        "or all",
    )  # fmt: skip
    round_to: int = option(1, low=1, high=1024, help="widths that are cut become multiples of this")
    floor: float = option(0.1, low=0, high=1, help="fraction of its units that every group keeps")
    as_graph: bool = option(
        True,
        help="where sizes stand in the network's code as plain numbers: let its exported graph, "
        "without dropout, take its place (else those groups stay whole)",
    )

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        refuse_packed(self.name, model)
        groups = Groups(model, trace.example)
        chosen = chosen_groups(self.name, self.only, groups)
        keep = self.keep(model, groups, chosen, statistics)
        if not keep:
            _log.warning("prune_channels: so little is to go that every group stays whole")
            return model
        return cut_units(self.name, model, groups, keep, self.as_graph)[0]

    def keep(
        self, model: nn.Module, groups: Groups, chosen: list[Group], statistics: Statistics
    ) -> Keep:
        """The units that stay, of every group that loses any."""
        scores = {g.name: unit_scores(self.criterion, model, g, statistics) for g in chosen}

        def at(ratio: float) -> Keep:
            return dict(self._kept(groups, chosen, scores, ratio))

        if self.of == "units":
            return at(self.ratio)
        if self.of == "latency":
            return at(self._to_latency(model, groups, at))
        return self._to_budget(groups.macs if self.of == "macs" else groups.parameters, at)

    def _to_latency(self, model: nn.Module, groups: Groups, at: Callable[[float], Keep]) -> float:
        """The least ratio of units at which the cut network was fast enough when it was timed."""

        def reduced(ratio: float) -> nn.Module:
            keep = at(ratio)
            if not keep:
                return model
            return cut_units(self.name, clone(model), groups, keep, self.as_graph, quiet=True)[0]

        ratio, share = reduced_to(clone(model), reduced, groups.example, 1 - self.ratio)
        if share > 1 - self.ratio:
            raise self._out_of_reach(share, f"{100 * share:.1f} % of the time is")
        _log.info("prune_channels: at batch 1 it takes %.1f %% of the time", 100 * share)
        return ratio

    def _out_of_reach(self, share: float, left: str) -> RecipeError:
        return RecipeError(
            f"prune_channels: ratio={self.ratio:g} of {self.of} is out of reach: with "
            f"floor={self.floor:g} and round_to={self.round_to} at most {1 - share:.3f} can go "
            f"({left} left); lower the floor or ask for less"
        )

    def _to_budget(self, count: Callable[[Cuts], int], at: Callable[[float], Keep]) -> Keep:
        """The least ratio of units that meets the budget, to a thousandth."""
        whole, least = max(count({}), 1), at(1.0)
        most = (1 - self.ratio) * whole
        if count(least) > most:
            raise self._out_of_reach(count(least) / whole, f"{count(least):,} of {whole:,} are")
        low, high, best = 0.0, 1.0, least
        while high - low > 1e-3:
            middle = (low + high) / 2
            keep = at(middle)
            if count(keep) <= most:
                high, best = middle, keep
            else:
                low = middle
        return best

    def _kept(
        self, groups: Groups, chosen: list[Group], scores: dict[str, Tensor], ratio: float
    ) -> Iterator[tuple[str, list[int]]]:
        counts = {}
        for pool in self._pools(groups, chosen):
            if self.ranking == "local":
                (group,) = pool
                counts[group.name] = group.units - round(ratio * group.units)
                continue
            relative = {
                g.name: scores[g.name]
                if self.criterion in ABSOLUTE
                else scores[g.name] / scores[g.name].mean().clamp(min=1e-300)
                for g in pool
            }
            ranked = torch.cat(list(relative.values())).sort().values
            gone = round(ratio * len(ranked))
            bar = ranked[gone - 1] if gone else ranked[0] - 1
            counts |= {name: int((score > bar).sum()) for name, score in relative.items()}
        for group in chosen:
            count = rounded(group, counts[group.name], self.floor, self.round_to)
            if count < group.units:
                best = scores[group.name].argsort(descending=True, stable=True)[:count]
                yield group.name, best.sort().values.tolist()

    def _pools(self, groups: Groups, chosen: list[Group]) -> list[list[Group]]:
        if self.ranking == "local":
            return [[g] for g in chosen]
        pools: dict[object, list[Group]] = {}
        for group in chosen:
            kind = tuple((m.dim, len(groups.tensors[m.name][2]), m.trained) for m in group.members)
            pools.setdefault(kind if self.ranking == "isomorphic" else None, []).append(group)
        return list(pools.values())
