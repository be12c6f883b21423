"""The definition of every kernel in plain PyTorch: right by inspection, not fast."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def bitplane_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """y[..., o] = Σ_i x[..., i] · W[o, i] of numbers that were decoded from their bits."""
    return F.linear(x, weight)


def bitplane_real(x: Tensor, weight: Tensor) -> Tensor:
    """y[..., o] = Σ_i x[..., i] · W[o, i] of weights that were decoded from their bits."""
    return F.linear(x, weight)


def bitplane_conv2d(
    x: Tensor,
    weight: Tensor,
    pad: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of decoded numbers whose border holds `pad`."""
    border = (padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(x, border, value=pad)
    return F.conv2d(padded, weight, None, tuple(stride), 0, tuple(dilation), groups)


def lstm_cell(i: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM from its gates' products with the input (i) and the hidden state (h).

    i, h: [batch, 4 · size], in PyTorch's order of gates; cell: [batch, size]. Gives the new hidden
    state and cell.
    """
    enter, forget, content, leave = (i + h).chunk(4, -1)
    new = forget.sigmoid() * cell + enter.sigmoid() * content.tanh()
    return leave.sigmoid() * new.tanh(), new


def gru_cell(i: Tensor, h: Tensor, state: Tensor) -> Tensor:
    """One step of a GRU. i, h (with its bias): [batch, 3 · size]; state: [batch, size]."""
    (i_r, i_z, i_n), (h_r, h_z, h_n) = i.chunk(3, -1), h.chunk(3, -1)
    new = (i_n + (i_r + h_r).sigmoid() * h_n).tanh()
    return new + (i_z + h_z).sigmoid() * (state - new)
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


def blocks_weight(
    starts: Tensor, columns: Tensor, values: Tensor, out: int, width: int
) -> Tensor:
    """W [out, width] float: block j holds R rows of column columns[j], from R · its block row on."""
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
