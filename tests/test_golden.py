"""Golden files: what an older Taut wrote is read to the last bit, and written again the same.

After a change of the format on purpose: `TAUT_WRITE_GOLDEN=1 pytest tests/test_golden.py`.
"""

import itertools
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor, nn

from taut.hashed_weight import Drawing, HashedWeight
from taut.layers import packed_layers
from taut.pack import DICTIONARY, encode, inspect, load
from taut.recoding import FORMATS, PackedWeight, Plain
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
from taut.techniques.code_length import Integers
from taut.techniques.share_values import SharedValues

FOLDER = Path(__file__).parent / "golden"
State = dict[tuple[str, ...], PackedWeight]


class Net(nn.Module):
    """A convolution, a norm, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Linear(20, 20, bias=False)
        self.again = nn.Linear(20, 20)
        self.again.weight = self.first.weight


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


TABLE = torch.tensor([-0.75, -0.125, 0.0, 0.25, 1.0])


def plain(*shape: int) -> PackedWeight:
    return Plain.of(numbers(*shape))


def sparse(*shape: int) -> PackedWeight:
    return SparseWeight(mask(*shape), Plain.of(numbers(*shape)[mask(*shape)]))


def shared(*shape: int) -> PackedWeight:
    return SharedValues(index(torch.Size(shape).numel()).reshape(shape), Plain.of(TABLE))


def vectors(*shape: int) -> PackedWeight:
    """Five vectors of four; the last of a row may stick out."""
    across = -(-math.prod(shape[1:]) // 4)
    which = index(shape[0] * across).reshape(shape[0], across)
    return SharedVectors(which, Plain.of(numbers(20)), 4, shape)


def mirrored(*shape: int) -> PackedWeight:
    which = index(torch.Size(shape).numel()).reshape(shape)
    return SharedValues(which, Mirrored(Plain.of(TABLE[2:])))


HALF = Plain.of(TABLE[2:])


def shared_together(*shape: int) -> PackedWeight:
    """Two weights that have one table, of opposite values, the second at half its size."""
    which = index(torch.Size(shape).numel()).reshape(shape)
    return SharedValues(which, Scaled(Mirrored(HALF), 1.0 if len(shape) > 2 else 0.5))


def integers(*shape: int) -> PackedWeight:
    return Integers((numbers(*shape) * 16).long(), torch.tensor(0.0625))


def sparse_shared(*shape: int) -> PackedWeight:
    kept = mask(*shape)
    return SparseWeight(kept, SharedValues(index(int(kept.sum())), Plain.of(TABLE)))


def sparse_sparse(*shape: int) -> PackedWeight:
    """What gates left of what a mask kept."""
    kept = mask(*shape)
    inner = mask(int(kept.sum()))
    return SparseWeight(kept, SparseWeight(inner, Plain.of(numbers(*shape)[kept][inner])))


def circulant(*shape: int) -> PackedWeight:
    structure = BlockCirculant(shape=shape, block=4)
    return CirculantWeight(structure, Plain.of(numbers(*structure.generators)))


def toeplitz(*shape: int) -> PackedWeight:
    structure = BlockToeplitz(shape=shape, block=3)
    return ToeplitzWeight(structure, Plain.of(numbers(*structure.generators)))


def kronecker(*shape: int) -> PackedWeight:
    structure = Kronecker(shape=shape, high=1, wide=2, terms=2)
    return KroneckerWeight(structure, Plain.of(numbers(*structure.generators)))


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


def dense_sparse_sparse(*shape: int) -> Tensor:
    """One place after another, as a person would."""
    out, seen = [], 0
    for kept, value in zip(mask(*shape).flatten(), numbers(*shape).flatten(), strict=True):
        again = bool(kept) and bool(mask(seen + 1)[-1])
        out.append(float(value) if again else 0.0)
        seen += bool(kept)
    return torch.tensor(out).reshape(shape)


def dense_sparse_shared(*shape: int) -> Tensor:
    """One place after another, as a person would."""
    out, seen = [], 0
    for kept in mask(*shape).flatten().tolist():
        out.append(float(TABLE[index(seen + 1)[-1]]) if kept else 0.0)
        seen += kept
    return torch.tensor(out).reshape(shape)


SEED = 2**32 - 5
TOGETHER = Plain.of(numbers(7))


def hashed(*shape: int) -> PackedWeight:
    """The convolution by its frequencies, of which only the mean of each filter is not zero."""
    if len(shape) == 2:
        return HashedWeight(Drawing(shape, (9,), SEED, 16), Plain.of(numbers(9)))
    buckets = torch.cat((numbers(3), torch.zeros(7)))
    return HashedWeight(Drawing(shape, (3, 2, 2, 2, 1), SEED, 1), Plain.of(buckets))


def hashed_together(*shape: int) -> PackedWeight:
    """All draw from the same buckets, which are stored once."""
    return HashedWeight(Drawing(shape, (7,), SEED, 1), TOGETHER, 0.5 if len(shape) == 4 else 1.0)


def mix(value: int, between: int = 0) -> int:
    """The hash mix32.v1, one number at a time."""
    value = (value ^ value >> 16) * 0x7FEB352D % 2**32
    value = ((value ^ value >> 15) + between) * 0x846CA68B % 2**32
    return value ^ value >> 16


def drawn(table: list[float], row: int, column: int, run: int) -> float:
    """One weight, as a person would look it up."""

    def hashed(number: int) -> int:
        return mix((number + mix((row + mix(SEED)) % 2**32)) % 2**32, mix(row ^ mix(other)))

    other = SEED ^ 0x9E3779B9
    span = 16 if run == 1 else run
    start = hashed(column // span) * len(table) >> 32
    own = hashed(2**31 + column // 128 * 16 + column % 16) >> column // 16 % 8 * 4
    place = column % 16 + 16 * (own >> 1 & 3) if run == 1 else column % run
    value = table[(start + place) % len(table)]
    return -value if own >> 3 & 1 else value


def draw(count: int, run: int, rows: int, columns: int) -> Tensor:
    table = numbers(count).tolist()
    return torch.tensor([[drawn(table, o, i, run) for i in range(columns)] for o in range(rows)])


def dense_hashed(*shape: int) -> Tensor:
    if len(shape) == 2:
        return draw(9, 16, *shape)
    means = draw(3, 1, shape[0], shape[1]) * torch.tensor(1 / 3)  # 1 / √3 in either direction
    return means[:, :, None, None].expand(shape)


def dense_hashed_together(*shape: int) -> Tensor:
    columns = torch.Size(shape[1:]).numel()
    found = draw(7, 1, shape[0], columns).reshape(shape)
    return found / 2 if len(shape) == 4 else found


WRITTEN = {
    "hashed": hashed,
    "hashed_together": hashed_together,
    "plain": plain,
    "sparse": sparse,
    "shared_values": shared,
    "integers": integers,
    "sparse_shared": sparse_shared,
    "sparse_sparse": sparse_sparse,
    "shared_vectors": vectors,
    "mirrored": mirrored,
    "shared_together": shared_together,
    "circulant": circulant,
    "toeplitz": toeplitz,
    "kronecker": kronecker,
}
MEANT = {
    "hashed": dense_hashed,
    "hashed_together": dense_hashed_together,
    "plain": numbers,
    "sparse": lambda *shape: numbers(*shape) * mask(*shape),
    "shared_values": lambda *shape: TABLE[index(torch.Size(shape).numel())].reshape(shape),
    "integers": numbers,
    "sparse_shared": dense_sparse_shared,
    "sparse_sparse": dense_sparse_sparse,
    "shared_vectors": dense_vectors,
    "mirrored": dense_mirrored,
    "shared_together": dense_shared_together,
    "circulant": lambda *shape: dense_blocks(shape, 4, 4),
    "toeplitz": lambda *shape: dense_blocks(shape, 3, 5),
    "kronecker": dense_kronecker,
}


def table_of(scale: float, first: Any) -> list[Any]:
    """The node of indices into a scaled table of opposite values."""
    mirrored = ["mirrored.v1", {}, {"first": first}]
    table = ["scaled.v1", {"scale": scale}, {"first": mirrored}]
    return ["shared_values.v1", {"entries": 6}, {"table": table}]


NODES: dict[str, Any] = {
    "hashed": ["hashed.v1", {"buckets": 9, "run": 16}, {"buckets": ["plain.v1"]}],
    "hashed_together": ["hashed.v1", {"buckets": 7}, {"buckets": "conv.weight.buckets"}],
    "plain": ["plain.v1"],
    "sparse": ["sparse.v1", {}, {"values": ["plain.v1"]}],
    "shared_values": ["shared_values.v1", {"entries": 5}, {"table": ["plain.v1"]}],
    "integers": ["integers.v1"],
    "sparse_shared": [
        "sparse.v1",
        {},
        {"values": ["shared_values.v1", {"entries": 5}, {"table": ["plain.v1"]}]},
    ],
    "sparse_sparse": ["sparse.v1", {}, {"values": ["sparse.v1", {}, {"values": ["plain.v1"]}]}],
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
}
NODES_OF_CONV: dict[str, Any] = {
    "hashed": ["hashed.v1", {"buckets": 10, "bands": 5}, {"buckets": ["plain.v1"]}],
    "hashed_together": ["hashed.v1", {"buckets": 7, "scale": 0.5}, {"buckets": ["plain.v1"]}],
    "shared_together": table_of(1.0, ["plain.v1"]),
}
MOST, LEAST = 2**63 - 1, -(2**62)


def written(name: str) -> State:
    """What the file of this name holds."""
    make = WRITTEN[name]
    return {
        ("conv.weight",): make(3, 2, 3, 3),
        ("first.weight", "again.weight"): make(20, 20),
        ("conv.bias",): Plain.of(torch.tensor([0.1, 1e-30, -3e38]), "float32"),
        ("norm.weight",): Plain.of(numbers(3), "bfloat16"),
        ("norm.bias",): Plain.of(numbers(3), "float16"),
        ("norm.running_mean",): Plain.of(torch.tensor([MOST, LEAST, -1])),
        ("norm.running_var",): Plain.of(torch.zeros(3)),
        ("norm.num_batches_tracked",): Plain.of(torch.tensor(1234)),
        ("again.bias",): Plain.of(numbers(20), "float32"),
    }


def meant(name: str) -> dict[str, Tensor]:
    """What the file of this name says, without Taut."""
    make = MEANT[name]
    return {
        "conv.weight": make(3, 2, 3, 3),
        "conv.bias": torch.tensor([0.1, 1e-30, -3e38]),
        "norm.weight": numbers(3),
        "norm.bias": numbers(3),
        "norm.running_mean": torch.tensor([2.0**63, -(2.0**62), -1.0]),
        "norm.running_var": torch.zeros(3),
        "norm.num_batches_tracked": torch.tensor(1234),
        "first.weight": make(20, 20),
        "again.weight": make(20, 20),
        "again.bias": numbers(20),
    }


def header(name: str) -> list[Any]:
    """The header of the file of this name, as docs/format.md has it."""
    node = NODES[name]
    return [
        ["conv.weight", [3, 2, 3, 3], NODES_OF_CONV.get(name, node)],
        [["first.weight", "again.weight"], [20, 20], node],
        ["conv.bias", [3], ["plain.v1", {"as": "float32"}]],
        ["norm.weight", [3], ["plain.v1", {"as": "bfloat16"}]],
        ["norm.bias", [3], ["plain.v1"]],
        ["norm.running_mean", [3], ["plain.v1", {"as": "int64"}]],
        ["norm.running_var", [3], ["plain.v1"]],
        ["norm.num_batches_tracked", [], ["plain.v1", {"as": "int64"}]],
        ["again.bias", [20], ["plain.v1", {"as": "float32"}]],
    ]


def split(data: bytes) -> tuple[bytes, bytes]:
    """The header's text, inflated, and the stream: a reader of its own, for short headers."""
    assert data[:5] == b"TAUT\x01"
    assert data[-8:] == xxhash.xxh3_64(data[:-8]).digest()
    length, start = data[5], 6
    if length > 127:
        length, start = length - 128 + 128 * data[6], 7
    inflater = zlib.decompressobj(wbits=-15, zdict=DICTIONARY)
    return inflater.decompress(data[start : start + length]), data[start + length : -8]


