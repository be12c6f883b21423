"""The walk through an exported graph that gives every place of every tensor its symbol.

A rule says what one operation demands: which places of its inputs are the same, and which symbols
its output carries. Rules stand in movement.py (views, joins, parts) and arithmetic.py (products,
norms, recurrence); pointwise operations need none, their places meet by broadcasting. An operation
without a rule holds all that it reads: conservative, never wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from taut.groups.symbols import Dims, Labels, Symbols

Value = Dims | tuple[Dims, ...]
Rule = Callable[["Flow", fx.Node], Value]
RULES: dict[str, Rule] = {}
"""What each operation demands, by its name in ATen."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of these operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(frozen=True, eq=False)
class Literal:
    """A number in the code of a module that says a size: its value, and the places it counts.

    modules: the paths of the modules whose code runs, the innermost last. labels: None where the
    size is fixed. name: of the attribute that holds it, where PyTorch's own layers give it one.
    """

    node: fx.Node
    value: int
    labels: Labels | None
    name: str = ""

    @property
    def modules(self) -> list[str]:
        return module_stack(self.node)


@dataclass(eq=False)
class Flow:
    """The symbols of every tensor of a graph. dims: by node; literals: sizes that the code says."""

    model: nn.Module
    symbols: Symbols = field(default_factory=Symbols)
    dims: dict[fx.Node, Value] = field(default_factory=dict)
    literals: list[Literal] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)

    def walk(self, module: fx.GraphModule) -> None:
        """Give every node its symbols; placeholders must have theirs."""
        for node in module.graph.nodes:
            if node.op == "get_attr":
                if isinstance(node.meta.get("val"), Tensor):
                    self.dims[node] = self.fixed(node, "a constant of the code")
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.hold(source, "an output of the model")
            elif node.op == "call_function":
                self._step(module, node)

    def _step(self, module: fx.GraphModule, node: fx.Node) -> None:
        op = op_name(node)
        where = (module_stack(node) or [""])[-1]
        self.symbols.context = f"fixed in {op} of {where or 'the model'}"
        if str(node.target).startswith("wrap_with"):
            self.dims[node] = self._region(module, node)
        elif op == "getitem":
            value, index = self.dims.get(cast(fx.Node, node.args[0])), cast(int, node.args[1])
            self.dims[node] = value[index] if isinstance(value, tuple) else self.fixed(node)
        elif op in RULES:
            self.dims[node] = RULES[op](self, node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            self.dims[node] = self.meet([self.of(n) for n in node.all_input_nodes])
        elif op not in _SILENT:
            self.unknown.add(op)
            self.dims[node] = self.closed(node, f"read by {op}, of which no rule is known")

    def _region(self, module: fx.GraphModule, node: fx.Node) -> Value:
        """What runs under torch.no_grad or autocast is a graph of its own."""
        inner, at = next(
            (module.get_submodule(str(a.target)), i)
            for i, a in enumerate(node.args)
            if isinstance(a, fx.Node) and a.op == "get_attr"
        )
        assert isinstance(inner, fx.GraphModule)
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for own, given in zip(inputs, node.args[at + 1 :], strict=True):
            if isinstance(given, fx.Node):
                own.meta.setdefault("val", given.meta.get("val"))
            if given in self.dims:
                self.dims[own] = self.dims[cast(fx.Node, given)]
        result = next(n for n in inner.graph.nodes if n.op == "output").args[0]
        for each in inner.graph.nodes:
            if each.op == "call_function":
                self._step(inner, each)
        results = result if isinstance(result, list | tuple) else [result]
        return tuple(self.of(r) for r in results)

    # ---- what rules use -----------------------------------------------------------------

    def of(self, value: Any) -> Dims:
        """The symbols of an argument; none for a number."""
        found = self.dims.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, list) else []

    def meet(self, operands: list[Dims]) -> Dims:
        """Broadcast: places that fall together are the same."""
        out: Dims = []
        for dims in operands:
            longer, shorter = (out, dims) if len(out) >= len(dims) else (dims, out)
            met = list(longer)
            for i in range(1, len(shorter) + 1):
                one, other = longer[-i], shorter[-i]
                if len(one) == len(other):
                    self.symbols.unite(one, other)
                elif len(one) == 1:
                    met[-i] = other
            out = met
        return out

    def fixed(self, node: fx.Node, reason: str = "") -> Dims:
        """Symbols for an output none of whose places can go."""
        out = []
        for size in shape_of(node):
            label = self.symbols.fresh(1)
            self.symbols.hold(label, reason)
            out.append(np.repeat(label, size))
        return out

    def closed(self, node: fx.Node, reason: str = "") -> Value:
        """Hold every input of a node and its outputs."""
        for source in node.all_input_nodes:
            self.hold(source, reason)
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return tuple(
                [np.zeros(int(n), np.int64) for n in v.shape] if isinstance(v, Tensor) else []
                for v in value
            )
        return self.fixed(node, reason)

    def hold(self, source: fx.Node, reason: str = "") -> None:
        """Hold every place of a tensor."""
        value = self.dims.get(source, [])
        for dims in value if isinstance(value, tuple) else (value,):
            for labels in dims:
                self.symbols.hold(labels, reason)

    def say(self, node: fx.Node, value: Any, labels: Labels | None) -> None:
        """Note a number in the code that counts these places."""
        if type(value) is int and value > 1:
            free = labels is not None and not self.symbols.held(labels).all()
            self.literals.append(Literal(node, value, labels if free else None))

    def call(self, node: fx.Node, **sizes: Labels) -> None:
        """Note sizes by the names that PyTorch's layers have for them."""
        for name, labels in sizes.items():
            self.literals.append(Literal(node, len(labels), labels, name))

    def tie(self, labels: Labels, parts: int) -> Labels:
        """Equal parts of a dimension are cut at the same places; the symbols of the first part."""
        each = labels.reshape(parts, -1)
        self.symbols.unite(each, each[:1])
        first: Labels = each[0]
        return first

    def owner(self, node: fx.Node) -> nn.Module | None:
        """The innermost module whose code the node comes from."""
        stack = module_stack(node)
        try:
            return self.model.get_submodule(stack[-1]) if stack else None
        except AttributeError:
            return None


_SILENT = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size", "detach_"}


def op_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default; in-place variants go by their plain name."""
    target = node.target
    if target is operator.getitem:
        return "getitem"
    name = str(target).split(".")[1] if "." in str(target) else str(target)
    return name.rstrip("_") if not name.startswith("_") else name


def module_stack(node: fx.Node) -> list[str]:
    """The paths of the modules whose code made the node, the innermost last."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [str(path).partition("@")[0] for path, _ in stack]


def shape_of(node: Any) -> tuple[int, ...]:
    """The sizes of a node's tensor; none where it is not one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the operation's schema, however it was given."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = cast(Any, node.target)._schema
    for i, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            return node.args[i] if i < len(node.args) else default
    return default
