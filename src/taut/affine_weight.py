"""The affine weight: small whole numbers, and the steps that they count; the kernels that run it.

W = step · (n − zero)
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.coding import Coder
from taut.errors import FormatError
from taut.indexed_weight import IndexedWeight
from taut.kernels import BitWeights, Levels, bitplane_conv2d, bitplane_matmul, lookup_matmul
from taut.kernels.lookup import lookup_lstm, lookup_matmul_int8, pack_indices, unpack_indices
from taut.packed import Meta, PackedWeight, Pair, ReadChild, register_format

_MOST_PLANES = 4  # beyond it whole numbers are multiplied faster than bits are counted
_GROUP = 128  # columns of which lookup_matmul takes multiples
EXACT = 131_071  # columns that lookup_matmul_int8 takes
_NARROW = 128  # columns below which windows of int8 take longer than those of floats


@register_format("affine.v1")
class AffineWeight(IndexedWeight):
    """Whole numbers n in [0, 2**bits) and their steps, packed in any way.

    steps: [count], one for the whole weight, for each row, or for each run of columns of a row
    (later dimensions joined). zeros: twice the number that stands for zero, a scalar or [count]
    integers: with an odd one no weight is zero, and those of [count] are even.
    """

    steps: PackedWeight
    zeros: Tensor

    def __init__(self, index: Tensor, bits: int, steps: PackedWeight, zeros: Tensor) -> None:
        super().__init__(index, 2**bits)
        self.steps = steps
        self.register_buffer("zeros", zeros.detach().to("cpu", torch.int16).clone())
        self._tables: Tensor | None = None
        self._planes: dict[int, BitWeights] = {}
        self._inputs_last: Tensor | None = None

    @property
    def single(self) -> bool:
        """Whether one step serves all: the weight is then an index into one table."""
        return self.steps.numel == 1

    @property
    def by_row(self) -> bool:
        """Whether each row has a step of its own."""
        return len(self.shape) > 1 and self.steps.numel == self.shape[0]

    def middle(self) -> Tensor:
        """What stands for zero: [1] or [count] float32."""
        return self.zeros.reshape(-1).float() / 2

    def entries(self) -> Tensor:
        assert self.single
        n = torch.arange(2**self.bits, device=self.zeros.device)
        return (n - self.middle()) * self.steps.dense().float()

    # ---- in a file ----------------------------------------------------------------------

    def meta(self) -> Meta:
        meta: Meta = {"bits": self.bits}
        if self.steps.numel != (self.shape[0] if len(self.shape) > 1 else 1):
            meta["steps"] = self.steps.numel
        if self.zeros.dim():
            meta["zero"] = "each"
        elif int(self.zeros) != 2**self.bits:
            meta["zero"] = int(self.zeros)
        return meta

    def write(self, coder: Coder) -> None:
        index = self.index.cpu().flatten().to(torch.int64).numpy()
        coder.symbols("index", index, 2**self.bits, self.numel)
        if self.zeros.dim():
            each = (self.zeros.cpu() // 2).to(torch.int64).numpy()
            coder.symbols("zeros", each, 2**self.bits, self.steps.numel)
        with coder.inside("steps"):
            self.steps.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        bits, rows = meta.get("bits"), shape[0] if len(shape) > 1 else 1
        if type(bits) is not int or not 1 <= bits <= 8:
            raise FormatError(f"affine.v1: bits must lie in [1, 8], got {bits!r}")
        count, columns = meta.get("steps", rows), math.prod(shape[1:])
        groups = count == 1 or (
            type(count) is int and len(shape) > 1 and 1 <= rows <= count
            and count % rows == 0 and columns % (count // rows) == 0
        )  # fmt: skip
        if type(count) is not int or not groups or count > max(math.prod(shape), 1):
            raise FormatError(
                f"affine.v1: steps must be one, or a number that divides the columns for each row, "
                f"got {count!r} for the shape {list(shape)}"
            )
        zero, most = meta.get("zero", 2**bits), 2 * (2**bits - 1)
        if zero != "each" and (type(zero) is not int or not 0 <= zero <= most):
            raise FormatError(f"affine.v1: zero must be 'each' or in [0, {most}], got {zero!r}")
        index = torch.from_numpy(coder.symbols("index", None, 2**bits, math.prod(shape)))
        zeros = torch.tensor(0 if zero == "each" else zero)
        if zero == "each":
            zeros = 2 * torch.from_numpy(coder.symbols("zeros", None, 2**bits, count))
        return cls(index.reshape(shape), bits, child("steps", (count,)), zeros)

    # ---- run ----------------------------------------------------------------------------

    def dense(self) -> Tensor:
        numbers = self.index.reshape(self.steps.numel, -1).float()
        weight = (numbers - self.middle()[:, None]) * self.steps.dense().float()[:, None]
        return weight.reshape(self.shape)

    def matmul(self, x: Tensor) -> Tensor:
        if self.single:
            return super().matmul(x)
        columns = math.prod(self.shape[1:])
        if self.by_row:
            table = self._numbers().float()[None, None]
            y = lookup_matmul(x.float(), self.codes, table, self.bits)
            return self._scaled(y, x).to(x.dtype)
        width = columns * self.shape[0] // self.steps.numel
        if width % _GROUP:
            return PackedWeight.matmul(self, x)
        return lookup_matmul(x, self.codes, self.row_tables(), self.bits, width)

    def matmul_int8(self, x: Tensor, step: Tensor) -> Tensor | None:
        if not (self.single or self.by_row) or x.shape[-1] > EXACT:
            return None
        return self._whole_product(x, self.codes) * step

    def _whole_product(self, x: Tensor, codes: Tensor) -> Tensor:
        """x [..., in] int8 → [..., out] float32, in steps of x; codes: in the order of x."""
        ones = torch.ones(self.shape[0], device=x.device)
        table = self._numbers().to(torch.int8)[None]
        return self._scaled(lookup_matmul_int8(x, codes, table, ones, self.bits), x)

    def conv2d_int8(
        self, x: Tensor, step: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor | None:
        """Windows whose inputs stand last, so that a row of a window is copied at once."""
        columns = math.prod(self.shape[1:])
        if groups > 1 or not (self.single or self.by_row) or not _NARROW <= columns <= EXACT:
            return None
        kernel = (*(1,) * (4 - len(self.shape)), *self.shape[2:])
        if self._inputs_last is None:
            index = self.index.reshape(*self.shape[:2], -1).transpose(1, 2).flatten(1)
            self._inputs_last = pack_indices(index.contiguous(), self.bits)
        high, wide = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        seen = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
        seen = seen.contiguous().unfold(1, high, stride[0])[..., :: dilation[0]]
        seen = seen.unfold(2, wide, stride[1])[..., :: dilation[1]]  # [n, y, x, in, *kernel]
        rows = seen.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return self._whole_product(rows, self._inputs_last).permute(0, 3, 1, 2) * step

    def _numbers(self) -> Tensor:
        """n − 2**(bits − 1), which an int8 holds whatever the zero is."""
        return torch.arange(2**self.bits, device=self.zeros.device) - self._middle()

    def _middle(self) -> int:
        return 1 << self.bits - 1

    def _scaled(self, y: Tensor, x: Tensor) -> Tensor:
        """The product of x with the weight, given that with `_numbers`."""
        beside = self._middle() - self.middle()
        if bool(beside.any()):
            y = y + beside * x.sum(-1, keepdim=True, dtype=torch.float32)
        scaled: Tensor = y * self.steps.dense().float()
        return scaled

    def matmul_levels(self, x: Tensor, levels: Levels) -> Tensor | None:
        planes = self.bit_planes(1, levels)
        return None if planes is None else bitplane_matmul(x, planes, levels)

    def conv2d_levels(
        self, x: Tensor, levels: Levels, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> Tensor | None:
        planes = self.bit_planes(groups, levels)
        if planes is None:
            return None
        return bitplane_conv2d(x, planes, levels, stride, padding, dilation)

    def bit_planes(self, groups: int, levels: Levels) -> BitWeights | None:
        """The numbers bit by bit; a plane of ones where their middle is not the range's.

        None where there are too many bits, or steps that no row has for itself.

        n − zero = Σ over bits of ±2**(i − 1) + ((2**bits − 1) / 2 − zero)
        """
        few = self.bits <= _MOST_PLANES and len(levels.scale) <= _MOST_PLANES
        if not few or len(self.shape) < 2 or not (self.single or self.by_row):
            return None
        if groups not in self._planes:
            kernel = (1, *self.shape[2:]) if len(self.shape) == 3 else self.shape[2:]
            index = self.index.reshape(*self.shape[:2], *kernel)
            bits = [index >> i & 1 for i in range(self.bits)]
            sizes = [2.0**i / 2 for i in range(self.bits)]
            scale = torch.tensor(sizes, device=index.device).expand(self.shape[0], -1)
            beside = ((2**self.bits - 1) / 2 - self.middle()).expand(self.shape[0])
            if bool(beside.any()):
                bits.append(torch.ones_like(index))
                scale = torch.cat([scale, beside[:, None]], 1)
            scale = scale * self.steps.dense().float().expand(self.shape[0])[:, None]
            planes = torch.stack(bits, 1).bool()
            self._planes[groups] = BitWeights.pack(planes, scale, groups)
        return self._planes[groups]

    def lstm(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        if self.single:
            return super().lstm(inputs, hidden, cell)
        if not self.by_row:
            return PackedWeight.lstm(self, inputs, hidden, cell)
        return lookup_lstm(inputs, hidden, cell, self.codes, self.row_tables(), self.bits)

    def row_tables(self) -> Tensor:
        """[rows, groups, 2**bits] float32, kept between calls."""
        if self._tables is None:
            n = torch.arange(2**self.bits, device=self.zeros.device)
            tables = (n - self.middle()[:, None]) * self.steps.dense().float()[:, None]
            self._tables = tables.reshape(self.shape[0], -1, 2**self.bits)
        return self._tables

    def rows(self, index: Tensor) -> Tensor:
        if self.single:
            return super().rows(index)
        flat, columns = index.flatten(), math.prod(self.shape[1:])
        picked = unpack_indices(self.codes[flat], self.bits, columns).float()
        groups = self.steps.numel // self.shape[0]
        steps = self.steps.dense().float().reshape(-1, groups, 1)[flat]
        middle = self.middle().expand(self.steps.numel).reshape(-1, groups, 1)[flat]
        found = (picked.reshape(len(flat), groups, -1) - middle) * steps
        return found.reshape(*index.shape, *self.shape[1:])

    def count_nonzero(self) -> int:
        return int(self.dense().count_nonzero())

    def forget(self) -> None:
        super().forget()
        self._tables = self._inputs_last = None
        self._planes.clear()
