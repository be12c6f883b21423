"""What stands around Taut's operations goes into them: an ONNX graph made smaller.

    y = max(scale[o] · product(x, weight) + shift[o] + beside, 0)

What follows an operation goes into it: batch norms into its scale and shift, and where nothing
else reads what lies between, the sum of a residual block and ReLU. Binary convolutions read and
write their channels last, so that chains of them never turn an image round. Where one reads what
another gives, and cuts it in two, it is given the signs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnxscript import ir

from taut.engine_ops import DOMAIN, joined

_ALIGNED = 64  # bytes, where each array of a constant begins
_LAST, _FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # permutations to channels last, and back


def fuse(model: ir.Model) -> None:
    """Put what stands around Taut's operations into them, in place."""
    graph: Any = model.graph
    graph.opset_imports[DOMAIN] = 1
    turned: dict[Any, Any] = {}
    for node in [n for n in graph if n.domain == DOMAIN]:
        if node.op_type == "BitplaneConv2d":
            _channels_last(graph, node, turned)
    for node in [n for n in graph if n.domain == DOMAIN]:
        while _follow(graph, node, turned):
            pass
    for node in [n for n in graph if n.op_type == "Transpose" and _perm(n) == _LAST]:
        maker = node.inputs[0].producer()
        if maker is not None and maker.op_type == "Transpose" and _perm(maker) == _FIRST:
            _replace(graph, node.outputs[0], maker.inputs[0])
    graph.sort()
    _drop_unused(graph)  # a turn that nothing reads would keep numbers where signs are enough
    for node in [n for n in graph if n.domain == DOMAIN]:  # givers before takers
        _hand_signs(graph, node)


def _channels_last(graph: Any, node: Any, turned: dict[Any, Any]) -> None:
    node.replace_input_with(0, _turned(graph, node.inputs[0], turned, node))
    node.attributes["channels_last"] = ir.AttrInt64("channels_last", 1)


def _turned(graph: Any, value: Any, turned: dict[Any, Any], before: Any) -> Any:
    """The value with its channels last, made once."""
    maker = value.producer()
    if maker is not None and maker.op_type == "Transpose" and _perm(maker) == _FIRST:
        return maker.inputs[0]
    if value not in turned:
        made = ir.node("Transpose", [value], attributes={"perm": _LAST})
        made.outputs[0].type = value.type
        graph.insert_before(before, made)
        turned[value] = made.outputs[0]
    return turned[value]


def _perm(node: Any) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _follow(graph: Any, node: Any, turned: dict[Any, Any]) -> bool:
    """Take in what follows an operation, one node; whether there was something."""
    out = node.outputs[0]
    back = _only_reader(graph, out)
    last = back is not None and back.op_type == "Transpose" and _perm(back) == _FIRST
    end = back.outputs[0] if back is not None and last else out
    after = _only_reader(graph, end)
    if after is None or int(node.attributes["relu"].as_int()):
        return False
    flat = end.shape is not None and len(end.shape) == 2
    channels_second = last or flat or node.op_type == "SparseConv2d"
    if after.op_type == "BatchNormalization" and channels_second and len(node.inputs) == 2:
        taken = _take_norm(graph, node, after)
    elif after.op_type == "Relu":
        taken = _take_relu(node)
    elif after.op_type == "Add" and len(node.inputs) == 2:
        taken = _take_sum(graph, node, after, end, turned, last)
    else:
        taken = False
    if taken:
        _replace(graph, after.outputs[0], end)
        graph.remove(after, safe=True)
    return taken


def _only_reader(graph: Any, value: Any) -> Any:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _replace(graph: Any, old: Any, new: Any) -> None:
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _take_norm(graph: Any, node: Any, norm: Any) -> bool:
    constants = [v.const_value for v in norm.inputs[1:5]]
    if any(c is None for c in constants):
        return False
    gamma, beta, mean, var = (np.asarray(c.numpy(), np.float64) for c in constants)
    epsilon = norm.attributes.get("epsilon")
    factor = gamma / np.sqrt(var + (1e-5 if epsilon is None else epsilon.as_float()))
    scale, shift = _ends(node)
    _rewrite(graph, node, scale * factor, (shift - mean) * factor + beta)
    return True


