"""What a recipe is predicted to come to, before any training: so that the hopeless is never run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from taut.aim import Aim
from taut.errors import SearchError, TautError
from taut.goal import Goal
from taut.modules import clone
from taut.plan import Forecast, check, forecast
from taut.recipe import Recipe
from taut.recoding import Recoding
from taut.reshaping import Reshaping
from taut.search.space import NOTHING, Space, aim_knob, chosen, knobs_of
from taut.statistics import Statistics
from taut.task import Task
from taut.technique import Setting, Technique, techniques
from taut.trace import Trace, trace
from taut.types import Measurement

_PREDICTED = {"bytes": "size_bytes", "macs": "macs", "parameters": "parameters"}
_DOUBT = 1.25  # how far beyond a bound a prediction may lie and the recipe still be tried
_WORTH = 0.8  # two recodings are worth trying where they are predicted so much below the better one


class Outlook:
    """Predictions for one network and goal.

    Work that a goal bounds is predicted from each weight's share of zeros, which techniques give
    to each site by its sensitivity; recipes that reshape are predicted on a reshaped copy.
    """

    def __init__(
        self, model: nn.Module, task: Task, traced: Trace, original: Measurement, goal: Goal
    ) -> None:
        self.model, self.task, self.trace = model, task, traced
        self.original, self.goal = original, goal
        self.statistics = Statistics(model, task.calibration_loss(), traced)
        self.refused: dict[str, str] = {}  # technique or pair → why it is not searched

    def forecast(self, recipe: Recipe) -> Forecast:
        """Bytes, parameters and MACs. Raises TautError where the recipe cannot be applied."""
        check(recipe, self.trace)
        model, traced, statistics = self.model, self.trace, self.statistics
        reshapes = [s for s in recipe.steps if isinstance(s, Reshaping)]
        for step in reshapes:
            if model is self.model:
                model = clone(model)
            model = step.reshape(model, traced, statistics)
            traced = trace(model, self.task.example())
            statistics = Statistics(model, self.task.calibration_loss(), traced)
        rest = Recipe(tuple(s for s in recipe.steps if s not in reshapes))
        if reshapes:
            check(rest, traced)
        found = forecast(rest, traced, model, statistics)
        aimed = next((s.size_bytes for s in recipe.steps if isinstance(s, Aim)), None)
        return found if aimed is None else replace(found, size_bytes=aimed)

    def excess(self, recipe: Recipe) -> dict[str, float]:
        """For each bound that can be predicted, how many times beyond it: 0 where it is kept."""
        bounds = [b for b in self.goal.bounds if b.axis in _PREDICTED]
        found = self.forecast(recipe)
        return {
            b.axis: max(0.0, getattr(found, _PREDICTED[b.axis]) / b.limit(self.original) - 1)
            for b in bounds
        }

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
        site = max(self.trace.sites, key=lambda s: s.numel)
        knobs, aims = knobs_of(named.values(), site)
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

    def _works(self, cls: type[Technique]) -> bool:
        return self._size(Recipe((cls(),)), cls.name) is not None

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
