"""Whole numbers of 8 bits: Taut's export beside NNCF, ONNX Runtime's quantizer and torchao.

Latencies are of random weights, whose norms have seen data; each net, at batch 1 and 16, in one
race of all libraries. "MACs ÷ 2": channels are pruned first. Scores are of the whole test set, of
networks that are trained here; the worse of Taut's two engines counts, both with their floats in
full precision.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from against.quantizers import QUANTIZERS
from against.racing import Entry, Make, Time, brief, made, race
from harness import Figure
from torch import Tensor, nn

import taut
from taut.data import Batches, ImageData, fashion_mnist, images, mnist
from taut.export.targets import TARGETS, Runner
from taut.fastest import ENGINES
from taut.fastest import race as race_engines
from taut.modules import clone
from taut.pack import packed_copy
from taut.zoo import LeNet5, create
from taut.zoo.resnet import ResNet

NAME = "int8"
BATCHES = (1, 16)
SECONDS = 6.0  # that each is timed
OURS, HALVED = "Taut", "Taut, MACs ÷ 2"
FILES = {"onnx": "net.onnx", "openvino": "net.xml"}
INT8 = "quantize(activations=8)"
SETTINGS = "training(precision='bfloat16') > recover(epochs=1)"
HALF = "prune_channels(ratio=0.5, of='macs', {})"
Inputs = Callable[[int], Tensor]


@dataclass(frozen=True)
class Net:
    """A network of random weights, and inputs for it, by their number.

    widths: what pruned layers come to: multiples of 32 or 64 are what engines multiply fastest.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    widths: str = "round_to=32"

    @property
    def half(self) -> str:
        """What halves its work."""
        return HALF.format(self.widths)


def _images(side: int, channels: int = 3) -> Inputs:
    return lambda count: torch.randn(count, channels, side, side)


def _tokens(steps: int) -> Inputs:
    return lambda count: torch.randint(0, 64, (count, steps))


