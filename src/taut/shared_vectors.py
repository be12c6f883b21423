"""Shared vectors: small indices into a codebook; and tables whose second half mirrors the first."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.clusters import mirror
from taut.coding import Coder
from taut.errors import FormatError
from taut.kernels import lookup_matmul
from taut.kernels.lookup import pack_indices, unpack_indices
from taut.recoding import Meta, PackedWeight, ReadChild, register_format

WIDTHS = (2, 4, 8)


@register_format("shared_vectors.v1")
class SharedVectors(PackedWeight):
    """Rows of [out, columns] (later dimensions joined) put together from vectors of a codebook.

    codes: what `pack_indices` makes of the indices [out, ⌈columns / width⌉]; table: a packed weight
    [entries · width], one vector after the other. What sticks out of a row is left out.
    """

    codes: Tensor
    table: PackedWeight

    def __init__(self, index: Tensor, table: PackedWeight, width: int, shape: tuple[int, ...]):
        super().__init__(shape)
        self.width, self.count = width, table.numel // width
        self.bits = max(1, (self.count - 1).bit_length())
        self.register_buffer("codes", pack_indices(index.to(torch.uint8).cpu(), self.bits))
        self.table = table
        self._floats: Tensor | None = None

    @property
    def _size(self) -> tuple[int, int]:
        """Rows, and columns of the weight as a matrix."""
        return _matrix(self.shape)

    @property
    def index(self) -> Tensor:
        """The indices, [out, vectors] uint8."""
        return unpack_indices(self.codes, self.bits, -(-self._size[1] // self.width))

    def _codebook(self) -> Tensor:
        return self.table.dense().reshape(self.count, self.width)

    def _rows(self, index: Tensor) -> Tensor:
        return self._codebook()[index.int()].flatten(1)[:, : self._size[1]]

    def meta(self) -> Meta:
        return {"entries": self.count, "width": self.width}

    def write(self, coder: Coder) -> None:
        index = self.index.cpu().flatten().to(torch.int64).numpy()
        coder.symbols("index", index, self.count, len(index))
        with coder.inside("table"):
            self.table.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        entries, width = meta.get("entries"), meta.get("width")
        if type(width) is not int or width not in WIDTHS:
            raise FormatError(f"shared_vectors.v1: width must be 2, 4 or 8, got {width!r}")
        if type(entries) is not int or not 1 <= entries <= 256:
            raise FormatError(f"shared_vectors.v1: entries must lie in [1, 256], got {entries!r}")
        rows, columns = _matrix(shape)
        if columns < width:
            raise FormatError(
                f"shared_vectors.v1: vectors of {width} are wider than the {columns} columns"
            )
        vectors = -(-columns // width)
        index = coder.symbols("index", None, entries, rows * vectors)
        table = child("table", (entries * width,))
        return cls(torch.from_numpy(index).reshape(rows, vectors), table, width, shape)

    def dense(self) -> Tensor:
        return self._rows(self.index).reshape(self.shape)

    def matmul(self, x: Tensor) -> Tensor:
        """A lookup for each place in a vector: the indices are those of one number in `width`."""
        if self._floats is None:
            places = self._codebook().float().T.contiguous()  # [width, entries]
            self._floats = F.pad(places, (0, 2**self.bits - self.count))
        x = F.pad(x, (0, -x.shape[-1] % self.width))
        parts = (
            lookup_matmul(x[..., place :: self.width], self.codes, table[None, None], self.bits)
            for place, table in enumerate(self._floats)
        )
        return torch.stack(list(parts)).sum(0)

    def rows(self, index: Tensor) -> Tensor:
        vectors = -(-self._size[1] // self.width)
        picked = unpack_indices(self.codes[index.flatten()], self.bits, vectors)
        return self._rows(picked).reshape(*index.shape, *self.shape[1:])

    def forget(self) -> None:
        super().forget()
        self._floats = None


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(rows, 1)


@register_format("mirrored.v1")
class Mirrored(PackedWeight):
    """A table whose second half is the opposite of the first. first: a packed weight [n]."""

    first: PackedWeight

    def __init__(self, first: PackedWeight) -> None:
        super().__init__((2 * first.numel,))
        self.first = first

    def write(self, coder: Coder) -> None:
        with coder.inside("first"):
            self.first.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        if len(shape) != 1 or shape[0] % 2:
            raise FormatError(f"mirrored.v1 needs an even number of entries, got {list(shape)}")
        return cls(child("first", (shape[0] // 2,)))

    def dense(self) -> Tensor:
        return mirror(self.first.dense())
