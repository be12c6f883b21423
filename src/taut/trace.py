"""What a network consists of, read off `torch.export`'s graph: sites, work, and what feeds what.

The graph, not the module classes, says which parameter is multiplied by what and how often, so
a network of hand-written layers is traced like one of PyTorch's own.
"""

from __future__ import annotations

import math
import operator
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from taut.errors import TraceError
from taut.full_lengths import full_lengths
from taut.modules import clone, device_of, to_device
from taut.norm_readers import norm_readers
from taut.quiet import silenced
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

    vectors: what no site holds: biases, norms, and bare parameters such as a table of positions.
    dropouts: for each dropout module the first site after it. norms: for each site whose outputs a
    batch norm alone reads, its path. readers: for each weight of a layer norm that only Linear
    weights read, theirs.
    """

    sites: tuple[Site, ...]
    vectors: tuple[Site, ...]
    parameters: int
    macs: int
    feeds: tuple[Feed, ...]
    dropouts: Mapping[str, str]
    example: Example
    norms: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def example_on(self, model: nn.Module) -> Example:
        """The example that was traced, on the device of a model."""
        device = device_of(model)
        args, kwargs = self.example
        return tuple(to_device(a, device) for a in args), {
            k: to_device(v, device) for k, v in kwargs.items()
        }

    @property
    def places(self) -> tuple[Site, ...]:
        """Sites and vectors: everywhere that a technique may recode."""
        return self.sites + self.vectors

    def site(self, name: str) -> Site:
        return next(s for s in self.places if name in s.names)


def trace(model: nn.Module, example: Example) -> Trace:
    """Trace a network on an example: positional and keyword arguments, batch first.

    The model is copied first and comes back untouched. Raises TraceError with the export's reason
    where the network cannot be traced (control flow that depends on data, as a rule).
    """
    return _Reader(*export(model, example), example).read()


def export(
    model: nn.Module, example: Example, any_batch: bool = False, any_length: bool = False
) -> tuple[nn.Module, ExportedProgram]:
    """A copy of a network and the graph that it runs on an example, in eval mode.

    any_batch, any_length: the graph takes any size of the first dimension, and of the second, where
    the network does. Raises TraceError with the export's reason where there is none.
    """
    copied = clone(model).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    device, fused = device_of(copied), torch.backends.mha.get_fastpath_enabled()
    args = tuple(to_device(a, device) for a in example[0])
    kwargs = {k: to_device(v, device) for k, v in example[1].items()}
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    dims = [d for d, is_free in enumerate((any_batch, any_length)) if is_free]
    for value in tree_leaves((args, kwargs)) if dims else ():
        if isinstance(value, Tensor) and value.dim():
            shapes[value] = {d: torch.export.Dim.AUTO for d in dims if d < value.dim()}
    free = shapes if dims else None
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it hides weights in one fused operation
        with silenced(), full_lengths(copied):
            program = torch.export.export(copied, args, kwargs, strict=False, dynamic_shapes=free)
    except Exception as error:
        reason = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        raise TraceError(
            f"{type(model).__name__} cannot be traced by torch.export: {': '.join(reason)}"
            f"{_line_of(error)}; the network must run on the task's example and not branch on the "
            "values of tensors"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return copied, program


def _line_of(error: BaseException) -> str:
    """The last line of the network's own code that an error came through."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f for f in frames if not f.filename.startswith(ours)]
    return (
        f" (at {Path(lines[-1].filename).name}:{lines[-1].lineno}: {lines[-1].line})"
        if lines
        else ""
    )


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many examples the arguments hold: the size of the first tensor."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()]
    return int(tensors[0].shape[0]) if tensors else 1


