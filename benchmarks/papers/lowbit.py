"""Few bits for weights and activations: DoReFa, LSQ and learned levels (LQ) side by side.

LeNet-5 and a ResNet of 8 layers (the first with stride 2) on Fashion-MNIST. Every network starts
from the same trained float one, and is trained on as long as that is, at the same rate: LeNet-5 for
3 epochs without distillation, the ResNet for 10, taught by the float one, in bfloat16. The first
and the last layer have 8 bits throughout; with one bit for both, LQ's column is binarize with two
fitted levels for what layers read. What is scored is the file, read back. Points are those lost to
the float network, the better of its scores before and after it was trained on. The post-training
row trains nothing and is compared with the float network that it comes from: the median of three
draws of the 1,024 training examples that it sees.

A row whose technique this installation does not have is left out, with a note.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import taut
from taut.data import Batches, fashion_mnist, images
from taut.modules import clone
from taut.technique import techniques
from taut.trace import Trace
from taut.training import Training
from taut.zoo import LeNet5
from taut.zoo.resnet import ResNet

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run

BITS = ((4, 4), (3, 3), (2, 2), (1, 2), (1, 1))
ASKED = {("DoReFa", 4, 4): 0.3, ("LSQ", 4, 4): 0.3, ("LQ", 4, 4): 0.3, ("LQ", 2, 2): 1.0}
AFTER = "8/8 post-training"
LOOSE = 100.0  # asked of nobody: the row stands beside the others


@dataclass(frozen=True)
class Net:
    """A network, the layers at its ends, its own training, and the one with few bits."""

    name: str
    build: Callable[[], nn.Module]
    ends: str
    first: taut.Recover
    again: taut.Recover
    training: Training


NETS = (
    Net(
        "LeNet-5", LeNet5, "conv1, fc2",
        taut.Recover(epochs=6, learning_rate=2e-3, distill=0.0),
        taut.Recover(epochs=3, learning_rate=1e-3, distill=0.0),
        Training(),
    ),
    Net(
        "ResNet-8", lambda: ResNet(8, in_channels=1, stride=2), "conv.weight, fc",
        taut.Recover(epochs=10, learning_rate=4e-3, distill=0.0),
        taut.Recover(epochs=10, learning_rate=3e-3, distill=0.7, temperature=2.0),
        Training(precision="bfloat16"),
    ),
)  # fmt: skip


def recipe_of(method: str, weights: int, inputs: int, ends: str) -> str:
    """What the method does between the ends; empty where it has nothing for so many bits."""
    others = f"only={', '.join('!' + e.strip() for e in ends.split(','))!r}"
    if method == "DoReFa":
        return f"quantize(bits={weights}, activations={inputs}, method='dorefa', {others})"
    if method == "LSQ":
        step = f"quantize(bits={weights}, activations={inputs}, method='lsq', {others})"
        return step if weights > 1 else ""
    if (weights, inputs) == (1, 1):
        return f"binarize(activations='pair', {others})"
    return f"learned_levels(bits={weights}, activations={inputs}, {others})"


def measure(options: argparse.Namespace) -> list[Figure]:
    logging.getLogger("taut").setLevel(logging.WARNING)
    return [figure for net in NETS for figure in _figures(net, options)]


def task_of(quick: bool) -> taut.Task:
    data = fashion_mnist()
    used, held = (1000, 500) if quick else (10_000, 10_000)
    x, test = images(data.train_images[:used]), images(data.test_images[:held])
    return taut.Task(
        train=Batches(x, data.train_labels[:used], 64, shuffle=True),
        test=Batches(test, data.test_labels[:held], 500),
        name="Fashion-MNIST",
    )


def _rows(net: Net, options: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """The name of each row that is wanted, its recipe, and the points that it may lose."""
    rows = [(AFTER, "quantize(bits=8, activations=8, ranges='percentile')", 0.1)]
    for weights, inputs in BITS[1:3] if options.quick else BITS:
        for method in ("DoReFa", "LSQ", "LQ"):
            middle = recipe_of(method, weights, inputs, net.ends)
            asked = ASKED.get((method, weights, inputs), LOOSE)
            if not middle or middle.partition("(")[0] not in techniques():
                print(
                    f"{net.name}, {method} {weights}/{inputs}: left out, {middle or 'no such bits'}"
                )
                continue
            recipe = f"quantize(activations=8, only={net.ends!r}) > {middle}"
            rows.append((f"{method} {weights}/{inputs}", recipe, asked))
    return (row for row in rows if options.only in f"{net.name}, {row[0]}")


def _figures(net: Net, options: argparse.Namespace) -> Iterator[Figure]:
    rows = list(_rows(net, options))
    if not rows:
        return
    torch.manual_seed(options.seed)
    task, model = task_of(options.quick), net.build()
    first, again = net.first, net.again
    if options.quick:
        first, again = (replace(step, epochs=1) for step in (first, again))
    settings = [net.training]
    taut.recover(model, task, first, settings=settings)
    whole = task.evaluate(model)

    def trained(coded: nn.Module) -> nn.Module:
        teacher = model if again.distill else None
        taut.recover(coded, task, again, settings=settings, teacher=teacher)
        return coded

    longer = trained(clone(model))
    best = max(whole, task.evaluate(longer))
    traced = taut.trace(model, task.example())
    print(f"{net.name}, float: {whole:.4f}, trained on {task.evaluate(longer):.4f}")

    def figure(name: str, score: float, than: float, asked: float, recipe: str) -> Figure:
        print(f"{net.name}, {name}: {score:.4f}", flush=True)
        return Figure(
            name=f"{net.name}, {name}: points lost to float", paper=f"{100 * than:.2f} %",
            ours=round(100 * (than - score), 2), asked=asked, at_most=True, unit=" points",
            command=recipe,
        )  # fmt: skip

    for name, recipe, asked in rows:
        if name == AFTER:
            scores = []
            for seed in range(options.seed, options.seed + (1 if options.quick else 3)):
                torch.manual_seed(seed)  # of which examples calibrate
                scores.append(_score(model, task, traced, recipe))
            yield figure(name, statistics.median(scores), whole, asked, recipe)
        else:
            torch.manual_seed(options.seed + 1)
            yield figure(name, _score(model, task, traced, recipe, trained), best, asked, recipe)


def _score(
    model: nn.Module, task: taut.Task, traced: Trace, recipe: str,
    trained: Callable[[nn.Module], nn.Module] = lambda coded: coded,
) -> float:  # fmt: skip
    """Of the file that the recipe makes of a copy of the model."""
    coded = clone(model)
    for step in taut.Recipe.parse(recipe).steps:
        taut.apply(coded, step, task, traced)
    coded = trained(coded)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.taut"
        taut.pack(coded, path)
        return task.evaluate(taut.load(path, clone(model)))


if __name__ == "__main__":
    run("Few bits for weights and activations", measure, beside="float")
