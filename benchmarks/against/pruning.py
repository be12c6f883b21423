"""Units removed: Taut's prune_channels beside Torch-Pruning, on what both say they can cut.

Coverage: each halves the units of every group of a network without hints, after which it must run
and train one step; who has not ended after two minutes has failed. Speed: seconds of one core until
the groups are known. Score: two ResNets on Fashion-MNIST, one with projections in its shortcuts and
one that pads them with zeros, cut to half of their MACs by either, trained equally long afterwards,
with the same batches.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from coverage import Net, halved, nets
from harness import Figure
from torch import nn

import taut
from taut.data import Batches, fashion_mnist, images
from taut.errors import TautError
from taut.groups import Groups
from taut.modules import clone
from taut.zoo import ResNet, create
from taut.zoo.blocks import Residual, conv

NAME = "pruning"
QUICK = ("zoo: lenet_5", "LSTM", "zoo: squeezenet_1_1")
TRACED = (("resnet_18", 64), ("densenet_121", 64))
PATIENCE = 120.0  # seconds for a library to halve a network
CUT = "prune_channels(ratio=0.5, of='macs', ranking='isomorphic')"


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """The rows of this section; without Torch-Pruning its column says so."""
    for part in (_speed, _score, _coverage):
        yield from part(options)


def library() -> ModuleType:
    """Torch-Pruning. Raises ImportError."""
    return importlib.import_module("torch_pruning")


def told(error: Exception) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:90]}"


# ---- coverage -----------------------------------------------------------------------------------


def halved_here(net: Net, model: nn.Module) -> nn.Module:
    """By Taut."""
    return halved(model, Groups(model, net.example))


def halved_there(net: Net, model: nn.Module) -> nn.Module:
    """By Torch-Pruning, as its documentation says; the last layer's outputs stay."""
    pruning, (args, kwargs) = library(), net.example
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    pruning.pruner.MagnitudePruner(
        model, example_inputs=kwargs or args, importance=pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5, ignored_layers=[last],
    ).step()  # fmt: skip
    return model


def survives(net: Net, halve: Callable[[Net, nn.Module], nn.Module]) -> str:
    """Why a network cannot be halved; nothing where it can."""
    torch.manual_seed(0)
    model, (args, kwargs) = net.build().eval(), net.example
    before = sum(p.numel() for p in model.parameters())
    try:
        shape = model(*args, **kwargs).shape
        model = halve(net, model)
        output = model.train()(*args, **kwargs)
        output.square().mean().backward()
        torch.optim.SGD(model.parameters(), 1e-3).step()
    except Exception as error:  # whatever a library raises is why
        return told(error)
    left = sum(p.numel() for p in model.parameters()) / before
    if output.shape != shape:
        return f"outputs of {tuple(output.shape)} instead of {tuple(shape)}"
    return "" if left < 0.75 else f"{left:.0%} of the parameters are left"


def within(seconds: float, answer: Callable[[], str]) -> str:
    """What a function answers in a process of its own, or that it did not in time."""
    forked = multiprocessing.get_context("fork")
    receives, sends = forked.Pipe(duplex=False)
    process = forked.Process(target=lambda: sends.send(answer()))
    process.start()
    sends.close()
    try:
        return receives.recv() if receives.poll(seconds) else f"no answer in {seconds:g} s"
    except EOFError:
        return "its process died"
    finally:
        process.kill()
        process.join()


def _coverage(options: argparse.Namespace) -> Iterator[Figure]:
    cases = {n: net for n, net in nets() if n in QUICK or not options.quick}
    cases = {n: net for n, net in cases.items() if not n.startswith("torchvision")}
    failures: list[dict[str, str]] = []
    for halve in (halved_here, halved_there):
        told_by = {n: within(PATIENCE, partial(survives, net, halve)) for n, net in cases.items()}
        failures.append({name: why for name, why in told_by.items() if why})
    ours, theirs = failures
    failed = "; ".join(f"{n}: {why}" for n, why in theirs.items())
    missed = "; ".join(f"{n}: {why}" for n, why in ours.items())
    yield Figure(
        name=f"pruning: networks of {len(cases)} that can be halved", ours=len(cases) - len(ours),
        paper=f"Torch-Pruning: {len(cases) - len(theirs)}; not {failed or 'any'}"
        + (f". Taut not {missed}" if missed else ""),
        asked=max(len(cases) - len(theirs), 1), at_most=False,
    )  # fmt: skip


# ---- speed --------------------------------------------------------------------------------------


def _seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times)


