"""Low rank: a layer becomes two or more in a row, with fewer numbers together.

    W x ≈ A (B x),    A: [out, rank], B: [rank, in]

A Linear layer becomes two, an Embedding a narrow one and a Linear layer, a convolution two to four
(decompositions.py has the formulas and papers). The bias stays on the last; stride, padding and
dilation go to the part that spans their dimension. The rank is chosen for each layer: it keeps a
share of the energy (squared singular values), or a share of the numbers, or what stands out of the
noise of the weights by variational Bayes. With `weighted` what is kept is what the calibration data
use: the error is that of the layer's outputs.

Denton, Zaremba, Bruna, LeCun, Fergus: Exploiting linear structure (NeurIPS 2014). Where we differ:
a rank at which a layer would not get smaller is refused, and the layer stays as it is. Layers whose
weight something else reads (tied ones, those in nn.MultiheadAttention) stay too; for these and for
recurrent gates there is `factor_weights`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from taut import edits
from taut.decompositions import KINDS, Part, count, decomposed, limits, parts, ranks_of
from taut.edits import Edit, put_layer, register_edit
from taut.errors import FormatError, RecipeError
from taut.modules import owner, tensor_at, unfilled
from taut.ranks import RULES, seen_by_data
from taut.reshaping import Reshaping, check_runs
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Trace
from taut.types import Site

_log = logging.getLogger("taut")
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


@register_step
@dataclass(frozen=True, kw_only=True)
class LowRank(Reshaping):
    """Let each layer be several smaller ones in a row."""

    rank: str = option("energy", choices=RULES, help="what the rank of a layer follows from")
    energy: float = option(0.9, low=0.01, high=1, help="for rank='energy': the share to keep")
    ratio: float = option(
        0.5, low=0.001, below=1, help="for rank='ratio': numbers after, to those before"
    )
    conv: str = option("channel", choices=KINDS, help="what a convolution becomes")
    weighted: bool = option(True, help="whether the calibration data say what matters")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conv == "cp" and self.rank == "vbmf":
            raise RecipeError(
                "low_rank: conv='cp' has no rank by vbmf; choose rank='energy' or rank='ratio'"
            )

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        found: list[tuple[Factor, list[Tensor]]] = []
        for site in self.sites(trace):
            path, layer = site.name.rpartition(".")[0], owner(model, site.name)[0]
            why = _why_not(model, site)
            if not why:
                change = self._change(path, layer, site, statistics)
                why = "a rank that would do takes no fewer numbers" if change is None else ""
                found += [change] if change else []
            if why:
                _log.info("low_rank: %s stays as it is: %s", path or "the layer", why)
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
        return model

    def _change(
        self, path: str, layer: nn.Module, site: Site, statistics: Statistics
    ) -> tuple[Factor, list[Tensor]] | None:
        """The edit and the weights of the parts; None where they are no fewer numbers."""
        weight = tensor_at(layer, "weight").detach().cpu().double()
        if not bool(weight.isfinite().all()):
            raise RecipeError(f"low_rank: site {site.name!r} holds NaN or infinite weights")
        how, root = self.conv, None
        if weight.dim() == 2 or math.prod(weight.shape[2:]) == 1:
            how = "channel"
        table = isinstance(layer, nn.Embedding)
        if self.weighted:
            seen = seen_by_data(weight, site, statistics, self.name)
            root = seen.root if seen.by_row == table else None
        turned = weight.T if table else weight
        ranks = ranks_of(how, turned, self.rank, self.energy, self.ratio, root)
        shape = tuple(turned.shape)
        ranks = [min(r, n) for r, n in zip(ranks, limits(how, shape), strict=False)]
        if not ranks or count(how, shape, ranks) >= weight.numel():
            return None
        weights = decomposed(how, turned, ranks, root)
        if table:
            weights[0] = weights[0].T.clone()
            weights[0][(weight == 0).all(1)] = 0  # of what pads, to the last bit
        _log.info(
            "low_rank: %s becomes %d layers of rank %s (%s), %d numbers of %d",
            path or "the layer", len(weights), ", ".join(map(str, ranks)), how,
            count(how, shape, ranks), weight.numel(),
        )  # fmt: skip
        return Factor(layer=path, how=how, ranks=ranks), weights


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
