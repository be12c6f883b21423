"""What the layers of a network see, kept from its last forward: outputs, and attention's parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.errors import RecipeError

BARRED = -1e9
"""Added to the scores of keys that attention must not see; -inf would make NaN of 0 · inf."""


@dataclass
class Attention:
    """An nn.MultiheadAttention's queries, keys and values, [n, steps, width], before its heads.

    mask: added to the scores, broadcast to [n, heads, steps, steps]. keep: bool, [n, steps], false
    for padding. None where there is none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    mask: Tensor | None
    keep: Tensor | None


class Watched:
    """Hooks on layers of a network. seen: by name, what each gave (or attended) last.

    attentions: keep the parts of nn.MultiheadAttention layers instead of their outputs.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], attentions: bool) -> None:
        self.seen: dict[str, Tensor | Attention] = {}
        self.handles = [
            self._hook(model.get_submodule(name), name, attentions) for name in sorted(names)
        ]

    def _hook(self, module: nn.Module, name: str, attentions: bool) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if attentions and isinstance(module, nn.MultiheadAttention):
                self.seen[name] = _attention(module, *args, **kwargs)
                return
            first = output[0] if isinstance(output, tuple | list) and output else output
            if not isinstance(first, Tensor):
                raise RecipeError(
                    f"distillation: layer {name!r} gives a {type(first).__name__}, and only "
                    "tensors can be matched; name a layer inside it"
                )
            self.seen[name] = first

        return module.register_forward_hook(after, with_kwargs=True)

    def look(self, name: str, whose: str) -> Tensor | Attention:
        """What a layer gave. Raises RecipeError where the network never ran it."""
        if name not in self.seen:
            raise RecipeError(
                f"distillation: {whose} does not run its layer {name!r} (it may be there for "
                "another mode, or its weights be used without it); name another"
            )
        return self.seen[name]

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.seen = {}


@contextmanager
def plain_attention() -> Iterator[None]:
    """Transformers run layer by layer: PyTorch's fused path for inference passes hooks by."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _attention(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True,
    attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> Attention:  # fmt: skip
    given = [query, key, value]
    if query.dim() == 2:
        given = [x.unsqueeze(0) for x in given]
    elif not module.batch_first:
        given = [x.transpose(0, 1) for x in given]
    weights = (
        (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if module.in_proj_weight is None
        else module.in_proj_weight.chunk(3)
    )
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True))
    mask, keep = None, None
    if attn_mask is not None:
        mask = _added(attn_mask, q)
        if mask.dim() == 3:
            mask = mask.view(-1, module.num_heads, *mask.shape[1:])
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, q).reshape(len(q), -1)
        keep = padding > BARRED / 10 if padding.shape == q.shape[:2] else None
        mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
    return Attention(q.float(), k.float(), v.float(), module.num_heads, mask, keep)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add to the scores; true in a bool mask bars."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=like.device).masked_fill(mask, BARRED)
    return mask.float().clamp(min=BARRED)
