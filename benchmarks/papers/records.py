"""Training for a short code: how small a whole file becomes at a given score.

LeNet-5 on MNIST by real coded bytes: 606× at 1.0 % error (EPR, Oktay and others, ICLR 2020), 555×
at 0.69 % and 1110× at 0.96 % (MIRACLE, Havasi, Peharz, Hernández-Lobato, ICLR 2019); LeNet-300-100:
124× at 1.9 % (EPR). The same technique on a ResNet-20 for 28 × 28 images (its first convolution
has stride 2) on Fashion-MNIST, and on two language models of characters on the King James Bible.
All training images are used and moved by up to a pixel; no epoch is chosen, the last one counts.
Sizes are those of the written .taut files, ratios to 4 bytes a parameter of the original.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from deep_compression import Shifted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import taut
from taut.data import Batches, ImageData, fashion_mnist, images, king_james, mnist
from taut.zoo import LeNet5, LeNet300, LstmLanguageModel, ResNet, TransformerLanguageModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run

STEPS = 64  # characters of one sequence


@dataclass(frozen=True)
class Record:
    """One trained network, what is done to it, and what must come of it."""

    name: str
    build: Callable[[], nn.Module]
    task: Callable[[argparse.Namespace], taut.Task]
    training: str
    recipe: str
    ratio: float
    most: float
    """Test error in per cent, or the loss of points, or of perplexity in per cent."""
    unit: str
    published: str


def picture_task(load: Callable[[], ImageData], options: argparse.Namespace) -> taut.Task:
    data = load()
    used, tested = (2000, 500) if options.quick else (60_000, 10_000)
    x = images(data.train_images[:used], mean=0.0, std=1.0)
    xt = images(data.test_images[:tested], mean=0.0, std=1.0)
    train = Batches(x, data.train_labels[:used], 128, shuffle=True)
    return taut.Task(
        train=Shifted(train, 1),
        validation=Batches(x[:500], data.train_labels[:500], 500),  # chooses nothing
        test=Batches(xt, data.test_labels[:tested], 1000),
    )


class Excerpts:
    """Sequences from random places of a text, and the characters that follow."""

    def __init__(self, text: Tensor, count: int, batch: int) -> None:
        self.text, self.count, self.batch = text, count, batch

    def __len__(self) -> int:
        return self.count // self.batch

    def __iter__(self):
        for _ in range(len(self)):
            start = torch.randint(len(self.text) - STEPS - 1, (self.batch, 1))
            found = self.text[start + torch.arange(STEPS + 1)]
            yield found[:, :-1], found[:, 1:]


def perplexity(scores: Tensor, targets: Tensor) -> float:
    return math.exp(F.cross_entropy(scores, targets))


def language_task(options: argparse.Namespace) -> taut.Task:
    text = king_james()
    signs = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([signs[c] for c in text])
    tail = codes[-512 * (STEPS + 1) :].reshape(512, STEPS + 1)
    head = codes[: -len(tail.flatten())]
    train = Excerpts(head, 256 if options.quick else 12_800, 64)
    test = Batches(tail[:, :-1], tail[:, 1:], 64)
    return taut.Task(train=train, validation=test, test=test, score=perplexity, better="lower")


@functools.cache
def vocabulary() -> int:
    return len(set(king_james()))


FAST = "training(precision='bfloat16')"
CODED = f"code_length() > {FAST} > recover(epochs={{}}, learning_rate={{}}, temperature=2, "
AIMED = f"code_length() > aim(size_bytes={{}}) > {FAST} > recover(epochs={{}}, learning_rate={{}}, "
LENET5 = f"{FAST} > recover(epochs=14, learning_rate=2e-3, weight_decay=0.05, distill=0)"
RECORDS = (
    Record(
        "LeNet-5, smallest", lambda: LeNet5(dropout=0.3),
        functools.partial(picture_task, mnist), LENET5,
        CODED.format(60, 2e-3) + "bytes_weight=1e-4)", 750, 1.0, " %",
        "606× at 1.0 %, 1110× at 0.96 %",
    ),
    Record(
        "LeNet-5, best", lambda: LeNet5(dropout=0.3),
        functools.partial(picture_task, mnist), LENET5,
        CODED.format(60, 2e-3) + "bytes_weight=5e-5)", 500, 0.75, " %", "555× at 0.69 %",
    ),
    Record(
        "LeNet-300-100", lambda: LeNet300(dropout=0.2),
        functools.partial(picture_task, mnist),
        "recover(epochs=30, learning_rate=2e-3, weight_decay=0.05, distill=0)",
        CODED.format(60, 2e-3) + "bytes_weight=4e-5)", 150, 1.9, " %", "124× at 1.9 %",
    ),
    Record(
        "ResNet-20, Fashion-MNIST", lambda: ResNet(20, in_channels=1, stride=2),
        functools.partial(picture_task, fashion_mnist),
        f"{FAST} > recover(epochs=8, learning_rate=4e-3, weight_decay=0.02, distill=0)",
        AIMED.format(34_000, 10, 2e-3) + "temperature=2)", 30, 1.0, " points", "",
    ),
    Record(
        "LSTM, King James", lambda: LstmLanguageModel(vocabulary(), 64, 256), language_task,
        f"{FAST} > recover(epochs=7, learning_rate=4e-3, distill=0)",
        AIMED.format(45_000, 9, 4e-3) + "temperature=1)", 30, 2.0, " % of perplexity", "",
    ),
    Record(
        "Transformer, King James",
        lambda: TransformerLanguageModel(vocabulary(), 256, 8, 2, STEPS), language_task,
        f"{FAST} > recover(epochs=10, learning_rate=2e-3, distill=0)",
        AIMED.format(212_000, 25, 2e-3) + "temperature=1)", 30, 2.0, " % of perplexity", "",
    ),
)  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    for record in RECORDS:
        if options.only in record.name:
            yield from _figures(record, options)


def _figures(record: Record, options: argparse.Namespace) -> list[Figure]:
    torch.manual_seed(options.seed)
    task, model = record.task(options), record.build()
    training, recipe = (_recipe(t, options.quick) for t in (record.training, record.recipe))
    settings = training.settings(len(training.steps) - 1)
    options_of_training = training.steps[-1]
    assert isinstance(options_of_training, taut.Recover)
    # on a CPU the fused attention trains at half the speed
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.MATH):
        taut.recover(model, task, options_of_training, settings=settings)
        result = taut.compress(model, task, recipe, folder=Path(folder) / "r", seed=options.seed)
    before, after = result.original, result.measurement
    worse, was = _worse(record, before.score, after.score)
    ratio = 4 * before.parameters / after.size_bytes
    print(f"{record.name}: {after.size_bytes:,} bytes, {ratio:.0f}×, {was}{worse:.2f}{record.unit}")
    paper, command = record.published or was.removesuffix(" → "), str(recipe)
    return [
        Figure(name=f"{record.name}, times smaller", paper=paper, ours=ratio, asked=record.ratio,
               at_most=False, unit="×", command=command),
        Figure(name=f"{record.name}, {'error' if record.unit == ' %' else 'loss'}", paper=was,
               ours=worse, asked=record.most, at_most=True, unit=record.unit, command=command),
    ]  # fmt: skip


def _worse(record: Record, before: float, after: float) -> tuple[float, str]:
    """What is bounded, and what the original has."""
    if record.unit == " %":
        return 100 * (1 - after), f"{100 * (1 - before):.2f} % → "
    if record.unit == " points":
        return 100 * (before - after), f"{100 * before:.2f} % → "
    return 100 * (after / before - 1), f"perplexity {before:.3f} → "


def _recipe(text: str, quick: bool) -> taut.Recipe:
    """The recipe; in a quick pass with one epoch."""
    steps = taut.Recipe.parse(text).steps
    short = [taut.Recover(epochs=1) if isinstance(s, taut.Recover) else s for s in steps]
    return taut.Recipe(tuple(short if quick else steps))


if __name__ == "__main__":
    run("Training for a short code: bytes of whole files", measure)