def _take_relu(node: Any) -> bool:
    node.attributes["relu"] = ir.AttrInt64("relu", 1)
    return True


def _take_sum(
    graph: Any, node: Any, add: Any, mine: Any, turned: dict[Any, Any], last: bool
) -> bool:
    other = add.inputs[1] if add.inputs[0] is mine else add.inputs[0]
    total = add.outputs[0]
    same = other is not None and other.shape is not None and total.shape is not None
    if not same or other is mine or other.shape != total.shape or other.const_value is not None:
        return False
    beside = _turned(graph, other, turned, add) if last else other
    node.resize_inputs(3)
    node.replace_input_with(2, beside)
    return True


def _hand_signs(graph: Any, node: Any) -> None:
    """Give those who cut what a product of bits gives in two, all alike, its signs instead."""
    if "signs" not in node.attributes:
        return
    out, count = node.outputs[0], int(node.attributes["out"].as_int())
    cuts = [(user, at, _cut(user, count)) for user, at in out.uses()]
    first = next((c for _, at, c in cuts if at == 0 and c is not None), None)
    if first is None or out.is_graph_output():
        return
    takers = [user for user, at, c in cuts if at == 0 and c is not None and (c == first).all()]
    only = len(takers) == len(cuts)
    _replace_constant(graph, node, joined(torch.from_numpy(_raw(node)), torch.from_numpy(first)))
    node.attributes["signs"] = ir.AttrInt64("signs", 2 if only else 1)
    if not only:
        node.resize_outputs(2)
    signs = node.outputs[-1]
    signs.name = f"{out.name}.signs"
    signs.shape, signs.type = out.shape, ir.TensorType(ir.DataType.UINT8)
    for user in takers:
        user.replace_input_with(0, signs)


def _cut(node: Any, channels: int) -> Any:
    """The threshold by which a product of bits cuts each channel that it reads in two, if so."""
    if node.domain != DOMAIN or "signs" not in node.attributes:
        return None
    number = {k: node.attributes[k].as_int() for k in ("input_planes", "levels", "per_channel")}
    if (number["input_planes"], number["levels"]) != (1, 2):
        return None
    raw = _raw(node)
    many = channels if number["per_channel"] else 1
    at = len(raw) - _ALIGNED - -(-4 * many // _ALIGNED) * _ALIGNED  # thresholds, then the pattern
    if list(raw[-_ALIGNED:][:2]) != [0, 1]:
        return None
    return np.broadcast_to(raw[at : at + 4 * many].view("<f4"), channels).copy()


def _raw(node: Any) -> Any:
    return node.inputs[1].const_value.numpy()


def _ends(node: Any) -> tuple[Any, Any]:
    """The scale and the shift with which the constant of an operation begins."""
    raw = _raw(node)
    out = int(node.attributes["out"].as_int())
    each = -(-out * 4 // _ALIGNED) * _ALIGNED
    return tuple(raw[at : at + 4 * out].view("<f4").astype(np.float64) for at in (0, each))


def _rewrite(graph: Any, node: Any, scale: Any, shift: Any) -> None:
    raw = _raw(node).copy()
    each = -(-len(scale) * 4 // _ALIGNED) * _ALIGNED
    for at, values in ((0, scale), (each, shift)):
        raw[at : at + 4 * len(values)] = values.astype("<f4").view(np.uint8)
    _replace_constant(graph, node, raw)


def _replace_constant(graph: Any, node: Any, raw: Any) -> None:
    old = node.inputs[1]
    name = old.name
    if len(list(old.uses())) > 1:  # the layer stands at several places
        name = f"{name}.{node.name}"
    else:
        node.replace_input_with(1, None)
        del graph.initializers[name]
    tensor = ir.tensor(np.asarray(raw), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(raw.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    node.replace_input_with(1, value)


def _drop_unused(graph: Any) -> None:
    again = True
    while again:
        unused = [
            n for n in graph
            if not any(list(o.uses()) or o.is_graph_output() for o in n.outputs)
        ]  # fmt: skip
        graph.remove(unused, safe=True)
        again = bool(unused)
    for name in [n for n, v in graph.initializers.items() if not list(v.uses())]:
        del graph.initializers[name]
