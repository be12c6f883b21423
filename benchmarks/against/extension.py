"""Compressed networks in OpenVINO, by Taut's operations, against NNCF's int8 of the same networks.

Each row is the latency of a compressed network over that of the dense one in int8, batch 1, both in
OpenVINO: the medians' ratio. The weights are random, for speed does not depend on them; every
network is first compared with its packed form, as all exports are. Where NNCF, OpenVINO or a
compiler is missing a row says so, and cannot hold.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from against.quantizers import QUANTIZERS
from against.racing import Entry, made, race
from harness import Figure
from torch import Tensor, nn

import taut
from taut.activations import InputCode, LevelCode, StepCode
from taut.affine_weight import AffineWeight
from taut.bit_weight import BitWeight
from taut.fastest import KEEPS
from taut.kernels import Levels
from taut.layers import pack_layer
from taut.packed import PackedWeight, Plain
from taut.shared_weight import SharedValues
from taut.sparse_weight import SparseWeight
from taut.task import Task
from taut.zoo.lenet import LeNet5
from taut.zoo.resnet import resnet_18

NAME = "extension"
OURS, THEIRS = "Taut", "NNCF"
THREADS = (1, 2)
SECONDS = 10.0  # that a pair is timed


def shared(weight: Tensor, bits: int) -> SharedValues:
    """A weight as indices into a table of values."""
    index = torch.randint(0, 2**bits, weight.shape)
    return SharedValues(index, Plain.of(torch.randn(2**bits) * weight.std(), "float32"))


def signs(weight: Tensor) -> BitWeight:
    """A weight as signs, each row with the mean of its magnitudes."""
    return BitWeight(
        (weight > 0).long(), Plain.of(weight.abs().flatten(1).mean(1)[None], "float32")
    )


def whole(weight: Tensor) -> AffineWeight:
    """A weight as int8, each row with a step of its own."""
    steps = weight.abs().flatten(1).amax(1) / 127
    numbers = (weight / steps.reshape(-1, *[1] * (weight.dim() - 1))).round() + 128
    return AffineWeight(numbers.long(), 8, Plain.of(steps, "float32"), torch.tensor(256))


def sparse(weight: Tensor, kept: float, bits: int) -> SparseWeight:
    """The largest weights, as indices into a table."""
    count = max(1, round(kept * weight.numel()))
    mask = weight.abs() >= weight.abs().flatten().topk(count).values[-1]
    return SparseWeight(mask, shared(torch.randn(int(mask.sum())), bits))


def two_levels() -> LevelCode:
    """Inputs of two levels, as binarize(activations='pair') fits them behind a ReLU."""
    sign = Levels.sign(0.3)
    return LevelCode(
        Levels(
            thresholds=sign.thresholds, pattern=sign.pattern, scale=torch.tensor([0.3]), offset=0.3
        )
    )


def binary_resnet(pixels: int) -> tuple[nn.Module, Callable[[], nn.Module], Tensor]:
    """ResNet-18 whose 3 × 3 convolutions are binary, and whose first and last layer are int8."""

    def dense() -> nn.Module:
        return resnet_18().eval()

    net = dense()
    for path, layer in net.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        code: InputCode
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            weight: PackedWeight = signs(layer.weight.detach())
            code = two_levels()
        elif "shortcut" in path:
            continue
        else:
            weight = whole(layer.weight.detach())
            first = isinstance(layer, nn.Conv2d)
            code = StepCode(torch.tensor([0.03]), -127 if first else 0, 127)
        pack_layer(layer, {"weight": weight}, code)
    return net, dense, torch.randn(1, 3, pixels, pixels)


def mlp(width: int, weight: Callable[[Tensor], PackedWeight], bits: bool) -> Any:
    """784-width-width-10; bits: the inputs of the later layers have two levels."""

    def dense() -> nn.Module:
        layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, 10)).eval()

    net = dense()
    for at in (0, 2, 4):
        layer = net.get_submodule(str(at))
        code = two_levels() if bits and at else None
        pack_layer(layer, {"weight": weight(layer.get_parameter("weight").detach())}, code)
    return net, dense, torch.randn(1, 784)


def lenet() -> tuple[nn.Module, Callable[[], nn.Module], Tensor]:
    """LeNet-5 at 95 % sparsity, the values of five bits."""

    def dense() -> nn.Module:
        return LeNet5().eval()

    net = dense()
    for name in ("conv1", "conv2", "fc1", "fc2"):
        layer = net.get_submodule(name)
        kept = 0.3 if name == "conv1" else 0.05
        pack_layer(layer, {"weight": sparse(layer.get_parameter("weight").detach(), kept, 5)})
    return net, dense, torch.randn(1, 1, 28, 28)


def rows(quick: bool) -> Mapping[str, tuple[Callable[[], Any], float]]:
    """What is timed, and the ratio that is asked of it."""
    width, pixels = (64, 32) if quick else (4096, 224)
    name = f"MLP 784-{width}-{width}-10"
    return {
        "ResNet-18, binary 3×3, int8 ends": (lambda: binary_resnet(pixels), 0.7),
        f"{name}, 4-bit values": (lambda: mlp(width, lambda w: shared(w, 4), False), 0.8),
        f"{name}, 1 bit": (lambda: mlp(width, signs, True), 0.8),
        "LeNet-5, 95 % sparse, 5-bit values": (lenet, 0.8),
    }


def figures(options: argparse.Namespace) -> list[Figure]:
    """The rows of this section: one for each network and number of threads."""
    found: list[Figure] = []
    for name, (make, asked) in rows(options.quick).items():
        if not options.only or options.only in f"{NAME}: {name}":
            torch.manual_seed(options.seed)
            found += _compared(name, *make(), asked, 0.2 if options.quick else SECONDS)
    return found


def _compared(
    name: str, net: nn.Module, dense: Callable[[], nn.Module], x: Tensor, asked: float,
    seconds: float,
) -> Iterator[Figure]:  # fmt: skip
    makers = {
        OURS: partial(_ours, net, x),
        THEIRS: partial(QUANTIZERS["NNCF"], dense(), [torch.randn_like(x) for _ in range(8)]),
    }
    with TemporaryDirectory() as place:
        entries, failed = made(makers, Path(place))
        for threads in THREADS:
            times, stopped = race(entries, [x], Path(place), threads, seconds)
            ms = {t.entry.who: t.median_ms for t in times}
            told = [f"{t.entry.who} {t.median_ms:.3g} ± {t.iqr_ms / 2:.1g} ms" for t in times]
            told += [f"{who}: {why}" for who, why in {**failed, **stopped}.items()]
            yield Figure(
                name=f"{NAME}: {name}, {threads} threads: latency beside NNCF's int8",
                paper="; ".join(told),
                ours=ms[OURS] / ms[THEIRS] if len(ms) == 2 else math.inf,
                asked=asked, at_most=True, unit="×",
                command=f"python benchmarks/peers.py --only {NAME}",
            )  # fmt: skip


def _ours(net: nn.Module, x: Tensor, folder: Path) -> Entry:
    """Taut's export, every layer that can be compressed so."""
    path = folder / "kept.xml"
    taut.export(net, path, x, task=_task(x, net), dynamic_batch=False, keep="all")
    return Entry(OURS, KEEPS, path)


def _task(x: Tensor, net: nn.Module) -> Task:
    """Random inputs: those that ranges between layers are found on, and answers are compared on."""
    with torch.no_grad():
        data = [(inputs, net(inputs).argmax(1)) for inputs in (torch.randn(4, *x.shape[1:]),)]
    return Task(train=data, test=data)
