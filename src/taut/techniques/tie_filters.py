"""One filter for several of a layer: filters that are near multiples of each other are held as one.

    W'[i] = scale[i] · book[index[i]],    least Σ over i of ‖(W[i] − W'[i]) R‖²,    R Rᵀ = Σ x xᵀ

W: [out, in, …]; book: [filters that are left, in, …], trained; index: a whole number for each
filter; scale: a bfloat16 for each, of either sign, trained too, or one. A layer multiplies by the
book alone, so that as many products go as filters. Of an embedding the filters are its rows, of a
recurrent layer those of all gates. With of="kernels" the windows of a convolution are tied instead,
one for each filter and input, which are smaller and more alike.

The clusters are lines through zero, found by turns: the line of each filter, its place on it, and
the line that suits its filters best (k-means in one-dimensional subspaces). `weighted` compares
filters by what they give on the calibration data (R, from the moments of the inputs); kernels are
compared by their weights. Before training, start="scratch" keeps the length of each filter, which
the mean of random ones would not have.

Son, Nah, Lee: Clustering convolutional kernels to compress deep neural networks (ECCV 2018), whose
kernels have scales, too, of one sign unless they are transformed; Wu, Wang, Xu, Yan: Deep k-means
(ICML 2018), whose rows are cut into pieces. Where we differ: the data say which filters are near,
and scales are fitted with the lines, not after them. Layers are tied to each other by `tie_layers`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from taut.clusters import far_rows, k_lines
from taut.errors import RecipeError
from taut.packed import PackedWeight, Plain
from taut.ranks import Matrix, seen_by_data, unweighed, weighed
from taut.recoding import Form, Pack, Recoding, core
from taut.statistics import Statistics
from taut.technique import Technique, option, register_step
from taut.tied_weight import MOST_ROWS, TiedWeight, picked
from taut.trace import Trace
from taut.types import Site

_log = logging.getLogger("taut")
_ROUNDS = 40


@register_step
@dataclass(frozen=True, kw_only=True)
class TieFilters(Recoding):
    """Hold filters of a layer that are near multiples of each other as one.

    `tie_filters(ratio=0.5)` leaves half of each layer's filters; `tie_filters(most_distance=0.1)`
    ties those whose outputs are within a tenth of their size of a multiple of another's.
    """

    of: str = option(
        "filters", choices=("filters", "kernels"), help="what is tied: filters, or their windows"
    )
    ratio: float = option(0.5, low=0.001, below=1, help="filters that are left, to those before")
    most_distance: float | None = option(
        None, low=0, below=1,
        help="instead of ratio: a filter is tied up to this distance, relative to its size, before "
        "those that are tied take their mean",
    )  # fmt: skip
    kept: int | None = option(
        None, low=0, high=MOST_ROWS,
        help="the number left, whatever ratio says; 0 leaves the site as it is",
    )  # fmt: skip
    scale: bool = option(True, help="multiples are tied, by a factor for each; else only equals")
    weighted: bool = option(True, help="whether the calibration data say what is near")
    start: str = option(
        "fit", choices=("fit", "scratch"),
        help="the nearest filters, or with the lengths of untrained ones",
    )  # fmt: skip

    @property
    def needs_all(self) -> bool:
        return True

    @property
    def _by_data(self) -> bool:
        return self.weighted and self.of == "filters" and self.start == "fit"

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        """All that `only` chooses; of kernels the convolutions among them."""
        chosen = super().sites(trace)
        found = tuple(s for s in chosen if self.of == "filters" or len(s.shape) > 2)
        if not found:
            raise RecipeError(
                f"tie_filters: of='kernels' ties windows of convolutions, and only={self.only!r} "
                f"chooses none: {', '.join(s.name for s in chosen)}; take of='filters'"
            )
        return found

    def _which(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The dimensions that number what is tied."""
        return shape[: 1 if self.of == "filters" else 2]

    def _left(self, shape: tuple[int, ...]) -> int:
        count = math.prod(self._which(shape))
        return self.kept or min(max(1, round(self.ratio * count)), MOST_ROWS)

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        """How many filters each site keeps; 0 where none is within the distance of another."""
        if self.kept is not None or self.most_distance is None:
            return super().localise(model, sites, statistics)
        found: dict[str, Technique] = {}
        for site in sites:
            held = core(model, site).detach().cpu()
            if tuple(held.shape) != site.shape or not bool(held.isfinite().all()):
                found[site.name] = self  # which `accepts` or `fit` refuses
                continue
            self.accepts(site, site.shape)
            rows, _, weights = self._seen(held, site, statistics)
            most, bound = min(len(rows), MOST_ROWS), self.most_distance**2
            once = torch.ones_like(weights)
            left = len(far_rows(rows, once, self.scale, True, most, bound))
            if left == most:
                _log.info(
                    "tie_filters: %s stays as it is: no two %s are within most_distance=%g",
                    site.name, self.of, self.most_distance,
                )  # fmt: skip
            found[site.name] = replace(self, kept=left if left < most else 0)
        if all(isinstance(t, TieFilters) and t.kept == 0 for t in found.values()):
            raise RecipeError(
                f"tie_filters: no two {self.of} of {sites[0].name!r} or of any other site of "
                f"only={self.only!r} are within most_distance={self.most_distance:g}; allow more, "
                "or say ratio="
            )
        return found

    def _seen(
        self, held: Tensor, site: Site, statistics: Statistics | None
    ) -> tuple[Tensor, Matrix | None, Tensor]:
        """What is tied, as it is compared: [n, width] float64; by what; the weight of each."""
        rows = held.reshape(math.prod(self._which(tuple(held.shape))), -1).double()
        once = torch.ones(len(rows), dtype=torch.float64)
        if not self._by_data or statistics is None:
            return rows, None, once
        seen = seen_by_data(held, site, statistics, self.name)
        if seen.by_row:
            return rows, None, once if seen.root is None else seen.root.square()
        return weighed(rows, seen.root), seen, once

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"tie_filters: site {site.name!r} is recoded already, and its core {list(shape)} "
                "has no filters; put tie_filters first"
            )
        least = 2 if self.of == "filters" else 3
        if len(shape) < least or math.prod(self._which(shape)) < 2:
            raise RecipeError(
                f"tie_filters: site {site.name!r} of shape {list(shape)} has no two {self.of} to "
                f"tie; leave it out by only='!{site.name}'"
            )
        if self.kept and self.kept > math.prod(self._which(shape)):
            raise RecipeError(
                f"tie_filters: kept must be at most the {math.prod(self._which(shape))} {self.of} "
                f"of site {site.name!r}, got {self.kept}"
            )

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        if self.kept == 0 or count != site.numel:
            return _PLAIN * count + 9 if inner is None else inner(count)
        tied, left = math.prod(self._which(site.shape)), self._left(site.shape)
        numbers = left * (count // tied)
        book = _PLAIN * numbers + 9 if inner is None else inner(numbers)
        return book + tied * (math.log2(left) / 8 + _SCALE * self.scale)

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        shape = tuple(core.shape)
        which = self._which(shape)
        form = TiedForm(torch.zeros(which), torch.ones(which) if self.scale else None)
        return form, core.new_zeros(self._left(shape), *shape[len(which) :])

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"tie_filters: site {site.name!r} holds NaN or infinite weights")
        which, held = self._which(tuple(core.shape)), core.reshape(-1).double()
        rows, seen, weights = self._seen(core, site, statistics)
        index, scale, book = k_lines(
            rows, weights, self._left(tuple(core.shape)), self.scale, _ROUNDS,
            self.most_distance is not None,
        )  # fmt: skip
        if seen is not None and seen.root is not None:
            book = unweighed(book, seen.root)
        given = scale[:, None] * book[index]
        held = held.reshape(given.shape)
        if self.start == "scratch":
            over = 1 if self.scale else (0, 1)
            by = held.norm(dim=over) / given.norm(dim=over).clamp(min=1e-30)
            scale, book = (scale * by, book) if self.scale else (scale, book * by)
        else:
            off = (rows - scale[:, None] * (book[index] if seen is None else weighed(
                book[index], seen.root))).square().sum(1)  # fmt: skip
            share = float((weights * off).sum() / (weights * rows.square().sum(1)).sum())
            _log.info(
                "tie_filters: %s keeps %d of %d %s; what it gives changes by %.2g of its size",
                site.name, len(book), len(rows), self.of, share**0.5,
            )  # fmt: skip
        form = TiedForm(
            index.reshape(which), scale.to(core.dtype).reshape(which) if self.scale else None
        )
        return form, book.reshape(-1, *core.shape[len(which) :]).to(core.dtype)

    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        if self.kept != 0:
            super().apply(model, site, statistics)


_PLAIN = 1.77
"""Bytes of a number in float16: about normal, so its high byte codes well."""
_SCALE = 1.4
"""Bytes of a scale in bfloat16: scales are of like size."""


class TiedForm(Form):
    """weight = scale · book[index]; the core is the book. Scales are rounded as they are stored."""

    index: Tensor

    def __init__(self, index: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int32))
        self.scale = None if scale is None else nn.Parameter(scale)

    def factors(self) -> Tensor | None:
        """The scales as bfloat16; gradients pass the rounding."""
        if self.scale is None:
            return None
        rounded = self.scale.detach().bfloat16().to(self.scale.dtype)
        return self.scale + (rounded - self.scale.detach())

    def forward(self, core: Tensor) -> Tensor:
        return picked(core, self.index, self.factors())

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        if keep is not None:  # some entries of a filter are no filter
            return Plain.of(self(core)[keep])
        scales = self.factors()
        stored = None if scales is None else Plain.of(scales.detach().flatten(), "bfloat16")
        return TiedWeight(self.index, inner(None), stored)
