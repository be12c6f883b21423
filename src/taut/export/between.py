"""Rounding what lies between layers, so that an engine never leaves whole numbers.

A layer whose input is rounded runs in int8 only where what comes out of it is rounded, too. That
holds along a chain; it does not where branches are added or joined, and before pools. There

    a sum, a joint or a mean reads its inputs rounded: as a next layer rounds them already, else by
    8 bits whose range is found on samples (the least mean squared error, ranges.py);
    so does a product with whole weights whose input no technique could round, as attention's are;
    a maximum pool reads what its reader rounds, which gives the very same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from onnxscript import ir
from torch import Tensor

from taut.ranges import fit_steps, positive_grid, symmetric_grid

Seen = Callable[[ir.Model, Sequence[str]], Mapping[str, Tensor]]
"""Gives what named values of a model are on samples, each a long row of numbers."""

_JOINTS = {"Add", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean"}
_PASSES = {"Relu", "Clip", "MaxPool", "Flatten", "Reshape"}
_KEEPS = {"Flatten", "Reshape"}
_MULTIPLIES = {"Conv", "Gemm", "MatMul"}
KEPT = 1 << 16
"""Numbers of each value, and batch, that its range is found on."""


def round_between(model: ir.Model, seen: Seen) -> int:
    """Round what lies between layers that run in whole numbers; returns at how many places."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "MaxPool"]:
        _before_pool(graph, node)
    places: list[tuple[ir.Node, int, ir.Value]] = []
    for node in graph:
        if _half_whole(node):
            assert node.inputs[0] is not None
            places.append((node, 0, node.inputs[0]))
        if node.op_type not in _JOINTS:
            continue
        values = [v for v in node.inputs if v is not None]
        values = values[:1] if node.op_type == "ReduceMean" else values  # then come its axes
        if any(v.const_value is not None for v in values):
            continue
        if not any(_whole(v) for v in values):
            continue
        for at, value in enumerate(values):
            if _producer(value) != "DequantizeLinear":
                places.append((node, at, value))
    ranged = {v.name or "": v for _, _, v in places if _rounded_already(v) is None}
    numbers = seen(model, list(ranged)) if ranged else {}
    made: dict[str, ir.Value] = {}
    for node, at, value in places:
        found = _rounded_already(value)
        if found is None and (name := value.name or "") in numbers:
            if name not in made:
                made[name] = _round(graph, value, numbers[name])
            found = made[name]
        if found is not None:
            node.replace_input_with(at, found)
    graph.sort()
    return len(places)


def _half_whole(node: ir.Node) -> bool:
    """Whether a product has a whole weight and reads floats."""
    if node.op_type not in _MULTIPLIES:
        return False
    x, weight = node.inputs[:2]
    while x is not None and (moved := x.producer()) is not None and moved.op_type in _KEEPS:
        x = moved.inputs[0]
    source = None if weight is None else weight.producer()
    if x is None or x.const_value is not None or source is None:
        return False
    whole = source.op_type == "DequantizeLinear" and "block_size" not in source.attributes
    numbers = source.inputs[0]
    fixed = whole and numbers is not None and numbers.const_value is not None
    return fixed and _producer(x) != "DequantizeLinear"


def _producer(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


def _whole(value: ir.Value) -> bool:
    """Whether a value comes from products of whole numbers, or is rounded."""
    node = value.producer()
    while node is not None and node.op_type in _PASSES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None:
        return False
    if node.op_type == "DequantizeLinear":
        return True
    if node.op_type in _JOINTS:
        return any(v is not None and _whole(v) for v in reversed(node.inputs))
    given = node.inputs[:2]
    whole = all(v is not None and _producer(v) == "DequantizeLinear" for v in given)
    return node.op_type in _MULTIPLIES and whole


def _rounded_already(value: ir.Value) -> ir.Value | None:
    """The same value as a reader rounds it."""
    for user, _ in value.uses():
        if user.op_type == "QuantizeLinear":
            for after, _ in user.outputs[0].uses():
                if after.op_type == "DequantizeLinear":
                    return after.outputs[0]
    return None


def _before_pool(graph: ir.Graph, pool: ir.Node) -> None:
    """Round a maximum pool's input as its reader rounds its output: rounding keeps the order."""
    value, readers = pool.inputs[0], [u for u, _ in pool.outputs[0].uses()]
    if value is None or not readers or _producer(value) == "DequantizeLinear":
        return
    while len(readers) == 1 and readers[0].op_type in _KEEPS:
        readers = [u for u, _ in readers[0].outputs[0].uses()]
    rounding = [u for u in readers if u.op_type == "QuantizeLinear"]
    if len(rounding) != 1:
        return
    scale, zero = rounding[0].inputs[1], rounding[0].inputs[2]
    first = ir.node("QuantizeLinear", [value, scale, zero])
    second = ir.node("DequantizeLinear", [first.outputs[0], scale, zero])
    for node in (first, second):
        node.metadata_props.update(pool.metadata_props)
    second.outputs[0].shape, second.outputs[0].type = value.shape, value.type
    graph.insert_before(pool, [first, second])
    pool.replace_input_with(0, second.outputs[0])


def _round(graph: ir.Graph, value: ir.Value, numbers: Tensor) -> ir.Value:
    flat = numbers.float()
    signed = bool((flat < 0).any())
    grid = (symmetric_grid if signed else positive_grid)(256, torch.float32)
    step, _ = fit_steps(flat[None], 256, "mse", grid)
    kind = np.int8 if signed else np.uint8
    name = value.name or "value"
    given = []
    for part, array in (("step", np.float32(float(step))), ("zero", kind(0))):
        tensor = ir.tensor(np.asarray(array), name=f"{name}.{part}")
        constant = ir.Value(
            name=f"{name}.{part}", shape=ir.Shape(()), type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )  # fmt: skip
        graph.register_initializer(constant)
        given.append(constant)
    first = ir.node("QuantizeLinear", [value, *given])
    second = ir.node("DequantizeLinear", [first.outputs[0], *given])
    second.outputs[0].shape, second.outputs[0].type = value.shape, value.type
    node = value.producer()
    if node is None:  # it is an input of the network
        graph.insert_before(graph[0], [first, second])
        return second.outputs[0]
    for made in (first, second):
        made.metadata_props.update(node.metadata_props)
    graph.insert_after(node, [first, second])
    return second.outputs[0]
