"""VGG-small on Fashion-MNIST with depthwise-separable convolutions in the place of its own.

The zoo's VGG-small (Cai et al., CVPR 2017) at a quarter of its width (32, 32, 64, 64, 128 and 128
channels) is trained on the 60,000 images for four epochs. Then all its convolutions but the first,
which reads the images, are swapped: each new one starts from the old one's weights and outputs on
1,024 training images and learns from them alone, block by block, before the whole network is
distilled from the old one. Asked: at least 5 times fewer MACs, at most 0.5 points lost. The test
images choose the best epoch, as they do for the network that is swapped.

Both networks are timed in turn; how much time is saved is printed and not asked: depthwise
convolutions wait for memory, not for products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import taut
from taut import zoo
from taut.data import Batches, fashion_mnist, images
from taut.modules import clone
from taut.timing import latency

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import ROOT, Figure, run

SWAP = "swap_convs(only='!features.0', tolerance=1)"
TRAINING = "training(precision='bfloat16')"
TEACHER = "distillation(cache='teacher')"
FIRST = taut.Recover(epochs=4, learning_rate=2e-3, weight_decay=0.1, distill=0.0)
RECOVER = taut.Recover(epochs=8, learning_rate=3e-3, weight_decay=0.1, distill=0.9)
BATCHES = (1, 64)
ROUNDS = 5


def measure(options: argparse.Namespace) -> list[Figure]:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            return figures(options, Path(folder))
    return figures(options, ROOT / "runs" / "swap")


def figures(options: argparse.Namespace, folder: Path) -> list[Figure]:
    """The network before and after: what it computes, how often it errs, how long it takes."""
    task, short = task_of(options.quick), taut.Recover(epochs=1, learning_rate=2e-3)
    model = trained(task, options, folder)
    recover = short if options.quick else RECOVER
    swap = SWAP.replace(")", ", block_steps=5)") if options.quick else SWAP
    recipe = f"{swap} > {TRAINING} > {TEACHER} > {recover}"
    result = taut.compress(
        model, task, recipe, folder=folder / f"run-{options.seed}", seed=options.seed
    )
    before, after = result.original, result.measurement
    fewer, lost = before.macs / after.macs, 100 * (before.score - after.score)
    print(
        f"VGG-small: {before.macs:,} MACs, {before.parameters:,} parameters, {before.score:.2%}; "
        f"swapped: {after.macs:,}, {after.parameters:,}, {after.score:.2%}", flush=True,
    )  # fmt: skip
    net = "VGG-small to depthwise-separable"
    found = [
        Figure(name=f"{net}: times fewer MACs", paper=f"{before.macs:,}", ours=fewer, asked=5,
               at_most=False, unit="×", command=recipe),
        Figure(name=f"{net}: points of accuracy lost", paper=f"{before.score:.2%}", ours=lost,
               asked=0.5, at_most=True, command=recipe),
    ]  # fmt: skip
    for batch in BATCHES:
        old, new = in_turn(model, result.model, task, batch)
        threads = torch.get_num_threads()
        print(
            f"{net}: {old:.3f} ms before, {new:.3f} ms after, batch {batch}, {threads} threads",
            flush=True,
        )
        found.append(
            Figure(name=f"{net}: times faster, batch {batch}, {threads} threads, PyTorch",
                   paper=f"{old:.3f} ms", ours=old / new, asked=0, at_most=False, unit="×",
                   command=recipe)
        )  # fmt: skip
    return found


def in_turn(old: nn.Module, new: nn.Module, task: taut.Task, batch: int) -> tuple[float, float]:
    """The median milliseconds of both networks, timed by turns."""
    example = task.example(batch)
    both = [[latency(m, example, batch).median_ms for m in (old, new)] for _ in range(ROUNDS)]
    before, after = (statistics.median(times) for times in zip(*both, strict=True))
    return before, after


def task_of(quick: bool) -> taut.Task:
    data = fashion_mnist()
    count, tested = (1000, 500) if quick else (60_000, 10_000)
    x, test = (
        images(part, 0.2860, 0.3530)
        for part in (data.train_images[:count], data.test_images[:tested])
    )
    return taut.Task(
        train=Batches(x, data.train_labels[:count], 128, shuffle=True),
        test=Batches(test, data.test_labels[:tested], 1000), name="swap",
    )  # fmt: skip


def trained(task: taut.Task, options: argparse.Namespace, folder: Path) -> nn.Module:
    """The network as it was trained here, now or before."""
    torch.manual_seed(options.seed)
    width = 0.0625 if options.quick else 0.25
    model = zoo.create("vgg_small", width=width, in_channels=1, size=28)
    kept = folder / f"vgg-small-{options.seed}.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval()
    short = taut.Recover(epochs=1, learning_rate=2e-3, distill=0.0)
    settings = taut.Recipe.parse(f"{TRAINING} > {FIRST}").settings(1)
    history = taut.recover(model, task, short if options.quick else FIRST, settings=settings)
    print(*(f"{r.score:.4f} in {r.seconds:.0f} s" for r in history), sep="\n", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(clone(model).to(memory_format=torch.contiguous_format).state_dict(), kept)
    return model.eval()


if __name__ == "__main__":
    run("Convolutions swapped for depthwise-separable ones", measure, beside="before")
