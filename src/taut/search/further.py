"""From what keeps the goal to less of the same: the mix stays, its strengths rise together.

    s' = (s + f) / 2

s: the strengths of the smallest that keeps the goal, as shares of their ranges, 1 the strongest; f:
those of the mildest that was as strong in all and did not keep it, or the ends. A model of the
outcomes needs many trials to find such an edge; by halves it takes few, until the two are a tenth
of the bytes apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial

from taut.goal import Goal
from taut.search.space import NOTHING, Knob, Space
from taut.search.study import candidate_of
from taut.types import Measurement

_SAME = 1e-9
_WORTH = 0.9  # of the bytes: where what broke the goal is no smaller, the edge is found


Rises = Callable[[str], bool]
"""Whether more of a technique, by its name, takes fewer bytes."""


@dataclass(frozen=True)
class Tried:
    """What a trial was given, whether it kept the goal, and how large it came out."""

    given: Mapping[str, Any]
    keeps: bool
    size: float


def met_by(trial: FrozenTrial, goal: Goal, original: Measurement) -> Tried:
    """A trial that is over; one that came to nothing keeps no goal."""
    found = candidate_of(trial)
    if found is None:
        return Tried(trial.params, False, math.inf)
    measured = found.measurement
    return Tried(trial.params, goal.met(measured, original), measured.size_bytes)


def further(space: Space, rises: Rises, tried: Sequence[Tried]) -> Iterator[dict[str, Any]]:
    """What to try next, as a study's parameters: for each mix that keeps the goal, smallest first.

    tried: with their sizes in bytes.
    """
    best: dict[tuple[Any, Any], Tried] = {}
    for t in tried:
        if t.keeps and (_mix(t) not in best or t.size < best[_mix(t)].size):
            best[_mix(t)] = t
    for found in sorted(best.values(), key=lambda t: t.size):
        knobs = _knobs(space, rises, found)
        at = _strengths(knobs, found)
        fell = [(_strengths(knobs, t), t) for t in tried
                if not t.keeps and _mix(t) == _mix(found)]  # fmt: skip
        beyond = [
            (s, t) for s, t in fell if all(a - _SAME <= b for a, b in zip(at, s, strict=True))
        ]
        ends, broke = min(beyond, key=lambda b: sum(b[0]), default=([1.0] * len(knobs), None))
        if broke is not None and _WORTH * found.size < broke.size < math.inf:
            continue
        middle = [(a + b) / 2 for a, b in zip(at, ends, strict=True)]
        yield {
            **found.given,
            **{k.name: k.at(s if up else 1 - s) for (k, up), s in zip(knobs, middle, strict=True)},
        }


def _mix(tried: Tried) -> tuple[Any, Any]:
    return tried.given["reshape"], tried.given["recode"]


def _knobs(space: Space, rises: Rises, tried: Tried) -> list[tuple[Knob, bool]]:
    """The knobs that a mix turns, and whether more of each is stronger; an aim's is weaker.

    What a technique that reshapes chooses by words is no strength.
    """
    reshape, recode = _mix(tried)
    names = [n for n in (reshape, *recode.split(" > ")) if n != NOTHING]
    found = [
        (space.knobs[n], rises(n)) for n in names
        if n in space.knobs and (n != reshape or space.knobs[n].scale != "words")
    ]  # fmt: skip
    return [*found, (space.aim, False)] if space.aims.intersection(names) else found


def _strengths(knobs: Sequence[tuple[Knob, bool]], tried: Tried) -> list[float]:
    shares = ((k.share(tried.given[k.name]), up) for k, up in knobs)
    return [s if up else 1 - s for s, up in shares]
