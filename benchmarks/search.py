"""The search: trials and training until a goal is met, tournaments, overhead, workers, scale.

LeNet-5 and ResNet-8 on 2,000 images of Fashion-MNIST, in bfloat16. Goal: 3 % of the bytes, at most
half a point of accuracy lost. Searches differ by luck, so each is repeated with five seeds; to
train all of that would take hours, so recipes of a random sample are trained once, at 1, 3 and 9
epochs, and kept in benchmarks/search/; then searches are *replayed* on them. A replayed trial gets
the outcome of the nearest recipe that was trained: the same techniques, the least distance between
the strengths in logarithms. Overhead, workers and scale are measured on real runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import taut
from taut.data import Batches, fashion_mnist, images
from taut.frontier_data import family
from taut.goal import Goal
from taut.recipe import Recipe
from taut.report import write_report
from taut.search.halving import hypervolume, rungs
from taut.search.jobs import Job, Outcome, run_job
from taut.search.loop import Searching, grown
from taut.search.options import Options
from taut.search.pools import Pool
from taut.search.result import SearchResult
from taut.technique import techniques
from taut.trial import Ground
from taut.types import Candidate, Measurement
from taut.zoo import LeNet5
from taut.zoo.resnet import ResNet

sys.path.insert(0, str(Path(__file__).parent))
from harness import ROOT, Figure, run

EPOCHS, TRIALS, SEEDS = 9, 40, 5
SETTINGS = "training(precision='bfloat16')"
TECHNIQUES = "prune_weights, share_values, quantize, code_length, low_rank"
NETS: dict[str, Callable[[], nn.Module]] = {
    "LeNet-5": LeNet5,
    "ResNet-8": lambda: ResNet(8, in_channels=1, stride=2),
}


@dataclass(frozen=True)
class Bench:
    """A trained network with its task and its goal."""

    name: str
    model: nn.Module
    task: taut.Task
    goal: str


def bench(name: str, quick: bool) -> Bench:
    """The network, trained on the subset."""
    count, epochs = (400, 1) if quick else (2000, 25)
    data = fashion_mnist()
    x = images(data.train_images[: count + 1000], 0.2860, 0.3530)
    y = data.train_labels[: count + 1000]
    test = images(data.test_images[:2000], 0.2860, 0.3530), data.test_labels[:2000]
    task = taut.Task(
        train=Batches(x[:count], y[:count], 50, shuffle=True),
        validation=Batches(x[count:], y[count:], 1000),
        test=Batches(*test, 1000), learning_rate=1e-2, name=name.lower(),
    )  # fmt: skip
    torch.manual_seed(0)
    net = NETS[name]()
    options = taut.Recover(epochs=epochs, learning_rate=2e-3, distill=0.0, weight_decay=0.1)
    taut.recover(net, task, options)
    score = task.evaluate(net.eval())
    return Bench(name, net, task, f"bytes<=3%, score>={score - 0.005:.4f}")


# ---- recipes that were trained, and searches that are replayed on them -----------------------

Point = dict[str, Any]  # recipe at one epoch, and what it came to after each of the rungs


class Drawn:
    """Suggests at random."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        return self.random.choice(choices)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log:
            return math.exp(self.random.uniform(math.log(low), math.log(high)))
        return self.random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return round(self.suggest_float(name, low, high, log=log)) if log else (
            self.random.randint(low, high)
        )  # fmt: skip


