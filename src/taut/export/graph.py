"""The ONNX graph of a network: traced, simplified, and its weights written as whole numbers.

    W = DequantizeLinear(n, step, zero)      x' = DequantizeLinear(QuantizeLinear(x, step))

Engines multiply whole numbers where both stand in front of an operation, so nothing may come
between: the dequantization is moved behind transpositions, look-ups and the sorting of gates, and
batch norms go into the steps. A node's name says which layer it came from: `layer1.conv2:Conv`.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from onnxscript import ir, opset21
from onnxscript.optimizer import optimize_ir
from torch.export import ExportedProgram

from taut.errors import ExportError
from taut.export.attention_onnx import attention_as_onnx
from taut.export.plain import Integers
from taut.export.recurrent_onnx import recurrent_as_onnx
from taut.export.tidy import share, tidy
from taut.export.whole import constant, integer, settle_gemms, tell_zeros
from taut.quiet import silenced

OPSET = 21
_MOVES = {"Transpose", "Slice", "Concat", "Unsqueeze", "Reshape", "Squeeze"}
LAYER = ":"
"""Ends the layer's path in a node's name."""


def graph_of(
    program: ExportedProgram,
    integers: Mapping[str, Integers],
    finish: Callable[[ir.Model], object] | None = None,
) -> ir.Model:
    """The model that computes what a traced program does, its weights as they are stored.

    finish: is done to the model before its nodes get their names.

    Raises ExportError, with the operation and the layer, for what ONNX cannot express.
    """
    model = _translated(program)
    graph = model.graph
    for name, numbers in integers.items():
        if name in graph.initializers:  # tied weights stand there once
            _place(graph, graph.initializers[name], numbers)
    optimize_ir(model, should_fold=_may_fold)
    settle_gemms(graph)
    for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
        _move_down(graph, node)
    _fold_norms(graph)
    optimize_ir(model, should_fold=_may_fold)
    tidy(graph)
    if finish is not None:
        finish(model)
    if any(n.op_type == "QuantizeLinear" for n in graph):
        tell_zeros(graph)
    else:
        _narrow(graph)
    share(model)
    _name_nodes(graph)
    for value in graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    return model


def layer_of(node_name: str) -> str:
    """The path of the layer that a node came from."""
    return node_name.rpartition(LAYER)[0]


# ---- tracing --------------------------------------------------------------------------------


def _translated(program: ExportedProgram) -> ir.Model:
    try:
        with silenced():
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, opset_version=OPSET, optimize=False,
                custom_translation_table={
                    torch.ops.taut.round_input.default: _round_input,
                    torch.ops.taut.recurrent.default: recurrent_as_onnx,
                    torch.ops.aten.scaled_dot_product_attention.default: attention_as_onnx,
                },
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(_lacking(program, error)) from error
    assert made is not None
    model: ir.Model = made.model
    return model


def _lacking(program: ExportedProgram, error: BaseException) -> str:
    """What an error of the exporter says, with the layer that calls the operation."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(texts)
    for node in program.graph.nodes:
        target = str(node.target)
        if node.op == "call_function" and re.search(rf"\b{re.escape(target)}\b", text):
            stack = node.meta.get("nn_module_stack") or {}
            path = [str(p) for p, _ in stack.values()]
            where = f"layer {path[-1]!r}" if path and path[-1] else "the network itself"
            return (
                f"ONNX has no operation for {target}, which {where} calls; write that layer with "
                "other operations, or use to='torch'"
            )
    return (
        f"the network cannot be written as ONNX: {texts[-1].strip().splitlines()[-1]}; use "
        "to='torch'"
    )


def _round_input(x: Any, step: float, low: int, high: int) -> Any:
    """Rounded as an engine does: by saturation at the ends of int8 or uint8.

    What is never negative has the steps [0, 127] in a file and [0, 255] up to the same end here.
    """
    op, kind = cast(Any, opset21), np.dtype(np.uint8 if low == 0 else np.int8)
    if (low, high) == (0, 127):
        step = step * 127 / 255
    elif (low, high) != (np.iinfo(kind).min, np.iinfo(kind).max):
        x = op.Clip(x, np.float32(low * step), np.float32(high * step))
    scale = op.Constant(value=ir.tensor(np.float32(step)))
    zero = op.Constant(value=ir.tensor(np.zeros((), kind)))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)


# ---- whole numbers --------------------------------------------------------------------------


