"""Searches for what to keep against magnitude, at equal MACs and equal numbers of evaluations.

Particle filter (Anwar, Hwang, Sung 2015), evolution and reinforcement learning (He et al., AMC,
ECCV 2018) each look at the same number of candidates; a candidate's damage is its misclassification
of calibration images, taken from the training set. They search the share of filters (or
connections) that each layer keeps by magnitude, and, as masks, every filter by itself. Beside them
stand three rules of magnitude: the same share of each layer; all layers ranked together; shares by
a scan of each layer's sensitivity. Every row is the median over seeds of the test error, right
after the cut and after the same short recovery; asked is the best rule's error.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import taut
from taut.data import Batches, ImageData, fashion_mnist, images, mnist
from taut.keep_search import SEARCHES, Problem
from taut.keep_search.problem import Masks, spread
from taut.mask import Mask
from taut.modules import clone
from taut.recoding import core
from taut.statistics import Curve
from taut.techniques import PruneWeights
from taut.zoo import LeNet5, ResNet

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run

SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
"""Sparsities at which a layer's sensitivity is taken."""


@dataclass(frozen=True)
class Case:
    """A network, what is cut from it, and how much of its MACs stays."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], ImageData]
    examples: int
    epochs: int
    unit: str
    kept: float


CASES = (
    Case("LeNet-5, filters", LeNet5, mnist, 10_000, 4, "filter", 0.35),
    Case("LeNet-5, connections", LeNet5, mnist, 10_000, 4, "weight", 0.1),
    Case("ResNet-8, filters", lambda: ResNet(8, in_channels=1, stride=2), fashion_mnist, 10_000, 5,
         "filter", 0.7),
)  # fmt: skip


def measure(options: argparse.Namespace) -> list[Figure]:
    figures: list[Figure] = []
    for case in (c for c in CASES if options.only in c.name):
        figures += _case(case, options)
    return figures


def _case(case: Case, options: argparse.Namespace) -> list[Figure]:
    task, model = _trained(case, options)
    traced = taut.trace(model, task.example())
    calibration = _calibration(task, 100 if options.quick else 500)

    def problem(genes: str) -> Problem:
        given: Any = {"unit": case.unit, "genes": genes}
        return Problem.of(model, traced.sites, calibration, kept=case.kept, **given)

    def errors(masks: Iterable[Tensor], seed: int) -> tuple[float, float]:
        """Test error in per cent, right after the cut and after the recovery."""
        torch.manual_seed(seed)
        net = clone(model)
        for site, mask in zip(traced.sites, masks, strict=True):
            PruneWeights().place(net, site, Mask(spread(mask, site.shape)), core(net, site))
        after_cut = 100 * (1 - task.evaluate(net))
        taut.recover(net, task, taut.Recover(epochs=1), teacher=model, trace=traced)
        return after_cut, 100 * (1 - task.evaluate(net))

    seeds = [options.seed + i for i in range(1 if options.quick else 3)]
    sites = problem("sites")
    rules = {
        "uniform": sites.candidate(torch.zeros(sites.size)),
        "global": sites.by_score(),
        "sensitivity": _by_sensitivity(sites),
    }
    by_rule = {n: _median([errors(masks, s) for s in seeds]) for n, masks in rules.items()}
    for name, found in by_rule.items():
        _say(case.name, name, found, f"damage {sites.damage(rules[name]):.4f}")
    rows: dict[str, tuple[float, float]] = {}
    for genes in ("sites", "units") if case.unit == "filter" else ("sites",):
        for name, search in SEARCHES.items():
            if genes == "units" and name == "reinforcement":
                continue  # its agent sets shares
            row = name if genes == "sites" else f"{name} of masks"
            found = []
            for seed in seeds:
                asked, began = problem(genes), time.perf_counter()
                got = search.search(asked, evaluations=_evaluations(options), seed=seed)
                found.append(errors(got.masks.values(), seed))
                seconds = time.perf_counter() - began
                _say(case.name, row, found[-1], f"damage {got.damage:.4f}, {seconds:.0f} s")
            rows[row] = _median(found)
    return [
        Figure(
            name=f"{case.name}, {row}, {when}", ours=error[i], asked=min(e[i] for e in
            by_rule.values()), at_most=True, unit=" %",
            paper=", ".join(f"{n} {e[i]:.2f} %" for n, e in by_rule.items()),
            command=f"{case.kept:.0%} of the MACs, {_evaluations(options)} evaluations",
        )
        for row, error in rows.items()
        for i, when in enumerate(("cut", "recovered"))
    ]  # fmt: skip


def _trained(case: Case, options: argparse.Namespace) -> tuple[taut.Task, nn.Module]:
    data = case.data()
    used, held = (600, 100) if options.quick else (case.examples, 500)
    x, y = images(data.train_images[:used]), data.train_labels[:used]
    shown = 300 if options.quick else 5_000
    task = taut.Task(
        train=Batches(x[:-held], y[:-held], 128, shuffle=True),
        validation=Batches(x[-held:], y[-held:], 1000),
        test=Batches(images(data.test_images[:shown]), data.test_labels[:shown], 1000),
    )
    torch.manual_seed(options.seed)
    model = case.build()
    epochs = 1 if options.quick else case.epochs
    taut.recover(model, task, taut.Recover(epochs=epochs, learning_rate=3e-3, distill=0.0))
    error = 100 * (1 - task.evaluate(model))
    print(f"{case.name}: {error:.2f} % before", flush=True)
    return task, model.eval()


def _calibration(task: taut.Task, examples: int) -> Callable[[nn.Module], float]:
    """A function that gives a network's misclassification of the same few training images."""
    train: Any = task.batches("train")
    drawn = [b for _, b in zip(range(-(-examples // 128)), train, strict=False)]
    x = torch.cat([b.args[0] for b in drawn])[:examples]
    y = torch.cat([b.target for b in drawn])[:examples]

    def error(model: nn.Module) -> float:
        return float((model.eval()(x).argmax(1) != y).double().mean())

    return error


def _by_sensitivity(problem: Problem) -> Masks:
    """The scope `sensitivity` of prune_weights, for units of any cost.

    Each layer alone is cut to some shares; then units go in the order of their damage per cost.
    """
    whole = tuple(torch.ones(x.units, dtype=torch.bool) for x in problem.layers)
    baseline, steps = problem.damage(whole), []
    for i, layer in enumerate(problem.layers):
        order = layer.scores.argsort()
        damages = []
        for share in SHARES:
            cut = whole[i].clone()
            cut[order[: round(share * layer.units)]] = False
            damages.append(problem.damage((*whole[:i], cut, *whole[i + 1 :])))
        curve = Curve(sparsities=SHARES, losses=tuple(damages), baseline=baseline)
        steps += [(s / layer.unit_cost, i, n) for s, n in curve.slopes(layer.units)]
    counts = [float(x.units) for x in problem.layers]
    over = problem.total - problem.budget
    for _, i, units in sorted(steps):
        price = problem.layers[i].unit_cost
        gone = min(units, counts[i] - 1, max(0.0, over) / price)
        counts[i] -= gone
        over -= gone * price
    return problem.ranked([max(1, int(n)) for n in counts])


def _evaluations(options: argparse.Namespace) -> int:
    return 4 if options.quick else 80


def _median(found: list[tuple[float, float]]) -> tuple[float, float]:
    cut, recovered = zip(*found, strict=True)
    return statistics.median(cut), statistics.median(recovered)


def _say(case: str, row: str, errors: tuple[float, float], more: str) -> None:
    print(f"{case}, {row}: {errors[0]:.2f} % cut, {errors[1]:.2f} % recovered ({more})", flush=True)


if __name__ == "__main__":
    run("Searches for what to keep, against magnitude", measure, beside="rules of magnitude")
