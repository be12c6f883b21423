"""Compressed networks in OpenVINO, by Taut's operations, against int8 of the same networks.

Each row is the latency of a compressed network over that of the dense one in int8, batch 1, by the
fastest of the peers that the row is asked against: the medians' ratio. The weights are random, for
speed does not depend on them; every network is first compared with its packed form, as all exports
are. Where a peer, OpenVINO or a compiler is missing a row says so, and cannot hold.

Few processors multiply whole numbers by tiles (AMX), which makes int8 much faster and does nothing
for bits. So a processor that does is timed a second time as one that does not, by the
limit that OpenVINO's library of kernels, oneDNN, takes from the environment.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from against.quantizers import QUANTIZERS
from against.racing import Entry, Make, made, race
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
OURS = "Taut"
THREADS = (1, 2)
# compressed, how the dense one is made, an input
Nets = tuple[nn.Module, Callable[[], nn.Module], Tensor]
NO_TILES = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
SECONDS = 4.0  # that each is timed


def shared(weight: Tensor, bits: int) -> SharedValues:
    """A weight as indices into a table of values."""
    index = torch.randint(0, 2**bits, weight.shape)
    return SharedValues(index, Plain.of(torch.randn(2**bits) * weight.std(), "float32"))


def signs(weight: Tensor) -> BitWeight:
    """A weight as signs, each row with the mean of its magnitudes."""
    return BitWeight(
        (weight > 0).long(), Plain.of(weight.abs().flatten(1).mean(1)[None], "float32")
    )


def whole(weight: Tensor, bits: int = 8) -> AffineWeight:
    """A weight as whole numbers of so many bits, each row with a step of its own."""
    middle = 2 ** (bits - 1)
    steps = weight.abs().flatten(1).amax(1) / (middle - 1)
    numbers = (weight / steps.reshape(-1, *[1] * (weight.dim() - 1))).round() + middle
    return AffineWeight(numbers.long(), bits, Plain.of(steps, "float32"), torch.tensor(2 * middle))


def eight_bits(at: int) -> StepCode:
    """Whole numbers, above zero behind a ReLU. at: the place of the layer."""
    return StepCode(torch.tensor([0.03]), 0 if at else -127, 127)


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


def binary_resnet(pixels: int) -> Nets:
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


def mlp(
    width: int, weight: Callable[[Tensor], PackedWeight], code: Callable[[int], InputCode | None]
) -> Nets:
    """784-width-width-10. code: what the layer at a place reads."""

    def dense() -> nn.Module:
        layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, 10)).eval()

    net = dense()
    for at in (0, 2, 4):
        layer = net.get_submodule(str(at))
        pack_layer(layer, {"weight": weight(layer.get_parameter("weight").detach())}, code(at))
    return net, dense, torch.randn(1, 784)


def lenet() -> Nets:
    """LeNet-5 at 95 % sparsity, the values of five bits."""

    def dense() -> nn.Module:
        return LeNet5().eval()

    net = dense()
    for name in ("conv1", "conv2", "fc1", "fc2"):
        layer = net.get_submodule(name)
        kept = 0.3 if name == "conv1" else 0.05
        pack_layer(layer, {"weight": sparse(layer.get_parameter("weight").detach(), kept, 5)})
    return net, dense, torch.randn(1, 1, 28, 28)


@dataclass(frozen=True)
class Case:
    """A network, compressed and dense, and whose int8 its latency is asked against."""

    make: Callable[[], Nets]
    asked: float
    peers: Sequence[str] = tuple(QUANTIZERS)


def cases(quick: bool) -> Mapping[str, Case]:
    """What is timed, by name."""
    width, pixels = (64, 32) if quick else (4096, 224)
    name = f"MLP 784-{width}-{width}-10"
    return {
        "ResNet-18, binary 3×3, int8 ends": Case(lambda: binary_resnet(pixels), 0.7, ["NNCF"]),
        f"{name}, 4-bit values": Case(lambda: mlp(width, lambda w: whole(w, 4), eight_bits), 0.8),
        f"{name}, 1 bit": Case(
            lambda: mlp(width, signs, lambda at: two_levels() if at else eight_bits(at)), 0.8
        ),
        "LeNet-5, 95 % sparse, 5-bit values": Case(lenet, 0.8),
    }


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """The rows of this section: one for each network, number of threads and set of instructions."""
    for name, case in cases(options.quick).items():
        if not options.only or options.only in f"{NAME}: {name}":
            torch.manual_seed(options.seed)
            yield from _compared(name, case, 0.2 if options.quick else SECONDS)


def _compared(name: str, case: Case, seconds: float) -> Iterator[Figure]:
    net, dense, x = case.make()
    batches = [torch.randn_like(x) for _ in range(8)]
    makers: dict[str, Make] = {OURS: partial(_ours, net, x)}
    makers |= {who: partial(QUANTIZERS[who], dense(), batches) for who in case.peers}
    limits: dict[str, dict[str, str]] = {"": {}}
    if torch.cpu.get_capabilities().get("amx_tile"):
        limits[", no tiles"] = NO_TILES
    with TemporaryDirectory() as place:
        entries, failed = made(makers, Path(place))
        for threads, (limit, environment) in itertools.product(THREADS, limits.items()):
            given = entries, [x], Path(place), threads, seconds, environment
            times, stopped = race(*given)
            ms = {t.entry.who: t.median_ms for t in times}
            told = [*map(str, times), *(f"{w}: {why}" for w, why in {**failed, **stopped}.items())]
            ours, best = ms.pop(OURS, math.inf), min(ms.values(), default=0)
            against = "NNCF's int8" if len(case.peers) == 1 else "the best peer's int8"
            yield Figure(
                name=f"{NAME}: {name}, {threads} threads{limit}: latency beside {against}",
                paper="; ".join(told), ours=ours / best if best else math.inf, asked=case.asked,
                at_most=True, unit="×", command=f"python benchmarks/peers.py --only {NAME}",
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
