"""Weights that are kept by a pattern, and the kernels that run them: blocks, and N of every M.

    blocks.v1   runs by block_matmul, n_of_m.v1 by bitmap_matmul; convolutions as products with
                their windows

Both kernels read floats: values that are packed in another way, as shared ones, are decoded when
the weight first runs, as many as are kept and as float16 where that is exact, and held until
`forget`. Grouped convolutions, embeddings and blocks in rows of more than 65536 columns run dense.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.coding import Coder
from taut.errors import FormatError
from taut.kernels import bitmap_matmul, block_matmul
from taut.kernels.reference import row_of_each
from taut.kernels.sparse import pack_bitmap, pack_rows, unpack_bitmap, unpack_rows
from taut.packed import Meta, PackedWeight, ReadChild, register_format
from taut.pattern import BLOCK_ROWS, Blocks, NOfM, Pattern


class PatternWeight(PackedWeight):
    """A mask of a pattern, and the values of what it keeps, packed in any way.

    values: a packed weight [n], row-major as the weight is.
    """

    values: PackedWeight

    def __init__(self, shape: torch.Size, values: PackedWeight) -> None:
        super().__init__(shape)
        self.values = values
        self._floats: Tensor | None = None

    @abstractmethod
    def mask(self) -> Tensor:
        """Which weights are there: [*shape] bool."""

    def floats(self) -> Tensor:
        """The values as the kernel reads them, kept between calls."""
        if self._floats is None:
            values, table = self.values.operands()
            values = values if table is None else table[values.int()]
            half = values.half()
            exact = torch.equal(half.float(), values.float())
            self._floats = self._arranged(half if exact else values.float())
        return self._floats

    def _arranged(self, values: Tensor) -> Tensor:
        """Values in the order of the weight → in the order that the kernel reads."""
        return values

    def forget(self) -> None:
        super().forget()
        self._floats = None

    def dense(self) -> Tensor:
        values, mask = self.values.dense(), self.mask()
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        return dense.masked_scatter(mask, values)

    def count_nonzero(self) -> int:
        return self.values.count_nonzero()

    def _matrix(self) -> tuple[int, int]:
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.numel // max(rows, 1)


@register_format("blocks.v1")
class BlockWeight(PatternWeight):
    """Blocks of 4 or 16 rows and one column of [out, in], later dimensions joined.

    starts: [⌈out / rows⌉ + 1] int32; columns: [blocks] uint16 (int32 for wide rows). In a file the
    blocks are a bitmap.
    """

    starts: Tensor
    columns: Tensor

    def __init__(self, mask: Tensor, values: PackedWeight, rows: int) -> None:
        super().__init__(mask.shape, values)
        self.block = Blocks(rows)
        kept = self.block.blocks(mask.cpu())
        starts, columns = pack_rows(kept.flatten().nonzero().squeeze(1), tuple(kept.shape))
        self.register_buffer("starts", starts)
        self.register_buffer("columns", columns)

    def meta(self) -> Meta:
        return {"rows": self.block.rows}

    def _blocks(self) -> Tensor:
        """Which blocks are there: [⌈out / rows⌉, in] bool."""
        width = self._matrix()[1]
        kept = torch.zeros(
            len(self.starts) - 1, width, dtype=torch.bool, device=self.columns.device
        )
        kept.view(-1)[unpack_rows(self.starts, self.columns, width)] = True
        return kept

    def mask(self) -> Tensor:
        return self.block.spread(self._blocks(), self.shape)

    def write(self, coder: Coder) -> None:
        kept = self._blocks().cpu().long()
        coder.bitmap("blocks", kept.numpy(), len(kept), kept.shape[1])
        with coder.inside("values"):
            self.values.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        rows = meta.get("rows")
        if type(rows) is not int or rows not in BLOCK_ROWS:
            raise FormatError(f"blocks.v1: rows must be 4 or 16, got {rows!r}")
        if len(shape) < 2 or math.prod(shape) >= 2**31:
            raise FormatError(
                "blocks.v1 needs a shape of at least two dimensions and fewer than 2**31 weights, "
                f"got {list(shape)}"
            )
        size = -(-shape[0] // rows), math.prod(shape[1:])
        kept = torch.from_numpy(coder.bitmap("blocks", None, *size)) > 0
        mask = Blocks(rows).spread(kept, shape)
        return cls(mask, child("values", (int(mask.sum()),)), rows)

    def _arranged(self, values: Tensor) -> Tensor:
        """[kept] → [blocks, rows], zeros in rows beyond the last."""
        row = row_of_each(self.starts, len(self.columns))
        first, many = self.starts.long()[row], self.starts.long().diff()[row]
        place = torch.arange(len(row), device=row.device) - first
        down = torch.arange(self.block.rows, device=row.device) * many[:, None]
        at = (self.block.rows * first + place)[:, None] + down  # only the last blocks are short
        return F.pad(values, (0, 1))[at.clamp(max=len(values))]

    def matmul(self, x: Tensor) -> Tensor:
        if self.columns.dtype is not torch.uint16:
            return super().matmul(x)
        return block_matmul(x, self.starts, self.columns, self.floats(), self.shape[0])


@register_format("n_of_m.v1")
class NOfMWeight(PatternWeight):
    """`keep` of every `of` weights in a row of [out, in], later dimensions joined.

    masks: [out, ⌈in / 16⌉] uint16, starts: [out, ⌈in / 128⌉] int32, as `bitmap_matmul` reads them.
    """

    masks: Tensor
    starts: Tensor

    def __init__(self, mask: Tensor, values: PackedWeight, keep: int, of: int) -> None:
        super().__init__(mask.shape, values)
        self.keep, self.of = keep, of
        masks, starts = pack_bitmap(mask.cpu().reshape(self._matrix()))
        self.register_buffer("masks", masks)
        self.register_buffer("starts", starts)

    def meta(self) -> Meta:
        return {"keep": self.keep, "of": self.of}

    def mask(self) -> Tensor:
        return unpack_bitmap(self.masks, self._matrix()[1]).reshape(self.shape)

    def write(self, coder: Coder) -> None:
        rows, columns = self._matrix()
        mask = self.mask().cpu().long().reshape(rows, columns).numpy()
        coder.n_of_m("positions", mask, rows, columns, self.keep, self.of)
        with coder.inside("values"):
            self.values.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        keep, of = meta.get("keep"), meta.get("of")
        if type(keep) is not int or type(of) is not int or not 0 < keep < of <= 128:
            raise FormatError(
                f"n_of_m.v1: it must keep N of M with 0 < N < M <= 128, got {keep!r} of {of!r}"
            )
        if not shape or math.prod(shape) >= 2**31:
            raise FormatError(
                "n_of_m.v1 needs a shape of at least one dimension and fewer than 2**31 weights, "
                f"got {list(shape)}"
            )
        rows = shape[0] if len(shape) > 1 else 1
        columns = math.prod(shape) // max(rows, 1)
        mask = torch.from_numpy(coder.n_of_m("positions", None, rows, columns, keep, of)) > 0
        return cls(mask.reshape(shape), child("values", (int(mask.sum()),)), keep, of)

    def matmul(self, x: Tensor) -> Tensor:
        return bitmap_matmul(x, self.masks, self.starts, self.floats())


def pattern_weight(pattern: Pattern, mask: Tensor, values: PackedWeight) -> PackedWeight:
    """The packed weight of a mask that has this pattern. values: of what it keeps, in order."""
    if isinstance(pattern, Blocks):
        return BlockWeight(mask, values, pattern.rows)
    assert isinstance(pattern, NOfM)
    return NOfMWeight(mask, values, pattern.keep, pattern.of)
