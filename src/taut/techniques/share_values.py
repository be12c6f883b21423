"""Weight sharing by k-means: each weight is one of 2**bits shared values.

    W'[i, j] = table[index[i, j]],    ∂L/∂table[k] = Σ over index[i, j] = k of ∂L/∂W'[i, j]

W: [out, in, …] float32; index: the same shape, < 2**bits; table: [2**bits] float32, trained.
Under a mask only the kept weights are clustered and stored.

Han, Mao, Dally: Deep Compression (ICLR 2016), section 3: one table for each layer, linear
initialisation of the centroids (better than density or random there, and the default here).
Where we differ: the clusters are found by exact one-dimensional assignment, and table entries
that no weight uses are left out of the file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor

from taut.coding import Coder
from taut.errors import FormatError, RecipeError
from taut.indexed_weight import IndexedWeight
from taut.packed import Meta, PackedWeight, ReadChild, register_format
from taut.recoding import Form, Pack, Recoding
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.types import Site

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class ShareValues(Recoding):
    """Let the weights of a site share 2**bits trained values."""

    bits: int = option(5, low=1, high=8, unit="bit", help="bits of an index: 2**bits values")
    init: str = option(
        "linear", choices=("linear", "density", "random"), help="where the centroids start"
    )
    iterations: int = option(50, low=0, high=1000, help="rounds of k-means at most")

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        entries = min(2**self.bits, count)
        table = 2.0 * entries if inner is None else inner(entries)
        return 0.95 * count * math.log2(max(entries, 1)) / 8 + table

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        return SharedForm(torch.zeros_like(core, dtype=torch.uint8)), core.new_zeros(2**self.bits)

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        values = (core if matters is None else core[matters]).flatten()
        if not bool(values.isfinite().all()):
            raise RecipeError(f"share_values: site {site.name!r} holds NaN or infinite weights")
        if values.numel() < 2**self.bits:
            _log.info(
                "share_values: %s has %d values for a table of %d; each keeps its own",
                site.name, values.numel(), 2**self.bits,
            )  # fmt: skip
        table = _k_means(values, 2**self.bits, self.init, self.iterations)
        index = _nearest(core.contiguous(), table)
        return SharedForm(index.to(torch.uint8)), table


class SharedForm(Form):
    """weight = table[index]; the core is the table, sorted when it was fitted."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, core: Tensor) -> Tensor:
        return cast(Tensor, _Gather.apply(core, self.index))  # type: ignore[no-untyped-call]

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        index = (self.index if keep is None else self.index[keep]).long()
        used = torch.bincount(index.flatten(), minlength=core.numel()) > 0
        renumbered = (used.cumsum(0) - 1).clamp(min=0)[index]
        return SharedValues(renumbered, inner(used))


class _Gather(torch.autograd.Function):
    """table[index], whose gradient to an entry is the sum over its weights."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.entries = table.numel()
        return table[index.int()]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        grad = grads[0].flatten()
        summed = torch.bincount(index.flatten(), weights=grad, minlength=ctx.entries)
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


def _k_means(values: Tensor, entries: int, init: str, iterations: int) -> Tensor:
    """Centroids of one-dimensional k-means (Lloyd), sorted.

    An empty cluster takes half of the one with the largest error: pruning leaves a hole around
    zero, in which linear centroids would stay unused.
    """
    if values.numel() == 0:
        return values.new_zeros(entries)
    if init == "linear":
        table = torch.linspace(0, 1, entries, device=values.device, dtype=values.dtype)
        table = values.min() + table * (values.max() - values.min())
    elif init == "density":
        ranked = values.sort().values
        at = torch.linspace(0, values.numel() - 1, entries, device=values.device)
        table = ranked[at.round().long()]
    else:
        pick = torch.randint(values.numel(), (entries,)).to(values.device)
        table = values[pick].sort().values
    exact = values.double()
    for _ in range(iterations):
        index = _nearest(values, table)
        counts = torch.bincount(index, minlength=entries)
        sums = torch.bincount(index, weights=exact, minlength=entries)
        squares = torch.bincount(index, weights=exact.square(), minlength=entries)
        means = sums / counts.clamp(min=1)
        spread = (squares - sums * means).clamp(min=0)  # summed squared distance to the mean
        empty = (counts == 0).nonzero().squeeze(1)
        widest = spread.argsort(descending=True)[: len(empty)]
        half = (spread[widest] / counts[widest].clamp(min=1)).sqrt()
        moved = means.clone()
        moved[widest], moved[empty] = means[widest] - half, means[widest] + half
        moved = moved.to(table.dtype).sort().values
        if torch.equal(moved, table):
            break
        table = moved
    return table


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of a sorted table."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)
