"""What a recipe is predicted to come to, before any training: so that the hopeless is never run."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from taut.aim import Aim
from taut.errors import SearchError, TautError
from taut.goal import Goal
from taut.modules import clone
from taut.pattern import Pattern
from taut.plan import Forecast, check, forecast
from taut.quiet import hushed
from taut.recipe import Recipe
from taut.recoding import Recoding
from taut.reshaping import Reshaping
from taut.search.space import NOTHING, Fixed, Knob, Space, aim_knob, chosen, knobs_of
from taut.statistics import Statistics
from taut.technique import Setting, Technique, techniques
from taut.trace import Trace, trace
from taut.trial import Ground
from taut.types import Measurement, Site

_PREDICTED = {"bytes": "size_bytes", "macs": "macs", "parameters": "parameters"}
_DOUBT = 1.25  # how far beyond a bound a prediction may lie and the recipe still be tried
_WORTH = 0.8  # two recodings are worth trying where they are predicted so much below the better one
_BISECTIONS = 7
_OFF = 0.75  # of the way from end to end of the strengths that reshape
_NEARER = (0.25, 0.1, 0.03)  # if that is too far

_Ground = tuple[nn.Module, Trace, Statistics]
"""What predictions stand on."""


class Outlook:
    """Predictions for one network and goal.

    Work that a goal bounds is predicted from each weight's share of zeros, which techniques give
    to each site by its sensitivity; recipes that reshape are predicted on a reshaped copy, by a
    glance at the data. The sensitivities of such a copy are only scanned where MACs are bounded:
    bytes and parameters hardly depend on where the zeros are.
    """

    def __init__(self, ground: Ground, original: Measurement, goal: Goal) -> None:
        self.model, self.task, self.trace = ground.model, ground.task, ground.trace
        self.ground, self.original, self.goal = ground, original, goal
        self.statistics = Statistics(self.model, ground.calibration, self.trace, ground.curves)
        self.refused: dict[str, str] = {}  # technique or pair → why it is not searched
        self._rising: dict[str, bool] = {}  # what `rises` found
        # the network reshaped by each technique that makes the file smaller
        self._shrunk: dict[str, _Ground] = {}
        # of starts that reshape, for each costs a reshaping: what it leaves, and the forecast
        self._known: dict[str, tuple[Trace, Forecast]] = {}

    def forecast(self, recipe: Recipe) -> Forecast:
        """Bytes, parameters and MACs. Raises TautError where the recipe cannot be applied."""
        check(recipe, self.trace)
        if (known := self._known.get(_predicted(recipe))) is None:
            return self._forecast(recipe, self._reshaped(_reshapes(recipe)))
        traced, found = known
        check(_without(recipe, _reshapes(recipe)), traced)
        return found

    @hushed(logging.INFO)  # what a technique would do is not told as if it did
    def _reshaped(self, steps: Sequence[Reshaping]) -> _Ground:
        """What predictions stand on once these are applied; the network itself where none is."""
        model, traced, statistics = self.model, self.trace, self.statistics
        if steps:
            statistics = self._glanced
        for step in steps:
            if model is self.model:
                model = clone(model)
            model = step.outline(model, traced, statistics)
            traced = trace(model, self.task.example())
            exact = self.goal.bound("macs") is not None
            statistics = (Statistics if exact else _Even)(model, self.ground.glance, traced)
        return model, traced, statistics

    @cached_property
    def _glanced(self) -> Statistics:
        """Of the network as it is, by very few examples."""
        return Statistics(self.model, self.ground.glance, self.trace)

    @hushed(logging.INFO)
    def _forecast(self, recipe: Recipe, ground: _Ground) -> Forecast:
        """The prediction where the recipe's reshaping is done."""
        model, traced, statistics = ground
        rest = _without(recipe, _reshapes(recipe))
        if model is not self.model:
            check(rest, traced)
        found = forecast(rest, traced, model, statistics)
        aimed = next((s.size_bytes for s in recipe.steps if isinstance(s, Aim)), None)
        return found if aimed is None else replace(found, size_bytes=aimed)

    def _noted(self, recipe: Recipe, ground: _Ground) -> Forecast:
        """The prediction for what a search may start by, which is asked for again."""
        found = self._forecast(recipe, ground)
        self._known[_predicted(recipe)] = ground[1], found
        return found

    def excess(self, recipe: Recipe) -> dict[str, float]:
        """For each bound that can be predicted, how many times beyond it: 0 where it is kept.

        Raises TautError where the recipe cannot be applied.
        """
        return self._over(self.forecast(recipe))

    def _over(self, found: Forecast) -> dict[str, float]:
        return {
            b.axis: max(0.0, getattr(found, _PREDICTED[b.axis]) / b.limit(self.original) - 1)
            for b in self.goal.bounds if b.axis in _PREDICTED
        }  # fmt: skip

    def rules_out(self, excess: dict[str, float]) -> str:
        """Why a recipe of such excesses is not worth a training; empty where it may be."""
        far = {axis: over for axis, over in excess.items() if over > _DOUBT - 1}
        return ", ".join(f"{a} predicted at {1 + x:.3g} times the bound" for a, x in far.items())

    def space(
        self, only: str = "*", settings: Sequence[Setting] = (), *, flat: bool = False
    ) -> Space:
        """What is worth searching here. Raises SearchError where nothing is."""
        named = chosen(only)
        if not named:
            raise SearchError(
                f"search: techniques={only!r} names no technique; known: {', '.join(techniques())}"
            )
        knobs, aims = knobs_of(named.values(), self.trace)
        reshape = [n for n in knobs if issubclass(named[n], Reshaping) and self._works(named[n])]
        recode = self._recodings([n for n in named if n in knobs or n in aims], named)
        if not reshape and not recode:
            why = "; ".join(f"{n}: {w}" for n, w in self.refused.items())
            raise SearchError(
                f"search: none of the techniques {only!r} has a strength to search on this "
                f"network ({why or 'they have no bounded option'}); choose others"
            )
        bound = self.goal.bound("bytes")
        limit = {} if bound is None else {"bound": bound.limit(self.original)}
        return Space(
            reshape=(NOTHING, *reshape), recode=tuple(recode) or (NOTHING,), knobs=knobs,
            aims=aims, aim=aim_knob(self.original.size_bytes, **limit), settings=tuple(settings),
            flat=flat,
        )  # fmt: skip

    def starts(self, space: Space) -> list[dict[str, Any]]:
        """For each mix of recodings the mildest strengths that are predicted to keep the bounds.

        As a study's parameters. All strengths of a mix rise together. Where no bound can be
        predicted, they are in the middle; a mix that cannot keep the bounds is left out.
        """
        space, found = replace(space, flat=False), []
        for mix in space.recode:

            def keeps(share: float, mix: str = mix) -> bool:
                return self._keeps(space, self._at(space, NOTHING, mix, share))

            if not self._predicts():
                found.append(self._at(space, NOTHING, mix, 0.5))
            elif mix != NOTHING and keeps(1.0):
                low, high = 0.0, 1.0
                for _ in range(_BISECTIONS):
                    middle = (low + high) / 2
                    low, high = (low, middle) if keeps(middle) else (middle, high)
                found.append(self._at(space, NOTHING, mix, high))
        return found

    def reshaped_starts(self, space: Space) -> list[dict[str, Any]]:
        """The same for what reshapes first, at its default or at a strength that is a quarter off.

        A network is reshaped once for each technique: at the default `space` did.
        """
        space, found = replace(space, flat=False), []
        for reshape in space.reshape if self._predicts() else ():
            knob = space.knobs.get(reshape)
            if reshape not in self._shrunk or knob is None or knob.scale == "words":
                continue
            usual = knob.sample(_usual(knob))
            places = [(0.5, usual, self._at_strength(space, reshape, usual))]
            with contextlib.suppress(TautError):  # so far off it may not go
                off = knob.at(_OFF)
                places.append((_OFF, off, self._at_strength(space, reshape, off)))
            rises = self.rises(space, reshape)
            left = [mix for mix in space.recode if mix != NOTHING]
            for share, sample, ground in places if rises else reversed(places):
                given = {
                    mix: {**self._at(space, reshape, mix, share if rises else 1 - share),
                          knob.name: sample}
                    for mix in left
                }  # fmt: skip
                good = [m for m in left if self._keeps(space, given[m], ground)]
                found += [given[m] for m in good]
                left = [m for m in left if m not in good]
        return found

    def _at_strength(self, space: Space, reshape: str, sample: Any) -> _Ground:
        """The network reshaped so; by default it was already."""
        recipe = self._alone(space, reshape, sample)
        steps = _reshapes(recipe)
        default = self._shrunk[reshape]
        ground = default if steps == [techniques()[reshape]()] else self._reshaped(steps)
        self._noted(recipe, ground)
        return ground

    def _alone(self, space: Space, name: str, sample: Any) -> Recipe:
        """A recipe of one technique and a sample of its strength."""
        kinds = (name, NOTHING) if name in space.reshape else (NOTHING, name)
        given = {"reshape": kinds[0], "recode": kinds[1], space.knobs[name].name: sample}
        return space.suggest(Fixed(given), 1)

    def _predicts(self) -> bool:
        return any(b.axis in _PREDICTED for b in self.goal.bounds)

    def _at(self, space: Space, reshape: str, mix: str, share: float) -> dict[str, Any]:
        """A mix of which all strengths lie so far between the mildest and the strongest."""
        given: dict[str, Any] = {"reshape": reshape, "recode": mix}
        names = [reshape, *mix.split(" > ")]
        for name in names:
            if name in space.knobs:
                knob = space.knobs[name]
                given[knob.name] = knob.at(share if self.rises(space, name) else 1 - share)
        if space.aims.intersection(names):
            given[space.aim.name] = space.aim.at(1 - share)
        return given

    def _keeps(self, space: Space, given: dict[str, Any], ground: _Ground | None = None) -> bool:
        """Whether all bounds are predicted to be kept. ground: where the mix reshapes, of that."""
        try:
            recipe = space.suggest(Fixed(given), 1)
            found = self._noted(recipe, ground) if ground else self.forecast(recipe)
        except TautError:  # these strengths do not go together
            return False
        return not any(self._over(found).values())

    def rises(self, space: Space, name: str) -> bool:
        """Whether a technique takes fewer bytes the higher its strength is sampled."""
        if name not in self._rising:
            self._rising[name] = self._rises(replace(space, flat=False), name)
        return self._rising[name]

    def _rises(self, space: Space, name: str) -> bool:
        """By the first two of a few strengths that go: where it reshapes, those of the starts."""
        knob = space.knobs[name]
        samples = [knob.at(share) for share in (0.0, 1.0)]
        if name in space.reshape and knob.scale != "words":
            samples = [knob.sample(_usual(knob)), *map(knob.at, (_OFF, *_NEARER))]
        sizes: dict[float, float] = {}
        for sample in samples:
            with contextlib.suppress(TautError):  # it may not go with its other options
                found = self.forecast(self._alone(space, name, sample))
                sizes.setdefault(knob.share(sample), found.size_bytes)
            if len(sizes) == 2:
                return sizes[max(sizes)] <= sizes[min(sizes)]
        return True

    def _works(self, cls: type[Technique]) -> bool:
        recipe = Recipe((cls(),))
        try:
            check(recipe, self.trace)
            ground = self._reshaped(_reshapes(recipe))
            size = self._forecast(recipe, ground).size_bytes
        except TautError as error:
            self.refused[cls.name] = str(error)
            return False
        if size < self.forecast(Recipe(())).size_bytes:
            self._shrunk[cls.name] = ground
        return True

    def _recodings(self, names: Sequence[str], named: dict[str, type[Technique]]) -> list[str]:
        """Single ones, and pairs that are predicted well below the better one of the two."""
        singles: dict[str, float] = {}
        for name in names:
            if issubclass(named[name], Recoding):
                size = self._size(Recipe((named[name](),)), name)
                if size is not None:
                    singles[name] = size
        pairs = []
        for a, b in itertools.permutations(singles, 2):
            size = self._size(Recipe((named[a](), named[b]())), f"{a} > {b}")
            if size is not None and size <= _WORTH * min(singles[a], singles[b]):
                pairs.append(f"{a} > {b}")
        return [*singles, *pairs]

    def _size(self, recipe: Recipe, name: str) -> float | None:
        try:
            return self.forecast(recipe).size_bytes
        except TautError as error:
            self.refused[name] = str(error)
            return None


