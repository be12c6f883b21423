"""The contract of every technique: options, where it applies, what it will cost, how it is applied.

A technique is a frozen dataclass of options. There are two families: recoding techniques change
how a weight is written (recoding.py), reshaping ones change the structure of the network.
"""

from __future__ import annotations

import fnmatch
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from torch import nn

from taut.errors import RecipeError, did_you_mean
from taut.statistics import Statistics
from taut.trace import Trace
from taut.types import Cost, Site


def option(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    unit: str = "",
    help: str = "",
) -> Any:
    """A field of a step: its default, its range [low, high] or [low, below), choices and unit."""
    limits = {"low": low, "high": high, "below": below, "choices": choices}
    return field(default=default, metadata={**limits, "unit": unit, "help": help})


def interval(rule: Mapping[str, Any]) -> str:
    """An option's limits as an interval, like `[0, 1)`."""
    low, high, below = rule["low"], rule["high"], rule["below"]
    left = "(-inf" if low is None else f"[{low:g}"
    right = f"{high:g}]" if high is not None else f"{below:g})" if below is not None else "inf)"
    return f"{left}, {right}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a recipe: a technique or a recovery. Its options are checked when it is made."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            self._check(f.name, getattr(self, f.name), hints[f.name], f.metadata)

    def _check(self, name: str, value: Any, hint: Any, rule: Mapping[str, Any]) -> None:
        kinds = get_args(hint) or (hint,)
        if float in kinds and type(value) is int and abs(value) < 2**1023:
            value = float(value)
            object.__setattr__(self, name, value)
        if type(value) not in kinds:
            words = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise RecipeError(f"{self.name}: {name} must be {words}, got {value!r}")
        if rule["choices"] and value not in rule["choices"]:
            near = did_you_mean(str(value), rule["choices"])
            raise RecipeError(f"{self.name}: {name} has no choice {value!r}{near}")
        if type(value) in (int, float):
            low, high, below = (rule[k] for k in ("low", "high", "below"))
            finite = type(value) is int or math.isfinite(value)
            fits = finite and (low is None or value >= low)
            fits = fits and (high is None or value <= high) and (below is None or value < below)
            if not fits:
                raise RecipeError(
                    f"{self.name}: {name} must lie in {interval(rule)}, got {value!r}"
                )

    def __str__(self) -> str:
        """The text that a recipe would use: the options that differ from their defaults."""
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in given)})"

    @classmethod
    def options(cls) -> tuple[Field[Any], ...]:
        """The options, with their ranges and help as metadata."""
        return fields(cls)


@dataclass(frozen=True, kw_only=True)
class Setting(Step):
    """A step that does nothing by itself and changes how every later recovery trains.

    A later setting of the same name takes its place.
    """


STEPS: dict[str, type[Step]] = {}
"""Every step, by the name that recipes use."""

S = TypeVar("S", bound=Step)


def register_step(cls: type[S]) -> type[S]:
    """Make a step known to recipes under its class's name in snake_case.

    A registered technique is picked up by the command line, the search and the contract tests.
    """
    cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    bare = [f.name for f in fields(cls) if "choices" not in f.metadata]
    if bare:
        raise RecipeError(f"{cls.name}: {bare[0]} must be declared by option(default, ...)")
    if cls.name in STEPS:
        raise RecipeError(f"two steps are named {cls.name!r}; rename one")
    STEPS[cls.name] = cls
    return cls


@dataclass(frozen=True, kw_only=True)
class Technique(Step, ABC):
    """One way to make a network smaller. Subclass it, register it, and everything else follows.

    only: the sites it works on, as comma-separated patterns; `!` leaves sites out, as in
    `only="encoder.*, !*embedding*"`.
    """

    only: str = option("*", help="sites to work on: comma-separated patterns, `!` excludes")

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        """Where it applies: by default every site that `only` matches."""
        return self._chosen(trace.sites)

    def _chosen(self, among: tuple[Site, ...]) -> tuple[Site, ...]:
        """Those that `only` matches."""
        chosen = tuple(s for s in among if matches(self.only, s.names))
        if not chosen:
            known = ", ".join(s.name for s in among) or "none, the network has no weights"
            raise RecipeError(f"{self.name}: only={self.only!r} matches no site; known: {known}")
        return chosen

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        """The technique that each site gets: self, or copies whose strengths differ by site.

        Reads the model and changes nothing.
        """
        return {site.name: self for site in sites}

    @abstractmethod
    def predict(self, site: Site) -> Cost:
        """Bytes of the file and MACs of the site, before any work."""

    @abstractmethod
    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        """Put the trainable form on the site, in place."""

    def finish(self, model: nn.Module, trace: Trace) -> list[str]:
        """After training, before packing: clean-ups that keep every answer. Returns what it did."""
        return []


def matches(only: str, names: Iterable[str]) -> bool:
    """Whether an option `only` chooses what goes by these names; a name stands for all below it."""
    patterns = [p.strip() for p in only.split(",")]
    barred = [p[1:].strip() for p in patterns if p.startswith("!")]
    wanted = [p for p in patterns if not p.startswith("!")] or ["*"]

    def fits(globs: list[str]) -> bool:
        forms = [form for g in globs for form in (g, f"{g}.*")]
        return any(fnmatch.fnmatchcase(n, g) for n in names for g in forms)

    return fits(wanted) and not fits(barred)


def techniques() -> dict[str, type[Technique]]:
    """The registered techniques, by name."""
    return {n: c for n, c in STEPS.items() if issubclass(c, Technique)}
