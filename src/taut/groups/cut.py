"""The cut itself: parameters, buffers and the numbers that follow, in place, or not at all.

    W' = W[kept rows][:, kept columns]…   for every member of the groups

After a cut the network runs once on the example; where it fails, or a layer's width or an output's
shape is not what was planned, everything is put back and the reason is given. Where it was open
which number of a module follows (a head's width may equal the number of heads), or the network took
other steps, it is exported too, and every tensor in it must have the shape that was planned.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from taut import edits
from taut.edits import Resize, Widen
from taut.errors import RecipeError
from taut.groups.attributes import Slot, put, ways
from taut.groups.find import Cuts, Groups, Times
from taut.groups.flow import module_stack, op_name, shape_of
from taut.groups.running import Shapes, run
from taut.modules import owner
from taut.trace import export


def cut(model: nn.Module, groups: Groups, keep: Cuts) -> Resize:
    """Keep these units of these groups, and no others, in place; returns the edit, which is noted.

    A unit that is to be kept twice is copied, with all that it is made of and all that reads it.

    groups: of this very network, or one of the same shapes. Raises RecipeError where the model is
    another, where units are kept that are none, and where the network would not run: the model is
    as it was then.
    """
    sizes, before = slice_tensors(model, groups, keep)
    reasons: list[str] = []
    for values, sure in ways(model, groups, keep):
        old = {slot: _held(model, slot) for slot in values}
        put(model, values)
        try:
            wrong = _check(model, groups, keep, sure)
        except Exception as error:  # whatever the network makes of other sizes
            wrong = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if not wrong:
            grown = any(len(k) > groups[name].units for name, k in keep.items())
            made = (Widen if grown else Resize)(sizes=sizes, attributes=_as_data(model, values))
            edits.note(model, made)
            return made
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


def slice_tensors(
    model: nn.Module, groups: Groups, keep: Cuts
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Cut the parameters and buffers alone; returns their new sizes, and what they held before."""
    _check_fits(model, groups)
    planned, times = groups.shapes(keep), groups.times(keep)
    before: dict[str, Tensor] = {}
    sizes: dict[str, list[int]] = {}
    with torch.no_grad():
        for name, (_, _, dims) in groups.tensors.items():
            module, leaf = owner(model, name)
            held: Tensor = getattr(module, leaf)
            if planned[name] == tuple(held.shape):
                continue
            before[name], new = held.data, held.data
            for dim, labels in enumerate(dims):
                places = torch.from_numpy(groups.kept(labels, times)).to(held.device)
                if len(places) != len(labels):
                    new = new.index_select(dim, places)
            held.data = new.contiguous()
            held.grad = None
            sizes[name] = list(planned[name])
    return sizes, before


def _as_data(model: nn.Module, values: dict[Slot, int]) -> dict[str, int | list[int]]:
    """The attributes as an edit says them, lists whole."""
    found: dict[str, int | list[int]] = {}
    for path, name, index in values:
        value = getattr(model.get_submodule(path), name)
        found[f"{path}.{name}" if path else name] = value if index < 0 else list(value)
    return found


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


def _check(model: nn.Module, groups: Groups, keep: Cuts, sure: bool) -> str:
    """Run the network; what is not as planned, empty where all is well."""
    before, ran = groups.ran, run(model, groups.example)
    if before.widths.keys() != ran.widths.keys():
        return f"{min(before.widths.keys() ^ ran.widths.keys())} does not run as before"
    for path, wanted in planned_widths(groups, keep).items():
        if ran.widths[path] != wanted:
            return f"{path} gives {list(ran.widths[path])}, planned were {list(wanted)}"
    if ran.outputs != before.outputs:
        return f"the outputs are {ran.outputs[:3]}, not {before.outputs[:3]}"
    return "" if sure and ran.steps == before.steps else _compare(model, groups, groups.times(keep))


def _compare(model: nn.Module, groups: Groups, times: Times) -> str:
    """Step by step, the graph of the cut network against the plan; empty where all is well."""
    before, after = (
        [n for n in g.graph.nodes if n.op == "call_function" and op_name(n) not in _FLEETING]
        for g in (groups.graph, export(model, groups.example)[1].graph_module)
    )
    if [op_name(n) for n in before] != [op_name(n) for n in after]:
        return "it computes by other steps than before"
    for old, new in zip(before, after, strict=True):
        if groups.planned(old, times) != shape_of(new):
            return (
                f"{op_name(old)} in {(module_stack(old) or [''])[-1] or 'the model'} gives "
                f"{list(shape_of(new))}, planned were {list(groups.planned(old, times))}"
            )
    return ""


_FLEETING = {"alias", "slice", "expand", "contiguous", "clone", "_assert_tensor_metadata"}
"""Operations that an export leaves out where they do nothing."""


def planned_widths(groups: Groups, keep: Cuts) -> Shapes:
    """What each layer should give after a cut, where its output is the last that it computes."""
    times = groups.times(keep)
    last = {}
    for node in groups.graph.graph.nodes:
        stack = module_stack(node)
        if stack and node.op == "call_function":
            last[stack[-1]] = node
    return {
        path: groups.planned(node, times)
        for path, node in last.items()
        if groups.ran.widths.get(path) == shape_of(node)
    }
