"""A network as its exported graph, with other numbers where its code has plain ones.

A literal in a forward cannot be set from outside, and some layers of PyTorch's compute one size
from another (its attention takes the width of its heads from the width of its input). There the
graph takes the network's place: an ordinary module of the same parameter names that trains, for any
batch where the network took any, with linear layers where nothing else reads their weights. It is
of eval mode: dropout is no part of it any more; batch norms are, and follow train() and eval().
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from taut import edits
from taut.edits import Edit, Resize, register_edit
from taut.errors import FormatError, RecipeError, TraceError
from taut.groups.cut import slice_tensors
from taut.groups.find import Cuts, Groups
from taut.groups.flow import op_name, shape_of
from taut.groups.running import run
from taut.trace import Example, export


@register_edit
@dataclass(frozen=True, kw_only=True)
class AsGraph(Edit):
    """The network becomes the graph that it runs on inputs of these shapes.

    shapes, dtypes: of the tensors that it is given in order; names: of those given by name, which
    are the last. numbers: for some steps, by their number in the graph, triples of an argument, a
    place in it (-1 where it is no list) and the value there; places of a view may be -1.
    """

    beyond: ClassVar[int] = 1 << 20
    shapes: list[list[int]]
    dtypes: list[str]
    names: list[str]
    numbers: dict[str, list[int]]

    def replay(self, model: nn.Module) -> nn.Module:
        try:
            graph = as_graph(model, self.example())
        except TraceError as error:
            raise FormatError(f"as_graph: {error}") from error
        steps = list(steps_of(graph))
        for key, flat in self.numbers.items():
            if not key.isdecimal() or int(key) >= len(steps) or len(flat) % 3:
                raise FormatError(
                    f"as_graph: the graph has {len(steps)} steps and three numbers for each place, "
                    f"got {flat[:6]} for step {key[:20]!r}"
                )
            for i in range(0, len(flat), 3):
                _set(steps[int(key)], *flat[i : i + 3])
        graph.recompile()
        return graph

    def example(self) -> Example:
        """Zeros of the shapes."""
        known = {str(d).removeprefix("torch."): d for d in _DTYPES}
        sizes = sum(math.prod(s) for s in self.shapes)
        if len(self.shapes) != len(self.dtypes) or len(self.names) > len(self.shapes):
            raise FormatError("as_graph: each input has a shape and a dtype")
        if not set(self.dtypes) <= known.keys() or not 0 <= sizes < _MOST_INPUTS:
            raise FormatError(
                f"as_graph: inputs are of {', '.join(known)} and hold less than {_MOST_INPUTS:,} "
                f"numbers, got {self.shapes} of {self.dtypes}"
            )
        try:
            made = [
                torch.zeros(shape, dtype=known[dtype])
                for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
            ]
        except RuntimeError as error:
            raise FormatError(f"as_graph: inputs of {self.shapes}: {error}") from error
        first = len(made) - len(self.names)
        return tuple(made[:first]), dict(zip(self.names, made[first:], strict=True))


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
           torch.uint8, torch.bool)  # fmt: skip
_MOST_INPUTS = 1 << 28


def _set(node: fx.Node, argument: int, place: int, value: int) -> None:
    held = node.args[argument] if 0 <= argument < len(node.args) else None
    listed = isinstance(held, list | tuple) and 0 <= place < len(held)
    was = cast("list[Any]", held)[place] if listed else held
    fits = (listed or place == -1) and (isinstance(was, fx.Node) or type(was) is int)
    if not fits or not (value == -1 or 0 < value <= (was if type(was) is int else value)):
        raise FormatError(
            f"as_graph: {node.name} has no number at argument {argument}, place {place}, that can "
            f"become {value}"
        )
    if not listed:
        node.update_arg(argument, value)
        return
    several = list(cast("list[Any]", held))
    several[place] = value
    node.update_arg(argument, several)


class _Norm(nn.Module):
    """Batch norm by the mode that the graph is in."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor
    ) -> Tensor:
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)


