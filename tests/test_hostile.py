"""Hostile files: each is refused with a FormatError, soon, and at no cost in memory.

Every attack carries a valid checksum, so that what it aims at is reached. Some are also kept as
files in tests/hostile/, which `TAUT_WRITE_HOSTILE=1 pytest tests/test_hostile.py` writes anew.
"""

import copy
import io
import json
import os
import pickle
import re
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from taut.coding import Encoder
from taut.container import DICTIONARY
from taut.errors import FormatError
from taut.pack import inspect, load, pack
from taut.techniques import PruneWeights, ShareValues
from taut.types import Site

FOLDER = Path(__file__).parent / "hostile"
MAGIC = b"TAUT\x01"
PLAIN = ["plain.v1"]
ONE = b"\x80\x3f"  # a bfloat16
SHARED = ["shared_values.v1", {"entries": 4}, {"table": PLAIN}]
SPARSE = ["sparse.v1", {}, {"values": PLAIN}]


def signed(body: bytes) -> bytes:
    """The body with the checksum that belongs to it."""
    return body + xxhash.xxh3_64_digest(body)


def deflate(text: bytes) -> bytes:
    squeezer = zlib.compressobj(9, wbits=-15, zdict=DICTIONARY)
    return squeezer.compress(text) + squeezer.flush()


def length(value: int) -> bytes:
    """Seven bits to a byte, the lowest first; all but the last byte have their top bit set."""
    out = b""
    while value > 127:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def container(header: bytes, stream: bytes = b"") -> bytes:
    return signed(MAGIC + length(len(header)) + header + stream)


def text(header: str | bytes, stream: bytes = b"") -> bytes:
    """A file whose header is this text, JSON or not."""
    return container(deflate(header.encode() if isinstance(header, str) else header), stream)


def entries(*items: Any, stream: bytes = b"") -> bytes:
    return text(json.dumps(list(items), separators=(",", ":")), stream)


def weight(node: Any, stream: bytes = b"", shape: Any = (3, 4)) -> bytes:
    """A file for nn.Linear(4, 3) whose weight is written in this way."""
    return entries(["weight", list(shape), node], ["bias", [3], PLAIN], stream=stream)


def nested(depth: int) -> list[Any]:
    node: list[Any] = PLAIN
    for _ in range(depth):
        node = ["sparse.v1", {}, {"values": node}]
    return node


