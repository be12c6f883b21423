"""Training for the shortest file: whole numbers times a learned step, whose code is in the loss.

    W'[i, j] = step · q[i, j],    q = round(W / step),    loss + price · bytes(q)

The gradient passes the rounding straight through, to W and to the step. bytes(q) is what the file
takes: where the nonzero q lie, and what they are. How likely a weight is to be nonzero follows from
how many others of its row and of its column are, as in the file's own coder; sizes follow a
geometric distribution. A weight on its way from 0 to ±1 pays what its position and its sign would
cost there, one on its way further what a longer number costs: the expected length under uniform
noise of one step, in closed form. So rows and columns that are nearly empty become empty, and whole
neurons go.

`rounding="gptq"` rounds column by column, each making good for the errors of those before, by what
the layer reads (Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023; see taut.second_order), so
that a network in few bits starts near the original. `by_use` gives the rows of an embedding steps
of their own, in octaves: a row that is read n times costs n · step² in the output, so that of all
steps that take as many bits, those ~ 1 / sqrt(n) cost least (reverse water-filling; Shannon 1959).
Rows that the data never read become coarse: give data of the kind that the network is to read.

W: any shape, seen as [out, in]; step: one number for each site, stored as bfloat16; q: |q| <= 127,
but for the few weights far outside that pretrained Transformers have and cannot do without: where
all that occur are 256 numbers at most, those reach 32767.

Oktay, Ballé, Singh, Shrivastava: Scalable Model Compression by Entropy Penalized Reparameterization
(ICLR 2020); the noise is that of Ballé, Laparra, Simoncelli (ICLR 2017), the step's gradient that
of Esser and others, Learned Step Size Quantization (ICLR 2020). Where we differ: the prior is not
trained but counted, from the very weights, at every step, and knows rows and columns; the length
is exact in expectation, so that no noise is drawn; the network itself runs on rounded weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from taut.coding import Coder
from taut.dead_units import drop_dead_units
from taut.errors import FormatError, RecipeError
from taut.indexed_weight import IndexedWeight
from taut.packed import Meta, PackedWeight, ReadChild, register_format
from taut.products import Product
from taut.recoding import Form, Pack, Recoding
from taut.row_parts import MOST_PARTS, RowParts
from taut.second_order import rounded
from taut.sparse_weight import SparseWeight
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Trace
from taut.types import Site

MOST, FARTHEST = 127, 32767
ENTRIES = 256


@register_step
@dataclass(frozen=True, kw_only=True)
class CodeLength(Recoding):
    """Write weights as whole numbers times a learned step, and train them for a short code.

    The training is that of the next `recover(bytes_weight=…)`, or `recover` after `aim(…)`: the
    price of a byte decides how small the file becomes. Biases and norms are coded too.
    """

    resolution: float = option(
        0.5, low=2.0**-8, high=4, help="the step at the start, in standard deviations of the weight"
    )
    rounding: str = option(
        "nearest", choices=("nearest", "gptq"), help="of the weights alone, or by what they do"
    )
    by_use: bool = option(
        False, help="whether rows of an embedding that the data seldom read have coarser steps"
    )
    vectors: bool = option(True, help="whether biases and norms are coded too, or stored plainly")

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        return self._chosen(trace.places if self.vectors else trace.sites)

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        bits = max(0.3, 1.92 - math.log2(self._resolution(site)))  # of a bell curve so rounded
        return count * bits / 8 + 5

    def finish(self, model: nn.Module, trace: Trace) -> list[str]:
        return drop_dead_units(model, trace)

    def _resolution(self, site: Site) -> float:
        return self.resolution / 4 if site.kind == "vector" else self.resolution

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        return Rounded(torch.zeros(()), self._even(core)), core

    def _even(self, core: Tensor) -> Tensor:
        """No row is finer than another: the octaves of all are 0."""
        return torch.zeros(len(core) if self.by_use and core.dim() > 1 else 0, dtype=torch.int8)

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"code_length: site {site.name!r} holds NaN or infinite weights")
        held = core if matters is None else core[matters]
        spread = float(held.square().mean().sqrt()) if held.numel() else 0.0
        step = torch.tensor(self._resolution(site) * (spread or 1.0))
        form = Rounded(step.log(), self._even(core))
        whole = core.dim() > 1 and matters is None and core.shape == site.shape
        if whole and len(form.octaves) and site.kind == "embedding":
            form.octaves.copy_(_octaves(core, float(form.step()), _products(site, statistics)))
        if whole and self.rounding == "gptq":
            core = _compensated(core, form, _products(site, statistics))
        return form, core


def _products(site: Site, statistics: Statistics | None) -> list[Product]:
    return (statistics or Statistics(nn.Identity())).products(site)


def _octaves(core: Tensor, step: float, products: Sequence[Product]) -> Tensor:
    """How many octaves the step of each row lies above that of a row of mean use: [rows] int8.

    What n readings of a row cost is n · step², and another bit for each of its numbers quarters
    that: at the best, step ~ 1 / sqrt(n). A row that is multiplied by, as one of tied weights is,
    has its use in every input: then all are as fine.
    """
    used = torch.zeros(len(core), dtype=torch.float64)
    if any(p.moments.dim() > 1 for p in products):
        return used.to(torch.int8)
    for product in products:
        rows = product.index[0].cpu() // (core.numel() // len(core))
        used.index_add_(0, rows, product.moments.cpu())
    used += _ONCE_MORE
    octaves = (0.5 * (used.mean() / used).log2()).round()
    octaves = octaves.clamp(-_MOST_OCTAVES, _MOST_OCTAVES)
    within = (core.abs().flatten(1).amax(1).double() / (MOST * step)).log2().ceil()
    return octaves.maximum(within).clamp(max=MOST_PARTS - 1 - _MOST_OCTAVES).to(torch.int8)


_ONCE_MORE = 0.3
"""Readings that every row may have beside those that were seen: some words are still to come."""
_MOST_OCTAVES = 3


def _compensated(core: Tensor, form: Rounded, products: Sequence[Product]) -> Tensor:
    """The core with every weight on its grid, by the second order."""
    each = core.numel() // len(core)
    steps = (form.step() * form.scale(core)).double().reshape(-1).expand(len(core))

    def nearest(values: Tensor, places: Tensor) -> Tensor:
        step = steps[places // each]
        return (values / step).round() * step

    return rounded(core, products, nearest)


class Rounded(Form):
    """weight = step · round(core / step). log_step: a scalar, trained.

    octaves: [rows] int8, of each row's step above that, or [0] where all have the same.
    """

    progress: Tensor
    octaves: Tensor

    def __init__(self, log_step: Tensor, octaves: Tensor | None = None) -> None:
        super().__init__()
        self.log_step = nn.Parameter(log_step)
        octaves = torch.zeros(0, dtype=torch.int8) if octaves is None else octaves
        self.register_buffer("octaves", octaves)
        self.register_buffer("progress", torch.tensor(-1.0))  # no training has begun

    def step(self) -> Tensor:
        """As the file holds it: a bfloat16."""
        exact = self.log_step.exp()
        return exact + (exact.bfloat16().float() - exact).detach()

    def scale(self, core: Tensor) -> Tensor:
        """What the step is times in each row: [rows, 1, …], or a scalar."""
        if not len(self.octaves):
            return self.log_step.new_ones(())
        return self.octaves.to(self.log_step.dtype).exp2().reshape(-1, *(1,) * (core.dim() - 1))

    def forward(self, core: Tensor) -> Tensor:
        if not len(self.octaves):
            return cast(Tensor, _Rounding.apply(core, self.step()))  # type: ignore[no-untyped-call]
        scale = self.scale(core)
        even = _Rounding.apply(core / scale, self.step())  # type: ignore[no-untyped-call]
        return cast(Tensor, even * scale)

    def log_scales(self) -> Sequence[nn.Parameter]:
        return (self.log_step,)

    def rate(self, core: Tensor, outer: Tensor | None) -> Tensor:
        step, parts = self.step(), [core if outer is None else core[outer]]
        if outer is None and len(self.octaves):
            scaled, kinds = core / self.scale(core), self.octaves.unique()  # type: ignore[no-untyped-call]
            parts = [scaled[self.octaves == kind] for kind in kinds]
        bits = [_CodeLength.apply(part, step) for part in parts]  # type: ignore[no-untyped-call]
        return cast(Tensor, sum(bits))

    def clear(self, core: Tensor | None, where: Tensor) -> bool:
        if core is not None:
            core[where] = 0.0
        return core is not None

    def advance(self, core: Tensor, progress: float) -> None:
        self.progress.fill_(progress)

    def settled(self) -> bool:
        """The network shrinks to the last step: no earlier epoch is the one that was asked for."""
        return not 0 <= float(self.progress) < 1

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        step = self.step().detach()
        if keep is not None:
            return _packed(_whole(core / step).to(torch.int16)[keep], step)
        if not len(self.octaves):
            return _table(core, step)
        octaves, kinds = self.octaves.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        steps = step * octaves.to(step.dtype).exp2()
        parts = [_table(core[kinds == k], s) for k, s in enumerate(steps)]
        return RowParts(kinds, parts) if len(parts) > 1 else parts[0]


def _table(core: Tensor, step: Tensor) -> PackedWeight:
    """All of a core, or of some rows, in whole numbers: as a sparse weight where most are 0."""
    q = _whole(core / step).to(torch.int16)
    mask = q != 0
    if q.dim() < 2 or 2 * int(mask.sum()) > q.numel():
        return _packed(q, step)
    return SparseWeight(mask, _packed(q[mask], step))


def _whole(scaled: Tensor) -> Tensor:
    """The nearest whole numbers that a file can hold."""
    q = scaled.detach().round()
    if torch.compiler.is_compiling():  # a graph cannot ask how many numbers there are
        return q.clamp(-FARTHEST, FARTHEST)
    if not q.numel() or float(q.abs().amax()) <= MOST:
        return q
    q = q.clamp_(-FARTHEST, FARTHEST)
    return q if q.unique().numel() <= ENTRIES else q.clamp_(-MOST, MOST)  # type: ignore[no-untyped-call]


def _packed(q: Tensor, step: Tensor) -> PackedWeight:
    far = q.numel() and int(q.abs().amax()) > MOST
    return FarIntegers(q, step) if far else Integers(q, step)


class _Rounding(torch.autograd.Function):
    """step · round(core / step); the gradient passes straight through, to the core and the step."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, step: Tensor) -> Tensor:
        scaled = core / step
        q = _whole(scaled)
        ctx.save_for_backward(q - scaled)
        return q.mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (rest,) = ctx.saved_tensors
        return grads[0], (grads[0] * rest).sum()


