"""Weight sharing by a hash: a weight is one of a few buckets, up to its sign, and no index is kept.

    W'[i, j] = ξ(i, j) · w[h(i, j)],   ∂L/∂w[k] = Σ over h(i, j) = k of ξ(i, j) · ∂L/∂W'[i, j]

W: [out, in, …] float32, seen as [out, rest]; w: [buckets] float32, trained; h: a bucket, ξ: 1 or
-1, both hashed from a seed of the site's own (kernels/hashed.py). Biases are not hashed. As a
matrix product: the layer multiplies its buckets with inputs that were hashed,

    y[i] = Σ_j W'[i, j] · x[j] = Σ_k w[k] · Φ[i, k],  Φ[i, k] = Σ over h(i, j) = k of ξ(i, j) · x[j]

or vec(W') = S · w, where each row of S [weights, buckets] has one entry, 1 or -1. So the gradient
is Sᵀ · vec(∂L/∂W'), and the buckets nearest to a trained W are (SᵀS)⁻¹ · Sᵀ · vec(W): SᵀS counts
the weights of each bucket, and each starts at the mean of its weights, their signs undone.

In the frequency domain a filter is Σ_f V[f] · cosine_f, the orthonormal DCT, and V is hashed, each
frequency band (the sum of the indices of f) with buckets of its own: band b of B gets a share of
them that falls as B - b for each coefficient. A packed layer transforms its inputs instead.

Across the network all sites draw from one vector; each multiplies what it draws by the root mean
square of the weights that it had.

Chen, Wilson, Tyree, Weinberger, Chen: Compressing Neural Networks with the Hashing Trick (ICML
2015); by the same, Compressing Convolutional Neural Networks in the Frequency Domain (KDD 2016);
in runs and across the network, Desai, Zhou, Shrivastava: Hardware-Aware Compression with Random
Operation Access Specific Tile (ROAST) Hashing (ICML 2023). Where we differ: the hash is one that
a processor keeps up with; what KDD 2016 tunes, the share of each band, is fixed, as by its beta
distribution with alpha = 1 and beta = 2; the linear layers of such a network are hashed in space.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from taut.coding import Coder
from taut.errors import FormatError, RecipeError
from taut.kernels import hashed_matmul, hashed_rows, hashed_weight, wrap_buckets
from taut.kernels.hashed import RUNS
from taut.recoding import Form, Meta, Pack, PackedWeight, ReadChild, Recoding, register_format
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Trace
from taut.types import Site


@register_step
@dataclass(frozen=True, kw_only=True)
class HashWeights(Recoding):
    """Let a hash draw the weights of a site from a few trained buckets."""

    ratio: float = option(0.125, low=0, below=1, help="buckets for each weight")
    buckets: int = option(0, low=0, below=2**31, help="of a site, whatever the ratio; 0 goes by it")
    run: int = option(
        1, low=1, high=64, unit="column", help="1, 4, 16 or 64 that lie side by side in the buckets"
    )
    gradient: str = option(
        "sum", choices=("sum", "mean"), help="of a bucket, over its weights; sum is the true one"
    )
    domain: str = option(
        "space", choices=("space", "frequency"), help="of the filters of a convolution"
    )
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
        smaller = tuple(s for s in chosen if self._wanted(s.numel) < s.numel)
        if not smaller:
            least = min(chosen, key=lambda s: s.numel)
            self.accepts(least, least.shape)
        return smaller

    def _wanted(self, numel: int) -> int:
        return self.buckets or round(self.ratio * numel)

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"hash_weights: site {site.name!r} is written in {math.prod(shape)} numbers "
                "already, not one for each weight; put hash_weights first in the recipe"
            )
        count, bands = self._wanted(site.numel), self._bands(shape)
        if count < bands:
            asked = f"buckets={self.buckets}" if self.buckets else f"ratio={self.ratio:.6g}"
            each = "" if bands == 1 else f", one for each of its {bands} bands of frequencies"
            raise RecipeError(
                f"hash_weights: a site needs at least {bands} bucket{'s' * (bands > 1)}{each}; "
                f"{asked} leaves {count} for the {site.numel} weights of site {site.name!r}; use "
                f"buckets={bands} or more"
            )
        if count >= site.numel:
            raise RecipeError(
                f"hash_weights: {count} buckets would enlarge site {site.name!r} of {site.numel} "
                "weights; use fewer, or leave it out by only"
            )

    def finish(self, model: nn.Module, trace: Trace) -> list[str]:
        hashed = self.sites(trace)
        return [
            f"{s.name}: left as it is, since {self._wanted(s.numel)} buckets for its {s.numel} "
            "weights would enlarge it"
            for s in self._chosen(trace.sites)
            if s not in hashed
        ]

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        buckets = self._wanted(count)
        if inner is not None:
            return 4 + inner(buckets)
        empty = math.exp(-count / buckets) if self.init == "mean" else 0.0  # no weight came there
        entropy = -sum(p * math.log2(p) for p in (empty, 1 - empty) if p)
        return 14 + buckets * (1.72 * (1 - empty) + entropy / 8)

    def _bands(self, shape: tuple[int, ...]) -> int:
        frequent = self.domain == "frequency" and math.prod(shape[2:]) <= MOST_WINDOW
        return _bands(shape[2:]) if frequent else 1

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        shape, count = tuple(core.shape), self._wanted(core.numel())
        bands: tuple[int, ...] = (count,)
        if self._bands(shape) > 1:
            filters = math.prod(shape[:2])
            bands = _shares(count, tuple(filters * n for n in _cosines(shape[2:])[1]))
        form = Hashed(Drawing(shape, bands, 0, self.run), averaged=self.gradient == "mean")
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
        drawing = form.drawing()
        counts = drawing.counts()
        if form.counts is not None:
            form.counts.copy_(counts)
        if self.init == "random":
            return form, torch.randn_like(buckets) * core.square().mean().sqrt()
        return form, drawing.gathered(core) / counts.clamp(min=1)


@dataclass(frozen=True)
class Drawing:
    """S: the bucket that each weight of a shape is drawn from, and its sign.

    bands: how many buckets each band of frequencies has, the lowest first; one number in space.
    """

    shape: tuple[int, ...]
    bands: tuple[int, ...]
    seed: int
    run: int

    def parts(self) -> list[tuple[int, int, int]]:
        """Columns, buckets and seed of each band's own matrix, which has a row for each output."""
        if len(self.bands) == 1:
            return [(math.prod(self.shape[1:]), self.bands[0], self.seed)]
        sizes = _cosines(self.shape[2:])[1]
        return [
            (self.shape[1] * n, count, (self.seed + b) % 2**32)
            for b, (n, count) in enumerate(zip(sizes, self.bands, strict=True))
        ]

    def weight(self, buckets: Tensor) -> Tensor:
        """S · w, of the shape. buckets: [sum(bands)]."""
        rows, drawn = self.shape[0], torch.split(buckets, list(self.bands))
        matrices = [
            hashed_weight(w, (rows, columns), seed, self.run)
            for w, (columns, _, seed) in zip(drawn, self.parts(), strict=True)
        ]
        if len(matrices) == 1:
            return matrices[0].reshape(self.shape)
        cosines = _cosines(self.shape[2:])[0].to(buckets)
        spectra = torch.cat([m.reshape(rows, self.shape[1], -1) for m in matrices], -1)
        return (spectra @ cosines).reshape(self.shape)

    def gathered(self, weight: Tensor) -> Tensor:
        """Sᵀ · vec(weight), [sum(bands)]: from a gradient of the weight to that of the buckets."""
        with torch.enable_grad():
            buckets = weight.new_zeros(sum(self.bands)).requires_grad_()
            found: Tensor = torch.autograd.grad(self.weight(buckets), buckets, weight)[0]
        return found

    def counts(self) -> Tensor:
        """How many weights, or coefficients of filters, each bucket has: [sum(bands)]."""
        found = []
        for columns, count, seed in self.parts():
            one = Drawing((self.shape[0], columns), (count,), seed, self.run)
            found.append(one.gathered(one.weight(torch.ones(count))))
        return torch.cat(found)

    def matmul(self, x: Tensor, wrapped: Sequence[Tensor]) -> Tensor:
        """x [..., in] → [..., out]. wrapped: the buckets of each band, by `wrap_buckets`."""
        inputs: Sequence[Tensor] = (x,)
        if len(wrapped) > 1:
            cosines, sizes = _cosines(self.shape[2:])
            spectra = x.reshape(*x.shape[:-1], self.shape[1], -1) @ cosines.T.to(x)
            inputs = [s.flatten(-2) for s in torch.split(spectra, list(sizes), -1)]
        products = [
            hashed_matmul(part, w, self.shape[0], seed, self.run, wrapped=True)
            for part, w, (_, _, seed) in zip(inputs, wrapped, self.parts(), strict=True)
        ]
        return functools.reduce(torch.add, products)


