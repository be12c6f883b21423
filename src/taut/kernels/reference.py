"""The definition of every kernel in plain PyTorch: right by inspection, not fast."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def lookup_matmul(x: Tensor, index: Tensor, table: Tensor, group: int | None = None) -> Tensor:
    """y[..., o] = Σ_i x[..., i] · table[o, i / group, index[o, i]]

    x: [..., in] float; index: [out, in] integers in [0, entries); table: [entries], or
    [1 or out, groups, entries], float.
    """
    if table.dim() == 1:
        return F.linear(x, table[index.long()].to(x.dtype))
    of_row = torch.arange(len(index), device=index.device)[:, None] % table.shape[0]
    of_column = torch.arange(index.shape[1], device=index.device) // (group or index.shape[1])
    return F.linear(x, table[of_row, of_column, index.long()].to(x.dtype))


def sparse_matmul(x: Tensor, positions: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """y[..., o] = Σ_i x[..., i] · W[o, i], where W is zero but for W.flat[positions] = values.

    x: [..., in] float; positions: [n] integers, rising; values: [n] float; shape: of W, whose
    dimensions after the first are joined.
    """
    flat = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    flat[positions.long()] = values
    return F.linear(x, flat.reshape(shape[0], -1).to(x.dtype))


def rows_weight(
    starts: Tensor,
    columns: Tensor,
    values: Tensor,
    width: int,
    scale: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """W [out, width] float of compressed rows: W[o, columns[j]] = the sum of such values of row o.

    values: floats; int8 with a scale for each row; or uint8 indices into a table.
    """
    row = row_of_each(starts, len(columns))
    if table is not None:
        values = table[values.long()]
    elif scale is not None:
        values = values * scale[row]
    weight = values.new_zeros(len(starts) - 1, width, dtype=torch.float32)
    return weight.index_put((row, columns.long()), values.float(), accumulate=True)


def blocks_weight(starts: Tensor, columns: Tensor, values: Tensor, out: int, width: int) -> Tensor:
    """W [out, width] float: block j holds R rows of column columns[j], from row R · b on."""
    rows = values.shape[1]
    weight = values.new_zeros(len(starts) - 1, width, rows, dtype=torch.float32)
    at = (row_of_each(starts, len(columns)), columns.long())
    weight = weight.index_put(at, values.float(), accumulate=True)
    return weight.transpose(1, 2).flatten(0, 1)[:out]


def bitmap_weight(mask: Tensor, values: Tensor) -> Tensor:
    """W float: the values, in order, where the mask is set; zeros elsewhere."""
    weight = values.new_zeros(mask.shape, dtype=torch.float32)
    return weight.masked_scatter(mask, values.float())


def row_of_each(starts: Tensor, count: int) -> Tensor:
    """The row of each stored value: [count] int64."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return rows.repeat_interleave(starts.diff().long(), output_size=count)
