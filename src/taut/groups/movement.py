"""Rules of operations that move numbers without computing: views, joins, parts, copies."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from torch import fx, nn

from taut.groups.flow import Flow, Value, argument, op_name, rule, shape_of
from taut.groups.symbols import Dims, Labels


@rule(
    "contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as", "dropout", "cumsum",
    "feature_dropout", "softmax", "_softmax", "log_softmax", "lift_fresh_copy", "zeros_like",
    "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "tril", "triu", "cumprod",
    "alpha_dropout", "bernoulli", "view_as_real", "flip",
)  # fmt: skip
def same(flow: Flow, node: fx.Node) -> Value:
    """Every place stays where it is."""
    source = cast(fx.Node, node.args[0])
    dims = flow.of(source)
    if op_name(node) == "view_as_real":
        return [*dims, np.zeros(2, np.int64)]
    if op_name(node) == "flip":
        axes = [a % len(dims) for a in cast("list[int]", node.args[1])]
        return [d[::-1] if i in axes else d for i, d in enumerate(dims)]
    return list(dims)


@rule(
    "copy", "where", "masked_fill", "fill", "__and__", "__or__", "__xor__", "hardswish",
    "log_sigmoid", "special_expit", "true_divide", "floor_divide", "rsub", "multiply", "divide",
    "subtract", "less", "greater", "less_equal", "greater_equal", "not_equal", "absolute",
    "negative", "arctan2", "conj", "real", "imag",
)  # fmt: skip
def copied(flow: Flow, node: fx.Node) -> Value:
    """What falls together place by place, in operations that PyTorch does not tag as pointwise."""
    return flow.meet([flow.of(n) for n in node.all_input_nodes])


@rule(
    "zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full",
    "new_empty",
)  # fmt: skip
def made(flow: Flow, node: fx.Node) -> Value:
    """Numbers that are made on the spot are as many as the code says."""
    dims = []
    for size in shape_of(node):
        labels = flow.symbols.fresh(size)
        flow.say(node, size, labels)
        dims.append(labels)
    return dims


@rule("arange", "linspace", "scalar_tensor", "eye", "_local_scalar_dense", "item")
def counted(flow: Flow, node: fx.Node) -> Value:
    """Numbers whose values depend on how many there are."""
    for size in shape_of(node):
        flow.say(node, size, None)
    return flow.closed(node)


@rule("t", "transpose", "permute", "numpy_T", "mT", "movedim", "swapaxes", "adjoint")
def permuted(flow: Flow, node: fx.Node) -> Value:
    """Dimensions change their order."""
    dims, op = flow.of(node.args[0]), op_name(node)
    if op in {"t", "numpy_T"}:
        return dims[::-1]
    if op == "permute":
        return [dims[int(i)] for i in cast("list[int]", argument(node, "dims"))]
    order = list(range(len(dims)))
    if op == "movedim":
        sources, targets = (_many(a, len(dims)) for a in node.args[1:3])
        rest = iter(i for i in order if i not in sources)
        placed = dict(zip(targets, sources, strict=True))
        return [dims[placed[i] if i in placed else next(rest)] for i in order]
    one, other = (-2, -1) if op in {"mT", "adjoint"} else cast("tuple[int, int]", node.args[1:3])
    order[one], order[other] = order[other], order[one]
    return [dims[i] for i in order]


def _many(value: Any, count: int) -> list[int]:
    return [v % count for v in (value if isinstance(value, list | tuple) else [value])]


@rule("squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to")
def stretched(flow: Flow, node: fx.Node) -> Value:
    """Dimensions of size one come, go, or are repeated."""
    dims, op, shape = flow.of(node.args[0]), op_name(node), shape_of(node)
    if op == "unsqueeze":
        at = cast(int, node.args[1]) % len(shape)
        return [*dims[:at], np.zeros(1, np.int64), *dims[at:]]
    if op == "squeeze":
        given = node.args[1] if len(node.args) > 1 else list(range(len(dims)))
        axes = _many(given, len(dims))
        return [d for i, d in enumerate(dims) if i not in axes or len(d) != 1]
    out: Dims = [np.zeros(n, np.int64) for n in shape]
    sizes = argument(node, "size", [])
    for i in range(1, len(dims) + 1):
        if len(dims[-i]) == shape[-i]:
            out[-i] = dims[-i]
            if isinstance(sizes, list | tuple) and len(sizes) >= i:
                flow.say(node, sizes[-i], dims[-i])
    return out


# ---- parts and joins ------------------------------------------------------------------------


@rule("cat", "concat", "stack")
def joined(flow: Flow, node: fx.Node) -> Value:
    """Tensors end to end, or side by side along a new dimension."""
    given = [flow.of(n) for n in cast("list[Any]", node.args[0])]
    parts = [d for d in given if d and not (len(d) == 1 and len(d[0]) == 0)]
    at = cast(int, argument(node, "dim", 0)) % len(shape_of(node))
    if op_name(node) == "stack":
        dims = flow.meet(parts)
        return [*dims[:at], np.zeros(len(parts), np.int64), *dims[at:]]
    dims = flow.meet([[*d[:at], np.zeros(1, np.int64), *d[at + 1 :]] for d in parts])
    dims[at] = np.concatenate([d[at] for d in parts])
    return dims


@rule("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split")
def parted(flow: Flow, node: fx.Node) -> Value:
    """Parts that are equal stay equal: they are cut at the same places."""
    dims, results = flow.of(node.args[0]), cast("list[Any]", node.meta["val"])
    at = cast(int, argument(node, "dim", 0)) % len(dims)
    sizes = [int(r.shape[at]) for r in results]
    if len(set(sizes)) == 1 and isinstance(node.args[1], int) and len(sizes) > 1:
        flow.tie(dims[at], len(sizes))
    elif isinstance(node.args[1], int) and len(sizes) > 1:
        flow.symbols.hold(dims[at])  # the last part is what is left over
    parts = np.split(dims[at], np.cumsum(sizes)[:-1])
    if "chunk" not in op_name(node):
        told = cast("list[int]", node.args[1])
        for size, part in zip(told if isinstance(told, list) else [told], parts, strict=False):
            flow.say(node, size, part)
    return tuple([*dims[:at], part, *dims[at + 1 :]] for part in parts)


@rule("unbind")
def unbound(flow: Flow, node: fx.Node) -> Value:
    """One tensor for each place along a dimension."""
    dims = flow.of(node.args[0])
    at = cast(int, argument(node, "dim", 0)) % len(dims)
    flow.symbols.hold(dims[at])
    rest = [*dims[:at], *dims[at + 1 :]]
    return tuple(list(rest) for _ in dims[at])


@rule("select")
def selected(flow: Flow, node: fx.Node) -> Value:
    """The places at one index of a dimension."""
    dims = flow.of(node.args[0])
    at = cast(int, node.args[1]) % len(dims)
    flow.symbols.hold(dims[at])
    return [*dims[:at], *dims[at + 1 :]]


@rule("slice", "narrow")
def sliced(flow: Flow, node: fx.Node) -> Value:
    """A run of places."""
    dims = list(flow.of(node.args[0]))
    at = cast(int, argument(node, "dim", 0)) % len(dims)
    size = len(dims[at])
    start = argument(node, "start", 0) or 0
    if op_name(node) == "narrow":
        end, step = start + argument(node, "length"), 1
    else:
        end, step = argument(node, "end"), argument(node, "step", 1)
    places = range(size)[slice(start, end, step)]
    if step != 1 or any(not isinstance(v, int) for v in (start, end or 0)):
        flow.symbols.hold(dims[at])
    if op_name(node) == "slice":
        for edge in (start, end):
            if isinstance(edge, int) and 0 < edge < size:
                flow.say(node, edge, dims[at][:edge])
    dims[at] = dims[at][places.start : places.stop : places.step]
    return dims


@rule("pad", "constant_pad_nd")
def padded(flow: Flow, node: fx.Node) -> Value:
    """What is added at the ends can never go."""
    dims, amounts = list(flow.of(node.args[0])), cast("list[int]", node.args[1])
    for i in range(len(amounts) // 2):
        low, high = amounts[2 * i : 2 * i + 2]
        labels = dims[-1 - i]
        if low < 0 or high < 0:
            flow.symbols.hold(labels)
            dims[-1 - i] = np.zeros(shape_of(node)[-1 - i], np.int64)
        elif low or high:
            dims[-1 - i] = np.pad(labels, (low, high))
    return dims


@rule("repeat", "tile")
def repeated(flow: Flow, node: fx.Node) -> Value:
    """The dimensions, several times over."""
    times = cast("list[int]", node.args[1])
    dims, shape = flow.of(node.args[0]), shape_of(node)
    dims = [np.zeros(1, np.int64)] * (len(shape) - len(dims)) + dims
    times = [1] * (len(shape) - len(times)) + list(times)
    return [np.tile(d, t) for d, t in zip(dims, times, strict=True)]


@rule("repeat_interleave")
def interleaved(flow: Flow, node: fx.Node) -> Value:
    """Each place several times in a row."""
    dims, times = list(flow.of(node.args[0])), node.args[1]
    at = argument(node, "dim")
    if not isinstance(times, int) or at is None:
        return flow.closed(node)
    dims[at] = np.repeat(dims[at], times)
    return dims


@rule("roll")
def rolled(flow: Flow, node: fx.Node) -> Value:
    """Places go round."""
    dims, shifts = list(flow.of(node.args[0])), cast("list[int]", node.args[1])
    axes = cast("list[int]", argument(node, "dims", []))
    if not axes:
        return flow.closed(node)
    for shift, axis in zip(shifts, axes, strict=True):
        flow.symbols.hold(dims[axis])
        dims[axis] = np.roll(dims[axis], shift)
    return dims


@rule("pixel_shuffle", "pixel_unshuffle")
def folded(flow: Flow, node: fx.Node) -> Value:
    """Squares of pixels become channels, or the other way: [n, c·r², h, w] and [n, c, hr, wr]."""
    dims, factor = flow.of(node.args[0]), cast(int, node.args[1])
    *front, height, width = shape_of(node)
    flat = [np.zeros(height, np.int64), np.zeros(width, np.int64)]
    channels = dims[-3]
    if op_name(node) == "pixel_shuffle":
        each = channels.reshape(front[-1], factor * factor)
        flow.symbols.unite(each, each[:, :1])
        channels = each[:, 0]
    else:
        channels = np.repeat(channels, factor * factor)
    return [*dims[:-3], channels, *flat]


@rule("index", "index_select", "embedding")
def looked_up(flow: Flow, node: fx.Node) -> Value:
    """Rows by their number: the numbers mean places, so the dimension they count stays whole."""
    source, op = flow.of(node.args[0]), op_name(node)
    if op == "embedding":
        flow.symbols.hold(source[0], "its rows are chosen by number (embedding)")
        flow.call(node, embedding_dim=source[1])
        return [*flow.of(node.args[1]), source[1]]
    if op == "index_select":
        given: list[Any] = [None] * len(source)
        given[cast(int, node.args[1])] = node.args[2]
    else:
        given = list(cast("list[Any]", node.args[1]))
    given += [None] * (len(source) - len(given))
    used = [i for i, g in enumerate(given) if g is not None]
    if any("bool" in str(cast(fx.Node, given[i]).meta["val"].dtype) for i in used):
        return flow.closed(node)
    for i in used:
        flow.symbols.hold(source[i], "its places are chosen by number (index)")
    met = flow.meet([flow.of(given[i]) for i in used])
    if used == list(range(used[0], used[-1] + 1)):
        return [*source[: used[0]], *met, *source[used[-1] + 1 :]]
    return [*met, *(d for i, d in enumerate(source) if given[i] is None)]


# ---- views that split and merge dimensions --------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def viewed(flow: Flow, node: fx.Node) -> Value:
    """The same numbers in the same order under another shape.

    Dimensions fall into blocks of equal size before and after. In a block of several, the symbols
    of each dimension are followed to where its places end up: along one new dimension, they go
    there; along several, one of them is chosen to be cut and the others stay whole.
    """
    source = cast(fx.Node, node.args[0])
    before, shape = flow.of(source), shape_of(node)
    told = _told(node, len(shape))
    out: Dims = [np.zeros(n, np.int64) for n in shape]
    for ins, outs in blocks(tuple(len(d) for d in before), shape):
        if len(ins) == 1 and len(outs) == 1:
            out[outs[0]] = before[ins[0]]
            continue
        sizes = tuple(shape[j] for j in outs)
        literals = [told[j] for j in outs]
        found = _recut(flow, node, [before[i] for i in ins], sizes, literals)
        for j, labels in zip(outs, found, strict=True):
            out[j] = labels
    for size, labels in zip(told, out, strict=True):
        flow.say(node, size, labels)
    return out


def _told(node: fx.Node, count: int) -> list[Any]:
    """The sizes as the code gives them, None where it gives none."""
    op = op_name(node)
    if op == "unflatten":
        sizes = list(cast("list[Any]", argument(node, "sizes")))
        at = cast(int, argument(node, "dim")) % (count - len(sizes) + 1)
        return [None] * at + sizes + [None] * (count - at - len(sizes))
    given = node.args[1] if op in {"view", "reshape", "_unsafe_view"} else None
    return list(given) if isinstance(given, list | tuple) else [None] * count


def blocks(
    before: tuple[int, ...], after: tuple[int, ...]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The dimensions before and after a view, in the smallest runs of equal size; ones left out.

    >>> blocks((2, 5, 12), (2, 1, 5, 3, 4))
    [((0,), (0,)), ((1,), (2,)), ((2,), (3, 4))]
    """
    ins = [i for i, n in enumerate(before) if n != 1]
    outs = [j for j, n in enumerate(after) if n != 1]
    found = []
    while ins and outs:
        left, right = [ins.pop(0)], [outs.pop(0)]
        while (a := math.prod(before[i] for i in left)) != (
            b := math.prod(after[j] for j in right)
        ):
            if a < b:
                left.append(ins.pop(0))
            else:
                right.append(outs.pop(0))
        found.append((tuple(left), tuple(right)))
    return found


