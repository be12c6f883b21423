"""The search: trials and training until a goal is met, tournaments, overhead, workers, scale.

LeNet-5 and ResNet-8 on 1,000 and 5,000 images of Fashion-MNIST, in bfloat16, the latter trained
for two epochs only. Goal: 3 % of the bytes, at most half a point of accuracy lost. Searches differ
by luck, so each is repeated with five seeds; what a recipe came to is kept, in the folder that
--keep names or for this run, and none is trained twice: the epochs that are counted are those of
the searches, whether or not the training was remembered. Searches end where the goal is met.
Tournaments are held among recipes drawn at random, each of which was trained to the end, from rung
to rung. Nothing is timed in these; overhead, workers and scale are measured on whole searches.
"""

from __future__ import annotations

import argparse
import functools
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
from unittest import mock

import optuna
import torch
from torch import nn

import taut
from taut.data import Batches, fashion_mnist, images
from taut.errors import TautError
from taut.goal import Goal
from taut.measure import tensor_bytes
from taut.pattern import Pattern
from taut.report import write_report
from taut.search.halving import grown, hypervolume, rungs
from taut.search.jobs import Job, Outcome
from taut.search.loop import Searching
from taut.search.options import Options, settings_of
from taut.search.outlook import Outlook, in_turn
from taut.search.pools import Pool
from taut.search.result import SearchResult
from taut.search.samplers import sampler
from taut.search.space import Space
from taut.statistics import Curve, Statistics
from taut.technique import techniques
from taut.trial import Ground
from taut.types import Candidate, Measurement, Site
from taut.watch import Watch
from taut.zoo import LeNet5
from taut.zoo.resnet import ResNet

sys.path.insert(0, str(Path(__file__).parent))
from harness import Figure, run
from kept_trials import Kept, Known

EPOCHS, TRIALS, SEEDS = 9, 40, 5
DRAWN, ENTERED = 24, 18  # recipes that were trained to the end, and those of one tournament
SETTINGS = "training(precision='bfloat16')"
TECHNIQUES = "prune_weights, share_values, quantize, code_length, low_rank"


@dataclass(frozen=True)
class Subject:
    """A network to compress: its training images, its own training, that of a short trial."""

    build: Callable[[], nn.Module]
    images: int
    epochs: int
    short: int
    """Epochs of a trial where searches are compared."""


NETS = {
    "LeNet-5": Subject(LeNet5, images=1000, epochs=20, short=3),
    "ResNet-8": Subject(lambda: ResNet(8, in_channels=1, stride=2), images=5000, epochs=2, short=6),
}


class Bench:
    """A trained network with its task and its goal, and what every search of it has in common."""

    def __init__(self, name: str, model: nn.Module, task: taut.Task, score: float) -> None:
        self.name, self.model, self.task = name, model, task
        self.goal = f"bytes<=3%, score>={score - 0.005:.4f}"
        self.trace = taut.trace(model, task.example())
        self.original = Measurement(
            score=score, size_bytes=tensor_bytes(model), parameters=self.trace.parameters,
            nonzero_parameters=self.trace.parameters, macs=self.trace.macs,
            effective_macs=self.trace.macs,
        )  # fmt: skip
        ground = Ground(
            model=model, task=task, trace=self.trace, folder=Path(), seed=0, precision="auto",
            watch=Watch(),
        )  # fmt: skip
        self.outlook = Outlook(ground, self.original, Goal.parse(self.goal))
        self.space = self.outlook.space(TECHNIQUES, settings_of(SETTINGS))
        self.starts = self.outlook.starts(self.space), self.outlook.reshaped_starts(self.space)


@functools.cache
def bench(name: str, quick: bool) -> Bench:
    """The network, trained on the subset."""
    subject = NETS[name]
    count, epochs = (300, 1) if quick else (subject.images, subject.epochs)
    data = fashion_mnist()
    x = images(data.train_images[: count + 500], 0.2860, 0.3530)
    y = data.train_labels[: count + 500]
    test = images(data.test_images[:1000], 0.2860, 0.3530), data.test_labels[:1000]
    task = taut.Task(
        train=Batches(x[:count], y[:count], 50, shuffle=True),
        validation=Batches(x[count:], y[count:], 500),
        test=Batches(*test, 1000), learning_rate=1e-2, name=name.lower(),
    )  # fmt: skip
    torch.manual_seed(0)
    net = subject.build()
    options = taut.Recover(epochs=epochs, learning_rate=2e-3, distill=0.0, weight_decay=0.1)
    taut.recover(net, task, options, settings=settings_of(SETTINGS))
    score = task.evaluate(net.eval())
    return Bench(name, net, task, score)


