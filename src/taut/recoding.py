"""The contract of the recoding techniques: trainable forms, packed weights, and how they chain.

A recoding technique leaves a trainable `Form` on a site: a module that maps a *core* (what is
trained) to the weight (what the layer uses). The next technique on the same site recodes the core,
so the chain reads as a decoder,

    weight = mask(shared_values(table))      for  prune_weights > share_values

and packing walks it from the outside in: a sparse weight, whose values are shared values, whose
table is plain numbers. The chain is one PyTorch parametrization, so the model stays an ordinary
module that any loop can train.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from taut.coding import Coder
from taut.errors import FormatError, RecipeError
from taut.kernels import lstm_cell
from taut.modules import owner, parametrization, parametrized_names, tensor_at
from taut.statistics import Statistics
from taut.technique import Technique
from taut.types import Cost, Site

# ---- packed weights -------------------------------------------------------------------------

Meta = dict[str, Any]
Pair = tuple[int, int]
ReadChild = Callable[[str, tuple[int, ...]], "PackedWeight"]


class PackedWeight(nn.Module, ABC):
    """A weight as it is stored and run: integer and float parts, no dense copy.

    The parts are buffers and child PackedWeights, so they move between devices with the module
    that holds them; they keep their dtype, whatever the module is cast to. shape: the weight's.
    """

    format: ClassVar[str]

    def __init__(self, shape: Iterable[int]) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def meta(self) -> Meta:
        """The JSON scalars that `read` needs."""
        return {}

    @abstractmethod
    def write(self, coder: Coder) -> None:
        """Code the parts in order; a child codes itself by `child.write` inside its name."""

    @classmethod
    @abstractmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        """Decode what `write` coded, checking every count and range before it is used."""

    def nested(self) -> dict[str, PackedWeight]:
        """The packed weights inside this one, by part name."""
        return {n: c for n, c in self.named_children() if isinstance(c, PackedWeight)}

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight: the definition that every kernel and test is held to."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], the weight seen as [out, in] (later dimensions joined)."""
        return F.linear(x, self.dense().flatten(1).to(x.dtype))

    def conv2d(
        self, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor:
        """x [n, in, height, width] → [n, out, height, width], as a product with its windows.

        The kernel of a weight [out, in, width] has the height one.
        """
        kernel = (*(1,) * (4 - len(self.shape)), *self.shape[2:])
        if groups > 1:
            weight = self.dense().to(x.dtype).reshape(*self.shape[:2], *kernel)
            return F.conv2d(x, weight, None, stride, padding, dilation, groups)
        windows = F.unfold(x, kernel, dilation, padding, stride)  # [n, in · window, places]
        y = self.matmul(windows.transpose(1, 2)).transpose(1, 2)
        size = (
            (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d in range(2)
        )
        return y.reshape(len(x), self.shape[0], *size)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, for embeddings: index [...] → [..., *shape[1:]]."""
        return self.dense()[index]

    def lstm(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """All steps of an LSTM of which this is the recurrent weight, [4 · size, size].

        inputs: [steps, batch, 4 · size], the gates' products with the input, biases added; hidden,
        cell: [batch, size] → hidden states [steps, batch, size] and the last cell.
        """
        states = []
        for step in inputs:
            hidden, cell = lstm_cell(step, self.matmul(hidden), cell)
            states.append(hidden)
        return torch.stack(states), cell

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """One-dimensional values as sparse products read them.

        Floats and None, or uint8 indices and the float32 table that they point into.
        """
        return self.dense(), None

    def count_nonzero(self) -> int:
        """How many of its numbers are not zero."""
        return int(self.dense().count_nonzero())

    def forget(self) -> None:
        """Drop what was computed from the parts and kept for speed; they may have changed."""
        for child in self.nested().values():
            child.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget()

        def keep_dtype(part: Tensor) -> Tensor:
            moved = fn(part)
            return moved if moved.dtype is part.dtype else part.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


FORMATS: dict[str, type[PackedWeight]] = {}
"""Every packed format, by the name that files use."""

P = TypeVar("P", bound=PackedWeight)


def register_format(name: str) -> Callable[[type[P]], type[P]]:
    """Make a packed weight known to files under a name like `sparse.v1`."""
    if not re.fullmatch(r"[a-z0-9_]+\.v\d+", name):
        raise FormatError(f"a format is named like 'sparse.v1', got {name!r}")

    def register(cls: type[P]) -> type[P]:
        if name in FORMATS:
            raise FormatError(f"two packed weights use the format name {name!r}; rename one")
        cls.format = name
        FORMATS[name] = cls
        return cls

    return register


# How each is written: as little-endian integers of the same width.
_BITS = {
    torch.float32: (torch.int32, "<i4"),
    torch.float16: (torch.int16, "<i2"),
    torch.bfloat16: (torch.int16, "<i2"),
}

PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


@register_format("plain.v1")
class Plain(PackedWeight):
    """Numbers stored one by one at a declared precision. values: [*shape]."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape)
        self.register_buffer("values", values.detach().cpu().clone())

    @classmethod
    def of(cls, values: Tensor, precision: str = "auto") -> Plain:
        """Floats rounded to `precision`: a name in PRECISIONS, or `auto`.

        auto is float16 where the root mean square of its rounding is at most 2**-10 of the
        tensor's own, else float32. Integers are kept as they are. Raises FormatError for complex
        numbers and for numbers too large for the precision.
        """
        if values.is_complex():
            raise FormatError(
                f"plain.v1 holds real numbers, got {values.dtype}; keep them in the model as two "
                "real tensors (torch.view_as_real)"
            )
        if not values.is_floating_point():
            return cls(values.to(torch.int64))
        if precision == "auto":
            exact = values.detach().double()
            error = exact.to(torch.float16).double() - exact
            fine = float(error.square().sum()) <= 2.0**-20 * float(exact.square().sum())
            precision = "float16" if fine else "float32"
        rounded = values.to(PRECISIONS[precision])
        if not torch.equal(rounded.isinf(), values.isinf()):
            raise FormatError(
                f"{precision} cannot hold numbers as large as {values.abs().max():.3g}; "
                + ("scale them down" if precision == "float32" else "use precision='float32'")
            )
        return cls(rounded)

    @property
    def precision(self) -> str:
        return next(n for n, d in PRECISIONS.items() if d is self.values.dtype)

    def meta(self) -> Meta:
        return {} if self.precision == "float16" else {"as": self.precision}

    def write(self, coder: Coder) -> None:
        flat = self.values.cpu().flatten()
        if flat.dtype is torch.int64:
            coder.integers("values", flat.numpy(), flat.numel())
        else:
            same_bits, written = _BITS[flat.dtype]
            raw = flat.view(same_bits).numpy().astype(written).view(np.uint8)
            coder.plain("values", raw, flat.element_size(), flat.numel())

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        precision = meta.get("as", "float16")
        if precision not in PRECISIONS:
            raise FormatError(f"plain.v1 has no precision {precision!r}")
        dtype, count = PRECISIONS[precision], math.prod(shape)
        if dtype is torch.int64:
            return cls(torch.from_numpy(coder.integers("values", None, count)).reshape(shape))
        written = _BITS[dtype][1]
        raw = np.frombuffer(coder.plain("values", None, dtype.itemsize, count), written)
        return cls(torch.from_numpy(raw.astype(written[1:])).view(dtype).reshape(shape))

    def dense(self) -> Tensor:
        return self.values.float() if self.values.is_floating_point() else self.values

    def operands(self) -> tuple[Tensor, Tensor | None]:
        return self.values if self.values.is_floating_point() else self.dense(), None


# ---- trainable forms ------------------------------------------------------------------------

Pack = Callable[[Tensor | None], PackedWeight]
"""Packs the core of a form: all of it (None), or the entries that a bool tensor selects."""


class Form(nn.Module, ABC):
    """A trainable form: `forward` maps a core to the tensor that it stands for."""

    shares_core = False  # whether other sites have the very same core: no other form can recode it

    @abstractmethod
    def forward(self, core: Tensor) -> Tensor: ...

    @abstractmethod
    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        """The packed weight of all entries of the output, or of those that `keep` selects.

        keep: bool, of the output's shape; the packed weight is then one-dimensional, in row-major
        order. inner packs the core in the same way.
        """

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        """Which entries of the core count, given which of the output do; None for all."""
        return outer

    def clear(self, core: Tensor | None, where: Tensor) -> bool:
        """Make these entries of the output zero, in place; False where the form cannot.

        core: what is trained; None where another form computes it.
        """
        return False

    def rate(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        """A differentiable estimate of the bits that this weight takes in the file, a scalar.

        outer: bool, which entries of the output are stored; None for all. What the core of the
        core takes is its own form's. None where training cannot change it.
        """
        return None

    def advance(self, core: Tensor, progress: float) -> None:
        """Follow a schedule: called after each optimizer step with progress in [0, 1]."""
        return None

    def settled(self) -> bool:
        """Whether the schedule has reached its full strength."""
        return True


class Chain(nn.Module):
    """The forms on one site in the order of the recipe: the last one decodes first."""

    def __init__(self) -> None:
        super().__init__()
        self.forms = nn.ModuleList()
        self.recipe: list[Recoding] = []

    def forward(self, core: Tensor) -> Tensor:
        for form in reversed(self.forms):
            core = form(core)
        return core

    def stages(self, core: Tensor) -> list[tuple[Form, Tensor]]:
        """Each form with the core that it decodes, outermost first."""
        found: list[tuple[Form, Tensor]] = []
        for form in reversed(self.forms):
            found.insert(0, (cast(Form, form), core))
            core = form(core)
        return found

    def settled(self) -> bool:
        """Whether every form has reached its full strength."""
        return all(cast(Form, f).settled() for f in self.forms)

    def clear(self, core: Tensor, where: Tensor) -> bool:
        """Make these entries of the weight zero by the first form that can; False without one."""
        shape = where.shape  # a form further in may stand for a table, not for the weight
        for form, its_core in self.stages(core):
            if shape == where.shape and form.clear(its_core if its_core is core else None, where):
                return True
            shape = its_core.shape
        return False

    def pack(
        self, core: Tensor, precision: str = "auto", made: dict[int, PackedWeight] | None = None
    ) -> PackedWeight:
        """The packed weight; what no form recodes is stored at `precision`; made: whole cores."""
        stages = self.stages(core.detach())

        def at(depth: int, keep: Tensor | None) -> PackedWeight:
            if depth < len(stages):
                form, its_core = stages[depth]
                return form.pack(its_core, keep, lambda k: at(depth + 1, k))
            plain = core.detach()
            if keep is None and made is not None:
                return made.setdefault(id(core), Plain.of(plain, precision))
            return Plain.of(plain if keep is None else plain[keep], precision)

        return at(0, None)


@dataclass(frozen=True, kw_only=True)
class Recoding(Technique):
    """A technique that changes how a weight is written."""

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        """Raise RecipeError where no core of this shape, at this site, can be recoded."""
        return None

    @property
    def needs_all(self) -> bool:
        """Whether it writes whole cores only, not the entries that a mask before it kept."""
        return False

    def check(self, site: Site, shape: tuple[int, ...], masked: bool) -> None:
        """Raise RecipeError where a core of this shape, masked or not, cannot be recoded."""
        self.accepts(site, shape)
        if masked and self.needs_all:
            raise RecipeError(
                f"{self.name}: site {site.name!r} is masked, and {self} writes whole blocks, in "
                "which no weight can be left out; prune nothing there, or share single values"
            )

    def follow(self, before: Form, site: Site) -> None:
        """Raise RecipeError where it cannot recode the core of the form before."""
        if before.shares_core:
            raise RecipeError(
                f"{self.name}: site {site.name!r} draws from what other sites draw from too, and "
                f"cannot be recoded alone; put {self.name} before, or give each site its own"
            )

    @abstractmethod
    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        """An unfitted form and core for a core of this shape; a checkpoint fills them in."""

    @abstractmethod
    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        """The form that suits this core best, and the new core for it to decode.

        matters: bool, which entries of the core count (what a mask kept); None for all.
        """

    def predict(self, site: Site) -> Cost:
        return Cost(size_bytes=self.predict_bytes(site, site.numel), macs=site.macs)

    @abstractmethod
    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        """Bytes for `count` entries; inner gives those of a later technique on the core."""

    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        """Recode the innermost core of the site.

        Where that was written by this very technique, it is written anew: a stronger mask
        replaces the weaker one. The fitting runs on the CPU, so that every device gives the same
        file.
        """
        links = chain(model, site)
        again = links is not None and links.recipe[-1].name == self.name
        with torch.no_grad():
            stages = links.stages(core(model, site)) if links is not None else []
            held = core(model, site).detach()
            if not again and stages:
                self.follow(stages[-1][0], site)
            if again:
                form, its_core = stages.pop()
                held = form(its_core)
            matters: Tensor | None = None
            for form, its_core in stages:
                matters = form.matters(its_core, matters)
            self.check(site, tuple(held.shape), matters is not None)
            matters = None if matters is None else matters.cpu()
            form, new = self.fit(held.cpu(), matters, site, statistics)
        if links is not None and again:
            links.forms.pop(-1)
            links.recipe.pop()
        self.place(model, site, form, new)

    def place(self, model: nn.Module, site: Site, form: Form, new: Tensor) -> None:
        """Put a form on the site, innermost, decoding the new core."""
        links = chain(model, site)
        if links is None:
            if parametrization(model, site.name) is not None:
                raise RecipeError(
                    f"{self.name}: site {site.name!r} already carries another parametrization "
                    "(weight_norm?); remove it first by torch.nn.utils.parametrize"
                )
            links = Chain()
            for name in site.names:
                if parametrization(model, name) is None:  # one module may go by several paths
                    parametrize.register_parametrization(*owner(model, name), links, unsafe=True)
        device = core(model, site).device
        links.forms.append(form.to(device))
        links.recipe.append(self)
        links.train(owner(model, site.name)[0].training)
        replace_core(model, site, new.to(device))


# ---- sites of a live model ------------------------------------------------------------------


def chain(model: nn.Module, site: Site) -> Chain | None:
    """The chain of forms on a site; None where no technique was applied."""
    found = parametrization(model, site.name)
    return found[0] if found is not None and isinstance(found[0], Chain) else None


def chains(model: nn.Module, sites: Iterable[Site]) -> Iterator[tuple[Site, Chain]]:
    """The sites that carry forms."""
    for site in sites:
        links = chain(model, site)
        if links is not None:
            yield site, links


def chains_of(model: nn.Module) -> Iterator[tuple[str, Chain, Tensor]]:
    """Every chain of a live model: its site's first name, the chain, and what is trained there."""
    seen = set()
    for name in parametrized_names(model):
        found = parametrization(model, name)
        if found is not None and isinstance(found[0], Chain) and found[0] not in seen:
            seen.add(found[0])
            yield name, found[0], found.original


def core(model: nn.Module, site: Site) -> Tensor:
    """What is trained at the site: the innermost core, or the weight itself."""
    found = parametrization(model, site.name)
    return tensor_at(model, site.name) if found is None else found.original


def replace_core(model: nn.Module, site: Site, new: Tensor) -> None:
    """Give the site a new core, the very same one for every owner of a tied weight."""
    trained = nn.Parameter(new.detach().clone(), requires_grad=new.is_floating_point())
    for name in site.names:
        found = parametrization(model, name)
        assert found is not None
        found.original = trained