def _recut(
    flow: Flow, node: fx.Node, before: Dims, sizes: tuple[int, ...], literals: list[Any]
) -> Dims:
    """The symbols of the dimensions after a view, within one block."""
    coordinates = np.indices([len(d) for d in before]).reshape(len(before), -1)
    found: list[list[Labels]] = [[] for _ in sizes]
    for labels, at in zip(before, coordinates, strict=True):
        if flow.symbols.held(labels).all():
            continue
        spread = flow.symbols.find(labels)[at].reshape(sizes)
        along = [j for j in range(len(sizes)) if (spread != spread.take([0], j)).any()]
        if not along:
            flow.symbols.hold(labels)
            continue
        axis = along[0] if len(along) == 1 else _choose(flow, node, spread, along, literals)
        rows = np.moveaxis(spread, axis, 0).reshape(sizes[axis], -1)
        flow.symbols.unite(rows, rows[:, :1])
        found[axis].append(rows[:, 0])
        whole, first = np.unique(rows[:, 0], return_index=True)
        if len(whole) != sizes[axis]:  # a factor that the code may name
            flow.say(node, len(whole), rows[np.sort(first), 0])
    out = []
    for size, candidates in zip(sizes, found, strict=True):
        best = max(candidates, key=flow.symbols.kinds, default=np.zeros(size, np.int64))
        for other in candidates:  # two dimensions that may be cut were merged: one of them stays
            if other is not best:
                flow.symbols.hold(other)
        out.append(best)
    return out


