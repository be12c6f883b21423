"""Low rank before recovery: what the data use is kept, against what the weights alone say.

LeNet-300-100 on MNIST and a small VGG on Fashion-MNIST. The ranks of all layers but the last, whose
outputs are the classes, come by variational Bayes (Nakajima et al. 2013, as Kim et al., ICLR 2016,
use it: Tucker's for convolutions) and by energy. Then both networks have the very same ranks; one
is weighted by the calibration data and one is not, and nothing is trained. What one epoch of
recovery makes of the weighted one is printed beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import taut
from taut import edits
from taut.data import Batches, ImageData, fashion_mnist, images, mnist
from taut.decompositions import decomposed
from taut.modules import clone
from taut.techniques.low_rank import Factor
from taut.zoo import LeNet300

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import ROOT, Figure, run


def vgg_small(width: int = 16) -> nn.Module:
    """Three pairs of 3×3 convolutions, of width, 2 · width and 4 · width channels, and a layer."""
    layers: list[nn.Module] = []
    before = 1
    for channels in (width, 2 * width, 4 * width):
        for inputs in (before, channels):
            layers += [
                nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels), nn.ReLU(),
            ]  # fmt: skip
        layers.append(nn.MaxPool2d(2))
        before = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * before, 10))


@dataclass(frozen=True)
class Net:
    """A network, what it learns from, how, and the steps that make it low in rank."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], ImageData]
    count: int
    training: taut.Recover
    steps: dict[str, str]


NETS = (
    Net(
        "LeNet-300-100", LeNet300, mnist, 60_000,
        taut.Recover(epochs=4, learning_rate=1e-3, weight_decay=0.1, distill=0.0),
        {
            "vbmf": "low_rank(rank='vbmf', only='!fc3')",
            "energy": "low_rank(energy=0.9, only='!fc3')",
        },
    ),
    Net(
        "VGG-small", vgg_small, fashion_mnist, 20_000,
        taut.Recover(epochs=2, learning_rate=2e-3, weight_decay=0.1, distill=0.0),
        {
            "vbmf": "low_rank(rank='vbmf', conv='tucker', only='!22')",
            "energy": "low_rank(energy=0.9, only='!22')",
        },
    ),
)  # fmt: skip


def measure(options: argparse.Namespace) -> list[Figure]:
    nets = [n for n in NETS if options.only in n.name]
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            return [f for n in nets for f in figures(n, options, Path(folder))]
    return [f for n in nets for f in figures(n, options, ROOT / "runs" / "lowrank")]


def figures(net: Net, options: argparse.Namespace, folder: Path) -> list[Figure]:
    """What each rule's ranks lose, weighted and not, and what recovery gives back."""
    task = task_of(net, options.quick)
    model = trained(net, task, options, folder)
    error = 100 * (1 - task.evaluate(model))
    numbers = sum(p.numel() for p in model.parameters())
    print(f"{net.name}: {error:.2f} % error, {numbers:,} parameters", flush=True)
    found = []
    steps = dict(net.steps)
    if options.quick and net.name.startswith("VGG"):
        del steps["vbmf"]  # a net of a few steps is noise, in which it rightly finds nothing
    for rule, step in steps.items():
        weighted = taut.apply(clone(model), step, task).eval()
        changes = [e for e in edits.of(weighted) if isinstance(e, Factor)]
        plain = by_weights_alone(model, changes).eval()
        less = numbers / sum(p.numel() for p in weighted.parameters())
        ranks = ", ".join(f"{e.layer} {'/'.join(map(str, e.ranks))}" for e in changes)
        print(f"{net.name}, {rule}: {less:.2f}× fewer parameters; ranks {ranks}", flush=True)
        losses = [100 * (1 - task.evaluate(m)) for m in (weighted, plain)]
        calibration = task.calibration_loss()
        loss, alone = calibration(weighted), calibration(plain)
        taut.recover(weighted, task, taut.Recover(epochs=1), teacher=clone(model))
        after = 100 * (1 - task.evaluate(weighted))
        print(
            f"{net.name}, {rule}: loss {loss:.4f} weighted, {alone:.4f} plain; error "
            f"{losses[0]:.2f} and {losses[1]:.2f} %, recovered {after:.2f} %", flush=True,
        )  # fmt: skip
        name = f"{net.name}, {rule}"
        found += [
            Figure(name=f"{name}: times fewer parameters", paper="", ours=less, asked=1.0,
                   at_most=False, unit="×", command=step),
            Figure(name=f"{name}: loss before recovery", paper=f"plain {alone:.4f}", ours=loss,
                   asked=alone, at_most=True, command=step),
            Figure(name=f"{name}: test error before recovery", paper=f"plain {losses[1]:.2f} %",
                   ours=losses[0], asked=losses[1], at_most=True, unit=" %", command=step),
        ]  # fmt: skip
    return found


def by_weights_alone(model: nn.Module, changes: list[Factor]) -> nn.Module:
    """The network with the same structure, its parts those that come nearest to the weights."""
    made = edits.replay(clone(model), changes)
    with torch.no_grad():
        for change in changes:
            weight = cast(Tensor, model.get_submodule(change.layer).weight)
            weights = decomposed(change.how, weight, change.ranks)
            layers = cast(nn.Sequential, made.get_submodule(change.layer))
            for layer, value in zip(layers, weights, strict=True):
                cast(Tensor, layer.weight).copy_(value)
    return made


def task_of(net: Net, quick: bool) -> taut.Task:
    data = net.data()
    count, tested = (1500, 500) if quick else (net.count, 10_000)
    x, y = images(data.train_images[:count]), data.train_labels[:count]
    test_x, test_y = images(data.test_images[:tested]), data.test_labels[:tested]
    return taut.Task(
        train=Batches(x, y, 128, shuffle=True), test=Batches(test_x, test_y, 1000),
        learning_rate=net.training.learning_rate or 1e-3, name=net.name,
    )  # fmt: skip


def trained(net: Net, task: taut.Task, options: argparse.Namespace, folder: Path) -> nn.Module:
    """The network as it was trained here, now or before."""
    torch.manual_seed(options.seed)
    model, kept = net.build(), folder / f"{net.name}-{options.seed}.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval()
    recover = taut.Recover(epochs=1, learning_rate=2e-3, distill=0.0)
    taut.recover(model, task, recover if options.quick else net.training)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    return model.eval()


if __name__ == "__main__":
    run("Low rank by the data and by the weights alone", measure, beside="beside it")
