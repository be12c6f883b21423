"""Low rank: a layer becomes two or more in a row, with fewer numbers together.

    W x ≈ A (B x),    A: [out, rank], B: [rank, in]

A Linear layer becomes two, an Embedding a narrow one and a Linear layer, a convolution two to four
(decompositions.py has the formulas and papers). The bias stays on the last; stride, padding and
dilation go to the part that spans their dimension. The rank is chosen for each layer: it keeps a
share of the energy (squared singular values), or a share of the numbers, or what stands out of the
noise of the weights by variational Bayes. Or the ranks of all layers are chosen together, for a
budget of the network's multiply-accumulates, bytes or time: rank_budget.py. With `weighted` what is
kept is what the calibration data use: the error is that of the layer's outputs, and layers are
taken in turn, each to give for what it reads by then what it gave at first.

Denton, Zaremba, Bruna, LeCun, Fergus: Exploiting linear structure (NeurIPS 2014). Where we differ:
a rank at which a layer would not get smaller is refused, and the layer stays as it is. Layers whose
weight something else reads (tied ones, those in nn.MultiheadAttention) stay too; for these and for
recurrent gates there is `factor_weights`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from taut import edits
from taut.decompositions import (
    KINDS,
    Part,
    composed,
    count,
    decomposed,
    limits,
    losses,
    parts,
    ranks_of,
)
from taut.edits import Edit, put_layer, register_edit
from taut.errors import FormatError, RecipeError
from taut.modules import clone, owner, tensor_at, unfilled
from taut.norms import norm_of
from taut.products import Product, centred
from taut.rank_budget import BUDGETS, Call, Choice, calls_of, macs_of, spread
from taut.ranks import RULES, input_root, output_root, products_of, seen_by
from taut.reshaping import Reshaping, check_runs
from taut.second_order import damped, realigned
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.timing import reduced_to
from taut.trace import Trace
from taut.types import Site

_log = logging.getLogger("taut")
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@register_step
@dataclass(frozen=True, kw_only=True)
class LowRank(Reshaping):
    """Let each layer be several smaller ones in a row."""

    rank: str = option(
        "energy", choices=(*RULES, *BUDGETS),
        help="what the rank of a layer follows from; macs, bytes and latency are of the network",
    )  # fmt: skip
    energy: float = option(0.9, low=0.01, high=1, help="for rank='energy': the share to keep")
    ratio: float = option(
        0.5, low=0.001, below=1,
        help="for rank='ratio': a layer's numbers after, to those before; for a budget: what is "
        "left of it at most",
    )  # fmt: skip
    conv: str = option("channel", choices=KINDS, help="what a convolution becomes")
    weighted: bool = option(True, help="whether the calibration data say what matters")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv == "cp" and self.rank == "vbmf":
            raise RecipeError(
                "low_rank: conv='cp' has no rank by vbmf; choose rank='energy' or rank='ratio'"
            )

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        return self._factored(model, trace, statistics, fitted=self.weighted)

    def outline(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        return self._factored(model, trace, statistics, fitted=False)

    def _factored(
        self, model: nn.Module, trace: Trace, statistics: Statistics, fitted: bool
    ) -> nn.Module:
        """fitted: whether later layers make good what the earlier ones lost."""
        layers: list[_Layer] = []
        for site in self.sites(trace):
            if why := _why_not(model, site):
                _log.info("low_rank: %s stays as it is: %s", _path(site) or "the layer", why)
            else:
                layers.append(self._layer(owner(model, site.name)[0], site, statistics))
        if self.rank in BUDGETS and layers:
            chosen = self._within(model, layers, trace)
        else:
            chosen = [self._ranks(layer) for layer in layers]
        found, seen = [], _Seen(model, trace, statistics, layers) if fitted else None
        for layer, ranks in zip(layers, chosen, strict=True):
            if ranks:
                found.append((layer.change(ranks), layer.parts(ranks, seen)))
            else:
                why = "a rank that would do takes no fewer numbers"
                if self.rank == "vbmf":
                    why = "no rank stands out of the noise, or it takes no fewer numbers"
                why = "the budget leaves it whole" if self.rank in BUDGETS else why
                _log.info("low_rank: %s stays as it is: %s", layer.path or "the layer", why)
        if not found:
            raise RecipeError(
                f"low_rank: no layer of only={self.only!r} gets smaller by {self}; keep less "
                "(energy, ratio), or use factor_weights for recurrent layers and attention"
            )
        check_runs(self.name, model, {e.layer: e for e, _ in found}, trace)
        for edit, weights in found:
            model = edit.replay(model)
            edits.note(model, edit)
            made = cast(nn.Sequential, model.get_submodule(edit.layer))
            with torch.no_grad():
                for part, weight in zip(made, weights, strict=True):
                    cast(Tensor, part.weight).copy_(weight)
        for site, by in seen.shifts if seen is not None else ():
            _shift(model, trace, site, by)
        return model

    def _layer(self, module: nn.Module, site: Site, statistics: Statistics) -> _Layer:
        """A layer as the data see it. Raises RecipeError for weights that are no numbers."""
        weight = tensor_at(module, "weight").detach().cpu().double()
        if not bool(weight.isfinite().all()):
            raise RecipeError(f"low_rank: site {site.name!r} holds NaN or infinite weights")
        one_place = weight.dim() == 2 or math.prod(weight.shape[2:]) == 1
        table, root, met = isinstance(module, nn.Embedding), None, None
        if self.weighted and (table or self.rank not in ("ratio", "vbmf")):
            met = products_of(site, statistics, self.name)
            seen = seen_by(weight, met)
            root = seen.root if seen.by_row == table else None
        how = "channel" if one_place else self.conv
        return _Layer(site, module, how, weight.T if table else weight, root, table, met)

    def _ranks(self, layer: _Layer) -> list[int]:
        """The ranks of a layer by a rule for itself; [] where they are no fewer numbers."""
        ranks = ranks_of(
            layer.how, layer.weight, self.rank, self.energy, self.ratio, layer.root
        )  # fmt: skip
        ranks = [min(r, n) for r, n in zip(ranks, limits(layer.how, layer.shape), strict=False)]
        smaller = ranks and count(layer.how, layer.shape, ranks) < layer.weight.numel()
        return ranks if smaller else []

    def _within(self, model: nn.Module, layers: list[_Layer], trace: Trace) -> list[list[int]]:
        """The ranks of all layers within the budget; [] for a layer that stays."""
        calls = calls_of(model, {layer.path: layer.module for layer in layers}, trace.example)
        of_numbers = self.rank == "bytes"
        total = trace.parameters if of_numbers else trace.macs
        choices = [layer.choices(None if of_numbers else calls[layer.path]) for layer in layers]
        whole = sum(c[0].cost for c in choices)

        def within(left: float) -> tuple[list[list[int]], int]:
            found = spread(choices, left - (total - whole))
            return [list(c.ranks) for c in found], total - whole + sum(c.cost for c in found)

        if self.rank == "latency":
            least = within(0)[1]
            return self._fast_enough(
                model, layers, trace, lambda by: within(total - by * (total - least))[0]
            )
        ranks, left = within(self.ratio * total)
        if left > self.ratio * total:
            raise self._out_of_reach(left / total, f"{left:,} of {total:,}")
        _log.info("low_rank: %.1f %% of the %s are left", 100 * left / total, self.rank)
        return ranks

    def _fast_enough(
        self, model: nn.Module, layers: list[_Layer], trace: Trace,
        reduced_by: Callable[[float], list[list[int]]],
    ) -> list[list[int]]:  # fmt: skip
        """The ranks of the most work at which the network was fast enough when it was timed."""

        def reduced(reduction: float) -> nn.Module:
            ranks = reduced_by(reduction)
            changes = [la.change(r) for la, r in zip(layers, ranks, strict=True) if r]
            made = edits.replay(clone(model), changes)
            for change in changes:
                for parameter in made.get_submodule(change.layer).parameters():
                    nn.init.normal_(parameter, std=0.01)  # what a file would fill in
            return made

        reduction, share = reduced_to(clone(model), reduced, trace.example, self.ratio)
        if share > self.ratio:
            raise self._out_of_reach(share, f"{100 * share:.1f} % of the time")
        _log.info("low_rank: at batch 1 it takes %.1f %% of the time", 100 * share)
        return reduced_by(reduction)

    def _out_of_reach(self, share: float, left: str) -> RecipeError:
        return RecipeError(
            f"low_rank: ratio={self.ratio:g} of the network's {self.rank} is out of reach: with "
            f"the least ranks in all layers of only={self.only!r} {share:.3f} is left ({left}); "
            "ask for more"
        )


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that can become several: its weight, turned for a table, and what the data use."""

    site: Site
    module: nn.Module
    how: str
    weight: Tensor
    root: Tensor | None
    table: bool
    met: list[Product] | None  # in the network as it was; None where nobody has asked

    @property
    def path(self) -> str:
        return _path(self.site)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def choices(self, calls: list[Call] | None) -> list[Choice]:
        """The layer as it is and by all its ranks; they cost work, or without calls numbers."""

        def cost(ranks: Sequence[int]) -> int:
            if calls is None:
                return count(self.how, self.shape, ranks) if ranks else self.weight.numel()
            return macs_of(self.how, self.shape, ranks, calls, self.table)

        found = [Choice((), cost(()), 0.0)]
        for ranks, loss in losses(self.how, self.weight, self.root):
            made = Choice(tuple(ranks), cost(ranks), loss)
            found += [made] if made.cost < found[0].cost else []
        return found

    def change(self, ranks: list[int]) -> Factor:
        return Factor(layer=self.path, how=self.how, ranks=ranks)

    def parts(self, ranks: list[int], seen: _Seen | None) -> list[Tensor]:
        """The weights of the parts; seen: what the data are where earlier layers are parts."""
        if seen is None or self.table:
            weights = decomposed(self.how, self.weight, ranks, self.root)
        else:
            weights = seen.fit(self, ranks)
        if seen is not None and self.table:
            seen.put(self.site, composed(self.how, weights).T)
        if self.table:
            weights[0] = weights[0].T.clone()
            weights[0][(self.weight.T == 0).all(1)] = 0  # of what pads, to the last bit
        _log.info(
            "low_rank: %s becomes %d layers of rank %s (%s), %d numbers of %d",
            self.path or "the layer", len(weights), ", ".join(map(str, ranks)), self.how,
            count(self.how, self.shape, ranks), self.weight.numel(),
        )  # fmt: skip
        return weights


