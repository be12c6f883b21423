"""Learning both weights and connections on MNIST: fewer parameters, and what retraining is worth.

Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks (NIPS
2015). Table 1: LeNet-300-100 and LeNet-5 with 12 times fewer parameters at 1.59 and 0.77 % error;
biases are counted. Figure 5: L1 against L2 while training, pruned with and without retraining, in
one step and iteratively. There the paper has AlexNet and reads off what costs no accuracy, 5 times
in one step and 9 times iteratively; here it is LeNet-300-100 on 20,000 digits, and how many times
fewer parameters cost half a point, since on MNIST less drowns in noise. As in the paper, each
iteration is retrained for as long as the one step is; the last figure gives the one step as many
epochs as all iterations together, which the paper does not. The last 5,000 training images choose
the best epoch; the test images are scored once, at the end. Beyond the paper, in the table alone:
distillation from the original.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import taut
from taut.data import Batches, images, mnist
from taut.modules import clone
from taut.regularise import Regularise
from taut.schedules import Schedule
from taut.technique import Setting
from taut.techniques import PruneWeights
from taut.training import Training
from taut.zoo import LeNet5, LeNet300

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Net:
    """One row of the paper's first table, and how it is done here."""

    name: str
    build: Callable[[], nn.Module]
    training: taut.Recover
    recipe: str
    paper: str
    most_error: float
    precision: str = "float32"
    """Of products while the original trains."""


NETS = (
    Net(
        "LeNet-300-100",
        lambda: LeNet300(dropout=0.3),
        taut.Recover(epochs=30, learning_rate=2e-3, weight_decay=0.1, distill=0.0),
        "prune_weights(sparsity=0.919) > schedule(kind='cubic', steps=40) > recover(epochs=30)",
        "267K → 22K (12×), 1.59 %",
        1.59,
    ),
    Net(
        "LeNet-5",
        lambda: LeNet5(dropout=0.4),
        taut.Recover(epochs=6, learning_rate=2e-3, weight_decay=0.1, distill=0.0),
        "prune_weights(sparsity=0.919) > schedule(kind='cubic', steps=40) > "
        "training(precision='bfloat16') > recover(epochs=8)",
        "431K → 36K (12×), 0.77 %",
        0.77,
        "bfloat16",
    ),
)

L2 = taut.Recover(
    epochs=15, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, distill=0.0
)  # near to Caffe's LeNet
L1 = replace(L2, weight_decay=0.0)
LASSO = Regularise(kind="l1", weight=5e-5)
RETRAINED, ITERATIONS = 5, 4  # epochs, and how many times
COST = 0.5  # points of error


def measure(options: argparse.Namespace) -> list[Figure]:
    digits = mnist()
    used, held, tested = (1500, 300, 300) if options.quick else (60_000, 5_000, 10_000)
    x, y = images(digits.train_images[:used], mean=0.0, std=1.0), digits.train_labels[:used]
    test = images(digits.test_images[:tested], mean=0.0, std=1.0), digits.test_labels[:tested]
    task = taut.Task(
        train=Batches(x[:-held], y[:-held], 128, shuffle=True),
        validation=Batches(x[-held:], y[-held:], 1000),
        test=Batches(*test, 1000),
    )
    figures: list[Figure] = []
    for net in (n for n in NETS if options.only in n.name):
        with tempfile.TemporaryDirectory() as folder:
            figures += _table(net, task, options, Path(folder))
    if options.only in "one step or many":
        few = taut.Task(
            train=Batches(x[:-held][:20_000], y[:-held][:20_000], 128, shuffle=True),
            validation=Batches(x[-held:], y[-held:], 1000),
            test=Batches(*test, 1000),
        )
        figures += _figure(few, options)
    return figures


# ---- table 1 --------------------------------------------------------------------------------


def _table(net: Net, task: taut.Task, options: argparse.Namespace, folder: Path) -> list[Figure]:
    torch.manual_seed(options.seed)
    model, training, recipe = net.build(), net.training, taut.Recipe.parse(net.recipe)
    if options.quick:
        training, recipe = _short(training), taut.Recipe(tuple(map(_short, recipe.steps)))
    taut.recover(model, task, training, settings=[Training(precision=net.precision)])
    result = taut.compress(model, task, recipe, folder=folder / "run", seed=options.seed)
    before, after = result.original, result.measurement
    errors = [100 * (1 - m.score) for m in (before, after)]
    print(
        f"{net.name}: {before.parameters:,} → {after.nonzero_parameters:,} parameters, error "
        f"{errors[0]:.2f} → {errors[1]:.2f} %, {after.size_bytes:,} bytes"
    )
    return [
        Figure(name=f"{net.name}, times fewer parameters", paper=net.paper,
               ours=before.parameters / after.nonzero_parameters, asked=12, at_most=False,
               unit="×", command=str(recipe)),
        Figure(name=f"{net.name}, test error", paper=net.paper, ours=errors[1],
               asked=net.most_error, at_most=True, unit=" %", command=str(recipe)),
    ]  # fmt: skip