class Hashed(Form):
    """weight = S · buckets; the buckets are the core.

    seed: of the site's hash. counts: [buckets], how many weights each has, where their gradients
    are to be averaged.
    """

    seed: Tensor
    counts: Tensor | None

    def __init__(self, drawing: Drawing, averaged: bool) -> None:
        super().__init__()
        self._drawing = drawing
        self.register_buffer("seed", torch.tensor(drawing.seed))
        self.register_buffer("counts", torch.ones(sum(drawing.bands)) if averaged else None)

    def drawing(self) -> Drawing:
        return replace(self._drawing, seed=int(self.seed))

    def forward(self, core: Tensor) -> Tensor:
        if self.counts is not None:
            core = cast(Tensor, _Averaged.apply(core, self.counts))  # type: ignore[no-untyped-call]
        return self.drawing().weight(core)

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        assert keep is None  # `fit` refuses masks
        return HashedWeight(self.drawing(), inner(None))


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


@register_format("hashed.v1")
class HashedWeight(PackedWeight):
    """A seed, and buckets in any packed form: [sum of the bands]."""

    buckets: PackedWeight

    def __init__(self, drawing: Drawing, buckets: PackedWeight) -> None:
        super().__init__(drawing.shape)
        self.drawing = drawing
        self.buckets = buckets
        self._wrapped: list[Tensor] | None = None

    def meta(self) -> Meta:
        bands, run = self.drawing.bands, self.drawing.run
        found = {"buckets": sum(bands)}
        found |= {"run": run} if run > 1 else {}
        return found | ({"bands": len(bands)} if len(bands) > 1 else {})

    def write(self, coder: Coder) -> None:
        seed = np.array([self.drawing.seed], "<u4").view(np.uint8)
        coder.plain("seed", seed, 1, 4)
        bands = self.drawing.bands
        if len(bands) > 1:
            coder.integers("bands", np.array(bands, np.int64), len(bands))
        with coder.inside("buckets"):
            self.buckets.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        count, run, bands = meta.get("buckets"), meta.get("run", 1), meta.get("bands", 1)
        if not shape or max(shape[0], math.prod(shape[1:])) >= 2**31:
            raise FormatError(
                f"hashed.v1 needs a shape of at least one dimension, whose first one and the "
                f"product of the others lie below 2**31, got {list(shape)}"
            )
        if type(run) is not int or run not in RUNS:
            raise FormatError(f"hashed.v1: run must be 1, 4, 16 or 64, got {run!r}")
        if type(count) is not int or not 1 <= count <= math.prod(shape):
            raise FormatError(
                f"hashed.v1: buckets must lie in [1, {math.prod(shape)}], as many as there are "
                f"weights, got {count!r}"
            )
        window = shape[2:]
        known = type(bands) is int and (bands == 1 or bands == _bands(window) > 1)
        if not known or (bands > 1 and math.prod(window) > MOST_WINDOW):
            raise FormatError(
                f"hashed.v1: a filter of {list(window)} has 1 or {_bands(window)} bands, and none "
                f"above {MOST_WINDOW} numbers has several, got {bands!r}"
            )
        seed = int.from_bytes(coder.plain("seed", None, 1, 4), "little")
        counts = (count,)
        if bands > 1:
            counts = tuple(coder.integers("bands", None, bands).tolist())
            if min(counts) < 1 or sum(counts) != count:
                raise FormatError(
                    f"hashed.v1: bands share out the {count} buckets, at least one to each, got "
                    f"{counts}"
                )
        return cls(Drawing(shape, counts, seed, run), child("buckets", (count,)))

    def dense(self) -> Tensor:
        return self.drawing.weight(self.buckets.dense().float())

    def wrapped(self) -> list[Tensor]:
        """The buckets as the kernel reads them, band by band, kept between calls."""
        if self._wrapped is None:
            drawn = torch.split(self.buckets.dense().float(), list(self.drawing.bands))
            self._wrapped = [wrap_buckets(w) for w in drawn]
        return self._wrapped

    def forget(self) -> None:
        super().forget()
        self._wrapped = None

    def matmul(self, x: Tensor) -> Tensor:
        return self.drawing.matmul(x, self.wrapped())

    def rows(self, index: Tensor) -> Tensor:
        if len(self.drawing.bands) > 1:
            return super().rows(index)
        columns, _, seed = self.drawing.parts()[0]
        drawn = hashed_rows(self.buckets.dense().float(), index, columns, seed, self.drawing.run)
        return drawn.reshape(*index.shape, *self.shape[1:])


