"""Groups of places that must be cut together, read off the exported graph of a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from taut.errors import RecipeError, TraceError, did_you_mean
from taut.groups import arithmetic, movement
from taut.groups.flow import Flow, op_name, shape_of
from taut.groups.running import run
from taut.groups.symbols import Dims, Labels
from taut.trace import Example, batch_of, export, macs_of

assert arithmetic  # it holds the rules,
assert movement  # and so does this

Places = NDArray[np.int64]
Cuts = Mapping[str, Sequence[int]]
"""For each group by name, the units that stay; one that stands there twice is copied."""
Times = NDArray[np.int64]
"""How often each symbol stands after a cut: 0 where it goes, 1 where it stays, more if copied."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """Where the units of a group lie along one dimension of a parameter or buffer.

    places: [units, places of each], as many of each unit. names: more than one where it is tied.
    """

    names: tuple[str, ...]
    dim: int
    places: Places
    trained: bool

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Units that can be removed one by one: channels, heads, hidden units.

    A unit is cut from every member at once. granularity: the places that one unit takes in the
    first member: the width of a head, or how many groups lose a channel together. parameters,
    macs: what one unit holds and does for one example, as the network stands.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    roots: Labels
    parameters: int
    macs: int

    @property
    def granularity(self) -> int:
        return int(self.members[0].places.shape[1])


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A dimension of a parameter, or a part of it, that cannot be cut, and why."""

    name: str
    dim: int
    places: int
    reason: str


