"""Low rank inside one layer: the weight is the product of two factors, and the layer stays one.

    W' = A · B,    W: [out, in] (later dimensions joined), A: [out, rank], B: [rank, in]
    core = [Aᵀ | B]: [rank, out + in], float32, trained

So weights that something else reads may be factored too: the gates of LSTM and GRU, attention's
projections, tied embeddings. The factors lie in one core, a row for each component, with both parts
of like magnitude, so that the next technique recodes them as it would a weight: `factor_weights >
share_values(bits=4)`. The rank is chosen as by `low_rank`, which makes two layers instead.

Eckart, Young (Psychometrika 1936); for recurrent layers Prabhavalkar, Alsharif, Bruguier, McGraw
(ICASSP 2016). Where we differ: all gates share one B, and `weighted` weighs by the data.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.coding import Coder
from taut.errors import FormatError, RecipeError
from taut.packed import Meta, PackedWeight, Pair, Plain, ReadChild, register_format
from taut.ranks import RULES, Matrix, rank_of, seen_by_data
from taut.recoding import Form, Pack, Recoding, core
from taut.statistics import Statistics
from taut.technique import Technique, option, register_step
from taut.types import Site

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class FactorWeights(Recoding):
    """Write a weight as the product of two smaller ones."""

    rank: str = option("ratio", choices=RULES, help="what the rank of a site follows from")
    energy: float = option(0.9, low=0.01, high=1, help="for rank='energy': the share to keep")
    ratio: float = option(
        0.5, low=0.001, below=1, help="for rank='ratio': numbers after, to those before"
    )
    kept: int | None = option(
        None, low=0, help="the rank itself, whatever `rank` says; 0 leaves the site as it is"
    )
    weighted: bool = option(True, help="whether the calibration data say what matters")

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        """The rank of each site; 0 where one that would do takes no fewer numbers."""
        if self.kept is not None:
            return dict.fromkeys((s.name for s in sites), self)
        found: dict[str, Technique] = {}
        for site in sites:
            weight = core(model, site).detach().cpu()
            if tuple(weight.shape) != site.shape or not bool(weight.isfinite().all()):
                found[site.name] = self  # which `accepts` or `fit` refuses
                continue
            needed = statistics if self.rank == "energy" else None
            rank = self._rank(self._matrix(weight, site, needed))
            if not rank:
                _log.info(
                    "factor_weights: %s stays as it is: a rank that would do takes no fewer "
                    "numbers", site.name,
                )  # fmt: skip
            found[site.name] = replace(self, kept=rank)
        if all(isinstance(t, FactorWeights) and t.kept == 0 for t in found.values()):
            raise RecipeError(
                f"factor_weights: no site of only={self.only!r} gets smaller by {self}, "
                f"{sites[0].name!r} neither; keep less (energy, ratio)"
            )
        return found

    def _matrix(self, weight: Tensor, site: Site, statistics: Statistics | None) -> Matrix:
        if self.weighted and statistics is not None:
            return seen_by_data(weight, site, statistics, self.name)
        return Matrix(weight.flatten(1))

    def _rank(self, matrix: Matrix) -> int:
        """Of this matrix; 0 where it would not get smaller."""
        out, columns = matrix.weight.shape
        rank = rank_of(matrix, self.rank, self.energy, self.ratio)
        return rank if rank * (out + columns) < out * columns else 0

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"factor_weights: site {site.name!r} is recoded already, and its core "
                f"{list(shape)} is no matrix of weights; put factor_weights first"
            )

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        out, columns = _matrix_shape(site.shape)
        rank = self.kept if self.kept is not None else int(self.ratio * _most(out, columns))
        numbers = rank * (out + columns) if rank and count == site.numel else count
        return _PLAIN * numbers + 9 if inner is None else inner(numbers)

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        out, columns = _matrix_shape(tuple(core.shape))
        rank = self.kept or max(1, int(_most(out, columns)))
        return Factors(tuple(core.shape)), core.new_zeros(rank, out + columns)

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"factor_weights: site {site.name!r} holds NaN or infinite weights")
        if matters is not None:
            raise RecipeError(
                f"factor_weights: site {site.name!r} is pruned already, and what two factors give "
                f"has no holes; leave it out by only='!{site.name}'"
            )
        matrix = self._matrix(core, site, statistics)
        rank = self.kept or self._rank(matrix)
        if not 1 <= rank <= min(matrix.weight.shape):
            raise RecipeError(
                f"factor_weights: site {site.name!r} of shape {list(core.shape)} has no use for a "
                f"rank of {rank}; it must lie in [1, {min(matrix.weight.shape)}]"
            )
        left, right = matrix.factors(rank)
        _log.info("factor_weights: %s is of rank %d now", site.name, rank)
        return Factors(tuple(core.shape)), torch.cat([left.T, right], 1).to(core.dtype)

    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        if self.kept != 0:
            super().apply(model, site, statistics)


_PLAIN = 1.77
"""Bytes of one of the factors' numbers in float16: about normal, so its high byte codes well."""


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _most(out: int, columns: int) -> float:
    """The rank at which factors take as many numbers as the weight."""
    return out * columns / (out + columns)


