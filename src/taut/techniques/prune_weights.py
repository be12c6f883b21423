"""Magnitude pruning: the smallest weights are removed, the others are kept and trained on.

    W'[i, j] = W[i, j] · mask[i, j],    mask[i, j] = |W[i, j]| among the site's largest

How many each site keeps follows from a fraction (of each layer, of all layers together, or shared
out by sensitivity), from one threshold, or from Han's rule, threshold = quality · std(W).

Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks
(NIPS 2015). Where we differ: the sensitivity rule finds the layers' strengths by itself, as those
that do the least summed damage before recovery; by default no scan is needed and layers are
balanced by LAMP scores, w² / Σ of the layer's squares that are no smaller (Lee et al., ICLR 2021),
which never empty a layer; positions are coded as a bitmap under a learned model of rows and
columns instead of gaps of fixed width.
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
from taut.keep_search import SEARCHES, Problem
from taut.mask import Mask, largest
from taut.modules import tensor_at
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
    """Remove the smallest weights.

    Applied again to a site, it prunes further; what was removed stays removed. They go at once, or
    over the recovery that follows as a `schedule` says.
    """

    sparsity: float = option(0.9, low=0, below=1, help="fraction of the weights removed")
    scope: str = option(
        "sensitivity",
        choices=("sensitivity", "lamp", "global", "layer", *SEARCHES),
        help="what the fraction is of: each layer, or all weights together, ranked by magnitude "
        "(global), by magnitude relative to the layer's larger ones (lamp), shared out by a "
        "scan of each layer's sensitivity, or by a search (keep_search) that tries allocations",
    )
    threshold: float | None = option(None, low=0, help="instead: remove |w| below this")
    quality: float | None = option(None, low=0, help="instead: remove |w| < quality · std(W)")
    floor: float = option(0.002, low=0, high=1, help="fraction that every site keeps at least")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and self.quality is not None:
            raise RecipeError(
                "prune_weights: threshold and quality are two rules for one thing, got "
                f"threshold={self.threshold} and quality={self.quality}; give one"
            )

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        weights = {s.name: tensor_at(model, s.name).detach().cpu() for s in sites}
        if self.threshold is not None or self.quality is not None or self.scope == "layer":
            sparsity = {n: 1 - self._kept(w) / w.numel() for n, w in weights.items()}
        elif self.scope == "sensitivity":
            sparsity = statistics.least_damage(sites, self.sparsity)
            for name, part in sparsity.items():
                held = weights[name]
                cut = held.abs().flatten().kthvalue(max(1, round(part * held.numel()))).values
                quality = float(cut / held.std(correction=0))
                _log.info("prune_weights: %s: sparsity %.3f, quality %.2f", name, part, quality)
        elif self.scope in SEARCHES:
            problem = Problem.of(
                model, sites, statistics.loss, kept=1 - self.sparsity, cost="parameters",
                unit="weight",
            )  # fmt: skip
            kept = SEARCHES[self.scope].search(problem).kept
            sparsity = {n: 1 - share for n, share in kept.items()}
        else:
            ranks = {n: _lamp(w) if self.scope == "lamp" else w.abs() for n, w in weights.items()}
            every = torch.cat([r.flatten() for r in ranks.values()])
            cut = every.kthvalue(max(1, round(self.sparsity * every.numel()))).values
            sparsity = {n: float((r <= cut).double().mean()) for n, r in ranks.items()}
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
        return sparse_bytes(count, max(1, round((1 - self.sparsity) * count)), inner)

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"prune_weights: site {site.name!r} is written in {math.prod(shape)} numbers "
                "already, not one for each weight; put prune_weights first in the recipe"
            )

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        return Mask(torch.ones_like(core, dtype=torch.bool)), core

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"prune_weights: site {site.name!r} holds NaN or infinite weights")
        held = core if matters is None else core * matters
        return Mask(largest(held.abs(), self._kept(held), held != 0)), core

    def finish(self, model: nn.Module, trace: Trace) -> list[str]:
        lines = drop_dead_units(model, trace)
        for site in trace.sites:
            mask = _mask_of(model, site)
            empty = 0 if mask is None else int((~mask.flatten(1).any(1)).sum())
            if empty:
                lines.append(f"{site.name}: {empty} of {site.shape[0]} output rows are empty")
        return lines


def _lamp(weights: Tensor) -> Tensor:
    """w² over the sum of all squares in the layer that are no smaller."""
    squares, order = weights.flatten().double().square().sort(descending=True)
    score = torch.empty_like(squares)
    score[order] = squares / squares.cumsum(0).clamp(min=1e-300)
    return score.reshape(weights.shape)


def _mask_of(model: nn.Module, site: Site) -> Tensor | None:
    links = chain(model, site)
    first = links.forms[0] if links is not None and len(links.forms) else None
    return first.mask if isinstance(first, Mask) else None
