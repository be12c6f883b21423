"""Whole blocks and layers that the network can do without, by the damage that is measured.

    y = x           where a block's output has the shape of its input, or
    y = x + 0       where what it gives is only added to something: the shortcut stays

Each block is left out in turn, on a copy, and the loss on the calibration data is taken; the one
whose loss is least goes, and all others are measured again before the next one does. What a block
alone read from (the norm before an attention) goes with it. A stacked recurrent layer loses whole
layers of its stack.

Veit, Wilber, Belongie: Residual networks behave like ensembles of relatively shallow networks (NIPS
2016) drop blocks of trained ResNets; Fan, Grave, Joulin: LayerDrop (ICLR 2020) and Sajjad et al.:
On the effect of dropping layers of pre-trained Transformer models (CSL 2023) do so with Transformer
layers. Where we differ: what may go is read off one run and the exported graph, never from names or
classes; the order is greedy by measured loss; networks need not be trained for it, and recover
trains what is left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from taut import edits
from taut.edits import Edit, register_edit
from taut.errors import FormatError, RecipeError, TaskError
from taut.groups.flow import module_stack, op_name
from taut.groups.running import run
from taut.modules import clone, owner
from taut.reshaping import Reshaping
from taut.statistics import Statistics
from taut.technique import matches, option, register_step
from taut.trace import Trace, export
from taut.unit_cuts import refuse_packed

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class DropBlocks(Reshaping):
    """Leave out the blocks, or layers, whose absence the calibration loss shows least.

    only: patterns of weights; a block may go where they match all weights in it. By default one
    block goes; `drop_blocks(most_loss=0.05)` drops as many as raise the loss by at most 5 %.
    """

    count: int | None = option(None, low=1, help="how many go; 1 where nothing else is said")
    ratio: float | None = option(None, low=0, below=1, help="how many go, of those that may")
    most_loss: float | None = option(
        None, low=0, help="the most that the calibration loss grows, relative to what it was"
    )
    of: str = option(
        "blocks", choices=("blocks", "branches", "layers"),
        help="blocks hold two weights or more; branches are what is added to a shortcut, such as "
        "an attention; layers hold one weight, or are one of a recurrent stack",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count is not None and self.ratio is not None:
            raise RecipeError(
                f"drop_blocks: count and ratio both say how many go, got count={self.count} and "
                f"ratio={self.ratio:g}; give one"
            )

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        refuse_packed(self.name, model)
        able = self._able(model, trace)
        total = len(able)
        most = self._most(total)
        try:
            whole = now = statistics.loss(model)
        except TaskError as error:
            raise RecipeError(f"drop_blocks: {error}") from error
        bound = math.inf if self.most_loss is None else whole + self.most_loss * abs(whole)
        outputs, reasons = run(model, trace.example).outputs, dict[str, str]()
        for dropped in range(most):
            tried = [
                found
                for block in able
                if (found := _try(model, block, trace, outputs, statistics, reasons)) is not None
            ]
            best = min(tried, key=lambda t: t.loss, default=None)
            if best is None or best.loss > bound or best.loss == math.inf:
                why = f"the loss would be {best.loss:.4g}" if best else "the network needs the rest"
                _log.log(
                    logging.WARNING if not dropped else logging.INFO,
                    "drop_blocks: %d of %d blocks went: %s", dropped, total, why,
                )  # fmt: skip
                break
            held = sum(p.numel() for p in model.parameters())
            model = edits.replay(model, best.changes)
            _log.info(
                "drop_blocks: %s goes, %d parameters: loss %.4g, was %.4g",
                best.block, held - sum(p.numel() for p in model.parameters()), best.loss, now,
            )  # fmt: skip
            now = best.loss
            able = _left(able, best)
        for name, reason in reasons.items():
            _log.info("drop_blocks: %s stays: %s", name, reason)
        return model

    def _most(self, able: int) -> int:
        if self.ratio is not None:
            return round(self.ratio * able)
        if self.count is None and self.most_loss is not None:
            return able
        count = self.count or 1
        if count > able:
            raise RecipeError(
                f"drop_blocks: count={count} are to go and {able} of only={self.only!r} may; ask "
                "for fewer"
            )
        return count

    def _able(self, model: nn.Module, trace: Trace) -> list[_Block]:
        """The blocks that may go, and the ways in which each may."""
        found = _blocks(model, trace, self.of)
        wanted = [b for b in found if all(matches(self.only, (n,)) for n in b.weights)]
        if not wanted:
            others = [o for o in ("blocks", "branches", "layers") if o != self.of]
            none = f"none; try of={others[0]!r} or of={others[1]!r}"
            known = ", ".join(b.name for b in found) or none
            raise RecipeError(
                f"drop_blocks: none of the {self.of} of only={self.only!r} gives the shape that it "
                f"reads, or is added to what does; those that do: {known}"
            )
        return wanted


# ---- which blocks may go, and how -----------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Something that may go. ways: the changes that each way takes; weights: of the sites in it."""

    name: str
    weights: tuple[str, ...]
    ways: tuple[tuple[Edit, ...], ...]


