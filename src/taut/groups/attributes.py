"""Numbers that modules hold and their code sizes tensors by: which ones follow a cut, and how.

An attribute follows where PyTorch's layers name it (`in_features`), where a number of its value
stands in a reshape, a split or a convolution of the module's code (`num_heads`), or where it equals
a dimension of a parameter in the module or right below it (`all_head_size`). Where that leaves
several values, or equality may be chance, the ways are returned in the order in which to try them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from taut.groups.find import Cuts, Groups

Slot = tuple[str, str, int]
"""A module's path, an attribute of it, and the index in it (-1 for a plain number)."""
MOST_WAYS = 64


@dataclass
class _Votes:
    """What is known of one attribute: values by a name, by literals, by shapes near it."""

    named: dict[int, None] = field(default_factory=dict)
    literal: dict[int, None] = field(default_factory=dict)
    near: dict[int, None] = field(default_factory=dict)


def slots(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """The whole numbers above one that a module holds: attribute, index, value."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield name, -1, value
        elif type(value) in (tuple, list) and len(value) < 8:
            yield from ((name, i, v) for i, v in enumerate(value) if type(v) is int and v > 1)


def ways(model: nn.Module, groups: Groups, cuts: Cuts) -> Iterator[tuple[dict[Slot, int], bool]]:
    """The attributes that change with a cut and their new values, the likeliest way first.

    With each way, whether it is beyond doubt: a network may run with two numbers mixed up.
    """
    votes, held = _votes(model, groups, cuts)
    sure: dict[Slot, int] = {}
    open_: dict[tuple[Any, ...], list[Slot]] = {}
    doubt = False
    for slot, vote in votes.items():
        old = held[slot]
        options = list(vote.named or vote.literal or vote.near)
        changed = [v for v in options if v != old]
        if not changed:
            continue
        if len(options) == 1 and (vote.named or vote.literal):
            sure[slot] = changed[0]
            continue
        doubt |= bool(vote.literal)
        stays = old in options  # a kernel as large as a width, heads as many as each is wide
        order = (old, *changed) if stays else (*changed, old)
        kind = type(model.get_submodule(slot[0])).__qualname__
        open_.setdefault((kind, slot[1], slot[2], order), []).append(slot)
    choices = list(itertools.product(*(range(len(key[3])) for key in itertools.islice(open_, 10))))
    choices.sort(key=lambda c: sum(i > 0 for i in c))
    rest = len(open_) - min(len(open_), 10)
    for choice in choices[:MOST_WAYS]:
        way = dict(sure)
        for (key, where), pick in zip(open_.items(), (*choice, *[0] * rest), strict=True):
            way.update(dict.fromkeys(where, key[3][pick]))
        yield {s: v for s, v in way.items() if v != held[s]}, not doubt and not any(choice)


def _votes(
    model: nn.Module, groups: Groups, cuts: Cuts
) -> tuple[dict[Slot, _Votes], dict[Slot, int]]:
    modules = dict(model.named_modules())
    held = {(p, a, i): v for p, m in modules.items() for a, i, v in slots(m)}
    by_value: dict[tuple[str, int], list[Slot]] = {}
    for slot, value in held.items():
        by_value.setdefault((slot[0], value), []).append(slot)
    votes: dict[Slot, _Votes] = {}
    times = groups.times(cuts)
    for literal in groups.flow.literals:
        new = literal.value
        if literal.labels is not None:
            new = len(groups.kept(literal.labels, times))
        stack = [p for p in reversed(literal.modules) if p in modules]
        if literal.name:
            named = (stack[0] if stack else "", literal.name, -1)
            if held.get(named) == literal.value:
                votes.setdefault(named, _Votes()).named[new] = None
            continue
        found = next((s for p in stack if (s := by_value.get((p, literal.value)))), [])
        for slot in found:
            votes.setdefault(slot, _Votes()).literal[new] = None
    for name, shape in groups.shapes(cuts).items():
        before = groups.tensors[name][1].shape
        for alias in groups.tensors[name][0]:
            path = alias.rpartition(".")[0]
            for place in dict.fromkeys((path, path.rpartition(".")[0])):
                for old, new in zip(before, shape, strict=True):
                    for slot in by_value.get((place, int(old)), []):
                        votes.setdefault(slot, _Votes()).near[new] = None
    return votes, held


def put(model: nn.Module, values: Mapping[Slot, int]) -> None:
    """Set attributes."""
    for (path, name, index), value in values.items():
        module = model.get_submodule(path)
        held = getattr(module, name)
        if index >= 0:
            several = list(held)
            several[index] = value
            setattr(module, name, type(held)(several))
        else:
            setattr(module, name, value)
