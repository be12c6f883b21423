"""The contract of the recoding techniques: trainable forms, and how they chain.

A recoding technique leaves a trainable `Form` on a site: a module that maps a *core* (what is
trained) to the weight (what the layer uses). The next technique on the same site recodes the core,
so the chain reads as a decoder,

    weight = mask(shared_values(table))      for  prune_weights > share_values

and packing walks it from the outside in: a sparse weight, whose values are shared values, whose
table is plain numbers. The chain is one PyTorch parametrization, so the model stays an ordinary
module that any loop can train.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from taut.activations import InputForm, place_input
from taut.errors import RecipeError
from taut.modules import owner, parametrization, parametrized_names, tensor_at
from taut.packed import PackedWeight, Plain
from taut.statistics import Statistics
from taut.technique import Technique, option
from taut.trace import Trace
from taut.types import Cost, Site

_log = logging.getLogger("taut")

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

    def log_scales(self) -> Sequence[nn.Parameter]:
        """Those of its parameters that are logarithms, and that the rate follows."""
        return ()

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
            if found:
                core = found[0][0](core)
            found.insert(0, (cast(Form, form), core))
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

    def blank_input(self, model: nn.Module, site: Site) -> InputForm | None:
        """An unfitted form for what the site's layer reads; None where that stays as it is."""
        return None

    def fit_input(
        self, model: nn.Module, site: Site, statistics: Statistics | None
    ) -> InputForm | None:
        """The form that suits what the site's layer reads, in the model as it is now."""
        return None

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
        given = self.fit_input(model, site, statistics)
        if given is not None:
            place_input(model, site.name.rpartition(".")[0], given, str(self))

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


@dataclass(frozen=True, kw_only=True)
class InnerRecoding(Recoding):
    """A recoding that leaves the first and the last site of a network as they are, and says so.

    They read the data and give the scores, where few levels cost most.
    """

    ends: bool = option(False, help="whether the first and the last site are recoded too")

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        """Those that `only` chooses, less the first and the last of the network."""
        chosen = super().sites(trace)
        ends = () if self.ends else (trace.sites[0], trace.sites[-1])
        inner = tuple(s for s in chosen if s not in ends)
        if not inner:
            named = ", ".join(s.name for s in chosen)
            raise RecipeError(
                f"{self.name}: only the first and the last site match only={self.only!r} "
                f"({named}), and they stay as they are; say ends=True"
            )
        return inner

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        if not self.ends:
            _log.info("%s: the first and the last site stay as they are (ends=True)", self.name)
        return super().localise(model, sites, statistics)


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
