"""A recipe, or a goal, from start to finish: resumable, measured, with its files in one folder.

    runs/<name>/run.json          what was asked, versions, machine, measurements: the record
               /trials/<n>/       checkpoint.pt, trial.json and net.taut of each recipe tried
               /net.taut          the chosen one
               /log.txt

Every file is written atomically, and a run that was killed goes on where it was: at most the epoch
in flight is lost.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from torch import nn

from taut.errors import GoalError
from taut.files import check_asked, clear, read_json, write_atomically
from taut.frontier import Frontier
from taut.goal import Goal, Verdict, is_goal
from taut.machine import machine, versions
from taut.measure import BATCHES, measure
from taut.modules import clone
from taut.pack import check_precision, load
from taut.plan import check, propose
from taut.processes import is_main, once
from taut.recipe import Recipe
from taut.statistics import Statistics
from taut.task import Task
from taut.technique import Step, Technique
from taut.timing import in_turn
from taut.trace import Trace, trace
from taut.trial import Ground, Trial, apply_step, fingerprint
from taut.tune import run_chosen
from taut.types import Candidate, Direction, EpochRecord, Measurement
from taut.watch import Watch, logged

_log = logging.getLogger("taut")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What compress found.

    model: the network as the file gives it back, running as tuned for one example. candidates: all
    that was tried; candidate: the one chosen, whose file is net.taut in the folder.
    """

    model: nn.Module
    original: Measurement
    candidate: Candidate
    candidates: tuple[Candidate, ...]
    better: Direction
    goal: Goal | None
    history: tuple[EpochRecord, ...]
    folder: Path
    task: str

    @property
    def measurement(self) -> Measurement:
        return self.candidate.measurement

    @property
    def frontier(self) -> Frontier:
        """The candidates that no other beats on bytes, latency and score at once."""
        return Frontier.of(self.candidates, self.original, self.better)

    @property
    def verdicts(self) -> list[Verdict]:
        """For each bound of the goal, what was asked and what was reached."""
        return self.goal.verdicts(self.measurement, self.original) if self.goal else []

    @property
    def met(self) -> bool:
        """Whether every bound of the goal holds; true where there was no goal."""
        return all(v.holds for v in self.verdicts)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the original's tensors."""
        return self.original.size_bytes / self.measurement.size_bytes

    def save(self, path: str | Path) -> Path:
        """Copy the .taut file to a path; taut.load reads it back."""
        write_atomically(path, Path(self.candidate.path).read_bytes())
        return Path(path)


def compress(
    model: nn.Module,
    task: Task,
    wanted: str | Recipe | Goal | Sequence[Step],
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    precision: str = "auto",
    epochs: int = 12,
    trials: int = 5,
    fresh: bool = False,
    engine: str = "pytorch",
    watch: Watch | None = None,
) -> Result:
    """Compress a trained network by a recipe, or to a goal.

    model: stays untouched. wanted: a recipe (`"prune_weights(sparsity=0.9) > recover(epochs=5)"`)
    or a goal (`"bytes<=5%, score>=-0.5%"`). folder: of the run, by default runs/<name> with a name
    that follows from what is asked, so the same call goes on where it was killed, and returns the
    result at once where it was done. fresh: start over. precision: of numbers that no technique
    recodes. epochs, trials: for goals, of recovery in the first trial and how many trials at most.
    engine: whose latency counts, one of taut.fastest's, or `auto`, the fastest of them.
    """
    aim = _aim(wanted, task)
    check_precision(precision)
    if trials < 1 or epochs < 1:
        raise GoalError(f"trials and epochs must be at least 1, got {trials} and {epochs}")
    asked = {"task": task.name, "asked": str(aim), "seed": seed, "precision": precision}
    if isinstance(aim, Goal):
        asked |= {"epochs": epochs, "trials": trials}
    asked |= {"engine": engine} if engine != "pytorch" else {}
    if task.source is not None:
        asked["task file"] = xxhash.xxh3_64_hexdigest(task.source.read_bytes())
    run = _Run(model, task, aim, asked, folder, fresh, watch or Watch())
    with logged(run.folder, run.watch):
        return run.go()


