"""Where to clip numbers that are to become whole steps: min-max, percentile, MSE, entropy.

    x' = step · (n − zero),    n = round(x / step) + zero, clipped to [0, levels)

Each rule looks at groups of numbers, [groups, n], and clips each to a range [low, high]:

    minmax      all of them
    percentile  all but `TAIL` of them, the largest magnitudes
    mse         the share of min-max whose mean squared error is least
    entropy     |x| <= t, with t of the least Kullback-Leibler divergence between the histogram of
                what is clipped and its rounding to as many levels (Migacz: 8-bit inference with
                TensorRT, GTC 2017; there for activations of 8 bits). It wants many numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RULES = ("minmax", "percentile", "mse", "entropy")
TAIL = 0.001
_SHARES = 80  # of min-max, that mse tries
_BINS, _THRESHOLDS = 1024, 64

Grid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Ranges, low and high [groups], → step and zero, [groups]."""


def symmetric_grid(levels: int, dtype: torch.dtype = torch.bfloat16) -> Grid:
    """Zero in the middle, at levels // 2; one level more below it than above."""
    above, below = levels - levels // 2 - 1, levels // 2

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        step = _kept(torch.maximum(high / max(above, 1), -low / below), dtype)
        return step, torch.full_like(step, below)

    return grid


def positive_grid(levels: int, dtype: torch.dtype = torch.bfloat16) -> Grid:
    """Zero at the lower end: nothing below it."""

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        step = _kept(high / (levels - 1), dtype)
        return step, torch.zeros_like(step)

    return grid


def affine_grid(levels: int, dtype: torch.dtype = torch.bfloat16) -> Grid:
    """Zero wherever the range has it: a whole number of steps above its lower end."""

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = _kept((high - low) / (levels - 1), dtype)
        return step, (-low / step).round().clamp(0, levels - 1)

    return grid


def _kept(step: Tensor, dtype: torch.dtype) -> Tensor:
    """The step as it will be stored; 1 where all is zero."""
    step = step.to(dtype).float()
    return torch.where(step > 0, step, 1.0)


def whole(x: Tensor, step: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The numbers n, of x's shape, as floats. step, zero: scalars, or such that they broadcast."""
    return ((x / step).round() + zero).clamp(0, levels - 1)


def fit_steps(x: Tensor, levels: int, rule: str, grid: Grid) -> tuple[Tensor, Tensor]:
    """The step and the zero of each group of numbers. x: [groups, n], finite → [groups] twice."""
    if x.shape[1] == 0:
        return grid(x.new_zeros(len(x)), x.new_zeros(len(x)))
    x = x.float()
    low, high = x.amin(1), x.amax(1)
    if rule == "mse":
        return _least_error(x, levels, low, high, grid)
    if rule == "percentile":
        ranked = x.sort(1).values
        cut = int(TAIL / 2 * x.shape[1])
        low, high = ranked[:, cut], ranked[:, -1 - cut]
    elif rule == "entropy":
        symmetric = bool((low < 0).any())
        top = _least_divergence(x.abs(), max(2, levels // 2 if symmetric else levels))
        low, high = torch.maximum(low, -top), torch.minimum(high, top)
    return grid(low, high)


def _least_error(
    x: Tensor, levels: int, low: Tensor, high: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    best, (step, zero) = x.new_full((len(x),), torch.inf), grid(low, high)
    for share in torch.linspace(1, 1 / _SHARES, _SHARES).tolist():
        s, z = grid(share * low, share * high)
        rounded = (whole(x, s[:, None], z[:, None], levels) - z[:, None]) * s[:, None]
        error = (rounded - x).square().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        step, zero = torch.where(better, s, step), torch.where(better, z, zero)
    return step, zero


def _least_divergence(size: Tensor, levels: int) -> Tensor:
    """The threshold of each group of magnitudes, [groups]."""
    top = size.amax(1, keepdim=True)
    bins = (size / top.clamp(min=1e-30) * _BINS).long().clamp(max=_BINS - 1)
    counts = size.new_zeros(len(size), _BINS, dtype=torch.float64)
    counts.scatter_add_(1, bins, torch.ones_like(size, dtype=torch.float64))
    best, threshold = size.new_full((len(size),), torch.inf, dtype=torch.float64), top[:, 0].clone()
    first = min(max(levels, _BINS // _THRESHOLDS), _BINS)
    for kept in sorted({round(k) for k in torch.linspace(first, _BINS, _THRESHOLDS).tolist()}):
        divergence = _divergence(counts, kept, levels)
        better = divergence <= best  # of equals the wider
        best = torch.where(better, divergence, best)
        threshold = torch.where(better, top[:, 0] * (kept / _BINS), threshold)
    return threshold


def _divergence(counts: Tensor, kept: int, levels: int) -> Tensor:
    """KL of the first `kept` bins, what lies beyond them in the last, from these in `levels`."""
    inside = counts[:, :kept]
    clipped = inside.clone()
    clipped[:, -1] += counts[:, kept:].sum(1)
    level = (torch.arange(kept, device=counts.device) * levels // kept).expand_as(inside)
    empty = counts.new_zeros(len(counts), levels)
    mass = empty.scatter_add(1, level, inside)
    filled = empty.scatter_add(1, level, (inside > 0).double())
    rounded = (mass / filled.clamp(min=1)).gather(1, level) * (inside > 0)
    p = clipped / clipped.sum(1, keepdim=True)
    q = rounded / rounded.sum(1, keepdim=True).clamp(min=1e-300)
    ratio = torch.where(p > 0, p / q.clamp(min=1e-12), 1.0)
    return (p * ratio.log()).sum(1)
