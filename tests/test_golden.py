"""Golden files: what an older Taut wrote is read to the last bit, and written again the same.

After a change of the format on purpose: `TAUT_WRITE_GOLDEN=1 pytest tests/test_golden.py`.
"""

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import golden_structures as structures
import pytest
import torch
import xxhash
from golden_structures import TABLE, index, mask, numbers
from torch import Tensor, nn

from taut.activations import LevelCode, StepCode
from taut.affine_weight import AffineWeight
from taut.bit_weight import BitWeight
from taut.container import DICTIONARY, encode
from taut.hashed_weight import Drawing, HashedWeight
from taut.kernels import Levels
from taut.layers import packed_layers
from taut.pack import inspect, load
from taut.packed import FORMATS, PackedWeight, Plain
from taut.pattern_weights import BlockWeight, NOfMWeight
from taut.sparse_weight import SparseWeight
from taut.techniques.code_length import FarIntegers, Integers
from taut.techniques.factor_weights import FactoredWeight
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


def plain(*shape: int) -> PackedWeight:
    return Plain.of(numbers(*shape))


def sparse(*shape: int) -> PackedWeight:
    return SparseWeight(mask(*shape), Plain.of(numbers(*shape)[mask(*shape)]))


def shared(*shape: int) -> PackedWeight:
    return SharedValues(index(torch.Size(shape).numel()).reshape(shape), Plain.of(TABLE))


def integers(*shape: int) -> PackedWeight:
    return Integers((numbers(*shape) * 16).long(), torch.tensor(0.0625))


def far_numbers(*shape: int) -> Tensor:
    """The same, but for the first, which lies far outside."""
    found = numbers(*shape)
    found.view(-1)[0] = -56.25
    return found


def far_integers(*shape: int) -> PackedWeight:
    return FarIntegers((far_numbers(*shape) * 16).long(), torch.tensor(0.0625))


def sparse_shared(*shape: int) -> PackedWeight:
    kept = mask(*shape)
    return SparseWeight(kept, SharedValues(index(int(kept.sum())), Plain.of(TABLE)))


def affine(*shape: int) -> PackedWeight:
    """Rows with steps and zeros of their own."""
    row = torch.arange(shape[0])
    steps = Plain.of((row % 3 + 1) / 16, "bfloat16")
    return AffineWeight(index(torch.Size(shape).numel()).reshape(shape), 3, steps, row % 7 * 2)


def dense_affine(*shape: int) -> Tensor:
    """One number after another, as a person would."""
    rows = index(torch.Size(shape).numel()).reshape(shape[0], -1).tolist()
    found = [[(n - i % 7) * (i % 3 + 1) / 16 for n in row] for i, row in enumerate(rows)]
    return torch.tensor(found).reshape(shape)


def sparse_sparse(*shape: int) -> PackedWeight:
    """What gates left of what a mask kept."""
    kept = mask(*shape)
    inner = mask(int(kept.sum()))
    return SparseWeight(kept, SparseWeight(inner, Plain.of(numbers(*shape)[kept][inner])))


