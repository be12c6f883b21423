"""Compressed networks in OpenVINO, by Taut's operations, against NNCF's int8 of the same networks.

    python benchmarks/against/extension.py --json benchmarks/results/extension.json --check

Each row is the latency of a compressed network over that of the dense one in int8, batch 1, both in
OpenVINO, timed in turn in one process: the medians' ratio. The weights are random, for speed does
not depend on them; every network is first compared with its packed form, as all exports are. NNCF
is the peer: `pip install nncf`; without it a row says so and cannot hold.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness import Figure, run

import taut
from taut.activations import InputCode, LevelCode, StepCode
from taut.affine_weight import AffineWeight
from taut.bit_weight import BitWeight
from taut.kernels import Levels
from taut.kernels.openvino import extension
from taut.layers import pack_layer
from taut.packed import PackedWeight, Plain
from taut.shared_weight import SharedValues
from taut.sparse_weight import SparseWeight
from taut.task import Task
from taut.zoo.lenet import LeNet5
from taut.zoo.resnet import resnet_18

COMMAND = "python benchmarks/against/extension.py"
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
    """A row for each network and number of threads."""
    found = []
    try:
        import nncf
    except ImportError:
        nncf = None
    for name, (make, asked) in rows(options.quick).items():
        if options.only and options.only not in name:
            continue
        torch.manual_seed(options.seed)
        if nncf is None:
            found.append(_figure(name, "nncf is not installed", math.inf, asked))
            continue
        net, dense, x = make()
        with TemporaryDirectory() as folder:
            task = _task(x, net)
            ours = taut.export(net, Path(folder) / "ours.xml", x, task=task, keep="all")
            theirs = _int8(nncf, dense(), x, Path(folder))
            for threads in THREADS:
                seconds = 0.2 if options.quick else SECONDS
                a, b = _medians((ours.path, theirs), x, threads, seconds)
                beside = f"{b:.3f} ms, ours {a:.3f}"
                found.append(_figure(f"{name}, {threads} threads", beside, a / b, asked))
    return found


def _figure(name: str, beside: str, ours: float, asked: float) -> Figure:
    return Figure(
        name=name, paper=beside, ours=ours, asked=asked, at_most=True, unit="×", command=COMMAND
    )


def _task(x: Tensor, net: nn.Module) -> Task:
    """Random inputs: those that ranges between layers are found on, and answers are compared on."""
    with torch.no_grad():
        data = [(inputs, net(inputs).argmax(1)) for inputs in (torch.randn(4, *x.shape[1:]),)]
    return Task(train=data, test=data)


def _int8(nncf: Any, dense: nn.Module, x: Tensor, folder: Path) -> Path:
    """NNCF's int8 of a network, by its defaults, as a file."""
    file = folder / "dense.onnx"
    torch.onnx.export(dense, (x,), str(file), dynamo=True, verbose=False, external_data=False)
    data = nncf.Dataset([np.random.default_rng(i).standard_normal(x.shape, "f4") for i in range(8)])
    quantized = nncf.quantize(openvino.Core().read_model(file), data, subset_size=8)
    openvino.save_model(quantized, folder / "int8.xml")
    return folder / "int8.xml"


def _medians(files: tuple[Path, ...], x: Tensor, threads: int, seconds: float) -> tuple[float, ...]:
    """The milliseconds of an inference in each file, timed in turn."""
    core = openvino.Core()
    core.add_extension(str(extension()))
    requests = []
    for file in files:
        model = core.read_model(file)
        model.reshape(list(x.shape))
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(model, "CPU", options).create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy()))
        for _ in range(5):
            request.infer()
        requests.append(request)
    times: list[list[float]] = [[] for _ in files]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 9:
        for request, taken in zip(requests, times, strict=True):
            request.infer()  # what the other left in the caches is gone
            for _ in range(3):
                start = time.perf_counter()
                request.infer()
                taken.append(1e3 * (time.perf_counter() - start))
    return tuple(float(np.median(t)) for t in times)


if __name__ == "__main__":
    run("Taut's operations in OpenVINO, against NNCF's int8", figures, "NNCF int8")
