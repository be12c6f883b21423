"""Packed sequences under torch.export, which cannot follow lengths: all count as full ones.

A trace asks what is multiplied by what, and how often. A `PackedSequence` would hide both, since
its sizes are the values of a tensor. While a network is traced, packing [batch, steps, n] therefore
keeps all of [steps · batch, n], and a recurrent layer reads it as the padded sequence that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


@contextmanager
def full_lengths(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's packed sequences have the full length; for tracing only.

    The work that is counted is that of padded sequences, and the answers are theirs too.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    functions = cast(Any, torch._VF)
    for layer in layers:
        layer.__dict__["forward"] = _reading_padded(layer.forward, layer.batch_first)
    functions._pack_padded_sequence, functions._pad_packed_sequence = _pack, _pad
    try:
        yield
    finally:
        del functions._pack_padded_sequence, functions._pad_packed_sequence
        for layer in layers:
            del layer.__dict__["forward"]


def _pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """x [batch, steps, n], or steps first → [steps · batch, n] and the batch of each step."""
    steps_first = x.transpose(0, 1) if batch_first else x
    steps, batch = steps_first.shape[:2]
    return steps_first.flatten(0, 1), torch.full((steps,), batch)


def _pad(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding: float, steps: int
) -> tuple[Tensor, Tensor]:
    """What `_pack` took, and the lengths."""
    x = data.view(steps, -1, *data.shape[1:])
    return x.transpose(0, 1) if batch_first else x, torch.full((x.shape[1],), steps)


def _reading_padded(forward: Callable[..., Any], batch_first: bool) -> Callable[..., Any]:
    def read(x: Any, hx: Any = None) -> Any:
        if not isinstance(x, PackedSequence):
            return forward(x, hx)
        if hx is not None:
            hx = _map(lambda h: _ordered(h, x.sorted_indices), hx)
        padded, _ = _pad(x.data, x.batch_sizes, batch_first, 0.0, len(x.batch_sizes))
        y, state = forward(padded, hx)
        state = _map(lambda h: _ordered(h, x.unsorted_indices), state)
        data, sizes = _pack(y, x.batch_sizes, batch_first)
        return PackedSequence(data, sizes, x.sorted_indices, x.unsorted_indices), state

    return read


def _ordered(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


def _map(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    return tuple(f(v) for v in value) if isinstance(value, tuple) else f(value)
