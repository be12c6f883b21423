"""sparse_matmul and its kin: products with weights most of which are zero.

    y[..., o] = Σ_j x[..., columns[j]] · value[j]              for starts[o] <= j < starts[o + 1]

Compressed rows are the general layout, blocks of R rows and one column the fastest one, and a
bitmap the one for 50–85 % zeros, N:M sparsity among them; `sparse_conv2d` takes rows too. A weight
that rows or blocks do not store is no term of the sum: kernels give a finite y though x be
infinite there. The definitions, and bitmaps, multiply by zeros instead and give NaN.

What packs here checks what it is given, and `check_rows` checks arrays from elsewhere. An operation
itself checks types, sizes and that starts rise; a column that does not exist gives a wrong sum, yet
nothing outside the arrays is read. csrc/{sparse,blocks,bitmap}/*.h say the same in C++.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.kernels import native, reference

Pair = int | tuple[int, int]


class Rows(NamedTuple):
    """Compressed rows: starts [out + 1] int32; columns [n] uint16, or int32 for wide rows; values.

    values: [n] float32, float16 or bfloat16; int8, which are multiplied by a scale of their row;
    or uint8, which are indices into a table.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor


class Blocks(NamedTuple):
    """Blocks of R rows and one column: starts [⌈out / R⌉ + 1] int32; columns [n] uint16; values.

    values: [n, R] float32 or float16, R = 4 or 16, zeros in rows beyond the last.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor


class Bitmap(NamedTuple):
    """Masks [out, ⌈in / 16⌉] uint16, bit i % 16 for column i; starts; the kept values in order.

    starts: [out, ⌈in / 128⌉] int32, how many values precede each 128 columns; values: [n] float32
    or float16.
    """

    masks: Tensor
    starts: Tensor
    values: Tensor


def pack_rows(positions: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The starts and columns of weights at rising flat positions of a tensor of this shape.

    Dimensions after the first are joined. Raises ValueError for positions that do not rise or do
    not exist.
    """
    out, columns = shape[0], math.prod(shape[1:])
    flat = positions.long()
    if len(flat) and not (int(flat[0]) >= 0 and int(flat[-1]) < out * columns):
        raise ValueError(f"pack_rows: positions must lie in [0, {out * columns})")
    if bool((flat.diff() <= 0).any()):
        raise ValueError("pack_rows: positions must rise")
    edges = torch.arange(out + 1, device=flat.device) * columns
    starts = torch.searchsorted(flat, edges).int()
    return starts, column_type(flat % max(columns, 1), columns)


def unpack_rows(starts: Tensor, columns: Tensor, width: int) -> Tensor:
    """What `pack_rows` packed: the flat positions, rows being `width` columns wide."""
    return reference.row_of_each(starts, len(columns)) * width + columns.long()


def column_type(columns: Tensor, width: int) -> Tensor:
    """Columns of rows so wide in the type that kernels read: 16 bits up to 65536 columns."""
    return columns.to(torch.uint16 if width <= 2**16 else torch.int32)


def check_rows(starts: Tensor, columns: Tensor, width: int) -> None:
    """Raise ValueError unless these are the rows of a matrix `width` columns wide."""
    rise = bool((starts.long().diff() >= 0).all())
    if len(starts) == 0 or int(starts[0]) != 0 or int(starts[-1]) != len(columns) or not rise:
        raise ValueError(f"sparse rows: starts must rise from 0 to {len(columns)}")
    if len(columns):
        low, high = (int(edge) for edge in columns.long().aminmax())
        if low < 0 or high >= width:
            raise ValueError(f"sparse rows: columns must lie in [0, {width}), got {low} … {high}")