def _speed(options: argparse.Namespace) -> Iterator[Figure]:
    rounds = 1 if options.quick else 3
    for name, side in (("lenet_5", 28),) if options.quick else TRACED:
        model = create(name).eval()
        x = torch.randn(1, 1 if name == "lenet_5" else 3, side, side)
        ours = _seconds(lambda m=model, x=x: Groups(m, ((x,), {})), rounds)
        try:
            graph = library().DependencyGraph
            theirs = _seconds(
                lambda m=model, x=x, g=graph: g().build_dependency(m, example_inputs=x), rounds
            )
        except Exception as error:  # whatever a library raises stands in its column
            theirs, beside = ours, told(error)
        else:
            beside = f"Torch-Pruning {theirs:.2f} s"
        yield Figure(
            name=f"pruning: {name}, seconds of one core until its groups are known", ours=ours,
            paper=beside, asked=theirs, at_most=True, unit=" s",
        )  # fmt: skip


# ---- score --------------------------------------------------------------------------------------


def _task(quick: bool) -> taut.Task:
    data, (used, tested) = fashion_mnist(), (300, 200) if quick else (12_000, 10_000)
    x, xt = (
        images(i, 0.2860, 0.3530) for i in (data.train_images[:used], data.test_images[:tested])
    )
    return taut.Task(
        train=Batches(x, data.train_labels[:used], 64, shuffle=True),
        validation=Batches(xt[:200], data.test_labels[:200], 200),
        test=Batches(xt, data.test_labels[:tested], 1000),
    )  # fmt: skip


def _trained(model: nn.Module, task: taut.Task, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    how = taut.Recover(epochs=epochs, learning_rate=2e-3, distill=0.0)
    settings = taut.Recipe.parse("training(precision='bfloat16') > recover()").settings(1)
    taut.recover(model, task, how, settings=settings)


def _macs(model: nn.Module, task: taut.Task) -> int:
    return taut.trace(model, task.example(1)).macs


def _cut_there(model: nn.Module, task: taut.Task, macs: float) -> nn.Module:
    """By Torch-Pruning, with the least ratio of units that takes the MACs away, in steps of 1 %."""
    pruning, (x,) = library(), task.example(1)[0]
    for percent in range(10, 90):
        smaller = clone(model)
        last = [m for m in smaller.modules() if isinstance(m, nn.Linear)][-1]
        pruning.pruner.MagnitudePruner(
            smaller, example_inputs=x, importance=pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=percent / 100, isomorphic=True, global_pruning=True,
            ignored_layers=[last],
        ).step()  # fmt: skip
        if _macs(smaller, task) <= macs:
            return smaller
    raise TautError("no ratio takes so many MACs away")


def _projecting() -> nn.Module:
    """A ResNet of three blocks, whose shortcuts are convolutions where they grow."""
    widths, layers = (16, 16, 32, 64), [conv(1, 16, 3, 2)]
    for a, b in itertools.pairwise(widths):
        stride = 1 if a == b else 2
        body = nn.Sequential(conv(a, b, 3, stride), conv(b, b, 3, relu=False))
        layers.append(Residual(body, None if a == b else conv(a, b, 1, stride, relu=False)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


SCORED: dict[str, Callable[[], nn.Module]] = {
    "ResNet-8 with projections": _projecting,
    "ResNet-8 padded with zeros": lambda: ResNet(8, in_channels=1, stride=2),
}


def _score(options: argparse.Namespace) -> Iterator[Figure]:
    quick, seeds = options.quick, range(options.seed, options.seed + (1 if options.quick else 3))
    task = _task(quick)

    def recovered(cut_model: nn.Module) -> list[float]:
        found = []
        for seed in seeds:
            again = clone(cut_model)
            _trained(again, task, 1 if quick else 3, seed)
            found.append(task.evaluate(again.eval()))
        return found

    for name, build in SCORED.items():
        torch.manual_seed(options.seed)
        model = build()
        _trained(model, task, 1 if quick else 6, options.seed)
        model.eval()
        whole, original = _macs(model, task), task.evaluate(model)
        smaller = taut.apply(clone(model), CUT, task)
        ours, share = recovered(smaller), _macs(smaller, task) / whole
        try:
            other = _cut_there(model, task, whole / 2)
        except Exception as error:  # whatever a library raises stands in its column
            theirs, beside = [0.0], told(error)
        else:
            theirs = recovered(other)
            left = f"{_macs(other, task) / whole:.0%} of the MACs"
            beside = f"Torch-Pruning {_spread(theirs)} at {left}"
        yield Figure(
            name=f"pruning: {name}, Fashion-MNIST, accuracy at {share:.0%} of its MACs, mean of "
            f"{len(seeds)} seeds",
            paper=f"{beside}; Taut {_spread(ours)}; uncut {100 * original:.2f} %",
            ours=100 * statistics.mean(ours), asked=100 * statistics.mean(theirs), at_most=False,
            unit=" %", command=CUT,
        )  # fmt: skip


def _spread(scores: list[float]) -> str:
    each = [100 * s for s in scores]
    return f"{statistics.mean(each):.2f} % ({min(each):.2f} to {max(each):.2f})"