_CHANNELWISE = {
    "relu", "relu_", "relu6", "hardtanh", "leaky_relu", "leaky_relu_", "elu", "celu", "selu",
    "gelu", "silu", "silu_", "sigmoid", "tanh", "hardswish", "hardswish_", "hardsigmoid",
    "softplus", "mish", "prelu", "dropout", "feature_dropout", "max_pool1d", "max_pool2d",
    "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "batch_norm", "contiguous", "clone", "alias",
}  # fmt: skip
_FACTORS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "embedding": ("embedding", (0,)),
    "embedding_bag": ("embedding", (0,)),
    "linear": ("linear", (1,)),
    "bilinear": ("linear", (2,)),
    **dict.fromkeys(("mm", "bmm", "matmul", "mv", "tensordot"), ("linear", (1, 0))),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), ("linear", (2, 1))),
    "inner": ("linear", (1, 0)),
    "addmv": ("linear", (1,)),
    **{f"conv{way}{n}d": ("conv", (1,)) for way in ("", "_transpose") for n in (1, 2, 3)},
}
"""Operations with a weight: the kind of its site, and at which argument it may stand."""
_OF_SEVERAL = {"einsum": 1, "linalg_multi_dot": 0, "chain_matmul": 0}
"""Products of a list of tensors, and the argument that it is."""
_RECURRENT: dict[str, Kind] = {
    "lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn", "lstm_cell": "lstm",
    "gru_cell": "gru", "rnn_tanh_cell": "rnn", "rnn_relu_cell": "rnn",
}  # fmt: skip
_VIEWS = {
    "t", "transpose", "numpy_T", "mT", "permute", "movedim", "chunk", "split", "split_with_sizes",
    "unbind", "getitem", "select", "slice", "narrow", "view", "reshape", "flatten", "unflatten",
    "squeeze", "unsqueeze", "contiguous", "clone", "detach", "alias", "to",
}  # fmt: skip
"""Operations whose result holds the very numbers of a parameter, or a part of them."""


_OUT_FIRST = {"linear", "conv1d", "conv2d", "conv3d"}
"""Operations that make one channel of each row of their weight."""
_JOINING = {"flatten", "view", "reshape", "_unsafe_view"}


@dataclass
class _Channels:
    """A tensor whose dimension 1 holds the channels of one site, each `width` times in a row."""

    source: str
    width: int


