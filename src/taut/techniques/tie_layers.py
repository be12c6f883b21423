"""One weight for several layers: it is stored once, held once and trained by all of them.

    W1, W2 := (W1 + W2') / 2,    W2' = s · P · W2 · Q,    |s| = |W1| / |W2|

Layers of equal shape are joined where their weights are nearest, |W2' − W1| / |W1|, or where they
are named. Before that a layer may be brought nearer without a change of what the network gives: by
a factor s, which goes into the batch norm behind it or into the layer that reads it through ReLU;
and by an order of its rows and columns (P, Q), which every other weight of these units follows.
Used before training, by name, it makes a recursive network: ALBERT's layers, or a head that is the
embedding.

Lan et al.: ALBERT (ICLR 2020) shares all of a Transformer's layers; Press, Wolf: Using the output
embedding to improve language models (EACL 2017) ties the head to the embedding; Ainsworth, Hayase,
Srinivasa: Git Re-Basin (ICLR 2023) matches units of two networks. Where we differ: trained layers
of one network are tied, and a factor or an order is looked at on the example and undone where it
changes an answer. What is near by distance need not be near in effect: recover after it.

Filters of one layer are tied by `tie_filters`, which leaves every layer as wide as it is; where the
layers that read them can be changed too, `merge_neurons` joins them for good.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from taut import edits
from taut.edits import Edit, register_edit
from taut.errors import FormatError, RecipeError, TraceError, did_you_mean
from taut.groups import Group, Groups
from taut.matching import assignment
from taut.modules import drop_flat_weights, owner, tensor_at, tensor_or_none
from taut.norms import bias_of, follow_scale, norm_of, plain_weight, scale_rows
from taut.reshaping import Reshaping
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Trace
from taut.types import Site
from taut.unit_cuts import refuse_packed

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class TieLayers(Reshaping):
    """Let layers of equal shape have one weight.

    `tie_layers(names="head=embedding, blocks.0=blocks.1=blocks.2")` ties what is named, weights or
    whole modules with all that is equal in name and shape in them; `tie_layers(count=2)` the
    nearest weights, so that two fewer are left.
    """

    names: str = option("", help="what is tied, like 'a=b=c, d.weight=e.weight'; '' by distance")
    count: int | None = option(None, low=1, help="how many weights go, the nearest first")
    most_distance: float | None = option(
        None, low=0, help="weights are tied up to this distance, relative to what they are"
    )
    start: str = option(
        "mean", choices=("mean", "first"), help="the weight at first: the mean of all, or the first"
    )
    scale: bool = option(True, help="bring a layer nearer by a factor that others make up for")
    permute: bool = option(False, help="bring a layer nearer by another order of its units")

    def __post_init__(self) -> None:
        super().__post_init__()
        told = [n for n in ("count", "most_distance") if getattr(self, n) is not None]
        if self.names and told:
            raise RecipeError(
                f"tie_layers: names says what is tied, got {told[0]}={getattr(self, told[0])} too; "
                "leave one out"
            )
        every = [name for group in self._named() for name in group]
        if any(len(g) < 2 for g in self._named()) or "" in every or len(set(every)) < len(every):
            raise RecipeError(
                f"tie_layers: names must be like 'a=b=c, d=e', got {self.names!r}; name two "
                "weights or modules at least, and each once"
            )

    def _named(self) -> list[list[str]]:
        groups = [g for g in self.names.split(",") if self.names]
        return [[name.strip() for name in g.split("=")] for g in groups]

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        refuse_packed(self.name, model)
        _check_numbers(model, trace)
        work = _Matching(model, trace, self.scale, self.permute)
        ties = list(self._asked(model)) if self.names else self._nearest(work)
        work.locked = {n for tie in ties for n in tie}
        for tie in ties:
            for name in tie[1:]:
                work.bring(tie[0], name)
        for tie in ties:
            _tie(model, tie, self.start)
        return model

    # ---- what is tied -------------------------------------------------------------------

    def _asked(self, model: nn.Module) -> Iterator[list[str]]:
        """The parameters that are named, or that have one name and shape in the modules named."""
        for group in self._named():
            found = [self._parameters(model, name) for name in group]
            ties = []
            for leaf in (n for n in found[0] if all(n in other for other in found[1:])):
                shapes = {tuple(other[leaf].shape) for other in found}
                if not leaf and len(shapes) > 1:
                    raise RecipeError(
                        f"tie_layers: weights that are tied have one shape, got "
                        f"{' and '.join(map(str, sorted(shapes)))} for {' and '.join(group)}"
                    )
                if len(shapes) == 1 and len({id(other[leaf]) for other in found}) > 1:
                    ties.append([f"{name}.{leaf}" if leaf else name for name in group])
            if not ties:
                raise RecipeError(
                    f"tie_layers: {' and '.join(group)} have nothing of one name and shape that is "
                    "not tied already"
                )
            yield from ties

    def _parameters(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        """The parameters of a module by their names in it; of a parameter itself, under ''."""
        if isinstance(tensor_or_none(model, name), nn.Parameter):
            return {"": tensor_at(model, name)}
        try:
            return dict(model.get_submodule(name).named_parameters())
        except AttributeError:
            known = [n for n, _ in (*model.named_modules(), *model.named_parameters()) if n]
            raise RecipeError(
                f"tie_layers: the network has no weight or module {name!r}"
                f"{did_you_mean(name, known)}"
            ) from None

    def _nearest(self, work: _Matching) -> list[list[str]]:
        """Clusters of sites, joined by the least distance of any two in them."""
        sites = self.sites(work.trace)
        near = sorted(
            (work.distance(a.name, b.name), a.name, b.name)
            for a, b in itertools.combinations(sites, 2)
            if (a.shape, a.kind) == (b.shape, b.kind)
        )
        if not near:
            raise RecipeError(
                f"tie_layers: no two weights of only={self.only!r} have one shape; name others by "
                "names='a=b'"
            )
        bound = math.inf if self.most_distance is None else self.most_distance
        most = self.count or (1 if self.most_distance is None else len(sites))
        clusters = {s.name: [s.name] for s in sites}
        done = 0
        for distance, a, b in near:
            if done == most or distance > bound:
                break
            if clusters[a] is clusters[b]:
                continue
            _log.info("tie_layers: %s and %s are %.3g of their size apart", a, b, distance)
            both = clusters[a] + clusters[b]
            clusters |= dict.fromkeys(both, both)
            done += 1
        if not done:
            _log.warning(
                "tie_layers: nothing is tied: %s and %s are the nearest, %.3g of their size apart",
                near[0][1], near[0][2], near[0][0],
            )  # fmt: skip
        elif self.count and done < self.count:
            raise RecipeError(
                f"tie_layers: count={self.count} weights are to go, and {done} of "
                f"only={self.only!r} can; ask for fewer"
            )
        found = {id(c): sorted(c, key=[s.name for s in sites].index) for c in clusters.values()}
        return [c for c in found.values() if len(c) > 1]


def _check_numbers(model: nn.Module, trace: Trace) -> None:
    for site in trace.sites:
        if not bool(tensor_at(model, site.name).isfinite().all()):
            raise RecipeError(f"tie_layers: site {site.name!r} holds NaN or infinite weights")


@torch.no_grad()
def _tie(model: nn.Module, names: list[str], start: str) -> None:
    held = [tensor_at(model, n).detach().double() for n in names]
    edit = Tie(names=names)
    edit.replay(model)
    edits.note(model, edit)
    first = tensor_at(model, names[0])
    value = held[0] if start == "first" else torch.stack(held).mean(0)
    first.copy_(value.to(first.dtype))
    _log.info("tie_layers: %s are one, of %d numbers", ", ".join(names), first.numel())


# ---- bringing a layer nearer ----------------------------------------------------------------


@dataclass
class _Matching:
    """Changes of a weight that leave every answer as it is. locked: weights that keep theirs."""

    model: nn.Module
    trace: Trace
    scale: bool
    permute: bool
    locked: set[str] = field(default_factory=set)
    groups: Groups | None = None
    settled: set[str] = field(default_factory=set)  # groups whose order serves a tie

    def __post_init__(self) -> None:
        if self.permute:
            try:
                self.groups = Groups(self.model, self.trace.example)
            except TraceError as error:
                raise RecipeError(f"tie_layers: permute=True: {error}") from error

    def distance(self, a: str, b: str) -> float:
        """|W_b' − W_a| / |W_a|, after the best factor and order that nothing shows."""
        first, second = (tensor_at(self.model, n).detach().double() for n in (a, b))
        for dim in (0, 1):
            if order := self._order(a, b, dim, second):
                second = _placed(second, dim, *order)
        if self._scales(a, b):
            second = second * _factor(first, second)
        return float((second - first).norm() / first.norm().clamp(min=1e-30))

    @torch.no_grad()
    def bring(self, a: str, b: str) -> None:
        """Change weight b, and what goes with it, to be near a."""
        for dim in (0, 1):
            second = tensor_at(self.model, b).detach().double()
            group = self._group(b, dim)
            order = self._order(a, b, dim, second)
            for each in (self._group(a, dim), group):
                self.settled |= {each.name} if each is not None else set()
            if order is not None and group is not None:
                self._reorder(group, order[1], b)
        if self._scales(a, b):
            first, second = (tensor_at(self.model, n).detach().double() for n in (a, b))
            self._rescale(b, _factor(first, second))

    # ---- order --------------------------------------------------------------------------

    def _group(self, name: str, dim: int) -> Group | None:
        for group in self.groups.groups if self.groups else ():
            if any(name in m.names and m.dim == dim for m in group.members):
                return group
        return None

    def _order(self, a: str, b: str, dim: int, second: Tensor) -> tuple[Tensor, Tensor] | None:
        """The places of b's units along a dimension, and the order that is most like a's."""
        one, other = self._group(a, dim), self._group(b, dim)
        if one is None or other is None or one is other or other.name in self.settled:
            return None
        places = [
            next(m.places for m in g.members if n in m.names and m.dim == dim)
            for g, n in ((one, a), (other, b))
        ]
        if places[0].shape != places[1].shape or (places[0] != places[1]).any():
            return None
        at = torch.from_numpy(places[0])
        first = tensor_at(self.model, a).detach().double()
        rows = [w.movedim(dim, 0)[at].flatten(1) for w in (first, second)]
        return at, assignment(rows[0] @ rows[1].T)

    def _reorder(self, group: Group, order: Tensor, name: str) -> None:
        def turn() -> None:
            for member in group.members:
                held = tensor_at(self.model, member.name).data
                held.copy_(_placed(held, member.dim, torch.from_numpy(member.places), order))

        if torch.equal(order, torch.arange(len(order))):
            return
        if _kept(self.model, self.trace, turn):
            _log.info("tie_layers: the units of %s go by another order, for %s", group.name, name)
        else:
            _log.info("tie_layers: %s keeps its order: the outputs depend on it", group.name)

    # ---- factor -------------------------------------------------------------------------

    def _site(self, name: str) -> Site | None:
        return next((s for s in self.trace.sites if name in s.names), None)

    def _takes(self, b: str) -> bool:
        """Whether something behind a weight can make up for a factor."""
        site = self._site(b)
        if site is None or site.aliases:
            return False
        if norm_of("tie_layers", self.model, self.trace, site) is not None:
            return True
        return any(
            f.source == site.name and f.only_reader and f.target != f.source
            and not self.locked & set(self.trace.site(f.target).names)
            and not self.trace.site(f.target).aliases
            for f in self.trace.feeds
        )  # fmt: skip

    def _scales(self, a: str, b: str) -> bool:
        sites = [self._site(n) for n in (a, b)]
        kinds = {s.kind for s in sites if s is not None}
        return bool(self.scale and None not in sites and len(kinds) == 1 and self._takes(b))

    def _rescale(self, b: str, factor: float) -> None:
        site = self.trace.site(b)
        norm = norm_of("tie_layers", self.model, self.trace, site)
        if norm is None:  # what is behind may keep factors above 0 alone
            factor = abs(factor)
        target = next((f.target for f in self.trace.feeds if f.source == site.name), "")

        def turn() -> None:
            weight = plain_weight("tie_layers", self.model, site)
            by = torch.full((len(weight),), factor, dtype=weight.dtype, device=weight.device)
            scale_rows(weight, bias_of("tie_layers", self.model, site), by)
            if norm is not None:
                var = cast(Tensor, norm.running_var)
                follow_scale(norm, by, (var + norm.eps) * by.square())
            else:
                tensor_at(self.model, target).data.div_(factor)

        if _kept(self.model, self.trace, turn):
            _log.info("tie_layers: %s is taken %.3g times; what follows makes up for it", b, factor)
        else:
            _log.info("tie_layers: %s keeps its size: what follows it keeps no factor", b)


