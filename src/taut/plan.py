"""From a goal to a recipe: sensitivities and predicted costs choose the strengths.

`propose` looks at what was tried, corrects its predictions by what was measured, and names the
next recipe to try; None once the goal is met or there is nothing better to try. It trains nothing,
so that every decision can be tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.aim import Aim
from taut.errors import RecipeError
from taut.goal import Goal
from taut.growth import growth, predict_chain
from taut.recipe import Recipe
from taut.recoding import Form, Recoding
from taut.recover import Recover
from taut.reshaping import Reshaping
from taut.schedules import Schedule, recoded_too_early
from taut.statistics import Statistics
from taut.technique import Technique
from taut.techniques import CodeLength, PruneWeights, ShareValues
from taut.trace import Trace
from taut.types import Candidate, Measurement

MOST_SPARSITY = 0.995
_FILE_BYTES, _SITE_BYTES = 60, 10  # container and header, seen on small networks
_CODED = 0  # bits: as many as a number is worth
_ROOM = 0.97  # aim a little under the bound: predictions are within a few per cent


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a recipe is predicted to leave of the network."""

    size_bytes: float
    parameters: float
    macs: float


def check(recipe: Recipe, trace: Trace) -> None:
    """Refuse a recipe whose steps match no site, or cannot follow one another on some site.

    Shapes alone decide: nothing is fitted, and what comes after a change of structure is not looked
    at. Raises RecipeError too for a schedule that no recovery follows.
    """
    _check_order(recipe)
    reshapes = any(isinstance(s, Reshaping) for s in recipe.steps)  # which may rename the sites
    if not reshapes:
        _check_schedules(recipe, trace)
    _check_sites(recipe, trace)
    if not reshapes:
        _check_shared(recipe, trace)


def _check_sites(recipe: Recipe, trace: Trace) -> None:
    bare: Tensor | None = None
    cores = {s.name: [("", torch.zeros(()).expand(s.shape), bare)] for s in trace.places}
    for step in recipe.steps:
        if isinstance(step, Reshaping):
            step.sites(trace)
            return
        for site in step.sites(trace) if isinstance(step, Technique) else ():
            stack = cores[site.name]
            if isinstance(step, Recoding):
                if stack[-1][0] == step.name:  # it would be written anew
                    stack.pop()
                _, core, matters = stack[-1]
                step.check(site, tuple(core.shape), matters is not None)
                form, new = step.blank(core)
                stack.append((step.name, new, form.matters(new, matters)))


def _check_order(recipe: Recipe) -> None:
    recoded = ""
    for step in recipe.steps:
        if isinstance(step, Recoding):
            recoded = step.name
        elif isinstance(step, Reshaping) and recoded:
            raise RecipeError(
                f"{step.name} changes the structure of the network, which must come before "
                f"{recoded}; put it first in the recipe"
            )


def _check_shared(recipe: Recipe, trace: Trace) -> None:
    forms: dict[str, tuple[str, Form]] = {}  # the last of each site, and its technique
    for step in recipe.steps:
        for site in step.sites(trace) if isinstance(step, Recoding) else ():
            assert isinstance(step, Recoding)
            name, form = forms.get(site.name, (step.name, None))
            if form is not None and name != step.name:
                step.follow(form, site)
            forms[site.name] = step.name, step.blank(torch.zeros(()).expand(site.shape))[0]


def _check_schedules(recipe: Recipe, trace: Trace) -> None:
    waiting: dict[str, str] = {}  # site with a mask that may open → what has recoded it, if any
    pruned: dict[str, PruneWeights] = {}
    unused: Schedule | None = None
    for index, step in enumerate(recipe.steps):
        trains = isinstance(step, Recover) and step.epochs > 0
        schedules = [s for s in recipe.settings(index) if isinstance(s, Schedule)]
        if isinstance(step, Recoding):
            for site in step.sites(trace):
                if isinstance(step, PruneWeights):
                    waiting[site.name], pruned[site.name] = "", step
                elif waiting.get(site.name) == "":
                    waiting[site.name] = step.name
        elif isinstance(step, Schedule):
            _refuse_unused(unused)
            unused = step
        elif trains and waiting and schedules:
            for name, before in pruned.items():
                if not before.may_reopen:
                    raise RecipeError(
                        f"schedule: what {before} removed from site {name!r} is gone for good and "
                        "cannot come back in steps; leave the schedule out, or prune by magnitude"
                    )
                schedules[-1].check(before.pattern, name)
            for name, recoded in waiting.items():
                if recoded:
                    raise RecipeError(recoded_too_early(name, recoded))
            waiting, pruned, unused = {}, {}, None
    _refuse_unused(unused)


