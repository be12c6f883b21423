"""Trials that are done once: what each came to is kept, in memory and in a folder if one is named.

Searches that propose a recipe that another has tried, in this run or an earlier one, get its
outcome without training it again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

import taut
from taut.files import write_atomically
from taut.modules import clone
from taut.pack import load, pack
from taut.recipe import Recipe
from taut.search.jobs import Job, Outcome
from taut.search.pools import Pool
from taut.trial import Ground, Trial, fingerprint
from taut.types import Candidate, Measurement


class Untimed(Trial):
    """A trial of which only bytes and score are measured."""

    def _measure(self) -> Candidate:
        path = self.folder / "net.taut"
        size = pack(self.model, path, self.run.precision)
        score = self.task.evaluate(load(path, clone(self.run.model)))
        measurement = Measurement(
            score=score, size_bytes=size, parameters=0, nonzero_parameters=0, macs=0,
            effective_macs=0,
        )  # fmt: skip
        return Candidate(
            recipe=str(self.recipe),
            measurement=measurement,
            path=str(path),
            epochs=sum(s.epochs for s in self.recipe.steps if isinstance(s, taut.Recover)),
        )


class Kept(Pool):
    """Does a job once in all searches of a network, and remembers what it came to."""

    def __init__(self, ground: Ground, known: Known) -> None:
        self.ground, self.known = ground, known
        self.queue: list[Job] = []

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def next(self) -> tuple[Job, Outcome]:
        job = self.queue.pop(0)
        if job.recipe not in self.known:
            self.known.add(job.recipe, self._tried(job))
        outcome = Outcome.from_json(self.known[job.recipe])
        if outcome.candidate is not None:  # a search only counts what has a file
            path = Path(job.folder) / "net.taut"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return job, outcome

    def _tried(self, job: Job) -> Outcome:
        try:
            trial = Untimed(self.ground, Recipe.parse(job.recipe), Path(job.folder))
            return Outcome(candidate=trial.go())
        except Exception as error:  # as in any search
            return Outcome(error=f"{type(error).__name__}: {error}")


class Known(dict[str, dict[str, Any]]):
    """Outcomes by recipe, as JSON, on disk where a folder is named."""

    def __init__(self, name: str, model: nn.Module, folder: Path | None) -> None:
        super().__init__()
        self.path = folder / f"{name.lower()}-{fingerprint(model)}.json" if folder else None
        if self.path is not None and self.path.is_file():
            self.update(json.loads(self.path.read_text()))

    def add(self, recipe: str, outcome: Outcome) -> None:
        self[recipe] = outcome.to_json()
        found = outcome.candidate.measurement if outcome.candidate else outcome.error
        logging.info("%d: %s: %s", len(self), recipe, found)
        if self.path is not None:
            write_atomically(self.path, json.dumps(self, indent=0).encode())
