"""The container: the bytes of a .taut file, which knows formats by their registered names.

docs/format.md is the specification. It holds no code and knows no network: it makes bytes of named
packed weights and of structural edits, which are plain data here, and makes those of bytes. Every
name, count and shape is checked before it is used.
"""

from __future__ import annotations

import json
import math
import reprlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from taut.coding import Decoder, Encoder
from taut.errors import FormatError, did_you_mean
from taut.packed import FORMATS, PackedWeight

MAGIC = b"TAUT\x01"
DIGEST_BYTES = 8
MOST_HEADER_BYTES = 1 << 24
MOST_NAME = 512
MOST_DIMENSIONS = 8
MOST_DEPTH = 8
MOST_EDITS = 4096
# What a header of a small network repeats anyway; part of version 1 of the format.
DICTIONARY = (
    b'"float32""bfloat16""int64",{"as":"running_mean""running_var""num_batches_tracked"'
    b'"layers.0.embedding.weight_hh_l0""weight_ih_l0""bias_hh_l0""bias_ih_l0""conv1.bias"'
    b'"fc1.bias",[1],["plain.v1"]],["conv2.weight",[64,64,3,3],["sparse.v1",{},{"values":'
    b'["shared_values.v1",{"entries":32},{"table":["plain.v1"]}]}]],["fc2.weight",[10,512],["'
)

Names = tuple[str, ...]
"""Of a tensor: several where it is tied."""

RawEdit = list[Any]
"""A structural edit as JSON: [kind, options]."""


@dataclass(frozen=True)
class Entry:
    """One tensor as the header has it. node: [format, scalars, children]."""

    names: Names
    shape: tuple[int, ...]
    node: list[Any]


@dataclass(frozen=True)
class Content:
    """What a file's header says, and its coded stream. size_bytes: of the whole file."""

    edits: list[RawEdit]
    entries: list[Entry]
    stream: bytes
    size_bytes: int


# ---- writing --------------------------------------------------------------------------------


def encode(state: Mapping[Names, PackedWeight], edits: Sequence[RawEdit] = ()) -> bytes:
    """The bytes of a file that holds these tensors, and what was done to the network before."""
    coder, entries = Encoder(), list[Any]([{"edits": list(edits)}] if edits else [])
    for names, packed in state.items():
        name = names[0] if len(names) == 1 else list(names)
        entries.append([name, list(packed.shape), _node(packed)])
        with coder.inside(names[0]):
            packed.write(coder)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    squeezer = zlib.compressobj(9, wbits=-15, zdict=DICTIONARY)
    header = squeezer.compress(text) + squeezer.flush()
    body = MAGIC + _varint(len(header)) + header + coder.finish()
    data = body + xxhash.xxh3_64_digest(body)
    parse(data)  # refuse to write what would not be read
    return data


def _node(packed: PackedWeight) -> list[Any]:
    children = {name: _node(child) for name, child in packed.nested().items()}
    node = [packed.format, packed.meta(), children]
    while not node[-1]:
        node.pop()
    return node


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