def _refuse_unused(schedule: Schedule | None) -> None:
    if schedule is not None:
        raise RecipeError(
            f"schedule: {schedule} ends after training does: no recover follows it that trains "
            "what prune_weights removed; put prune_weights before and recover(epochs=5) after it"
        )


def forecast(recipe: Recipe, trace: Trace, model: nn.Module, statistics: Statistics) -> Forecast:
    """Predict the size of the file, the non-zero parameters and the effective MACs."""
    chains: dict[str, list[Recoding]] = {s.name: [] for s in trace.places}
    kept = {s.name: s.numel for s in trace.sites}
    for step in recipe.steps:
        if not isinstance(step, Recoding):
            continue
        sites = step.sites(trace)
        for name, local in step.localise(model, sites, statistics).items():
            assert isinstance(local, Recoding)
            links = chains[name]
            if growth(local, links, trace.site(name)):
                continue
            if links and links[-1].name == local.name:
                links.pop()
            links.append(local)
            if isinstance(local, PruneWeights):
                numel = trace.site(name).numel
                kept[name] = max(1, round((1 - local.sparsity) * numel))
    rest = trace.parameters - sum(s.numel for s in trace.sites)
    return Forecast(
        size_bytes=_FILE_BYTES + 2 * rest
        + sum(_SITE_BYTES + predict_chain(chains[s.name], s) for s in trace.sites),
        parameters=rest + sum(kept.values()),
        macs=trace.macs - sum((1 - kept[s.name] / max(s.numel, 1)) * s.macs for s in trace.sites),
    )  # fmt: skip


def propose(
    goal: Goal,
    trace: Trace,
    model: nn.Module,
    statistics: Statistics,
    original: Measurement,
    tried: Sequence[Candidate],
    *,
    epochs: int = 12,
    most: int = 5,
) -> Recipe | None:
    """The next recipe to try, or None.

    epochs: of recovery in the first trial, at least 2. most: how many trials there may be. Without
    a bound on bytes the file is made as small as the score's allows; without either, the mildest
    recipe that keeps the others is taken.
    """
    if len(tried) >= most:
        return None
    planner = _Planner(goal, trace, model, statistics, original)
    if goal.bound("bytes") is None and goal.bound("score") is not None:
        return planner.smallest(tried, max(2, epochs))
    if any(goal.met(c.measurement, original) for c in tried):
        return None
    return planner.within(tried, max(2, epochs))