class _Seen:
    """What layers read once those before them have become parts, and what they are to give then.

    A later layer makes good what the earlier ones lost (second_order.realigned); what the mean of
    the inputs gives goes into the bias, or the batch norm behind, and is no matter of ranks; and
    errors count as far as the network's outputs feel them.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, statistics: Statistics, layers: Sequence[_Layer]
    ) -> None:
        self.model, self.trace = clone(model), trace
        self.statistics = Statistics(self.model, statistics.loss)
        assert self.statistics.first is not self.model  # copied before anything changes
        self.felt = statistics.felt([layer.path for layer in layers if not layer.table])
        self.shifts: list[tuple[Site, Tensor]] = []
        self.changed = False

    def fit(self, layer: _Layer, ranks: list[int]) -> list[Tensor]:
        """The parts of a layer, which stand in its place from then on."""
        weight, site = layer.weight, layer.site
        found = layer.met
        if self.changed or found is None:
            found = products_of(site, self.statistics, LowRank.name)
        met = [p for p in found if p.moments.dim() == 2]
        about = [centred(p) for p in met] if _takes(self.model, self.trace, site) else met
        root = input_root(about, weight[0].numel()) if met else None
        felt = output_root(self.felt[layer.path]) if layer.path in self.felt else None
        if root is None:
            weights = decomposed(layer.how, weight, ranks)
            self.put(site, composed(layer.how, weights))
            return weights
        wanted = weight.flatten().clone()
        for product in about:
            rows, drift = wanted[product.index.cpu()], product.drift
            if drift is not None:
                hessian = damped(product.moments.cpu())
                wanted[product.index.cpu()] = realigned(rows, hessian, drift.cpu())
        weights = decomposed(layer.how, wanted.reshape(weight.shape), ranks, root, felt)
        whole = composed(layer.how, weights)
        if about is not met:
            by = torch.zeros(len(weight), dtype=torch.float64)
            for product in met:
                mean = product.sums.cpu() / max(product.rows, 1)
                moved = 0 if product.shift is None else product.shift.cpu() / max(product.rows, 1)
                index = product.index.cpu()
                lost = weight.flatten()[index] @ (mean + moved) - whole.flatten()[index] @ mean
                by.index_add_(0, index[:, 0] // weight[0].numel(), lost)
            self.shifts.append((site, by))
            _shift(self.model, self.trace, site, by)
        self.put(site, whole)
        return weights

    @torch.no_grad()
    def put(self, site: Site, weight: Tensor) -> None:
        """Let the copy compute with what the parts amount to."""
        tensor_at(self.model, site.name).copy_(weight)
        self.changed = True


def _takes(model: nn.Module, trace: Trace, site: Site) -> bool:
    """Whether a bias or a batch norm can take what the mean of a layer's inputs gives."""
    layer = owner(model, site.name)[0]
    return layer.bias is not None or norm_of(LowRank.name, model, trace, site) is not None