def recorded(on: Bench, count: int, quick: bool) -> list[Point]:
    """Recipes trained at every rung: read where they were kept, else trained and kept."""
    path = ROOT / "benchmarks" / "search" / f"{on.name.lower()}.json"
    points: list[Point] = []
    if path.is_file() and not quick:
        kept = json.loads(path.read_text())
        if kept["goal"] == on.goal:
            points = kept["points"]
    if len(points) >= count:
        return points
    with tempfile.TemporaryDirectory() as folder:
        search = Searching(on.model, on.task, Goal.parse(on.goal), options(), folder, False, None)
        try:
            space = search.outlook.space(TECHNIQUES, search.options.before())
            steps, draw = rungs(3 if quick else EPOCHS), Drawn(0)
            while len(points) < count:
                recipe = space.suggest(draw, steps[0])
                why = search.outlook.rules_out(search.outlook.excess(recipe))
                known = {p["recipe"] for p in points}
                if why or str(recipe) in known:
                    continue
                points.append(trained(search.ground, str(recipe), steps, len(points)))
                logging.info("%d/%d: %s", len(points), count, points[-1])
                if not quick:
                    path.parent.mkdir(exist_ok=True)
                    path.write_text(
                        json.dumps({"goal": on.goal, "points": points}, indent=1) + "\n"
                    )
        finally:
            search.study.close()
    return points


def trained(ground: Ground, recipe: str, steps: Sequence[int], number: int) -> Point:
    """One recipe, trained from rung to rung."""
    reached: list[list[float] | None] = []
    for i in range(len(steps)):
        text = grown(recipe, list(steps[: i + 1]))
        folder = str(ground.folder / "trials" / str(number))
        outcome = run_job(ground, Job(number=number, recipe=text, folder=folder))
        found = outcome.candidate
        reached.append([found.measurement.size_bytes, found.measurement.score] if found else None)
    return {"recipe": recipe, "reached": reached}


def strengths(recipe: str) -> dict[str, float]:
    """Each technique's number, as a share of its range or in logarithms."""
    found = {}
    for step in Recipe.parse(recipe).steps:
        for f in step.options():
            value = getattr(step, f.name)
            if type(value) in (int, float) and value != f.default and f.name != "epochs":
                small = 0 < value < 1
                found[f"{step.name}.{f.name}"] = (
                    math.log(value / (1 - value)) if small else math.log(max(value, 1e-9))
                )
    return found


class Replayed(Pool):
    """Gives back what the nearest recorded recipe came to, at the rung that a job asks for."""

    def __init__(self, points: Sequence[Point], original: Measurement) -> None:
        self.points, self.original = points, original
        self.queue: list[Job] = []
        self.spent = 0.0

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def next(self) -> tuple[Job, Outcome]:
        job = self.queue.pop(0)
        steps = Recipe.parse(job.recipe).steps
        epochs = sum(s.epochs for s in steps if isinstance(s, taut.Recover))
        near = nearest(job.recipe, self.points)
        got = near["reached"][rungs(EPOCHS).index(epochs)] if near else None
        if got is None:
            return job, Outcome(error="its like was never trained, or failed")
        measurement = replace(self.original, size_bytes=int(got[0]), score=got[1], latencies=())
        path = Path(job.folder) / "net.taut"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        return job, Outcome(
            candidate=Candidate(
                recipe=job.recipe, measurement=measurement, path=str(path), epochs=epochs
            )
        )


def nearest(recipe: str, points: Sequence[Point]) -> Point | None:
    """The recorded recipe of the same techniques whose strengths are the nearest."""
    mine, same = strengths(recipe), [p for p in points if family(p["recipe"]) == family(recipe)]

    def distance(point: Point) -> float:
        its = strengths(point["recipe"])
        return sum((mine.get(k, 0.0) - its.get(k, 0.0)) ** 2 for k in {*mine, *its})

    return min(same, key=distance, default=None)


def options(**changes: Any) -> Options:
    given = {"epochs": EPOCHS, "trials": TRIALS, "techniques": TECHNIQUES, "settings": SETTINGS}
    return Options(**{**given, **changes})


class Replay(Searching):
    """A search whose trials are looked up; it stops short of timing."""

    points: Sequence[Point] = ()

    def _pool(self) -> Pool:
        return Replayed(self.points, self.original)

    def found(self) -> list[Candidate]:
        """The candidates, in order."""
        try:
            self.go_through()
            return [c for _, c, _ in self._found()]
        finally:
            self.study.close()