@dataclass(frozen=True)
class _Tried:
    block: str
    changes: tuple[Edit, ...]
    loss: float


def _try(
    model: nn.Module, block: _Block, trace: Trace, outputs: list[tuple[int, ...]],
    statistics: Statistics, reasons: dict[str, str],
) -> _Tried | None:  # fmt: skip
    """The loss without a block, in the better way; None where the network does not run so."""
    found = []
    for changes in block.ways:
        try:
            probe = edits.replay(clone(model), changes)
            gave = run(probe, trace.example).outputs
            loss = statistics.loss(probe)  # which takes faster ways than that run
        except Exception as error:  # whatever the network's own code makes of it
            line = (str(error).strip().splitlines() or [""])[0]
            reasons.setdefault(block.name, f"without it {type(error).__name__}: {line}")
            continue
        if gave != outputs:
            reasons.setdefault(block.name, f"without it the outputs are {gave[:3]}")
            continue
        found.append(_Tried(block.name, changes, loss if math.isfinite(loss) else math.inf))
    if found:
        reasons.pop(block.name, None)
    return min(found, key=lambda t: t.loss, default=None)


def _left(able: Sequence[_Block], best: _Tried) -> list[_Block]:
    """The blocks that are still there; layers of the same stack have moved up by one."""
    gone = [c.path for c in best.changes if isinstance(c, Drop)]
    kept = []
    for block in able:
        if block.name == best.block:
            continue
        paths = [c.path for way in block.ways for c in way if isinstance(c, Drop)]
        if any(_holds(g, p) or _holds(p, g) for g in gone for p in paths):
            continue
        (first, *_), *_ = block.ways
        (last, *_) = best.changes
        if isinstance(first, DropRecurrent) and isinstance(last, DropRecurrent):
            moved = first.layer - (first.layer > last.layer)
            block = block if first.path != last.path else _moved(block, first.path, moved)
        kept.append(block)
    return kept


def _holds(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f"{outer}.")


def _moved(block: _Block, path: str, layer: int) -> _Block:
    return replace(block, ways=((DropRecurrent(path=path, layer=layer),),))


@dataclass
class _Seen:
    """What a module gave when the network ran. outputs: how many where it gave a tuple, else 0."""

    calls: int = 0
    same: bool = False
    outputs: int = 0


