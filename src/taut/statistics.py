"""What calibration data tell about each site: its sensitivity, inputs and gradients.

How much the loss grows as it is pruned, what its weight is multiplied with (products.py), and the
loss's gradients, example by example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from taut.errors import TaskError
from taut.modules import plain_copy, tensor_at
from taut.pattern import Pattern
from taut.products import Product, UnitMoments, products, unit_moments
from taut.trace import Trace
from taut.types import Site

SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss against sparsity for one site, every other site left whole."""

    sparsities: tuple[float, ...]
    losses: tuple[float, ...]
    baseline: float

    def slopes(self, numel: int) -> list[tuple[float, float]]:
        """(damage a weight, weights) of the curve's lower convex hull, in rising order.

        Where a step costs less than the one before, the two are joined; where the loss falls
        again, that is read as luck.
        """
        points = [(0.0, 0.0), *zip(self.sparsities, self.losses, strict=True)]
        worst, hull = 0.0, list[tuple[float, float]]()  # (damage, weights) of each segment
        for (before, _), (sparsity, loss) in itertools.pairwise(points):
            damage = max(0.0, loss - self.baseline - worst)
            worst += damage
            hull.append((damage, (sparsity - before) * numel))
            while len(hull) > 1 and hull[-1][0] * hull[-2][1] <= hull[-2][0] * hull[-1][1]:
                last = hull.pop()
                hull[-1] = (hull[-1][0] + last[0], hull[-1][1] + last[1])
        return [(damage / weights, weights) for damage, weights in hull]


class Calibration(Protocol):
    """A network's loss on the same few examples."""

    def __call__(self, model: nn.Module) -> float:
        """The mean over the examples, in eval mode, without gradients."""

    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        """The loss of each example alone, in eval mode, to be differentiated."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Of one weight, over the examples: the mean of g and of g², each of the weight's shape."""

    mean: Tensor
    squares: Tensor