@pytest.fixture(params=sorted(WRITTEN))
def name(request: pytest.FixtureRequest) -> str:
    chosen = str(request.param)
    if os.environ.get("TAUT_WRITE_GOLDEN"):
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{chosen}.taut").write_bytes(encode(written(chosen)))
    return chosen


def test_a_golden_file_decodes_to_the_exact_tensors(name: str) -> None:
    model = load(FOLDER / f"{name}.taut", Net())
    for tensor_name, expected in meant(name).items():
        module, leaf = model.get_submodule(tensor_name.partition(".")[0]), tensor_name
        got = getattr(module, leaf.partition(".")[2])
        assert got.dtype is expected.dtype
        assert torch.equal(got, expected), tensor_name
    packed = {} if name == "plain" else packed_layers(model)
    assert list(packed) == ([] if name == "plain" else ["conv", "first", "again"])
    for layer in packed.values():
        assert layer.packed["weight"].format == NODES[name][0]


def test_writing_it_again_gives_the_same_file(name: str) -> None:
    golden = (FOLDER / f"{name}.taut").read_bytes()
    text, stream = split(golden)
    text_now, stream_now = split(encode(written(name)))
    assert text == text_now
    assert stream == stream_now
    assert text == json.dumps(header(name), separators=(",", ":")).encode()