def _blocks(model: nn.Module, trace: Trace, of: str) -> list[_Block]:
    """What may go. A module whose output is only added to something is a branch, not a block."""
    seen, branches = _look(model, trace), _Branches(model, trace)
    blocks, ends, layers = list[_Block](), list[_Block](), list[_Block]()
    for path, each in seen.items():
        module = model.get_submodule(path)
        if each.calls != 1:
            continue
        if type(module) in _STACKS:
            layers += _stack(path, cast(nn.RNNBase, module))
        own = _inside(trace, [path])
        feeders = branches.ends(path)
        if feeders is not None:
            before = [Drop(path=p, gives="input", outputs=seen[p].outputs) for p in feeders]
            change = Drop(path=path, gives="zero", outputs=each.outputs)
            weights = _inside(trace, [path, *feeders])
            ends.append(_Block(name=path, weights=weights, ways=((*before, change),)))
        if each.same and own:
            change = Drop(path=path, gives="input", outputs=each.outputs)
            block = _Block(name=path, weights=own, ways=((change,),))
            if len(own) == 1:
                layers.append(block)
            elif feeders is None:
                blocks.append(block)
    if of == "layers":
        return layers
    ends = list({b.weights: b for b in reversed(ends) if b.weights}.values())[::-1]
    if of == "branches":
        return ends
    blocks = [b for b in blocks if not any(set(o.weights) < set(b.weights) for o in blocks)]
    blocks = list({b.weights: b for b in reversed(blocks)}.values())[::-1]
    held = {w for b in blocks for w in b.weights}
    return blocks + [b for b in ends if len(b.weights) > 1 and not held & set(b.weights)]


def _inside(trace: Trace, paths: Sequence[str]) -> tuple[str, ...]:
    """The weights of the sites in some modules."""
    return tuple(s.name for s in trace.sites if any(_holds(p, n) for p in paths for n in s.names))


