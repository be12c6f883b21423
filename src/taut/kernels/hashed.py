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

from typing import Any

import torch
from torch import Tensor

from taut.kernels import native, reference

HASH = reference.HASH
RUNS = (1, 4, 16, 64)
REACH = 63
"""How far behind its start a weight may lie."""


def wrap_buckets(buckets: Tensor) -> Tensor:
    """[n] → [n + REACH]: the first buckets once more behind the last, again and again if few.

    The kernels read runs across the end as they stand, and a copy for every call would cost more
    than a small product: keep the wrapped ones, and pass them with wrapped=True.
    """
    if buckets.dim() != 1 or not len(buckets):
        raise ValueError(f"wrap_buckets: buckets must be [n], n > 0, got {list(buckets.shape)}")
    first = buckets[:REACH]
    return torch.cat((buckets, first.repeat(-(-REACH // len(first)))[:REACH]))


def hashed_matmul(
    x: Tensor, buckets: Tensor, out: int, seed: int, run: int = 1, *, wrapped: bool = False
) -> Tensor:
    """x [..., in] → [..., out].

    buckets: [n] float32, or [n + REACH] of `wrap_buckets` where `wrapped`; seed: in [0, 2**32);
    run: one of RUNS. Where a gradient is asked, W is made as a whole, by `hashed_weight`.
    """
    columns = x.shape[-1]
    if not _native(buckets) or not native.runs(x, buckets):
        weight = hashed_weight(buckets, (out, columns), seed, run, wrapped=wrapped)
        return torch.nn.functional.linear(x, weight.to(x.dtype))
    flat = native.floats_of(x)
    drawn = _wrapped(buckets, wrapped)
    y: Tensor = torch.ops.taut.hashed_matmul(flat, *drawn, out, seed, run)
    return native.shaped_as(x, y)


def hashed_weight(
    buckets: Tensor, shape: tuple[int, int], seed: int, run: int = 1, *, wrapped: bool = False
) -> Tensor:
    """W, [out, in] of the buckets' type. Its gradient goes to the buckets, as often as wished.

    buckets, seed, run: as in `hashed_matmul`. Where they are wrapped, the copies get no gradient.
    """
    if not _native(buckets):
        plain = buckets[: max(len(buckets) - REACH, 0)] if wrapped else buckets
        return reference.hashed_weight(plain, shape, seed, run)
    dense: Tensor = torch.ops.taut.hashed_weight(*_wrapped(buckets, wrapped), *shape, seed, run)
    return dense


def hashed_rows(buckets: Tensor, rows: Tensor, columns: int, seed: int, run: int = 1) -> Tensor:
    """Some rows of W, [*rows.shape, columns], in plain PyTorch, as an embedding picks them.

    buckets: [n]; rows: integers, from 0 up; seed, run: as in `hashed_matmul`.
    """
    picked, where = torch.unique(rows.flatten(), return_inverse=True)
    shape = len(picked), columns
    index, minus = reference.hash_map(shape, len(buckets), seed, run, buckets.device, picked)
    drawn = torch.where(minus, -buckets[index], buckets[index])
    return drawn[where].reshape(*rows.shape, columns)


def _wrapped(buckets: Tensor, already: bool) -> tuple[Tensor, int]:
    """The wrapped buckets, and how many there are without the copies."""
    wrapped = buckets.contiguous() if already else wrap_buckets(buckets)
    return wrapped, len(wrapped) - REACH


def _native(buckets: Tensor) -> bool:
    return native.LOADED and buckets.dtype == torch.float32 and buckets.device.type == "cpu"


# ---- shapes for torch.compile and torch.export; gradients of the gradient's own, both linear ----


@native.fake("hashed_matmul")
def _(x: Tensor, buckets: Tensor, count: int, out: int, seed: int, run: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


@native.fake("hashed_weight")
def _(buckets: Tensor, count: int, out: int, columns: int, seed: int, run: int) -> Tensor:
    return buckets.new_empty(out, columns)


@native.fake("hashed_gradient")
def _(weight: Tensor, count: int, seed: int, run: int) -> Tensor:
    return weight.new_empty(count)


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.count, _, _, ctx.seed, ctx.run = inputs


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    given = torch.ops.taut.hashed_gradient(gradient.contiguous(), ctx.count, ctx.seed, ctx.run)
    # All of it goes to the buckets themselves, of which the others are copies.
    return torch.nn.functional.pad(given, (0, REACH)), None, None, None, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, _, ctx.seed, ctx.run = inputs
    ctx.shape = weight.shape


def _gradient_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    drawn = _wrapped(gradient, False)
    given = torch.ops.taut.hashed_weight(*drawn, *ctx.shape, ctx.seed, ctx.run)
    return given, None, None, None


if native.LOADED:
    torch.library.register_autograd(
        "taut::hashed_weight", _weight_backward, setup_context=_keep_weight
    )
    torch.library.register_autograd(
        "taut::hashed_gradient", _gradient_backward, setup_context=_keep_gradient
    )
