"""Whole numbers of 8 bits: Taut's export beside NNCF, ONNX Runtime's quantizer and torchao.

Latencies are of random weights, whose norms have seen data; each net, at batch 1 and 16, in one
race of all libraries.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from against.quantizers import QUANTIZERS
from against.racing import Entry, Time, made, race
from harness import Figure
from torch import Tensor, nn

import taut
from taut.data import Batches
from taut.modules import clone
from taut.pack import packed_copy
from taut.zoo import LeNet5, create

NAME = "int8"
BATCHES = (1, 16)
INT8 = "quantize(activations=8)"
HALF = "prune_channels(ratio=0.5, of='macs')"
Inputs = Callable[[int], Tensor]


@dataclass(frozen=True)
class Net:
    """A network of random weights, and inputs for it, by their number."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    halved: str = HALF


def _images(side: int, channels: int = 3) -> Inputs:
    return lambda count: torch.randn(count, channels, side, side)


def _tokens(steps: int) -> Inputs:
    return lambda count: torch.randint(0, 64, (count, steps))


NETS = (
    Net("LeNet-5", LeNet5, _images(28, 1)),
    Net("MobileNetV1", partial(create, "mobilenet_v1"), _images(224)),
    Net("ResNet-18", partial(create, "resnet_18"), _images(224)),
    Net("DenseNet-121", partial(create, "densenet_121"), _images(224)),
    Net("LSTM", partial(create, "lstm_language_model", vocabulary=64), _tokens(64)),
    Net("Transformer", partial(create, "transformer_language_model", vocabulary=64), _tokens(64)),
)


def figures(options: argparse.Namespace) -> list[Figure]:
    """The rows of this section, or those that --only names."""
    return list(_latencies(options))


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
    path = folder / {"onnx": "net.onnx", "openvino": "net.xml"}[engine]
    taut.export(net, path, task.example(batch), task=task, dynamic_batch=False)
    return Entry(who, engine, path)


def _latencies(options: argparse.Namespace) -> Iterator[Figure]:
    threads = torch.get_num_threads()
    for net in NETS[:1] if options.quick else NETS:
        torch.manual_seed(options.seed)
        model = settled(net.build(), net.inputs)
        task = noise(model, net.inputs)
        whole, half = (compressed(model, r, task) for r in (INT8, f"{net.halved} > {INT8}"))
        for batch in BATCHES[:1] if options.quick else BATCHES:
            inputs = net.inputs(batch)
            seen = [net.inputs(batch) for _ in range(max(2, 16 // batch))]
            makers = {who: partial(q, model, seen) for who, q in QUANTIZERS.items()}
            for name, packed in (("Taut", whole), ("Taut halved", half)):
                for engine in ("onnx", "openvino"):
                    who = f"{name} ({engine})"
                    makers[who] = partial(ours, packed, task, batch, engine, who)
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                entries, failed = made(makers, folder)
                seconds = 0.1 if options.quick else 6.0
                times, stopped = race(entries, [inputs], folder, threads, seconds)
            yield from _compared(net, batch, threads, times, {**failed, **stopped})


def _compared(
    net: Net, batch: int, threads: int, times: Sequence[Time], failed: dict[str, str]
) -> Iterator[Figure]:
    """The fastest export, whole and halved, beside the fastest of the peers."""
    peers = [t for t in times if not t.entry.who.startswith("Taut")]
    found = {
        kind: [t for t in times if t.entry.who.startswith(f"{kind} (")]
        for kind in ("Taut", "Taut halved")
    }
    told = [*map(str, times), *(f"{who}: {why}" for who, why in failed.items())]
    for kind, asked, what in (("Taut", 1.05, "int8"), ("Taut halved", 0.6, "MACs ÷ 2 and int8")):
        yield Figure(
            name=f"int8: {net.name}, batch {batch}, {threads} thread{'s' * (threads > 1)}: "
            f"latency of {what} beside the best peer's int8",
            paper="; ".join(told), ours=found[kind][0].median_ms / peers[0].median_ms, asked=asked,
            at_most=True, unit="×", command=INT8 if kind == "Taut" else f"{net.halved} > {INT8}",
        )  # fmt: skip