def _choose(
    flow: Flow, node: fx.Node, spread: Labels, along: list[int], literals: list[Any]
) -> int:
    """Which of several dimensions that one was split into is cut: heads, or what is in each.

    The one whose size the code infers (-1), else the first whose size is an attribute of the
    module, else the last: sizes that are computed come after those that are given. Dimensions that
    are merged again after a transposition are a shuffle, whose groups stay.
    """
    if _is_shuffle(node):
        return along[-1]
    numbers = int_attributes(flow.owner(node))

    def score(axis: int) -> int:
        if literals[axis] == -1:
            return 2
        inside = len(np.unique(spread.take([0], axis)))
        return int(len(np.unique(spread)) // inside in numbers or spread.shape[axis] in numbers)

    best = max(score(a) for a in along)
    return next(a for a in along if score(a) == best) if best else along[-1]


def _is_shuffle(node: fx.Node) -> bool:
    """Whether only a transposition stands between the node and a view that undoes its split."""
    moved, here = False, node
    while len(here.users) == 1:
        here = next(iter(here.users))
        op = op_name(here) if here.op == "call_function" else ""
        if op in {"view", "reshape", "flatten"}:
            return moved and shape_of(here) == shape_of(node.args[0])
        if op not in {"transpose", "permute", "contiguous", "clone"}:
            return False
        moved |= op in {"transpose", "permute"}
    return False


def int_attributes(module: nn.Module | None) -> set[int]:
    """The whole numbers above one that a module holds in attributes of its own."""
    held = vars(module) if module is not None else {}
    return {v for k, v in held.items() if type(v) is int and v > 1 and not k.startswith("_")}