def _place(graph: ir.Graph, value: ir.Value, weight: Integers) -> None:
    """Put whole numbers where a float weight stood."""
    name, count = value.name, len(weight.steps)
    assert name is not None
    numbers, steps = weight.numbers.numpy(), weight.steps.numpy()
    zeros = None if weight.zeros is None else weight.zeros.numpy()
    attributes: dict[str, Any] = {}
    if count == 1:
        steps = steps.reshape(())
        zeros = None if zeros is None else zeros.reshape(())
    else:
        attributes["axis"] = 0
    runs = count > numbers.shape[0]  # of columns
    if runs:
        width = numbers.size // count
        numbers = numbers.reshape(numbers.shape[0], -1)
        steps = steps.reshape(len(numbers), -1)
        zeros = None if zeros is None else zeros.reshape(len(numbers), -1)
        attributes = {"axis": 1, "block_size": width}
    given = [constant(graph, f"{name}.numbers", numbers), constant(graph, f"{name}.step", steps)]
    if zeros is not None:
        given.append(constant(graph, f"{name}.zero", zeros))
    node = ir.node("DequantizeLinear", given, attributes=attributes)
    made = [node]
    if runs and weight.numbers.dim() > 2:
        shape = constant(graph, f"{name}.shape", np.array(weight.numbers.shape, np.int64))
        made.append(ir.node("Reshape", [node.outputs[0], shape]))
    result = made[-1].outputs[0]
    result.shape, result.type, result.name = value.shape, value.type, name
    ir.convenience.replace_all_uses_with(value, result)
    del graph.initializers[name]
    graph.insert_before(graph[0], made)


def _may_fold(node: ir.Node) -> bool | None:
    """Whether a node of constants is computed now: no weight, no mask, nothing that ties two."""
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return False
    given = [v for v in node.inputs if v is not None]
    made = node.outputs[0].shape
    if node.op_type in ("Expand", "ConstantOfShape") and made is not None:
        sizes = [d if isinstance(d, int) else 0 for d in made]
        return False if math.prod(sizes) > _FILLED else None
    if node.op_type == "Where" and all(v.const_value is not None for v in given):
        several = sum(v.const_value.size > 1 for v in given if v.const_value is not None)
        return False if several == 1 else None
    if node.op_type not in _MOVES or not all(v.const_value is not None for v in given):
        return None
    return node.op_type != "Transpose" or len(given[0].uses()) == 1


_FILLED = 1 << 16
"""Equal numbers that a file may hold instead of an operation that makes them."""


def _numbers(value: ir.Value | None) -> list[int] | None:
    if value is None or value.const_value is None:
        return None
    return [int(n) for n in value.const_value.numpy().reshape(-1)]


def _narrow(graph: ir.Graph) -> None:
    """Store in four bits what fits, where no input is rounded: engines multiply only int8."""
    for node in [n for n in graph if n.op_type == "DequantizeLinear"]:
        numbers = [v for i, v in enumerate(node.inputs) if i != 1 and v is not None]
        readers = {user.op_type for user, _ in node.outputs[0].uses()}
        if not readers <= {"MatMul", "Conv"} or any(len(v.uses()) > 1 for v in numbers):
            continue
        held = [v.const_value.numpy() for v in numbers if v.const_value is not None]
        if len(held) < len(numbers) or any(a.min() < -8 or a.max() > 7 for a in held if a.size):
            continue
        for value, array in zip(numbers, held, strict=True):
            few = array.astype(ir.DataType.INT4.numpy())
            value.const_value = ir.tensor(few, dtype=ir.DataType.INT4, name=value.name)
            value.type = ir.TensorType(ir.DataType.INT4)


def _move_down(graph: ir.Graph, node: ir.Node) -> None:
    """Let what only moves numbers move whole ones, and dequantize after it."""
    if "block_size" in node.attributes:
        return
    numbers, step = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    assert numbers is not None
    assert step is not None
    single, out = step.shape is None or len(step.shape) == 0, node.outputs[0]
    readers = [user for user, _ in out.uses()]
    if not single and zero is None and (joint := _sorted_gates(readers)) is not None:
        _sort_gates(graph, readers, joint, numbers, step, out)
    else:
        for user in readers:
            if user.op_type == "Transpose":
                perm = user.attributes["perm"].as_ints()
                axis = None if single else list(perm).index(integer(node, "axis", 1))
                _dequantize_after(graph, user, numbers, step, zero, axis)
            elif user.op_type == "Gather" and integer(user, "axis", 0) == 0 and zero is None:
                _look_up(graph, user, numbers, step, single)
    if not out.uses() and not out.is_graph_output():
        graph.remove(node, safe=True)


def _dequantize_after(
    graph: ir.Graph, node: ir.Node, numbers: ir.Value, step: ir.Value, zero: ir.Value | None,
    axis: int | None,
) -> None:  # fmt: skip
    old = node.outputs[0]
    node.replace_input_with(0, numbers)
    given = [old, step] if zero is None else [old, step, zero]
    after = ir.node("DequantizeLinear", given, attributes={} if axis is None else {"axis": axis})
    _take_over(graph, node, after, old, numbers.dtype)


def _take_over(
    graph: ir.Graph, node: ir.Node, after: ir.Node, old: ir.Value, dtype: ir.DataType | None,
    reader: ir.Node | None = None,
) -> None:  # fmt: skip
    """Let everyone who read a node read what comes after it, but for that itself (or `reader`)."""
    result = after.outputs[0]
    result.shape, result.type = old.shape, ir.TensorType(ir.DataType.FLOAT)
    after.metadata_props.update(node.metadata_props)
    for user, index in old.uses():
        if user is not (reader or after):
            user.replace_input_with(index, result)
    if dtype is not None:
        old.type = ir.TensorType(dtype)
    graph.insert_after(node, after)


