"""Decompositions: the few small convolutions in a row that come near a large one.

A weight W [out, in, *kernel] becomes parts, each the weight of a convolution of its own,

    channel   [r, in, *kernel], [out, r, 1, …]                           r filters, then a mix
    spatial   [r, in, n, 1], [out, r, 1, n]                              down, then across
    tucker    [s, in, 1, …], [r, s, *kernel], [out, r, 1, …]             on fewer channels
    cp        [r, in, 1, …], [r, 1, n, 1], [r, 1, 1, n], [out, r, 1, …]  channel by channel

A Linear layer's weight, which has no kernel, goes by `channel`. With `root` (R of ranks.py) the
parts come near what the convolution gives on the data: the search for them sees the inputs'
moments, pooled over those places of the kernel that a part does not span, and the last part is
then the exact least-squares one for all the moments.

channel: Denton, Zaremba, Bruna, LeCun, Fergus (NeurIPS 2014); Zhang, Zou, He, Sun (TPAMI 2016),
whose data are the responses, where ours are the inputs. spatial: Jaderberg, Vedaldi, Zisserman
(BMVC 2014), their second scheme, by singular values rather than gradients. tucker: Kim, Park, Yoo,
Choi, Yang, Shin (ICLR 2016), with higher-order orthogonal iterations. cp: Lebedev, Ganin, Rakhuba,
Oseledets, Lempitsky (ICLR 2015), by alternating least squares in place of their non-linear ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.ranks import Matrix, rank_of_energy, rank_of_signal, refitted, unweighed, weighed

KINDS = ("channel", "spatial", "tucker", "cp")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One of the convolutions: its channels, the dimensions of the kernel that it spans, groups."""

    inputs: int
    outputs: int
    axes: tuple[int, ...]
    groups: int = 1

    def shape(self, kernel: Shape) -> Shape:
        """Of its weight, for this whole kernel."""
        sides = (n if d in self.axes else 1 for d, n in enumerate(kernel))
        return self.outputs, self.inputs // self.groups, *sides


def parts(kind: str, shape: Shape, ranks: Sequence[int]) -> tuple[Part, ...]:
    """The convolutions that a weight of this shape becomes. tucker has the ranks s, r; others r."""
    out, inputs, every = shape[0], shape[1], tuple(range(len(shape) - 2))
    r = ranks[-1]
    if kind == "channel":
        return Part(inputs, r, every), Part(r, out, ())
    if kind == "spatial":
        return Part(inputs, r, every[:1]), Part(r, out, every[1:])
    if kind == "tucker":
        return Part(inputs, ranks[0], ()), Part(ranks[0], r, every), Part(r, out, ())
    middle = (Part(r, r, (d,), groups=r) for d in every)
    return Part(inputs, r, ()), *middle, Part(r, out, ())


def count(kind: str, shape: Shape, ranks: Sequence[int]) -> int:
    """The numbers that the parts have."""
    return sum(math.prod(p.shape(shape[2:])) for p in parts(kind, shape, ranks))


