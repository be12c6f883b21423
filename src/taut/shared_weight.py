"""Shared weights: numbers, or short vectors, picked from a table by small indices.

The forms that train them, the packed weights that store them, and what their tables may be made of.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.clusters import mirror
from taut.coding import Coder
from taut.errors import FormatError
from taut.indexed_weight import IndexedWeight
from taut.kernels import lookup_matmul
from taut.kernels.lookup import pack_indices, unpack_indices
from taut.packed import Meta, PackedWeight, ReadChild, register_format
from taut.recoding import Form, Pack

WIDTHS = (2, 4, 8)

# ---- trainable forms ------------------------------------------------------------------------


class SharedForm(Form):
    """weight = scale · table[index]; the core is the table, sorted when it was fitted.

    mirrored: the core is half of the table, whose other half is its opposite. scaled: whether other
    sites have the very same core, each with a scale of its own; else the scale is one.
    """

    index: Tensor
    scale: Tensor | None

    def __init__(self, index: Tensor, mirrored: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("scale", torch.ones(()) if scaled else None)
        self.mirrored, self.shares_core = mirrored, scaled
        self.width = 1

    def forward(self, core: Tensor) -> Tensor:
        table = core if self.width == 1 else core.reshape(-1, self.width)
        table = mirror(table) if self.mirrored else table
        picked: Tensor = _Gather.apply(table, self.index)  # type: ignore[no-untyped-call]
        return picked if self.scale is None else picked * self.scale

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        return SharedValues(*self._stored(core, keep, inner))

    def _stored(
        self, core: Tensor, keep: Tensor | None, inner: Pack
    ) -> tuple[Tensor, PackedWeight]:
        """Indices into what is stored of the table, and that, packed.

        What no weight uses is left out, unless other sites use it.
        """
        index, entries = (self.index if keep is None else self.index[keep]).long(), len(core)
        if self.scale is not None:
            table = Mirrored(inner(None)) if self.mirrored else inner(None)
            return index, Scaled(table, float(self.scale))
        entries //= self.width
        own = index % entries
        used = torch.bincount(own.flatten(), minlength=entries) > 0
        renumbered = (used.cumsum(0) - 1).clamp(min=0)[own]
        table = inner(used.repeat_interleave(self.width))
        if not self.mirrored:
            return renumbered, table
        return renumbered + (index >= entries) * used.sum(), Mirrored(table)


class VectorForm(SharedForm):
    """Rows of the weight are vectors of the table, joined. index: [out, vectors].

    The core is the table's vectors, one after the other: [entries · width].
    """

    def __init__(
        self, index: Tensor, shape: tuple[int, ...], width: int, mirrored: bool, scaled: bool
    ) -> None:
        super().__init__(index, mirrored, scaled)
        self.shape, self.width = tuple(shape), width

    def forward(self, core: Tensor) -> Tensor:
        rows = super().forward(core).flatten(1)
        return rows[:, : _matrix(self.shape)[1]].reshape(self.shape)

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        assert keep is None, "no mask goes before vectors"
        return SharedVectors(*self._stored(core, None, inner), self.width, self.shape)


class _Gather(torch.autograd.Function):
    """table[index], whose gradient to an entry is the sum over its weights."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table[index.int()]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        index, grad = ctx.saved_tensors[0].flatten(), grads[0]
        if len(ctx.shape) > 1:
            summed = grad.new_zeros(ctx.shape)
            return summed.index_add_(0, index.int(), grad.reshape(len(index), -1)), None
        summed = torch.bincount(index, weights=grad.flatten(), minlength=ctx.shape[0])
        return summed.to(grad.dtype), None


# ---- packed weights -------------------------------------------------------------------------


@register_format("shared_values.v1")
class SharedValues(IndexedWeight):
    """Small indices into one table. table: a packed weight [entries]."""

    table: PackedWeight

    def __init__(self, index: Tensor, table: PackedWeight) -> None:
        super().__init__(index, table.numel)
        self.table = table

    def entries(self) -> Tensor:
        return self.table.dense()

    def meta(self) -> Meta:
        return {"entries": self.table.numel}

    def write(self, coder: Coder) -> None:
        index = self.index.cpu().flatten().to(torch.int64).numpy()
        coder.symbols("index", index, self.table.numel, self.numel)
        with coder.inside("table"):
            self.table.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        entries = meta.get("entries")
        if type(entries) is not int or not 0 <= entries <= 256:
            raise FormatError(f"shared_values.v1: entries must lie in [0, 256], got {entries!r}")
        if entries == 0 and 0 not in shape:
            raise FormatError("shared_values.v1: a table without entries cannot hold weights")
        index = coder.symbols("index", None, max(entries, 1), math.prod(shape))
        return cls(torch.from_numpy(index).reshape(shape), child("table", (entries,)))


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
        if coder.first(self.first):  # other sites may have it too
            with coder.inside("first"):
                self.first.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        if len(shape) != 1 or shape[0] % 2:
            raise FormatError(f"mirrored.v1 needs an even number of entries, got {list(shape)}")
        return cls(child("first", (shape[0] // 2,)))

    def dense(self) -> Tensor:
        return mirror(self.first.dense())


@register_format("scaled.v1")
class Scaled(PackedWeight):
    """A table that weights of several sites have, times the scale of this one: a bfloat16 above 0.

    first: a packed weight [n], the very same in all of them.
    """

    first: PackedWeight

    def __init__(self, first: PackedWeight, scale: float) -> None:
        super().__init__(first.shape)
        self.first, self.scale = first, scale

    def meta(self) -> Meta:
        return {"scale": self.scale}

    def write(self, coder: Coder) -> None:
        if coder.first(self.first):  # other sites may have it too
            with coder.inside("first"):
                self.first.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        scale = meta.get("scale")
        good = type(scale) is float and 0 < scale < math.inf
        if not good or float(torch.tensor(scale).bfloat16()) != scale:
            raise FormatError(f"scaled.v1: scale must be a bfloat16 above 0, got {scale!r}")
        return cls(child("first", shape), scale)

    def dense(self) -> Tensor:
        return self.first.dense() * self.scale
