"""Deep Compression on MNIST: the two LeNets of the paper, beside its figures.

Han, Mao, Dally: Deep Compression (ICLR 2016), tables 1 to 3: LeNet-300-100 from 1070 to 27 kB at
1.58 % error, LeNet-5 from 1720 to 44 kB at 0.74 %. Sizes here are those of the written .taut file.
The last 5,000 training images choose the best epoch; the test images are scored once, at the end.
Beyond the paper: distillation from the original, and training images shifted by up to a pixel or
two (the original is trained on the same).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import taut
from taut.data import Batches, images, mnist
from taut.zoo import LeNet5, LeNet300

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run


class Shifted:
    """Batches whose images are moved by up to `pixels` in each direction, one shift a batch."""

    def __init__(self, batches: Batches, pixels: int) -> None:
        self.batches, self.pixels = batches, pixels

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in self.batches:
            shift = torch.randint(-self.pixels, self.pixels + 1, (2,)).tolist()
            yield torch.roll(x, shift, (2, 3)), y  # the digits' borders are empty


@dataclass(frozen=True)
class Net:
    """One row of the paper's table, and how it is done here."""

    name: str
    build: Callable[[], nn.Module]
    training: taut.Recover
    recipe: str
    pixels: int
    paper: str
    most_bytes: int
    ratio: float
    most_error: float


NETS = (
    Net(
        "LeNet-300-100",
        lambda: LeNet300(dropout=0.3),
        taut.Recover(epochs=60, learning_rate=2e-3, weight_decay=0.1, distill=0.0),
        "prune_weights(sparsity=0.943) > schedule(steps=8) > recover(epochs=60) > "
        "share_values(bits=4) > recover(epochs=30)",
        1,
        "1070 → 27 kB (40×), 1.58 %",
        26_661,
        40,
        1.64,
    ),
    Net(
        "LeNet-5",
        lambda: LeNet5(dropout=0.4),
        taut.Recover(epochs=16, learning_rate=2e-3, weight_decay=0.1, distill=0.0),
        "prune_weights(sparsity=0.97) > schedule(steps=6) > recover(epochs=18) > "
        "share_values(bits=4) > recover(epochs=8)",
        2,
        "1720 → 44 kB (39×), 0.74 %",
        44_000,
        39,
        0.80,
    ),
)


def measure(options: argparse.Namespace) -> list[Figure]:
    digits = mnist()
    used, held = (3000, 500) if options.quick else (60_000, 5_000)
    x, y = images(digits.train_images[:used], mean=0.0, std=1.0), digits.train_labels[:used]
    figures: list[Figure] = []
    for net in (n for n in NETS if options.only in n.name):
        task = taut.Task(
            train=Shifted(Batches(x[:-held], y[:-held], 128, shuffle=True), net.pixels),
            validation=Batches(x[-held:], y[-held:], 1000),
            test=Batches(*_test_images(digits, 500 if options.quick else 10_000), 1000),
        )
        with tempfile.TemporaryDirectory() as folder:
            figures += _net(net, task, options, Path(folder))
    return figures


def _test_images(digits: taut.data.ImageData, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return images(digits.test_images[:count], mean=0.0, std=1.0), digits.test_labels[:count]


def _net(net: Net, task: taut.Task, options: argparse.Namespace, folder: Path) -> list[Figure]:
    torch.manual_seed(options.seed)
    model = net.build()
    training, recipe = net.training, taut.Recipe.parse(net.recipe)
    if options.quick:
        training, recipe = _short(training), taut.Recipe(tuple(map(_short, recipe.steps)))
    taut.recover(model, task, training)
    result = taut.compress(model, task, recipe, folder=folder / "run", seed=options.seed)
    before, after = result.original, result.measurement
    fp32 = 4 * before.parameters
    error = 100 * (1 - after.score)
    print(
        f"{net.name}: {fp32:,} → {after.size_bytes:,} bytes, error "
        f"{100 * (1 - before.score):.2f} → {error:.2f} %"
    )
    name, paper = net.name, net.paper
    return [
        Figure(name=f"{name}, bytes", paper=paper, ours=after.size_bytes, asked=net.most_bytes,
               at_most=True, command=str(recipe)),
        Figure(name=f"{name}, times smaller", paper=paper, ours=fp32 / after.size_bytes,
               asked=net.ratio, at_most=False, unit="×", command=str(recipe)),
        Figure(name=f"{name}, test error", paper=paper, ours=error, asked=net.most_error,
               at_most=True, unit=" %", command=str(recipe)),
    ]  # fmt: skip


def _short(step: taut.Recover) -> taut.Recover:
    """The same step in a quick pass: one epoch."""
    return taut.Recover(epochs=1) if isinstance(step, taut.Recover) else step


if __name__ == "__main__":
    run("Deep Compression (Han, Mao, Dally, ICLR 2016) on MNIST", measure)
