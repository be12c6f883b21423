"""Network Slimming: how much faster a network of fewer channels runs, at nearly the same score.

A ResNet-20 for 28 × 28 images (its first convolution has stride 2) on Fashion-MNIST. A penalty on
the scales of its batch norms draws channels towards zero, in the inner groups and in the trunk that
the shortcuts join; those of the smallest scales go, until half of the multiply-accumulates and more
are gone; what is left recovers, distilled from the original. Liu, Li, Shen, Huang, Yan, Zhang:
Learning Efficient Convolutional Networks through Network Slimming (ICCV 2017).

The best epoch is told by 500 of the training images. Both networks are timed by turns in one run,
in PyTorch at one thread. At a batch of 64 the products dominate, at a batch of one what each
operation costs besides; the first is held to the figure and the second is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from deep_compression import Shifted
from torch import nn

import taut
from taut.data import Batches, fashion_mnist, images
from taut.modules import clone
from taut.timing import race
from taut.zoo import ResNet

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import ROOT, Figure, run

FAST = "training(precision='bfloat16')"


@dataclass(frozen=True)
class Smaller:
    """A network, how it is trained, and the recipe that leaves a smaller one of its kind."""

    name: str
    build: Callable[[], nn.Module]
    training: str
    recipe: str


SLIM = Smaller(
    "ResNet-20, Fashion-MNIST",
    lambda: ResNet(20, in_channels=1, stride=2),
    f"{FAST} > recover(epochs=6, learning_rate=4e-3, weight_decay=0.02, distill=0)",
    f"{FAST} > regularise(kind='slimming', weight=2e-4) > "
    "recover(epochs=1, learning_rate=2e-3, temperature=2) > "
    "prune_channels(criterion='scale', ranking='global', of='macs', ratio=0.68, round_to=8) > "
    "regularise(kind='slimming', weight=0.0) > "
    "recover(epochs=10, learning_rate=4e-3, weight_decay=0.02, temperature=2)",
)


def picture_task(quick: bool) -> taut.Task:
    data = fashion_mnist()
    used, tested = (1500, 500) if quick else (60_000, 10_000)
    x = images(data.train_images[:used], mean=0.0, std=1.0)
    xt = images(data.test_images[:tested], mean=0.0, std=1.0)
    return taut.Task(
        train=Shifted(Batches(x, data.train_labels[:used], 128, shuffle=True), 1),
        validation=Batches(x[:500], data.train_labels[:500], 500),  # chooses nothing
        test=Batches(xt, data.test_labels[:tested], 1000),
    )


def measure(options: argparse.Namespace) -> list[Figure]:
    task, net = picture_task(options.quick), SLIM
    model, smaller, result = both(net, task, options)
    before, after = result.original, result.measurement
    lost = 100 * (before.score - after.score)
    scores = f"{100 * before.score:.2f} % → {100 * after.score:.2f} %"
    print(f"{net.name}: {scores}, {before.macs:,} MACs → {after.macs:,}")
    return [
        Figure(name=f"{net.name}: times fewer MACs", paper="", ours=before.macs / after.macs,
               asked=2.0, at_most=False, unit="×", command=net.recipe),
        Figure(name=f"{net.name}: points lost", paper=scores, ours=lost, asked=0.3, at_most=True,
               command=net.recipe),
        *times(net.name, model, smaller, task, {64: 1.6, 1: 1.0}, options.quick),
    ]  # fmt: skip


def both(
    net: Smaller, task: taut.Task, options: argparse.Namespace, part: str = ""
) -> tuple[nn.Module, nn.Module, taut.Result]:
    """The original, trained now or before, and what the recipe makes of it.

    part: of the folder of runs, where a script has several networks.
    """
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            return _both(net, task, options, Path(folder))
    return _both(net, task, options, ROOT / "runs" / Path(sys.argv[0]).stem / part)


def _both(
    net: Smaller, task: taut.Task, options: argparse.Namespace, folder: Path
) -> tuple[nn.Module, nn.Module, taut.Result]:
    torch.manual_seed(options.seed)
    model, kept = net.build(), folder / f"original-{options.seed}.pt"
    training, recipe = recipe_of(net.training, options.quick), recipe_of(net.recipe, options.quick)
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        last = training.steps[-1]
        assert isinstance(last, taut.Recover)
        taut.recover(model, task, last, settings=training.settings(len(training.steps) - 1))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    result = taut.compress(
        clone(model), task, recipe, folder=folder / f"run-{options.seed}", seed=options.seed
    )
    return model, result.model, result


def recipe_of(text: str, quick: bool) -> taut.Recipe:
    """The recipe; in a quick pass with one epoch."""
    steps: Sequence[object] = taut.Recipe.parse(text).steps
    short = [taut.Recover(epochs=1) if isinstance(s, taut.Recover) else s for s in steps]
    return taut.Recipe(tuple(short if quick else steps))


def times(
    name: str, model: nn.Module, smaller: nn.Module, task: taut.Task, asked: dict[int, float],
    quick: bool,
) -> list[Figure]:  # fmt: skip
    """How many times faster the smaller network runs, at each batch."""
    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for batch, least in asked.items():
        ms = race([model, smaller], task.example(batch), 0.05 if quick else 5.0)
        told = f"{ms[0]:.2f} → {ms[1]:.2f} ms"
        print(f"{name}, batch {batch}, 1 thread: {told}", flush=True)
        found.append(
            Figure(name=f"{name}: times faster at batch {batch}, 1 thread", paper=told,
                   ours=ms[0] / ms[1], asked=least, at_most=False, unit="×")
        )  # fmt: skip
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    run("Network Slimming: fewer channels, faster", measure, beside="beside it")
