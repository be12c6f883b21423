"""Pruning: the weights that matter least are removed, the others are kept and trained on.

    W'[i, j] = W[i, j] · mask[i, j],    mask[i, j] = score[i, j] among the site's largest

The score is the criterion's (importance.py): magnitude, or what gradients or inputs on the training
data tell. How many each site keeps follows from a fraction (of each layer, of all layers together,
or shared out by sensitivity), from one threshold, from Han's rule, threshold = quality · std(W), or
from a pattern like 2:4 (two of every four weights in a row stay). Blocks like 16x1 (sixteen outputs
of one input) take a fraction and go as one, by the sum of their scores. What a pattern leaves is
written and run as such (pattern_weights.py).

Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks
(NIPS 2015). Where we differ: the sensitivity rule finds the layers' strengths by itself, as those
that do the least summed damage before recovery; LAMP scores, score / Σ of the layer's scores that
are no smaller (Lee et al., ICLR 2021), balance the layers without a scan and never empty one;
positions are coded as a bitmap under a learned model of rows and columns instead of gaps of fixed
width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from taut.dead_units import drop_dead_units
from taut.errors import RecipeError
from taut.importance import CRITERIA, choose
from taut.keep_search import SEARCHES, Problem
from taut.mask import Mask
from taut.modules import tensor_at
from taut.pattern import NOfM, Pattern, largest
from taut.recoding import Form, Recoding, chain
from taut.sparse_weight import sparse_bytes
from taut.statistics import Statistics
from taut.technique import Technique, option, register_step
from taut.trace import Trace
from taut.types import Site

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class PruneWeights(Recoding):
    """Remove the weights that matter least.

    Applied again to a site, it prunes further; what was removed stays removed. They go at once, or
    over the recovery that follows as a `schedule` says.

    All criteria but magnitude and random need a task with data. obs and fisher adjust the weights
    that stay for those that go. wanda keeps the same share of every output row. What any criterion
    but magnitude removes is gone for good: its weight is zero under the mask.

    pattern: N:M decides by itself how many stay, whatever sparsity and scope say. Of blocks stays
    what these leave, rounded down to whole ones; where a layer's outputs are no multiple of a
    block, the last one is shorter. A layer smaller than one group or block is refused: leave it out
    by `only`.
    """

    sparsity: float = option(0.9, low=0, below=1, help="fraction of the weights removed")
    scope: str = option(
        "sensitivity",
        choices=("sensitivity", "lamp", "global", "layer", *SEARCHES),
        help="what the fraction is of: each layer, or all weights together, ranked by score "
        "(global), by score relative to the layer's larger ones (lamp), shared out by a "
        "scan of each layer's sensitivity, or by a search (keep_search) that tries allocations",
    )
    criterion: str = option(
        "magnitude", choices=tuple(CRITERIA),
        help="the score: |w|, gradient · weight (taylor), diagonal Hessian (obd), inverse Hessian "
        "of each layer's inputs (obs), blocks of the Fisher matrix (fisher), |w| · norm of the "
        "inputs (wanda), or random",
    )  # fmt: skip
    pattern: str = option(
        "", help="2:4: N of every M weights in a row stay, instead of a fraction; 4x1 or 16x1: "
        "blocks of outputs of one input stay or go as one",
    )  # fmt: skip
    threshold: float | None = option(None, low=0, help="instead: remove |w| below this")
    quality: float | None = option(None, low=0, help="instead: remove |w| < quality · std(W)")
    floor: float = option(0.002, low=0, high=1, help="fraction that every site keeps at least")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {n: getattr(self, n) for n in ("threshold", "quality", "pattern")}
        rules = [f"{n}={v!r}" for n, v in given.items() if v not in (None, "")]
        if len(rules) > 1:
            names = " and ".join(r.partition("=")[0] for r in rules)
            raise RecipeError(
                f"prune_weights: {names} are two rules for one thing, got {' and '.join(rules)}; "
                "give one"
            )
        if self._cut is None and rules and self.criterion != "magnitude":
            raise RecipeError(
                "prune_weights: threshold and quality are rules for magnitudes, got "
                f"{rules[0]} and criterion={self.criterion!r}; give a sparsity"
            )

    @property
    def may_reopen(self) -> bool:
        """Whether a schedule can open the mask again and close it in steps, by magnitude."""
        return self.criterion == "magnitude"

    @property
    def _cut(self) -> Pattern | None:
        """The pattern, read; None where weights stay or go one by one."""
        return Pattern.parse(self.pattern) if self.pattern else None

    @property
    def _by_layer(self) -> bool:
        """Whether what a site keeps follows from the site alone."""
        rules = (self.threshold, self.quality)
        return isinstance(self._cut, NOfM) or self.scope == "layer" or rules != (None, None)

    def _scores(self, weights: Tensor, site: Site, statistics: Statistics) -> Tensor:
        """What ranks the weights of all sites together."""
        scores = CRITERIA[self.criterion](weights, site, statistics)
        return self._cut.compared(scores) if self._cut else scores

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        for site in sites:
            self._fits(site)
        weights = {s.name: tensor_at(model, s.name).detach().cpu() for s in sites}
        if self._by_layer:
            sparsity = {n: 1 - self._kept(w) / w.numel() for n, w in weights.items()}
        elif self.scope == "sensitivity":
            sparsity = statistics.least_damage(sites, self.sparsity, self._cut)
            for name, part in sparsity.items() if not self._cut else ():
                held = weights[name]
                cut = held.abs().flatten().kthvalue(max(1, round(part * held.numel()))).values
                quality = float(cut / held.std(correction=0))
                _log.info("prune_weights: %s: sparsity %.3f, quality %.2f", name, part, quality)
        elif self.scope in SEARCHES:
            problem = Problem.of(
                model, sites, statistics.loss, kept=1 - self.sparsity, cost="parameters",
                unit="weight",
                scores={s.name: self._scores(weights[s.name], s, statistics) for s in sites},
            )  # fmt: skip
            kept = SEARCHES[self.scope].search(problem).kept
            sparsity = {n: 1 - share for n, share in kept.items()}
        else:
            scores = {s.name: self._scores(weights[s.name], s, statistics).flatten() for s in sites}
            if self.scope == "lamp":
                scores = {n: _lamp(s) for n, s in scores.items()}
            every = torch.cat(list(scores.values()))
            stays = largest(every, round((1 - self.sparsity) * every.numel()))
            parts = torch.split(stays, [s.numel() for s in scores.values()])
            sparsity = {n: 1 - float(p.double().mean()) for n, p in zip(scores, parts, strict=True)}
        highest = 1 - self.floor
        return {
            n: replace(
                self, sparsity=min(s, highest, 1 - 1 / weights[n].numel()), scope="layer",
                threshold=None, quality=None,
            )
            for n, s in sparsity.items()
        }  # fmt: skip

    def _kept(self, weights: Tensor) -> int:
        """How many weights this site keeps, by the rule in force."""
        if isinstance(self._cut, NOfM):
            return self._cut.kept(weights.shape)
        if self.threshold is not None:
            kept = int((weights.abs() >= self.threshold).sum())
        elif self.quality is not None:
            kept = int((weights.abs() >= self.quality * weights.std(correction=0)).sum())
        else:
            kept = round((1 - self.sparsity) * weights.numel())
        least = max(1, round(self.floor * weights.numel()))
        if kept < least:
            _log.warning(
                "prune_weights: the floor keeps %d weights where %d were asked for; to remove a "
                "whole layer use drop_blocks", least, kept,
            )  # fmt: skip
        return max(kept, least)

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        kept = max(1, round((1 - self.sparsity) * count))
        if isinstance(self._cut, NOfM):
            kept = self._cut.kept(site.shape)
        if self._cut is None:
            among = 0.0 if self.criterion == "magnitude" else 0.6
            return sparse_bytes(count, kept, inner, among=among)
        bits = self._cut.position_bits(site.shape, kept)
        among = 0.6 if isinstance(self._cut, NOfM) else 1.0
        return sparse_bytes(count, kept, inner, among=among, position_bits=bits)

    def _fits(self, site: Site) -> None:
        """Raise RecipeError where a site is too small for the pattern."""
        lacks = self._cut.misfit(site.shape) if self._cut else ""
        if lacks:
            raise RecipeError(
                f"prune_weights: pattern={self.pattern!r} needs {lacks} for site {site.name!r}; "
                f"choose smaller groups, or leave the site out by only='!{site.name}'"
            )

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"prune_weights: site {site.name!r} is written in {math.prod(shape)} numbers "
                "already, not one for each weight; put prune_weights first in the recipe"
            )
        self._fits(site)

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        return Mask(torch.ones_like(core, dtype=torch.bool), self._cut), core

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"prune_weights: site {site.name!r} holds NaN or infinite weights")
        held = core if matters is None else core * matters
        mask, new = choose(
            self.criterion, held, held != 0, site, statistics or Statistics(nn.Identity()),
            self._kept(held), self._cut,
        )  # fmt: skip
        form = Mask(mask, self._cut)
        form.followed.fill_(not self.may_reopen)
        return form, core if self.criterion == "magnitude" else new * mask

    def finish(self, model: nn.Module, trace: Trace) -> list[str]:
        lines = drop_dead_units(model, trace)
        for site in trace.sites:
            mask = _mask_of(model, site)
            empty = 0 if mask is None else int((~mask.flatten(1).any(1)).sum())
            if empty:
                lines.append(f"{site.name}: {empty} of {site.shape[0]} output rows are empty")
        return lines


def _lamp(scores: Tensor) -> Tensor:
    """Each of a layer's scores over the sum of all that are no smaller."""
    falling, order = scores.sort(descending=True)
    lamp = torch.empty_like(falling)
    lamp[order] = falling / falling.cumsum(0).clamp(min=1e-300)
    return lamp


def _mask_of(model: nn.Module, site: Site) -> Tensor | None:
    links = chain(model, site)
    first = links.forms[0] if links is not None and len(links.forms) else None
    return first.mask if isinstance(first, Mask) else None