def test_every_format_has_a_golden_file() -> None:
    assert {p.stem for p in FOLDER.glob("*.taut")} == set(WRITTEN)
    found = {
        word
        for path in FOLDER.glob("*.taut")
        for word in split(path.read_bytes())[0].decode().split('"')
        if word in FORMATS
    }
    assert found == {n for n in FORMATS if FORMATS[n].__module__.startswith("taut.")}
    total_bytes = sum(p.stat().st_size for p in FOLDER.glob("*.taut"))
    assert total_bytes < 12000


def test_the_account_of_a_golden_file(name: str) -> None:
    summary = inspect(FOLDER / f"{name}.taut")
    assert sum(t.numel for t in summary.tensors) == 54 + 400 + 3 * 5 + 1 + 20
    count = {t.names[0]: sum(p.count for p in t.parts.values()) for t in summary.tensors}
    kept = int(mask(20, 20).sum())
    again = int(mask(kept).sum())
    expected = {
        "plain": 400, "sparse": 400 + kept, "shared_values": 405, "integers": 404,
        "sparse_sparse": 400 + kept + again, "circulant": 5 * 5 * 4, "toeplitz": 7 * 7 * 5,
        "kronecker": 2 * (20 * 10 + 2), "shared_vectors": 100 + 20, "mirrored": 400 + 3,
        "hashed": 4 + 9, "hashed_together": 4, "shared_together": 400,
    }  # fmt: skip
    assert count["first.weight"] == expected.get(name, 400 + kept + 5)
