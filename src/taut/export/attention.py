"""Multi-head attention for engines: one projection, heads by batches, one scaled dot product."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from taut.attention import attended, is_usual


def as_products(network: nn.Module) -> None:
    """Let every nn.MultiheadAttention of a network run batch by batch, in place."""
    for module in network.modules():
        if type(module).forward is nn.MultiheadAttention.forward:
            module.forward = partial(_forward, cast(nn.MultiheadAttention, module))


def _forward(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    if not is_usual(layer, query) or (is_causal and attn_mask is None):
        return type(layer).forward(
            layer, query, key, value, key_padding_mask, need_weights, attn_mask,
            average_attn_weights, is_causal,
        )  # fmt: skip
    if query is key and key is value and layer.in_proj_weight is not None:
        projected = F.linear(query, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    else:
        projected = _projected(layer, query, key, value)
    return attended(
        layer, projected, key_padding_mask, attn_mask, need_weights, average_attn_weights
    )


def _projected(layer: nn.MultiheadAttention, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values that are made of different tensors."""
    joint, bias = layer.in_proj_weight, layer.in_proj_bias
    weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    each = zip(inputs, weights if joint is None else joint.chunk(3), biases, strict=True)
    return tuple(F.linear(x, weight, b) for x, weight, b in each)