class _CodeLength(torch.autograd.Function):
    """Bits of the rounded numbers; the gradient is the slope of the expected length."""

    @staticmethod
    def forward(ctx: Any, core: Tensor, step: Tensor) -> Tensor:
        scaled = core / step
        bits, first, more = code_length(_whole(scaled))
        ctx.save_for_backward(scaled, first, step)
        ctx.more = more
        return bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        scaled, first, step = ctx.saved_tensors
        slope = torch.where(scaled.abs() < 1, first, ctx.more).mul_(scaled.sign())
        slope.mul_(grads[0] / step)
        return slope, -(slope * scaled).sum()


_MOST_MORE = 4.0  # rounding holds what lies a little above 1: it is not to be pulled as from 2
_UNSEEN = 6.0
"""The coder meets the others one by one and must learn: so much more does its prior weigh."""


def code_length(q: Tensor) -> tuple[Tensor, Tensor, float]:
    """What whole numbers take in the file.

    q: [out, in, …] float. Returns the bits of all, a scalar; what it would cost each to be ±1
    instead of 0 (the others as they are), of q's shape; and what each further unit costs.
    """
    table = q.flatten(1) if q.dim() > 1 else q[None]
    found = _Found(table != 0)
    count, total = float(found.count), float(q.abs().sum())
    there, empty = (found.chances(own, _UNSEEN) for own in (1, 0))
    none = -(1 - empty).log2()
    bits = found.often(none) + (-there.log2() - none)[found.kinds].sum()
    stops = (count + 1) / (total + 2)  # sizes are geometric: the chance that one goes no further
    sign, more = 1 - math.log2(stops), -math.log2(1 - stops)
    bits = bits + count * sign + (total - count) * more
    there, empty = ((1 / found.chances(own, 1.0) - 1).log2().clamp(min=0) for own in (1, 0))
    first = empty[found.row_kinds].index_select(1, found.column_kinds)
    first[found.places] = there[found.kinds]
    return bits, (first + sign).reshape(q.shape), min(more, _MOST_MORE)


