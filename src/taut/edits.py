"""Structural edits: what reshaping did to a network, as data that a freshly built one can replay.

A reshaping technique changes a live network and notes each change; `pack` writes the notes into
the file, and `load` replays them before it fills in the numbers. So an edit makes structure only,
and says no more than it must: a cut is the new sizes, a factored layer its path and rank.

An edit never makes a network larger, but for one `Widen`, which at most doubles widths, and for the
constants of the network's own code, which its graph holds: a hostile file cannot cost more than
four times the model that it is loaded into. Its options are JSON: text, whole numbers, truth
values, lists and objects of them; they are checked by their types before they are used.
"""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from taut.errors import FormatError, did_you_mean
from taut.modules import drop_flat_weights, owner


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """One change of a network's structure. Its fields are JSON, and their types are checked."""

    kind: ClassVar[str]
    most: ClassVar[int] = 1
    """How many times larger it may make a network."""
    beyond: ClassVar[int] = 0
    """Numbers that it may add to that: constants of the network's own code."""

    @abstractmethod
    def replay(self, model: nn.Module) -> nn.Module:
        """Change a network in place and return it, or return another one in its place.

        The numbers of new parameters are of no account. Raises FormatError, with the rule and the
        value received, where the network cannot be changed so.
        """


EDITS: dict[str, type[Edit]] = {}
"""Every kind of edit, by the name that files use."""

E = TypeVar("E", bound=Edit)


def register_edit(cls: type[E]) -> type[E]:
    """Make an edit known to files under its class's name in snake_case."""
    cls.kind = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    if cls.kind in EDITS:
        raise FormatError(f"two edits are named {cls.kind!r}; rename one")
    EDITS[cls.kind] = cls
    return cls


def of(model: nn.Module) -> tuple[Edit, ...]:
    """What was done to a network, in order."""
    return cast("tuple[Edit, ...]", model.__dict__.get(_NOTES, ()))


def note(model: nn.Module, edit: Edit) -> None:
    """Remember that this was done to a network."""
    model.__dict__[_NOTES] = (*of(model), edit)


_NOTES = "taut_edits"
"""Where a network keeps its edits: a plain attribute, which copies take along."""


def replay(model: nn.Module, changes: Sequence[Edit]) -> nn.Module:
    """Make these edits on a network, and note them; returns the network that it became."""
    for edit in changes:
        before, held = of(model), _numbers(model)
        try:
            model = edit.replay(model)
        except AttributeError as error:  # a path that leads nowhere
            raise FormatError(
                f"{edit.kind}: {error}; build the model that was compressed"
            ) from error
        if _numbers(model) > edit.most * held + edit.beyond:
            raise FormatError(
                f"{edit.kind}: an edit may not make a network larger, and this one makes "
                f"{_numbers(model):,} numbers of {held:,}"
            )
        model.__dict__[_NOTES] = (*before, edit)
    return model


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in (*model.parameters(), *model.buffers()))


def to_json(changes: Sequence[Edit]) -> list[Any]:
    """The edits as a file holds them: [kind, options] each, defaults left out."""
    return [
        [e.kind, {f.name: v for f in fields(e) if (v := asdict(e)[f.name]) != f.default}]
        for e in changes
    ]


def from_json(raw: Sequence[Any]) -> tuple[Edit, ...]:
    """What `to_json` gave. Raises FormatError for an unknown kind or option, or a wrong type."""
    return tuple(_edit(kind, options) for kind, options in raw)


def _edit(kind: str, options: dict[str, Any]) -> Edit:
    if kind not in EDITS:
        raise FormatError(f"no edit is named {kind!r}{did_you_mean(kind, EDITS)}")
    hints = get_type_hints(EDITS[kind])
    known = {f.name: hints[f.name] for f in fields(EDITS[kind])}
    for name, value in options.items():
        if name not in known:
            raise FormatError(f"{kind} has no option {name!r}{did_you_mean(name, known)}")
        if not _is(value, known[name]):
            raise FormatError(f"{kind}: {name} is of another type, got {reprlib.repr(value)}")
    try:
        return EDITS[kind](**options)
    except TypeError as error:
        raise FormatError(f"{kind}: {error}") from error


