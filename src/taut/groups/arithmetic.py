"""Rules of operations that compute: products, convolutions, norms, reductions, recurrence."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch import fx

from taut.groups.flow import Flow, Value, argument, op_name, rule, shape_of
from taut.groups.symbols import Dims, Labels


def _zeros(node: fx.Node) -> Dims:
    return [np.zeros(n, np.int64) for n in shape_of(node)]


# ---- products -------------------------------------------------------------------------------


@rule("linear")
def linear(flow: Flow, node: fx.Node) -> Value:
    """y[..., o] = Σ x[..., i] · w[o, i] + b[o]."""
    x, w, *rest = (flow.of(a) for a in node.args)
    flow.symbols.unite(x[-1], w[-1])
    if len(w) == 2:
        flow.call(node, in_features=w[1], out_features=w[0])
    out = [*x[:-1], *w[:-1]]
    return flow.meet([out, *rest]) if rest and rest[0] else out


@rule("mm", "bmm", "matmul", "mv", "dot", "addmm", "baddbmm", "addmv")
def product(flow: Flow, node: fx.Node) -> Value:
    """The last dimension of the one meets the last but one of the other."""
    adds = op_name(node) in {"addmm", "baddbmm", "addmv"}
    a, b = (flow.of(v) for v in node.args[adds : 2 + adds])
    front_a, front_b = a[:-2], b[:-2]
    flow.symbols.unite(a[-1], b[-2] if len(b) > 1 else b[0])
    out = flow.meet([front_a, front_b])
    out = out + (a[-2:-1] if len(a) > 1 else []) + (b[-1:] if len(b) > 1 else [])
    return flow.meet([out, flow.of(node.args[0])]) if adds else out


@rule("einsum")
def einsum(flow: Flow, node: fx.Node) -> Value:
    """Dimensions of the same letter are the same."""
    equation = cast(str, node.args[0]).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    places: dict[str, Labels] = {}
    front: list[Dims] = []
    for term, operand in zip(terms.split(","), cast("list[Any]", node.args[1]), strict=True):
        dims = flow.of(operand)
        before, dots, after = term.partition("...")
        cut = len(dims) - len(after)
        if dots:
            front.append(dims[len(before) : cut])
        for letter, labels in (
            *zip(before, dims, strict=False),
            *zip(after, dims[cut:], strict=True),
        ):
            known = places.setdefault(letter, labels)
            if len(known) == len(labels):
                flow.symbols.unite(known, labels)
            elif len(known) == 1:
                places[letter] = labels
    if not arrow:
        letters = sorted(places)
        result = "..." * bool(front) + "".join(c for c in letters if terms.count(c) == 1)
    before, _, after = result.partition("...")
    return [*(places[c] for c in before), *flow.meet(front), *(places[c] for c in after)]


@rule("scaled_dot_product_attention")
def attention(flow: Flow, node: fx.Node) -> Value:
    """q [..., l, d], k [..., s, d], v [..., s, e], mask over [..., l, s] → [..., l, e]."""
    q, k, v = (flow.of(a) for a in node.args[:3])
    flow.symbols.unite(q[-1], k[-1])
    flow.symbols.unite(k[-2], v[-2])
    if len(q) > 2 and len(q[-3]) != len(k[-3]) and len(k[-3]) > 1:  # each key serves several
        each = len(q[-3]) // len(k[-3])
        k, v = ([*d[:-3], np.repeat(d[-3], each), *d[-2:]] for d in (k, v))
    front = flow.meet([q[:-2], k[:-2], v[:-2]])
    mask = flow.of(argument(node, "attn_mask"))
    if mask:
        front = flow.meet([[*front, q[-2], k[-2]], mask])[:-2]
    return [*front, q[-2], v[-1]]


@rule("bilinear")
def bilinear(flow: Flow, node: fx.Node) -> Value:
    """y[..., o] = Σ a[..., i] · w[o, i, j] · b[..., j] + c[o]."""
    a, b, w = (flow.of(v) for v in node.args[:3])
    flow.symbols.unite(a[-1], w[1])
    flow.symbols.unite(b[-1], w[2])
    flow.call(node, in1_features=w[1], in2_features=w[2], out_features=w[0])
    return flow.meet([[*flow.meet([a[:-1], b[:-1]]), w[0]], flow.of(argument(node, "bias"))])


@rule(
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
)  # fmt: skip
def convolution(flow: Flow, node: fx.Node) -> Value:
    """x [n, in, ...], w [out, in / groups, ...]; transposed: w [in, out / groups, ...].

    Grouped ones keep their groups and lose the same places of each; depthwise ones, and others of
    one input channel a group, lose groups.
    """
    x, w = flow.of(node.args[0]), flow.of(node.args[1])
    groups, at = cast(int, argument(node, "groups", 1)), len(x) - len(w) + 1
    channels = x[at]
    if "transpose" in op_name(node):
        flow.symbols.unite(channels, w[0])
        if groups == 1:
            out = w[1]
        elif groups == len(channels):
            flow.say(node, groups, channels)
            flow.symbols.hold(w[1])
            out = np.repeat(channels, len(w[1]))
        else:
            flow.say(node, groups, None)
            flow.tie(channels, groups)
            out = np.tile(w[1], groups)
    else:
        out = w[0]
        if groups == 1:
            flow.symbols.unite(channels, w[1])
        elif groups == len(channels):
            flow.say(node, groups, channels)
            flow.symbols.hold(w[1])
            flow.symbols.unite(np.repeat(channels, len(out) // groups), out)
        else:
            flow.say(node, groups, None)
            flow.symbols.unite(flow.tie(channels, groups), w[1])
            flow.tie(out, groups)
    for window in w[2:]:
        flow.symbols.hold(window, "the window of a convolution")
    flow.call(node, in_channels=channels, out_channels=out)
    bias = flow.of(argument(node, "bias"))
    if bias:
        flow.symbols.unite(out, bias[0])
    spread = _zeros(node)
    return [*x[:at], out, *spread[at + 1 :]]


# ---- norms ----------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "group_norm")
def channel_norm(flow: Flow, node: fx.Node) -> Value:
    """One scale and shift for each channel, which is dimension 1."""
    x = flow.of(node.args[0])
    if op_name(node) == "group_norm":
        groups = cast(int, node.args[1])
        if groups == len(x[1]):
            flow.say(node, groups, x[1])
        else:
            flow.say(node, groups, None)
            flow.tie(x[1], groups)
    flow.call(node, num_features=x[1], num_channels=x[1])
    for vector in node.args[1:]:
        if labels := flow.of(vector):
            flow.symbols.unite(x[1], labels[0])
    return x


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(flow: Flow, node: fx.Node) -> Value:
    """One scale and shift for each place of the last dimensions."""
    x, sizes = flow.of(node.args[0]), cast("list[int]", node.args[1])
    for size, labels in zip(sizes, x[-len(sizes) :], strict=True):
        flow.say(node, size, labels)
    out = flow.meet([x, *(flow.of(a) for a in node.args[2:])])
    return (out, out[:-1], out[:-1]) if op_name(node) == "native_layer_norm" else out


# ---- reductions and windows -----------------------------------------------------------------


@rule(
    "mean", "sum", "amax", "amin", "prod", "var", "std", "max", "min", "argmax", "argmin", "norm",
    "linalg_vector_norm", "logsumexp", "all", "any", "var_mean", "std_mean", "median",
)  # fmt: skip
def reduced(flow: Flow, node: fx.Node) -> Value:
    """Dimensions go, or are left with one place."""
    if op_name(node) in {"max", "min"} and flow.of(node.args[1] if len(node.args) > 1 else None):
        return flow.meet([flow.of(a) for a in node.args])
    x = flow.of(node.args[0])
    given = argument(node, "dim")
    axes = {
        a % len(x) for a in (given if isinstance(given, list | tuple) else [given]) if a is not None
    }
    axes = axes or set(range(len(x)))
    if op_name(node) in {"argmax", "argmin"} or "arg" in op_name(node):
        for axis in axes:
            flow.symbols.hold(x[axis])
    value = node.meta["val"]
    several = isinstance(value, list | tuple)
    kept = len(value[0].shape) if several else len(shape_of(node))
    one = np.zeros(1, np.int64)
    if kept == len(x):
        out = [one if i in axes else d for i, d in enumerate(x)]
    else:
        out = [d for i, d in enumerate(x) if i not in axes]
    return tuple(list(out) for _ in value) if several else out


_POOLS = ("max", "avg", "adaptive_avg", "adaptive_max", "lp")
_SCALES = ("nearest", "nearest_exact", "linear", "bilinear", "bicubic", "trilinear")


@rule(
    *(f"{kind}_pool{n}d{rest}" for kind in _POOLS for n in "123" for rest in ("", "_with_indices")),
    *(f"upsample_{kind}{n}d" for kind in _SCALES for n in "123"),
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in "123"),
    "grid_sampler", "grid_sampler_2d", "im2col",
)  # fmt: skip
def windowed(flow: Flow, node: fx.Node) -> Value:
    """Channels one by one; the other dimensions get sizes of their own."""
    x, value = flow.of(node.args[0]), node.meta["val"]
    several = isinstance(value, list | tuple)
    shape = tuple(int(n) for n in (value[0] if several else value).shape)
    if op_name(node) == "im2col":
        return [x[0], np.repeat(x[1], shape[1] // len(x[1])), np.zeros(shape[2], np.int64)]
    flat = next((int(c) for c in op_name(node) if c.isdigit()), 2)
    front = len(shape) - flat
    out = [*x[:front], *(np.zeros(n, np.int64) for n in shape[front:])]
    return tuple(list(out) for _ in value) if several else out


@rule("glu")
def gated(flow: Flow, node: fx.Node) -> Value:
    """a · sigmoid(b), of the two halves of a dimension."""
    x = list(flow.of(node.args[0]))
    at = cast(int, argument(node, "dim", -1)) % len(x)
    x[at] = flow.tie(x[at], 2)
    return x


@rule("topk", "sort")
def ranked(flow: Flow, node: fx.Node) -> Value:
    """Places of one dimension are mixed; the others stay."""
    x, value = list(flow.of(node.args[0])), cast("list[Any]", node.meta["val"])
    at = cast(int, argument(node, "dim", -1)) % len(x)
    flow.symbols.hold(x[at])
    x[at] = np.zeros(int(value[0].shape[at]), np.int64)
    return x, list(x)


@rule("gather", "take_along_dim")
def gathered(flow: Flow, node: fx.Node) -> Value:
    """Places chosen by number along one dimension."""
    x = flow.of(node.args[0])
    index = flow.of(argument(node, "index") or argument(node, "indices"))
    at = cast(int, argument(node, "dim")) % len(x)
    flow.symbols.hold(x[at])
    out = list(index)
    for i, (one, other) in enumerate(zip(x, index, strict=True)):
        if i != at and len(one) == len(other):
            flow.symbols.unite(one, other)
        elif i != at:
            flow.symbols.hold(one)
    return out


# ---- recurrence -----------------------------------------------------------------------------

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(flow: Flow, node: fx.Node) -> Value:
    """Gates are stacked in the rows of a weight and lose the same places, in every layer and way.

    w_ih [gates · hidden, in], w_hh [gates · hidden, out], b [gates · hidden], w_hr [out, hidden];
    one number says the hidden size of all layers and directions.
    """
    if str(node.target).endswith(".data"):  # packed sequences: the data come first
        data, sizes, states, weights, biases, layers, _, _, both = node.args[:9]
        flow.hold(cast(fx.Node, sizes))
    else:
        data, states, weights, biases, layers, _, _, both = node.args[:8]
    x, gates = flow.of(data), _GATES[op_name(node)]
    starts = [flow.of(s) for s in (states if isinstance(states, list | tuple) else [states])]
    ways = 2 if both else 1
    each = len(cast("list[Any]", weights)) // (cast(int, layers) * ways)
    rows = iter(cast("list[Any]", weights))
    inputs, outs = x[-1], starts[0][-1]
    cells = starts[1][-1] if len(starts) > 1 else outs
    projects = each > (4 if biases else 2)
    if op_name(node) == "lstm" and not projects:
        flow.symbols.unite(cells, outs)
    for _ in range(cast(int, layers)):
        for _ in range(ways):
            w_ih, w_hh, *rest = (flow.of(next(rows)) for _ in range(each))
            flow.symbols.unite(w_ih[1], inputs)
            flow.symbols.unite(w_hh[1], outs)
            for stacked in (w_ih, w_hh, *(rest[:2] if biases else [])):
                flow.symbols.unite(flow.tie(stacked[0], gates), cells)
            if projects:
                flow.symbols.unite(rest[-1][1], cells)
                flow.symbols.unite(rest[-1][0], outs)
        inputs = np.tile(outs, ways)
    flow.call(node, input_size=x[-1], hidden_size=cells)
    if projects:
        flow.call(node, proj_size=outs)
    depth = starts[0][:-1]
    finals: list[Dims] = [[*depth, outs], [*depth, cells]]
    return ([*x[:-1], inputs], *finals[: len(starts)])


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(flow: Flow, node: fx.Node) -> Value:
    """One step of a recurrent layer."""
    x, states = flow.of(node.args[0]), node.args[1]
    gates = _GATES[op_name(node).removesuffix("_cell")]
    starts = [flow.of(s) for s in (states if isinstance(states, list | tuple) else [states])]
    w_ih, w_hh, *biases = (flow.of(a) for a in node.args[2:])
    hidden = starts[0][-1]
    flow.symbols.unite(w_ih[1], x[-1])
    flow.symbols.unite(w_hh[1], hidden)
    for state in starts:
        flow.symbols.unite(state[-1], hidden)
    for stacked in (w_ih, w_hh, *(b for b in biases if b)):
        flow.symbols.unite(flow.tie(stacked[0], gates), hidden)
    flow.call(node, input_size=x[-1], hidden_size=hidden)
    out = [*x[:-1], hidden]
    return (out, list(out)) if len(starts) > 1 else out


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(flow: Flow, node: fx.Node) -> Value:
    """w = g · v / |v|, with one g for each place of one dimension."""
    v, g = flow.of(node.args[0]), flow.of(node.args[1])
    for one, other in zip(v, g, strict=True):
        if len(one) == len(other):
            flow.symbols.unite(one, other)
    return v if op_name(node) == "_weight_norm" else (v, g)


@rule("prelu")
def prelu(flow: Flow, node: fx.Node) -> Value:
    """One slope for each channel, or one for all."""
    x, slope = flow.of(node.args[0]), flow.of(node.args[1])
    if slope and len(slope[0]) > 1:
        flow.symbols.unite(x[1], slope[0])
        flow.call(node, num_parameters=slope[0])
    return x