def _factor(first: Tensor, second: Tensor) -> float:
    """What makes the second as large as the first, and of its sign; 1 where one is zero."""
    sizes = float(first.norm()), float(second.norm())
    by = sizes[0] / sizes[1] if min(sizes) > 0 else 1.0
    return math.copysign(by, float((first * second).sum()))


def _placed(weight: Tensor, dim: int, places: Tensor, order: Tensor) -> Tensor:
    """A copy of a weight whose units stand in another order."""
    moved = weight.movedim(dim, 0).clone()
    moved[places] = weight.movedim(dim, 0)[places[order]]
    return moved.movedim(0, dim)


def _kept(model: nn.Module, trace: Trace, change: Callable[[], None]) -> bool:
    """Make a change that is to change no answer; undone where it does on the example."""
    held = {n: t.clone() for n, t in model.state_dict().items()}
    before = _answers(model, trace)
    change()
    pairs = zip(before, _answers(model, trace), strict=True)
    if all(bool(((a - b).abs() <= 1e-3 * a.abs().max() + 1e-6).all()) for a, b in pairs):
        return True
    model.load_state_dict(held)
    return False


@torch.no_grad()
def _answers(model: nn.Module, trace: Trace) -> Sequence[Tensor]:
    args, kwargs = trace.example_on(model)
    training = model.training
    out = model.eval()(*args, **kwargs)
    model.train(training)
    leaves = torch.utils._pytree.tree_leaves(dict(out) if isinstance(out, dict) else out)
    return [t.double().clone() for t in leaves if isinstance(t, Tensor)]


