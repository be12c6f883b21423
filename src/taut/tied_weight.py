"""The tied weight: rows that are multiples of a few shared ones.

    weight[i] = scale[i] · book[index[i]]

A row is a filter, [in, …] of a weight [out, in, …], or a kernel, the window of one filter and one
input. What reads whole filters multiplies by the book alone: as many fewer products as filters.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from taut.coding import Coder
from taut.errors import FormatError
from taut.kernels import Levels
from taut.packed import Meta, PackedWeight, Pair, ReadChild, register_format


def picked(book: Tensor, index: Tensor, scale: Tensor | None) -> Tensor:
    """scale · book[index]: [*index.shape, …], differentiable in the book and the scales."""
    rows = book.index_select(0, index.flatten().long()).reshape(*index.shape, *book.shape[1:])
    if scale is None:
        return rows
    return rows * scale.reshape(*index.shape, *[1] * (book.dim() - 1))


@register_format("tied.v1")
class TiedWeight(PackedWeight):
    """Rows picked from a book. index: [out] or [out, in], whole numbers below the book's rows.

    book: a packed weight [rows, …], of the weight's dimensions behind the index's; scale: a packed
    weight of one number for each index, or None for ones.
    """

    index: Tensor
    book: PackedWeight
    scale: PackedWeight | None

    def __init__(self, index: Tensor, book: PackedWeight, scale: PackedWeight | None) -> None:
        super().__init__((*index.shape, *book.shape[1:]))
        self.register_buffer("index", index.to(torch.int32).cpu())
        self.book, self.scale = book, scale
        self._floats: Tensor | None = None

    def meta(self) -> Meta:
        kernels = {"kernels": True} if self.index.dim() == 2 else {}
        return {"rows": self.book.shape[0], **kernels, **({"scaled": True} if self.scale else {})}

    def write(self, coder: Coder) -> None:
        index = self.index.cpu().flatten().to(torch.int64).numpy()
        coder.symbols("index", index, self.book.shape[0], len(index))
        for name, part in self.nested().items():
            with coder.inside(name):
                part.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        flags = [meta.get(name, False) for name in ("kernels", "scaled")]
        if any(type(flag) is not bool for flag in flags):
            raise FormatError(f"tied.v1: kernels and scaled are true or left out, got {meta}")
        kernels, scaled = flags
        if len(shape) < 2 + kernels or 0 in shape:
            raise FormatError(
                f"tied.v1: {'kernels' if kernels else 'filters'} need a shape of numbers in "
                f"{2 + kernels} dimensions at least, got {list(shape)}"
            )
        which, rows = shape[: 1 + kernels], meta.get("rows")
        count = math.prod(which)
        if type(rows) is not int or not 1 <= rows <= min(count, MOST_ROWS):
            most = min(count, MOST_ROWS)
            raise FormatError(f"tied.v1: rows must lie in [1, {most}], got {rows!r}")
        index = torch.from_numpy(coder.symbols("index", None, rows, count)).reshape(which)
        book = child("book", (rows, *shape[len(which) :]))
        return cls(index, book, child("scale", (count,)) if scaled else None)

    def factors(self) -> Tensor | None:
        """The scales, float32, decoded once and kept."""
        if self._floats is None and self.scale is not None:
            self._floats = self.scale.dense().float()
        return self._floats

    def forget(self) -> None:
        super().forget()
        self._floats = None

    def dense(self) -> Tensor:
        return picked(self.book.dense(), self.index, self.factors())

    @property
    def _filters(self) -> bool:
        return self.index.dim() == 1

    def _spread(self, y: Tensor, dim: int) -> Tensor:
        """What the filters give, of what the book's rows gave along a dimension."""
        found, scale = y.index_select(dim, self.index), self.factors()
        if scale is None:
            return found
        return found * scale.to(y.dtype).reshape(-1, *[1] * (y.dim() - 1 - dim % y.dim()))

    def matmul(self, x: Tensor) -> Tensor:
        return self._spread(self.book.matmul(x), -1) if self._filters else super().matmul(x)

    def conv2d(
        self, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor:
        if groups > 1 or not self._filters:  # filters of two groups read different inputs
            return super().conv2d(x, stride, padding, dilation, groups)
        return self._spread(self.book.conv2d(x, stride, padding, dilation), 1)

    def matmul_levels(self, x: Tensor, levels: Levels) -> Tensor | None:
        y = self.book.matmul_levels(x, levels) if self._filters else None
        return None if y is None else self._spread(y, -1)

    def matmul_int8(self, x: Tensor, step: Tensor) -> Tensor | None:
        y = self.book.matmul_int8(x, step) if self._filters else None
        return None if y is None else self._spread(y, -1)

    def conv2d_int8(
        self, x: Tensor, step: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor | None:
        if groups > 1 or not self._filters:
            return None
        y = self.book.conv2d_int8(x, step, stride, padding, dilation)
        return None if y is None else self._spread(y, 1)

    def rows(self, index: Tensor) -> Tensor:
        if not self._filters:
            return super().rows(index)
        found, scale = self.book.rows(self.index[index].long()), self.factors()
        return found if scale is None else found * scale[index].reshape(*index.shape, *[1] * (
            len(self.shape) - 1
        ))  # fmt: skip


MOST_ROWS = 1 << 16
"""Of a book."""