@torch.no_grad()
def _shift(model: nn.Module, trace: Trace, site: Site, by: Tensor) -> None:
    """Let a layer, whole or in parts, give so much more, by its bias or the norm behind it."""
    layer = model.get_submodule(_path(site))
    last = layer[-1] if isinstance(layer, nn.Sequential) else layer
    norm = norm_of(LowRank.name, model, trace, site) if last.bias is None else None
    if last.bias is not None:
        cast(Tensor, last.bias).add_(by.to(cast(Tensor, last.bias)))
    elif norm is not None:
        mean = cast(Tensor, norm.running_mean)
        mean.sub_(by.to(mean))


def _path(site: Site) -> str:
    return site.name.rpartition(".")[0]


def _why_not(model: nn.Module, site: Site) -> str:
    """Why the layer of a site cannot be several in a row; "" where it can."""
    path, _, leaf = site.name.rpartition(".")
    layer = owner(model, site.name)[0]
    if len(site.names) > 1:
        return f"its weight is {site.aliases[0]} too; use factor_weights"
    if path and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
        return "attention reads its weight itself; use factor_weights"
    if leaf != "weight" or type(layer) not in _LAYERS:
        return f"a {type(layer).__name__} cannot be several in a row; use factor_weights"
    return _odd(layer)