def small_file(tmp_path: Path) -> bytes:
    """An honest file of nn.Linear(4, 3): pruned, shared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
    site = Site(name="weight", kind="linear", shape=(3, 4), macs=12)
    PruneWeights(sparsity=0.5).apply(layer, site)
    ShareValues(bits=2).apply(layer, site)
    pack(layer, tmp_path / "small.taut")
    return (tmp_path / "small.taut").read_bytes()


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def torch_file() -> bytes:
    out = io.BytesIO()
    torch.save({"weight": torch.zeros(3, 4)}, out)
    return out.getvalue()


def scaled(low: int, high: int, step: bytes, *numbers: int) -> bytes:
    """A file whose weight is whole numbers from low to high times a bfloat16."""
    coder = Encoder()
    scale = bytes([low % 256, (high - low) % 256]) + step
    coder.plain("scale", np.frombuffer(scale, np.uint8), 1, 4)
    index = np.resize(np.array(numbers or [0], np.int64), 12) - low
    coder.symbols("index", index, high - low + 1, 12)
    coder.plain("bias", np.zeros(6, np.uint8), 2, 3)
    return weight(["integers.v1"], coder.finish())


def far(step: bytes, gaps: list[int], index: list[int]) -> bytes:
    """A file whose weight is such numbers, each told by its distance from the last, less one."""
    coder, count = Encoder(), len(gaps)
    coder.plain("scale", np.frombuffer(bytes([count - 1]) + step, np.uint8), 1, 3)
    coder.integers("numbers", np.array(gaps, np.int64), count)
    coder.symbols("index", np.resize(np.array(index, np.int64), 12), count, 12)
    coder.plain("bias", np.zeros(6, np.uint8), 2, 3)
    return weight(["integers.v2"], coder.finish())


NAN = '[["weight",[3,4],["plain.v1",{"as":NaN}]]]'
HUGE = 10**300
DRY = b"\x99" * 24  # a stream too short for what is claimed
ATTACKS: dict[str, tuple[bytes, str]] = {
    # ---- the container
    "empty": (b"", "not a .taut file but something else"),
    "text": (b"Hello, this is a letter.\n", "not a .taut file but something else"),
    "pickle": (pickle.dumps(Bomb("unpickled"), 2), r"not a .taut file but a pickle"),
    "torch": (torch_file(), r"not a .taut file but a pickle \(torch.save\)"),
    "name_only": (b"TAUT", "4 bytes are too few"),
    "magic_only": (MAGIC, "5 bytes are too few"),
    "no_header": (signed(MAGIC), "13 bytes are too few"),
    "version_0": (signed(b"TAUT\x00" + b"\0" * 9), "format version 0, this Taut reads version 1"),
    "version_2": (signed(b"TAUT\x02" + b"\0" * 9), "format version 2, .* update Taut"),
    "bad_sum": (MAGIC + b"\1\0" + b"\0" * 8, "the checksum does not match"),
    "length_beyond": (signed(MAGIC + b"\x7f\0"), "header claims 127 bytes, the file has 1"),
    "length_huge": (signed(MAGIC + b"\xff\xff\xff\x7f\0"), "header claims 268,?435,?455 bytes"),
    "length_endless": (signed(MAGIC + b"\xff" * 40), "the header's length is damaged"),
    "length_cut": (signed(MAGIC + b"\x80"), "the header's length is damaged"),
    "length_padded": (signed(MAGIC + b"\x80\x00"), "the header's length is damaged"),
    # ---- the header's text
    "header_missing": (container(b""), "the header is damaged"),
    "header_raw": (container(b"[]"), "the header is damaged"),
    "header_cut": (container(deflate(b"[1, 2, 3, 4, 5, 6]")[:-2]), "the header is damaged"),
    "header_goes_on": (container(deflate(b"[]") + b"more"), "the header is damaged"),
    "zip_bomb": (text(b" " * (1 << 23)), r"damaged or larger than \d+ bytes"),
    "bracket_bomb": (text("[" * (1 << 20)), "the header is damaged"),
    "list_bomb": (text("[" + "[]," * (1 << 18) + "[]]"), "the header is damaged|a tensor is"),
    "deep_list": (text("[" * 900 + "]" * 900), "a tensor is|the header is damaged"),
    "deep_scalar": (
        text('[["weight",[3,4],["plain.v1",{"as":' + "[" * 800 + "]" * 800 + "}]]]"),
        "a format is|the header is damaged",
    ),
    "not_json": (text("{nets: [}"), "the header is damaged"),
    "pickled_header": (container(deflate(pickle.dumps(Bomb("unpickled")))), "header is damaged"),
    "not_utf8": (text(b'[["\xff\xfe",[1],["plain.v1"]]]'), "the header is damaged: .*utf-8"),
    "utf16": (text("[]".encode("utf-16")), "the header is damaged"),
    "nan": (text(NAN), "the header holds NaN, which is not JSON"),
    "infinity": (text(NAN.replace("NaN", "-Infinity")), "holds -Infinity, which is not JSON"),
    "long_number": (text("[" + "9" * 9000 + "]"), "the header is damaged"),
    "null": (text("null"), "must be a list of tensors"),
    "object": (text('{"weight":[3,4]}'), "must be a list of tensors"),
    # ---- tensors
    "number_for_tensor": (entries(7), r"a tensor is \[name, shape, format\], got 7"),
    "short_tensor": (entries(["weight", [3, 4]]), r"a tensor is \[name, shape, format\]"),
    "long_tensor": (entries(["weight", [3, 4], PLAIN, 1]), r"a tensor is \[name, shape, format\]"),
    "no_name": (entries(["", [1], PLAIN]), "a tensor's name is printable text .* got ''"),
    "name_number": (entries([1, [1], PLAIN]), "a tensor's name is printable text .* got 1"),
    "name_null": (entries([None, [1], PLAIN]), "a tensor's name is printable text"),
    "name_object": (entries([{"a": 1}, [1], PLAIN]), "a tensor's name is printable text"),
    "names_empty": (entries([[], [1], PLAIN]), "a tensor's name is printable text"),
    "names_nested": (entries([[["a"], "b"], [1], PLAIN]), "a tensor's name is printable text"),
    "name_escape": (entries(["\x1b[2J", [1], PLAIN]), r"printable text .* got '\\x1b\[2J'"),
    "name_surrogate": (text(r'[["\ud800",[1],["plain.v1"]]]'), "printable text"),
    "name_long": (entries(["n" * 513, [1], PLAIN]), "printable text of up to 512"),
    "name_twice": (entries(["a", [1], PLAIN], ["a", [1], PLAIN]), "'a' stands twice"),
    "alias_twice": (entries([["a", "b"], [1], PLAIN], ["b", [1], PLAIN]), "'b' stands twice"),
    "alias_of_itself": (entries([["a", "a"], [1], PLAIN]), "'a' stands twice"),
    "shape_number": (weight(PLAIN, shape="34"), "a shape is up to 8 sizes"),
    "size_float": (weight(PLAIN, shape=[3.0, 4]), r"a shape is up to 8 sizes, got \[3.0, 4\]"),
    "size_bool": (weight(PLAIN, shape=[True, 4]), "a shape is up to 8 sizes"),
    "size_null": (weight(PLAIN, shape=[None]), "a shape is up to 8 sizes"),
    "size_text": (weight(PLAIN, shape=["3", 4]), "a shape is up to 8 sizes"),
    "size_negative": (weight(PLAIN, shape=[-3, -4]), "a shape is up to 8 sizes"),
    "size_huge": (weight(PLAIN, shape=[HUGE]), "a shape is up to 8 sizes"),
    "size_infinite": (text('[["a",[1e999],["plain.v1"]]]'), "a shape is up to 8 sizes"),
    "sizes_nested": (weight(PLAIN, shape=[[3], 4]), "a shape is up to 8 sizes"),
    "nine_dimensions": (weight(PLAIN, shape=[1] * 9), "a shape is up to 8 sizes"),
    # ---- claims
    "terabyte": (entries(["a", [1 << 19, 1 << 19], PLAIN]), "claim 274,877,906,944 numbers"),
    "many_claims": (
        entries(*([f"t{i}", [1 << 19], PLAIN] for i in range(64))),
        "claim 33,554,432 numbers",
    ),
    "wide_void": (entries(["a", [0, 1 << 39], SPARSE]), "claim 549,755,813,888 numbers"),
    "tall_void": (entries(["a", [1 << 39, 0], SPARSE]), "claim 549,755,813,888 numbers"),
    "great_product": (entries(["a", [(1 << 40) - 1] * 8, PLAIN]), "claim [0-9,]{120,} numbers"),
    # ---- formats
    "format_text": (weight("plain.v1"), r"a format is \[name, scalars, parts\]"),
    "format_empty": (weight([]), r"a format is \[name, scalars, parts\]"),
    "format_long": (weight([*PLAIN, {}, {}, {}]), r"a format is \[name, scalars, parts\]"),
    "format_number": (weight([1]), r"a format is \[name, scalars, parts\]"),
    "format_list": (weight([PLAIN]), r"a format is \[name, scalars, parts\]"),
    "format_unknown": (weight(["sparse.v9"]), "no format is named 'sparse.v9'; did you mean"),
    "format_path": (weight(["os.system"]), "no format is named 'os.system'"),
    "format_long_name": (weight(["p" * 3000]), r"a format is \[name, scalars, parts\]"),
    "scalars_list": (weight(["plain.v1", []]), r"a format is \[name, scalars, parts\]"),
    "scalars_nested": (weight(["plain.v1", {"as": {}}]), r"a format is \[name, scalars, parts\]"),
    "scalars_listed": (weight(["plain.v1", {"as": []}]), r"a format is \[name, scalars, parts\]"),
    "scalars_null": (weight(["plain.v1", {"as": None}]), r"a format is \[name, scalars, parts\]"),
    "parts_list": (weight(["sparse.v1", {}, [PLAIN]]), r"a format is \[name, scalars, parts\]"),
    "part_text": (weight(["sparse.v1", {}, {"values": "x"}]), "same as 'x', which is no earlier"),
    "part_unknown": (weight(["sparse.v1", {}, {"values": ["x.v1"]}]), "no format is named 'x.v1'"),
    "eight_deep": (weight(nested(8)), "at most 8 deep"),
    "hundreds_deep": (weight(nested(200)), "at most 8 deep|the header is damaged"),
    "precision_number": (weight(["plain.v1", {"as": 1}]), "plain.v1 has no precision 1"),
    "precision_bool": (weight(["plain.v1", {"as": True}]), "plain.v1 has no precision True"),
    "precision_unknown": (weight(["plain.v1", {"as": "int8"}]), "plain.v1 has no precision 'int8'"),
    "scalar_idle": (weight(["plain.v1", {"at": "x"}]), "scalars or parts that do nothing"),
    "scalar_default": (weight(["plain.v1", {"as": "float16"}]), "that do nothing"),
    "part_idle": (weight(["plain.v1", {}, {"values": PLAIN}]), "that do nothing"),
    "parts_idle": (
        weight(["sparse.v1", {}, {"values": PLAIN, "more": PLAIN}]),
        "scalars or parts that do nothing",
    ),
    "empty_scalars": (weight(["plain.v1", {}]), "scalars or parts that do nothing"),
    "entries_missing": (weight(["shared_values.v1", {}, {"table": PLAIN}]), "got None"),
    **{
        f"entries_{name}": (
            weight(["shared_values.v1", {"entries": value}, {"table": PLAIN}]),
            r"shared_values.v1: entries must lie in \[0, 256\]",
        )
        for name, value in (
            ("bool", True), ("float", 2.0), ("text", "32"), ("below", -1), ("above", 257),
            ("huge", HUGE),
        )
    },
    "entries_none": (
        weight(["shared_values.v1", {"entries": 0}, {"table": PLAIN}]),
        "a table without entries cannot hold weights",
    ),
    "table_missing": (weight(["shared_values.v1", {"entries": 4}]), "lacks its part 'table'"),
    "table_misnamed": (
        weight(["shared_values.v1", {"entries": 4}, {"tables": PLAIN}]),
        "lacks its part 'table'",
    ),
    "values_missing": (weight(["sparse.v1"]), "sparse.v1 lacks its part 'values'"),
    "sparse_scalar": (entries(["a", [], SPARSE]), "needs a shape of at least one dimension"),
    "integers_low": (scaled(-128, 0, ONE), r"numbers lie in \[-127, 127\] .* got \[-128, 0\]"),
    "integers_high": (scaled(0, 128, ONE), r"numbers lie in \[-127, 127\] .* got \[0, 128\]"),
    "step_zero": (scaled(0, 1, b"\0\0", 0, 1), "steps above 0, got .* and 0.0"),
    "step_nan": (scaled(0, 1, b"\xc0\x7f", 0, 1), "steps above 0, got .* and nan"),
    "integers_unfilled": (scaled(-1, 2, ONE, 0, 1), r"do not fill \[-1, 2\]"),
    "far_near": (far(ONE, [0, 126], [0, 1]), "lies beyond 127 .* up to 127"),
    "far_falling": (far(ONE, [400, -300], [0, 1]), "integers.v2: numbers rise"),
    "far_too_far": (far(ONE, [0, 32767], [0, 1]), "within 32767, .* up to 32768"),
    "far_endless": (far(ONE, [2**62, 2**62], [0, 1]), "within 32767"),
    "far_step": (far(b"\0\0", [0, 127], [0, 1]), "steps are above 0, got .* and 0.0"),
    "far_unused": (far(ONE, [0, 0, 200], [0, 2]), "of its 3 numbers some do not occur"),
    # ---- the stream
    "stream_missing": (weight(SHARED), "the coded stream"),
    "stream_random": (weight(PLAIN, bytes(range(7, 47))), "the coded stream"),
    "stream_goes_on": (weight(PLAIN, b"\x55" * 400), "the coded stream"),
    "stream_padded": (weight(PLAIN, b"\0" * 9), "the coded stream"),
    "stream_dry": (entries(["a", [1 << 19], ["plain.v1", {"as": "int64"}]], stream=b"\x99" * 24),
                   "the coded stream"),
}  # fmt: skip
KEPT = (
    "alias_of_itself", "bracket_bomb", "deep_scalar", "entries_bool", "entries_huge",
    "hundreds_deep", "length_padded", "name_escape", "name_surrogate", "pickle", "pickled_header",
    "scalars_nested", "size_bool", "size_infinite", "stream_dry", "stream_goes_on", "tall_void",
    "terabyte", "version_2", "zip_bomb",
)  # fmt: skip

GREAT = (
    "terabyte", "wide_void", "tall_void", "great_product", "zip_bomb", "list_bomb", "length_huge",
    "stream_dry",
)  # fmt: skip


def attempt(path: Path, reader: Callable[[Path], object]) -> str | None:
    """The message of the FormatError; None where the file was read. Anything else is a failure."""
    started = time.process_time()
    try:
        reader(path)
        said = None
    except FormatError as error:
        said = str(error)
        assert len(said) < 1000
        said.encode()
    assert time.process_time() - started < 1.0
    return said


def attempt_both(path: Path) -> tuple[str | None, str | None]:
    """Inspect and load; a model whose file is refused must come back untouched."""
    model = nn.Linear(4, 3)
    before = copy.deepcopy(model.state_dict())
    told = attempt(path, inspect), attempt(path, lambda p: load(p, model))
    if told[1] is not None:
        assert type(model) is nn.Linear
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
    return told


def check_refused(folder: Path, data: bytes, message: str) -> Path:
    """Both readers refuse a file and name it, the one that inspects for this reason."""
    path = folder / "attack.taut"
    path.write_bytes(data)
    inspected, loaded = attempt_both(path)
    assert inspected is not None
    assert re.search(message, inspected, re.DOTALL), inspected
    assert "attack.taut" in inspected
    assert loaded is not None
    assert "attack.taut" in loaded
    return path


def check_cheap(path: Path) -> None:
    """A file is refused without the memory that it claims."""
    tracemalloc.start()
    try:
        assert attempt(path, inspect) is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6 + 20 * path.stat().st_size


def check_kept(name: str, data: bytes) -> None:
    """The file in the folder of hostile ones is this attack still."""
    if os.environ.get("TAUT_WRITE_HOSTILE"):
        (FOLDER / f"{name}.taut").write_bytes(data)
    assert (FOLDER / f"{name}.taut").read_bytes() == data


# ---- one attack after another ---------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(tmp_path, *ATTACKS[name])
    assert not (tmp_path / "unpickled").exists()


def test_a_folder_is_refused(tmp_path: Path) -> None:
    for said in attempt_both(tmp_path):
        assert said is not None
        assert re.search("cannot read .*: Is a directory", said)


def test_the_bomb_would_go_off(tmp_path: Path) -> None:
    """The attack is armed: unpickling it does leave its mark."""
    pickle.loads(pickle.dumps(Bomb(str(tmp_path / "unpickled"))))
    assert (tmp_path / "unpickled").exists()


def test_the_kept_files_are_refused() -> None:
    if os.environ.get("TAUT_WRITE_HOSTILE"):
        FOLDER.mkdir(exist_ok=True)
        for old in FOLDER.glob("*.taut"):
            old.unlink()
        for name in KEPT:
            (FOLDER / f"{name}.taut").write_bytes(ATTACKS[name][0])
    files = sorted(FOLDER.glob("*.taut"))
    assert len(files) >= len(KEPT)
    for path in files:
        for said in attempt_both(path):
            assert said is not None, path.name


@pytest.mark.parametrize("name", GREAT)
def test_a_great_claim_takes_no_memory(tmp_path: Path, name: str) -> None:
    check_cheap(check_refused(tmp_path, *ATTACKS[name]))


# ---- an honest file, damaged ----------------------------------------------------------------


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole, path = small_file(tmp_path), tmp_path / "cut.taut"
    path.write_bytes(whole)
    assert attempt_both(path) == (None, None)
    for end in range(len(whole)):
        for data in (whole[:end], signed(whole[:end])):
            path.write_bytes(data)
            told = attempt_both(path)
            # The longest cut with a checksum of its own is the whole file again.
            assert (told == (None, None)) == (data == whole), end


def test_a_file_with_more_at_its_end_is_refused(tmp_path: Path) -> None:
    whole, path = small_file(tmp_path), tmp_path / "long.taut"
    for more in (b"\0", b"\1", b"\0" * 4, b"\xff" * 4, whole):
        for data in (whole + more, signed(whole[:-8] + more)):
            path.write_bytes(data)
            assert None not in attempt_both(path)


def test_every_flipped_bit_breaks_the_checksum(tmp_path: Path) -> None:
    whole, path = small_file(tmp_path), tmp_path / "flipped.taut"
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        said = attempt(path, inspect)
        assert said is not None, bit


def test_every_flipped_bit_under_a_valid_checksum_is_refused_or_read(tmp_path: Path) -> None:
    """Other numbers may come out, of a network that runs."""
    whole, path = small_file(tmp_path), tmp_path / "flipped.taut"
    body, read = whole[:-8], 0
    for bit in range(8 * len(body)):
        data = bytearray(body)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(signed(bytes(data)))
        model = nn.Linear(4, 3)
        if attempt(path, lambda p, m=model: load(p, m)) is None:
            read += 1
            with torch.no_grad():
                model(torch.ones(1, 4))
    assert 0 < read < 4 * len(body)


# ---- anything at all ------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["weight", "plain.v1", "sparse.v1", "shared_values.v1", "as", "int64"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["as", "entries", "table", "values"]), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
NODES = st.recursive(
    st.sampled_from(
        [PLAIN, ["integers.v1"], ["integers.v2"]]
        + [["plain.v1", {"as": p}] for p in ("float32", "bfloat16", "int64")]
    ),
    lambda inner: st.one_of(
        st.builds(lambda v: ["sparse.v1", {}, {"values": v}], inner),
        st.builds(
            lambda n, t: ["shared_values.v1", {"entries": n}, {"table": t}],
            st.integers(0, 256), inner,
        ),
        st.builds(
            lambda b, n, z, s: ["affine.v1", {"bits": b, "steps": n, "zero": z}, {"steps": s}],
            st.integers(0, 9), st.integers(0, 13), st.sampled_from([0, 3, 600, "each"]), inner,
        ),
    ),
    max_leaves=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "any.taut"


def refused_or_read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    attempt_both(path)


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes(path: Path, data: bytes) -> None:
    for whole in (data, MAGIC + data, signed(MAGIC + data)):
        refused_or_read(path, whole)


@given(JSON, st.binary(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_json(path: Path, header: Any, stream: bytes) -> None:
    refused_or_read(path, text(json.dumps(header), stream))
    refused_or_read(path, text(json.dumps([["weight", [3, 4], header]]), stream))
    refused_or_read(path, weight(header, stream))


@given(NODES, st.lists(st.integers(0, 40), max_size=4), st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_stream_in_any_format(path: Path, node: Any, shape: list[int], stream: bytes) -> None:
    refused_or_read(path, weight(node, stream))
    refused_or_read(path, weight(node, stream, shape))
