"""hashed_matmul: products with weights that a hash draws from a few buckets.

    y[..., o] = Σ_i x[..., i] · W[o, i],   W[o, i] = ± buckets[(start + place) mod n]

Only the buckets and a seed are kept; W is made anew, a tile at a time, whenever it is used. In
runs of 4, 16 or 64 columns (ROBE, Desai et al. 2022; ROAST, Desai et al. 2023) each run has a
hashed start and lies side by side in the buckets. Single weights (run = 1; HashedNets, Chen et
al. 2015) differ from the paper: sixteen columns share a hashed start, and each weight chooses
between the four places start + i % 16 + 16·(0 … 3) by two hashed bits of its own. A lookup of its
own for every weight costs a processor two to three times what a dense W does at one sample; this
way sixteen are four vectors and three selections. As a hash it is no worse: every weight is drawn
from all n with equal chance (places wrap around at the end), two weights of different starts meet
with chance 1 / n, and two of one start never do. Signs are hashed weight by weight, in runs too.

The hash is defined by `reference.hash_map`; csrc/hashed/hashed.h says the same in C++.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from taut.kernels import native, reference

HASH = reference.HASH
RUNS = (1, 4, 16, 64)


def hashed_matmul(x: Tensor, buckets: Tensor, out: int, seed: int, run: int = 1) -> Tensor:
    """x [..., in] → [..., out].

    buckets: [n] float32; seed: in [0, 2**32); run: one of RUNS. Where a gradient is asked, W is
    made as a whole, by `hashed_weight`.
    """
    columns = x.shape[-1]
    if not _native(buckets) or not native.runs(x, buckets):
        return torch.nn.functional.linear(
            x, hashed_weight(buckets, (out, columns), seed, run).to(x.dtype)
        )
    flat = x.reshape(math.prod(x.shape[:-1]), columns).float().contiguous()
    y: Tensor = torch.ops.taut.hashed_matmul(flat, buckets.contiguous(), out, seed, run)
    return y.reshape(*x.shape[:-1], out).to(x.dtype)


def hashed_weight(buckets: Tensor, shape: tuple[int, int], seed: int, run: int = 1) -> Tensor:
    """W, [out, in] of the buckets' type. Its gradient goes to the buckets, as often as wished."""
    if not _native(buckets):
        return reference.hashed_weight(buckets, shape, seed, run)
    dense: Tensor = torch.ops.taut.hashed_weight(buckets.contiguous(), *shape, seed, run)
    return dense


def _native(buckets: Tensor) -> bool:
    return native.LOADED and buckets.dtype == torch.float32 and buckets.device.type == "cpu"


# ---- shapes for torch.compile and torch.export; gradients of the gradient's own, both linear ----


@native.fake("hashed_matmul")
def _(x: Tensor, buckets: Tensor, out: int, seed: int, run: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


@native.fake("hashed_weight")
def _(buckets: Tensor, out: int, columns: int, seed: int, run: int) -> Tensor:
    return buckets.new_empty(out, columns)


@native.fake("hashed_gradient")
def _(weight: Tensor, buckets: int, seed: int, run: int) -> Tensor:
    return weight.new_empty(buckets)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    buckets, _, _, ctx.seed, ctx.run = inputs
    ctx.buckets = len(buckets)


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    given = torch.ops.taut.hashed_gradient(gradient.contiguous(), ctx.buckets, ctx.seed, ctx.run)
    return given, None, None, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, ctx.seed, ctx.run = inputs
    ctx.shape = weight.shape


def _gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    given = torch.ops.taut.hashed_weight(gradient.contiguous(), *ctx.shape, ctx.seed, ctx.run)
    return given, None, None, None


if native.LOADED:
    torch.library.register_autograd(
        "taut::hashed_weight", _weight_backward, setup_context=_keep_weight
    )
    torch.library.register_autograd(
        "taut::hashed_gradient", _gradient_backward, setup_context=_keep_gradient
    )