# ---- searches of trials whose outcomes are kept -----------------------------------------------


class UntilMet(Searching):
    """A search that ends where the goal is met. It looks at the network as all of them do."""

    met = False

    def __init__(self, on: Bench, known: Known, folder: str, recipes: Sequence[str],
                 **changes: Any) -> None:  # fmt: skip
        self.on, self.known, self.recipes = on, known, recipes
        goal = Goal.parse(on.goal)
        super().__init__(on.model, on.task, goal, options(**changes), folder, False, None)

    def _prepare(self) -> None:
        on = self.on
        self.trace, self.original, self.outlook = on.trace, on.original, on.outlook
        self.ground = replace(on.outlook.ground, folder=self.folder)
        self.record: dict[str, Any] = {}

    def _space(self) -> Space:
        return self.on.space

    def _starts(self) -> list[dict[str, Any]]:
        return in_turn(self.on.starts, self.options.seed)

    def _pool(self) -> Pool:
        return Kept(self.ground, self.known)

    def _propose(self, epochs: int, bracket: tuple[int, ...] = ()) -> optuna.Trial | None:
        return None if self.met else super()._propose(epochs, bracket)

    def _tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        super()._tell(trial, outcome)
        found = outcome.candidate
        self.met = self.met or (
            found is not None and self.goal.met(found.measurement, self.original)
        )


class Entered(UntilMet):
    """A search of given recipes, to the end."""

    def _propose(self, epochs: int, bracket: tuple[int, ...] = ()) -> optuna.Trial | None:
        known = len(self.study.trials())
        if known >= len(self.recipes):
            return None
        trial = self.study.ask(sampler("random", 0, known))
        self.study.accept(trial, self.recipes[known], bracket)
        return trial


def options(**changes: Any) -> Options:
    given = {"epochs": EPOCHS, "trials": TRIALS, "techniques": TECHNIQUES, "settings": SETTINGS}
    return Options(**{**given, **changes})


def searched(
    kind: type[UntilMet], on: Bench, known: Known, recipes: Sequence[str] = (), **changes: Any
) -> tuple[list[Candidate], bool]:
    """The candidates of a search, and whether one of them meets the goal."""
    with tempfile.TemporaryDirectory() as folder:
        search = kind(on, known, folder, recipes, **changes)
        try:
            search.go_through()
            return [c for _, c, _ in search._found()], search.met
        finally:
            search.study.close()


def until_met(found: Sequence[Candidate], met: bool) -> tuple[int, float]:
    """Trials and epochs until the goal was met; all of them and one trial where it never was."""
    return len(found) + (not met), sum(c.epochs for c in found)


def drawn(on: Bench, count: int, seed: int) -> list[str]:
    """Recipes at random, of one epoch, none of which is predicted to be hopeless."""
    numbers, found = Drawn(random.Random(seed)), list[str]()
    while len(found) < count:
        recipe = on.space.suggest(numbers, 1)
        try:
            hopeless = on.outlook.rules_out(on.outlook.excess(recipe))
        except TautError as error:
            hopeless = str(error)
        if str(recipe) not in found and not hopeless:
            found.append(str(recipe))
    return found


class Drawn:
    """Suggests at random."""

    def __init__(self, numbers: random.Random) -> None:
        self.random = numbers

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


def volume(found: Sequence[Candidate], original: Measurement) -> float:
    """Of log10(bytes) and error, from a tenth of the bytes and twenty points lost."""
    points = [(math.log10(c.measurement.size_bytes), 1 - c.measurement.score) for c in found]
    return hypervolume(points, (math.log10(original.size_bytes / 10), 1.2 - original.score))


