"""Self-attention step by step: the keys and values of the steps before are kept, not made anew.

    out[t] = softmax(q[t] · k[:t + 1]ᵀ / sqrt(d)) · v[:t + 1],    k = [kept keys; new ones]

for each head, d its width. A generation loop then does the work of one step at each step, in a
packed layer by its packed products.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.attention import attended

Cache = tuple[Tensor, Tensor]
"""Keys and values, [batch, steps, width] each."""


def attend(layer: nn.Module, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """Causal self-attention of some new steps, and the cache with their keys and values added.

    layer: plain, with forms, or packed, batch_first; where drop_blocks left something else in its
    place, that runs, and the cache only counts the steps, [batch, steps, 0]. x: [batch, steps,
    width], its input at the steps that the cache does not have. What comes out is what the layer
    gives in eval mode for all steps under a causal mask, at the new ones.

    >>> layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(1, 5, 8)
    >>> first, cache = attend(layer, x[:, :3])
    >>> rest, cache = attend(layer, x[:, 3:], cache)
    >>> later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    >>> whole, _ = layer(x, x, x, attn_mask=later)
    >>> torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    """
    if not isinstance(layer, nn.MultiheadAttention):
        found = layer(x)
        return found[0] if isinstance(found, tuple) else found, counted(x, cache)
    if not layer.batch_first or layer.add_zero_attn or layer.bias_k is not None:
        raise ValueError(
            "attend takes an attention with batch_first=True, add_zero_attn=False and "
            f"add_bias_kv=False, got batch_first={layer.batch_first}, add_zero_attn="
            f"{layer.add_zero_attn} and add_bias_kv={layer.bias_k is not None}; run it whole"
        )
    query, *new = _projected(layer, x)
    keys, values = new if cache is None else map(torch.cat, zip(cache, new, strict=True), (1, 1))
    steps, length = query.shape[1], keys.shape[1]
    hidden = None if steps == 1 else _later(steps, length, x.device)
    return attended(layer, (query, keys, values), attn_mask=hidden)[0], (keys, values)


def counted(x: Tensor, cache: Cache | None = None) -> Cache:
    """A cache that holds nothing of x, [batch, steps, width], but how many steps there were."""
    nothing = x[..., :0]
    return (nothing, nothing) if cache is None else (torch.cat([cache[0], nothing], 1),) * 2


def _projected(layer: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of x."""
    y = _product(layer, "in_proj_weight", x)
    return (y if layer.in_proj_bias is None else y + layer.in_proj_bias).chunk(3, -1)


def _product(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    """x [..., in] → [..., out]; by the packed weight's own product where the layer runs packed."""
    if getattr(layer, "runs_dense", True):
        return F.linear(x, getattr(layer, name))
    return cast(Tensor, cast(Any, layer).product(name, x))


def _later(steps: int, length: int, device: torch.device) -> Tensor:
    """[steps, length] bool: which keys each new step may not see, the last ones being its own."""
    return torch.ones(steps, length, dtype=torch.bool, device=device).triu(length - steps + 1)
