"""Multi-head attention from its projections on, batch by batch.

    softmax(q · kᵀ / √width + mask) · v, head by head, then the projection of the output

PyTorch's own forward sorts by time steps and moves each tensor several times more; engines run each
of those moves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_usual(layer: nn.MultiheadAttention, query: Tensor) -> bool:
    """Whether `attended` knows the layer: batches, no keys but those given."""
    return layer.bias_k is None and not layer.add_zero_attn and query.dim() == 3


def attended(
    layer: nn.MultiheadAttention, projected: Iterable[Tensor],
    key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None,
    need_weights: bool = False, average_attn_weights: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What the layer gives in eval mode; its other arguments are those of its forward.

    projected: queries, keys and values, [batch, length, width] or as batch_first says.
    """
    first = 0 if layer.batch_first else 1

    def heads(t: Tensor) -> Tensor:  # → [batch, heads, length, width of a head]
        t = t.transpose(0, first)
        return t.reshape(*t.shape[:2], layer.num_heads, layer.head_dim).transpose(1, 2)

    q, k, v = (heads(t) for t in projected)
    mask = _mask(key_padding_mask, attn_mask, q)
    weights = _weights(q, k, mask) if need_weights else None
    if weights is None or torch.compiler.is_exporting():  # one that nobody asks for is left out
        mixed = F.scaled_dot_product_attention(q, k, v, mask)
    else:
        mixed = weights @ v
    out: Tensor = layer.out_proj(mixed.transpose(1, 2).flatten(2).transpose(0, first))
    return out, weights if weights is None or not average_attn_weights else weights.mean(1)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1)


def _mask(padding: Tensor | None, attention: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one for scores [batch, heads, queries, keys]: bool, True for what is seen,
    where both are of truth values (there True hides), else numbers to add.
    """
    masks = []
    if padding is not None:
        masks.append(padding[:, None, None, :])
    if attention is not None:
        many = attention.dim() == 3  # one for each head of each sample
        masks.append(attention.reshape(*q.shape[:2], *attention.shape[1:]) if many else attention)
    if masks and all(m.dtype is torch.bool for m in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    added = None
    for mask in masks:
        if mask.dtype is torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        added = mask if added is None else added + mask
    return added