# ---- reading --------------------------------------------------------------------------------


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def read(path: Path) -> Content:
    """What a file says; the container and the header are checked."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    with naming(path):
        return parse(data)


def parse(data: bytes) -> Content:
    """What the bytes of a file say. Raises FormatError where they are damaged or hostile."""
    if data[:4] != MAGIC[:4]:
        what = "a pickle (torch.save)" if data[:2] in (b"\x80\x02", b"PK") else "something else"
        raise FormatError(f"not a .taut file but {what}; it must start with {MAGIC[:4]!r}")
    if len(data) < len(MAGIC) + DIGEST_BYTES + 1:
        raise FormatError(f"{len(data)} bytes are too few for a .taut file; it is truncated")
    if data[:5] != MAGIC:
        raise FormatError(f"format version {data[4]}, this Taut reads version 1; update Taut")
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if xxhash.xxh3_64_digest(body) != digest:
        raise FormatError("the checksum does not match; the file is damaged or truncated")
    length, start = 0, len(MAGIC)
    for shift in range(0, 28, 7):
        byte = body[start] if start < len(body) else 128
        start += 1
        length |= (byte & 127) << shift
        if byte < 128:
            break
    if body[len(MAGIC) : start] != _varint(length):
        raise FormatError("the header's length is damaged")
    if length > len(body) - start:
        raise FormatError(f"the header claims {length} bytes, the file has {len(body) - start}")
    header = _inflate(body[start : start + length])
    if not isinstance(header, list):
        raise FormatError("the header must be a list of tensors")
    edits = _edits(header.pop(0)) if header and isinstance(header[0], dict) else []
    return Content(edits, _entries(header), body[start + length :], len(data))


def _inflate(header: bytes) -> Any:
    most = min(MOST_HEADER_BYTES, 4096 + 256 * len(header))
    inflater = zlib.decompressobj(wbits=-15, zdict=DICTIONARY)
    try:
        text = inflater.decompress(header, most)
        if not inflater.eof or inflater.unused_data:
            raise FormatError(f"the header is damaged or larger than {most} bytes")
        return json.loads(text.decode(), parse_constant=_refuse_constant)
    except FormatError:
        raise
    except (zlib.error, ValueError, RecursionError) as error:
        raise FormatError(f"the header is damaged: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise FormatError(f"the header holds {name}, which is not JSON")


def _edits(item: dict[str, Any]) -> list[RawEdit]:
    edits = item.get("edits")
    if list(item) != ["edits"] or not isinstance(edits, list) or not 0 < len(edits) <= MOST_EDITS:
        raise FormatError(
            f"a header may begin with its edits, at most {MOST_EDITS}, got {reprlib.repr(item)}"
        )
    for edit in edits:
        good = isinstance(edit, list) and len(edit) == 2
        if not (good and _is_name(edit[0]) and isinstance(edit[1], dict)):
            raise FormatError(f"an edit is [kind, options], got {reprlib.repr(edit)}")
    return edits


def _entries(header: list[Any]) -> list[Entry]:
    found, seen = [], set[str]()
    for item in header:
        if not (isinstance(item, list) and len(item) == 3):
            raise FormatError(f"a tensor is [name, shape, format], got {reprlib.repr(item)}")
        names = tuple(item[0]) if isinstance(item[0], list) else (item[0],)
        if not names or not all(_is_name(n) for n in names):
            raise FormatError(
                f"a tensor's name is printable text of up to {MOST_NAME} signs, got "
                f"{reprlib.repr(item[0])}"
            )
        if seen & set(names) or len(set(names)) < len(names):
            raise FormatError(f"tensor {names[0]!r} stands twice in the header")
        seen |= set(names)
        shape = item[1]
        good = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
        if not good or not all(_is_size(n) for n in shape):
            raise FormatError(
                f"{names[0]}: a shape is up to {MOST_DIMENSIONS} sizes, got {reprlib.repr(shape)}"
            )
        _check_node(item[2], names[0], MOST_DEPTH)
        found.append(Entry(names, tuple(shape), item[2]))
    return found


def _is_name(n: Any) -> bool:
    return isinstance(n, str) and 0 < len(n) <= MOST_NAME and n.isprintable()


def _is_size(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**40


def _check_node(node: Any, name: str, depth: int) -> None:
    good = isinstance(node, list) and 1 <= len(node) <= 3 and _is_name(node[0])
    good = good and all(isinstance(part, dict) for part in node[1:])
    good = good and all(isinstance(v, (str, int, float)) for m in node[1:2] for v in m.values())
    if not good or depth == 0:
        raise FormatError(
            f"{name}: a format is [name, scalars, parts], at most {MOST_DEPTH} deep, got "
            f"{reprlib.repr(node)}"
        )
    if node[0] not in FORMATS:
        raise FormatError(f"{name}: no format is named {node[0]!r}{did_you_mean(node[0], FORMATS)}")
    for child in (node[2] if len(node) > 2 else {}).values():
        _check_node(child, name, depth - 1)


def check_claims(entries: list[Entry], size: int) -> None:
    """No file may claim so much that reading it would cost out of proportion to its size."""
    claimed = sum(math.prod(max(n, 1) for n in e.shape) for e in entries)
    most = (1 << 20) + 1000 * size
    if claimed > most:
        raise FormatError(
            f"its tensors claim {claimed:,} numbers, a file of {size:,} bytes may claim {most:,}"
        )


def decode(entries: list[Entry], coder: Decoder) -> dict[Names, PackedWeight]:
    """The tensors of a file. Raises FormatError where its stream is not what they encode to."""
    state = {}
    for entry in entries:
        with coder.inside(entry.names[0]):
            packed = _read(coder, entry.shape, entry.node, entry.names[0])
        if _node(packed) != entry.node:
            raise FormatError(f"{entry.names[0]}: its format has scalars or parts that do nothing")
        state[entry.names] = packed
    coder.finish()
    return state


def _read(coder: Decoder, shape: tuple[int, ...], node: list[Any], name: str) -> PackedWeight:
    meta = node[1] if len(node) > 1 else {}
    children = node[2] if len(node) > 2 else {}

    def child(part: str, its_shape: tuple[int, ...]) -> PackedWeight:
        if part not in children:
            raise FormatError(f"{name}: {node[0]} lacks its part {part!r}")
        with coder.inside(part):
            return _read(coder, its_shape, children[part], name)

    packed = FORMATS[node[0]].read(coder, shape, meta, child)
    if packed.shape != shape:
        raise FormatError(f"{name}: {node[0]} decoded to {packed.shape}, declared {shape}")
    return packed
