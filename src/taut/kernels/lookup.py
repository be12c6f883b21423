"""lookup_matmul: products with weights that are small indices into tables.

    y[..., o] = Σ_i x[..., i] · table[o, i / group, index[o, i]]

`lookup_matmul_int8` is the same for int8 activations and int8 tables, with a scale for each output.

The indices of a row are split into parts of 8, 4, 2 and 1 bits, whose sum is the width (6 bits: a
part of 4, which holds the lowest, then one of 2). A part of b bits fills 32-bit words, sixteen
side by side: bits b·s … of word 16·m + l belong to column 16·(m·32/b + s) + l. In that order
sixteen lanes read them; csrc/lookup/lookup.h says the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.kernels import native, reference
from taut.kernels.cells import lstm_cell

_PARTS = (8, 4, 2, 1)


def pack_indices(index: Tensor, bits: int) -> Tensor:
    """index: [rows, columns] integers below 2**bits → [rows, words] int32."""
    rows, columns = index.shape
    strips = -(-columns // 16)
    lanes = index.new_zeros(rows, strips * 16, dtype=torch.int32)
    lanes[:, :columns] = index
    lanes = lanes.reshape(rows, strips, 16)
    words, low = [], 0
    for part in _parts(bits):
        fields = 32 // part
        blocks = -(-strips // fields)
        field = lanes.new_zeros(rows, blocks * fields, 16)
        field[:, :strips] = lanes >> low & 2**part - 1
        shifts = part * torch.arange(fields, dtype=torch.int32, device=index.device)
        shifted = field.reshape(rows, blocks, fields, 16) << shifts[:, None]
        merged = shifted.sum(2, dtype=torch.int32)  # no two share a bit
        words.append(merged.reshape(rows, blocks * 16))
        low += part
    return torch.cat(words, 1) if words else lanes.reshape(rows, 0)


def unpack_indices(codes: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack_indices` packed: [rows, words] int32 → [rows, columns] uint8."""
    rows, strips = len(codes), -(-columns // 16)
    index, low, at = codes.new_zeros(rows, strips, 16), 0, 0
    for part in _parts(bits):
        fields = 32 // part
        blocks = -(-strips // fields)
        words = codes[:, at : at + blocks * 16].reshape(rows, blocks, 1, 16)
        shifts = part * torch.arange(fields, dtype=torch.int32, device=codes.device)
        field = (words >> shifts[:, None]) & 2**part - 1
        index |= field.reshape(rows, blocks * fields, 16)[:, :strips] << low
        low, at = low + part, at + blocks * 16
    return index.reshape(rows, strips * 16)[:, :columns].to(torch.uint8)


def lookup_matmul(
    x: Tensor, codes: Tensor, table: Tensor, bits: int, group: int | None = None
) -> Tensor:
    """x [..., in] → [..., out].

    codes: [out, words] int32 from `pack_indices`; table: [1 or out, groups, 2**bits] float32, one
    for each run of `group` columns (a multiple of 128; None for all of them).
    """
    columns = x.shape[-1]
    group = max(columns, 1) if group is None else group
    if not native.runs(x, codes, table):
        index = unpack_indices(codes, bits, columns)
        return reference.lookup_matmul(x, index, table, group)
    y: Tensor = torch.ops.taut.lookup_matmul(native.floats_of(x), codes, table, bits, group)
    return native.shaped_as(x, y)


def lookup_lstm(
    inputs: Tensor, hidden: Tensor, cell: Tensor, codes: Tensor, table: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """All steps of an LSTM whose recurrent weight [4 · size, size] is looked up.

    inputs: [steps, batch, 4 · size], the gates' products with the input, biases added; hidden,
    cell: [batch, size] → hidden states [steps, batch, size] and the last cell. codes, table: as
    in `lookup_matmul`, one table for all columns.
    """
    given = (inputs, hidden, cell)
    if not native.runs(*given, codes, table) or any(t.dtype is not torch.float32 for t in given):
        states = []
        for step in inputs:
            gates = lookup_matmul(hidden, codes, table, bits)
            hidden, cell = lstm_cell(step, gates, cell)
            states.append(hidden)
        return torch.stack(states) if states else inputs.new_empty(0, *hidden.shape), cell
    group = max(hidden.shape[-1], 1)
    all_of_it: Tensor = torch.ops.taut.lookup_lstm(
        inputs.contiguous(), hidden.contiguous(), cell.contiguous(), codes, table, bits, group
    )
    return all_of_it[1:-1], all_of_it[-1]


def lookup_matmul_int8(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    """y[..., o] = scale[o] · Σ_i x[..., i] · table[o, index[o, i]], the sum being exact.

    x: [..., in] int8, of at most 131,071 columns; codes: [out, words] int32 from `pack_indices`;
    table: [1 or out, 2**bits] int8; scale: [out] float32, the weights' times the activations'. The
    result is float32, the same on every machine.
    """
    columns = x.shape[-1]
    if not native.runs(x, codes, table, scale, dtypes=(torch.int8,)):
        return reference.lookup_matmul_int8(x, unpack_indices(codes, bits, columns), table, scale)
    y: Tensor = torch.ops.taut.lookup_matmul_int8(native.rows_of(x), codes, table, scale, bits)
    return native.shaped_as(x, y, y.dtype)


def _parts(bits: int) -> list[int]:
    return [p for p in _PARTS if bits & p]


@native.fake("lookup_lstm")
def _(
    inputs: Tensor, hidden: Tensor, cell: Tensor, codes: Tensor, table: Tensor, bits: int,
    group: int,
) -> Tensor:  # fmt: skip
    return inputs.new_empty(inputs.shape[0] + 2, *hidden.shape)


@native.fake("lookup_matmul")
def _(x: Tensor, codes: Tensor, table: Tensor, bits: int, group: int) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@native.fake("lookup_matmul_int8")
def _(x: Tensor, codes: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    return scale.new_empty(x.shape[0], codes.shape[0])
