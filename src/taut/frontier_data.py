"""What the picture of many candidates tells: every number, before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from taut.goal import Goal
from taut.recipe import Recipe
from taut.technique import Technique
from taut.types import Candidate, Direction, Measurement


@dataclass(frozen=True, kw_only=True)
class CandidateRow:
    """One recipe that was tried. latency: at the smallest batch measured.

    macs: effective ones. family: its techniques by name; shown: whether the table has it.
    """

    number: int
    recipe: str
    family: str
    shown: bool
    epochs: float
    score: float
    size_bytes: int
    macs: int
    latency_ms: float | None
    latency_iqr_ms: float | None
    on_frontier: bool
    chosen: bool
    meets_goal: bool | None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one family of techniques reaches on a cost: those that none of it beats, by number.

    axis: bytes, latency or macs.
    """

    axis: str
    family: str
    numbers: tuple[int, ...]


def candidate_rows(
    tried: Sequence[Candidate], frontier: Sequence[Candidate], original: Measurement,
    better: Direction, goal: Goal | None = None, chosen: Candidate | None = None,
) -> tuple[CandidateRow, ...]:  # fmt: skip
    """A row for each candidate; of very many those on the frontier, and an even choice of others.

    The table shows fewer than the picture.
    """
    unbeaten = {id(c) for c in frontier}
    first = [i for i, c in enumerate(tried) if id(c) in unbeaten or c is chosen]
    already = set(first)
    others = [i for i in range(len(tried)) if i not in already]
    kept = {*first, *_evenly(others, _MOST_DRAWN)}
    listed = {*first[:_MOST_LISTED], *_evenly(others, _MOST_LISTED)}
    return tuple(
        CandidateRow(
            number=i + 1, recipe=c.recipe, family=family(c.recipe), shown=i in listed,
            epochs=c.epochs, score=got.score, size_bytes=got.size_bytes, macs=got.effective_macs,
            latency_ms=latency.median_ms if latency else None,
            latency_iqr_ms=latency.iqr_ms if latency else None,
            on_frontier=id(c) in unbeaten, chosen=c is chosen,
            meets_goal=goal.met(got, original) if goal else None,
        )
        for i, c in enumerate(tried) if i in kept
        for got, latency in [(c.measurement, c.measurement.latency())]
    )  # fmt: skip


_MOST_DRAWN, _MOST_LISTED = 1500, 100


def _evenly(items: Sequence[int], most: int) -> Sequence[int]:
    """All, or so many of them from end to end."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def family(recipe: str) -> str:
    """A recipe's techniques by name.

    >>> family("prune_weights(sparsity=0.9) > recover(epochs=2) > share_values(bits=4)")
    'prune_weights > share_values'
    """
    steps = Recipe.parse(recipe).steps
    return " > ".join(s.name for s in steps if isinstance(s, Technique))


def curves(rows: Sequence[CandidateRow], better: Direction) -> tuple[Curve, ...]:
    """Each family's own frontier of score against each cost, where it has two points or more."""
    costs: dict[str, Callable[[CandidateRow], float | None]] = {
        "bytes": lambda r: r.size_bytes, "latency": lambda r: r.latency_ms, "macs": lambda r: r.macs
    }  # fmt: skip
    found = []
    for axis, cost in costs.items():
        families: dict[str, list[CandidateRow]] = {}
        timed = [(c, r) for r in rows if (c := cost(r)) is not None and not math.isnan(r.score)]
        for _, row in sorted(timed, key=lambda pair: (pair[0], pair[1].number)):
            its = families.setdefault(row.family, [])
            gain = row.score - its[-1].score if its else math.inf
            if not its or (gain > 0 if better == "higher" else gain < 0):
                its.append(row)
        found += [
            Curve(axis=axis, family=name, numbers=tuple(r.number for r in its))
            for name, its in sorted(families.items()) if len(its) > 1
        ]  # fmt: skip
    return tuple(found)
