"""Which weights read the units of a group, and whether reading is all that mixes them.

Units that are treated one by one on their way, by activations, batch norms, pools and views, meet
only in the weights that sum over them. There a unit that goes can be told by those that stay.
Where something else looks at them together (a layer norm, a softmax over them, a product of
activations), or one and the same weight makes and reads them, the group says why not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from taut.groups.arithmetic import windowed
from taut.groups.find import Group, Groups
from taut.groups.flow import RULES, argument, module_stack, op_name, shape_of
from taut.groups.movement import viewed
from taut.groups.symbols import Dims


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A weight that sums over the units, along one of its dimensions.

    places: [units, places of each] along it. bias: what is added to every sum, a parameter; or
    mean: what a batch norm behind takes off; both empty where there is none.
    """

    name: str
    dim: int
    places: Any
    bias: str = ""
    mean: str = ""


def readers(groups: Groups, group: Group) -> tuple[list[Reader], str]:
    """The weights that read a group's units, or none and why its units cannot be told by others."""
    walk = _Walk(groups, group)
    for node in list(groups.flow.dims):
        if node.op == "call_function" and walk.ins(node):
            reason = walk.step(node)
            if reason:
                where = (module_stack(node) or [""])[-1] or "the model"
                return [], f"{reason} in {where}"
    both = walk.reads.keys() & walk.makes
    if both:
        return [], f"{min(both)[0]} makes the units and reads them too"
    found = []
    for (name, dim), after in walk.reads.items():
        places = [m.places for m in group.members if m.name == name and m.dim == dim]
        (bias, mean), *more = after
        single = not more
        found += [
            Reader(name=name, dim=dim, places=places[0], bias=bias * single, mean=mean * single)
        ]
    return found, "" if found else "no weight reads its units"