def pack_blocks(weight: Tensor, rows: int) -> Blocks:
    """Blocks of `rows` rows (4 or 16) and one column, those of [out, in] that are not all zero."""
    if rows not in (4, 16):
        raise ValueError(f"pack_blocks: blocks must have 4 or 16 rows, got {rows}")
    out, width = weight.shape
    if width > 2**16:
        raise ValueError(f"pack_blocks: at most 65536 columns, got {width}; use rows")
    padded = F.pad(weight, (0, 0, 0, -out % rows)).reshape(-(-out // rows), rows, width)
    kept = (padded != 0).any(1)
    starts, columns = pack_rows(kept.flatten().nonzero().squeeze(1), tuple(kept.shape))
    return Blocks(starts, columns, padded.transpose(1, 2)[kept].contiguous())


def pack_bitmap(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The masks and starts of [out, in] bool; the values that belong to them are weight[mask]."""
    out, width = mask.shape
    bits = F.pad(mask, (0, -width % 128)).reshape(out, -(-width // 128), 8, 16)
    weights = 2 ** torch.arange(16, device=mask.device, dtype=torch.int32)
    words = (bits * weights).sum(3, dtype=torch.int32)
    masks = words.flatten(1)[:, : -(-width // 16)].to(torch.uint16).contiguous()
    counts = bits.sum((2, 3))
    starts = counts.flatten().cumsum(0).reshape(counts.shape) - counts
    return masks, starts.int()


def unpack_bitmap(masks: Tensor, width: int) -> Tensor:
    """What `pack_bitmap` packed: [out, width] bool."""
    bits = masks.int()[..., None] >> torch.arange(16, dtype=torch.int32, device=masks.device) & 1
    return bits.reshape(len(masks), masks.shape[1] * 16)[:, :width].bool()


def sparse_matmul(
    x: Tensor,
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """x [..., in] → [..., out], by compressed rows (`Rows`).

    scale: [out] float32 for int8 values; table: [1 … 256] float32 for uint8 values.
    """
    if not native.runs(x, *_given(starts, columns, values, scale, table)):
        weight = reference.rows_weight(starts, columns, values, x.shape[-1], scale, table)
        return F.linear(x, weight.to(x.dtype))
    y: Tensor = torch.ops.taut.sparse_matmul(
        native.floats_of(x), starts, columns, values, scale, table
    )
    return native.shaped_as(x, y)


def sparse_conv2d(
    x: Tensor,
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    kernel: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    scale: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """x [batch, channels, height, width] → [batch, out, …], as F.conv2d without its bias.

    Rows are those of the weight [out, channels / groups · kernel[0] · kernel[1]], flattened.
    """
    size, steps, pad, spread = (_pair(p) for p in (kernel, stride, padding, dilation))
    if not native.runs(x, *_given(starts, columns, values, scale, table)):
        shape = (len(starts) - 1, x.shape[1] // groups, *size)
        width = math.prod(shape[1:])
        weight = reference.rows_weight(starts, columns, values, width, scale, table)
        weight = weight.reshape(shape).to(x.dtype)
        return F.conv2d(x, weight, None, steps, pad, spread, groups)
    y: Tensor = torch.ops.taut.sparse_conv2d(
        x.float().contiguous(), starts, columns, values, scale, table,
        size, steps, pad, spread, groups,
    )  # fmt: skip
    return y.to(x.dtype)


def block_matmul(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, out: int) -> Tensor:
    """x [..., in] → [..., out], by blocks of R rows and one column (`Blocks`)."""
    if not native.runs(x, starts, columns, values):
        weight = reference.blocks_weight(starts, columns, values, out, x.shape[-1])
        return F.linear(x, weight.to(x.dtype))
    y: Tensor = torch.ops.taut.block_matmul(native.floats_of(x), starts, columns, values, out)
    return native.shaped_as(x, y)


def bitmap_matmul(x: Tensor, masks: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    """x [..., in] → [..., out], by masks and the values they keep (`Bitmap`)."""
    if not native.runs(x, masks, starts, values):
        weight = reference.bitmap_weight(unpack_bitmap(masks, x.shape[-1]), values)
        return F.linear(x, weight.to(x.dtype))
    y: Tensor = torch.ops.taut.bitmap_matmul(native.floats_of(x), masks, starts, values)
    return native.shaped_as(x, y)


def _pair(p: Pair) -> tuple[int, int]:
    return (p, p) if isinstance(p, int) else p


def _given(*parts: Tensor | None) -> list[Tensor]:
    return [p for p in parts if p is not None]


@native.fake("sparse_matmul")
def _(
    x: Tensor, starts: Tensor, columns: Tensor, values: Tensor,
    scale: Tensor | None, table: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], starts.shape[0] - 1)


@native.fake("sparse_conv2d")
def _(
    x: Tensor, starts: Tensor, columns: Tensor, values: Tensor,
    scale: Tensor | None, table: Tensor | None,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    sides = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    return x.new_empty(x.shape[0], starts.shape[0] - 1, *sides)


@native.fake("block_matmul")
def _(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


@native.fake("bitmap_matmul")
def _(x: Tensor, masks: Tensor, starts: Tensor, values: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], masks.shape[0])
