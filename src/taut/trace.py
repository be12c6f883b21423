"""What a network consists of, read off `torch.export`'s graph: sites, work, and what feeds what.

The graph, not the module classes, says which parameter is multiplied by what and how often, so
a network of hand-written layers is traced like one of PyTorch's own.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from taut.errors import TraceError
from taut.modules import clone, device_of
from taut.types import Kind, Site

Example = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The outputs of one site reach the inputs of another, and nothing else does.

    Output channel c of `source` is read by `target` as its input channels
    [c * width, (c + 1) * width). Between them stand only operations that treat channels one by
    one. only_reader: no other operation reads the source.
    """

    source: str
    target: str
    width: int
    only_reader: bool


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Sites in the order of execution, work per example, and the links between sites.

    dropouts: for each dropout module, the name of the first site after it.
    """

    sites: tuple[Site, ...]
    parameters: int
    macs: int
    feeds: tuple[Feed, ...]
    dropouts: Mapping[str, str]
    example: Example

    def example_on(self, model: nn.Module) -> Example:
        """The example that was traced, on the device of a model."""
        device = device_of(model)
        args, kwargs = self.example
        return tuple(_to(a, device) for a in args), {k: _to(v, device) for k, v in kwargs.items()}

    def site(self, name: str) -> Site:
        return next(s for s in self.sites if name in s.names)


def trace(model: nn.Module, example: Example) -> Trace:
    """Trace a network on an example: positional and keyword arguments, batch first.

    The model is copied first and comes back untouched. Raises TraceError with the export's reason
    where the network cannot be traced (control flow that depends on data, as a rule).
    """
    args, kwargs = example
    copied = clone(model).eval().requires_grad_(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(copied, args, kwargs, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise TraceError(
            f"{type(model).__name__} cannot be traced by torch.export: "
            f"{reason[0] if reason else type(error).__name__}; the network must run on the "
            "task's example and not branch on the values of tensors"
        ) from error
    return _Reader(copied, program, example).read()


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()]
    return int(tensors[0].shape[0]) if tensors else 1


_CHANNELWISE = {
    "relu", "relu_", "relu6", "hardtanh", "leaky_relu", "leaky_relu_", "elu", "celu", "selu",
    "gelu", "silu", "silu_", "sigmoid", "tanh", "hardswish", "hardswish_", "hardsigmoid",
    "softplus", "mish", "prelu", "dropout", "feature_dropout", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "batch_norm", "contiguous", "clone", "alias",
}  # fmt: skip
_LINEAR = {"linear", "addmm", "mm", "matmul"}
_CONV = {"conv1d", "conv2d", "conv3d", "convolution"}
_RNN: dict[str, Kind] = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn"}


@dataclass
class _Channels:
    """A tensor whose dimension 1 holds the channels of one site, each `width` times in a row."""

    source: str
    width: int


class _Reader:
    """Walks the graph once, in order."""

    def __init__(self, model: nn.Module, program: Any, example: Example) -> None:
        self.model, self.example = model, example
        self.batch = max(_batch(*example), 1)
        self.graph: fx.Graph = program.graph
        named = {**program.graph_signature.inputs_to_parameters}
        self.parameter = {n: named[n.name] for n in self.graph.nodes if n.name in named}
        self.work: dict[str, tuple[Kind, int]] = {}
        self.macs = 0
        self.channels: dict[fx.Node, _Channels] = {}
        self.readers: dict[str, set[str]] = {}
        self.reads: list[tuple[_Channels, str]] = []
        self.dropouts: dict[str, str] = {}
        self.waiting: list[str] = []

    def read(self) -> Trace:
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._step(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._escapes(source)
        return Trace(
            sites=self._sites(),
            parameters=sum(p.numel() for p in self.model.parameters()),
            macs=self.macs // self.batch,
            feeds=self._feeds(),
            dropouts=self.dropouts,
            example=self.example,
        )

    def _step(self, node: fx.Node) -> None:
        op = _op(node)
        inputs = list(node.all_input_nodes)
        weights = [n for n in inputs if n in self.parameter and _dims(n) >= 2]
        if op == "dropout":
            self.waiting.extend(_module_path(node))
        if op in _RNN:
            self._recurrent(node, _RNN[op], weights)
        elif op == "embedding" and weights:
            self._site(weights[0], "embedding", 0)
        elif op in _CONV and len(weights) == 1:
            self._product(node, weights[0], "conv")
        elif op in _LINEAR and len(weights) == 1:
            self._product(node, weights[0], "linear")
        else:
            if op in _LINEAR or op in {"bmm", "baddbmm"}:
                self.macs += _numel(node) * _shape(inputs[-2 if op == "baddbmm" else 0])[-1]
            elif op == "scaled_dot_product_attention":
                query, key, value = (_shape(cast(fx.Node, a)) for a in node.args[:3])
                self.macs += math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
            self._pass_on(node, op)

    def _site(self, weight: fx.Node, kind: Kind, macs: int) -> None:
        name = self.parameter[weight]
        self.macs += macs
        module = self.model.get_submodule(name.rpartition(".")[0])
        kind = "attention" if isinstance(module, nn.MultiheadAttention) else kind
        first, before = self.work.get(name, (kind, 0))
        self.work[name] = (first, before + macs // self.batch)
        for path in self.waiting:
            self.dropouts.setdefault(path, name)
        self.waiting.clear()

    def _product(self, node: fx.Node, weight: fx.Node, kind: Kind) -> None:
        """A linear or a convolution: its work, what it reads, and the channels it makes."""
        shape, name = _shape(weight), self.parameter[weight]
        macs = _numel(node) * math.prod(shape[1:])
        self._site(weight, kind, macs)
        source = cast(fx.Node, node.args[0])
        carried = self.channels.get(source)
        aligned = kind == "conv" or (_op(node) == "linear" and _dims(source) == 2)
        grouped = kind == "conv" and len(node.args) > 6 and node.args[-1] != 1
        if carried is not None and aligned and not grouped:
            self.reads.append((carried, name))
            self.readers.setdefault(carried.source, set()).add(name)
        else:
            self._escapes(source)
        if kind == "conv" or (_op(node) == "linear" and _dims(node) == 2):
            self.channels[node] = _Channels(name, 1)

    def _recurrent(self, node: fx.Node, kind: Kind, weights: list[fx.Node]) -> None:
        """Each time step multiplies each weight once for each sequence of the batch."""
        first = node.all_input_nodes[0]
        steps = math.prod(_shape(first)[:-1])
        for weight in weights:
            self._site(weight, kind, steps * math.prod(_shape(weight)))
        for source in node.all_input_nodes:
            self._escapes(source)

    def _pass_on(self, node: fx.Node, op: str) -> None:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        carried = self.channels.get(source) if source is not None else None
        if carried is None or source is None:
            for other in node.all_input_nodes:
                self._escapes(other)
        elif op in _CHANNELWISE:
            self.channels[node] = carried
        elif op in {"flatten", "view", "reshape", "_unsafe_view"} and _joins(source, node):
            width = carried.width * math.prod(_shape(source)[2:])
            self.channels[node] = _Channels(carried.source, width)
        else:
            self._escapes(source)

    def _escapes(self, node: fx.Node) -> None:
        if node in self.channels:
            self.readers.setdefault(self.channels[node].source, set()).add("")

    def _sites(self) -> tuple[Site, ...]:
        tied: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        aliases = {names[0]: tuple(names[1:]) for names in tied.values()}
        primary = {n: names[0] for names in tied.values() for n in names}
        found: dict[str, Site] = {}
        for name, (kind, macs) in self.work.items():
            first = primary.get(name, name)
            seen = found.get(first)
            found[first] = Site(
                name=first,
                kind=seen.kind if seen else kind,
                shape=tuple(self.model.get_parameter(first).shape),
                macs=macs + (seen.macs if seen else 0),
                aliases=aliases.get(first, ()),
            )
        return tuple(found.values())

    def _feeds(self) -> tuple[Feed, ...]:
        return tuple(
            Feed(
                source=carried.source,
                target=target,
                width=carried.width,
                only_reader=self.readers[carried.source] == {target},
            )
            for carried, target in self.reads
        )


def _op(node: fx.Node) -> str:
    target = node.target
    if target is operator.getitem:
        return "getitem"
    return str(target).split(".")[1] if "." in str(target) else str(target)


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def _dims(node: fx.Node) -> int:
    return len(_shape(node))


def _numel(node: fx.Node) -> int:
    return math.prod(_shape(node))


def _joins(source: fx.Node, node: fx.Node) -> bool:
    """Whether the node joins all dimensions after the first into one."""
    before, after = _shape(source), _shape(node)
    return len(after) == 2 and after == (before[0], math.prod(before[1:]))


def _module_path(node: fx.Node) -> list[str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return [stack[-1][0]] if stack else []


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