class GraphNet(fx.GraphModule):
    """A graph as a network. Its copies keep the edits that were noted on it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphNet:
        with warnings.catch_warnings():  # PyTorch's own, of its specs of arguments
            warnings.simplefilter("ignore", FutureWarning)
            copied = cast(GraphNet, super().__deepcopy__(memo))
        for path, module in self.named_modules():  # which buffers no file holds
            copied.get_submodule(path)._non_persistent_buffers_set = {
                *module._non_persistent_buffers_set
            }
        for edit in edits.of(self):
            edits.note(copied, edit)
        return copied


def as_graph(model: nn.Module, example: Example) -> fx.GraphModule:
    """The graph of a network as a module of its own, for any batch where the network takes any."""
    module: Any = export(model, example, any_batch=True)[1].module()
    for node in list(module.graph.nodes):
        node.meta.pop("nn_module_stack", None)  # those modules are no more
        if node.op == "call_module" and "guards" in str(node.target):
            module.graph.erase_node(node)
        elif node.op == "call_function" and op_name(node) == "batch_norm" and node.args[3]:
            x, weight, bias, mean, variance, _, momentum, eps = node.args[:8]
            name = f"batch_norm_{node.name}"
            module.add_module(name, _Norm(momentum, eps))
            with module.graph.inserting_before(node):
                norm = module.graph.call_module(name, (x, weight, bias, mean, variance))
            norm.meta = node.meta
            node.replace_all_uses_with(norm)
            module.graph.erase_node(node)
        elif node.op == "call_function" and op_name(node) == "linear":
            _as_layer(module, node)
    own = {*model.state_dict(), *(n for n, _ in model.named_buffers(remove_duplicate=False))}
    graph = GraphNet(module, module.graph).eval()
    for name in graph.state_dict().keys() - own:  # the code makes its constants, no file holds them
        path, _, leaf = name.rpartition(".")
        graph.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    return graph


def _as_layer(module: fx.GraphModule, node: fx.Node) -> None:
    """Make a product by a weight that nothing else reads a linear layer again.

    What is compressed then runs packed, and what it reads can be rounded.
    """
    x, *read = node.args
    tensors_read = [a for a in read if isinstance(a, fx.Node) and a.op == "get_attr"]
    names = [str(a.target) for a in tensors_read]
    path = names[0].rpartition(".")[0] if names else ""
    wanted = [f"{path}.weight", f"{path}.bias"][: len(read)]
    if not path or names != wanted or any(len(a.users) > 1 for a in tensors_read):
        return
    held = module.get_submodule(path)
    tensors = dict(held.named_parameters())
    same = {f"{path}.{n}" for n in tensors} == set(wanted)
    if not same or [*held.buffers()] or tensors["weight"].dim() != 2:
        return
    rows, columns = tensors["weight"].shape
    layer = nn.Linear(columns, rows, bias=len(read) > 1, device="meta")
    for name, tensor in tensors.items():
        setattr(layer, name, tensor)
    module.set_submodule(path, layer)
    with module.graph.inserting_before(node):
        called = module.graph.call_module(path, (x,))
    called.meta = node.meta
    node.replace_all_uses_with(called)
    for gone in (node, *tensors_read):
        module.graph.erase_node(gone)


def steps_of(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that make tensors, in order."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        made = value[0] if isinstance(value, list | tuple) and value else value
        if node.op in ("call_function", "call_module") and isinstance(made, Tensor):
            yield node


def cut_graph(model: nn.Module, groups: Groups, keep: Cuts) -> nn.Module:
    """The network as a graph in which these units are kept; the network itself stays as it is.

    Raises RecipeError where that does not run either, or the example is more than tensors.
    """
    made = _plan(model, groups, keep)
    try:
        graph = edits.replay(model, [made])  # export copies
        sizes = slice_tensors(graph, groups, keep)[0]
        resized = Resize(sizes=sizes, attributes=_features(graph))
        outputs = run(graph, groups.example).outputs
        larger = _larger(groups.example, groups.batch)
        takes_any = _runs(groups.model, larger)
    except Exception as error:
        raise RecipeError(
            f"cut: the network does not run as a graph either ({type(error).__name__}: "
            f"{(str(error).strip().splitlines() or [''])[0]}); leave {next(iter(keep))} whole"
        ) from error
    if outputs != groups.ran.outputs:
        raise RecipeError(f"cut: as a graph the network gives {outputs}, not {groups.ran.outputs}")
    if takes_any and not _runs(graph, larger):
        raise RecipeError(
            f"cut: the network's graph would take batches of {groups.batch} only: its code makes a "
            "number of the batch size, as len(x) does; write x.shape[0]"
        )
    edits.note(graph, resized)
    return graph.train(model.training)


def _features(graph: nn.Module) -> dict[str, int | list[int]]:
    """The sizes of linear layers that were cut, which they hold as numbers, too."""
    layers = [(n, m) for n, m in graph.named_modules() if isinstance(m, nn.Linear)]
    found = dict[str, int | list[int]]()
    for path, layer in layers:
        for name, size in zip(("out_features", "in_features"), layer.weight.shape, strict=True):
            if getattr(layer, name) != size:
                setattr(layer, name, size)
                found[f"{path}.{name}"] = size
    return found


def _larger(example: Example, batch: int) -> Example:
    """The example with one more in each batch."""

    def more(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch
        return torch.cat([value, value[:1]]) if batched else value

    return tuple(map(more, example[0])), {k: more(v) for k, v in example[1].items()}


def _runs(model: nn.Module, example: Example) -> bool:
    try:
        run(model, example)
    except Exception:  # whatever a network makes of another batch
        return False
    return True


def _plan(model: nn.Module, groups: Groups, keep: Cuts) -> AsGraph:
    """The edit that makes the graph of a network fit a cut."""
    args, kwargs = groups.example
    values = [*args, *kwargs.values()]
    if not all(isinstance(v, Tensor) for v in values):
        raise RecipeError(
            "cut: a size stands in the network's code as a plain number, and its example is more "
            "than tensors, so that no graph can take its place; hold the size in an attribute"
        )
    shapes = [[max(n, 2) if i == 0 and groups.batch == 1 else n for i, n in enumerate(v.shape)]
              for v in values]  # fmt: skip
    dtypes = [str(v.dtype).removeprefix("torch.") for v in values]
    blank = AsGraph(shapes=shapes, dtypes=dtypes, names=list(kwargs), numbers={})
    graphs = groups.graph, as_graph(model, blank.example())
    old, new = ([(str(i), n) for i, n in enumerate(steps_of(g))] for g in graphs)
    if [_kind(n) for _, n in old] != [_kind(n) for _, n in new]:  # views of everything come and go
        old, new = ([(i, n) for i, n in o if _kind(n) not in _FLEETING] for o in (old, new))
    if [_kind(n) for _, n in old] != [_kind(n) for _, n in new]:
        raise RecipeError("cut: the network's graph for any batch has other steps than for one")
    numbers = {}
    for (_, before), (number, after) in zip(old, new, strict=True):
        if changed := list(_changes(groups, before, after, keep)):
            numbers[number] = [n for triple in changed for n in triple]
    return AsGraph(shapes=shapes, dtypes=dtypes, names=list(kwargs), numbers=numbers)


_FLEETING = ("alias", "slice")


def _kind(node: fx.Node) -> str:
    if node.op != "call_module":
        return op_name(node)
    module = cast(nn.Module, node.graph.owning_module).get_submodule(str(node.target))
    return "linear" if isinstance(module, nn.Linear) else "batch_norm"


_SIZES = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand"), 1),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), 1),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "rand", "randn"), 0),
}
"""Where the sizes of what an operation makes stand among its arguments."""


def _changes(
    groups: Groups, before: fx.Node, after: fx.Node, keep: Cuts
) -> Iterator[tuple[int, int, int]]:
    """The arguments of one step that a cut changes: argument, place in it, value."""
    times = groups.times(keep)
    op, shape = op_name(before), shape_of(before)
    planned = groups.planned(before, times)
    if op in _SIZES or op == "unflatten":
        at = _SIZES.get(op, 2)
        told = cast("list[Any]", after.args[at])
        skipped = cast(int, before.args[1]) % (len(shape) - len(told) + 1) if at == 2 else 0
        for place, size in enumerate(told):
            wanted = planned[skipped + place]
            if wanted != shape[skipped + place] and size != -1:
                yield at, place, wanted if type(size) is int else -1
        return
    values = {
        x.value: len(groups.kept(x.labels, times))
        for x in groups.flow.literals
        if x.node is before and x.labels is not None and not x.name
    }
    for at, argument in enumerate(after.args):
        if type(argument) is int and values.get(argument, argument) != argument:
            yield at, -1, values[argument]
        elif isinstance(argument, list | tuple):
            for place, value in enumerate(argument):
                if type(value) is int and values.get(value, value) != value:
                    yield at, place, values[value]
