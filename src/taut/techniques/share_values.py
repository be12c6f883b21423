"""Weight sharing by k-means: weights, or runs of them, are some of 2**bits shared ones.

    W'[i, j] = table[index[i, j]],    ∂L/∂table[k] = Σ over index[i, j] = k of ∂L/∂W'[i, j]

W: [out, in, …] float32; index: the same shape, < 2**bits; table: [2**bits] float32, trained.
Under a mask only the kept weights are clustered and stored. With vector = v, one index stands for v
weights that follow each other in a row of [out, in] (later dimensions joined), and the table is a
codebook [2**bits, v]. symmetric: half of the table is stored, the other half is its opposite, so
that an index is a sign and a magnitude.

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
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.clusters import k_means, mirror, nearest, nearest_vector, vector_k_means
from taut.coding import Coder
from taut.errors import FormatError, RecipeError
from taut.importance import input_squares
from taut.indexed_weight import IndexedWeight
from taut.recoding import Form, Meta, Pack, PackedWeight, ReadChild, Recoding, register_format
from taut.shared_vectors import Mirrored, SharedVectors
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.types import Site

_log = logging.getLogger("taut")

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
    iterations: int = option(50, low=0, high=1000, help="rounds of k-means at most")

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

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        indices = count if self.vector == 1 else -(-count // self.vector)
        if self.vector > 1 and count == site.numel:
            indices = site.shape[0] * -(-count // site.shape[0] // self.vector)
        entries = min(2**self.bits, indices)
        numbers = min(self._stored, indices) * self.vector
        table = (2.0 if self.vector == 1 else 1.75) * numbers if inner is None else inner(numbers)
        spread = 0.95 if self.vector == 1 else 0.99
        return spread * indices * math.log2(max(entries, 1)) / 8 + table

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        if self.vector == 1:
            index = torch.zeros_like(core, dtype=torch.uint8)
            return SharedForm(index, self.symmetric), core.new_zeros(self._stored)
        rows = _runs(core, self.vector)
        form = VectorForm(rows.new_zeros(rows.shape[:2]), self.symmetric, core.shape)
        return form, core.new_zeros(self._stored, self.vector)

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        values = (core if matters is None else core[matters]).flatten()
        if not bool(values.isfinite().all()):
            raise RecipeError(f"share_values: site {site.name!r} holds NaN or infinite weights")
        weights = self._weights(core, site, statistics)
        if self.vector > 1:
            return self._fit_vectors(core, weights, site)
        if values.numel() < 2**self.bits:
            _log.info(
                "share_values: %s has %d values for a table of %d; each keeps its own",
                site.name, values.numel(), 2**self.bits,
            )  # fmt: skip
        sizes = values.abs() if self.symmetric else values
        if self.weigh == "equal" or not len(values):
            table = k_means(sizes, self._stored, self.init, self.iterations)
        else:
            held = (weights if matters is None else weights[matters]).flatten()
            table = vector_k_means(
                sizes[:, None], held[:, None], self._stored, self.init, self.iterations, False
            ).flatten().sort().values  # fmt: skip
        index = nearest((core.abs() if self.symmetric else core).contiguous(), table)
        if self.symmetric:
            index += self._stored * (core < 0)
        return SharedForm(index.to(torch.uint8), self.symmetric), table

    def _fit_vectors(self, core: Tensor, weights: Tensor, site: Site) -> tuple[Form, Tensor]:
        vectors, weights = (_runs(t, self.vector) for t in (core, weights))
        rows = vectors.shape[:2]
        vectors, weights = vectors.flatten(0, 1), weights.flatten(0, 1)
        table = vector_k_means(
            vectors, weights, self._stored, self.init, self.iterations, self.symmetric
        )
        whole = mirror(table) if self.symmetric else table
        index = nearest_vector(vectors.double(), weights.double(), whole.double())
        return VectorForm(index.to(torch.uint8).reshape(rows), self.symmetric, core.shape), table

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


class SharedForm(Form):
    """weight = table[index]; the core is the table, sorted when it was fitted.

    mirrored: the core is half of the table, whose other half is its opposite.
    """

    index: Tensor

    def __init__(self, index: Tensor, mirrored: bool) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.mirrored = mirrored

    def forward(self, core: Tensor) -> Tensor:
        table = mirror(core) if self.mirrored else core
        return cast(Tensor, _Gather.apply(table, self.index))  # type: ignore[no-untyped-call]

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        return SharedValues(*self._stored(core, keep, inner))

    def _stored(
        self, core: Tensor, keep: Tensor | None, inner: Pack
    ) -> tuple[Tensor, PackedWeight]:
        """Indices into what is used of the table, and the used part, packed."""
        index = (self.index if keep is None else self.index[keep]).long()
        half = index % len(core)
        used = torch.bincount(half.flatten(), minlength=len(core)) > 0
        renumbered = (used.cumsum(0) - 1).clamp(min=0)[half]
        places = used.reshape(-1, *[1] * (core.dim() - 1)).expand(core.shape)
        if not self.mirrored:
            return renumbered, inner(places)
        return renumbered + (index >= len(core)) * used.sum(), Mirrored(inner(places))


class VectorForm(SharedForm):
    """A row of the weight = table[index] joined; index: [out, vectors], table: [entries, width]."""

    def __init__(self, index: Tensor, mirrored: bool, shape: tuple[int, ...]) -> None:
        super().__init__(index, mirrored)
        self.shape = tuple(shape)

    def forward(self, core: Tensor) -> Tensor:
        rows = super().forward(core).flatten(1)
        return rows[:, : math.prod(self.shape) // len(rows)].reshape(self.shape)

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        assert keep is None, "no mask goes before vectors"
        return SharedVectors(*self._stored(core, None, inner), core.shape[1], self.shape)


class _Gather(torch.autograd.Function):
    """table[index], whose gradient to an entry is the sum over its weights."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table[index.int()]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        index, grad = ctx.saved_tensors[0].flatten(), grads[0]
        if len(ctx.shape) > 1:
            summed = grad.new_zeros(ctx.shape)
            return summed.index_add_(0, index.int(), grad.reshape(len(index), -1)), None
        summed = torch.bincount(index, weights=grad.flatten(), minlength=ctx.shape[0])
        return summed.to(grad.dtype), None


@register_format("shared_values.v1")
class SharedValues(IndexedWeight):
    """Small indices into one table. table: a packed weight [entries]."""

    table: PackedWeight

    def __init__(self, index: Tensor, table: PackedWeight) -> None:
        super().__init__(index, table.numel)
        self.table = table

    def entries(self) -> Tensor:
        return self.table.dense()

    def meta(self) -> Meta:
        return {"entries": self.table.numel}

    def write(self, coder: Coder) -> None:
        index = self.index.cpu().flatten().to(torch.int64).numpy()
        coder.symbols("index", index, self.table.numel, self.numel)
        with coder.inside("table"):
            self.table.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        entries = meta.get("entries")
        if type(entries) is not int or not 0 <= entries <= 256:
            raise FormatError(f"shared_values.v1: entries must lie in [0, 256], got {entries!r}")
        if entries == 0 and 0 not in shape:
            raise FormatError("shared_values.v1: a table without entries cannot hold weights")
        index = coder.symbols("index", None, max(entries, 1), math.prod(shape))
        return cls(torch.from_numpy(index).reshape(shape), child("table", (entries,)))
