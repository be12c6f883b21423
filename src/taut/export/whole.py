"""Products of whole numbers, in the forms in which engines know them.

    Gemm(DequantizeLinear(x, sx), DequantizeLinear(W, sw), DequantizeLinear(b, sx · sw))

What is signed is written as int8, whose zero is 0; ONNX Runtime has most of its products for uint8,
whose zero is 128 then: the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import ir
from onnxscript.optimizer import optimize_ir


def constant(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """An array among a graph's initializers, by a name of its own."""
    while name in graph.initializers:
        name += "_"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )  # fmt: skip
    graph.register_initializer(value)
    return value


def integer(node: ir.Node, name: str, default: int) -> int:
    """A node's attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def settle_gemms(graph: ir.Graph) -> None:
    """Products of whole numbers in the form in which engines know them best.

    Where the input is rounded: a Gemm that reads its weight as it lies, and whose bias is whole
    numbers, too (b = sx · sw · n, n: int32). Else a MatMul, and the bias apart.
    """
    for node in [n for n in graph if n.op_type == "Gemm"]:
        weight = node.inputs[1]
        source = None if weight is None else weight.producer()
        if (
            source is None
            or source.op_type != "DequantizeLinear"
            or integer(node, "transB", 0) != 1
        ):
            continue
        plain = all(a.as_float() == 1 for n in ("alpha", "beta") if (a := node.attributes.get(n)))
        if not plain or integer(node, "transA", 0):
            continue
        turned = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        whole = _whole_bias(graph, x, source, bias)
        if whole is not None:
            made = [turned, whole, ir.node("Gemm", [x, turned.outputs[0], whole.outputs[0]])]
        else:
            made = [turned, ir.node("MatMul", [x, turned.outputs[0]])]
            if bias is not None:
                made.append(ir.node("Add", [made[-1].outputs[0], bias]))
        for new in made:
            new.metadata_props.update(node.metadata_props)
        old, result = node.outputs[0], made[-1].outputs[0]
        result.shape, result.type, result.name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.insert_before(node, made)
        graph.remove(node, safe=True)


def _whole_bias(
    graph: ir.Graph, x: ir.Value | None, weight: ir.Node, bias: ir.Value | None
) -> ir.Node | None:
    """A bias in the steps of the sums that it is added to; None where these are not fixed."""
    rounding = None if x is None else x.producer()
    if (
        rounding is None
        or rounding.op_type != "DequantizeLinear"
        or "block_size" in weight.attributes
    ):
        return None
    given = (rounding.inputs[1], weight.inputs[1], bias)
    if any(v is None or v.const_value is None for v in given):
        return None
    step_in, step, floats = (v.const_value.numpy() for v in given)  # type: ignore[union-attr]
    steps = np.broadcast_to((step_in * step).astype(np.float32), floats.shape)
    numbers = np.round(floats / steps.astype(np.float64))
    if np.abs(numbers).max(initial=0) > np.iinfo(np.int32).max:
        return None
    assert bias is not None
    parts = {"numbers": numbers.astype(np.int32), "step": steps}
    constants = [
        constant(graph, f"{bias.name}.{k}", np.ascontiguousarray(v)) for k, v in parts.items()
    ]
    return ir.node("DequantizeLinear", constants, attributes={"axis": 0})


def flatten_products(graph: ir.Graph) -> None:
    """Products of whole numbers over several dimensions as a Gemm over one, with their bias."""
    for node in [n for n in graph if n.op_type == "MatMul"]:
        x, weight, product = node.inputs[0], node.inputs[1], node.outputs[0]
        source = None if weight is None else weight.producer()
        adds = [u for u, _ in product.uses() if u.op_type == "Add"]
        if x is None or source is None or source.op_type != "DequantizeLinear":
            continue
        if x.shape is None or len(adds) != 1 or len(product.uses()) != 1:
            continue
        (bias,) = (v for v in adds[0].inputs if v is not product)
        whole = _whole_bias(graph, x, source, bias)
        free = [d for d in x.shape if not isinstance(d, int)]
        if whole is None or len(free) > 1 or len(x.shape) < 2:
            continue
        assert bias is not None
        assert bias.const_value is not None
        inner, outer = x.shape[-1], bias.const_value.shape[-1]
        known = [d if isinstance(d, int) else -1 for d in x.shape[:-1]]
        shapes = [
            constant(graph, f"{product.name}.{k}", np.asarray(v, np.int64))
            for k, v in (("rows", [-1, inner]), ("shape", [*known, outer]))
        ]
        rows = ir.node("Reshape", [x, shapes[0]])
        gemm = ir.node("Gemm", [rows.outputs[0], weight, whole.outputs[0]])
        back = ir.node("Reshape", [gemm.outputs[0], shapes[1]])
        for new in (whole, rows, gemm, back):
            new.metadata_props.update(node.metadata_props)
        old, result = adds[0].outputs[0], back.outputs[0]
        result.shape, result.type, result.name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.insert_before(adds[0], [whole, rows, gemm, back])
        graph.remove([adds[0], node], safe=True)


def tell_zeros(graph: ir.Graph) -> None:
    """Name the zero of weights that meet rounded inputs: ONNX Runtime's products ask for it."""
    for node in [n for n in graph if n.op_type == "DequantizeLinear" and len(n.inputs) == 2]:
        readers = {user.op_type for user, _ in node.outputs[0].uses()}
        numbers, step = node.inputs[:2]
        if numbers is None or numbers.dtype == ir.DataType.INT32:
            continue  # a bias, whose zero is 0
        if not readers & {"Conv", "Gemm", "MatMul"} or step is None or step.const_value is None:
            continue
        if "block_size" not in node.attributes:
            zeros = np.zeros(step.const_value.numpy().shape, np.int8)
            node.resize_inputs(3)
            node.replace_input_with(2, constant(graph, f"{node.outputs[0].name}.zero", zeros))


def widen_rest(model: ir.Model) -> None:
    """Write as floats whole weights that meet no rounded input, where others do.

    Engines that look for products of whole numbers widen the others at every run, or refuse to.
    """
    if any(n.op_type == "QuantizeLinear" for n in model.graph):
        optimize_ir(model, should_fold=_stands_alone)


def _stands_alone(node: ir.Node) -> bool | None:
    if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return None
    readers = {user.op_type for user, _ in node.outputs[0].uses()}
    return node.op_type == "DequantizeLinear" and not readers & {"Conv", "Gemm", "MatMul", "Add"}


def unsign(graph: ir.Graph) -> None:
    """Write what is rounded to int8 as uint8, with a zero of 128."""
    middle = graph.initializers.get("middle")
    for node in [n for n in graph if n.op_type == "QuantizeLinear" and len(n.inputs) == 3]:
        zero, rounded = node.inputs[2], node.outputs[0]
        if zero is None or zero.dtype != ir.DataType.INT8:
            continue
        middle = middle or constant(graph, "middle", np.asarray(128, np.uint8))
        for user in (node, *(u for u, _ in rounded.uses() if u.op_type == "DequantizeLinear")):
            user.replace_input_with(2, middle)
        rounded.type = ir.TensorType(ir.DataType.UINT8)
