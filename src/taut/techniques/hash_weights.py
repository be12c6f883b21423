"""Weight sharing by a hash: a weight is one of a few buckets, up to its sign, and no index is kept.

    W'[i, j] = ξ(i, j) · w[h(i, j)],   ∂L/∂w[k] = Σ over h(i, j) = k of ξ(i, j) · ∂L/∂W'[i, j]

W: [out, in, …] float32, seen as [out, rest]; w: [buckets] float32, trained; h: a bucket, ξ: 1 or
-1, both hashed from a seed of the site's own (kernels/hashed.py). Biases are not hashed. As a
matrix product: the layer multiplies its buckets with inputs that were hashed,

    y[i] = Σ_j W'[i, j] · x[j] = Σ_k w[k] · Φ[i, k],  Φ[i, k] = Σ over h(i, j) = k of ξ(i, j) · x[j]

or vec(W') = S · w, where each row of S [weights, buckets] has one entry, 1 or -1. So the gradient
is Sᵀ · vec(∂L/∂W'), and the buckets nearest to a trained W are (SᵀS)⁻¹ · Sᵀ · vec(W): SᵀS counts
the weights of each bucket, and each starts at the mean of its weights, their signs undone.

By bands a convolution is hashed in the frequency domain: a filter is Σ_f V[f] · cosine_f, the
orthonormal DCT, and V is hashed, each frequency band (the sum of the indices of f) with buckets of
its own: band b of B gets a share of them that falls as B - b for each coefficient. A packed layer
transforms its inputs instead.

Across the network all sites draw from one vector; each multiplies what it draws by the root mean
square of the weights that it had. The padding row of an embedding is drawn like any other.

Chen, Wilson, Tyree, Weinberger, Chen: Compressing Neural Networks with the Hashing Trick (ICML
2015); by the same, Compressing Convolutional Neural Networks in the Frequency Domain (KDD 2016);
in runs and across the network, Desai, Zhou, Shrivastava: Hardware-Aware Compression with Random
Operation Access Specific Tile (ROAST) Hashing (ICML 2023). Where we differ: the hash is one that
a processor keeps up with; what KDD 2016 tunes, the share of each band, is fixed, as by its beta
distribution with alpha = 1 and beta = 2; the linear layers of such a network are hashed in space.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import xxhash
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.hashed_weight import MOST_WINDOW, Drawing, HashedWeight, bands_of, cosines_of, shares_of
from taut.kernels.hashed import RUNS
from taut.modules import parametrization, parametrized_names
from taut.packed import PackedWeight
from taut.recoding import Form, Pack, Recoding, chain, chains_of, core
from taut.statistics import Statistics
from taut.technique import Technique, option, register_step
from taut.trace import Trace
from taut.types import Site


@register_step
@dataclass(frozen=True, kw_only=True)
class HashWeights(Recoding):
    """Let a hash draw the weights of a site from a few trained buckets."""

    ratio: float = option(0.125, low=0, below=1, help="buckets for each weight")
    buckets: int = option(0, low=0, below=2**31, help="how many, whatever the ratio; 0 goes by it")
    run: int = option(
        1, low=1, high=64, unit="column", help="1, 4, 16 or 64 that lie side by side in the buckets"
    )
    gradient: str = option(
        "sum", choices=("sum", "mean"), help="of a bucket, over its weights; sum is the true one"
    )
    scope: str = option(
        "layer", choices=("layer", "band", "network"),
        help="what has buckets of its own: a site, each frequency band of a convolution's filters, "
        "or all sites together",
    )  # fmt: skip
    init: str = option(
        "mean", choices=("mean", "random"),
        help="of the trained weights, or drawn as widely spread as they, to train from scratch",
    )  # fmt: skip
    seed: int = option(0, low=0, below=2**32, help="of the hash; each site's own follows from it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run not in RUNS:
            raise RecipeError(f"hash_weights: run must be 1, 4, 16 or 64, got {self.run}")

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        chosen = super().sites(trace)
        if self.scope == "network":
            total = sum(s.numel for s in chosen)
            if not 1 <= self._wanted(total) < total:
                raise RecipeError(
                    f"hash_weights: {len(chosen)} sites of {total} weights need at least one "
                    f"bucket and fewer than weights, got {self._wanted(total)}; change ratio or "
                    "buckets"
                )
        return chosen

    def _wanted(self, numel: int) -> int:
        return self.buckets or round(self.ratio * numel)

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"hash_weights: site {site.name!r} is written in {math.prod(shape)} numbers "
                "already, not one for each weight; put hash_weights first in the recipe"
            )
        if self.scope == "network":
            return
        count, bands = self._wanted(site.numel), self._bands(shape)
        if count < bands:
            asked = f"buckets={self.buckets}" if self.buckets else f"ratio={self.ratio:.6g}"
            each = "" if bands == 1 else f", one for each of its {bands} bands of frequencies"
            raise RecipeError(
                f"hash_weights: a site needs at least {bands} bucket{'s' * (bands > 1)}{each}; "
                f"{asked} leaves {count} for the {site.numel} weights of site {site.name!r}; use "
                f"buckets={bands} or more"
            )

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        local: Technique = self
        if self.scope == "network":
            total = sum(s.numel for s in sites)
            count = self._wanted(total)
            local = replace(self, buckets=count, ratio=count / total)
        return {s.name: local for s in sites}

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        buckets = self.ratio * count if self.scope == "network" else self._wanted(count)
        if inner is not None:
            return 4 + inner(round(buckets))
        empty = math.exp(-count / buckets) if self.init == "mean" else 0.0  # no weight came there
        entropy = -sum(p * math.log2(p) for p in (empty, 1 - empty) if p)
        return 14 + buckets * (1.72 * (1 - empty) + entropy / 8)

    def _bands(self, shape: tuple[int, ...]) -> int:
        frequent = self.scope == "band" and math.prod(shape[2:]) <= MOST_WINDOW
        return bands_of(shape[2:]) if frequent else 1

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        shape, count = tuple(core.shape), self._wanted(core.numel())
        bands: tuple[int, ...] = (count,)
        if self._bands(shape) > 1:
            filters = math.prod(shape[:2])
            bands = shares_of(count, tuple(filters * n for n in cosines_of(shape[2:])[1]))
        form = Hashed(
            Drawing(shape, bands, 0, self.run), self.gradient == "mean", self.scope == "network"
        )
        return form, core.new_zeros(sum(bands))

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"hash_weights: site {site.name!r} holds NaN or infinite weights")
        if matters is not None:
            raise RecipeError(
                f"hash_weights: site {site.name!r} carries a mask, and where the mask lies takes "
                "more of the file than buckets do; leave the mask out and use a lower ratio"
            )
        form, buckets = self.blank(core)
        assert isinstance(form, Hashed)
        form.seed.fill_(xxhash.xxh32_intdigest(site.name.encode(), self.seed))
        drawing, spread = form.drawing(), core.square().mean().sqrt()
        counts = drawing.counts()
        if form.counts is not None:
            form.counts.copy_(counts)
        if form.scale is not None and spread > 0:
            form.scale.copy_(spread.bfloat16())
            core, spread = core / form.scale, spread / form.scale
        if self.init == "random":
            return form, torch.randn_like(buckets) * spread
        return form, drawing.gathered(core) / counts.clamp(min=1)

    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        links = chain(model, site)
        if self.scope == "network" and links is not None and links.recipe[-1] == self:
            return  # fitted anew it would find what it has, and move what others draw
        super().apply(model, site, statistics)

    def place(self, model: nn.Module, site: Site, form: Form, new: Tensor) -> None:
        super().place(model, site, form, new)
        if self.scope == "network":
            self._join(model, core(model, site))

    def _join(self, model: nn.Module, new: Tensor) -> None:
        """Let all sites that this has hashed draw from one vector: the mean over all their weights.

        Where buckets start at random, those that were there before stay.
        """
        mine = {c: held for _, c, held in chains_of(model) if c.recipe[-1] == self}
        if self.init == "random":
            merged = next((held for held in mine.values() if held is not new), new)
        else:
            counts = {c: cast(Hashed, c.forms[-1]).drawing().counts().to(new) for c in mine}
            total = torch.stack(list(counts.values())).sum(0).clamp(min=1)
            merged = sum((counts[c] * held for c, held in mine.items()), 0 * new) / total
        shared = nn.Parameter(merged.detach())
        for name in parametrized_names(model):
            found = parametrization(model, name)
            if found is not None and found[0] in mine:
                found.original = shared


class Hashed(Form):
    """weight = S · buckets; the buckets are the core.

    seed: of the site's hash. counts: [buckets], how many weights of this site each has, where their
    gradients are to be averaged. scale: of the weights of this site, where others draw from its
    buckets too.
    """

    seed: Tensor
    counts: Tensor | None
    scale: Tensor | None

    def __init__(self, drawing: Drawing, averaged: bool, scaled: bool) -> None:
        super().__init__()
        self._drawing, self.shares_core = drawing, scaled
        self.register_buffer("seed", torch.tensor(drawing.seed))
        self.register_buffer("counts", torch.ones(sum(drawing.bands)) if averaged else None)
        self.register_buffer("scale", torch.ones(()) if scaled else None)

    def drawing(self) -> Drawing:
        return replace(self._drawing, seed=int(self.seed))

    def forward(self, core: Tensor) -> Tensor:
        if self.counts is not None:
            core = cast(Tensor, _Averaged.apply(core, self.counts))  # type: ignore[no-untyped-call]
        return self.drawing().weight(core if self.scale is None else core * self.scale)

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        assert keep is None  # `fit` refuses masks
        scale = 1.0 if self.scale is None else float(self.scale)
        return HashedWeight(self.drawing(), inner(None), scale)


class _Averaged(torch.autograd.Function):
    """The buckets as they are, whose gradients are divided by how many weights each has."""

    @staticmethod
    def forward(ctx: Any, buckets: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return buckets.view_as(buckets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return grads[0] / counts.clamp(min=1), None