def apply(
    model: nn.Module, technique: str | Technique, task: Task, traced: Trace | None = None
) -> nn.Module:
    """Put a technique on a model, in place, and return the model (or the one that took its place).

    It is then an ordinary module for any training loop; `taut.pack` writes it. A site that the
    technique is predicted to make larger is left as it is, and the log says so. traced: of the
    original network, needed where the model carries forms already.
    """
    return apply_step(model, technique, task, traced)[0]


def _aim(wanted: str | Recipe | Goal | Sequence[Step], task: Task) -> Recipe | Goal:
    if isinstance(wanted, Goal):
        return wanted
    if isinstance(wanted, str) and is_goal(wanted):
        return Goal.parse(wanted, task.better)
    return Recipe.parse(wanted)


class _Run:
    """The run folder and what is known so far."""

    def __init__(
        self, model: nn.Module, task: Task, aim: Recipe | Goal, asked: dict[str, Any],
        folder: str | Path | None, fresh: bool, watch: Watch,
    ) -> None:  # fmt: skip
        self.model, self.task, self.aim = model, task, aim
        self.watch = watch if is_main() else Watch()
        asked = {**asked, "weights": fingerprint(model)}
        digest = xxhash.xxh3_64_hexdigest(json.dumps(asked, sort_keys=True).encode())
        self.folder = Path(folder) if folder else Path("runs") / f"{task.name}-{digest[:8]}"
        self.asked = asked
        self.record: dict[str, Any] = {
            **asked,
            "source": str(task.source) if task.source else None,
            "status": "running",
            "versions": versions(),
            "machine": machine(),
            "chooses_by": task.chooses_by,
            "better": task.better,
        }
        self.record = once(lambda: self._opened(asked, fresh))
        self.trace = trace(model, task.example())
        self.ground = Ground(
            model=model, task=task, trace=self.trace, folder=self.folder, seed=asked["seed"],
            precision=asked["precision"], watch=self.watch, engine=asked.get("engine"),
        )  # fmt: skip
        if isinstance(aim, Recipe):
            check(aim, self.trace)  # refuse now what would be refused after hours of training
        loss = self.ground.calibration if isinstance(aim, Goal) else None
        self.statistics = Statistics(model, loss, self.trace, self.ground.curves)  # for a goal

    def _opened(self, asked: dict[str, Any], fresh: bool) -> dict[str, Any]:
        """The run's record, as it was left or new, after checking that the folder is this run's."""
        path = self.folder / "run.json"
        if fresh and path.is_file():
            clear(self.folder, ("trials", "net.taut", "report.html", "log.txt", "run.json"))
        if path.is_file():
            old = read_json(path)
            check_asked(str(self.folder), old, asked, "run")
            self.record = {**old, "versions": versions(), "machine": machine()}
        self.save()
        return self.record

    def save(self) -> None:
        text = json.dumps(self.record, indent=1, ensure_ascii=False)
        write_atomically(self.folder / "run.json", text.encode())

    def go(self) -> Result:
        original = Measurement.from_json(once(self._original))
        if self.task.chooses_by == "test" and self.record["status"] != "done":
            self.ground.say(
                "the test data choose the best epoch; a validation() keeps the score honest"
            )
        tried: list[Candidate] = []
        histories: list[list[EpochRecord]] = []
        while (recipe := once(lambda: self._next(original, tried))) is not None:
            candidate, history = self._try(recipe, len(tried) + 1)
            tried.append(candidate)
            histories.append(history)
        chosen = self._choose(original, tried)
        return self._close(original, tried, chosen, histories[chosen])

    def _original(self) -> dict[str, Any]:
        if "original" not in self.record:
            self.ground.say(f"measuring the original {type(self.model).__name__}")
            measured = measure(self.model, self.task, self.trace)
            self.record["original"] = self.ground.timed(self.model, measured).to_json()
            self.save()
        found: dict[str, Any] = self.record["original"]
        return found

    def _next(self, original: Measurement, tried: list[Candidate]) -> Recipe | None:
        if isinstance(self.aim, Recipe):
            return None if tried else self.aim
        return propose(
            self.aim, self.trace, self.model, self.statistics, original, tried,
            epochs=self.asked["epochs"], most=self.asked["trials"],
        )  # fmt: skip

    def _choose(self, original: Measurement, tried: list[Candidate]) -> int:
        """The nearest to the goal; of those that meet it, the smallest."""
        if not isinstance(self.aim, Goal):
            return 0
        goal = self.aim

        def rank(i: int) -> tuple[float, int]:
            got = tried[i].measurement
            return goal.distance(got, original), got.size_bytes

        return min(range(len(tried)), key=rank)

    def _try(self, recipe: Recipe, number: int) -> tuple[Candidate, list[EpochRecord]]:
        folder = self.folder / "trials" / str(number)
        done = folder / "trial.json"
        whole = once(lambda: done.is_file() and (folder / "net.taut").is_file())
        data = once(lambda: read_json(done)) if whole else None
        if data is not None:
            history = [EpochRecord(**r) for r in data["history"]]
            return self._candidate(data["candidate"], number), history
        self.ground.say(f"trial {number}: {recipe}")
        trial = Trial(self.ground, recipe, folder)
        candidate = trial.go()
        if is_main():
            data = {"candidate": candidate.to_json(), "history": [vars(r) for r in trial.history]}
            write_atomically(done, json.dumps(data, indent=1).encode())
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        return candidate, trial.history

    def _candidate(self, data: dict[str, Any], number: int) -> Candidate:
        """A recorded candidate; the run folder may have moved since."""
        path = self.folder / "trials" / str(number) / "net.taut"
        return replace(Candidate.from_json(data), path=str(path))

    def _close(
        self, original: Measurement, tried: list[Candidate], chosen: int,
        history: list[EpochRecord],
    ) -> Result:  # fmt: skip
        self.record = once(lambda: self._closed(original, tried, chosen))
        candidates = [self._candidate(c, i + 1) for i, c in enumerate(self.record["candidates"])]
        best = candidates[chosen]
        packed = load(best.path, clone(self.model))
        run_chosen(packed, best.measurement.choices, BATCHES[0])
        return Result(
            model=packed, original=Measurement.from_json(self.record["original"]),
            candidate=best, candidates=tuple(candidates), better=self.task.better,
            goal=self.aim if isinstance(self.aim, Goal) else None, history=tuple(history),
            folder=self.folder, task=self.task.name,
        )  # fmt: skip

    def _closed(self, original: Measurement, tried: list[Candidate], chosen: int) -> dict[str, Any]:
        """The record of the finished run, with net.taut in place."""
        best, path = tried[chosen], self.folder / "net.taut"
        content = Path(best.path).read_bytes()
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
        if self.record["status"] != "done":
            packed = load(best.path, clone(self.model))
            original, tried[chosen] = self._time_together(original, best, packed)
            self.record["original"] = original.to_json()
            self.record["candidates"] = [c.to_json() for c in tried]
            self.record["chosen"] = chosen
            self.record["status"] = "done"
            known = self.record.get("sensitivity", {})  # of before it was stopped
            self.record["sensitivity"] = {**known, **self.ground.sensitivity()}
            self.save()
        return self.record

    def _time_together(
        self, original: Measurement, best: Candidate, packed: nn.Module
    ) -> tuple[Measurement, Candidate]:
        """Latencies of the original and of the chosen network, taken in turn: a fair ratio."""
        if "engine" in self.asked:
            return original, best
        self.ground.say("timing the original and the result in turn")
        before, after = [], []
        for batch in BATCHES:
            run_chosen(packed, best.measurement.choices, batch)
            old, new = in_turn(
                [lambda: self.model, lambda: packed], self.task.example(batch), batch
            )
            before.append(old)
            after.append(new)
        measurement = replace(best.measurement, latencies=tuple(after))
        return replace(original, latencies=tuple(before)), replace(best, measurement=measurement)