class Factors(Form):
    """weight = A · B of the core [Aᵀ | B]. shape: the weight's."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, core: Tensor) -> Tensor:
        return _product(core, self.shape)

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        if keep is not None:  # some entries of a product are no product
            return Plain.of(self(core)[keep])
        return FactoredWeight(self.shape, inner(None))


def _product(core: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (core[:, : shape[0]].T @ core[:, shape[0] :]).reshape(shape)


@register_format("low_rank.v1")
class FactoredWeight(PackedWeight):
    """A weight of a lower rank. factors: a packed weight [rank, out + in], of [Aᵀ | B]."""

    factors: PackedWeight

    def __init__(self, shape: tuple[int, ...], factors: PackedWeight) -> None:
        super().__init__(shape)
        self.factors = factors
        self._halves: tuple[Tensor, Tensor] | None = None

    def meta(self) -> Meta:
        return {"rank": self.factors.shape[0]}

    def write(self, coder: Coder) -> None:
        with coder.inside("factors"):
            self.factors.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        if len(shape) < 2:
            raise FormatError(
                f"low_rank.v1 needs a shape of at least two dimensions, got {list(shape)}"
            )
        out, columns = _matrix_shape(shape)
        rank, most = meta.get("rank"), min(out, columns)
        if type(rank) is not int or not 1 <= rank <= most:
            raise FormatError(f"low_rank.v1: rank must lie in [1, {most}], got {rank!r}")
        return cls(shape, child("factors", (rank, out + columns)))

    def dense(self) -> Tensor:
        return _product(self.factors.dense(), self.shape)

    def halves(self) -> tuple[Tensor, Tensor]:
        """A [out, rank] and B [rank, in], decoded once and kept: far less than the weight."""
        if self._halves is None:
            core, out = self.factors.dense(), self.shape[0]
            self._halves = core[:, :out].T.contiguous(), core[:, out:].contiguous()
        return self._halves

    def forget(self) -> None:
        super().forget()
        self._halves = None

    def matmul(self, x: Tensor) -> Tensor:
        left, right = self.halves()
        return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))

    def conv2d(
        self, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor:
        if groups > 1:
            return super().conv2d(x, stride, padding, dilation, groups)
        left, right = (half.to(x.dtype) for half in self.halves())
        kernel = (*(1,) * (4 - len(self.shape)), *self.shape[2:])
        few = F.conv2d(
            x, right.reshape(-1, self.shape[1], *kernel), None, stride, padding, dilation
        )
        return F.conv2d(few, left[:, :, None, None])

    def rows(self, index: Tensor) -> Tensor:
        left, right = self.halves()
        return (left[index] @ right).reshape(*index.shape, *self.shape[1:])
