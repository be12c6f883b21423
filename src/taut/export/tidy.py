"""What a translated graph does not need: products with ones, moves after moves, things twice."""

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