class Groups:
    """The groups of a network, what cannot be cut, and what any cut would leave.

    model: a copy of the network that was traced. unknown: operations of which no rule is known;
    what they read stays whole.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        """Raises TraceError where the network cannot be exported or shares memory in views."""
        _check_aliases(model)
        self.example = example
        self.model, program = export(model, example)
        self.batch = max(batch_of(*example), 1)
        self.flow = Flow(self.model)
        self.graph: fx.GraphModule = program.graph_module
        self.tensors: dict[str, tuple[tuple[str, ...], Tensor, Dims]] = {}
        self._open(program.graph_signature)
        self.flow.walk(self.graph)
        self.ran = run(self.model, example)
        self.unknown = tuple(sorted(self.flow.unknown))
        steps = [(n, op_name(n)) for n in self.flow.dims if n.op == "call_function"]
        self._work = [(n, op) for n, op in steps if _macs(n, op, shape_of)]
        self.groups, self.whole = self._found()

    def _open(self, signature: Any) -> None:
        """Fresh symbols for the parameters and buffers, held ones for all else that comes in."""
        names: dict[int, list[str]] = {}
        held = {}
        both = (self.model.named_parameters, self.model.named_buffers)
        for name, value in (nv for each in both for nv in each(remove_duplicate=False)):
            names.setdefault(id(value), []).append(name)
            held[name] = value
        given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        symbols, stored = self.flow.symbols, self.model.state_dict().keys()
        for node in (n for n in self.graph.graph.nodes if n.op == "placeholder"):
            found = held.get(given.get(node.name, ""))
            if not node.users:
                continue  # what the example does not reach is no part of a group
            if found is None:
                constant = node.name in signature.inputs_to_lifted_tensor_constants
                what = "a constant of the code" if constant else "an input of the model"
                self.flow.dims[node] = self.flow.fixed(node, what)
                continue
            own = tuple(names[id(found)])
            if own[0] not in stored:
                self.flow.dims[node] = self.flow.fixed(node, "a buffer that no file keeps")
                continue
            if own[0] not in self.tensors:
                self.tensors[own[0]] = own, found, [symbols.fresh(n) for n in found.shape]
            self.flow.dims[node] = self.tensors[own[0]][2]

    def _found(self) -> tuple[tuple[Group, ...], tuple[Whole, ...]]:
        trained = {n for n, _ in self.model.named_parameters(remove_duplicate=False)}
        free, whole = self._free(trained)
        members, orders = _members(free)
        groups: list[Group] = []
        taken: dict[str, int] = {}
        work = self._macs_of_units([np.array(o) for o in orders])
        for places, order, macs in zip(members, orders, work, strict=True):
            own = [
                Member(names=self.tensors[n][0], dim=d, places=p, trained=n in trained)
                for n, d, p in places
            ]
            own.sort(key=lambda m: (not m.trained, m.dim > 0, len(self.tensors[m.name][2]) < 2))
            weights = [m for m in own if m.trained]
            if len(order) == 1:
                told = ((m.name, m.dim, m.places.size) for m in weights if m.places.size > 1)
                whole += [Whole(name=n, dim=d, places=p, reason=_ONE) for n, d, p in told]
            elif weights:
                first = own[0]
                base = first.name if first.dim == 0 else f"{first.name}:{first.dim}"
                taken[base] = taken.get(base, 0) + 1
                name = base if taken[base] == 1 else f"{base}#{taken[base]}"
                groups.append(
                    Group(name=name, units=len(order), members=tuple(own), roots=np.array(order),
                          parameters=self._numbers(weights), macs=macs)
                )  # fmt: skip
        return tuple(groups), tuple(whole)

    def _free(self, trained: set[str]) -> tuple[list[_Free], list[Whole]]:
        """The dimensions with places that may go, and those, or parts of them, that may not."""
        symbols = self.flow.symbols
        free, whole = list[_Free](), []
        for name, (_, _, dims) in self.tensors.items():
            for dim, labels in enumerate(dims):
                held = symbols.held(labels)
                if held.any() and len(labels) > 1 and name in trained:
                    reason = symbols.reason(int(labels[held.argmax()]))
                    whole.append(Whole(name=name, dim=dim, places=int(held.sum()), reason=reason))
                if not held.all():
                    free.append((name, dim, np.where(held, 0, symbols.find(labels))))
        return free, whole

    def _numbers(self, members: Iterable[Member]) -> int:
        """Parameters that go with one unit."""
        kept: dict[str, float] = {}
        for m in members:
            size = len(self.tensors[m.name][2][m.dim])
            kept[m.name] = kept.get(m.name, 1.0) * (1 - m.places.shape[1] / size)
        return sum(round((1 - k) * self.tensors[n][1].numel()) for n, k in kept.items())

    def _macs_of_units(self, groups: Sequence[Labels]) -> list[int]:
        """Multiply-accumulates of the whole graph that go with one unit of each group."""
        symbols = self.flow.symbols
        first = {int(g[0]): i for i, g in enumerate(groups)}
        saved = [0] * len(groups)
        for node, op in self._work:
            touched = [self.flow.of(n) for n in (node, *node.all_input_nodes)]
            value = self.flow.dims[node]
            touched += list(value) if isinstance(value, tuple) else []
            here = {int(r) for d in touched for x in d for r in np.unique(symbols.find(x))}
            before = _macs(node, op, shape_of)
            for root in here & first.keys():
                times = np.ones(int(symbols._count), np.int64)
                times[root] = 0
                after = _macs(node, op, lambda n, times=times: self.planned(n, times))
                saved[first[root]] += before - after
        return [s // self.batch for s in saved]

    # ---- what a cut would leave ---------------------------------------------------------

    def __getitem__(self, name: str) -> Group:
        """A group by its name."""
        for group in self.groups:
            if group.name == name:
                return group
        near = did_you_mean(name, [g.name for g in self.groups])
        raise RecipeError(f"groups: there is no group {name!r}{near}")

    def times(self, cuts: Cuts) -> Times:
        """How often each symbol stands afterwards; checks that units kept are of their group."""
        times = np.ones(self.flow.symbols._count, np.int64)
        for name, keep in cuts.items():
            group, kept = self[name], np.asarray(keep, np.int64)
            fits = len(kept) and kept.min() >= 0 and kept.max() < group.units
            if not fits:
                raise RecipeError(
                    f"groups: {name} has the units 0 to {group.units - 1}, at least one of which "
                    f"stays, got {list(map(int, kept[:8]))}"
                )
            times[group.roots] = np.bincount(kept, minlength=group.units)
        return times

    def kept(self, labels: Labels, times: Times) -> Places:
        """The places of a dimension that stay; a copy comes right after what it is a copy of.

        Places in a row that are one unit's (the pixels of a flattened channel) are copied as one.
        """
        roots = self.flow.symbols.find(labels)
        each = times[roots]
        if not len(each) or each.max() <= 1:
            return np.flatnonzero(each)
        starts = np.flatnonzero(np.r_[True, roots[1:] != roots[:-1]])
        runs = np.split(np.arange(len(roots)), starts[1:])
        return np.concatenate([np.tile(run, each[run[0]]) for run in runs])

    def planned(self, node: Any, times: Times) -> tuple[int, ...]:
        """The shape that a node's tensor would have."""
        dims = self.flow.of(node)
        return tuple(len(self.kept(d, times)) for d in dims) if dims else shape_of(node)

    def shapes(self, cuts: Cuts) -> dict[str, tuple[int, ...]]:
        """The shape that every parameter and buffer would have, by its first name."""
        times = self.times(cuts)
        return {
            name: tuple(len(self.kept(d, times)) for d in dims)
            for name, (_, _, dims) in self.tensors.items()
        }

    def parameters(self, cuts: Cuts) -> int:
        """The parameters that would stay."""
        shapes = self.shapes(cuts)
        named = self.model.named_parameters()
        return sum(
            int(np.prod(shapes[n], dtype=np.int64)) if n in shapes else p.numel() for n, p in named
        )

    def macs(self, cuts: Cuts) -> int:
        """The multiply-accumulates that one example would take."""
        times = self.times(cuts)
        work = sum(_macs(n, op, lambda x: self.planned(x, times)) for n, op in self._work)
        return work // self.batch