MOST_WINDOW = 1024
"""Numbers of a filter that goes by its frequencies; the transform is a matrix of their square."""


def _bands(window: tuple[int, ...]) -> int:
    """How many bands of frequencies a filter has: sums of the indices of its coefficients."""
    return 1 + sum(max(n - 1, 0) for n in window)


@functools.lru_cache(maxsize=32)
def _cosines(window: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The orthonormal DCT-II of a filter, and how many coefficients each band has.

    Rows are cosines, ordered by their band: coefficients = cosines @ filter.
    """
    cosines, band = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    for n in window:
        k, place = torch.arange(n)[:, None], torch.arange(n)
        one = (torch.pi / n * k * (place + 0.5).double()).cos() * math.sqrt(2 / n)
        one[0] /= math.sqrt(2)
        cosines, band = torch.kron(cosines, one), (band[:, None] + place).flatten()
    order = band.argsort(stable=True)
    return cosines[order].float(), tuple(torch.bincount(band).tolist())


def _shares(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """How many of the buckets each band gets, at least one and at most as many as it has numbers.

    sizes: the numbers of each band, the lowest first. A number of band b of B gets a share of a
    bucket in proportion to B - b.
    """

    def wanted(factor: float) -> list[float]:
        return [n * min(1.0, factor * (len(sizes) - b)) for b, n in enumerate(sizes)]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(wanted(middle)) > count else (middle, high)
    shares = [max(1, int(share)) for share in wanted(low)]
    for b, n in enumerate(sizes):  # what rounding made of the sum
        shares[b] = min(n, max(1, shares[b] + count - sum(shares)))
    return tuple(shares)
