"""Falling back: the layers that cost most of the score go back to floats, until a bound holds.

Each site alone is recoded, and the loss on calibration data tells its damage. Then the whole recipe
is applied without the most damaging site, without the two most damaging, and so on, until the score
on the data that choose (validation, where there are some) keeps the bound. NNCF's and ONNX
Runtime's accuracy-aware quantization go the same way; they put sites back one by one to rank them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from taut.compress import apply
from taut.errors import GoalError, RecipeError
from taut.goal import Goal
from taut.growth import apply_where_smaller
from taut.modules import clone
from taut.recipe import Recipe
from taut.recoding import Recoding
from taut.recover import Recover
from taut.statistics import Statistics
from taut.task import Task
from taut.technique import Step, Technique
from taut.trace import Trace, trace
from taut.types import Measurement


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """What was found. recipe: with the sites that are left out; left: them, the worst first.

    damages: what each site alone adds to the loss. scores: of the whole recipe, with ever more
    sites left out; the last one keeps the bound.
    """

    recipe: Recipe
    left: tuple[str, ...]
    damages: Mapping[str, float]
    original: float
    scores: tuple[float, ...]


def fall_back(
    model: nn.Module, task: Task, recipe: str | Recipe, bound: str = "score>=-0.5%"
) -> Fallback:
    """Leave out of a recipe the sites that cost most, until a bound of the score holds.

    model: trained; it stays untouched. recipe: of techniques, without training, at least one of
    them recoding. bound: of the score, as in a goal. The recipe that comes back goes to
    `taut.compress`; where the first score keeps the bound, it is the one that was given.

    Raises RecipeError for a recipe that trains or recodes nothing, GoalError for a bound of
    anything but the score.

    >>> import taut, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> data = [(torch.randn(32, 4), torch.randint(0, 2, (32,)))]
    >>> task = taut.Task(train=data, test=data)
    >>> fall_back(net, task, "quantize(bits=8)", "score>=-100%").left
    ()
    """
    aim, steps = Goal.parse(bound, task.better), Recipe.parse(recipe).steps
    if len(aim.bounds) != 1 or (limit := aim.bound("score")) is None:
        raise GoalError(f"fall_back: the bound must be one of the score, got {bound!r}")
    first = next((i for i, s in enumerate(steps) if isinstance(s, Recoding)), None)
    if first is None or any(isinstance(s, Recover) for s in steps):
        raise RecipeError(
            "fall_back: the recipe must recode weights and not train, got "
            f"{Recipe(steps)}; what training mends is no damage"
        )
    split = task.chooses_by
    original = task.evaluate(model, split)
    like = Measurement(
        score=original, size_bytes=0, parameters=0, nonzero_parameters=0, macs=0, effective_macs=0
    )
    base, traced = clone(model).eval(), trace(model, task.example())
    for step in steps[:first]:
        base, traced = _applied(base, step, task, traced)
    damages: dict[str, float] = {}
    scores: list[float] = []
    left: list[str] = []
    while True:
        tried = Recipe(steps[:first] + tuple(_without(s, left) for s in steps[first:]))
        net, now = clone(base), traced
        for step in tried.steps[first:]:
            net, now = _applied(net, step, task, now)
        scores.append(task.evaluate(net, split))
        if limit.holds(replace(like, score=scores[-1]), like):
            break
        damages = damages or _damages(base, task, steps[first:], traced)
        remaining = [n for n in damages if n not in left]
        if len(remaining) == 1:  # without it nothing is recoded
            raise RecipeError(
                f"fall_back: {bound} does not hold even with {remaining[0]} alone recoded, the "
                f"score is {scores[-1]:.4f} and was {original:.4f}; recode by more bits, or train"
            )
        left.append(max(remaining, key=lambda n: damages[n]))
    return Fallback(
        recipe=tried, left=tuple(left), damages=damages, original=original, scores=tuple(scores)
    )


def _without(step: Step, left: list[str]) -> Step:
    if not left or not isinstance(step, Recoding):
        return step
    return replace(step, only=", ".join([step.only, *(f"!{n}" for n in left)]))


def _applied(net: nn.Module, step: Step, task: Task, traced: Trace) -> tuple[nn.Module, Trace]:
    if not isinstance(step, Technique):
        return net, traced
    net = apply(net, step, task, traced)
    return net, traced if isinstance(step, Recoding) else trace(net, task.example())


def _damages(
    base: nn.Module, task: Task, steps: tuple[Step, ...], traced: Trace
) -> dict[str, float]:
    """What each site adds to the loss on calibration data where it alone is recoded."""
    loss = task.calibration_loss()
    statistics = Statistics(base, loss, traced)
    before = loss(base)
    recoding = [s for s in steps if isinstance(s, Recoding)]
    sites = {site.name: site for s in recoding for site in s.sites(traced)}
    found = {}
    for name, site in sites.items():
        net = clone(base)
        for step in recoding:
            if site in step.sites(traced):
                apply_where_smaller(net, step, (site,), statistics)
        found[name] = loss(net) - before
    return found
