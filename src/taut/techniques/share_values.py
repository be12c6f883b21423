"""Weight sharing by k-means: weights, or runs of them, are some of 2**bits shared ones.

    W'[i, j] = table[index[i, j]],    ∂L/∂table[k] = Σ over index[i, j] = k of ∂L/∂W'[i, j]

W: [out, in, …] float32; index: the same shape, < 2**bits; table: [2**bits] float32, trained.
Under a mask only the kept weights are clustered and stored. With vector = v, one index stands for v
weights that follow each other in a row of [out, in] (later dimensions joined), and the table is a
codebook [2**bits, v]. symmetric: half of the table is stored, the other half is its opposite, so
that an index is a sign and a magnitude. scope="network": all sites have one table, trained and
stored once, each site times a scale of its own, the root mean square of its weights:
W'[i, j] = scale · table[index[i, j]].

Han, Mao, Dally: Deep Compression (ICLR 2016), section 3: one table for each layer, linear
initialisation of the centroids (better than density or random there, and the default here). Gong,
Liu, Yang, Bourdev: Compressing deep convolutional networks using vector quantization (2014); Stock
and others: And the bit goes down (ICLR 2020), errors weighted by the inputs. Where we differ:
single weights are assigned exactly, and table entries that no weight uses are left out of the file;
vectors at all places of a row share one codebook, which starts at vectors spread along their
principal direction; inputs weigh by their second moments, without correlations; what sticks out of
the last vector of a row weighs nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.clusters import k_means, mirror, nearest, nearest_vector, vector_k_means
from taut.errors import RecipeError
from taut.importance import input_squares
from taut.modules import parametrization, tensor_at
from taut.recoding import Form, Recoding, chain, chains_of, core
from taut.shared_weight import SharedForm, SharedValues, VectorForm
from taut.statistics import Statistics
from taut.technique import Technique, option, register_step
from taut.types import Site

__all__ = ["ShareValues", "SharedValues"]

_log = logging.getLogger("taut")
_ROUNDS = 300  # of k-means at most: it ends as soon as nothing moves
_ROUNDS_OF_VECTORS = 50  # which move for much longer, and gain little

_UNSEEN = 1e-3
"""What a weight counts whose input was zero in all the calibration data, relative to the mean."""


@register_step
@dataclass(frozen=True, kw_only=True)
class ShareValues(Recoding):
    """Let the weights of a site, or runs of them, share 2**bits trained ones."""

    bits: int = option(5, low=1, high=8, unit="bit", help="bits of an index: 2**bits values")
    vector: int = option(1, low=1, high=8, help="weights in a row that share one index: 1, 2, 4, 8")
    symmetric: bool = option(False, help="values come in pairs ±v: half of them are stored")
    weigh: str = option(
        "equal", choices=("equal", "inputs"),
        help="whether all errors count alike, or by the mean square of a weight's input",
    )  # fmt: skip
    init: str = option(
        "linear", choices=("linear", "density", "random"), help="where the centroids start"
    )
    scope: str = option(
        "layer", choices=("layer", "network"),
        help="a table for each layer, or one for all, with a scale for each",
    )  # fmt: skip
    portion: float = option(
        1.0, low=0, high=1, help="of a table of the network, what counts as this site's; found"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vector not in (1, 2, 4, 8):
            raise RecipeError(f"share_values: vector must be 1, 2, 4 or 8, got {self.vector}")

    @property
    def needs_all(self) -> bool:
        return self.vector > 1

    @property
    def _stored(self) -> int:
        """Entries that are stored and trained: all, or one of each pair."""
        return 1 << self.bits - self.symmetric

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        columns = math.prod(shape[1:] if len(shape) > 1 else shape)
        if columns < self.vector:
            raise RecipeError(
                f"share_values: vector must be at most the inputs of a weight, got {self.vector} "
                f"for the {columns} of site {site.name!r}; take shorter vectors, or leave the site "
                f"out by only='!{site.name}'"
            )

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        if self.scope == "layer":
            return super().localise(model, sites, statistics)
        points, weights, local = [], [], {}
        for site in sites:
            held = tensor_at(model, site.name).detach().cpu()
            kept = held != 0 if chain(model, site) is not None else None
            x, w = self._points(held, kept, site, statistics)
            points.append(x / _scale(x))
            weights.append(w / w.mean())
        book, total = self._cluster(torch.cat(points), torch.cat(weights)), sum(map(len, points))
        for site, x in zip(sites, points, strict=True):
            local[site.name] = replace(self, portion=len(x) / total)
            object.__setattr__(local[site.name], "_book", book)  # for `fit`; it is no option
        return dict(local)

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        indices = count if self.vector == 1 else -(-count // self.vector)
        if self.vector > 1 and count == site.numel:
            indices = site.shape[0] * -(-count // site.shape[0] // self.vector)
        entries, stored = 2**self.bits, self._stored
        if self.scope == "layer":
            entries, stored = min(entries, indices), min(stored, indices)
        numbers = stored * self.vector
        table = (2.0 if self.vector == 1 else 1.75) * numbers if inner is None else inner(numbers)
        spread = 0.95 if self.vector == 1 else 0.99
        return spread * indices * math.log2(max(entries, 1)) / 8 + self.portion * table

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        index = torch.zeros(core.shape if self.vector == 1 else _runs(core, self.vector).shape[:2])
        return self._form(index.to(core.device), core), core.new_zeros(self._stored * self.vector)

    def _form(self, index: Tensor, core: Tensor) -> SharedForm:
        index, shared = index.to(torch.uint8), self.scope == "network"
        if self.vector == 1:
            return SharedForm(index, self.symmetric, shared)
        return VectorForm(index, tuple(core.shape), self.vector, self.symmetric, shared)

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        points, weights = self._points(core, matters, site, statistics)
        if len(points) < 2**self.bits:
            _log.info(
                "share_values: %s has %d values for a table of %d; each keeps its own",
                site.name, len(points), 2**self.bits,
            )  # fmt: skip
        scale = _scale(points) if self.scope == "network" else torch.ones(())
        book: Tensor | None = getattr(self, "_book", None)
        table = self._cluster(points / scale, weights) if book is None else book
        if self.vector == 1:
            scaled = core / scale
            index = nearest((scaled.abs() if self.symmetric else scaled).contiguous(), table)
            if self.symmetric:
                index += self._stored * (core < 0)
        else:
            whole = table.reshape(-1, self.vector).double()
            whole = mirror(whole) if self.symmetric else whole
            index = nearest_vector((points / scale).double(), weights.double(), whole)
            index = index.reshape(_runs(core, self.vector).shape[:2])
        form = self._form(index, core)
        if form.scale is not None:
            form.scale.copy_(scale)
        return form, table

    def place(self, model: nn.Module, site: Site, form: Form, new: Tensor) -> None:
        """Sites that were given the same table are from then on trained as one."""
        super().place(model, site, form, new)
        if self.scope == "layer":
            return
        mine, any_part = core(model, site), replace(self, portion=1.0)
        for _, links, held in chains_of(model):
            step = links.recipe[-1]
            alike = isinstance(step, ShareValues) and replace(step, portion=1.0) == any_part
            if alike and held is not mine and torch.equal(held, mine):
                for name in site.names:
                    found = parametrization(model, name)
                    assert found is not None
                    found.original = held
                return

    def _points(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        """What is clustered, and how much each number's error counts: both [n, vector]."""
        if not bool((core if matters is None else core[matters]).isfinite().all()):
            raise RecipeError(f"share_values: site {site.name!r} holds NaN or infinite weights")
        both = core, self._weights(core, site, statistics)
        if self.vector > 1:  # nothing is masked then
            points, weights = (_runs(t, self.vector).flatten(0, 1) for t in both)
        else:
            points, weights = ((t if matters is None else t[matters]).reshape(-1, 1) for t in both)
        return points, weights

    def _cluster(self, points: Tensor, weights: Tensor) -> Tensor:
        """The table that suits these points: [stored · vector], of single values sorted."""
        if self.vector > 1:
            return vector_k_means(
                points, weights, self._stored, self.init, _ROUNDS_OF_VECTORS, self.symmetric
            ).flatten()  # fmt: skip
        sizes = points.abs() if self.symmetric else points
        if self.weigh == "equal" or not len(points):
            return k_means(sizes.flatten(), self._stored, self.init, _ROUNDS)
        return vector_k_means(
            sizes, weights, self._stored, self.init, _ROUNDS, False
        ).flatten().sort().values  # fmt: skip

    def _weights(self, core: Tensor, site: Site, statistics: Statistics | None) -> Tensor:
        """How much the error of each entry of the core counts."""
        if self.weigh == "equal":
            return torch.ones_like(core)
        if statistics is None or tuple(core.shape) != site.shape:
            raise RecipeError(
                f"share_values: weigh='inputs' needs calibration data and a weight that is written "
                f"in one number each, which site {site.name!r} lacks; take weigh='equal'"
            )
        squares = input_squares(core.shape, statistics.products(site, diagonal=True))
        return squares + _UNSEEN * squares.mean()


def _runs(weight: Tensor, width: int) -> Tensor:
    """[out, in, …] → [out, vectors, width]; what sticks out of a row is zero."""
    matrix = weight.flatten(1) if weight.dim() > 1 else weight[None]
    return F.pad(matrix, (0, -matrix.shape[1] % width)).reshape(len(matrix), -1, width)


def _scale(points: Tensor) -> Tensor:
    """The root mean square, as a bfloat16; one where all are zero."""
    scale = points.square().mean().sqrt().bfloat16().float()
    return scale if scale > 0 else torch.ones(())