@dataclass
class _Walk:
    """reads: by weight and dimension, what follows each use of it. makes: whose rows units are."""

    groups: Groups
    group: Group
    reads: dict[tuple[str, int], dict[tuple[str, str], None]] = field(default_factory=dict)
    makes: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.flow = self.groups.flow
        self.roots = self.flow.symbols.find(self.group.roots)
        own = {id(dims): name for name, (_, _, dims) in self.groups.tensors.items()}
        self.named = {
            n: own[id(d)]
            for n, d in self.flow.dims.items()
            if n.op == "placeholder" and id(d) in own
        }

    def along(self, value: Any) -> list[int]:
        """The dimensions of a tensor along which units lie."""
        return self._along(self.flow.of(value))

    def _along(self, dims: Dims) -> list[int]:
        find = self.flow.symbols.find
        return [i for i, d in enumerate(dims) if np.isin(find(d), self.roots).any()]

    def ins(self, node: fx.Node) -> list[fx.Node]:
        """What a node reads that carries units; those of several tensors too."""
        found = []
        for source in node.all_input_nodes:
            value = self.flow.dims.get(source, [])
            each = value if isinstance(value, tuple) else (value,)
            if any(self._along(d) for d in each):
                found.append(source)
        return found

    def weight(self, value: Any) -> str:
        """The parameter that a tensor is, or is a plain view of; empty where it is none."""
        while isinstance(value, fx.Node) and value.op == "call_function":
            if op_name(value) not in _PLAIN:
                return ""
            value = value.args[0]
        return self.named.get(cast(fx.Node, value), "")

    def step(self, node: fx.Node) -> str:
        """Note what a node reads or makes; why it mixes units, empty where it does not."""
        op = op_name(node)
        if op == "getitem" or (op in _PLAIN and self.weight(node.args[0])):
            return ""
        if op == "linear":
            return self._product(node, node.args[0], -1, node.args[1], -1)
        if op.startswith("conv"):
            return self._convolution(node)
        if op in _MATRICES:
            a, b = node.args[_MATRICES[op] :][:2]
            last = -2 if len(self.flow.of(b)) > 1 else 0
            return self._product(node, a, -1, b, last)
        if op in _RECURRENT or op.endswith("_cell"):
            return self._recurrent(node)
        if op == "scaled_dot_product_attention":
            q, k, v = node.args[:3]
            sums = [(q, -1), (k, -1), (k, -2), (v, -2)]
            mixed = any(d % len(self.flow.of(n)) in self.along(n) for n, d in sums)
            return "attention sums over the units" if mixed else ""
        if op == "embedding":
            self._made(node.args[0])
            return ""
        return self._one_by_one(node, op)

    def _made(self, value: Any, but: int | None = None) -> None:
        if name := self.weight(value):
            own = self.groups.tensors[name][2]
            self.makes |= {(name, d) for d in self._along(own) if d != but}

    def _product(self, node: fx.Node, a: Any, i: int, b: Any, j: int) -> str:
        """A sum over dimension i of a and j of b."""
        if i % max(len(self.flow.of(a)), 1) not in self.along(a):
            self._made(a)
            self._made(b)
            return ""
        for weight, dim in ((b, j), (a, i)):
            if name := self.weight(weight):
                return self._read(node, name, self._dim_of(weight, dim))
        return f"{op_name(node)} sums over the units of activations"

    def _dim_of(self, value: Any, dim: int) -> int:
        """Which dimension of the parameter a dimension of its view is; -1 where it is unclear."""
        labels = self.flow.of(value)[dim]
        own = self.groups.tensors[self.weight(value)][2]
        same = [i for i, d in enumerate(own) if np.array_equal(d, labels)]
        return same[0] if len(same) == 1 else -1

    def _read(self, node: fx.Node, name: str, dim: int, follows: bool = True) -> str:
        members = [m for m in self.group.members if m.name == name and m.dim == dim and m.trained]
        if not members:
            return f"{name} is not read as a whole"
        after = self._after(node) if follows else ("", "")
        self.reads.setdefault((name, dim), {})[after] = None
        self._made_by(name, dim)
        return ""

    def _made_by(self, name: str, but: int) -> None:
        own = self.groups.tensors[name][2]
        self.makes |= {(name, d) for d in self._along(own) if d != but}

    def _after(self, node: fx.Node) -> tuple[str, str]:
        """The bias of a product, or the running mean of the batch norm that alone reads it."""
        op = op_name(node)
        if op == "linear" or (op.startswith("conv") and "transpose" not in op):
            bias = argument(node, "bias")
            if isinstance(bias, fx.Node):
                return self.named.get(bias, ""), ""
            users = list(node.users)
            if len(users) == 1 and op_name(users[0]) == "batch_norm":
                return "", self.named.get(cast(fx.Node, users[0].args[3]), "")
        return "", ""

    def _convolution(self, node: fx.Node) -> str:
        x, weight = node.args[:2]
        groups = cast(int, argument(node, "groups", 1))
        at = len(self.flow.of(x)) - len(shape_of(weight)) + 1
        others = [d for d in self.along(x) if d > at]
        if others:
            return "a convolution slides over the units"
        if at not in self.along(x):
            self._made(weight)
            return ""
        if groups == len(self.flow.of(x)[at]):
            self._made(weight)
            return ""
        name = self.weight(weight)
        if not name or name not in self.named.values():
            return "the weight of a convolution is computed"
        return self._read(node, name, 0 if "transpose" in op_name(node) else 1)

    def _recurrent(self, node: fx.Node) -> str:
        """Every matrix reads what its columns meet: inputs, states, cells."""
        lists = [a for a in node.args if isinstance(a, list | tuple)]
        held = node.args[2:] if op_name(node).endswith("_cell") else lists[-1]
        for value in cast("list[Any]", held):
            name = self.weight(value)
            if len(shape_of(value)) == 2 and 1 in self.along(value):
                reason = self._read(node, name, 1, follows=False) if name else "it is computed"
                if reason:
                    return reason
            else:
                self._made(value)
        return ""

    def _one_by_one(self, node: fx.Node, op: str) -> str:
        value = self.flow.dims[node]
        outs = value if isinstance(value, tuple) else (value,)
        carried = any(self._along(d) for d in outs)
        axis = argument(node, "dim") if op in _ALONG else None
        for source in self.ins(node):
            over = self.along(source)
            if isinstance(axis, int) and axis % len(self.flow.of(source)) in over:
                return f"{op} goes over the units"
            if op in _LAST and max(over, default=-1) >= len(self.flow.of(source)) - len(
                cast("list[int]", node.args[1])
            ):
                return f"{op} looks at the units together"
        if op == "group_norm" and node.args[1] != len(self.flow.of(node.args[0])[1]):
            return f"{op} looks at the units together"
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        known = pointwise or op in _CHANNELWISE or RULES.get(op) in _MOVES
        return "" if known and carried else f"{op} looks at the units together"


_PLAIN = {"t", "transpose", "permute", "numpy_T", "mT", "alias", "detach", "clone", "contiguous"}
_MATRICES = {"mm": 0, "bmm": 0, "matmul": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
"""Products, and the place of their first factor."""
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
_ALONG = {"softmax", "_softmax", "log_softmax", "cumsum", "cumprod"}
_LAST = {"layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm"}
_CHANNELWISE = {
    "batch_norm", "instance_norm", "_native_batch_norm_legit_no_training", "group_norm", "glu",
    "mean", "sum", "amax", "amin", "var", "std", "prelu", *_LAST,
}  # fmt: skip
_MOVES = {
    windowed, viewed,
    *(f for f in RULES.values() if f.__module__.endswith("movement")),
}  # fmt: skip
"""Rules of operations that treat units one by one."""