class _Planner:
    def __init__(
        self, goal: Goal, trace: Trace, model: nn.Module, statistics: Statistics,
        original: Measurement,
    ) -> None:  # fmt: skip
        self.goal, self.original = goal, original
        self.trace, self.model, self.statistics = trace, model, statistics

    def within(self, tried: Sequence[Candidate], epochs: int) -> Recipe | None:
        """Aim at the bound on bytes; where the score falls short, train longer or write otherwise.

        Training for a short code comes first where bytes are bounded; work that is bounded takes
        masks, whose sizes are known beforehand.
        """
        bound = self.goal.bound("bytes")
        limit = math.inf if bound is None else bound.limit(self.original)
        ways = [(5, 1), (4, 1), (5, 2), (4, 2), (6, 2), (3, 2)]  # bits, factor on the epochs
        if self._may_code():
            ways = [(_CODED, 1), (_CODED, 3), *ways]
        if not tried:
            return self.recipe(limit * _ROOM, ways[0][0], epochs)
        last = tried[-1]
        error = self._error(last)
        missed = last.measurement.size_bytes > limit
        if missed and error < 1.0:
            return None  # predicted to fit even less: nothing stronger is known
        if missed:
            options = [(_bits(last), _epochs(last))]
        else:
            done = {(_bits(c), _epochs(c)) for c in tried if c.measurement.size_bytes <= limit}
            options = [(b, f * epochs) for b, f in ways if (b, f * epochs) not in done]
            error = error if options and options[0][0] == _bits(last) else 1.0
        recipes = (self.recipe(limit * _ROOM / error, bits, longer) for bits, longer in options)
        return _first_new(recipes, tried)

    def _may_code(self) -> bool:
        return not any(self.goal.bound(axis) for axis in ("parameters", "macs"))

    def smallest(self, tried: Sequence[Candidate], epochs: int) -> Recipe | None:
        """Bisect on the logarithm of the bytes for the smallest file that keeps every bound."""
        good = [c for c in tried if self.goal.met(c.measurement, self.original)]
        bad = [c for c in tried if not self.goal.met(c.measurement, self.original)]
        high = min((c.measurement.size_bytes for c in good), default=None)
        sizes = [c.measurement.size_bytes for c in bad]
        low = max((s for s in sizes if high is None or s < high), default=None)
        if high is None:
            size = 0.03 * self.original.size_bytes if low is None else 2.0 * low
        elif low is None:
            size = 0.6 * high
        elif high / low < 1.1:
            return None
        else:
            size = math.sqrt(low * high)
        if size > 0.3 * self.original.size_bytes:
            return None
        bits = _CODED if self._may_code() else 5
        recipe = self.recipe(size / (self._error(tried[-1]) if tried else 1.0), bits, epochs)
        return _first_new([recipe], tried)

    def recipe(self, size_bytes: float, bits: int, epochs: int) -> Recipe:
        """The mildest recipe of this form whose forecast keeps the size and the other bounds."""
        if bits == _CODED:
            aim = Aim(size_bytes=max(1, round(size_bytes)))
            return Recipe((CodeLength(), aim, Recover(epochs=epochs)))
        share = ShareValues(bits=bits)
        if self._fits(Recipe((share,)), size_bytes):
            return Recipe((share, Recover(epochs=epochs)))
        low, high = 0.0, MOST_SPARSITY
        while high - low > 5e-4:
            middle = (low + high) / 2
            fits = self._fits(Recipe((PruneWeights(sparsity=middle), share)), size_bytes)
            low, high = (low, middle) if fits else (middle, high)
        prune = PruneWeights(sparsity=min(math.ceil(1e4 * high) / 1e4, MOST_SPARSITY))
        last = max(1, epochs // 3)
        return Recipe(
            (prune, Schedule(), Recover(epochs=epochs - last), share, Recover(epochs=last))
        )

    def _fits(self, recipe: Recipe, size_bytes: float) -> bool:
        got = forecast(recipe, self.trace, self.model, self.statistics)
        reached = {"bytes": got.size_bytes, "parameters": got.parameters, "macs": got.macs}
        limits = {b.axis: b.limit(self.original) for b in self.goal.bounds}
        limits["bytes"] = size_bytes
        return all(reached[a] <= limits[a] for a in reached if a in limits)

    def _error(self, candidate: Candidate) -> float:
        """Measured size over predicted size."""
        recipe = Recipe.parse(candidate.recipe)
        aimed = next((s.size_bytes for s in recipe.steps if isinstance(s, Aim)), None)
        if aimed:  # an aim that was shot past is no reason to aim higher
            return max(1.0, candidate.measurement.size_bytes / aimed)
        predicted = forecast(recipe, self.trace, self.model, self.statistics).size_bytes
        return candidate.measurement.size_bytes / predicted


def _first_new(recipes: Iterable[Recipe], tried: Sequence[Candidate]) -> Recipe | None:
    """The first recipe that was not tried yet."""
    known = {c.recipe for c in tried}
    return next((r for r in recipes if str(r) not in known), None)


def _bits(candidate: Candidate) -> int:
    steps = Recipe.parse(candidate.recipe).steps
    coded = any(isinstance(s, CodeLength) for s in steps)
    return _CODED if coded else next((s.bits for s in steps if isinstance(s, ShareValues)), 5)


def _epochs(candidate: Candidate) -> int:
    return sum(s.epochs for s in Recipe.parse(candidate.recipe).steps if isinstance(s, Recover))
