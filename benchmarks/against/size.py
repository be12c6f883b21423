"""Bytes at equal score: LeNet-5 on MNIST by Taut, by NNCodec and by ONNX Runtime's quantizer.

Every library codes the same trained network as it is, without training. NNCodec (Becking and
others, 2023) is an implementation of ISO/IEC 15938-17, "DeepCABAC"; how to install it stands in
files.py. Where it is not installed its published figure stands in its place and is marked so; that
is of another LeNet-5, trained by its authors.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from against.files import PEERS
from harness import Figure

import taut
from taut.data import Batches, images, mnist
from taut.zoo import LeNet5

NAME = "size"
LOST = 0.002  # of the accuracy, at most
RECIPES = tuple(
    f"prune_weights(sparsity={s}, scope='global') > quantize(bits={b}, method='gptq')"
    for s, b in ((0.5, 4), (0.7, 4), (0.8, 4), (0.7, 3), (0.8, 3))
)  # fmt: skip
TRAINED = (
    "prune_weights(sparsity=0.95) > recover(epochs=2) > share_values(bits=4) > recover(epochs=1)"
)
PUBLISHED = "published: 39.7× of a dense LeNet-5"


def figures(options: argparse.Namespace) -> list[Figure]:
    """The rows of this section."""
    return list(_figures(options))


def _task(quick: bool) -> taut.Task:
    data, (used, tested) = mnist(), (600, 200) if quick else (60_000, 10_000)
    x, xt = (images(i) for i in (data.train_images[:used], data.test_images[:tested]))
    train = Batches(x, data.train_labels[:used], 128, shuffle=True)
    return taut.Task(
        train=train, validation=Batches(x[:200], data.train_labels[:200], 200),
        test=Batches(xt, data.test_labels[:tested], 1000),
    )  # fmt: skip


def _figures(options: argparse.Namespace) -> Iterator[Figure]:
    torch.manual_seed(options.seed)
    task, net = _task(options.quick), LeNet5()
    settings = taut.Recipe.parse("training(precision='bfloat16') > recover()").settings(1)
    epochs = taut.Recover(epochs=1 if options.quick else 4, learning_rate=2e-3, distill=0.0)
    taut.recover(net, task, epochs, settings=settings)
    score, size = task.evaluate(net.eval()), 4 * sum(p.numel() for p in net.parameters())
    kept = score - LOST
    told, best = [], {}
    for name, make in PEERS.items():
        try:
            files = [b for b, s in make(net, task) if s >= kept]
        except Exception as error:  # whatever another library raises stands in its row
            told.append(f"{name}: {type(error).__name__}: {error}"[:160])
            continue
        best[name] = min(files, default=size)
        told.append(f"{name}: {best[name]:,} bytes")
    if "NNCodec" not in best:
        told.append(f"NNCodec, {PUBLISHED}")
    smallest = min(best.values(), default=size)
    recipes = RECIPES[:1] if options.quick else RECIPES
    plain = min((_ours(net, task, r, kept, options.seed) for r in recipes), default=(size, ""))
    trained = _ours(net, task, TRAINED, kept, options.seed)
    for what, (ours, recipe) in (("as it is", plain), ("with 3 epochs", trained)):
        yield Figure(
            name=f"size: LeNet-5 {what}, at most {100 * LOST:g} points lost: times smaller than "
            "the smallest of others", paper="; ".join(told), ours=smallest / ours, asked=1,
            at_most=False, unit="×", command=recipe,
        )  # fmt: skip


def _ours(
    net: torch.nn.Module, task: taut.Task, recipe: str, kept: float, seed: int
) -> tuple[int, str]:
    """The bytes of a recipe's file; those of the network where it lost too much."""
    with tempfile.TemporaryDirectory() as place:
        got = taut.compress(net, task, recipe, folder=Path(place) / "r", seed=seed)
    good = got.measurement.score >= kept
    return (got.measurement if good else got.original).size_bytes, recipe