def block_mask(*shape: int) -> Tensor:
    """About a third of the blocks of four rows, the last ones shorter where rows are three."""
    chosen = mask(-(-shape[0] // 4), torch.Size(shape[1:]).numel())
    return chosen.repeat_interleave(4, 0)[: shape[0]].reshape(shape)


def blocks(*shape: int) -> PackedWeight:
    kept = block_mask(*shape)
    return BlockWeight(kept, Plain.of(numbers(*shape)[kept]), 4)


def two_of_four(*shape: int) -> Tensor:
    """In every four of a row two, and all of what a row ends with: the pairs in their order."""
    pairs = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    columns = torch.Size(shape[1:]).numel()
    kept = torch.zeros(shape[0], columns, dtype=torch.bool)
    for row in range(shape[0]):
        for start in range(0, columns, 4):
            ends = columns - start < 4
            for place in (0, 1) if ends else pairs[(row * row + 5 * start // 4) % 6]:
                kept[row, start + place] = True
    return kept.reshape(shape)


def n_of_m_shared(*shape: int) -> PackedWeight:
    kept = two_of_four(*shape)
    return NOfMWeight(kept, SharedValues(index(int(kept.sum())), Plain.of(TABLE)), 2, 4)


def dense_n_of_m_shared(*shape: int) -> Tensor:
    """One place after another, as a person would."""
    out, seen = [], 0
    for kept in two_of_four(*shape).flatten().tolist():
        out.append(float(TABLE[index(seen + 1)[-1]]) if kept else 0.0)
        seen += kept
    return torch.tensor(out).reshape(shape)


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


def bits(*shape: int) -> PackedWeight:
    """Two planes, and scales for each row."""
    codes = index(torch.Size(shape).numel()).clamp(max=3).reshape(shape)
    return BitWeight(codes, Plain.of(scales_of(shape[0])))


def scales_of(rows: int) -> Tensor:
    return torch.stack([torch.arange(1, rows + 1) / 4, torch.arange(rows, 0, -1) / 8])


def dense_bits(*shape: int) -> Tensor:
    """One weight after another, as a person would."""
    codes = index(torch.Size(shape).numel()).clamp(max=3).tolist()
    low, high = scales_of(shape[0]).tolist()
    each, out = len(codes) // shape[0], []
    for i, code in enumerate(codes):
        row = i // each
        out.append((low[row] if code & 1 else -low[row]) + (high[row] if code & 2 else -high[row]))
    return torch.tensor(out).reshape(shape)


def low_rank(*shape: int) -> PackedWeight:
    """Of rank 2, its factors shared values."""
    factors = index(2 * sides(*shape)).reshape(2, -1)
    return FactoredWeight(shape, SharedValues(factors, Plain.of(TABLE)))


def sides(out: int, *later: int) -> int:
    return out + math.prod(later)


def dense_low_rank(*shape: int) -> Tensor:
    """One weight after another, as a person would."""
    both = TABLE[index(2 * sides(*shape))].tolist()
    out, each = shape[0], sides(*shape)
    first, second = both[:each], both[each:]
    return torch.tensor(
        [[first[o] * first[i] + second[o] * second[i] for i in range(out, each)]
         for o in range(out)]
    ).reshape(shape)  # fmt: skip


WRITTEN = {
    **structures.WRITTEN,
    "bits": bits,
    "hashed": hashed,
    "hashed_together": hashed_together,
    "plain": plain,
    "codes": plain,
    "sparse": sparse,
    "shared_values": shared,
    "far_integers": far_integers,
    "integers": integers,
    "affine": affine,
    "sparse_shared": sparse_shared,
    "sparse_sparse": sparse_sparse,
    "blocks": blocks,
    "n_of_m_shared": n_of_m_shared,
    "low_rank": low_rank,
}
MEANT = {
    **structures.MEANT,
    "hashed": dense_hashed,
    "hashed_together": dense_hashed_together,
    "bits": dense_bits,
    "plain": numbers,
    "codes": numbers,
    "sparse": lambda *shape: numbers(*shape) * mask(*shape),
    "shared_values": lambda *shape: TABLE[index(torch.Size(shape).numel())].reshape(shape),
    "far_integers": far_numbers,
    "integers": numbers,
    "affine": dense_affine,
    "sparse_shared": dense_sparse_shared,
    "sparse_sparse": dense_sparse_sparse,
    "blocks": lambda *shape: numbers(*shape) * block_mask(*shape),
    "n_of_m_shared": dense_n_of_m_shared,
    "low_rank": dense_low_rank,
}


NODES: dict[str, Any] = {
    **structures.NODES,
    "hashed": ["hashed.v1", {"buckets": 9, "run": 16}, {"buckets": ["plain.v1"]}],
    "hashed_together": ["hashed.v1", {"buckets": 7}, {"buckets": "conv.weight.buckets"}],
    "bits": ["bits.v1", {"planes": 2, "rows": True}, {"scale": ["plain.v1"]}],
    "plain": ["plain.v1"],
    "codes": ["plain.v1"],
    "sparse": ["sparse.v1", {}, {"values": ["plain.v1"]}],
    "shared_values": ["shared_values.v1", {"entries": 5}, {"table": ["plain.v1"]}],
    "far_integers": ["integers.v2"],
    "integers": ["integers.v1"],
    "affine": [
        "affine.v1",
        {"bits": 3, "zero": "each"},
        {"steps": ["plain.v1", {"as": "bfloat16"}]},
    ],
    "sparse_shared": [
        "sparse.v1",
        {},
        {"values": ["shared_values.v1", {"entries": 5}, {"table": ["plain.v1"]}]},
    ],
    "sparse_sparse": ["sparse.v1", {}, {"values": ["sparse.v1", {}, {"values": ["plain.v1"]}]}],
    "blocks": ["blocks.v1", {"rows": 4}, {"values": ["plain.v1"]}],
    "n_of_m_shared": [
        "n_of_m.v1",
        {"keep": 2, "of": 4},
        {"values": ["shared_values.v1", {"entries": 5}, {"table": ["plain.v1"]}]},
    ],
    "low_rank": [
        "low_rank.v1",
        {"rank": 2},
        {"factors": ["shared_values.v1", {"entries": 5}, {"table": ["plain.v1"]}]},
    ],
}
NODES_OF_CONV: dict[str, Any] = {
    "hashed": ["hashed.v1", {"buckets": 10, "bands": 5}, {"buckets": ["plain.v1"]}],
    "hashed_together": ["hashed.v1", {"buckets": 7, "scale": 0.5}, {"buckets": ["plain.v1"]}],
    "shared_together": structures.table_of(1.0, ["plain.v1"]),
    "tied": ["tied.v1", {"rows": 3, "kernels": True}, {"book": ["plain.v1"]}],
}
MOST, LEAST = 2**63 - 1, -(2**62)


def codes() -> State:
    """What the inputs of two layers are rounded to: ±1 and 0 by channel, and signed steps."""
    levels = Levels(
        thresholds=torch.tensor([[-0.5, -0.25], [0.5, 0.75]]),
        pattern=torch.tensor([0, 1, 3], dtype=torch.uint8),
        scale=torch.tensor([0.5, 0.5]),
    )
    return {
        ("conv:input",): LevelCode(levels),
        ("again:input",): StepCode(torch.tensor([0.125]), -8, 7),
    }


CODES = [
    ["conv:input", [7], ["levels.v1", {"planes": 2, "pattern": "000103"}]],
    ["again:input", [1], ["steps.v1", {"low": -8, "high": 7}]],
]


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
        **(codes() if name == "codes" else {}),
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
        *(CODES if name == "codes" else []),
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
    packed = packed_layers(model)
    if name == "codes":
        assert list(packed) == ["conv", "again"]
        x = torch.tensor([[[[-0.5]], [[0.5]]], [[[-0.625]], [[0.75]]]])
        assert packed["conv"].rounded(x).flatten().tolist() == [0.0, 0.0, -1.0, 1.0]
        assert packed["again"].rounded(numbers(20)).tolist() == [
            min(max(math.floor(v * 8 + 0.5), -8), 7) / 8 for v in numbers(20).tolist()
        ]
        return
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
    of_codes = 7 + 1 if name == "codes" else 0
    assert sum(t.numel for t in summary.tensors) == 54 + 400 + 3 * 5 + 1 + 20 + of_codes
    count = {t.names[0]: sum(p.count for p in t.parts.values()) for t in summary.tensors}
    kept = int(mask(20, 20).sum())
    again = int(mask(kept).sum())
    expected = {
        "bits": 440, "plain": 400, "codes": 400, "sparse": 400 + kept, "shared_values": 405,
        "far_integers": 403 + len(far_numbers(20, 20).unique()),
        "integers": 404, "sparse_sparse": 400 + kept + again, "n_of_m_shared": 400 + 200 + 5,
        "affine": 440, "blocks": 100 + int(block_mask(20, 20).sum()), **structures.COUNTS,
        "hashed": 4 + 9, "hashed_together": 4, "low_rank": 2 * 40 + 5,
    }  # fmt: skip
    assert count["first.weight"] == expected.get(name, 400 + kept + 5)
