"""lstm_cell and gru_cell: all that follows a recurrent step's two products, in one pass.

Formulas: reference.py. A step of a small layer spends more time on PyTorch's ten operations than
on its products; here it is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.kernels import native, reference


def lstm_cell(i: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """i, h: [batch, 4 · size], the gates; cell: [batch, size] → hidden state and cell."""
    if not _runs(i, h, cell):
        return reference.lstm_cell(i, h, cell)
    both = torch.ops.taut.lstm_cell(i.contiguous(), h.contiguous(), cell.contiguous())
    return both[0], both[1]


def gru_cell(i: Tensor, h: Tensor, state: Tensor) -> Tensor:
    """i, h (with its bias): [batch, 3 · size]; state: [batch, size] → hidden state."""
    if not _runs(i, h, state):
        return reference.gru_cell(i, h, state)
    new: Tensor = torch.ops.taut.gru_cell(i.contiguous(), h.contiguous(), state.contiguous())[0]
    return new


def _runs(i: Tensor, h: Tensor, state: Tensor) -> bool:
    return native.runs(i, h, state) and i.dtype is h.dtype is state.dtype is torch.float32


@native.fake("lstm_cell")
def _(i: Tensor, h: Tensor, cell: Tensor) -> Tensor:
    return cell.new_empty(2, *cell.shape)


@native.fake("gru_cell")
def _(i: Tensor, h: Tensor, state: Tensor) -> Tensor:
    return state.new_empty(1, *state.shape)
