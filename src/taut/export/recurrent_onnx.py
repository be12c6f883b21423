"""Recurrent layers in ONNX: one LSTM, GRU or RNN for each depth, the gates in ONNX's order.

PyTorch's gates are i, f, g, o (LSTM) and r, z, n (GRU), ONNX's i, o, f, g and z, r, n. Both add two
biases; ONNX's GRU computes n as PyTorch's does where linear_before_reset is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from onnxscript import ir, opset21

_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}


def recurrent_as_onnx(
    x: Any, hidden: Any, cell: Any, weights: Sequence[Any], mode: str, layers: int, ways: int,
    bias: bool,
) -> Any:  # fmt: skip
    """What `taut::recurrent` is in ONNX."""
    op = cast(Any, opset21)
    each = 4 if bias else 2
    size = int(weights[1].shape[1])
    ends, cells = [], []
    for depth in range(layers):
        parts: list[list[Any]] = [[], [], []]
        for way in range(ways):
            at = (depth * ways + way) * each
            found = [_sorted(op, w, _ORDER[mode], size) for w in weights[at : at + each]]
            parts[0].append(found[0])
            parts[1].append(found[1])
            if bias:
                parts[2].append(op.Concat(found[2], found[3], axis=0))
        given = [x, *(_stacked(op, p) for p in parts[:2])]
        given.append(_stacked(op, parts[2]) if bias else None)
        start, end = depth * ways, (depth + 1) * ways
        given += [None, _rows(op, hidden, start, end)]
        options: dict[str, Any] = {"hidden_size": size}
        options["direction"] = "bidirectional" if ways == 2 else "forward"
        if mode == "LSTM":
            y, last, memory = op.LSTM(*given, _rows(op, cell, start, end), **options)
            cells.append(memory)
        elif mode == "GRU":
            y, last = op.GRU(*given, linear_before_reset=1, **options)
        else:
            kind = "Tanh" if mode == "RNN_TANH" else "Relu"
            y, last = op.RNN(*given, activations=[kind] * ways, **options)
        ends.append(last)
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), _ints(op, 0, 0, -1))
    ended = op.Concat(*ends, axis=0) if layers > 1 else ends[0]
    memory = ended if mode != "LSTM" else op.Concat(*cells, axis=0) if layers > 1 else cells[0]
    return x, ended, op.Identity(memory)


def _ints(op: Any, *numbers: int) -> Any:
    return op.Constant(value=ir.tensor(np.array(numbers, np.int64)))


def _rows(op: Any, value: Any, start: int, end: int) -> Any:
    return op.Slice(value, _ints(op, start), _ints(op, end), _ints(op, 0))


def _sorted(op: Any, weight: Any, order: Sequence[int], size: int) -> Any:
    """The gates' rows in ONNX's order."""
    if len(order) == 1:
        return weight
    gates = [_rows(op, weight, g * size, (g + 1) * size) for g in order]
    return op.Concat(*gates, axis=0)


def _stacked(op: Any, ways: Sequence[Any]) -> Any:
    """[ways, …]"""
    each = [op.Unsqueeze(w, _ints(op, 0)) for w in ways]
    return op.Concat(*each, axis=0) if len(each) > 1 else each[0]