def _short(step: taut.Recover) -> taut.Recover:
    """The same step in a quick pass: one epoch."""
    return taut.Recover(epochs=1) if isinstance(step, taut.Recover) else step


# ---- figure 5 -------------------------------------------------------------------------------


def _figure(task: taut.Task, options: argparse.Namespace) -> list[Figure]:
    few, many = ((4.0,), (16.0,)) if options.quick else (_rates(2, 16, 7), _rates(8, 64, 4))
    networks = {}
    for name, training, settings in (("L1", L1, [LASSO]), ("L2", L2, [])):
        torch.manual_seed(options.seed)
        networks[name] = LeNet300()
        training = replace(training, epochs=1) if options.quick else training
        taut.recover(networks[name], task, training, settings=settings)
    best = min(_error(net, task) for net in networks.values())

    def fewer(name: str, epochs: int, rates: Sequence[float], *settings: Setting) -> float:
        """How many times fewer parameters cost no more than COST."""
        network, training, also = (
            (networks["L1"], L1, [LASSO]) if name == "L1" else (networks["L2"], L2, [])
        )
        training = replace(training, epochs=epochs, learning_rate=1e-2)  # a tenth, as in the paper
        points = [(1.0, _error(network, task))]
        for rate in rates:
            torch.manual_seed(options.seed)
            prune = PruneWeights(sparsity=1 - 1 / rate, scope="lamp")
            net = taut.apply(clone(network), prune, task)
            taut.recover(net, task, training, settings=[*also, *settings])
            points.append((rate, _error(net, task)))
        said = ", ".join(f"{rate:.0f}× {error:.2f} %" for rate, error in points)
        print(f"{name}, {epochs} epochs{''.join(f', {s}' for s in settings)}: {said}")
        return _reached(points, best + COST)

    epochs = 1 if options.quick else RETRAINED
    steps = Schedule(steps=ITERATIONS, end=1.0, rewind="rate")
    cut = {name: fewer(name, 0, few) for name in ("L1", "L2")}
    retrained = {name: fewer(name, epochs, many) for name in ("L1", "L2")}
    iterative = fewer("L2", ITERATIONS * epochs, many, steps)
    longer = fewer("L2", ITERATIONS * epochs, many)
    return [
        Figure(name="one step or many: L1 over L2 without retraining", paper="L1 is better",
               ours=cut["L1"] / cut["L2"], asked=1, at_most=False, unit="×"),
        Figure(name="one step or many: L2 over L1 with retraining", paper="L2 is better",
               ours=retrained["L2"] / retrained["L1"], asked=1, at_most=False, unit="×"),
        Figure(name="one step or many: iterative over one step, L2", paper="5 → 9 times fewer",
               ours=iterative / retrained["L2"], asked=1.8, at_most=False, unit="×",
               command=str(steps)),
        Figure(name="one step or many: iterative over one step of as many epochs, L2", paper="–",
               ours=iterative / longer, asked=1, at_most=False, unit="×", command=str(steps)),
    ]  # fmt: skip


def _rates(low: float, high: float, count: int) -> tuple[float, ...]:
    """So many rates, each by the same factor above the one before."""
    return tuple(low * (high / low) ** (i / (count - 1)) for i in range(count))


def _error(net: nn.Module, task: taut.Task) -> float:
    return 100 * (1 - task.evaluate(net))


def _reached(points: Points, limit: float) -> float:
    """The rate at which the error first passes the limit, on a line through the logarithms."""
    (rate, error), *rest = points
    for next_rate, next_error in rest:
        if next_error > limit:
            part = (limit - error) / (next_error - error) if error < limit else 0.0
            return rate * math.pow(next_rate / rate, part)
        rate, error = next_rate, next_error
    return rate


if __name__ == "__main__":
    run("Learning both Weights and Connections (Han et al., NIPS 2015) on MNIST", measure)
