"""The hashed weight: buckets and a seed, in space or by the frequencies of a filter.

W = S · w: each weight, or each coefficient of a filter, is ± one of the buckets w, by the hash of
kernels/hashed.py. Where filters go by frequencies, W = Σ_f V[f] · cosine_f with the orthonormal
DCT, and V is drawn, each band (the sum of the indices of f) from buckets of its own. Since
Σ_p W[p] · x[p] = Σ_f V[f] · (cosines · x)[f], a product transforms its inputs: W is never made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from taut.coding import Coder
from taut.errors import FormatError
from taut.kernels import hashed_matmul, hashed_rows, hashed_weight, wrap_buckets
from taut.kernels.hashed import RUNS
from taut.packed import Meta, PackedWeight, ReadChild, register_format

MOST_WINDOW = 1024
"""Numbers of a filter that goes by its frequencies; the transform is a matrix of their square."""


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
        sizes = cosines_of(self.shape[2:])[1]
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
        cosines = cosines_of(self.shape[2:])[0].to(buckets)
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
            cosines, sizes = cosines_of(self.shape[2:])
            spectra = x.reshape(*x.shape[:-1], self.shape[1], -1) @ cosines.T.to(x)
            inputs = [s.flatten(-2) for s in torch.split(spectra, list(sizes), -1)]
        products = [
            hashed_matmul(part, w, self.shape[0], seed, self.run, wrapped=True)
            for part, w, (_, _, seed) in zip(inputs, wrapped, self.parts(), strict=True)
        ]
        return functools.reduce(torch.add, products)


@register_format("hashed.v1")
class HashedWeight(PackedWeight):
    """A seed, and buckets in any packed form: [sum of the bands]; scale: a bfloat16 above 0."""

    buckets: PackedWeight

    def __init__(self, drawing: Drawing, buckets: PackedWeight, scale: float = 1.0) -> None:
        super().__init__(drawing.shape)
        self.drawing, self.scale = drawing, scale
        self.buckets = buckets
        self._wrapped: list[Tensor] | None = None

    def meta(self) -> Meta:
        bands, run = self.drawing.bands, self.drawing.run
        found: Meta = {"buckets": sum(bands)}
        found |= {"run": run} if run > 1 else {}
        found |= {"bands": len(bands)} if len(bands) > 1 else {}
        return found | ({"scale": self.scale} if self.scale != 1 else {})

    def write(self, coder: Coder) -> None:
        seed = np.array([self.drawing.seed], "<u4").view(np.uint8)
        coder.plain("seed", seed, 1, 4)
        bands = self.drawing.bands
        if len(bands) > 1:
            coder.integers("bands", np.array(bands, np.int64), len(bands))
        if coder.first(self.buckets):
            with coder.inside("buckets"):
                self.buckets.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        count, run = meta.get("buckets"), meta.get("run", 1)
        bands, scale = meta.get("bands", 1), meta.get("scale", 1.0)
        if not shape or max(shape[0], math.prod(shape[1:])) >= 2**31:
            raise FormatError(
                f"hashed.v1 needs a shape of at least one dimension, whose first one and the "
                f"product of the others lie below 2**31, got {list(shape)}"
            )
        if type(run) is not int or run not in RUNS:
            raise FormatError(f"hashed.v1: run must be 1, 4, 16 or 64, got {run!r}")
        if type(count) is not int or not 1 <= count < 2**31:
            raise FormatError(f"hashed.v1: buckets must lie in [1, 2**31), got {count!r}")
        if type(scale) is not float or not 0 < scale < math.inf or _rounded(scale) != scale:
            raise FormatError(f"hashed.v1: scale must be a bfloat16 above 0, got {scale!r}")
        window = shape[2:]
        known = type(bands) is int and (bands == 1 or bands == bands_of(window) > 1)
        if not known or (bands > 1 and math.prod(window) > MOST_WINDOW):
            raise FormatError(
                f"hashed.v1: a filter of {list(window)} has 1 or {bands_of(window)} bands, and "
                f"none above {MOST_WINDOW} numbers has several, got {bands!r}"
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
        return cls(Drawing(shape, counts, seed, run), child("buckets", (count,)), scale)

    def scaled(self) -> Tensor:
        """The buckets, as this weight draws from them."""
        return self.buckets.dense().float() * self.scale

    def dense(self) -> Tensor:
        return self.drawing.weight(self.scaled())

    def wrapped(self) -> list[Tensor]:
        """The buckets as the kernel reads them, band by band, kept between calls."""
        if self._wrapped is None:
            drawn = torch.split(self.scaled(), list(self.drawing.bands))
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
        drawn = hashed_rows(self.scaled(), index, columns, seed, self.drawing.run)
        return drawn.reshape(*index.shape, *self.shape[1:])


def _rounded(scale: float) -> float:
    return float(torch.tensor(scale).bfloat16())


def bands_of(window: tuple[int, ...]) -> int:
    """How many bands of frequencies a filter has: sums of the indices of its coefficients."""
    return 1 + sum(max(n - 1, 0) for n in window)


@functools.lru_cache(maxsize=32)
def cosines_of(window: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
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


def shares_of(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
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
    shares = [max(1, round(share)) for share in wanted(low)]
    for b, n in enumerate(sizes):  # what rounding made of the sum
        shares[b] = min(n, max(1, shares[b] + count - sum(shares)))
    return tuple(shares)
