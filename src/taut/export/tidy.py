"""What a translated graph does not need: products with ones, moves after moves, things twice.

PyTorch's attention moves queries, keys and values, which one product gives, to the front before it
takes them apart; here they are taken apart where they lie.
"""

from __future__ import annotations

import numpy as np
from onnxscript import ir


def tidy(graph: ir.Graph) -> None:
    """Take them out."""
    for node in list(graph):
        inner = not node.outputs[0].is_graph_output()
        if node.op_type == "Mul" and inner and (same := _times_ones(node)) is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], same)
            graph.remove(node, safe=True)
        elif node.op_type == "Transpose":
            _join(graph, node)
        elif node.op_type == "Squeeze":
            _take_apart(graph, node)


def share(model: ir.Model) -> None:
    """Keep one of equal constants and of equal steps, and nothing that is not read."""
    common = ir.passes.common
    for once in (
        common.DeduplicateInitializersPass(_LARGEST), common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):  # fmt: skip
        once(model)


_LARGEST = 1 << 20
"""Numbers of a constant that is compared with others."""


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _times_ones(node: ir.Node) -> ir.Value | None:
    """The factor that a product is, where the other is ones and makes it no larger."""
    for x, other in (node.inputs, reversed(node.inputs)):
        if x is None or other is None or other.const_value is None or x.shape is None:
            continue
        ones, shape = other.const_value.numpy(), list(x.shape)
        ends = zip(reversed(ones.shape), reversed(shape), strict=False)
        fits = ones.ndim <= len(shape) and all(n in (1, m) for n, m in ends)
        if fits and bool(np.all(ones == 1)):
            return x
    return None


def _join(graph: ir.Graph, node: ir.Node) -> None:
    """Make a transposition of a transposition one, where nothing else reads the first."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is None or before.op_type != "Transpose" or not _read_once(before.outputs[0]):
        return
    first, then = (n.attributes.get_ints("perm") for n in (before, node))
    if first and then:
        node.replace_input_with(0, before.inputs[0])
        node.attributes["perm"] = ir.AttrInt64s("perm", [first[i] for i in then])
        graph.remove(before, safe=True)


def _take_apart(graph: ir.Graph, squeeze: ir.Node) -> None:
    """Split [..., n · width] where it was made [n, ..., width] and is only read one by one."""
    steps, node = list[ir.Node](), squeeze
    for op_type in ("Squeeze", "Transpose", "Unsqueeze", "Reshape"):
        if node is None or node.op_type != op_type or not _is_inner(node, squeeze):
            return
        steps.append(node)
        node = node.inputs[0].producer() if node.inputs[0] is not None else None  # type: ignore[assignment]
    _, transpose, unsqueeze, reshape = steps
    whole, parts = reshape.inputs[0], reshape.outputs[0]
    readers = [(use.node, _place(use.node)) for use in squeeze.outputs[0].uses()]
    if whole is None or parts.shape is None or whole.shape is None:
        return
    rank, count = len(parts.shape) + 1, parts.shape[-2]
    swapped = [rank - 2, *range(1, rank - 2), 0, rank - 1]
    if (
        _numbers(unsqueeze) != [0]
        or list(transpose.attributes.get_ints("perm") or ()) != swapped
        or _numbers(squeeze) not in ([-2], [rank - 2])
        or len(whole.shape) != rank - 2
        or not isinstance(count, int)
        or any(at is None or not 0 <= at < count for _, at in readers)
    ):
        return
    split = ir.node("Split", [whole], {"axis": -1, "num_outputs": count}, num_outputs=count)
    graph.insert_before(reshape, split)
    for reader, at in readers:
        found = split.outputs[at or 0]
        found.shape, found.type = reader.outputs[0].shape, reader.outputs[0].type
        ir.convenience.replace_all_uses_with(reader.outputs[0], found)
        graph.remove(reader, safe=True)


def _is_inner(node: ir.Node, last: ir.Node) -> bool:
    value = node.outputs[0]
    return not value.is_graph_output() and (node is last or _read_once(value))


def _numbers(node: ir.Node) -> list[int] | None:
    """The constant second input of a step, if it has one."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    known = None if value is None or value.const_value is None else value.const_value.numpy()
    return None if known is None else [int(n) for n in known.reshape(-1)]


def _place(node: ir.Node) -> int | None:
    """Which one of the first axis a Gather takes; None for all else."""
    places = _numbers(node)
    at_first = node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0
    inner = not node.outputs[0].is_graph_output()
    scalar = at_first and inner and places is not None and node.inputs[1].shape == ir.Shape([])  # type: ignore[union-attr]
    return places[0] if scalar and places else None