def replayed(on: Bench, points: Sequence[Point], **changes: Any) -> list[Candidate]:
    """The candidates of one replayed search, in order."""
    with tempfile.TemporaryDirectory() as folder:
        search = Replay(
            on.model, on.task, Goal.parse(on.goal), options(**changes), folder, False, None
        )
        search.points = points
        return search.found()


def until_met(found: Sequence[Candidate], goal: Goal, original: Measurement) -> tuple[int, float]:
    """Trials and epochs until the goal was met; all of them and one trial where it never was."""
    epochs = 0.0
    for number, candidate in enumerate(found, 1):
        epochs += candidate.epochs
        if goal.met(candidate.measurement, original):
            return number, epochs
    return len(found) + 1, epochs


def volume(found: Sequence[Candidate], original: Measurement) -> float:
    """Of log10(bytes) and error, from a tenth of the bytes and twenty points lost."""
    points = [(math.log10(c.measurement.size_bytes), 1 - c.measurement.score) for c in found]
    return hypervolume(points, (math.log10(original.size_bytes / 10), 1.2 - original.score))


def of_searches(name: str, options: argparse.Namespace) -> Iterator[Figure]:
    """Bayesian search against random search, and successive halving against full training."""
    quick = options.quick
    on = bench(name, quick)
    points = recorded(on, 6 if quick else 80, quick)
    if quick:
        points = [{**p, "reached": [*p["reached"], p["reached"][-1]][:3]} for p in points]
    goal, traced = Goal.parse(on.goal), taut.trace(on.model, on.task.example())
    original = taut.measure(on.model, on.task, traced, seconds=0.01)
    seeds = range(options.seed, options.seed + (1 if quick else SEEDS))
    trials = 4 if quick else TRIALS
    runs = {
        kind: [replayed(on, points, seed=s, trials=trials, sampler=kind) for s in seeds]
        for kind in ("tpe", "random")
    }
    met = {k: [until_met(found, goal, original) for found in r] for k, r in runs.items()}
    middle = {k: statistics.median(e for _, e in found) for k, found in met.items()}
    tried = {k: statistics.median(t for t, _ in found) for k, found in met.items()}
    yield Figure(
        name=f"{name}: trials of TPE until the goal is met", paper=f"random: {tried['random']:g}",
        ours=tried["tpe"], asked=TRIALS, at_most=True,
    )  # fmt: skip
    yield Figure(
        name=f"{name}: epochs of TPE until the goal is met", paper=f"random: {middle['random']:g}",
        ours=middle["tpe"], asked=middle["random"], at_most=True,
    )  # fmt: skip
    many = 9 if quick else 81
    whole = [replayed(on, points, seed=s, trials=many, sampler="random") for s in seeds]
    halved = [
        replayed(on, points, seed=s, trials=many, sampler="random", halving="halving")
        for s in seeds
    ]
    shares = [
        sum(c.epochs for c in h) / sum(c.epochs for c in w)
        for h, w in zip(halved, whole, strict=True)
    ]
    volumes = [
        volume(h, original) / max(volume(w, original), 1e-9)
        for h, w in zip(halved, whole, strict=True)
    ]
    yield Figure(
        name=f"{name}: hypervolume of successive halving", paper="of full training: 1",
        ours=statistics.median(volumes), asked=0.99, at_most=False,
    )  # fmt: skip
    yield Figure(
        name=f"{name}: epochs of successive halving", paper="of full training: 1",
        ours=statistics.median(shares), asked=1 / 3, at_most=True,
    )  # fmt: skip


# ---- real runs ------------------------------------------------------------------------------


