"""Structured weights: matrices that a few numbers, their generators, write out by a fixed rule.

A weight [out, in, …] is seen as a matrix [out, columns] whose columns run over the later
dimensions first and over the inputs last, so that the blocks of a convolution join channels at one
place of the window. A block that the edge of the matrix cuts is cut: nothing is padded but the
vectors of a fast product.

Each structure is a `Structure`, a map from generators to rows, and a packed weight that stores the
generators, packed in any way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.coding import Coder
from taut.errors import FormatError
from taut.packed import Meta, PackedWeight, ReadChild, register_format

# ---- structures -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Structure(ABC):
    """A rule by which generators write a matrix [out, columns] of a weight of this shape.

    The other fields are whole numbers. Raises ValueError, with the rule, where they do not fit.
    """

    shape: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the matrix. A vector is one row."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, math.prod(self.shape) // max(rows, 1)

    @property
    @abstractmethod
    def generators(self) -> tuple[int, ...]:
        """The shape of the generators."""

    @abstractmethod
    def rows(self, generators: Tensor, which: Tensor) -> Tensor:
        """These rows of the matrix: which [n] → [n, columns], differentiable in the generators."""

    @abstractmethod
    def project(self, matrix: Tensor) -> Tensor:
        """The generators whose matrix is nearest to this one by the sum of squares."""

    @abstractmethod
    def product(self, prepared: Tensor, x: Tensor) -> Tensor:
        """x [..., columns] → [..., out] by the structure's fast product."""

    def prepare(self, generators: Tensor) -> Tensor:
        """What `product` wants of the generators, once."""
        return generators

    def weight(self, generators: Tensor) -> Tensor:
        """The weight, of the shape."""
        matrix = self.rows(generators, torch.arange(self.size[0], device=generators.device))
        if len(self.shape) < 3:
            return matrix.reshape(self.shape)
        inputs_last = (self.shape[0], *self.shape[2:], self.shape[1])
        return matrix.reshape(inputs_last).movedim(-1, 1)

    def fit(self, weight: Tensor) -> Tensor:
        """The generators of the weight nearest to this one."""
        matrix = weight.movedim(1, -1) if len(self.shape) > 2 else weight
        return self.project(matrix.reshape(self.size))

    def inputs_last(self, x: Tensor) -> Tensor:
        """[..., inputs · places], as products of layers take it → [..., places · inputs]."""
        if len(self.shape) < 3:
            return x
        parts = x.reshape(*x.shape[:-1], self.shape[1], -1)
        return parts.transpose(-1, -2).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Blocks(Structure):
    """Blocks of block · block numbers that depend on i - j alone; generators: [p, q, diagonals].

    block: at least 1, at most the number of columns.
    """

    block: int

    def __post_init__(self) -> None:
        if not 1 <= self.block <= self.size[1]:
            raise ValueError(f"block must lie in [1, {self.size[1]}] (its inputs)")

    @property
    @abstractmethod
    def diagonals(self) -> int:
        """How many numbers write one block."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Of the circle that a fast product turns a block on."""

    @abstractmethod
    def diagonal(self, offset: Tensor) -> Tensor:
        """Which generator of its block stands at i - j, in (-block, block)."""

    @property
    def generators(self) -> tuple[int, ...]:
        p, q = (-(-n // self.block) for n in self.size)
        return p, q, self.diagonals

    def index(self, which: Tensor) -> Tensor:
        """The place in the flat generators of each entry of these rows: [n, columns]."""
        i, j = which[:, None], torch.arange(self.size[1], device=which.device)
        block = i // self.block * self.generators[1] + j // self.block
        return block * self.diagonals + self.diagonal(i % self.block - j % self.block)

    def rows(self, generators: Tensor, which: Tensor) -> Tensor:
        index = self.index(which)
        return generators.flatten().index_select(0, index.flatten()).reshape(index.shape)

    def project(self, matrix: Tensor) -> Tensor:
        """The mean of what each generator stands for; zero where the edge cut all of it away."""
        index, count = self.index(torch.arange(len(matrix))).flatten(), math.prod(self.generators)
        sums = torch.bincount(index, weights=matrix.double().flatten(), minlength=count)
        counts = torch.bincount(index, minlength=count).clamp(min=1)
        return (sums / counts).to(matrix.dtype).reshape(self.generators)

    @abstractmethod
    def circle(self, generators: Tensor) -> Tensor:
        """First columns of circulant blocks whose upper left corners these are: [p, q, length]."""

    def prepare(self, generators: Tensor) -> Tensor:
        waves: Tensor = torch.fft.rfft(self.circle(generators))
        return waves.movedim(-1, 0)  # [frequencies, p, q]

    def product(self, prepared: Tensor, x: Tensor) -> Tensor:
        q = self.generators[1]
        padded = F.pad(x.reshape(-1, x.shape[-1]), (0, q * self.block - x.shape[-1]))
        waves = torch.fft.rfft(padded.reshape(-1, q, self.block), n=self.length)
        mixed = torch.einsum("fpq,nqf->npf", prepared, waves)
        y: Tensor = torch.fft.irfft(mixed, n=self.length)[..., : self.block].flatten(1)
        return y[:, : self.size[0]].reshape(*x.shape[:-1], self.size[0])


@dataclass(frozen=True, kw_only=True)
class BlockCirculant(Blocks):
    """W[i, j] = g[i // b, j // b, (i - j) mod b]."""

    @property
    def diagonals(self) -> int:
        return self.block

    @property
    def length(self) -> int:
        return self.block

    def diagonal(self, offset: Tensor) -> Tensor:
        return offset % self.block

    def circle(self, generators: Tensor) -> Tensor:
        return generators


@dataclass(frozen=True, kw_only=True)
class BlockToeplitz(Blocks):
    """W[i, j] = g[i // b, j // b, (i mod b) - (j mod b) + b - 1]."""

    @property
    def diagonals(self) -> int:
        return 2 * self.block - 1

    @property
    def length(self) -> int:
        return 2 * self.block

    def diagonal(self, offset: Tensor) -> Tensor:
        return offset + self.block - 1

    def circle(self, generators: Tensor) -> Tensor:
        above, below = torch.split(generators, [self.block - 1, self.block], dim=-1)
        return torch.cat([F.pad(below, (0, 1)), above], -1)


@dataclass(frozen=True, kw_only=True)
class Kronecker(Structure):
    """W[i, j] = Σ_t A[t, i // high, j // wide] · B[t, i mod high, j mod wide], a sum of A ⊗ B.

    high, wide: the size of B, which divides that of the matrix. generators: all A, then all B.
    """

    high: int
    wide: int
    terms: int = 1

    def __post_init__(self) -> None:
        for name, n, whole in zip(("high", "wide"), self._small, self.size, strict=True):
            if n < 1 or whole < 1 or whole % n:
                raise ValueError(f"{name} must divide {whole}")
        if not 1 <= self.terms <= self.most_terms:
            raise ValueError(f"terms must lie in [1, {self.most_terms}]")

    @property
    def most_terms(self) -> int:
        """As many terms as write any matrix."""
        return min(math.prod(self._small), math.prod(self._large))

    @property
    def _small(self) -> tuple[int, int]:
        return self.high, self.wide

    @property
    def _large(self) -> tuple[int, int]:
        return self.size[0] // self.high, self.size[1] // self.wide

    @property
    def generators(self) -> tuple[int, ...]:
        return (self.terms * (math.prod(self._large) + math.prod(self._small)),)

    def factors(self, generators: Tensor) -> tuple[Tensor, Tensor]:
        """A: [terms, out / high, columns / wide]; B: [terms, high, wide]."""
        counts = [self.terms * math.prod(n) for n in (self._large, self._small)]
        a, b = torch.split(generators, counts)
        return a.reshape(self.terms, *self._large), b.reshape(self.terms, *self._small)

    def rows(self, generators: Tensor, which: Tensor) -> Tensor:
        a, b = self.factors(generators)
        a, b = a[:, which // self.high], b[:, which % self.high]
        return torch.einsum("tna,tnb->nab", a, b).flatten(1)

    def project(self, matrix: Tensor) -> Tensor:
        """By the singular vectors of the matrix whose rows are the blocks (Van Loan, Pitsianis).

        A and B share each term's size so that their numbers are about equally large.
        """
        (m, n), (r, c) = self._large, self._small
        blocks = matrix.double().reshape(m, r, n, c).transpose(1, 2).reshape(m * n, r * c)
        u, s, v = torch.linalg.svd(blocks, full_matrices=False)
        tilt = math.sqrt(math.sqrt(m * n / (r * c)))
        root = s[: self.terms].sqrt()[:, None]
        a, b = u.T[: self.terms] * root * tilt, v[: self.terms] * root / tilt
        return torch.cat([a.flatten(), b.flatten()]).to(matrix.dtype)

    def product(self, prepared: Tensor, x: Tensor) -> Tensor:
        a, b = self.factors(prepared)
        parts = x.reshape(-1, self._large[1], self.wide)
        inside = torch.einsum("nac,trc->tnar", parts, b)
        return torch.einsum("tma,tnar->nmr", a, inside).reshape(*x.shape[:-1], self.size[0])


# ---- packed weights -------------------------------------------------------------------------


class StructuredWeight(PackedWeight):
    """A weight by its generators, a packed weight of their shape.

    It multiplies by the structure's own product; a layer that is faster dense is run dense.
    """

    kind: ClassVar[type[Structure]]
    generators: PackedWeight

    def __init__(self, structure: Structure, generators: PackedWeight) -> None:
        super().__init__(structure.shape)
        self.structure = structure
        self.generators = generators
        self._prepared: Tensor | None = None

    def meta(self) -> Meta:
        return {k: v for k, v in asdict(self.structure).items() if k != "shape"}

    def write(self, coder: Coder) -> None:
        with coder.inside("generators"):
            self.generators.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        numbers: dict[str, Any] = {f.name: meta.get(f.name) for f in fields(cls.kind)}
        del numbers["shape"]
        for name, value in numbers.items():
            if type(value) is not int:
                raise FormatError(f"{cls.format}: {name} must be a whole number, got {value!r}")
        if not shape or 0 in shape:
            raise FormatError(f"{cls.format} needs a shape of numbers, got {list(shape)}")
        try:
            structure = cls.kind(shape=shape, **numbers)
        except ValueError as error:
            raise FormatError(f"{cls.format}: {error}, got {numbers}") from error
        return cls(structure, child("generators", structure.generators))

    def dense(self) -> Tensor:
        return self.structure.weight(self.generators.dense())

    def rows(self, index: Tensor) -> Tensor:
        if len(self.shape) != 2:
            return super().rows(index)
        picked = self.structure.rows(self.generators.dense(), index.flatten())
        return picked.reshape(*index.shape, *self.shape[1:])

    def matmul(self, x: Tensor) -> Tensor:
        if self._prepared is None:
            self._prepared = self.structure.prepare(self.generators.dense().float())
        y = self.structure.product(self._prepared, self.structure.inputs_last(x).float())
        return y.to(x.dtype)

    def forget(self) -> None:
        super().forget()
        self._prepared = None


@register_format("circulant.v1")
class CirculantWeight(StructuredWeight):
    """Circulant blocks. generators: their first columns."""

    kind = BlockCirculant


@register_format("toeplitz.v1")
class ToeplitzWeight(StructuredWeight):
    """Toeplitz blocks. generators: their diagonals, from the upper right to the lower left."""

    kind = BlockToeplitz


@register_format("kronecker.v1")
class KroneckerWeight(StructuredWeight):
    """A sum of Kronecker products. generators: the large factors, then the small ones."""

    kind = Kronecker
