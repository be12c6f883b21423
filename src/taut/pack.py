"""The .taut file: a trained network in, one small and safe file out, and back.

docs/format.md is the specification. The container knows formats by their registered names and
techniques not at all; it holds no code. Every name, count and shape is checked, against the model
too, before it is used.
"""

from __future__ import annotations

import json
import logging
import math
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import xxhash
from torch import Tensor, nn

from taut.coding import Decoder, Encoder, PartSize
from taut.errors import FormatError, did_you_mean
from taut.files import write_atomically
from taut.layers import Packed, pack_layer
from taut.modules import device_of, owner, parametrization, parametrized_names
from taut.recoding import FORMATS, PRECISIONS, Chain, PackedWeight, Plain

_log = logging.getLogger("taut")

MAGIC = b"TAUT\x01"
DIGEST_BYTES = 8
MOST_HEADER_BYTES = 1 << 24
MOST_NAME = 512
MOST_DIMENSIONS = 8
MOST_DEPTH = 8
MOST_SPARE = 1 << 16  # numbers that a part may hold beyond all that the tensors have
# What a header of a small network repeats anyway; part of version 1 of the format.
DICTIONARY = (
    b'"float32""bfloat16""int64",{"as":"running_mean""running_var""num_batches_tracked"'
    b'"layers.0.embedding.weight_hh_l0""weight_ih_l0""bias_hh_l0""bias_ih_l0""conv1.bias"'
    b'"fc1.bias",[1],["plain.v1"]],["conv2.weight",[64,64,3,3],["sparse.v1",{},{"values":'
    b'["shared_values.v1",{"entries":32},{"table":["plain.v1"]}]}]],["fc2.weight",[10,512],["'
)

Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a file: its names (several where it is tied), its format, what parts take."""

    names: Names
    shape: tuple[int, ...]
    format: str
    parts: Mapping[str, PartSize]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> float:
        """Its share of the coded stream."""
        return sum(p.bits for p in self.parts.values()) / 8


@dataclass(frozen=True, kw_only=True)
class FileSummary:
    """What `inspect` tells of a file. overhead_bytes: all but the coded numbers themselves."""

    size_bytes: int
    overhead_bytes: int
    tensors: tuple[StoredTensor, ...]


# ---- writing --------------------------------------------------------------------------------


def pack(model: nn.Module, path: str | Path, precision: str = "auto") -> int:
    """Write a network as a .taut file; returns its size in bytes.

    model: any network, its sites recoded or not, or one that was loaded from a .taut file.
    precision: of the numbers that no technique recodes (biases, norms): float32, float16,
        bfloat16, or auto, which is float16 where that rounds by less than 2**-10 of the tensor's
        own scale, else float32.

    Raises FormatError for what a file cannot hold: complex numbers, numbers too large for the
    precision, state that is no tensor. Raises RunError where the file cannot be written.
    """
    check_precision(precision)
    return write_atomically(path, encode(packed_state(model, precision)))


def check_precision(precision: str) -> None:
    """Raise FormatError for a precision that pack does not know."""
    choices = ("auto", *(n for n, d in PRECISIONS.items() if d.is_floating_point))
    if precision not in choices:
        near = did_you_mean(precision, choices)
        raise FormatError(f"pack: there is no precision {precision!r}{near}")


def packed_state(model: nn.Module, precision: str = "auto") -> dict[Names, PackedWeight]:
    """Every parameter and buffer of a model as a packed weight: recoded ones, then the others."""
    found: dict[Names, PackedWeight] = {}
    early: list[str] = []
    made: dict[int, PackedWeight] = {}
    for names, source in _tied(model).items():
        try:
            if isinstance(source, PackedWeight):
                found[names] = source
            elif isinstance(source, Tensor):
                found[names] = Plain.of(source, precision)
            else:
                links, core = source
                found[names] = links.pack(core, precision, made)
                early += [names[0]] * (not links.settled())
        except FormatError as error:
            raise FormatError(f"pack: {names[0]}: {error}") from error
    if early:
        _log.warning(
            "pack: %s %s not at full strength yet: train on to the end of the schedule "
            "(taut.attach_schedules, or recover)",
            ", ".join(early), "is" if len(early) == 1 else "are",
        )  # fmt: skip
    return found


def _tied(model: nn.Module) -> dict[Names, PackedWeight | Tensor | tuple[Chain, Tensor]]:
    """What holds each tensor of the model, with the names of tied ones joined."""
    holds: dict[str, tuple[object, PackedWeight | Tensor | tuple[Chain, Tensor]]] = {}
    inner: list[str] = []  # where the parts lie that a weight stands for
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, Packed):
            inner.append(f"{prefix}packed.")
            for name, packed in module.packed.items():
                assert isinstance(packed, PackedWeight)
                holds[prefix + name] = id(packed), packed
    for name in parametrized_names(model):
        found = parametrization(model, name)
        assert found is not None
        if not isinstance(found[0], Chain):
            continue  # the user's own: what it computes from is stored
        if len(found) > 1:
            raise FormatError(
                f"pack: {name} carries another parametrization on top of Taut's; remove it first "
                "by torch.nn.utils.parametrize"
            )
        path, _, leaf = f".{name}".rpartition(".")
        inner.append(f"{path}.parametrizations.{leaf}."[1:])
        holds[name] = (id(found.original), id(found[0])), (found[0], found.original)
    plain = _tensors(model)
    for name, value in plain.items():
        if not name.startswith(tuple(inner)):
            holds[name] = id(value), value
    order = {n: i for i, n in enumerate(plain)}
    joined: dict[object, list[str]] = {}
    for name in sorted(holds, key=lambda n: order.get(n, -1)):
        joined.setdefault(holds[name][0], []).append(name)
    return {tuple(names): holds[names[0]][1] for names in joined.values()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model, by every name."""
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise FormatError(
                f"{type(model).__name__}: {name} is {type(value).__name__}; a .taut file holds "
                "tensors only, so keep such state out of the model"
            )
    return state


