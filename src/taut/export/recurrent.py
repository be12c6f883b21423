"""Recurrent layers as one operation each, whose sequences may be of any length.

PyTorch traces nn.LSTM, nn.GRU and nn.RNN step by step, which fixes the length. Here a layer is one
`taut::recurrent`, which is PyTorch's own layer where it runs; graph.py says what it is in ONNX.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn


def as_operations(network: nn.Module) -> None:
    """Let every recurrent layer of a network run as one operation, in place."""
    for module in network.modules():
        known = type(module).forward in (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)
        if known and not (layer := cast(nn.RNNBase, module)).proj_size:
            module.forward = partial(_forward, layer)


def _forward(layer: nn.RNNBase, x: Any, hx: Any = None) -> Any:
    if not isinstance(x, Tensor) or x.dim() != 3:
        return type(layer).forward(layer, x, hx)
    batch_first, ways = layer.batch_first, 2 if layer.bidirectional else 1
    sequence = x.transpose(0, 1) if batch_first else x
    if hx is None:
        zeros = x.new_zeros(layer.num_layers * ways, sequence.shape[1], layer.hidden_size)
        hx = (zeros, zeros) if layer.mode == "LSTM" else zeros
    hidden, cell = hx if layer.mode == "LSTM" else (hx, hx)
    names = [n for group in layer._all_weights for n in group]
    weights = [cast(Tensor, getattr(layer, n)) for n in names]
    out, hidden, cell = recurrent(
        sequence, hidden, cell, weights, layer.mode, layer.num_layers, ways, layer.bias
    )
    out = out.transpose(0, 1) if batch_first else out
    return out, ((hidden, cell) if layer.mode == "LSTM" else hidden)


@torch.library.custom_op("taut::recurrent", mutates_args=())
def recurrent(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor], mode: str, layers: int,
    ways: int, bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x: [steps, batch, in] → [steps, batch, ways · size], and the last states.

    hidden, cell: [layers · ways, batch, size]; weights: as PyTorch lists them.
    """
    run = getattr(cast(Any, torch)._VF, mode.lower())
    state = (hidden, cell) if mode == "LSTM" else hidden
    found = run(x, state, weights, bias, layers, 0.0, False, ways == 2, False)
    last = found[2] if mode == "LSTM" else found[1].clone()
    return found[0], found[1], last


@recurrent.register_fake
def _(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor], mode: str, layers: int,
    ways: int, bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = x.new_empty(x.shape[0], x.shape[1], ways * hidden.shape[2])
    return out, torch.empty_like(hidden), torch.empty_like(cell)