# ---- structure ------------------------------------------------------------------------------


@register_edit
@dataclass(frozen=True, kw_only=True)
class Tie(Edit):
    """Parameters of equal shape become one; whatever is tied to one of them already follows."""

    names: list[str]

    def replay(self, model: nn.Module) -> nn.Module:
        found = [self._held(model, name) for name in self.names]
        if len(found) < 2 or len(set(self.names)) < len(self.names):
            raise FormatError(f"tie: two names or more, each once, got {self.names[:4]}")
        first = found[0]
        for name, each in zip(self.names, found, strict=True):
            if (each.shape, each.dtype) != (first.shape, first.dtype):
                raise FormatError(
                    f"tie: {self.names[0]} is {list(first.shape)} of {first.dtype} and {name} is "
                    f"{list(each.shape)} of {each.dtype}; what is one has one shape and dtype"
                )
        others = {id(p) for p in found}
        for module in model.modules():
            for leaf, held in list(module._parameters.items()):
                if id(held) in others and held is not first:
                    module._parameters[leaf] = first
                    if isinstance(module, nn.RNNBase):
                        drop_flat_weights(module)
        return model

    @staticmethod
    def _held(model: nn.Module, name: str) -> nn.Parameter:
        module, leaf = owner(model, name)
        held = module._parameters.get(leaf)
        if held is None:
            raise FormatError(f"tie: the model has no parameter {name!r}")
        return held