NETS = (
    Net("LeNet-5", LeNet5, _images(28, 1), "round_to=16, ranking='global'"),
    Net("MobileNetV1", partial(create, "mobilenet_v1"), _images(224), "round_to=64"),
    Net("ResNet-18", partial(create, "resnet_18"), _images(224), "round_to=64"),
    Net("DenseNet-121", partial(create, "densenet_121"), _images(224)),
    Net("LSTM", partial(create, "lstm_language_model", vocabulary=64), _tokens(64)),
    Net("Transformer", partial(create, "transformer_language_model", vocabulary=64), _tokens(64)),
)


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """The rows of this section."""
    for noisy in ("onnxscript", "onnx_ir", "torch.onnx", "taut"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for net in NETS[:1] if options.quick else NETS:
        if not options.only or options.only in f"int8: {net.name}":
            yield from _of_random_weights(net, options)
    for trained in TRAINED[:1] if options.quick else TRAINED:
        if not options.only or options.only in f"int8: {trained.name}":
            yield from scores(trained, options)


def settled(net: nn.Module, inputs: Inputs) -> nn.Module:
    """The network in eval mode, its norms with the statistics of some inputs."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    if norms:
        with torch.no_grad():
            net.train()(inputs(8))
    return net.eval()


def noise(net: nn.Module, inputs: Inputs) -> taut.Task:
    """A task of random inputs, and targets of the shape that the network's loss takes."""
    x = inputs(4)
    with torch.no_grad():
        targets = net(x[:1]).argmax(1).expand(len(x), *net(x[:1]).shape[2:]).contiguous()
    return taut.Task(train=Batches(x, targets, 2), test=Batches(x[:2], targets[:2], 2))


def compressed(net: nn.Module, recipe: str, task: taut.Task) -> nn.Module:
    """The packed network that a recipe without training makes."""
    net = clone(net)
    for step in taut.Recipe.parse(recipe).steps:
        net = taut.apply(net, step, task)
    return packed_copy(net)


def ours(net: nn.Module, task: taut.Task, batch: int, engine: str, who: str, folder: Path) -> Entry:
    """Taut's export of a packed network."""
    path = folder / FILES[engine]
    taut.export(net, path, task.example(batch), task=task, dynamic_batch=False)
    return Entry(who, engine, path)


def _of_random_weights(net: Net, options: argparse.Namespace) -> Iterator[Figure]:
    """Latencies, the size of the file, and `fastest`."""
    threads = torch.get_num_threads()
    torch.manual_seed(options.seed)
    model = settled(net.build(), net.inputs)
    task = noise(model, net.inputs)
    whole, half = (compressed(model, r, task) for r in (INT8, f"{net.half} > {INT8}"))
    for batch in BATCHES[:1] if options.quick else BATCHES:
        seen = [net.inputs(batch) for _ in range(max(2, 16 // batch))]
        makers: dict[str, Make] = {who: partial(q, model, seen) for who, q in QUANTIZERS.items()}
        for name, packed in ((OURS, whole), (HALVED, half)):
            for engine in FILES:
                who = f"{name} ({engine})"
                makers[who] = partial(ours, packed, task, batch, engine, who)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            entries, failed = made(makers, folder)
            seconds = 0.1 if options.quick else SECONDS
            times, stopped = race(entries, [net.inputs(batch)], folder, threads, seconds)
            yield from _compared(net, batch, threads, times, {**failed, **stopped})
            if batch == 1:
                yield _sizes(net, entries, folder)
    yield _fastest(net, whole, task, threads, options.quick)


def _compared(
    net: Net, batch: int, threads: int, times: Sequence[Time], failed: dict[str, str]
) -> Iterator[Figure]:
    """The fastest export, whole and halved, beside the fastest of the peers."""
    peers = [t.median_ms for t in times if not t.entry.who.startswith(OURS)]
    told = [*map(str, times), *(f"{who}: {why}" for who, why in failed.items())]
    print(f"{net.name}, batch {batch}: {'; '.join(told)}", flush=True)
    for kind, asked, what in ((OURS, 1.05, "int8"), (HALVED, 0.6, "MACs ÷ 2 and int8")):
        best = next((t.median_ms for t in times if t.entry.who.startswith(f"{kind} (")), math.inf)
        yield Figure(
            name=f"int8: {net.name}, batch {batch}: latency of {what} beside the best peer's int8",
            paper="; ".join(told), ours=best / peers[0] if peers else math.inf, asked=asked,
            at_most=True, unit="×", command=INT8 if kind == OURS else f"{net.half} > {INT8}",
        )  # fmt: skip


def _sizes(net: Net, entries: Sequence[Entry], folder: Path) -> Figure:
    """The int8 ONNX file beside that of the floats, which a quantizer started from."""
    path = next(e.path for e in entries if e.who == f"{OURS} (onnx)")
    floats = next(folder.glob("*/float.onnx")).stat().st_size
    size = path.stat().st_size
    return Figure(
        name=f"int8: {net.name}: ONNX file beside that of the floats",
        paper=f"{size:,} of {floats:,} bytes", ours=100 * size / floats, asked=27, at_most=True,
        unit=" %", command=INT8,
    )  # fmt: skip


def _fastest(net: Net, packed: nn.Module, task: taut.Task, threads: int, quick: bool) -> Figure:
    """How far what `fastest` chose is above the best of all engines, timed anew."""
    seconds = {"seconds": 0.02 if quick else 2.0}
    engines = ("eager", "onnx") if quick else ENGINES
    given = {"threads": threads, "task": task, "engines": engines, **seconds}
    chosen = taut.fastest(packed, task.example(1), show=False, **given).engine
    again = race_engines(packed, task.example(1), **given).latencies
    its = next(t for t in again if t.engine == chosen).median_ms
    told = "; ".join(f"{t.engine} {t.median_ms:.3g} ± {t.iqr_ms / 2:.1g} ms" for t in again)
    print(f"{net.name}: fastest chose {chosen}; anew: {told}", flush=True)
    return Figure(
        name=f"int8: {net.name}, batch 1: time of what `fastest` chose above the best engine's",
        paper=f"chose {chosen}; anew: {told}", ours=100 * (its / again[0].median_ms - 1),
        asked=3, at_most=True, unit=" %", command=INT8,
    )  # fmt: skip


# ---- scores ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A network that is trained on real images, and how."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], ImageData]
    epochs: int
    recipe: str = INT8


TRAINED = (
    Trained("LeNet-5 on MNIST", LeNet5, mnist, 2),
    Trained(
        "ResNet-20 on Fashion-MNIST", partial(ResNet, 20, in_channels=1, stride=2), fashion_mnist,
        4, f"fold_norms() > {INT8}",
    ),
)  # fmt: skip


def scores(net: Trained, options: argparse.Namespace) -> Iterator[Figure]:
    """What post-training int8 costs: in floats, by NNCF's default, by Taut; the whole test set."""
    data, used, held = net.data(), *((500, 500) if options.quick else (30_000, 10_000))
    x, y = images(data.train_images[:used]), data.train_labels[:used]
    xt, yt = images(data.test_images[:held]), data.test_labels[:held]
    task = taut.Task(train=Batches(x, y, 100, shuffle=True), test=Batches(xt, yt, 500))
    torch.manual_seed(options.seed)
    model = net.build()
    taut.recover(
        model, task, taut.Recover(epochs=1 if options.quick else net.epochs, distill=0.0),
        settings=[] if options.quick else taut.Recipe.parse(SETTINGS).settings(1),
    )  # fmt: skip
    model.eval()
    found = {"floats": task.evaluate(model)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        seen = [x[i : i + 1] for i in range(300)]  # as many as NNCF takes by default
        try:
            entry = QUANTIZERS["NNCF"](model, seen, folder)
            run = TARGETS["openvino"].module().opened(entry.path, precision="float32")
            found["NNCF"] = _top1(run, xt, yt)
        except Exception as error:  # it is told
            failed = brief(error)
        else:
            failed = ""
        packed = compressed(model, net.recipe, task)
        for engine, file in FILES.items():
            score = taut.export(packed, folder / file, task.example(), task=task).score
            assert score is not None
            found[f"{OURS} ({engine})"] = score
    told = "; ".join([*(f"{who} {100 * s:.2f} %" for who, s in found.items()), failed]).strip("; ")
    print(f"{net.name}: {told}", flush=True)
    worst = min(s for who, s in found.items() if who.startswith(OURS))
    name, same = f"int8: {net.name}: points lost without training", {"at_most": True}
    yield Figure(
        name=name,
        paper=told,
        ours=100 * (found["floats"] - worst),
        asked=0.1,
        command=net.recipe,
        **same,
    )
    if "NNCF" in found:
        yield Figure(
            name=f"{name} beyond NNCF's default", paper=told, ours=100 * (found["NNCF"] - worst),
            asked=0.05, command=net.recipe, **same,
        )  # fmt: skip


def _top1(run: Runner, x: Tensor, y: Tensor) -> float:
    """The score of a file that is made for one image."""
    right = [int(run([x[i : i + 1]])[0].argmax()) == int(y[i]) for i in range(len(x))]
    return sum(right) / len(right)
