"""Hinton's distillation on MNIST: a large regularised net teaches a smaller one that is not.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015), section 3: a net of two
layers of 1200 with dropout, trained on images moved by up to two pixels, errs 67 times; one of two
layers of 800 without regularisation errs 146 times, and 74 times where it also matches the large
one's outputs at temperature 20.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.data import Batches

sys.path.insert(0, str(Path(__file__).parent.parent))


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