def _look_up(
    graph: ir.Graph, node: ir.Node, numbers: ir.Value, step: ir.Value, single: bool
) -> None:
    """An embedding's rows: whole numbers and their steps are looked up, not the whole table."""
    old, index = node.outputs[0], node.inputs[1]
    assert index is not None
    node.replace_input_with(0, numbers)
    made = []
    if not single:
        picked = ir.node("Gather", [step, index], attributes={"axis": 0})
        last = constant(graph, f"{old.name}.last", np.array([-1], np.int64))
        wide = ir.node("Unsqueeze", [picked.outputs[0], last])
        made, step = [picked, wide], wide.outputs[0]
    cast = ir.node("Cast", [old], attributes={"to": ir.DataType.FLOAT})
    after = ir.node("Mul", [cast.outputs[0], step])
    _take_over(graph, node, after, old, numbers.dtype, reader=cast)
    graph.insert_before(after, [*made, cast])


def _sorted_gates(readers: Sequence[ir.Node]) -> ir.Node | None:
    """The node that joins slices of rows in another order, where these are all the slices."""
    joints = set()
    for node in readers:
        axes = _numbers(node.inputs[3]) if len(node.inputs) > 3 else None
        if node.op_type != "Slice" or axes != [0]:
            return None
        joints |= {user for user, _ in node.outputs[0].uses()}
    if len(joints) != 1:
        return None
    joint = joints.pop()
    made = {v.producer() for v in joint.inputs if v is not None}
    return joint if joint.op_type == "Concat" and made == set(readers) else None


def _sort_gates(
    graph: ir.Graph, slices: Sequence[ir.Node], joint: ir.Node, numbers: ir.Value, step: ir.Value,
    old: ir.Value,
) -> None:  # fmt: skip
    """Sort the rows' steps as the rows are sorted."""
    copies = {}
    for node in slices:
        node.replace_input_with(0, numbers)
        node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        copies[node] = ir.node("Slice", [step, *node.inputs[1:]])
    parts = [copies[p] for v in joint.inputs if v is not None and (p := v.producer()) is not None]
    steps = ir.node("Concat", [p.outputs[0] for p in parts], attributes={"axis": 0})
    joined = joint.outputs[0]
    after = ir.node("DequantizeLinear", [joined, steps.outputs[0]], attributes={"axis": 0})
    _take_over(graph, joint, after, joined, ir.DataType.INT8)
    graph.insert_before(after, [*copies.values(), steps])


def _fold_norms(graph: ir.Graph) -> None:
    """Put a batch norm after a convolution into the convolution's steps and bias."""
    for norm in [n for n in graph if n.op_type == "BatchNormalization"]:
        source = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if source is None or source.op_type != "Conv" or len(source.outputs[0].uses()) != 1:
            continue
        weight = source.inputs[1].producer() if source.inputs[1] is not None else None
        if weight is None or weight.op_type != "DequantizeLinear" or len(weight.inputs) > 2:
            continue
        step = weight.inputs[1]
        bias = source.inputs[2] if len(source.inputs) > 2 else None
        constants = [*norm.inputs[1:5], step, *([bias] if bias is not None else [])]
        if any(v is None or v.const_value is None for v in constants):
            continue
        if "block_size" in weight.attributes or len(weight.outputs[0].uses()) != 1:
            continue
        gamma, beta, mean, var = (v.const_value.numpy() for v in norm.inputs[1:5])  # type: ignore[union-attr]
        found = norm.attributes.get("epsilon")
        factor = gamma / np.sqrt(var + (1e-5 if found is None else found.as_float()))
        assert step is not None
        assert step.const_value is not None
        old = 0.0 if bias is None or bias.const_value is None else bias.const_value.numpy()
        name = step.name or "step"
        steps = step.const_value.numpy() * factor
        new_step = constant(graph, f"{name}.folded", steps.astype(np.float32))
        shift = (beta + (old - mean) * factor).astype(np.float32)
        new_bias = constant(graph, f"{name}.bias", shift)
        weight.replace_input_with(1, new_step)
        weight.attributes["axis"] = ir.AttrInt64("axis", 0)
        node = ir.node(
            "Conv", [source.inputs[0], source.inputs[1], new_bias],
            attributes=dict(source.attributes),
        )  # fmt: skip
        node.metadata_props.update(norm.metadata_props)
        result = node.outputs[0]
        result.shape, result.type = norm.outputs[0].shape, norm.outputs[0].type
        ir.convenience.replace_all_uses_with(norm.outputs[0], result)
        graph.insert_before(norm, node)
        graph.remove([norm, source], safe=True)


# ---- names ----------------------------------------------------------------------------------


def _name_nodes(graph: ir.Graph) -> None:
    """Names that tell the layer, in place of what the exporter notes down about each node."""
    seen: Counter[str] = Counter()
    for node in graph:
        name = f"{_path(node.metadata_props)}{LAYER}{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}.{seen[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _path(notes: Mapping[str, str]) -> str:
    try:
        scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
        path = str(scopes[-2]) if len(scopes) > 1 else ""
        return "" if path.startswith("_empty_nn_module_stack") else path
    except (ValueError, SyntaxError):
        return ""
