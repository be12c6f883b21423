"""Golden files of shared vectors, shared tables and structured weights: written, and meant.

The numbers that all golden files are made of are here too.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from taut.packed import PackedWeight, Plain
from taut.row_parts import RowParts
from taut.shared_weight import Mirrored, Scaled, SharedVectors
from taut.sparse_weight import SparseWeight
from taut.structured_weight import (
    BlockCirculant,
    BlockToeplitz,
    CirculantWeight,
    Kronecker,
    KroneckerWeight,
    ToeplitzWeight,
)
from taut.techniques.share_values import SharedValues
from taut.tied_weight import TiedWeight

TABLE = torch.tensor([-0.75, -0.125, 0.0, 0.25, 1.0])
HALF = Plain.of(TABLE[2:])


def numbers(*shape: int) -> Tensor:
    """Multiples of 1/16 in [-1, 1], which every precision holds exactly: a function of nothing."""
    i = torch.arange(torch.Size(shape).numel())
    return (((7 * i * i + 3 * i) % 33 - 16) / 16).reshape(shape)


def mask(*shape: int) -> Tensor:
    """About a third of the places, in rows and columns unlike each other."""
    i = torch.arange(torch.Size(shape).numel())
    return ((i * i + i // 20) % 7 < 2).reshape(shape)


def index(count: int) -> Tensor:
    i = torch.arange(count)
    return (i * i + 2) % 11 % 5


def vectors(*shape: int) -> PackedWeight:
    """Five vectors of four; the last of a row may stick out."""
    across = -(-math.prod(shape[1:]) // 4)
    which = index(shape[0] * across).reshape(shape[0], across)
    return SharedVectors(which, Plain.of(numbers(20)), 4, shape)


def mirrored(*shape: int) -> PackedWeight:
    which = index(torch.Size(shape).numel()).reshape(shape)
    return SharedValues(which, Mirrored(Plain.of(TABLE[2:])))


def shared_together(*shape: int) -> PackedWeight:
    """Two weights that have one table, of opposite values, the second at half its size."""
    which = index(torch.Size(shape).numel()).reshape(shape)
    return SharedValues(which, Scaled(Mirrored(HALF), 1.0 if len(shape) > 2 else 0.5))


def circulant(*shape: int) -> PackedWeight:
    structure = BlockCirculant(shape=shape, block=4)
    return CirculantWeight(structure, Plain.of(numbers(*structure.generators)))


def toeplitz(*shape: int) -> PackedWeight:
    structure = BlockToeplitz(shape=shape, block=3)
    return ToeplitzWeight(structure, Plain.of(numbers(*structure.generators)))


def kronecker(*shape: int) -> PackedWeight:
    structure = Kronecker(shape=shape, high=1, wide=2, terms=2)
    return KroneckerWeight(structure, Plain.of(numbers(*structure.generators)))


def tied(*shape: int) -> PackedWeight:
    """Three kernels of the convolution; two rows of the matrix, and multiples of them."""
    if len(shape) > 2:
        which = index(shape[0] * shape[1]).clamp(max=2).reshape(shape[:2])
        return TiedWeight(which, Plain.of(numbers(3, *shape[2:])), None)
    scale = Plain.of(numbers(shape[0]), "bfloat16")
    return TiedWeight(index(shape[0]).clamp(max=1), Plain.of(numbers(2, *shape[1:])), scale)


def row_parts(*shape: int) -> PackedWeight:
    """Rows of three kinds: of shared values, of single numbers, and mostly zeros."""
    kinds = torch.arange(shape[0]) * 2 % 3
    some = [int((kinds == k).sum()) for k in range(3)]
    which = index(some[0] * math.prod(shape[1:])).reshape(some[0], *shape[1:])
    kept = mask(some[2], *shape[1:])
    return RowParts(
        kinds,
        [
            SharedValues(which, Plain.of(TABLE)),
            Plain.of(numbers(some[1], *shape[1:])),
            SparseWeight(kept, Plain.of(numbers(int(kept.sum())))),
        ],
    )


def dense_row_parts(*shape: int) -> Tensor:
    """One row after another, as a person would."""
    kinds = [2 * i % 3 for i in range(shape[0])]
    counts = [kinds.count(k) for k in range(3)]
    numel = counts[0] * math.prod(shape[1:])
    kept = mask(counts[2], *shape[1:])
    sparse = torch.zeros(counts[2], *shape[1:])
    sparse[kept] = numbers(int(kept.sum()))
    parts = [
        TABLE[index(numel)].reshape(counts[0], *shape[1:]),
        numbers(counts[1], *shape[1:]),
        sparse,
    ]
    left = [iter(part) for part in parts]
    return torch.stack([next(left[k]) for k in kinds])


def dense_vectors(*shape: int) -> Tensor:
    """One entry after another, as a person would."""
    columns = math.prod(shape[1:])
    across = -(-columns // 4)
    which, out = index(shape[0] * across), torch.zeros(shape[0], columns)
    for i, j in itertools.product(range(shape[0]), range(columns)):
        out[i, j] = numbers(20)[4 * int(which[i * across + j // 4]) + j % 4]
    return out.reshape(shape)


def dense_mirrored(*shape: int) -> Tensor:
    signs = torch.tensor([0.0, 0.25, 1.0, -0.0, -0.25, -1.0])
    return signs[index(torch.Size(shape).numel())].reshape(shape)


def dense_shared_together(*shape: int) -> Tensor:
    return dense_mirrored(*shape) * (1 if len(shape) > 2 else 0.5)


def dense_blocks(shape: tuple[int, ...], b: int, diagonals: int) -> Tensor:
    """One entry after another: inputs are counted last; i - j chooses from each block's numbers."""
    out, window = torch.zeros(shape), math.prod(shape[2:])
    flat, (rows, inputs) = out.reshape(*shape[:2], window), shape[:2]
    across = -(-inputs * window // b)
    g = numbers(-(-rows // b), across, diagonals)
    for i, c, place in itertools.product(range(rows), range(inputs), range(window)):
        j = place * inputs + c
        offset = (i - j) % b if diagonals == b else i % b - j % b + b - 1
        flat[i, c, place] = g[i // b, j // b, offset]
    return out


def dense_kronecker(*shape: int) -> Tensor:
    """One entry after another: A is as high as the matrix and half as wide, B is one row of two."""
    out, window = torch.zeros(shape), math.prod(shape[2:])
    flat, (rows, inputs) = out.reshape(*shape[:2], window), shape[:2]
    half = inputs * window // 2
    g = numbers(2 * rows * half + 2 * 2)
    for i, c, place in itertools.product(range(rows), range(inputs), range(window)):
        j = place * inputs + c
        for t in range(2):
            a = g[(t * rows + i) * half + j // 2]
            flat[i, c, place] += a * g[2 * rows * half + 2 * t + j % 2]
    return out


def dense_tied(*shape: int) -> Tensor:
    """One row after another, as a person would."""
    if len(shape) > 2:
        picked = [numbers(3, *shape[2:])[min(n, 2)] for n in index(shape[0] * shape[1]).tolist()]
        return torch.stack(picked).reshape(shape)
    rows = [numbers(2, *shape[1:])[min(n, 1)] for n in index(shape[0]).tolist()]
    return torch.stack([r * s for r, s in zip(rows, numbers(shape[0]), strict=True)])


def table_of(scale: float, first: Any) -> list[Any]:
    """The node of indices into a scaled table of opposite values."""
    mirrored = ["mirrored.v1", {}, {"first": first}]
    table = ["scaled.v1", {"scale": scale}, {"first": mirrored}]
    return ["shared_values.v1", {"entries": 6}, {"table": table}]


WRITTEN = {
    "shared_vectors": vectors,
    "mirrored": mirrored,
    "shared_together": shared_together,
    "circulant": circulant,
    "toeplitz": toeplitz,
    "kronecker": kronecker,
    "tied": tied,
    "row_parts": row_parts,
}
MEANT = {
    "shared_vectors": dense_vectors,
    "mirrored": dense_mirrored,
    "shared_together": dense_shared_together,
    "circulant": lambda *shape: dense_blocks(shape, 4, 4),
    "toeplitz": lambda *shape: dense_blocks(shape, 3, 5),
    "kronecker": dense_kronecker,
    "tied": dense_tied,
    "row_parts": dense_row_parts,
}
NODES: dict[str, Any] = {
    "shared_vectors": [
        "shared_vectors.v1",
        {"entries": 5, "width": 4},
        {"table": ["plain.v1"]},
    ],
    "mirrored": [
        "shared_values.v1",
        {"entries": 6},
        {"table": ["mirrored.v1", {}, {"first": ["plain.v1"]}]},
    ],
    "shared_together": table_of(0.5, "conv.weight.table.first.first"),
    "circulant": ["circulant.v1", {"block": 4}, {"generators": ["plain.v1"]}],
    "toeplitz": ["toeplitz.v1", {"block": 3}, {"generators": ["plain.v1"]}],
    "kronecker": [
        "kronecker.v1",
        {"high": 1, "wide": 2, "terms": 2},
        {"generators": ["plain.v1"]},
    ],
    "tied": [
        "tied.v1",
        {"rows": 2, "scaled": True},
        {"book": ["plain.v1"], "scale": ["plain.v1", {"as": "bfloat16"}]},
    ],
    "row_parts": [
        "row_parts.v1",
        {"parts": 3},
        {
            "part0": ["shared_values.v1", {"entries": 5}, {"table": ["plain.v1"]}],
            "part1": ["plain.v1"],
            "part2": ["sparse.v1", {}, {"values": ["plain.v1"]}],
        },
    ],
}
COUNTS = {
    "tied": 20 + 20 + 2 * 20,
    "row_parts": 20 + (7 * 20 + 5) + 6 * 20 + (7 * 20 + 40),
    "circulant": 5 * 5 * 4,
    "toeplitz": 7 * 7 * 5,
    "kronecker": 2 * (20 * 10 + 2),
    "shared_vectors": 100 + 20,
    "mirrored": 400 + 3,
    "shared_together": 400,
}
"""How many numbers the weight of [20, 20] takes."""