def encode(state: Mapping[Names, PackedWeight]) -> bytes:
    """The bytes of a file that holds these tensors."""
    coder, entries, known = Encoder(), [], dict[int, str]()
    for names, packed in state.items():
        name = names[0] if len(names) == 1 else list(names)
        entries.append([name, list(packed.shape), _node(packed, names[0], known)])
        with coder.inside(names[0]):
            packed.write(coder)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    squeezer = zlib.compressobj(9, wbits=-15, zdict=DICTIONARY)
    header = squeezer.compress(text) + squeezer.flush()
    body = MAGIC + _varint(len(header)) + header + coder.finish()
    data = body + xxhash.xxh3_64_digest(body)
    _parse(data)  # refuse to write what would not be read
    return data


def _node(packed: PackedWeight, path: str, known: dict[int, str]) -> list[Any]:
    """What the header says of a weight. known: the parts so far, by their ids; each comes once."""
    children: dict[str, Any] = {}
    for part, child in packed.nested().items():
        here = f"{path}.{part}"
        first = known.setdefault(id(child), here)
        children[part] = _node(child, here, known) if first == here else first
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


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Put the weights of a .taut file into a freshly built model, in place, and return it.

    It runs dense until `tune` chooses how each layer runs here.

    Raises FormatError for a file that is damaged or no .taut file, and for a model whose tensors
    differ from the file's in name or shape; the model is untouched then.
    """
    entries, stream, _ = _open(Path(path))
    _check_fits(entries, model, Path(path))
    with _naming(path):
        state = _decode(entries, Decoder(stream))
    layers: dict[nn.Module, dict[str, PackedWeight]] = {}
    with torch.no_grad():
        for names, packed in state.items():
            for name in names:
                module, leaf = owner(model, name)
                if isinstance(packed, Plain):
                    held = getattr(module, leaf)
                    held.copy_(packed.dense().to(held.dtype))
                else:
                    layers.setdefault(module, {})[leaf] = packed
    device = device_of(model)
    for layer, weights in layers.items():
        pack_layer(layer, weights)
        layer.to(device)
    return model.eval()


def inspect(path: str | Path) -> FileSummary:
    """What a file holds and what each part takes, without a model.

    Raises FormatError for a file that is damaged or no .taut file, and for one that claims more
    numbers than a file of its size plausibly holds (a model that is at hand bounds `load`).
    """
    entries, stream, size = _open(Path(path))
    coder = Decoder(stream)
    with _naming(path):
        _check_claims(entries, size)
        state = _decode(entries, coder)
    tensors = []
    for names, packed in state.items():
        start = names[0] + "."
        parts = {k[len(start) :]: v for k, v in coder.parts.items() if k.startswith(start)}
        tensors.append(
            StoredTensor(names=names, shape=packed.shape, format=packed.format, parts=parts)
        )
    coded = math.ceil(sum(t.size_bytes for t in tensors))
    return FileSummary(size_bytes=size, overhead_bytes=size - coded, tensors=tuple(tensors))


@dataclass(frozen=True)
class _Entry:
    names: Names
    shape: tuple[int, ...]
    node: list[Any]


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def _open(path: Path) -> tuple[list[_Entry], bytes, int]:
    """The entries, the coded stream and the file's size; the container and header are checked."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    with _naming(path):
        return *_parse(data), len(data)


