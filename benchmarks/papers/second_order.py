"""What each pruning criterion costs at equal sparsity, without recovery: the loss right after.

LeNet-5 on MNIST and a small Transformer on the King James text, both at 80, 90 and 95 %, in two
ways: with the same sparsity in every layer, and with one sparsity for the network that the scores
share out among its layers. OBS is asked to lose no more than OBD, and OBD no more than magnitude,
where scores of different layers are compared; in the first way OBS is asked to beat both. Losses
are means over test examples; the criteria see 512 training examples.
"""

from __future__ import annotations

import argparse
import logging
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
    return [
        figure
        for net in NETS
        if options.only in net.name
        for name, way, losses in _pruned(net, options)
        for figure in _figures(name, way, losses)
    ]


def _pruned(net: Net, options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, float]]]:
    """For each sparsity and way, its name and the loss after each criterion."""
    quick = options.quick
    torch.manual_seed(options.seed)
    train, test = net.data(quick)
    task, model = taut.Task(train=train, test=test), net.build()
    taut.recover(model, task, taut.Recover(epochs=1, distill=0.0) if quick else net.training)
    held = taut.Task(train=test, test=test).calibration_loss(len(test.inputs))
    print(f"{net.name}, nothing removed: loss {held(model):.4f}")
    seen = 48 if quick else 512
    task = taut.Task(train=Batches(train.inputs[:seen], train.targets[:seen], 64), test=test)
    for sparsity in (0.9,) if quick else SPARSITIES:
        for way in WAYS:
            losses = {}
            for criterion in CRITERIA:
                step = PruneWeights(sparsity=sparsity, scope=way, criterion=criterion)
                losses[criterion] = held(taut.apply(clone(model), step, task))
                print(f"{net.name}, {step}: loss {losses[criterion]:.4f}")
            yield f"{net.name}, {100 * sparsity:.0f} % {WAYS[way]}", way, losses


def _figures(name: str, way: str, losses: dict[str, float]) -> list[Figure]:
    command = f"prune_weights(scope={way!r}, criterion=...)"

    def figure(criterion: str, than: tuple[str, ...], others: list[str]) -> Figure:
        return Figure(
            name=f"{name}: loss after {criterion.upper()}",
            paper=", ".join(f"{o} {losses[o]:.3f}" for o in others), ours=losses[criterion],
            asked=min(losses[t] for t in than), at_most=True, command=command,
        )  # fmt: skip

    rest = [c for c in CRITERIA if c not in ("obs", "obd", "magnitude")]
    if way == "layer":
        return [figure("obs", ("obd", "magnitude"), ["obd", "magnitude", *rest])]
    return [figure("obs", ("obd",), ["obd", *rest]), figure("obd", ("magnitude",), ["magnitude"])]


if __name__ == "__main__":
    run("Pruning criteria at equal sparsity, without recovery", measure, beside="the others")
