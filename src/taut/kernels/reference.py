"""The definition of every kernel in plain PyTorch: right by inspection, not fast."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def lookup_matmul(x: Tensor, index: Tensor, table: Tensor) -> Tensor:
    """y[..., o] = Σ_i x[..., i] · table[index[o, i]]

    x: [..., in] float; index: [out, in] integers in [0, len(table)); table: [entries] float.
    """
    return F.linear(x, table[index.long()].to(x.dtype))


def sparse_matmul(x: Tensor, positions: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """y[..., o] = Σ_i x[..., i] · W[o, i], where W is zero but for W.flat[positions] = values.

    x: [..., in] float; positions: [n] integers, rising; values: [n] float; shape: of W, whose
    dimensions after the first are joined.
    """
    flat = torch.zeros(math.prod(shape), dtype=values.dtype, device=values.device)
    flat[positions.long()] = values
    return F.linear(x, flat.reshape(shape[0], -1).to(x.dtype))
