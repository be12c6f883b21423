"""The cut itself: parameters, buffers and the numbers that follow, in place, or not at all.

    W' = W[kept rows][:, kept columns]…   for every member of the groups

After a cut the network runs once on the example; where it fails, or a layer's width or an output's
shape is not what was planned, everything is put back and the reason is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.groups.attributes import Slot, put, ways
from taut.groups.find import Cuts, Groups
from taut.groups.flow import module_stack, shape_of
from taut.groups.running import Shapes, run
from taut.modules import owner


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a cut changed: the new shapes of tensors, by every name, and attributes of modules."""

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[Slot, int]


def cut(model: nn.Module, groups: Groups, keep: Cuts) -> Cut:
    """Keep these units of these groups, and no others, in place.

    groups: of this very network, or one of the same shapes. Raises RecipeError where the model is
    another, where units are kept that are none, and where the network would not run: the model is
    as it was then.
    """
    _check_fits(model, groups)
    planned, dead = groups.shapes(keep), groups.dead(keep)
    before: dict[str, Tensor] = {}
    shapes: Shapes = {}
    with torch.no_grad():
        for name, (names, _, dims) in groups.tensors.items():
            module, leaf = owner(model, name)
            held: Tensor = getattr(module, leaf)
            if planned[name] == tuple(held.shape):
                continue
            before[name], new = held.data, held.data
            for dim, labels in enumerate(dims):
                places = torch.from_numpy(groups.kept(labels, dead)).to(held.device)
                if len(places) < len(labels):
                    new = new.index_select(dim, places)
            held.data = new.contiguous()
            held.grad = None
            shapes.update(dict.fromkeys(names, planned[name]))
    reasons: list[str] = []
    for values in ways(model, groups, keep):
        old = {slot: _held(model, slot) for slot in values}
        put(model, values)
        try:
            wrong = _check(model, groups, keep)
        except Exception as error:  # whatever the network makes of other sizes
            wrong = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if not wrong:
            return Cut(shapes=shapes, attributes=values)
        reasons.append(wrong)
        put(model, old)
    for name, value in before.items():
        module, leaf = owner(model, name)
        getattr(module, leaf).data = value
    raise RecipeError(
        f"cut: the network does not run with {', '.join(itertools.islice(keep, 3))} cut "
        f"({reasons[0]}); it is as it was. A size may stand in its code as a plain number: hold it "
        "in an attribute, or leave the group whole"
    )


def _held(model: nn.Module, slot: Slot) -> int:
    value: Any = getattr(model.get_submodule(slot[0]), slot[1])
    return int(value if slot[2] < 0 else value[slot[2]])


def _check_fits(model: nn.Module, groups: Groups) -> None:
    for names, value, _ in groups.tensors.values():
        for name in names:
            try:
                module, leaf = owner(model, name)
                shape = tuple(getattr(module, leaf).shape)
            except AttributeError:
                shape = ()
            if shape != tuple(value.shape):
                raise RecipeError(
                    f"cut: {name} is {list(shape)} in the model and {list(value.shape)} in its "
                    "groups; find the groups of the network as it is now"
                )


def _check(model: nn.Module, groups: Groups, keep: Cuts) -> str:
    """Run the network; what is not as planned, empty where all is well."""
    widths, outputs = run(model, groups.example)
    for path, wanted in planned_widths(groups, keep).items():
        if widths.get(path, wanted) != wanted:
            return f"{path} gives {list(widths[path])}, planned were {list(wanted)}"
    if outputs != groups.outputs:
        return f"the outputs are {outputs[:3]}, not {groups.outputs[:3]}"
    return ""


def planned_widths(groups: Groups, keep: Cuts) -> Shapes:
    """What each layer should give after a cut, where its output is the last that it computes."""
    dead = groups.dead(keep)
    last = {}
    for node in groups.graph.graph.nodes:
        stack = module_stack(node)
        if stack and node.op == "call_function":
            last[stack[-1]] = node
    return {
        path: groups.planned(node, dead)
        for path, node in last.items()
        if groups.widths.get(path) == shape_of(node)
    }