_Free = tuple[str, int, Labels]
"""A parameter or buffer, a dimension of it, and the sets its places belong to (0: held)."""
_ONE = "all of it is one unit"


def _members(free: Sequence[_Free]) -> tuple[list[list[_Free]], list[list[int]]]:
    """The groups: where the units of each lie, [units, places] a dimension, and its sets in order.

    Units that stand in the same dimensions, equally often, are of one group: they are told by a
    sum of random marks of the dimensions.
    """
    marks = np.random.default_rng(0).integers(1, 2**62, len(free)).tolist()
    signature: dict[int, int] = {}
    for mark, (_, _, roots) in zip(marks, free, strict=True):
        each, counts = np.unique(roots, return_counts=True)
        for root, count in zip(each.tolist(), counts.tolist(), strict=True):
            signature[root] = (signature.get(root, 0) + mark * count) % (2**61 - 1)
    signature.pop(0, None)
    numbers: dict[int, int] = {}
    index = {r: numbers.setdefault(mark, len(numbers)) for r, mark in signature.items()}
    members: list[list[_Free]] = [[] for _ in numbers]
    orders: list[list[int]] = [[] for _ in numbers]
    for name, dim, roots in free:
        seats: dict[int, list[int]] = {}
        for place, root in enumerate(roots.tolist()):
            if root:
                seats.setdefault(root, []).append(place)
        for number in dict.fromkeys(index[r] for r in seats):
            orders[number] = orders[number] or [r for r in seats if index[r] == number]
            rows = np.array([seats[r] for r in orders[number]])
            members[number].append((name, dim, rows))
    return members, orders


def _macs(node: fx.Node, op: str, shape: Any) -> int:
    """As trace counts them: a recurrent layer multiplies every weight once for each step."""
    if op in {"lstm", "gru", "rnn_tanh", "rnn_relu"}:
        lists = [a for a in node.args if isinstance(a, list | tuple)]
        each = [shape(w) for w in cast("list[Any]", lists[-1])]
        steps = int(np.prod(shape(node.args[0])[:-1], dtype=np.int64))
        return int(steps * sum(s[0] * s[1] for s in each if len(s) == 2))
    if op.endswith("_cell"):
        rows = int(np.prod(shape(node.args[0])[:-1], dtype=np.int64))
        return int(rows * sum(s[0] * s[1] for s in map(shape, node.args[2:4])))
    return macs_of(node, op, shape)


def _check_aliases(model: nn.Module) -> None:
    """Two parameters in one memory cannot be cut apart; one parameter of two names can."""
    seen: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.named_parameters():
        if not value.numel():
            continue
        start = value.untyped_storage().data_ptr()
        if start in seen:
            raise TraceError(
                f"groups: {name} and {seen[start][0]} are two parameters in one memory, so that "
                "none can be cut alone; copy one, or make them one parameter of two names"
            )
        seen[start] = name, value