def _is(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: bool, int, float, str, list[…], dict[str, …] or A | B."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is list:
        return isinstance(value, list) and all(_is(v, parts[0]) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is(v, parts[1]) for v in value.values())
    return any(_is(value, p) for p in parts) if parts else type(value) is hint


# ---- cuts and copies ------------------------------------------------------------------------


@register_edit
@dataclass(frozen=True, kw_only=True)
class Resize(Edit):
    """Parameters and buffers of smaller sizes, and the numbers that modules hold of them.

    sizes: by dotted name, the new shape; a tied tensor goes by any one of its names. attributes:
    by dotted name (`conv1.in_channels`), the new value, where the old one is a whole number or a
    list of them that is no smaller.
    """

    sizes: dict[str, list[int]]
    attributes: dict[str, int | list[int]]

    def replay(self, model: nn.Module) -> nn.Module:
        for name, size in self.sizes.items():
            self._resize(model, name, size)
        for name, value in self.attributes.items():
            self._set(model, name, value)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                drop_flat_weights(module)
        return model

    def _resize(self, model: nn.Module, name: str, size: list[int]) -> None:
        module, leaf = owner(model, name)
        held = getattr(module, leaf)
        fits = isinstance(held, Tensor) and held.dim() == len(size)
        if not fits or not self._may_become(held.shape, size):
            had = list(held.shape) if isinstance(held, Tensor) else type(held).__name__
            raise FormatError(f"{self.kind}: {name} of shape {had} cannot become {size}")
        replace_tensor(model, held, held.new_zeros(size))

    def _set(self, model: nn.Module, name: str, value: int | list[int]) -> None:
        module, leaf = owner(model, name)
        held = module.__dict__.get(leaf)
        if isinstance(value, int):
            fits = type(held) is int and self._may(held, value)
        else:
            sized = isinstance(held, tuple | list) and len(held) == len(value)
            fits = sized and all(
                type(was) is int and self._may(was, n)
                for was, n in zip(cast("Sequence[Any]", held), value, strict=True)
            )
        if not fits:
            raise FormatError(
                f"{self.kind}: {name}, which is {reprlib.repr(held)}, cannot become {value}"
            )
        setattr(
            module, leaf, tuple(value) if isinstance(value, list) and type(held) is tuple else value
        )

    def _may_become(self, was: Sequence[int], size: Sequence[int]) -> bool:
        """Whether a tensor of as many dimensions may have this shape."""
        return all(n >= 1 and self._may(w, n) for w, n in zip(was, size, strict=True))

    def _may(self, was: int, size: int) -> bool:
        """Whether a number may take another's place."""
        return 0 <= size <= was


@register_edit
@dataclass(frozen=True, kw_only=True)
class Widen(Resize):
    """The same with sizes that are no smaller, and at most twice as large; once in a network."""

    most: ClassVar[int] = 4

    def replay(self, model: nn.Module) -> nn.Module:
        if any(isinstance(e, Widen) for e in of(model)):
            raise FormatError("widen: a network is widened once, and this one was before")
        return super().replay(model)

    def _may_become(self, was: Sequence[int], size: Sequence[int]) -> bool:
        wider = sum(n > w for w, n in zip(was, size, strict=True))
        return wider <= 2 and super()._may_become(was, size)

    def _may(self, was: int, size: int) -> bool:
        return was <= size <= 2 * was


def replace_tensor(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put another tensor in the place of a parameter or buffer, wherever it is tied."""
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for leaf in [n for n, tensor in held.items() if tensor is old]:
                cast("dict[str, Tensor | None]", held)[leaf] = new


def put_layer(model: nn.Module, path: str, made: nn.Module) -> nn.Module:
    """Put a module in the place of a layer, whose mode and hooks it takes over.

    Returns the network: the module itself where the layer is all of it.
    """
    layer = model.get_submodule(path)
    made.train(layer.training)
    for name, held in layer.__dict__.items():
        if name.startswith(("_forward_", "_backward_")):
            made.__dict__[name] = held
    if not path:
        return made
    above, leaf = owner(model, path)
    above.register_module(leaf, made)
    return model
