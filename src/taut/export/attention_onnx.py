"""Attention in ONNX: two products and a softmax with nothing between that engines do not fuse.

    softmax(q · kᵀ · scale + mask) · v

A row that may look nowhere gives zeros, as in PyTorch; it is set so after the second product, for a
softmax followed by tests of its numbers is no attention to an engine. Masks that the code makes
itself, as causal ones, leave no such row.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from onnxscript import ir, opset21

_NOWHERE = {ir.DataType.FLOAT16: -3e4}
"""Finite, and lost beside nothing that a softmax can tell; elsewhere than in float16 -1e30."""


def attention_as_onnx(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """What `aten::scaled_dot_product_attention` is in ONNX, of [..., heads, length, width].

    Dropout is none: what is exported is in eval mode.
    """
    op, kind = cast(Any, opset21), query.dtype
    zero, nowhere = (_number(op, n, kind) for n in (0.0, _NOWHERE.get(kind, -1e30)))
    axes, looks = list(range(len(key.shape))), None
    if enable_gqa:
        key, value = (_repeated(op, each, query.shape[-3]) for each in (key, value))
    turned = op.Transpose(key, perm=[*axes[:-2], axes[-1], axes[-2]])
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = op.MatMul(op.Mul(query, _number(op, scale, kind)), turned)
    if is_causal:
        scores = op.Add(scores, op.Where(_seen(op, query, key), zero, nowhere))
    elif attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        scores = op.Add(scores, op.Where(attn_mask, zero, nowhere))
        looks = op.Cast(attn_mask, to=kind.value)
    elif attn_mask is not None:
        scores = op.Add(scores, op.Max(attn_mask, nowhere))
        looks = op.Cast(op.GreaterOrEqual(attn_mask, _number(op, kind.min, kind)), to=kind.value)
    mixed = op.MatMul(op.Softmax(scores, axis=-1), value)
    if looks is None:
        return mixed
    return op.Mul(mixed, op.ReduceMax(looks, _integers(op, -1)))


def _seen(op: Any, query: Any, key: Any) -> Any:
    """[length of query, length of key] bool: what does not come later."""
    ends = [op.Shape(x, start=-2, end=-1) for x in (query, key)]
    ones = op.Expand(_number(op, 1.0, query.dtype), op.Concat(*ends, axis=0))
    return op.Cast(op.Trilu(ones, upper=0), to=ir.DataType.BOOL.value)


def _repeated(op: Any, value: Any, heads: int) -> Any:
    """Each head of [..., heads, length, width] as often as several queries share it."""
    before, width = value.shape[-3], value.shape[-1]
    if before == heads:
        return value
    several = op.Expand(op.Unsqueeze(value, _integers(op, -3)),
                        _integers(op, heads // before, 1, 1))  # fmt: skip
    kept = [0] * (len(value.shape) - 3)
    return op.Reshape(several, _integers(op, *kept, heads, -1, width))


def _number(op: Any, value: float, kind: ir.DataType) -> Any:
    return op.Constant(value=ir.tensor(np.asarray(value, kind.numpy()), dtype=kind))


def _integers(op: Any, *numbers: int) -> Any:
    return op.Constant(value=ir.tensor(np.array(numbers, np.int64)))
