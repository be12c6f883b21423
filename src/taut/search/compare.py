"""Every technique at several strengths on one network, with the same training: a cross-section."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from taut import processes
from taut.errors import RunError, SearchError, TautError
from taut.files import check_asked, clear, read_json, write_atomically
from taut.frontier import Frontier
from taut.machine import machine, versions
from taut.measure import measure
from taut.pack import check_precision
from taut.plan import check
from taut.recipe import Recipe
from taut.search.jobs import Job, Outcome
from taut.search.options import settings_of
from taut.search.pools import Here, Pool, Processes, timed
from taut.search.space import aim_knob, chosen, fitting, tells_its_bytes
from taut.task import Task
from taut.technique import Setting, Technique
from taut.trace import Trace, trace
from taut.trial import Ground, fingerprint
from taut.types import Candidate, Direction, Measurement
from taut.watch import Watch, logged


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One technique at one strength: what it came to, or why it came to nothing."""

    technique: str
    recipe: str
    candidate: Candidate | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every technique at several strengths. rows: by technique, from weak to strong or back."""

    rows: tuple[Compared, ...]
    original: Measurement
    better: Direction
    task: str
    folder: Path

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(r.candidate for r in self.rows if r.candidate is not None)

    @property
    def frontier(self) -> Frontier:
        """The candidates that no other beats, all timed in one run."""
        return Frontier.of(self.candidates, self.original, self.better)

    def to_json(self) -> dict[str, Any]:
        """Plain types: the original's measurement and all rows."""
        rows = [
            {**vars(r), "candidate": r.candidate.to_json() if r.candidate else None}
            for r in self.rows
        ]
        return {"original": self.original.to_json(), "rows": rows}


def compare(
    model: nn.Module,
    task: Task,
    *,
    epochs: int = 2,
    strengths: int = 3,
    techniques: str = "*",
    settings: str = "",
    workers: int = 1,
    seed: int = 0,
    precision: str = "auto",
    folder: str | Path | None = None,
    fresh: bool = False,
    watch: Watch | None = None,
) -> Comparison:
    """Compare every registered technique on a network, each with the same recovery.

    epochs: of each recovery. strengths: how many of each technique's, from end to end of what a
    search would try (see search/space.py); a technique that has none comes once. techniques:
    patterns of those to compare. settings: steps that every recipe starts by. workers: processes.
    The rows say of each technique what it came to, or why not. Latencies are taken in turn in one
    run at the end. Started again in its folder, by default runs/<task>-compare, it goes on.
    """
    check_precision(precision)
    for name, value in (("epochs", epochs), ("strengths", strengths), ("workers", workers)):
        if type(value) is not int or value < 1:
            raise SearchError(f"compare: {name} must be at least 1, got {value!r}")
    if processes.count() > 1:
        raise SearchError(
            "compare runs as one process that has workers of its own; start it without torchrun"
        )
    before = settings_of(settings)
    named = chosen(techniques)
    if not named:
        raise SearchError(f"compare: techniques={techniques!r} names no technique")
    watch = watch or Watch()
    place = Path(folder) if folder else Path("runs") / f"{task.name}-compare"
    asked = {
        "task": task.name, "weights": fingerprint(model), "epochs": epochs, "settings": settings,
        "seed": seed, "precision": precision,
    }  # fmt: skip
    _claim(place, asked, fresh)
    with logged(place, watch):
        traced = trace(model, task.example())
        ground = Ground(
            model=model, task=task, trace=traced, folder=place, seed=seed, precision=precision,
            watch=watch,
        )  # fmt: skip
        original = measure(model, task, traced)
        recipes = [
            (name, recipe)
            for name, cls in sorted(named.items())
            for recipe in _strengths(cls, traced, original, strengths, before, epochs)
        ]
        pool: Pool = Processes(ground, workers) if workers > 1 else Here(ground)
        with pool:
            rows = _tried(recipes, traced, pool, place, watch)
        found = [r.candidate for r in rows if r.candidate is not None]
        if not found:
            raise RunError(f"compare: no technique came to an end; see {place / 'log.txt'}")
        times = timed(ground, [c.path for c in found], rounds=3)
    again = iter(times[1:])
    result = Comparison(
        rows=tuple(replace(r, candidate=_timed(r.candidate, again)) for r in rows),
        original=replace(original, latencies=times[0][0]), better=task.better, task=task.name,
        folder=place,
    )  # fmt: skip
    _save(place, {**asked, **result.to_json(), "versions": versions(), "machine": machine()})
    return result


def _timed(candidate: Candidate | None, times: Iterator[Any]) -> Candidate | None:
    if candidate is None:
        return None
    latencies, choices = next(times)
    measurement = replace(candidate.measurement, latencies=latencies, choices=choices)
    return replace(candidate, measurement=measurement)


def _strengths(
    cls: type[Technique], traced: Trace, original: Measurement, count: int,
    before: Sequence[Setting], epochs: int,
) -> Iterator[str]:  # fmt: skip
    """Recipes of one technique, at `count` strengths where it has any."""
    head = [str(s) for s in before]
    site = max(traced.sites, key=lambda s: s.numel)
    tail = f"recover(epochs={epochs})"
    try:
        steered = tells_its_bytes(cls(), site.shape)
    except TautError:
        steered = False
    knob = aim_knob(original.size_bytes) if steered else fitting(cls, traced)
    if knob is None:
        yield " > ".join([*head, str(cls()), tail])
        return
    for sample in knob.spread(count):
        value = sample if knob.scale == "words" else knob.value(sample)
        if steered:
            yield " > ".join([*head, str(cls()), f"aim(size_bytes={math.ceil(value)})", tail])
        else:
            options: dict[str, Any] = {knob.option: value}
            yield " > ".join([*head, str(cls(**options)), tail])


def _tried(
    recipes: Sequence[tuple[str, str]], traced: Trace, pool: Pool, place: Path, watch: Watch
) -> list[Compared]:
    found: dict[str, Outcome] = {}
    waiting = 0
    for number, (_, recipe) in enumerate(recipes):
        try:
            check(Recipe.parse(recipe), traced)
        except TautError as error:
            found[recipe] = Outcome(error=str(error))
            continue
        own = place / "trials" / xxhash.xxh3_64_hexdigest(recipe.encode())
        pool.submit(Job(number=number, recipe=recipe, folder=str(own)))
        waiting += 1
    for _ in range(waiting):
        job, outcome = pool.next()
        found[job.recipe] = outcome
        (Path(job.folder) / "checkpoint.pt").unlink(missing_ok=True)
        watch.on_trial(outcome.candidate, len(found), len(recipes))
    return [
        Compared(
            technique=name, recipe=recipe, candidate=found[recipe].candidate,
            why=found[recipe].error,
        )
        for name, recipe in recipes
    ]  # fmt: skip


def _claim(place: Path, asked: dict[str, Any], fresh: bool) -> None:
    path = place / "compare.json"
    if fresh and path.is_file():
        clear(place, ("trials", "compare.json", "compare.html", "log.txt", "workers.txt"))
    if path.is_file():
        check_asked(str(place), read_json(path), asked, "comparison")
    else:
        _save(place, asked)


def _save(place: Path, data: dict[str, Any]) -> None:
    write_atomically(place / "compare.json", json.dumps(data, indent=1).encode())