def _parse(data: bytes) -> tuple[list[_Entry], bytes]:
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
    return _entries(_inflate(body[start : start + length])), body[start + length :]


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


def _entries(header: Any) -> list[_Entry]:
    if not isinstance(header, list):
        raise FormatError("the header must be a list of tensors")
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
        found.append(_Entry(names, tuple(shape), item[2]))
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
        if not isinstance(child, str):  # the path of an earlier part
            _check_node(child, name, depth - 1)


def _check_claims(entries: list[_Entry], size: int) -> None:
    """No file may claim so much that reading it would cost out of proportion to its size."""
    claimed = sum(math.prod(max(n, 1) for n in e.shape) for e in entries)
    most = (1 << 20) + 1000 * size
    if claimed > most:
        raise FormatError(
            f"its tensors claim {claimed:,} numbers, a file of {size:,} bytes may claim {most:,}"
        )


def _check_fits(entries: list[_Entry], model: nn.Module, path: Path) -> None:
    if any(isinstance(m, Packed) for m in model.modules()):
        raise FormatError(f"{path}: the model is packed already; load into a freshly built one")
    wants = {n: tuple(t.shape) for n, t in _tensors(model).items()}
    has = {n: e.shape for e in entries for n in e.names}
    name = type(model).__name__
    lacking, extra = sorted(set(wants) - set(has)), sorted(set(has) - set(wants))
    if lacking or extra:
        parts = [f"the file lacks {', '.join(lacking[:3])}"] if lacking else []
        parts += [f"{name} lacks {', '.join(extra[:3])}"] if extra else []
        raise FormatError(
            f"{path} is of another model than {name}: {'; '.join(parts)}; build the model that "
            "was compressed"
        )
    for tensor, shape in wants.items():
        if has[tensor] != shape:
            raise FormatError(
                f"{path} is of another model than {name}: {tensor} is {list(has[tensor])} in the "
                f"file and {list(shape)} in the model"
            )


def _decode(entries: list[_Entry], coder: Decoder) -> dict[Names, PackedWeight]:
    reader, state, known = _Reader(entries, coder), {}, dict[int, str]()
    for entry in entries:
        name = entry.names[0]
        with coder.inside(name):
            packed = reader.read(entry.shape, entry.node, name, name)
        if _node(packed, name, known) != entry.node:
            raise FormatError(f"{name}: its format has scalars or parts that do nothing")
        state[entry.names] = packed
    coder.finish()
    return state


class _Reader:
    """Decodes tensors one after another; a part of one may be the very part of an earlier one."""

    def __init__(self, entries: list[_Entry], coder: Decoder) -> None:
        self.coder = coder
        self.most = MOST_SPARE + sum(math.prod(e.shape) for e in entries)
        self.parts: dict[str, PackedWeight] = {}

    def read(self, shape: tuple[int, ...], node: list[Any], name: str, path: str) -> PackedWeight:
        """A weight of this shape. name: of its tensor, path: of the part of it."""
        meta = node[1] if len(node) > 1 else {}
        children = node[2] if len(node) > 2 else {}

        def child(part: str, its_shape: tuple[int, ...]) -> PackedWeight:
            if part not in children:
                raise FormatError(f"{name}: {node[0]} lacks its part {part!r}")
            if math.prod(its_shape) > self.most:
                raise FormatError(
                    f"{name}: its part {part!r} claims {math.prod(its_shape):,} numbers, more than "
                    "all tensors have"
                )
            its_node, here = children[part], f"{path}.{part}"
            if isinstance(its_node, str):
                return self.earlier(its_node, its_shape, here)
            with self.coder.inside(part):
                found = self.read(its_shape, its_node, name, here)
            self.parts[here] = found
            return found

        packed = FORMATS[node[0]].read(self.coder, shape, meta, child)
        if packed.shape != shape:
            raise FormatError(f"{name}: {node[0]} decoded to {packed.shape}, declared {shape}")
        return packed

    def earlier(self, where: str, shape: tuple[int, ...], path: str) -> PackedWeight:
        found = self.parts.get(where)
        if found is None or found.shape != shape:
            is_of = "no earlier part" if found is None else f"of the shape {list(found.shape)}"
            raise FormatError(
                f"{path}, of the shape {list(shape)}, is to be the same as {reprlib.repr(where)}, "
                f"which is {is_of}"
            )
        return found