def overhead(options: argparse.Namespace) -> Iterator[Figure]:
    """The share of a search that is neither training nor measuring, in this process's time."""
    on = bench("LeNet-5", options.quick)
    spent = [0.0]

    class Watched(Searching):
        def _pool(self) -> Pool:
            pool = super()._pool()
            inner = pool.next

            def next_() -> tuple[Job, Outcome]:
                began = time.process_time()
                try:
                    return inner()
                finally:
                    spent[0] += time.process_time() - began

            pool.next = next_  # type: ignore[method-assign]
            return pool

    trials = 2 if options.quick else 12
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        search = Watched(
            on.model, on.task, Goal.parse(on.goal),
            globals()["options"](trials=trials, epochs=3 if options.quick else EPOCHS),
            folder, False, None,
        )  # fmt: skip
        ready = time.process_time() - began  # the original was traced and measured
        search.go_through()
        search.study.close()
        total = time.process_time() - began - ready
    yield Figure(
        name="LeNet-5: all but training and measuring", paper="of a search's time",
        ours=100 * (1 - spent[0] / total), asked=5, at_most=True, unit=" %",
    )  # fmt: skip


def workers(options: argparse.Namespace) -> Iterator[Figure]:
    """Two workers against one, the same trials."""
    on = bench("LeNet-5", options.quick)
    seconds = {}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            search = Searching(
                on.model, on.task, Goal.parse(on.goal),
                globals()["options"](
                    trials=4 if options.quick else 16, batch=4, workers=count, sampler="random",
                    epochs=3 if options.quick else EPOCHS,
                ),
                folder, False, None,
            )  # fmt: skip
            began = time.perf_counter()
            search.go_through()
            seconds[count] = time.perf_counter() - began
            search.study.close()
    yield Figure(
        name="two local workers", paper="one worker: 1", ours=seconds[1] / seconds[2], asked=1.8,
        at_most=False, unit=" times",
    )  # fmt: skip


def scale(options: argparse.Namespace) -> Iterator[Figure]:
    """The frontier and the report of very many simulated candidates."""
    count = 200 if options.quick else 10_000
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    x = torch.randn(64, 64)
    task = taut.Task(train=[(x, x[:, 0].long() % 10)], test=[(x, x[:, 0].long() % 10)])
    with tempfile.TemporaryDirectory() as folder:
        result = taut.compress(net, task, "share_values(bits=4)", folder=folder)
        numbers, got, names = random.Random(0), result.measurement, sorted(techniques())
        made = []
        for _ in range(count):
            size, ms = 10 ** numbers.uniform(3, 5), numbers.uniform(0.1, 1)
            times = tuple(replace(t, median_ms=ms) for t in got.latencies)
            score = 1 - 1 / math.log10(size) - 0.3 * numbers.random()
            made.append(
                Candidate(
                    recipe=f"{numbers.choice(names)}() > recover(epochs={numbers.randint(1, 9)})",
                    measurement=replace(got, size_bytes=int(size), score=score, latencies=times),
                    path=result.candidate.path,
                )
            )
        began = time.process_time()
        everyone = (*made, result.candidate)
        line = taut.frontier.Frontier.of(everyone, result.original, "higher")
        many = SearchResult(
            **{f: getattr(result, f) for f in ("model", "original", "candidate", "better",
                                                "history", "folder", "task")},
            goal=Goal.parse("bytes<=50%"), candidates=everyone, minimize="bytes", line=line,
            lost=(), ruled_out=0, refused={},
        )  # fmt: skip
        path = write_report(many, net)
        seconds, size = time.process_time() - began, path.stat().st_size / 1e6
    yield Figure(
        name=f"frontier and report of {count:,} candidates", paper="", ours=seconds, asked=10,
        at_most=True, unit=" s",
    )  # fmt: skip
    yield Figure(
        name=f"report of {count:,} candidates", paper="", ours=size, asked=6, at_most=True,
        unit=" MB",
    )  # fmt: skip


def measured(options: argparse.Namespace) -> list[Figure]:
    """The figures whose names contain what was asked for."""
    parts: list[tuple[str, Callable[[argparse.Namespace], Iterator[Figure]]]] = [
        *((name, lambda o, n=name: of_searches(n, o)) for name in NETS),
        ("overhead", overhead), ("workers", workers), ("scale", scale),
    ]  # fmt: skip
    wanted = [make for name, make in parts if options.only.lower() in name.lower()]
    return [figure for make in wanted for figure in make(options)]


if __name__ == "__main__":
    run("Searching to a budget", measured, beside="beside")