def _look(model: nn.Module, trace: Trace) -> dict[str, _Seen]:
    """Every module that ran, inner ones too."""
    probe = clone(model).eval()
    seen = {path: _Seen() for path, _ in probe.named_modules() if path}

    def look(path: str, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        each = seen[path]
        each.calls += 1
        x = next((v for v in (*given, *named.values()) if isinstance(v, Tensor)), None)
        several = isinstance(out, tuple)
        y = out[0] if several and out else out
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            each.same = x.shape == y.shape and x.dtype == y.dtype
        each.outputs = len(out) if several else 0

    for path, module in probe.named_modules():
        if path:
            module.register_forward_hook(
                lambda m, given, named, out, path=path: look(path, given, named, out),
                with_kwargs=True,
            )
    args, kwargs = trace.example_on(probe)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it does not call the layers inside
        with torch.no_grad():
            probe(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return {path: each for path, each in seen.items() if each.calls}


@dataclass
class _Branches:
    """Which modules give what is only added, read off the exported graph."""

    model: nn.Module
    trace: Trace
    nodes: list[fx.Node] = field(init=False)

    def __post_init__(self) -> None:
        graph = export(self.model, self.trace.example)[1].graph_module.graph
        self.nodes = [n for n in graph.nodes if n.op == "call_function"]
        self.stacks = {n: module_stack(n) for n in self.nodes}

    def ends(self, path: str) -> list[str] | None:
        """The modules before it that nothing else reads; None where it is no branch of a sum."""
        own = {n for n in self.nodes if path in self.stacks[n]}
        leaves = {n for n in own if any(u not in own for u in n.users)}
        sums = {_past(u) for n in leaves for u in n.users if u not in own}
        if len(leaves) != 1 or not sums:
            return None
        if not all(op_name(s) == "add" and len(s.all_input_nodes) == 2 for s in sums):
            return None
        dead = set(own)
        for node in reversed(self.nodes):
            if node.users and all(u in dead for u in node.users):
                dead.add(node)
        found: list[str] = []
        for node in self.nodes:
            for outer in self.stacks[node]:
                mine = [n for n in self.nodes if outer in self.stacks[n]]
                within = _holds(path, outer) or _holds(outer, path)
                if outer and not within and set(mine) <= dead:
                    found.append(outer)
                    break
        modules = {p: self.model.get_submodule(p) for p in found}
        held = [p for p, m in modules.items() if next(m.parameters(), None) is not None]
        return [p for p in held if not any(_holds(q, p) for q in held if q != p)]


def _past(node: fx.Node) -> fx.Node:
    """The node, or what alone reads it where it does nothing in eval mode."""
    while op_name(node) in ("dropout", "alias", "contiguous") and len(node.users) == 1:
        node = next(iter(node.users))
    return node


def _stack(path: str, layer: nn.RNNBase) -> Iterator[_Block]:
    """The layers of a recurrent stack that give what they read."""
    for i in range(layer.num_layers) if layer.num_layers > 1 else ():
        if not _why_not(layer, i):
            ways = 2 if layer.bidirectional else 1
            names = (n for ns in layer._all_weights[i * ways : (i + 1) * ways] for n in ns)
            weights = tuple(f"{path}.{n}" for n in names if n.startswith("weight"))
            change = DropRecurrent(path=path, layer=i)
            yield _Block(name=f"{path}:{i}", weights=weights, ways=((change,),))


# ---- structure ------------------------------------------------------------------------------


class Passing(nn.Module):
    """Gives the first tensor that it is given; outputs: the first of so many, 0 for it alone."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *given: Any, **named: Any) -> Any:
        x = next(v for v in (*given, *named.values()) if isinstance(v, Tensor))
        return (x, *[None] * (self.outputs - 1)) if self.outputs else x


class Nothing(Passing):
    """Gives a zero of the input's dtype, to be added to what a shortcut brings."""

    def forward(self, *given: Any, **named: Any) -> Any:
        x = next(v for v in (*given, *named.values()) if isinstance(v, Tensor))
        zero = x.new_zeros(())
        return (zero, *[None] * (self.outputs - 1)) if self.outputs else zero


@register_edit
@dataclass(frozen=True, kw_only=True)
class Drop(Edit):
    """A module goes: in its place stands what gives its `input` or a `zero`.

    outputs: how many the module gave, 0 for one that is no tuple; the others become None.
    """

    path: str
    gives: str
    outputs: int = 0

    def replay(self, model: nn.Module) -> nn.Module:
        if not self.path or self.gives not in ("input", "zero") or not 0 <= self.outputs <= 16:
            raise FormatError(
                f"drop: a module inside the model gives its 'input' or a 'zero', of up to 16 "
                f"outputs, got path={self.path!r}, gives={self.gives!r}, outputs={self.outputs}"
            )
        dropped = model.get_submodule(self.path)
        above, leaf = owner(model, self.path)
        made = (Passing if self.gives == "input" else Nothing)(self.outputs)
        above._modules[leaf] = made.train(dropped.training)
        return model


_STACKS = (nn.LSTM, nn.GRU, nn.RNN)


def _why_not(layer: nn.RNNBase, index: int) -> str:
    """Why a layer of a stack cannot go; "" where it can."""
    if not 0 <= index < layer.num_layers or layer.num_layers < 2:
        return f"it has {layer.num_layers} layers, one of which stays"
    width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    if index == 0 and layer.input_size != width:
        return f"its first layer reads {layer.input_size} numbers and gives {width}"
    return ""


@register_edit
@dataclass(frozen=True, kw_only=True)
class DropRecurrent(Edit):
    """One layer of a recurrent stack goes; those above it move down."""

    path: str
    layer: int

    def replay(self, model: nn.Module) -> nn.Module:
        stack = model.get_submodule(self.path)
        if type(stack) not in _STACKS:
            raise FormatError(
                f"drop_recurrent: {self.path!r} is no LSTM, GRU or RNN but a {type(stack).__name__}"
            )
        layer = cast(nn.RNNBase, stack)
        if reason := _why_not(layer, self.layer):
            raise FormatError(f"drop_recurrent: layer {self.layer} of {self.path!r}: {reason}")
        ways = 2 if layer.bidirectional else 1
        names = layer._all_weights
        moved = zip(names[self.layer * ways : -ways], names[(self.layer + 1) * ways :], strict=True)
        for below, above in moved:
            for name, source in zip(below, above, strict=True):
                layer._parameters[name] = layer._parameters[source]
        for name in (n for ns in names[-ways:] for n in ns):
            del layer._parameters[name]
        layer._all_weights = names[:-ways]
        layer._flat_weights_names = [n for ns in layer._all_weights for n in ns]
        layer.num_layers -= 1
        layer._init_flat_weights()
        return model