class _Found:
    """Where numbers are not zero, and how likely that was, by the others of each row and column.

    What is likely depends on how many there are in the row and in the column, and on the place
    itself: rows of one count are of one kind, so that a small table holds all chances.
    """

    def __init__(self, found: Tensor) -> None:
        self.rows, self.columns = found.shape
        counted = found.to(torch.float32)
        self.in_row, self.row_kinds, self.alike = _kinds(counted.sum(1))
        self.in_column, self.column_kinds, self.alike_columns = _kinds(counted.sum(0))
        self.count = self.in_row @ self.alike
        self.places = found.nonzero(as_tuple=True)
        self.kinds = (self.row_kinds[self.places[0]], self.column_kinds[self.places[1]])

    def often(self, of_kinds: Tensor) -> Tensor:
        """The sum over all places of what each kind of place has. of_kinds: [rows', columns']."""
        return self.alike @ of_kinds @ self.alike_columns

    def chances(self, own: int, prior: float) -> Tensor:
        """How likely a place of each kind is to hold a number, where it itself holds `own`.

        prior: how much is known before any is seen, in units of what the coder's bitmap assumes.
        """
        in_row, in_column = self.in_row[:, None] - own, self.in_column[None] - own
        overall = (self.count + 0.5) / (self.rows * self.columns + 1)
        if self.rows == 1:
            chance = (in_row + 0.5 * prior) / (self.columns - 1 + prior) + 0 * in_column
        else:
            density = (in_column + 2 * prior * overall) / (self.rows - 1 + 2 * prior)
            chance = density * (in_row + prior) / (overall * self.columns + prior)
        return chance.clamp(2.0**-20, 1 - 2.0**-5)