def _odd(layer: nn.Module) -> str:
    """Why a layer of a fitting class cannot be several in a row; "" where it can."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups > 1:
        return "its channels come in groups"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its rows are rescaled as they are looked up (max_norm)"
    held = {*layer._parameters, *layer._buffers, *layer._modules}
    return "" if held <= {"weight", "bias"} else "it holds more than a weight and a bias"


# ---- structure ------------------------------------------------------------------------------


@register_edit
@dataclass(frozen=True, kw_only=True)
class Factor(Edit):
    """A layer becomes several in a row, of these ranks; its hooks stay on the whole.

    how: the kind of `decompositions`, `channel` for Linear and Embedding layers. ranks: s and r
    for tucker, else one.
    """

    layer: str
    how: str
    ranks: list[int]

    def replay(self, model: nn.Module) -> nn.Module:
        layer = model.get_submodule(self.layer)
        if type(layer) not in _LAYERS or _odd(layer):
            told = _odd(layer) if type(layer) in _LAYERS else f"it is a {type(layer).__name__}"
            raise FormatError(
                f"factor: {self.layer!r} is no plain Linear, Embedding or convolution: {told}"
            )
        shape = tuple(tensor_at(layer, "weight").shape)
        self._check(shape)
        return put_layer(model, self.layer, _parts(layer, self.how, self.ranks))

    def _check(self, shape: tuple[int, ...]) -> None:
        turned = (shape[1], shape[0], *shape[2:])  # for an Embedding it is all the same
        if self.how not in (KINDS if len(shape) > 2 else KINDS[:1]):
            raise FormatError(f"factor: {self.layer!r} of shape {list(shape)} has no {self.how!r}")
        most = limits(self.how, shape)
        fits = len(self.ranks) == len(most) and all(
            1 <= r <= n for r, n in zip(self.ranks, most, strict=True)
        )
        if not fits:
            raise FormatError(
                f"factor: the ranks of {self.layer!r} must be {len(most)} in all, from 1 to "
                f"{', '.join(map(str, most))}, got {self.ranks}"
            )
        takes, had = count(self.how, shape, self.ranks), math.prod(turned)
        if takes >= had:
            raise FormatError(
                f"factor: {self.layer!r} of ranks {self.ranks} takes {takes:,} numbers, which must "
                f"be fewer than its {had:,}"
            )


class FactoredLinear(nn.Sequential):
    """Two Linear layers in the place of one, with its weight and bias for those who read them."""

    @property
    def weight(self) -> Tensor:
        """The product of both weights: [out, in]."""
        return cast(Tensor, self[1].weight) @ cast(Tensor, self[0].weight)

    @property
    def bias(self) -> Tensor | None:
        """That of the second."""
        return cast("Tensor | None", self[1].bias)


def _parts(layer: nn.Module, how: str, ranks: list[int]) -> nn.Sequential:
    """The layers in a row, their weights not set, with the bias of the old one."""
    weight = cast(Tensor, layer.weight)
    shape = tuple(weight.shape)
    if isinstance(layer, nn.Embedding):
        made = [
            unfilled(
                nn.Embedding, weight, layer.num_embeddings, ranks[0], layer.padding_idx,
                scale_grad_by_freq=layer.scale_grad_by_freq, sparse=layer.sparse,
            ),
            unfilled(nn.Linear, weight, ranks[0], layer.embedding_dim, bias=False),
        ]  # fmt: skip
    elif isinstance(layer, nn.Linear):
        found = parts(how, shape, ranks)
        made = [unfilled(nn.Linear, weight, p.inputs, p.outputs, bias=False) for p in found]
    else:
        conv = cast("nn.Conv1d | nn.Conv2d", layer)
        made = [_convolution(conv, p, weight) for p in parts(how, shape, ranks)]
    bias = layer._parameters.get("bias")
    if bias is not None:
        made[-1].bias = bias
    return FactoredLinear(*made) if isinstance(layer, nn.Linear) else nn.Sequential(*made)


def _convolution(layer: nn.Conv1d | nn.Conv2d, part: Part, like: Tensor) -> nn.Module:
    """One part, with the geometry of the dimensions that it spans."""
    spans = [d in part.axes for d in range(len(layer.kernel_size))]

    def own(values: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
        return tuple(v if s else otherwise for v, s in zip(values, spans, strict=True))

    given = layer.padding
    return unfilled(
        type(layer), like, part.inputs, part.outputs, part.shape(layer.kernel_size)[2:],
        own(layer.stride, 1), given if isinstance(given, str) else own(given, 0),
        own(layer.dilation, 1), part.groups, bias=False,
        padding_mode=layer.padding_mode if any(spans) else "zeros",
    )  # fmt: skip
