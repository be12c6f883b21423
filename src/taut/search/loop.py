"""Candidates toward a goal: propose, rule out, train, measure; then time the frontier in one run.

    runs/<name>/study.journal     the Optuna study: what was proposed, and what it came to
               /trials/<n>/       checkpoint.pt, trial.json and net.taut of each trial
               /run.json          what was asked, versions, machine, the frontier: the record
               /net.taut          the chosen network
               /log.txt, /workers.txt

A trial is proposed once all but the last `batch` before it are told, in order, so that the same
seed finds the same candidates however many workers do them and however long each takes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import xxhash
from optuna.trial import Trial, TrialState
from torch import nn

from taut import processes
from taut.errors import RunError, SearchError, TautError
from taut.files import check_asked, clear, read_json, write_atomically
from taut.frontier import Frontier
from taut.goal import Goal, value_of
from taut.machine import machine, versions
from taut.measure import BATCHES, measure
from taut.modules import clone
from taut.pack import load
from taut.search.cluster import Cluster
from taut.search.further import further, met_by
from taut.search.halving import brackets, grown, ranked, rungs, survivors
from taut.search.jobs import Job, Outcome
from taut.search.options import Options
from taut.search.outlook import Outlook, in_turn
from taut.search.pools import Clock, Here, Pool, Processes, timed
from taut.search.result import Lost, SearchResult
from taut.search.samplers import BAYESIAN, FLAT, sampler
from taut.search.space import Space
from taut.search.study import Study, bracket_of, candidate_of, history_of, recipe_of, why_of
from taut.task import Task
from taut.trace import trace
from taut.trial import Ground, fingerprint
from taut.tune import run_chosen
from taut.types import Candidate, EpochRecord, Measurement
from taut.watch import Watch, logged

_log = logging.getLogger("taut")
_ATTEMPTS = 60  # proposals in a row that may be ruled out before the least hopeless one is tried
_GRID = 5  # values of each strength on a grid
_KEPT = ("original", "status", "told", "timed", "timed by", "clock", "sensitivity")
_WRITES = ("trials", "owners", "net.taut", "report.html", "log.txt", "run.json", "workers.txt",
           "study.journal")  # fmt: skip
_STARTS = 10  # first trials of a Bayesian search that predictions choose, not chance


def search(
    model: nn.Module,
    task: Task,
    goal: str | Goal,
    *,
    folder: str | Path | None = None,
    fresh: bool = False,
    watch: Watch | None = None,
    **options: Any,
) -> SearchResult:
    """Search the registered techniques and their combinations for what keeps a goal.

    goal: bounds, `"bytes<=5%, score>=-0.5%"`. folder: of the run, by default runs/<name> with a
    name that follows from what is asked: the same call goes on where it was killed, and returns at
    once where it was done; more trials add to it. fresh: start over. Options:

    minimize: axis on which the best is chosen among those that keep the goal (bytes); it joins
        score and bytes as an objective. trials: how many recipes are trained (60).
    epochs: of recovery, in all of a recipe (5). halving: "none", "halving" or "hyperband".
    sampler: tpe, gp, nsga2, nsga3, random or grid. seed: of every random choice.
    techniques: patterns of those to search ("*", "!student"). settings: steps that every recipe
        starts by, `"training(precision='bfloat16')"`. precision: of what no technique recodes.
    workers: processes on this machine; ray: address of a Ray cluster, "" starts one here. batch:
        trials under way at most, by default twice the workers.
    storage: a database's URL, by default a journal in the folder; study: its name there, by default
        the task's.
    engine, threads: with which latencies are taken.

    Raises SearchError, GoalError or RunError for what cannot be; a trial that fails is recorded,
    and the search goes on.
    """
    try:
        chosen = Options(**options)
    except TypeError as error:
        raise SearchError(f"search: {str(error).rpartition(') ')[2]}") from error
    goal = Goal.parse(goal, task.better) if isinstance(goal, str) else goal
    if processes.count() > 1:
        raise SearchError(
            "search runs as one process that has workers of its own; start it without torchrun"
        )
    run = Searching(model, task, goal, chosen, folder, fresh, watch)
    with logged(run.folder, run.watch):
        return run.go()


class Searching:
    """The run folder, the study, and the order in which trials are proposed, done and told."""

    def __init__(
        self, model: nn.Module, task: Task, goal: Goal, options: Options,
        folder: str | Path | None, fresh: bool, watch: Watch | None,
    ) -> None:  # fmt: skip
        self.model, self.task, self.goal, self.options = model, task, goal, options
        self.watch = watch = watch or Watch()
        self.axes = tuple(dict.fromkeys(("score", "bytes", options.minimize)))
        self.asked = {
            "task": task.name, "weights": fingerprint(model), "goal": str(goal), **options.asked()
        }  # fmt: skip
        digest = xxhash.xxh3_64_hexdigest(json.dumps(self.asked, sort_keys=True).encode())
        name = f"{task.name}-search-{digest[:8]}"
        self.folder = Path(folder) if folder else Path("runs") / name
        if fresh:
            clear(self.folder, _WRITES)
        self.study = Study(
            self.folder, options.study or task.name, self.asked, self.axes, task.better,
            options.storage, fresh,
        )  # fmt: skip
        try:
            self._prepare()
        except BaseException:
            self.study.close()
            raise

    def _prepare(self) -> None:
        """Trace and measure the original, and look at what may be searched."""
        model, task, options, watch = self.model, self.task, self.options, self.watch
        self.trace = trace(model, task.example())
        self.ground = Ground(
            model=model, task=task, trace=self.trace, folder=self.folder, seed=options.seed,
            precision=options.precision, watch=watch,
        )  # fmt: skip
        self.record = self._opened()
        self.original = Measurement.from_json(self.record["original"])
        self.outlook = Outlook(self.ground, self.original, self.goal)

    # ---- the record -------------------------------------------------------------------------

    def _opened(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        old = read_json(path) if path.is_file() else {}
        if old:
            check_asked(str(self.folder), old.get("search", {}), self.asked, "run")
        record: dict[str, Any] = {
            "task": self.task.name, "asked": str(self.goal), "search": self.asked,
            "source": str(self.task.source) if self.task.source else None,
            "command": self.options.command(str(self.task.source or "task.py"), str(self.goal)),
            "status": "running", "chooses_by": self.task.chooses_by, "better": self.task.better,
            **{k: old[k] for k in _KEPT if k in old},
            "versions": {**versions(), "optuna": optuna.__version__}, "machine": machine(),
        }  # fmt: skip
        if "original" not in record:
            self.ground.say(f"measuring the original {type(self.model).__name__}")
            record["original"] = measure(self.model, self.task, self.trace).to_json()
        self.record = record
        self._save()
        return record

    def _save(self) -> None:
        text = json.dumps(self.record, indent=1, ensure_ascii=False)
        write_atomically(self.folder / "run.json", text.encode())

    # ---- the search -------------------------------------------------------------------------

    def go(self) -> SearchResult:
        """All trials, then the frontier timed, then the result."""
        try:
            self.go_through()
            return self._close()
        finally:
            self.study.close()

    def go_through(self) -> None:
        """The trials that are left, those that a dead process had under way first."""
        adopted = self.study.adopt()
        if not adopted and self._left() <= 0:
            return
        self.record["status"] = "running"
        self.space = self._space()
        with self._clock() as self.clock, self._pool() as self.pool:  # they start meanwhile
            self.grid = self._grid() if self.options.sampler == "grid" else []
            self.starts = self._starts() if self.options.sampler in BAYESIAN else []
            if self.options.halving == "none":
                self._in_order(adopted)
            else:
                self._tournaments(adopted)

    def _space(self) -> Space:
        only, flat = self.options.techniques, self.options.sampler in FLAT
        return self.outlook.space(only, self.options.before(), flat=flat)

    def _pool(self) -> Pool:
        if self.options.ray is not None:
            return Cluster(self.ground, self.options.ray, self.options.threads)
        return (
            Processes(self.ground, self.options.workers)
            if self.options.workers > 1
            else Here(self.ground)
        )

    def _clock(self) -> contextlib.AbstractContextManager[Clock | None]:
        """Who takes the latencies of each trial, where they decide what is found."""
        if self.goal.bound("latency") is None and self.options.minimize != "latency":
            return contextlib.nullcontext()
        return Clock(self.ground, threads=self.options.threads, engine=self.options.engine)

    def _next(self) -> tuple[Job, Outcome]:
        """The next job to be done. Where latency decides, it is taken while all else stands still.

        The original is timed along once; its latency is what relative bounds refer to.
        """
        job, outcome = self.pool.next()
        candidate = outcome.candidate
        if self.clock is None or candidate is None:
            return job, outcome
        with self.pool.quiet():
            (first, _), (latencies, choices) = self.clock.timed(
                [candidate.path], rounds=3, batches=BATCHES[:1]
            )
        if self.record.get("clock") != self._clocked():
            self.original = replace(self.original, latencies=first)
            self.record |= {"original": self.original.to_json(), "clock": self._clocked()}
            self._save()
        measurement = replace(candidate.measurement, latencies=latencies, choices=choices)
        return job, replace(outcome, candidate=replace(candidate, measurement=measurement))

    def _clocked(self) -> list[Any]:
        """By whom latencies are taken."""
        return [self.options.engine, self.options.threads]

    def _left(self) -> int:
        return self.options.trials - len(self.study.trials())

    def _in_order(self, adopted: list[Trial]) -> None:
        """Trials under way, of which the earliest is told first."""
        flying: dict[int, Trial] = {}
        done: dict[int, Outcome] = {}
        while True:
            while len(flying) < self.options.in_flight():
                trial = adopted.pop(0) if adopted else self._propose(self.options.epochs)
                if trial is None:
                    break
                flying[trial.number] = trial
                self.pool.submit(self._job(trial, recipe_of(trial)))
            if not flying:
                return
            first = next(iter(flying))
            while first not in done:
                job, outcome = self._next()
                done[job.number] = outcome
            self._tell(flying.pop(first), done.pop(first))

    def _tournaments(self, adopted: list[Trial]) -> None:
        """Bracket after bracket; those that a killed search left open come first."""
        steps = rungs(self.options.epochs)
        made = brackets(self.options.halving, self.options.epochs)
        begun = {tuple(b) for t in self.study.trials() if (b := bracket_of(t))}
        for number, (count, start) in enumerate(made):
            mine = [t for t in adopted if bracket_of(t)[0] == number]
            closed = any(b[0] == number for b in begun) and not mine
            if closed:
                continue
            known = sum(bracket_of(t)[:1] == [number] for t in self.study.trials())
            while known < count:
                trial = self._propose(steps[start], bracket=(number, count, start))
                if trial is None:
                    break
                mine.append(trial)
                known += 1
            if not mine:
                return
            self._tournament(mine, known, start, steps)

    def _tournament(self, alive: list[Trial], count: int, start: int, steps: list[int]) -> None:
        number = bracket_of(alive[0])[0]
        over = [t for t in self.study.trials() if t.state.is_finished()]
        told = [t for t in over if bracket_of(t)[:1] == [number]]
        for rung in range(start, len(steps)):
            ladder = steps[start : rung + 1]
            outcomes = self._all([self._job(t, grown(recipe_of(t), ladder)) for t in alive])
            points = [self._point(outcomes[t.number].candidate) for t in alive]
            # those that went at this rung before the search was stopped count as they did then
            gone = [(candidate_of(t), grown(recipe_of(t), ladder)) for t in told]
            points += [self._point(c) for c, recipe in gone if c is not None and c.recipe == recipe]
            left = len(steps) - rung - 1
            keep = survivors(count, rung - start + 1, last=left == 1) if left else 0
            there = [i for i in ranked(points) if i < len(alive)]
            best = [i for i in there if outcomes[alive[i].number].candidate][:keep]
            for i, trial in enumerate(alive):
                if i not in best:
                    self._tell(trial, outcomes[trial.number])
            alive = [t for i, t in enumerate(alive) if i in best]

    def _all(self, jobs: list[Job]) -> dict[int, Outcome]:
        for job in jobs:
            self.pool.submit(job)
        return {job.number: outcome for job, outcome in (self._next() for _ in jobs)}

    def _point(self, candidate: Candidate | None) -> list[float]:
        """The objectives, the less the better; costs in logarithms, for it is ratios that count."""
        if candidate is None:
            return [float("inf")] * len(self.axes)
        values = zip(self.axes, self._values(candidate), strict=True)
        up = self.task.better == "higher"
        return [(-v if up else v) if a == "score" else math.log(max(v, 1e-9)) for a, v in values]

    def _job(self, trial: Trial, recipe: str) -> Job:
        folder = self.folder / "trials" / str(trial.number)
        known = dict(self.ground.curves)
        return Job(number=trial.number, recipe=recipe, folder=str(folder), curves=known)

    def _values(self, candidate: Candidate) -> list[float]:
        return [value_of(axis, candidate.measurement) for axis in self.axes]

    # ---- proposing and telling --------------------------------------------------------------

    def _propose(self, epochs: int, bracket: tuple[int, ...] = ()) -> Trial | None:
        """The next trial that is worth a training; None where all trials are made, or all mixes."""
        with self.study.asking():
            tried = {recipe_of(t) for t in self.study.trials()}
            if len(self.study.trials()) >= self.options.trials:
                return None
            least: tuple[float, dict[str, Any]] | None = None
            for attempt in range(_ATTEMPTS):
                start = [] if attempt else self._first(epochs, tried)
                trial = self._ask(start, blind=2 * attempt >= _ATTEMPTS)  # some insist on the tried
                if trial is None:
                    return None
                over = self._accepted(trial, epochs, bracket, tried)
                if over is None:
                    return trial
                if over < (least[0] if least else float("inf")):
                    least = over, trial.params
            if least is None:
                return None
            self.study.optuna.enqueue_trial(least[1])
            trial = self.study.ask(sampler("random", self.options.seed, 0))
            self.study.accept(trial, str(self.space.suggest(trial, epochs)), bracket)
            return trial

    def _first(self, epochs: int, tried: set[str]) -> list[dict[str, Any]]:
        """What a Bayesian search tries before it asks its model, if anything."""
        trials, o = self.study.trials(), self.options
        every = [t.params.items() for t in self.study.optuna.get_trials(deepcopy=False)]
        first = list(self.starts)
        goes = o.sampler in BAYESIAN and o.minimize == "bytes" and o.halving == "none"
        if goes and len(trials) % 2:  # every second trial goes on from what keeps the goal
            seen = [met_by(t, self.goal, self.original) for t in trials if t.state.is_finished()]
            more = further(self.space, partial(self.outlook.rises, self.space), seen)
            first[:0] = [m for m in more if self.space.text(m, epochs) not in tried]
        return [s for s in first if not any(s.items() <= p for p in every)][:1]

    def _ask(self, start: list[dict[str, Any]], blind: bool) -> Trial | None:
        """A trial of what it may start by, or of what the sampler proposes; blind: at random."""
        seen = len(self.study.optuna.get_trials(deepcopy=False))
        if self.options.sampler == "grid":
            start = self.grid[seen : seen + 1]
            if not start:
                return None
        for values in start:
            self.study.optuna.enqueue_trial(values)
        kind = "random" if blind else self.options.sampler
        return self.study.ask(sampler(kind, self.options.seed, seen))

    def _accepted(
        self, trial: Trial, epochs: int, bracket: tuple[int, ...], tried: set[str]
    ) -> float | None:
        """None for a trial that goes on; else how hopeless it was, infinitely if it cannot be."""
        try:
            recipe = self.space.suggest(trial, epochs)
            excess = self.outlook.excess(recipe)
        except TautError as error:
            self.study.rule_out(trial, str(error), {})
            return float("inf")
        why = "tried already" if str(recipe) in tried else self.outlook.rules_out(excess)
        if not why:
            self.study.accept(trial, str(recipe), bracket)
            return None
        _log.info("ruled out: %s: %s", recipe, why)
        self.study.rule_out(trial, why, excess)
        return float("inf") if str(recipe) in tried else sum(excess.values())

    def _starts(self) -> list[dict[str, Any]]:
        """Where a model of the outcomes begins: the mildest recipes predicted to keep the goal.

        Every second one reshapes the network, where such are predicted to keep it.
        """
        kinds = self.outlook.starts(self.space), self.outlook.reshaped_starts(self.space)
        return in_turn(kinds, self.options.seed)[:_STARTS]

    def _grid(self) -> list[dict[str, Any]]:
        every = list(self.space.grid(_GRID))
        random.Random(self.options.seed).shuffle(every)
        return every

    def _tell(self, trial: Trial, outcome: Outcome) -> None:
        candidate = outcome.candidate
        if candidate is None:
            self.watch.say(f"trial {trial.number} came to nothing: {outcome.error}")
            self.study.fail(trial, outcome.error)
        else:
            self.study.tell(
                trial, candidate, outcome.history, self._values(candidate), self.goal,
                self.original,
            )  # fmt: skip
        folder = self.folder / "trials" / str(trial.number)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        done = sum(t.state.is_finished() for t in self.study.trials())
        self.watch.on_trial(candidate, done, self.options.trials)

    # ---- the end ----------------------------------------------------------------------------

    def _close(self) -> SearchResult:
        found = list(self._found())
        if not found:
            why = "; ".join(dict.fromkeys(x.why for x in self._lost()))
            raise RunError(
                f"search: none of the trials came to an end ({why or 'nothing could be tried'}); "
                f"see {self.folder / 'log.txt'}"
            )
        numbers = [n for n, _, _ in found]
        done = {"status": "done", "told": numbers, "timed by": self._clocked()}
        if any(self.record.get(k) != v for k, v in done.items()):
            self._time([(n, c) for n, c, _ in found])
            self.record |= done
            self._save()
        times = {int(n): Measurement.from_json(m) for n, m in self.record["timed"].items()}
        original = Measurement.from_json(self.record["original"])
        candidates = tuple(replace(c, measurement=times.get(n, c.measurement)) for n, c, _ in found)
        timed_ones = [c for c, n in zip(candidates, numbers, strict=True) if n in times]
        line = Frontier.of(timed_ones, original, self.task.better)
        best = line.best(self.goal, self.options.minimize)
        self.record |= {"best": best.to_json()}
        known = self.record.get("sensitivity", {})  # of before it was stopped
        self.record["sensitivity"] = {**known, **self.ground.sensitivity()}
        self._save()
        content = Path(best.path).read_bytes()
        path = self.folder / "net.taut"
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
        packed = load(best.path, clone(self.model))
        run_chosen(packed, best.measurement.choices, BATCHES[0])
        history = next(h for c, (_, _, h) in zip(candidates, found, strict=True) if c is best)
        return SearchResult(
            model=packed, original=original, candidate=best, candidates=candidates,
            better=self.task.better, goal=self.goal, folder=self.folder, task=self.task.name,
            history=tuple(EpochRecord(**r) for r in history), minimize=self.options.minimize,
            lost=tuple(self._lost()), ruled_out=self._ruled_out(), line=line,
            refused=dict(self.outlook.refused),
        )  # fmt: skip

    def _found(self) -> Iterator[tuple[int, Candidate, list[dict[str, Any]]]]:
        """Every trial's candidate whose file is here; the folder may have moved."""
        for trial in self.study.trials():
            candidate = candidate_of(trial)
            path = self.folder / "trials" / str(trial.number) / "net.taut"
            if candidate is not None and path.is_file():
                yield trial.number, replace(candidate, path=str(path)), history_of(trial)

    def _lost(self) -> list[Lost]:
        return [Lost(number=t.number, recipe=recipe_of(t), why=why_of(t))
                for t in self.study.trials() if t.state == TrialState.FAIL]  # fmt: skip

    def _ruled_out(self) -> int:
        every = self.study.optuna.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        return len(every)

    def _time(self, found: list[tuple[int, Candidate]]) -> None:
        """Latencies of the original and of every candidate on the frontier, in one run."""
        every = [c for _, c in found]
        line = Frontier.of(every, self.original, self.task.better)
        on = [(n, c) for n, c in found if any(c is x for x in line)]
        self.ground.say(f"timing the original and the {len(on)} of the frontier in turn")
        times = timed(
            self.ground, [c.path for _, c in on], threads=self.options.threads,
            engine=self.options.engine,
        )  # fmt: skip
        latencies, _ = times[0]
        self.record["original"] = replace(self.original, latencies=latencies).to_json()
        self.record["timed"] = {
            str(n): replace(c.measurement, latencies=ts, choices=cs).to_json()
            for (n, c), (ts, cs) in zip(on, times[1:], strict=True)
        }