def in_turn(kinds: Iterable[Sequence[dict[str, Any]]], seed: int) -> list[dict[str, Any]]:
    """Starts of several kinds, each in an order by chance, one of each kind at a time."""
    order = random.Random(seed)
    mixed = itertools.zip_longest(*(order.sample(kind, len(kind)) for kind in kinds))
    return [start for each in mixed for start in each if start is not None]


def _reshapes(recipe: Recipe) -> list[Reshaping]:
    return [s for s in recipe.steps if isinstance(s, Reshaping)]


def _usual(knob: Knob) -> Any:
    """The default of the option."""
    return getattr(techniques()[knob.step](), knob.option)


def _predicted(recipe: Recipe) -> str:
    """What a prediction depends on."""
    return str(Recipe(tuple(s for s in recipe.steps if isinstance(s, Technique | Aim))))


def _without(recipe: Recipe, steps: Sequence[Reshaping]) -> Recipe:
    return Recipe(tuple(s for s in recipe.steps if s not in steps))


class _Even(Statistics):
    """Statistics that spread a sparsity evenly, without a look at the data."""

    def least_damage(
        self, sites: tuple[Site, ...], sparsity: float, pattern: Pattern | None = None
    ) -> dict[str, float]:
        return {s.name: sparsity for s in sites}