def _kinds(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different counts, which of them each row has, and how many rows have it."""
    values, kinds, alike = counts.unique(  # type: ignore[no-untyped-call]
        return_inverse=True, return_counts=True
    )
    return values, kinds, alike.to(torch.float32)


@register_format("integers.v1")
class Integers(IndexedWeight):
    """Whole numbers times a step. q: [*shape], in [-127, 127]; step: a scalar, a bfloat16."""

    step: Tensor

    def __init__(self, q: Tensor, step: Tensor) -> None:
        q = q.to(torch.int16)
        self.low, high = (int(q.min()), int(q.max())) if q.numel() else (0, 0)
        self.count = high - self.low + 1
        super().__init__(q - self.low, self.count)
        self.register_buffer("step", step.detach().to("cpu", torch.bfloat16).reshape(()))

    def entries(self) -> Tensor:
        q = torch.arange(self.low, self.low + self.count, device=self.step.device)
        return q * self.step.float()

    def write(self, coder: Coder) -> None:
        scale = np.array([self.low], "<i1").tobytes() + np.array([self.count - 1], "u1").tobytes()
        scale += self.step.cpu().view(torch.int16).numpy().astype("<i2").tobytes()
        coder.plain("scale", np.frombuffer(scale, np.uint8), 1, 4)
        index = self.index.cpu().flatten().to(torch.int64).numpy()
        coder.symbols("index", index, self.count, self.numel)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        scale = coder.plain("scale", None, 1, 4)
        low, count = int.from_bytes(scale[:1], "little", signed=True), 1 + scale[1]
        step = torch.frombuffer(bytearray(scale[2:]), dtype=torch.bfloat16)[0]
        high = low + count - 1
        if not -MOST <= low <= high <= MOST or not bool(step.isfinite()) or float(step) <= 0:
            raise FormatError(
                f"integers.v1: numbers lie in [-127, 127] and steps above 0, got [{low}, {high}] "
                f"and {float(step)}"
            )
        index = coder.symbols("index", None, count, math.prod(shape))
        found = cls(torch.from_numpy(index).reshape(shape) + low, step)
        if (found.low, found.count) != (low, count):
            raise FormatError(f"integers.v1: its numbers do not fill [{low}, {high}]")
        return found


@register_format("integers.v2")
class FarIntegers(IndexedWeight):
    """Whole numbers times a step, of which some lie beyond 127.

    q: [*shape], in [-32767, 32767], at most 256 different ones; step: a scalar, a bfloat16.
    numbers: those that occur, rising, [n] int32.
    """

    numbers: Tensor
    step: Tensor

    def __init__(self, q: Tensor, step: Tensor) -> None:
        numbers, index = q.cpu().unique(return_inverse=True)  # type: ignore[no-untyped-call]
        super().__init__(index, len(numbers))
        self.register_buffer("numbers", numbers.to(torch.int32))
        self.register_buffer("step", step.detach().to("cpu", torch.bfloat16).reshape(()))

    def entries(self) -> Tensor:
        return self.numbers * self.step.float()

    def write(self, coder: Coder) -> None:
        numbers = self.numbers.cpu().to(torch.int64).numpy()
        steps = self.step.cpu().view(torch.int16).numpy().astype("<i2").tobytes()
        scale = np.array([len(numbers) - 1], "u1").tobytes() + steps
        coder.plain("scale", np.frombuffer(scale, np.uint8), 1, 3)
        gaps = np.diff(numbers, prepend=numbers[:1]) - (np.arange(len(numbers)) > 0)
        gaps[0] = numbers[0]
        coder.integers("numbers", gaps, len(numbers))
        index = self.index.cpu().flatten().to(torch.int64).numpy()
        coder.symbols("index", index, len(numbers), self.numel)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        scale = coder.plain("scale", None, 1, 3)
        count = 1 + int(scale[0])
        step = torch.frombuffer(bytearray(scale[1:]), dtype=torch.bfloat16)[0]
        gaps = coder.integers("numbers", None, count).astype(object)  # sums may be of any size
        numbers = np.cumsum(gaps + (np.arange(count) > 0))
        far = max(abs(n) for n in numbers)
        if bool((gaps[1:] < 0).any()) or not MOST < far <= FARTHEST or not 0 < float(step) < 1e38:
            raise FormatError(
                "integers.v2: numbers rise, the farthest lies beyond 127 and within 32767, and "
                f"steps are above 0, got numbers up to {far} and {float(step)}"
            )
        index = coder.symbols("index", None, count, math.prod(shape))
        known = torch.tensor(numbers.astype(np.int64))
        found = cls(known[torch.from_numpy(index)].reshape(shape), step)
        if len(found.numbers) != count:
            raise FormatError(f"integers.v2: of its {count} numbers some do not occur")
        return found