class _Reader:
    """Walks the graph once, in order."""

    def __init__(self, model: nn.Module, program: ExportedProgram, example: Example) -> None:
        self.model, self.example = model, example
        self.batch = max(batch_of(*example), 1)
        self.module: fx.GraphModule = program.graph_module
        tied: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        self.aliases = {names[0]: tuple(names[1:]) for names in tied.values()}
        first = {n: names[0] for names in tied.values() for n in names}
        named = program.graph_signature.inputs_to_parameters
        nodes = self.module.graph.nodes
        self.parameter = {n: first[named[n.name]] for n in nodes if n.name in named}
        self.work: dict[str, tuple[Kind, int]] = {}
        self.macs = 0
        self.channels: dict[fx.Node, _Channels] = {}
        self.readers: dict[str, set[str]] = {}
        self.reads: list[tuple[_Channels, str]] = []
        self.dropouts: dict[str, str] = {}
        self.waiting: list[str] = []
        self.makers: dict[str, list[fx.Node]] = {}

    def read(self) -> Trace:
        nodes = self.module.graph.nodes
        self._walk(self.module)
        sites = self._sites()
        return Trace(
            sites=sites,
            vectors=self._vectors(sites),
            parameters=sum(p.numel() for p in self.model.parameters()),
            macs=self.macs // self.batch,
            feeds=self._feeds(),
            dropouts=self.dropouts,
            example=self.example,
            norms=self._norms(),
            readers=norm_readers(nodes, self.parameter),
        )

    def _walk(self, module: fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.op == "call_function" and str(node.target).startswith("wrap_with"):
                self._region(module, node)
            elif node.op == "call_function":
                self._step(node, _op(node))
            elif node.op == "output":
                self._escape(node)

    def _region(self, module: fx.GraphModule, node: fx.Node) -> None:
        """What runs under torch.no_grad or autocast is a graph of its own, read in its place."""
        inner, at = next(
            (found, i)
            for i, a in enumerate(node.args)
            if isinstance(a, fx.Node) and a.op == "get_attr"
            for found in [module.get_submodule(str(a.target))]
        )
        assert isinstance(inner, fx.GraphModule)
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for own, given in zip(inputs, node.args[at + 1 :], strict=True):
            own.meta.setdefault("val", cast(fx.Node, given).meta.get("val"))
            if given in self.parameter:
                self.parameter[own] = self.parameter[cast(fx.Node, given)]
        self._walk(inner)
        self._escape(node)

    def _step(self, node: fx.Node, op: str) -> None:
        if op == "dropout":
            self.waiting.extend(p for p in _module_path(node) if self._drops(p))
        if op in _VIEWS and node.args[0] in self.parameter:
            self.parameter[node] = self.parameter[cast(fx.Node, node.args[0])]
            return
        if op in _RECURRENT:
            self._recurrent(node, op)
            return
        kind, weights = self._weights(node, op)
        macs = macs_of(node, op)
        for i, weight in enumerate(weights):
            self._site(weight, kind, 0 if i else macs)
        if not weights:
            self.macs += macs
        self._flow(node, op, weights[0] if weights else None)

    def _weights(self, node: fx.Node, op: str) -> tuple[Kind, list[fx.Node]]:
        """The parameters, or parts of them, that an operation multiplies by."""
        kind, places = _FACTORS.get(op, ("linear", ()))
        factors = [node.args[i] for i in places]
        if op in _OF_SEVERAL:
            factors = list(cast("list[Any]", node.args[_OF_SEVERAL[op]]))[::-1]
        found = [cast(fx.Node, f) for f in factors if f in self.parameter]
        return kind, [f for f in found if _dims(f) >= 2]

    def _site(self, weight: fx.Node, kind: Kind, macs: int) -> None:
        name = self.parameter[weight]
        self.macs += macs
        module = self.model.get_submodule(name.rpartition(".")[0])
        kind = "attention" if isinstance(module, nn.MultiheadAttention) else kind
        first, before = self.work.get(name, (kind, 0))
        self.work[name] = (first, before + macs)
        for path in self.waiting:
            self.dropouts.setdefault(path, name)
        self.waiting.clear()

    def _drops(self, path: str) -> bool:
        return isinstance(getattr(self.model.get_submodule(path), "p", None), float)

    def _recurrent(self, node: fx.Node, op: str) -> None:
        """Each time step multiplies each weight once for each sequence of the batch."""
        steps = math.prod(_shape(node.args[0])[:-1])
        lists = [a for a in node.args if isinstance(a, list | tuple)]
        held = node.args[2:] if op.endswith("_cell") else lists[-1]
        for weight in cast("list[Any]", held):
            if weight in self.parameter and _dims(weight) == 2:
                self._site(weight, _RECURRENT[op], steps * _numel(weight))
        self._escape(node)

    def _flow(self, node: fx.Node, op: str, weight: fx.Node | None) -> None:
        """Which channels the node reads, which it hands on, and which end in it."""
        source = cast(fx.Node, node.args[0]) if node.args else None
        carried = self.channels.get(source) if isinstance(source, fx.Node) else None
        name = self.parameter[weight] if weight is not None and weight.op == "placeholder" else ""
        makes = bool(name) and op in _OUT_FIRST and _dims(node) == _dims(weight)
        if makes:
            self.channels[node] = _Channels(name, 1)
            self.makers.setdefault(name, []).append(node)
        taken = False
        if carried is not None and source is not None:
            grouped = op.startswith("conv") and len(node.args) > 6 and node.args[6] != 1
            if makes and _dims(source) == _dims(node) and not grouped:
                self.reads.append((carried, name))
                self.readers.setdefault(carried.source, set()).add(name)
                taken = True
            elif op in _CHANNELWISE and ("pool" not in op or _dims(node) == int(op[-2]) + 2):
                self.channels[node] = carried
                taken = True
            elif op in _JOINING and _joins(source, node):
                width = carried.width * math.prod(_shape(source)[2:])
                self.channels[node] = _Channels(carried.source, width)
                taken = True
        self._escape(node, but=source if taken else None)

    def _escape(self, node: fx.Node, but: fx.Node | None = None) -> None:
        """The inputs of the node are read by something that is no site."""
        for source in node.all_input_nodes:
            if source is not but and source in self.channels:
                self.readers.setdefault(self.channels[source].source, set()).add("")
                if _op(node).endswith("_"):  # it changes them where they are
                    del self.channels[source]

    def _sites(self) -> tuple[Site, ...]:
        return tuple(
            Site(
                name=name,
                kind=kind,
                shape=tuple(self.model.get_parameter(name).shape),
                macs=macs // self.batch,
                aliases=self.aliases[name],
            )
            for name, (kind, macs) in self.work.items()
        )

    def _vectors(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        taken = {name for site in sites for name in site.names}
        return tuple(
            Site(name=name, kind="vector", shape=tuple(value.shape), macs=0,
                 aliases=self.aliases[name])
            for name, value in self.model.named_parameters()
            if name not in taken and value.dim() and value.is_floating_point()
        )  # fmt: skip

    def _norms(self) -> dict[str, str]:
        """Sites that are multiplied by once, and read by one batch norm with a scale."""
        found = {}
        for name, nodes in self.makers.items():
            readers = list(nodes[0].users)
            if len(nodes) == len(readers) == 1 and _op(readers[0]) == "batch_norm":
                scale = readers[0].args[1]
                if scale in self.parameter and readers[0].args[0] is nodes[0]:
                    found[name] = self.parameter[cast(fx.Node, scale)].rpartition(".")[0]
        return found

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


def macs_of(node: fx.Node, op: str, shape: Callable[[Any], tuple[int, ...]] | None = None) -> int:
    """Multiply-accumulates of one operation, for the whole batch.

    shape: of a node's tensor, where not the one that was traced.
    """
    of = shape or _shape
    a: Any = node.args
    if op in {"linear", "mm", "bmm", "matmul", "mv", "inner", "dot", "vdot"}:
        return math.prod(of(node)) * of(a[0])[-1]
    if op in {"addmm", "baddbmm", "addmv"}:
        return math.prod(of(node)) * of(a[1])[-1]
    if op == "addbmm":
        return math.prod(of(a[1])) * of(a[2])[-1]
    if op in {"linalg_multi_dot", "chain_matmul"}:
        return _chained([of(o) for o in a[0]])
    if op == "bilinear":
        return math.prod(of(node)) * math.prod(of(a[2])[1:])
    if op.startswith("conv_transpose"):
        return math.prod(of(a[0])) * math.prod(of(a[1])[1:])
    if op in {"conv1d", "conv2d", "conv3d"}:
        return math.prod(of(node)) * math.prod(of(a[1])[1:])
    if op == "tensordot":
        return math.prod(of(node)) * math.prod(int(of(a[0])[d]) for d in a[2])
    if op == "einsum":
        return _summed(a[0], [of(o) for o in a[1]])
    if op == "scaled_dot_product_attention":
        query, key, value = of(a[0]), of(a[1]), of(a[2])
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _chained(shapes: list[tuple[int, ...]]) -> int:
    """The least MACs of a product of matrices, which may begin and end with a vector."""
    sizes = [shapes[0][0] if len(shapes[0]) == 2 else 1, *(s[-1] for s in shapes[:-1])]
    sizes.append(shapes[-1][1] if len(shapes[-1]) == 2 else 1)
    least: dict[tuple[int, int], int] = {(i, i): 0 for i in range(len(shapes))}
    for span in range(1, len(shapes)):
        for i in range(len(shapes) - span):
            j = i + span
            least[i, j] = min(
                least[i, k] + least[k + 1, j] + sizes[i] * sizes[k + 1] * sizes[j + 1]
                for k in range(i, j)
            )
    return least[0, len(shapes) - 1]


def _summed(equation: str, shapes: list[tuple[int, ...]]) -> int:
    """MACs of an einsum, whose operands are multiplied from left to right.

    What only one of a pair has, and nothing after it, is summed before they are multiplied.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    terms: list[set[str]] = []
    for term, shape in zip(inputs.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        more = range(len(shape) - len(before) - len(after), 0, -1)  # what the dots stand for
        labels = [*before, *(f"{dots}{i}" for i in more), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
        terms.append(set(labels))
    if not arrow:
        output = "".join(c for c in inputs if inputs.count(c) == 1) + "..."
    kept = set(output) | {c for c in sizes if c.startswith("...") and "..." in output}
    macs, left = 0, terms[0]
    for i, right in enumerate(terms[1:], 2):
        needed = kept.union(*terms[i:])
        macs += math.prod(sizes[c] for c in left & right | (left ^ right) & needed)
        left = (left | right) & needed
    return macs


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def _dims(node: Any) -> int:
    return len(_shape(node))


def _numel(node: Any) -> int:
    return math.prod(_shape(node))


def _joins(source: fx.Node, node: fx.Node) -> bool:
    """Whether the node joins all dimensions after the first into one."""
    before, after = _shape(source), _shape(node)
    return len(after) == 2 and after == (before[0], math.prod(before[1:]))


def _module_path(node: fx.Node) -> list[str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return [stack[-1][0]] if stack else []