def limits(kind: str, shape: Shape) -> tuple[int, ...]:
    """The largest ranks that mean anything."""
    out, inputs, window = shape[0], shape[1], math.prod(shape[2:])
    if kind == "channel":
        return (min(out, inputs * window),)
    if kind == "spatial":
        first = math.prod(shape[2:3])
        return (min(inputs * first, out * window // first),)
    if kind == "tucker":
        return min(inputs, out * window), min(out, inputs * window)
    sides = shape[0], shape[1], *shape[2:]
    return (math.prod(sides) // max(sides),)


def decomposed(
    kind: str, weight: Tensor, ranks: Sequence[int], root: Tensor | None = None,
    felt: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The weights of the parts, float64. root: of the weight's columns, [in · kernel] squared.

    felt: L, [out, out], by which errors of the outputs count: the least ‖Lᵀ (W − parts) R‖.
    """
    weight = weight.detach().cpu().double()
    ranks = [min(r, most) for r, most in zip(ranks, limits(kind, tuple(weight.shape)), strict=True)]
    makers = {"channel": _channel, "spatial": _spatial, "tucker": _tucker, "cp": _cp}
    if felt is None:
        return makers[kind](weight, ranks, root)
    *others, last = makers[kind](torch.einsum("po,p...->o...", felt, weight), ranks, root)
    return [*others, torch.linalg.solve(felt.T, last.flatten(1)).reshape(last.shape)]


def composed(kind: str, weights: Sequence[Tensor]) -> Tensor:
    """The one weight that the parts amount to, [out, in, *kernel]."""
    first, last = weights[0], weights[-1]
    if kind == "spatial":
        across = torch.einsum("rin,orm->oinm", first.flatten(2), last.flatten(2))
        return across.reshape(*across.shape[:2], first.shape[2], *weights[-1].shape[3:])
    if kind == "cp":
        sides = [w.flatten(1).T for w in weights[1:-1]]
        return _joined([last.flatten(1), first.flatten(1).T, *sides])
    if kind == "tucker":
        first = torch.einsum("rs...,si->ri...", weights[1], first.flatten(1))
    return torch.einsum("or,r...->o...", last.flatten(1), first)


# ---- ranks ----------------------------------------------------------------------------------


def ranks_of(
    kind: str, weight: Tensor, rule: str, energy: float, ratio: float, root: Tensor | None = None
) -> list[int]:
    """Ranks by a rule of `ranks.RULES`; of cp, by no vbmf. [] where none keeps to it.

    tucker keeps the energy in each of its two unfoldings, and by ratio the same share of both
    channels; cp tries ranks out until one keeps the energy.
    """
    weight = weight.detach().cpu().double()
    shape = tuple(weight.shape)
    if rule == "ratio":
        return _within(kind, shape, ratio * weight.numel())
    if rule == "energy" and kind == "cp":
        return _enough(weight, energy, root)
    seen = _unfoldings(kind, weight, root if rule == "energy" else None)
    if rule == "energy":
        return [rank_of_energy(torch.linalg.svdvals(m), energy) for m in seen]
    ranks = [rank_of_signal(torch.linalg.svdvals(m), (m.shape[0], m.shape[1])) for m in seen]
    return ranks if all(ranks) else []


def _within(kind: str, shape: Shape, numbers: float) -> list[int]:
    """The largest ranks, in proportion to their limits, of so many numbers."""
    most = limits(kind, shape)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        fits = count(kind, shape, _share(most, middle)) <= numbers
        low, high = (middle, high) if fits else (low, middle)
    found = _share(most, low)
    return found if count(kind, shape, found) <= numbers else []


def _share(most: Shape, part: float) -> list[int]:
    return [max(1, int(part * n + 1e-9)) for n in most]


def _enough(weight: Tensor, energy: float, root: Tensor | None) -> list[int]:
    """The least rank of cp that keeps this share of the energy, by halving; [] where none does.

    Ranks that would take as many numbers as the weight are not tried.
    """
    shape = tuple(weight.shape)
    most = _within("cp", shape, weight.numel() - 1)
    if not most:
        return []
    seen = weight if root is None else _over_channels(weight, _pooled(root, shape[1]))
    allowed = (1 - energy) * float(seen.square().sum())

    def fits(rank: int) -> bool:
        return float((_joined(_als(seen, rank)) - seen).square().sum()) <= allowed

    low, high = 1, most[0]
    if not fits(high):
        return []
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return [low]


def losses(
    kind: str, weight: Tensor, root: Tensor | None = None
) -> Iterator[tuple[list[int], float]]:
    """Ranks of fewer numbers than the weight has, and the share of the energy that each loses.

    The energy is ‖W R‖², of the outputs on the data. For channel all ranks, and what they lose; for
    spatial all ranks, with the moments pooled; for tucker those that keep like shares of both
    unfoldings, and at most what both lose together; for cp eight, tried out.
    """
    weight = weight.detach().cpu().double()
    shape = tuple(weight.shape)
    if kind == "cp":
        yield from _tried(weight, root)
        return
    squares = [torch.linalg.svdvals(m).square() for m in _unfoldings(kind, weight, root)]
    if not all(float(s.sum()) > 0 for s in squares):  # nothing to lose
        squares = [torch.ones(1, dtype=torch.float64) for _ in squares]
    kept = [s.cumsum(0) / s.sum() for s in squares]
    for share in sorted(set(torch.cat(kept).tolist())):
        ranks = [min(int((k < share).sum()) + 1, len(k)) for k in kept]
        if count(kind, shape, ranks) < weight.numel():
            gone = (float(1 - k[r - 1]) for k, r in zip(kept, ranks, strict=True))
            yield ranks, max(round(sum(gone), 12), 0.0)  # less is rounding of the weights


def _tried(weight: Tensor, root: Tensor | None) -> Iterator[tuple[list[int], float]]:
    """Eight ranks of cp, evenly spread over those of fewer numbers, and what they lose."""
    shape = tuple(weight.shape)
    most = _within("cp", shape, weight.numel() - 1)
    seen = weight if root is None else _over_channels(weight, _pooled(root, shape[1]))
    for rank in sorted({max(1, n * most[0] // 8) for n in range(1, 9)} if most else ()):
        lost = (_joined(_als(seen, rank)) - seen).square().sum()
        yield [rank], float(lost / seen.square().sum().clamp(min=1e-300))


def _unfoldings(kind: str, weight: Tensor, root: Tensor | None) -> list[Tensor]:
    """The matrices whose singular values tell the ranks."""
    if kind == "channel":
        return [weighed(weight.flatten(1), root)]
    if kind == "spatial":
        return [_spread(weight, root)]
    seen = weight if root is None else _over_channels(weight, _pooled(root, weight.shape[1]))
    return [seen.transpose(0, 1).flatten(1), seen.flatten(1)]


# ---- the four -------------------------------------------------------------------------------


def _channel(weight: Tensor, ranks: list[int], root: Tensor | None) -> list[Tensor]:
    last, first = Matrix(weight.flatten(1), root).factors(ranks[0])
    return [first.reshape(-1, *weight.shape[1:]), _pointwise(last, weight)]


def _spatial(weight: Tensor, ranks: list[int], root: Tensor | None) -> list[Tensor]:
    out, inputs, tall = weight.shape[:3]
    wide = math.prod(weight.shape[3:])
    down = None if root is None else _pooled(root, inputs * tall)
    across, first = Matrix(_spread(weight, None).T, down).factors(ranks[0])
    last = across.reshape(out, wide, ranks[0]).transpose(1, 2)  # [out, r, wide]
    if root is not None:
        basis = torch.einsum("ri,xy->rxiy", first, torch.eye(wide, dtype=first.dtype))
        last = refitted(weight.flatten(1), basis.reshape(ranks[0] * wide, -1), root)
    first = first.reshape(ranks[0], inputs, tall, *[1] * (weight.dim() - 3))
    return [first, last.reshape(out, ranks[0], *[1] * min(1, weight.dim() - 2), *weight.shape[3:])]


def _spread(weight: Tensor, root: Tensor | None) -> Tensor:
    """[out, in, tall, wide] as a matrix [in · tall, out · wide], as the data see its rows."""
    matrix = weight.movedim(0, 2).flatten(0, 1).flatten(1)
    return matrix if root is None else _pooled(root, len(matrix)).T @ matrix


def _tucker(weight: Tensor, ranks: list[int], root: Tensor | None) -> list[Tensor]:
    """Orthonormal bases of both channels, by turns the best for the other one."""
    pooled = None if root is None else _pooled(root, weight.shape[1])
    seen = weight if pooled is None else _over_channels(weight, pooled)
    s, r = ranks
    base_in = _leading(seen.transpose(0, 1).flatten(1), s)
    for _ in range(_ROUNDS):
        narrow = torch.einsum("oi...,is->os...", seen, base_in)
        base_out = _leading(narrow.flatten(1), r)
        narrow = torch.einsum("oi...,or->ri...", seen, base_out)
        base_in = _leading(narrow.transpose(0, 1).flatten(1), s)
    core = torch.einsum("ri...,is->rs...", narrow, base_in)
    first = base_in.T if pooled is None else unweighed(base_in.T, pooled)
    if root is not None:
        basis = torch.einsum("rs...,si->ri...", core, first)
        base_out = refitted(weight.flatten(1), basis.flatten(1), root)
    return [_pointwise(first, weight), core, _pointwise(base_out, weight)]


_ROUNDS = 10


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors, filled up with zeros where there are fewer."""
    vectors = torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    return torch.nn.functional.pad(vectors, (0, rank - vectors.shape[1]))


def _cp(weight: Tensor, ranks: list[int], root: Tensor | None) -> list[Tensor]:
    pooled = None if root is None else _pooled(root, weight.shape[1])
    seen = weight if pooled is None else _over_channels(weight, pooled)
    last, inputs, *sides = _als(seen, ranks[0])
    first = inputs.T if pooled is None else unweighed(inputs.T, pooled)
    if root is not None:
        whole = _joined([torch.eye(ranks[0], dtype=first.dtype), first.T, *sides])
        last = refitted(weight.flatten(1), whole.flatten(1), root)
    middle = [
        side.T.reshape(ranks[0], 1, *(-1 if e == d else 1 for e in range(len(sides))))
        for d, side in enumerate(sides)
    ]
    return [_pointwise(first, weight), *middle, _pointwise(last, weight)]


def _als(tensor: Tensor, rank: int, rounds: int = 200) -> list[Tensor]:
    """Factors [n, rank], one for each dimension, whose outer products add up to the tensor.

    Alternating least squares, started from the leading singular vectors of each unfolding; where
    those are fewer than the rank, from random ones, always the same.
    """
    random = torch.Generator().manual_seed(0)
    factors = []
    for d, n in enumerate(tensor.shape):
        start = torch.randn(n, rank, generator=random, dtype=tensor.dtype) / math.sqrt(n)
        vectors = torch.linalg.svd(tensor.movedim(d, 0).flatten(1), full_matrices=False)[0]
        known = min(rank, vectors.shape[1])
        start[:, :known] = vectors[:, :known]
        factors.append(start)
    total, before = float(tensor.square().sum()), math.inf
    for _ in range(rounds):
        for d in range(tensor.dim()):
            others = [f for e, f in enumerate(factors) if e != d]
            gram = torch.stack([f.T @ f for f in others]).prod(0)
            right = tensor.movedim(d, 0).flatten(1) @ _rows(others)
            steady = 1e-10 * gram.diagonal().mean().clamp(min=1e-300)
            gram = gram + steady * torch.eye(rank, dtype=tensor.dtype)
            factors[d] = torch.linalg.solve(gram, right.T).T
            if d < tensor.dim() - 1:
                factors[d] = factors[d] / factors[d].norm(dim=0).clamp(min=1e-300)
        error = float((_joined(factors) - tensor).square().sum())
        if before - error <= 1e-9 * total:
            break
        before = error
    size = torch.stack([f.norm(dim=0) for f in factors]).clamp(min=1e-300)
    each = size.log().mean(0).exp()  # of like magnitude
    return [f * (each / s) for f, s in zip(factors, size, strict=True)]


def _rows(factors: Sequence[Tensor]) -> Tensor:
    """The outer products of the factors' columns, each flattened: [Π n, rank]."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found[:, None] * factor[None]).flatten(0, 1)
    return found


def _joined(factors: Sequence[Tensor]) -> Tensor:
    """What the outer products add up to."""
    flat = factors[0] @ _rows(factors[1:]).T
    return flat.reshape(*(len(f) for f in factors))


# ---- moments --------------------------------------------------------------------------------


def _pooled(root: Tensor, size: int) -> Tensor:
    """The root of the moments of the first `size` of [size · places] inputs, over all places."""
    moments = torch.unflatten(torch.unflatten(root @ root.T, 1, (size, -1)), 0, (size, -1))
    found: Tensor = torch.linalg.cholesky(torch.einsum("ikjk->ij", moments))
    return found


def _over_channels(weight: Tensor, root: Tensor) -> Tensor:
    """W [out, in, …] R over the channels of its input."""
    return torch.einsum("oi...,ij->oj...", weight, root)


def _pointwise(matrix: Tensor, weight: Tensor) -> Tensor:
    return matrix.reshape(*matrix.shape, *[1] * (weight.dim() - 2))