class Statistics:
    """Facts about a model's sites, gathered when they are first asked for.

    model: copied, never touched. loss: on the calibration data; without it whatever needs data
    refuses. A function of the network is enough for all but gradients. trace: of the original.
    curves: sensitivities of this very model that are known, to which those found are added.
    """

    def __init__(
        self, model: nn.Module, loss: Calibration | Callable[[nn.Module], float] | None = None,
        trace: Trace | None = None, curves: dict[str, Curve] | None = None,
    ) -> None:  # fmt: skip
        self.trace = trace
        self._model = model
        self._loss = loss
        self._curves: dict[str, Curve] = {} if curves is None else curves
        self._fisher: dict[str, Tensor] = {}

    def loss(self, model: nn.Module) -> float:
        """The loss of any network on the calibration data. Raises TaskError without data."""
        return self._needed("a search for what to keep")(model)

    def sensitivity(self, site: Site, pattern: Pattern | None = None) -> Curve:
        """The loss as this site alone is pruned by magnitude, without recovery.

        pattern: blocks, which then go as one; by default single weights.
        """
        key = f"{site.name} in {pattern}" if pattern else site.name
        if key not in self._curves:
            self._curves[key] = self._scan(site, pattern)
        return self._curves[key]

    def least_damage(
        self, sites: tuple[Site, ...], sparsity: float, pattern: Pattern | None = None
    ) -> dict[str, float]:
        """Sparsities that remove `sparsity` of all the weights at the least summed damage.

        The weights go in the order of what they cost, so that at the end one more weight would
        cost the same at every site.
        """
        steps = sorted(
            (slope, i, weights)
            for i, site in enumerate(sites)
            for slope, weights in self.sensitivity(site, pattern).slopes(site.numel)
        )
        total = sum(s.numel for s in sites)
        left = sparsity * total
        removed = [0.0] * len(sites)
        for _, i, weights in steps:
            taken = min(weights, left)
            removed[i] += taken
            left -= taken
        each = {s.name: r / s.numel for s, r in zip(sites, removed, strict=True)}
        if left > 0:  # beyond the last point scanned all sites shrink alike
            kept = (1 - sparsity) * total / (total - sum(removed))
            each = {n: 1 - (1 - s) * kept for n, s in each.items()}
        return each

    def products(self, site: Site, diagonal: bool = False) -> list[Product]:
        """What the site's weight is multiplied with in the model as it is now.

        Gathered anew each time: what was pruned before this site changes its inputs, and how far
        they drifted from those of the model as it was at first, if that has changed. diagonal: no
        correlations. Raises TaskError without data, where the data are no numbers or always the
        same, and where nothing multiplies by the weight in a way that can be seen.
        """
        loss = self._needed(f"what site {site.name!r} is multiplied with")
        first, probe = self.first, plain_copy(self._model)

        def run_first(_: nn.Module, args: Any, kwargs: Any) -> None:
            first(*args, **kwargs)

        before = None
        if not diagonal and not _same(first, probe):  # else nothing drifted
            probe.register_forward_pre_hook(run_first, with_kwargs=True)
            before = tensor_at(first, site.name)
        found = products(lambda: loss(probe), tensor_at(probe, site.name), diagonal, before)
        if not found:
            raise TaskError(
                f"what site {site.name!r} is multiplied with cannot be seen: the calibration data "
                "do not reach it, or its layer computes with the weight before it multiplies by "
                f"it; choose another criterion, like 'obd', or leave it out by only='!{site.name}'"
            )
        if not all(bool(p.moments.isfinite().all()) for p in found):
            raise TaskError(
                f"the inputs of site {site.name!r} are not all numbers; look for NaN in the "
                "training data or in the network"
            )
        if site.kind != "embedding" and all(_is_constant(p) for p in found):
            raise TaskError(
                f"the inputs of site {site.name!r} are the same in all the calibration data, which "
                f"tells nothing; give training data that differ, or leave it out by "
                f"only='!{site.name}'"
            )
        return found

    def units(self, wanted: Sequence[tuple[str, int, Tensor]]) -> list[UnitMoments]:
        """What the units that weights read have to do with each other, in the model as it is now.

        wanted: for each weight its name, the dimension along which units lie in it, and their
        places, [units, places of each]. Raises TaskError without data, and where what a weight
        reads is no number.
        """
        loss = self._needed("what units are alike")
        probe = plain_copy(self._model)
        given = [(tensor_at(probe, name), dim, places) for name, dim, places in wanted]
        found = unit_moments(lambda: loss(probe), given)
        for (name, _, _), each in zip(wanted, found, strict=True):
            if not bool(each.moments.isfinite().all()):
                raise TaskError(
                    f"what {name!r} is multiplied with is not all numbers; look for NaN in the "
                    "training data or in the network"
                )
        return found

    def felt(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """How much the network's outputs feel what layers give, in the model as it is now.

        Of each Linear or Conv layer Σ Jᵀ · J over all that it gives, [out, out] float64, with J the
        derivative of all outputs by the channels at one place: by random signs, the same each time
        (Hutchinson 1990). What the data do not reach is left out. Raises TaskError without data.
        """
        loss = self._needed("what the outputs feel")
        probe, twin = plain_copy(self._model), plain_copy(self._model).eval().requires_grad_(True)
        signs, found = torch.Generator().manual_seed(0), dict[str, Tensor]()
        given: list[tuple[str, int, Tensor]] = []

        def keep(layer: nn.Module, out: Tensor, name: str) -> Tensor:
            sides = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # type: ignore[arg-type]
            given.append((name, out.dim() - 1 - sides, out))
            return out.clone()  # what follows may work in place

        def feel(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.clear()
            with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
                out = twin(*args, **kwargs)
                leaves = tree_leaves(dict(out) if isinstance(out, dict) else out)
                outs = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
                for _draw in range(_DRAWS if outs and given else 0):
                    drawn = [torch.randint(0, 2, t.shape, generator=signs) * 2 - 1 for t in outs]
                    total = torch.stack(
                        [(t * d.to(t)).sum() for t, d in zip(outs, drawn, strict=True)]
                    ).sum()
                    whole = torch.autograd.grad(
                        total, [t for *_, t in given], retain_graph=True, allow_unused=True,
                        materialize_grads=True,
                    )  # fmt: skip
                    for (name, dim, _out), g in zip(given, whole, strict=True):
                        rows = g.movedim(dim, -1).flatten(0, -2).double()
                        found[name] = found.get(name, torch.zeros(())) + rows.T @ rows

        for name in layers:
            twin.get_submodule(name).register_forward_hook(
                lambda layer, _, out, name=name: keep(layer, out, name)
            )
        probe.register_forward_pre_hook(feel, with_kwargs=True)
        loss(probe)
        return {name: g.cpu() for name, g in found.items()}

    def gradients(self, site: Site) -> Gradients:
        """Of the loss with respect to the site's weight, in the model as it was at first.

        Raises TaskError without data, and where the gradients are no numbers or all zero.
        """
        found = self._gradients[self._name(site)]
        if not bool((found.mean.isfinite() & found.squares.isfinite()).all()):
            raise TaskError(
                f"the gradient of the loss at site {site.name!r} is not a number; look for NaN in "
                "the training data or the task's loss"
            )
        if not any(bool(g.squares.any()) for g in self._gradients.values()):
            raise TaskError(
                "the gradients of the loss on the calibration data are all zero, so they tell "
                "nothing; choose criterion='magnitude', or look at the task's loss"
            )
        return found

    def fisher(self, site: Site, width: int) -> Tensor:
        """Blocks of the empirical Fisher matrix: [blocks, width, width], mean of g · gᵀ.

        g: an example's gradient, flattened and cut into pieces of `width`, the last one filled up
        with zeros. Raises TaskError as `gradients` does.
        """
        self.gradients(site)
        name = self._name(site)
        if name not in self._fisher:
            every = sum(w.numel() for w in self._weights.values()) * width * 4
            names = list(self._weights) if every <= _MOST_BYTES else [name]
            self._fisher = self._blocks(names, width)
        return self._fisher[name]

    def inputs(self, site: Site, most: int = 2**20) -> Tensor:
        """What the site's layer reads first, in the model as it is now: [n, ...], on the CPU.

        Of a Linear layer and of attention [n, in], whatever the lengths of the sequences. Gathered
        anew each time, as `products` are; batches are joined until there are `most` numbers. Raises
        TaskError without data, where the layer is not called with numbers or its inputs differ in
        shape, and where they are not finite or all the same.
        """
        loss = self._needed(f"what the layer of site {site.name!r} reads")
        path, seen = site.name.rpartition(".")[0], list[Tensor]()

        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach().float().cpu()
            seen.append(x.reshape(-1, x.shape[-1]) if isinstance(layer, by_rows) else x)
            if sum(t.numel() for t in seen) >= most:
                raise _EnoughError

        probe = plain_copy(self._model)
        layer, by_rows = probe.get_submodule(path), (nn.Linear, nn.MultiheadAttention)
        hook = layer.register_forward_pre_hook(look, prepend=True)
        try:
            loss(probe)
        except _EnoughError:  # the rest of the data would tell no more
            pass
        finally:
            hook.remove()
        if not seen or any(t.shape[1:] != seen[0].shape[1:] for t in seen):
            raise TaskError(
                f"what layer {path!r} reads cannot be seen: the calibration data do not reach it, "
                f"or come in several shapes; leave it out by only='!{path}'"
            )
        found = torch.cat(seen)
        if not bool(found.isfinite().all()):
            raise TaskError(
                f"the inputs of layer {path!r} are not all numbers; look for NaN in the training "
                "data or in the network"
            )
        if found.numel() > 1 and bool((found == found.flatten()[0]).all()):
            raise TaskError(
                f"the inputs of layer {path!r} are all {float(found.flatten()[0]):.3g} in the "
                "calibration data, which tells nothing; give training data that differ, or leave "
                f"it out by only='!{path}'"
            )
        return found

    # ---- gathering ----------------------------------------------------------------------

    @cached_property
    def first(self) -> nn.Module:
        """The model as it was when this, or what a weight is multiplied with, was first asked."""
        return plain_copy(self._model).eval()

    @cached_property
    def _probe(self) -> nn.Module:
        """The model as it was when gradients were first asked for."""
        return plain_copy(self._model).requires_grad_(False)

    @property
    def _weights(self) -> dict[str, nn.Parameter]:
        named = self._probe.named_parameters()
        return {n: p for n, p in named if p.dim() > 1 and p.is_floating_point()}

    def _name(self, site: Site) -> str:
        """The first of a tied weight's names, as the copy has it."""
        return next(n for n in site.names if n in self._weights)

    def _each(self, names: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        """The gradients of these weights, example by example."""
        loss = self._needed("the gradient of the loss")
        if not hasattr(loss, "examples"):
            raise TaskError(
                "gradients need a loss that tells each example's own, got "
                f"{type(loss).__name__}; give Statistics a task's calibration_loss()"
            )
        weights = [self._weights[n].requires_grad_(True) for n in names]
        try:
            with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
                for value in loss.examples(self._probe):
                    if not value.requires_grad:
                        raise TaskError(
                            "the task's loss cannot be differentiated: it has no path of gradients "
                            "to the weights; compute it by torch, without detach() or item()"
                        )
                    yield torch.autograd.grad(
                        value, weights, allow_unused=True, materialize_grads=True
                    )
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    @cached_property
    def _gradients(self) -> dict[str, Gradients]:
        names, count = list(self._weights), 0
        means = [torch.zeros_like(w) for w in self._weights.values()]
        squares = [torch.zeros_like(w) for w in self._weights.values()]
        for found in self._each(names):
            count += 1
            torch._foreach_add_(means, found)
            torch._foreach_addcmul_(squares, found, found)
        pairs = zip(means, squares, strict=True)
        each = (Gradients(mean.cpu() / count, square.cpu() / count) for mean, square in pairs)
        return dict(zip(names, each, strict=True))

    def _blocks(self, names: Sequence[str], width: int) -> dict[str, Tensor]:
        sums = {
            n: (w := self._weights[n]).new_zeros(-(-w.numel() // width), width, width)
            for n in names
        }
        count, gradients_of = 0, self._each(names)
        while some := list(itertools.islice(gradients_of, 32)):
            count += len(some)
            for name, gradients in zip(names, zip(*some, strict=True), strict=True):
                flat = torch.stack([g.flatten() for g in gradients], 1)  # [weights, examples]
                flat = F.pad(flat, (0, 0, 0, -len(flat) % width))
                pieces = flat.reshape(-1, width, len(some))
                sums[name].baddbmm_(pieces, pieces.mT)
        return {n: s.cpu() / count for n, s in sums.items()}

    def _needed(self, what: str) -> Calibration | Callable[[nn.Module], float]:
        if self._loss is None:
            raise TaskError(
                f"{what} needs a task with data, got none; without data choose "
                "prune_weights(scope='layer') or scope='global', and criterion='magnitude'"
            )
        return self._loss

    @torch.no_grad()
    def _scan(self, site: Site, pattern: Pattern | None) -> Curve:
        loss_of = self._needed("a sensitivity scan")
        probe = plain_copy(self._model)
        weight = tensor_at(probe, site.name)
        flat = weight.flatten()  # a copy where the weight is not contiguous
        scores = pattern.compared(weight.square()).flatten() if pattern else flat.abs()
        order = scores.argsort(stable=pattern is not None)
        baseline, losses = loss_of(probe), []
        if not math.isfinite(baseline):
            raise TaskError(f"the network's loss on the training data is {baseline}, not a number")
        for sparsity in SPARSITIES:
            flat[order[: round(sparsity * order.numel())]] = 0.0
            weight.copy_(flat.view(weight.shape))
            loss = loss_of(probe)
            losses.append(loss if math.isfinite(loss) else math.inf)
        return Curve(sparsities=SPARSITIES, losses=tuple(losses), baseline=baseline)


_DRAWS = 4
"""Random signs of the outputs, for each of which gradients are taken."""
_MOST_BYTES = 2**30
"""Of the Fisher blocks that are gathered in one pass over the data."""


class _EnoughError(Exception):
    """Ends a forward that has been seen far enough."""


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks are of the same modules and hold the same numbers."""
    kinds = ([type(m) for m in net.modules()] for net in (one, other))
    states = one.state_dict(), other.state_dict()
    return (
        next(kinds) == next(kinds)
        and states[0].keys() == states[1].keys()
        and all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    )


def _is_constant(product: Product) -> bool:
    """Whether all inputs were the same vector (one input alone says nothing)."""
    square = product.sums.square() / max(product.rows, 1)
    spread = (product.squares - square).clamp(min=0.0)
    return product.rows > 1 and bool((spread <= 1e-5 * product.squares).all())
