"""The .taut file: a trained network in, one small and safe file out, and back.

The bytes are the container's (container.py). Here a network becomes named packed weights and the
edits of its structure, and a freshly built one becomes what was stored: its structure first, by
replaying the edits, then every number. Nothing is touched before all of it was checked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from taut import edits
from taut.activations import SUFFIX, InputCode, check_layer, drop_input, input_forms
from taut.coding import Decoder, PartSize
from taut.container import Entry, Names, check_claims, decode, encode, naming, read
from taut.errors import FormatError, did_you_mean
from taut.files import write_atomically
from taut.layers import Packed, pack_layer
from taut.modules import (
    clone,
    device_of,
    owner,
    parametrization,
    parametrized_names,
    plain_copy,
)
from taut.packed import FORMATS, PRECISIONS, PackedWeight, Plain
from taut.recoding import Chain

_log = logging.getLogger("taut")


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
    """What `inspect` tells of a file. overhead_bytes: all but the coded numbers themselves.

    edits: the kinds of what was done to the network's structure, in order.
    """

    size_bytes: int
    overhead_bytes: int
    tensors: tuple[StoredTensor, ...]
    edits: tuple[str, ...] = ()


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
    state = packed_state(model, precision)
    return write_atomically(path, encode(state, edits.to_json(edits.of(model))))


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
            if module.input_code is not None:
                inner.append(f"{prefix}input_code.")
                holds[path + SUFFIX] = id(module.input_code), module.input_code
    for path, form in input_forms(model):
        inner.append(f"{path}.input_form.")
        holds[path + SUFFIX] = id(form), form.pack()
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
    order |= {n: len(order) for n in holds if n.endswith(SUFFIX)}  # codes come last
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


# ---- reading --------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Put what a .taut file holds into a freshly built model, in place, and return it.

    A network whose structure was changed is changed alike first; where it became another one
    altogether (a student), that one is returned. It runs dense until `tune` chooses how each layer
    runs here.

    Raises FormatError for a file that is damaged or no .taut file, and for a model whose tensors
    differ from the file's in name or shape; the model is untouched then.
    """
    content, path = read(Path(path)), Path(path)
    if any(isinstance(m, Packed) for m in model.modules()):
        raise FormatError(f"{path}: the model is packed already; load into a freshly built one")
    with naming(path):
        changes = edits.from_json(content.edits)
        if changes and edits.of(model):
            raise FormatError("the model was reshaped already; load into a freshly built one")
        tried = edits.replay(clone(model), changes) if changes else model
        _check_fits(content.entries, tried)
        state = decode(content.entries, Decoder(content.stream))
    if changes:
        model = edits.replay(model, changes)
    return _filled(model, state)


def packed_copy(model: nn.Module) -> nn.Module:
    """A copy of a network as its file would give it back, nothing rounded but what is recoded.

    It holds packed layers where the model has forms or is packed already.
    """
    kinds = {type(m) for m in model.modules()}
    recoded = Chain in kinds or any(True for _ in input_forms(model))
    if not recoded or any(issubclass(k, Packed) for k in kinds):
        return clone(model).eval()
    state = packed_state(model, "float32")
    copied = plain_copy(model)
    for path, _ in list(input_forms(copied)):
        drop_input(copied, path)
    return _filled(copied, state)


def _filled(model: nn.Module, state: Mapping[Names, PackedWeight]) -> nn.Module:
    """The model with these numbers in place of its own, in place."""
    layers: dict[nn.Module, dict[str, PackedWeight]] = {}
    codes: dict[nn.Module, InputCode] = {}
    with torch.no_grad():
        for names, packed in state.items():
            for name in names:
                module, leaf = owner(model, name.replace(SUFFIX, ".input"))
                if isinstance(packed, InputCode):
                    codes[module] = packed
                elif isinstance(packed, Plain):
                    held = getattr(module, leaf)
                    held.copy_(packed.dense().to(held.dtype))
                else:
                    layers.setdefault(module, {})[leaf] = packed
    device = device_of(model)
    for layer in (*layers, *(c for c in codes if c not in layers)):
        pack_layer(layer, layers.get(layer, {}), codes.get(layer))
        layer.to(device)
    return model.eval()


def inspect(path: str | Path) -> FileSummary:
    """What a file holds and what each part takes, without a model.

    Raises FormatError for a file that is damaged or no .taut file, and for one that claims more
    numbers than a file of its size plausibly holds (a model that is at hand bounds `load`).
    """
    content = read(Path(path))
    coder, size = Decoder(content.stream), content.size_bytes
    with naming(path):
        check_claims(content.entries, size)
        state = decode(content.entries, coder)
    tensors = []
    for names, packed in state.items():
        start = names[0] + "."
        parts = {k[len(start) :]: v for k, v in coder.parts.items() if k.startswith(start)}
        tensors.append(
            StoredTensor(names=names, shape=packed.shape, format=packed.format, parts=parts)
        )
    coded = math.ceil(sum(t.size_bytes for t in tensors))
    return FileSummary(
        size_bytes=size, overhead_bytes=size - coded, tensors=tuple(tensors),
        edits=tuple(kind for kind, _ in content.edits),
    )  # fmt: skip


def _check_fits(entries: list[Entry], model: nn.Module) -> None:
    wants = {n: tuple(t.shape) for n, t in _tensors(model).items()}
    has = {n: e.shape for e in entries for n in e.names if not n.endswith(SUFFIX)}
    _check_codes(entries, model)
    name = type(model).__name__
    lacking, extra = sorted(set(wants) - set(has)), sorted(set(has) - set(wants))
    if lacking or extra:
        parts = [f"the file lacks {', '.join(lacking[:3])}"] if lacking else []
        parts += [f"{name} lacks {', '.join(extra[:3])}"] if extra else []
        raise FormatError(
            f"the file is of another model than {name}: {'; '.join(parts)}; build the model that "
            "was compressed"
        )
    for tensor, shape in wants.items():
        if has[tensor] != shape:
            raise FormatError(
                f"the file is of another model than {name}: {tensor} is {list(has[tensor])} in the "
                f"file and {list(shape)} in the model"
            )


def _check_codes(entries: list[Entry], model: nn.Module) -> None:
    """Codes of inputs stand under the names of layers that can take them, and nowhere else."""
    for entry in entries:
        codes = [n for n in entry.names if n.endswith(SUFFIX)]
        if issubclass(FORMATS[entry.node[0]], InputCode) != (codes == list(entry.names)):
            raise FormatError(
                f"{entry.names[0]}: {entry.node[0]} stands where it cannot: what an input is "
                f"rounded to goes by the name of a layer and {SUFFIX!r}, and nothing else does"
            )
        for name in codes:
            check_layer(model, name)