def of_samplers(name: str, options: argparse.Namespace) -> Iterator[Figure]:
    """Bayesian search against random search."""
    on = bench(name, options.quick)
    known = Known(name, on.model, options.keep)
    seeds = range(options.seed, options.seed + (1 if options.quick else SEEDS))
    trials, epochs = (2, 1) if options.quick else (TRIALS, NETS[name].short)
    met = {
        kind: [
            until_met(*searched(UntilMet, on, known, seed=s, trials=trials, sampler=kind,
                                epochs=epochs))
            for s in seeds
        ]
        for kind in ("tpe", "random")
    }  # fmt: skip
    logging.info("%s: trials and epochs until the goal was met: %s", name, met)
    tried = {k: statistics.median(t for t, _ in found) for k, found in met.items()}
    spent = {k: statistics.median(e for _, e in found) for k, found in met.items()}
    yield Figure(
        name=f"{name}: trials of TPE until the goal is met", paper=f"random: {tried['random']:g}",
        ours=tried["tpe"], asked=TRIALS, at_most=True,
    )  # fmt: skip
    yield Figure(
        name=f"{name}: epochs of TPE until the goal is met", paper=f"random: {spent['random']:g}",
        ours=spent["tpe"], asked=spent["random"] - 1, at_most=True,
    )  # fmt: skip


def of_tournaments(name: str, options: argparse.Namespace) -> Iterator[Figure]:
    """Successive halving against training all to the end."""
    on = bench(name, options.quick)
    known = Known(name, on.model, options.keep)
    count, enter, epochs = (3, 3, 3) if options.quick else (DRAWN, ENTERED, EPOCHS)
    steps, every = rungs(epochs), drawn(on, count, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        pool = Kept(on.outlook.ground, known)
        for number, recipe in enumerate(every):
            for rung in range(len(steps)):
                text, place = grown(recipe, steps[: rung + 1]), f"{folder}/{number}"
                pool.submit(Job(number=number, recipe=text, folder=place))
                pool.next()
    volumes, shares = [], []
    for seed in range(options.seed, options.seed + (1 if options.quick else SEEDS)):
        mine = random.Random(seed).sample(every, enter)
        ends = [Outcome.from_json(known[grown(r, steps)]).candidate for r in mine]
        whole = [c for c in ends if c is not None]
        halved, _ = searched(
            Entered, on, known, mine, seed=seed, trials=enter, halving="halving", epochs=epochs
        )
        best = max(volume(whole, on.original), 1e-9)
        volumes.append(volume(halved, on.original) / best)
        shares.append(sum(c.epochs for c in halved) / (enter * epochs))
    logging.info("%s: hypervolumes %s, shares of the epochs %s", name, volumes, shares)
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
    """The share of a search that is neither training nor measuring, in this process's time.

    A sensitivity is measured, by whoever first asks for it.
    """
    on = bench("LeNet-5", options.quick)
    spent, inside = [0.0], [False]  # inside: of a trial, whose time counts as a whole

    class Watched(Searching):
        def _pool(self) -> Pool:
            pool = super()._pool()
            inner = pool.next

            def next_() -> tuple[Job, Outcome]:
                began, inside[0] = time.process_time(), True
                try:
                    return inner()
                finally:
                    spent[0] += time.process_time() - began
                    inside[0] = False

            pool.next = next_  # type: ignore[method-assign]
            return pool

    scan = Statistics._scan

    def timed(self: Statistics, site: Site, pattern: Pattern | None) -> Curve:
        began = time.process_time()
        try:
            return scan(self, site, pattern)
        finally:
            spent[0] += time.process_time() - began if not inside[0] else 0.0

    trials = 2 if options.quick else 10
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        search = Watched(
            on.model, on.task, Goal.parse(on.goal),
            globals()["options"](trials=trials, epochs=3 if options.quick else EPOCHS),
            folder, False, None,
        )  # fmt: skip
        ready = time.process_time() - began  # the original was traced and measured
        with mock.patch.object(Statistics, "_scan", timed):
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
                    trials=4 if options.quick else 32, batch=4, workers=count, sampler="random",
                    epochs=NETS[on.name].short,
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


def measured(options: argparse.Namespace) -> Iterator[Figure]:
    """The figures whose names contain what was asked for."""
    parts: list[tuple[str, Callable[[argparse.Namespace], Iterator[Figure]]]] = [
        *((f"{n} samplers", lambda o, n=n: of_samplers(n, o)) for n in NETS),
        *((f"{n} tournaments", lambda o, n=n: of_tournaments(n, o)) for n in NETS),
        ("overhead", overhead), ("workers", workers), ("scale", scale),
    ]  # fmt: skip
    wanted = [make for name, make in parts if options.only.lower() in name.lower()]
    return (figure for make in wanted for figure in make(options))


def kept_in(parser: argparse.ArgumentParser) -> None:
    """Where outcomes are kept from one call to the next."""
    parser.add_argument("--keep", type=Path, help="a folder for what trials came to")


if __name__ == "__main__":
    run("Searching to a budget", measured, beside="beside", more=kept_in)
