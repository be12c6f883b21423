"""The definition of every kernel in plain PyTorch: right by inspection, not fast."""

from __future__ import annotations

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


def lookup_matmul_int8(x: Tensor, index: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """y[..., o] = scale[o] · Σ_i x[..., i] · table[o, index[o, i]], the sum being exact.

    x: [..., in] int8; index: [out, in] integers in [0, entries); table: [1 or out, entries] int8;
    scale: [out] float32.
    """
    of_row = torch.arange(len(index), device=index.device)[:, None] % table.shape[0]
    total = F.linear(x.double(), table[of_row, index.long()].double())
    return total.float() * scale


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


_32_BITS = 0xFFFFFFFF

HASH = "mix32.v1"
"""The name of the hash below, which files carry with its seed: it never changes."""


def mix32(value: Tensor, between: Tensor | int = 0) -> Tensor:
    """Chris Wellons' lowbias32, a bijection of 32-bit numbers (held in int64) that mixes all bits.

    between: added between its two rounds, so that one more number is mixed in.
    """
    value = (value ^ value >> 16) * 0x7FEB352D & _32_BITS
    value = (value ^ value >> 15) + between & _32_BITS
    value = value * 0x846CA68B & _32_BITS
    return value ^ value >> 16


def hash_map(
    shape: tuple[int, int],
    buckets: int,
    seed: int,
    run: int = 1,
    device: torch.device | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which bucket each weight is drawn from, int64, and whether its sign is flipped, bool.

    index[o, i] = (start(o, i / span) + place(o, i)) mod buckets

    A start is hashed from [0, buckets). Runs: span = run, place = i % run. Single weights (run =
    1): span = 16, place = i % 16 + 16·(two bits of the weight's own). Rows and columns are hashed
    apart, so there may be 2**31 - 1 of either. rows: which to hash, [n], instead of all. The hash
    is called HASH; why it has this form is said in `hashed.py`.
    """
    if run not in (1, 4, 16, 64) or not 0 <= seed < 2**32 or not 1 <= buckets < 2**31:
        raise ValueError(
            "hash_map: run must be 1, 4, 16 or 64, seed lie in [0, 2**32) and buckets in "
            f"[1, 2**31), got run {run}, seed {seed} and {buckets} buckets"
        )
    row = (torch.arange(shape[0], device=device) if rows is None else rows.long())[:, None]
    column = torch.arange(shape[1], device=device)
    one, other = (mix32(torch.tensor(s, device=device)) for s in (seed, seed ^ 0x9E3779B9))
    first, second = mix32(row + one & _32_BITS), mix32(row ^ other)

    def hashed(number: Tensor) -> Tensor:
        return mix32(number + first & _32_BITS, second)

    span = 16 if run == 1 else run
    runs = torch.arange(-(-shape[1] // span), device=device)
    start = (hashed(runs) * buckets >> 32).repeat_interleave(span, 1)[:, : shape[1]]
    own = hashed(2**31 + column // 128 * 16 + column % 16) >> column // 16 % 8 * 4
    place = column % 16 + 16 * (own >> 1 & 3) if run == 1 else column % run
    return (start + place) % buckets, own >> 3 & 1 == 1


def hashed_weight(buckets: Tensor, shape: tuple[int, int], seed: int, run: int = 1) -> Tensor:
    """W[o, i] = ± buckets[index[o, i]], by `hash_map`. buckets: [n] float of any width."""
    index, minus = hash_map(shape, len(buckets), seed, run, buckets.device)
    weight = buckets[index]
    return torch.where(minus, -weight, weight)


def hashed_matmul(x: Tensor, buckets: Tensor, out: int, seed: int, run: int = 1) -> Tensor:
    """y[..., o] = Σ_i x[..., i] · W[o, i], where W is the `hashed_weight` of these buckets."""
    return F.linear(x, hashed_weight(buckets, (out, x.shape[-1]), seed, run).to(x.dtype))
