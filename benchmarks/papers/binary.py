"""Binary networks on MNIST: weights of one bit, then inputs of one bit too, run by counting bits.

Courbariaux, Bengio, David: BinaryConnect (NIPS 2015): three layers of 1024, weights of ±1, 1.29 %
(signs) and 1.18 % (drawn signs), 1.30 % with real weights. Courbariaux, Hubara et al.: Binarized
Neural Networks (2016): inputs of ±1 too, 0.96 % with three layers of 4096. Both trained for 1000
epochs. Here every layer is binarized, the first reads real pixels, images are moved by up to a
pixel, and the binary nets are distilled from the real one; the last epoch counts, so the test
images choose nothing. Products are taken in bfloat16 while training, which holds ±1 exactly.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import taut
from taut.data import mnist
from taut.layers import run_dense
from taut.measure import tensor_bytes
from taut.training import Training

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from distillation import Jittered
from harness import Figure, run

from taut.data import Batches, images

FLOAT = taut.Recover(epochs=12, learning_rate=2e-3, distill=0.0)
CONNECT = taut.Recover(epochs=25, learning_rate=4e-3, distill=0.7)
BNN = taut.Recover(epochs=40, learning_rate=4e-3, distill=0.7)


def net(activation: type[nn.Module], width: int, dropout: float = 0.0) -> nn.Module:
    """784-width-width-width-10 with batch norms, no biases."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = 784
    for _ in range(3):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), activation()]
        layers += [nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10, bias=False), nn.BatchNorm1d(10))


def measure(options: argparse.Namespace) -> list[Figure]:
    digits = mnist()
    count, width = (2560, 64) if options.quick else (60_000, 1024)
    tested = 500 if options.quick else 10_000
    x = images(digits.train_images[:count], mean=0.5, std=0.5)
    test_x = images(digits.test_images[:tested], mean=0.5, std=0.5)
    task = taut.Task(
        train=Jittered(Batches(x, digits.train_labels[:count], 256, shuffle=True), 1),
        test=Batches(test_x, digits.test_labels[:tested], 1000),
    )

    def train(model: nn.Module, plan: taut.Recover, teacher: nn.Module | None = None) -> float:
        """The error in per cent after the last epoch."""
        plan = replace(plan, epochs=1) if options.quick else plan
        precision = "float32" if options.quick else "bfloat16"
        taut.recover(
            model, task, plan, settings=[Training(average=1, precision=precision)],
            teacher=teacher,
            on_epoch=lambda r, _: print(
                f"epoch {r.epoch}: loss {r.loss:.4f}, score {r.score:.4f}, {r.seconds:.0f} s",
                flush=True,
            ),
        )  # fmt: skip
        return 100 * (1 - task.evaluate(model))

    torch.manual_seed(options.seed)
    real = net(nn.ReLU, width, 0.2)
    of_real = train(real, FLOAT)
    connect = net(nn.ReLU, width)
    connect.load_state_dict(real.state_dict())
    taut.apply(connect, "binarize(scale='none', ends=True)", task)
    of_connect = train(connect, CONNECT, real)
    bnn = net(nn.Hardtanh, width)
    traced = taut.trace(bnn, task.example())
    taut.apply(bnn, "binarize(scale='none', ends=True, only='1.*')", task, traced)
    signs = "binarize(scale='none', ends=True, activations='signs', only='!1.*')"
    taut.apply(bnn, signs, task, traced)
    of_bnn = train(bnn, BNN, real)
    size_bytes, alike = packed(bnn, net(nn.Hardtanh, width), task)
    times = tensor_bytes(net(nn.Hardtanh, width)) / size_bytes
    return [
        Figure(name="float 3×1024, test error", paper="1.30 %", ours=of_real, asked=1.35,
               at_most=True, unit=" %", command=str(FLOAT)),
        Figure(name="BinaryConnect 3×1024, test error", paper="1.29 %", ours=of_connect,
               asked=1.35, at_most=True, unit=" %", command=str(CONNECT)),
        Figure(name="BNN 3×1024, test error", paper="0.96 % (3×4096)", ours=of_bnn, asked=1.8,
               at_most=True, unit=" %", command=str(BNN)),
        Figure(name="BNN 3×1024, times smaller than fp32", paper=f"{size_bytes:,} bytes",
               ours=times, asked=28, at_most=False, unit="×"),
        Figure(name="BNN 3×1024, digits told alike by counted bits and by the trained form",
               paper=f"of {tested:,}", ours=alike, asked=tested, at_most=False),
    ]  # fmt: skip


@torch.no_grad()
def packed(model: nn.Module, fresh: nn.Module, task: taut.Task) -> tuple[int, int]:
    """Bytes of the file, and how many predictions stay the same when it is read back and packed."""
    with tempfile.TemporaryDirectory() as folder:
        size = taut.pack(model.eval(), Path(folder) / "net.taut", "float32")
        loaded = taut.load(Path(folder) / "net.taut", fresh)
    run_dense(loaded, False)
    alike = 0
    for batch in task.batches("test"):
        same = loaded(*batch.args).argmax(1) == model(*batch.args).argmax(1)
        alike += int(same.sum())
    return size, alike


if __name__ == "__main__":
    run("Binary networks (Courbariaux et al., 2015 and 2016) on MNIST", measure)
