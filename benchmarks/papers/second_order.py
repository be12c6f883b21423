"""What each pruning criterion costs at equal sparsity, without recovery: the loss right after.

LeNet-5 on MNIST and a small Transformer on the King James text, both at 80, 90 and 95 %, in two
ways: with the same sparsity in every layer, and with one sparsity for the network that the scores
share out among its layers. OBS is asked to lose no more than OBD, and OBD no more than magnitude,
where scores of different layers are compared; in the first way OBS is asked to beat both. Losses
are means over test examples, of `SEEDS` networks trained from as many seeds, with the standard
deviation over those; criteria see 512 training examples.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import taut
from taut.data import Batches, characters, images, king_james, mnist, windows
from taut.importance import CRITERIA
from taut.modules import clone
from taut.techniques import PruneWeights
from taut.zoo import LeNet5, TransformerLanguageModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run

SEEDS = 3
SPARSITIES = (0.8, 0.9, 0.95)
WAYS = {"layer": "of every layer", "global": "of all weights"}
STEPS = 64  # characters that the Transformer sees


@dataclass(frozen=True)
class Net:
    """A network, its data as (train, test), and how it is trained."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[bool], tuple[Batches, Batches]]
    training: taut.Recover


def digits(quick: bool) -> tuple[Batches, Batches]:
    data = mnist()
    used, held = (1000, 500) if quick else (30_000, 2000)
    x = images(data.train_images[:used], mean=0.0, std=1.0)
    test = images(data.test_images[:held], mean=0.0, std=1.0)
    return (
        Batches(x, data.train_labels[:used], 128, shuffle=True),
        Batches(test, data.test_labels[:held], 500),
    )


def text(quick: bool) -> tuple[Batches, Batches]:
    x, y = windows(characters(king_james())[0], STEPS)
    used, held = (300, 50) if quick else (8000, 500)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:used], order[-held:]
    return Batches(x[train], y[train], 64, shuffle=True), Batches(x[test], y[test], 50)


def transformer() -> nn.Module:
    alphabet = characters(king_james())[1]
    return TransformerLanguageModel(len(alphabet), width=64, context=STEPS)


NETS = (
    Net("LeNet-5", LeNet5, digits, taut.Recover(epochs=3, learning_rate=2e-3, distill=0.0)),
    Net("Transformer", transformer, text, taut.Recover(epochs=10, learning_rate=3e-3, distill=0.0)),
)


def measure(options: argparse.Namespace) -> list[Figure]:
    logging.getLogger("taut").setLevel(logging.WARNING)  # the sparsity of every layer, each time
    figures: list[Figure] = []
    for net in (n for n in NETS if options.only in n.name):
        seeds = range(options.seed, options.seed + (1 if options.quick else SEEDS))
        runs = [_losses(net, seed, options.quick) for seed in seeds]
        whole = [r.pop(("", 0.0, "")) for r in runs]
        print(f"{net.name}, nothing removed: loss {_spread(whole)}")
        for sparsity in sorted({s for _, s, _ in runs[0]}):
            for way in WAYS:
                losses = {c: [r[way, sparsity, c] for r in runs] for c in CRITERIA}
                figures += _figures(f"{net.name}, {100 * sparsity:.0f} %", way, losses)
    return figures


def _losses(net: Net, seed: int, quick: bool) -> dict[tuple[str, float, str], float]:
    """The loss after each criterion, by way, sparsity and criterion; under ("", 0, "") before."""
    torch.manual_seed(seed)
    train, test = net.data(quick)
    task, model = taut.Task(train=train, test=test), net.build()
    taut.recover(model, task, taut.Recover(epochs=1, distill=0.0) if quick else net.training)
    held = taut.Task(train=test, test=test).calibration_loss(len(test.inputs))
    losses = {("", 0.0, ""): held(model)}
    seen = 48 if quick else 512
    few = train.inputs[:seen], train.targets[:seen]
    task = taut.Task(train=Batches(*few, 64), test=test)
    for sparsity in (0.9,) if quick else SPARSITIES:
        for way, criterion in _each():
            step = PruneWeights(sparsity=sparsity, scope=way, criterion=criterion)
            pruned = taut.apply(clone(model), step, task)
            losses[way, sparsity, criterion] = held(pruned)
            print(f"{net.name}, seed {seed}, {step}: {losses[way, sparsity, criterion]:.4f}")
    return losses


def _each() -> Iterator[tuple[str, str]]:
    return ((way, criterion) for way in WAYS for criterion in CRITERIA)


def _figures(name: str, way: str, losses: dict[str, list[float]]) -> list[Figure]:
    mean = {c: statistics.fmean(v) for c, v in losses.items()}
    told = {c: f"{c} {_spread(v)}" for c, v in losses.items()}
    command = f"prune_weights(scope={way!r}, criterion=...)"

    def figure(criterion: str, than: tuple[str, ...], others: list[str]) -> Figure:
        return Figure(
            name=f"{name} {WAYS[way]}: loss after {criterion.upper()}",
            paper=", ".join(told[o] for o in others), ours=mean[criterion],
            asked=min(mean[t] for t in than), at_most=True, command=command,
        )  # fmt: skip

    rest = [c for c in CRITERIA if c not in ("obs", "obd", "magnitude")]
    if way == "layer":
        return [figure("obs", ("obd", "magnitude"), ["obd", "magnitude", *rest])]
    return [figure("obs", ("obd",), ["obd", *rest]), figure("obd", ("magnitude",), ["magnitude"])]


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


if __name__ == "__main__":
    run("Pruning criteria at equal sparsity, without recovery", measure, beside="the others")
