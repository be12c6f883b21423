"""Hinton's distillation on MNIST: a large regularised net teaches a smaller one that is not.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015), section 3: a net of two
layers of 1200 with dropout, trained on images moved by up to two pixels, errs 67 times; one of two
layers of 800 without regularisation errs 146 times, and 74 times where it also matches the large
one's outputs at temperature 20, on the same unmoved images. All 60,000 images train, and the last
epoch counts: the test images choose nothing. The nets are kept in runs/, so that a run that was
stopped goes on with the next net.

Where we differ: on the images as they are, which is a row of its own, our student recovers less of
the gap. So it is also asked what the teacher says to mixtures of two images, for many epochs and
without labels, after Beyer, Zhai, Royer and others: Knowledge distillation: A good teacher is
patient and consistent (CVPR 2022).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn
from torch.nn import functional as F

import taut
from taut.data import Batches, ImageData, images, mnist
from taut.distillation import Distillation
from taut.training import Training

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import ROOT, Figure, run


@dataclass(frozen=True)
class Plan:
    """How one net is trained: its width, its dropout, the pixels its images move by.

    mixed: whether it sees mixtures of two images.
    """

    name: str
    width: int
    dropout: float
    pixels: int
    recover: taut.Recover
    mixed: bool = False


TEACHER = Plan("teacher", 1200, 0.4, 2, taut.Recover(epochs=60, learning_rate=1e-3, distill=0.0))
ALONE = Plan("alone", 800, 0.0, 0, taut.Recover(epochs=20, learning_rate=1e-3, distill=0.0))
PLAIN = Plan(
    "distilled, images as they are", 800, 0.0, 0,
    taut.Recover(epochs=30, learning_rate=1e-3, distill=0.9, temperature=20.0),
)  # fmt: skip
DISTILLED = Plan(
    "distilled", 800, 0.0, 0,
    taut.Recover(epochs=120, learning_rate=1e-3, distill=1.0, temperature=20.0), mixed=True,
)  # fmt: skip


def net(width: int, dropout: float = 0.0) -> nn.Module:
    """784-width-width-10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10),
    )  # fmt: skip


class Jittered:
    """Batches whose images are each moved by up to `pixels` in both directions."""

    def __init__(self, batches: Batches, pixels: int) -> None:
        self.batches, self.pixels = batches, pixels

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        p, size = self.pixels, self.batches.inputs.shape[-1]
        for x, y in self.batches:
            windows = F.pad(x, (p, p, p, p))[:, 0].unfold(1, size, 1).unfold(2, size, 1)
            down, right = torch.randint(2 * p + 1, (2, len(x)))
            yield windows[torch.arange(len(x)), down, right].unsqueeze(1), y


class Mixtures:
    """Batches whose images are each mixed with the next one's, in any proportion."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.batches:
            yield torch.lerp(x.roll(1, 0), x, torch.rand(len(x), 1, 1, 1)), y


def measure(options: argparse.Namespace) -> list[Figure]:
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            return figures(options, Path(folder))
    return figures(options, ROOT / "runs" / f"distillation-{options.seed}")


def figures(options: argparse.Namespace, folder: Path) -> list[Figure]:
    """The nets, trained or read from the folder, and what became of the gap."""
    digits = mnist()
    teacher, first = trained(TEACHER, digits, folder, options)
    _, alone = trained(ALONE, digits, folder, options)
    _, plain = trained(PLAIN, digits, folder, options, teacher)
    _, distilled = trained(DISTILLED, digits, folder, options, teacher)
    gap = max(alone - first, 1)
    return [
        Figure(name="teacher 1200-1200, test errors", paper="67", ours=first, asked=80,
               at_most=True, command=str(TEACHER.recover)),
        Figure(name="student 800-800 alone, test errors", paper="146", ours=alone, asked=160,
               at_most=True, command=str(ALONE.recover)),
        Figure(name="student distilled on the images as they are, test errors", paper="74",
               ours=plain, asked=alone, at_most=True, command=str(PLAIN.recover)),
        Figure(name="student distilled, test errors", paper="74", ours=distilled, asked=90,
               at_most=True, command=str(DISTILLED.recover)),
        Figure(name="of the gap recovered", paper="91 %", ours=100 * (alone - distilled) / gap,
               asked=90, at_most=False, unit=" %", command=str(DISTILLED.recover)),
    ]  # fmt: skip


def trained(
    plan: Plan, digits: ImageData, folder: Path, options: argparse.Namespace,
    teacher: nn.Module | None = None,
) -> tuple[nn.Module, int]:  # fmt: skip
    """A net trained as planned, or as it was kept, and how often it errs on the test images."""
    count, tested = (2560, 500) if options.quick else (60_000, 10_000)
    x, y = images(digits.train_images[:count], mean=0.0, std=1.0), digits.train_labels[:count]
    train = Batches(x, y, 128, shuffle=True)
    test_x = images(digits.test_images[:tested], mean=0.0, std=1.0)
    task = taut.Task(
        train=(Jittered(train, plan.pixels) if plan.pixels
               else Mixtures(train) if plan.mixed else train),
        test=Batches(test_x, digits.test_labels[:tested], 1000),
    )  # fmt: skip
    recover = replace(plan.recover, epochs=1) if options.quick else plan.recover
    torch.manual_seed(options.seed)
    model = net(plan.width, plan.dropout)
    weights = b"" if teacher is None else teacher[1].weight.detach().cpu().numpy().tobytes()
    asked = xxhash.xxh3_64_hexdigest(f"{plan} {recover}".encode() + weights)
    kept = folder / f"{plan.name}-{asked}.pt"
    if kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        settings = [Training(precision="bfloat16", average=1)]  # the last epoch counts
        if teacher is not None and not plan.mixed:
            settings.append(Distillation(cache=str(folder / "outputs")))
        taut.recover(
            model, task, recover, settings=settings, teacher=teacher,
            on_epoch=lambda r, _: print(
                f"{plan.name}: epoch {r.epoch}, loss {r.loss:.4f}, {r.seconds:.0f} s", flush=True
            ),
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    errors = round(tested * (1 - task.evaluate(model)))
    print(f"{plan.name}: {errors} errors", flush=True)
    return model, errors


if __name__ == "__main__":
    run("Hinton, Vinyals, Dean: Distilling the Knowledge (2015) on MNIST", measure)
