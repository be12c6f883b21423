"""Structured weights: a limited space of connection matrices, written by fewer numbers.

With b = block, and W seen as a matrix [out, columns] of n numbers whose blocks are b · b:

    circulant:  W'[i, j] = g[i // b, j // b, (i - j) mod b]                  n / b numbers
    toeplitz:   W'[i, j] = g[i // b, j // b, (i mod b) - (j mod b) + b - 1]  n (2 - 1/b) / b
    kronecker:  W' = A₁ ⊗ B₁ + … + A_terms ⊗ B_terms                         terms (n / b² + b²)

The numbers, the generators, are what is trained and stored. The columns of a convolution run over
the channels within one place of its window, so that blocks join channels. A block that the edge of
the matrix cuts is cut. B is as high and as wide as the largest divisors of out and columns up to b.

They start as those whose weight is nearest to the trained one by the sum of squares: means
along the diagonals of a block, or leading singular vectors of the rearranged matrix (Van Loan,
Pitsianis: Approximation with Kronecker products, 1993). From scratch they are scaled up to the size
of the weight, since the mean of b random weights is √b times too small.

Cheng, Yu, Feris, Kumar, Choudhary, Chang: An exploration of parameter redundancy in deep networks
with circulant projections (ICCV 2015); Ding and others: CirCNN (MICRO 2017); Sindhwani, Sainath,
Kumar: Structured transforms for small-footprint deep learning (NeurIPS 2015); Zhang and others:
Fast orthogonal projection based on Kronecker product (ICCV 2015). Where we differ: no random signs
are put before a circulant block; of the Toeplitz-like matrices we take those of plain Toeplitz
blocks, whose projection is exact; edges are cut, not padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from taut.errors import RecipeError
from taut.packed import PackedWeight
from taut.recoding import Form, Pack, Recoding
from taut.statistics import Statistics
from taut.structured_weight import (
    BlockCirculant,
    BlockToeplitz,
    CirculantWeight,
    Kronecker,
    KroneckerWeight,
    Structure,
    StructuredWeight,
    ToeplitzWeight,
)
from taut.technique import option, register_step
from taut.types import Site

_WEIGHTS: dict[type[Structure], type[StructuredWeight]] = {
    w.kind: w for w in (CirculantWeight, ToeplitzWeight, KroneckerWeight)
}


@register_step
@dataclass(frozen=True, kw_only=True)
class StructuredMatrix(Recoding):
    """Write a weight as circulant or Toeplitz blocks, or as a sum of Kronecker products."""

    structure: str = option(
        "circulant", choices=("circulant", "toeplitz", "kronecker"), help="what blocks look like"
    )
    block: int = option(
        8, low=2, high=4096, help="rows and columns of a block; at most those of kronecker's B"
    )
    terms: int = option(1, low=1, high=64, help="how many Kronecker products are summed")
    start: str = option(
        "fit", choices=("fit", "scratch"),
        help="the nearest generators, or those scaled to the size of an untrained weight",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms > 1 and self.structure != "kronecker":
            raise RecipeError(
                f"structured_matrix: terms count Kronecker products, got terms={self.terms} and "
                f"structure={self.structure!r}; take a smaller block, or structure='kronecker'"
            )

    @property
    def needs_all(self) -> bool:
        return True

    def _of(self, shape: tuple[int, ...]) -> Structure:
        """The structure of a weight of this shape that has inputs enough."""
        if self.structure == "circulant":
            return BlockCirculant(shape=shape, block=self.block)
        if self.structure == "toeplitz":
            return BlockToeplitz(shape=shape, block=self.block)
        rows = shape[0] if len(shape) > 1 else 1
        high, wide = (_divisor(n, self.block) for n in (rows, math.prod(shape) // rows))
        whole = Kronecker(shape=shape, high=high, wide=wide)
        return Kronecker(shape=shape, high=high, wide=wide, terms=min(self.terms, whole.most_terms))

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        self.accepts(site, site.shape)
        numbers = math.prod(self._of(site.shape).generators)
        return 1.7 * numbers if inner is None else inner(numbers)

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"structured_matrix: site {site.name!r} is written in {math.prod(shape)} numbers "
                "already, not one for each weight; put structured_matrix first in the recipe"
            )
        inputs = math.prod(shape) // max(shape[0], 1)
        if inputs < self.block:
            raise RecipeError(
                f"structured_matrix: block must be at most the inputs of a weight, got "
                f"{self.block} for the {inputs} of site {site.name!r}; take a smaller block, or "
                f"leave the site out by only='!{site.name}'"
            )

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        structure = self._of(tuple(core.shape))
        return StructuredForm(structure), core.new_zeros(structure.generators)

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(
                f"structured_matrix: site {site.name!r} holds NaN or infinite weights"
            )
        structure = self._of(tuple(core.shape))
        generators = structure.fit(core)
        if self.start == "scratch":
            wanted, got = core.norm(), structure.weight(generators).norm()
            factors = 2 if isinstance(structure, Kronecker) else 1
            generators = generators * float(wanted / got.clamp(min=1e-30)) ** (1 / factors)
        return StructuredForm(structure), generators


class StructuredForm(Form):
    """weight = structure.weight(core); the core holds the generators."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, core: Tensor) -> Tensor:
        return self.structure.weight(core)

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        assert keep is None, "no mask goes before a structure"
        return _WEIGHTS[type(self.structure)](self.structure, inner(None))


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is no larger than `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)
