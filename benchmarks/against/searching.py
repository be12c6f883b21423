"""Searches: Taut's, which learns from its trials, beside random search and a grid.

A network on scikit-learn's 8 × 8 digits, a goal on bytes and score, few trials; each search
is repeated with several seeds. What counts is the smallest file that keeps the bound on the score;
where a search found none, the original's. All train equally long: trials of one epoch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator

import torch
from harness import Figure
from sklearn.datasets import load_digits
from torch import nn

import taut
from taut.data import Batches
from taut.goal import Goal

NAME = "searching"
GOAL = "bytes<=4%, score>=-2%"
TECHNIQUES = "prune_weights, share_values, quantize, low_rank"


def _task() -> taut.Task:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    return taut.Task(
        train=Batches(x[:1000], y[:1000], 50, shuffle=True),
        validation=Batches(x[1000:1300], y[1000:1300], 300),
        test=Batches(x[1300:], y[1300:], 497), learning_rate=5e-3, name="digits",
    )  # fmt: skip


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """The rows of this section."""
    trials, seeds = (2, 1) if options.quick else (16, 3)
    torch.manual_seed(options.seed)
    task = _task()
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                        nn.Linear(256, 10))  # fmt: skip
    how = taut.Recover(epochs=2 if options.quick else 15, learning_rate=5e-3, distill=0.0)
    taut.recover(net, task, how)
    found = {
        sampler: [_smallest(net, task, sampler, trials, options.seed + s) for s in range(seeds)]
        for sampler in ("tpe", "random", "grid")
    }
    middle = {k: statistics.median(v) for k, v in found.items()}
    for other in ("random", "grid"):
        told = ", ".join(f"{k} {' / '.join(f'{b:,}' for b in v)}" for k, v in found.items())
        yield Figure(
            name=f"searching: smallest good file after {trials} trials, times smaller than by "
            f"{other} search",
            paper=f"bytes of {seeds} seed{'s' * (seeds > 1)}: {told}",
            ours=middle[other] / middle["tpe"], asked=1, at_most=False, unit="×", command=GOAL,
        )  # fmt: skip


def _smallest(net: nn.Module, task: taut.Task, sampler: str, trials: int, seed: int) -> int:
    """Bytes of the smallest candidate that keeps the score, or the original's."""
    with tempfile.TemporaryDirectory() as folder:
        found = taut.search(
            net, task, GOAL, sampler=sampler, trials=trials, epochs=1, seed=seed, folder=folder,
            techniques=TECHNIQUES,
        )  # fmt: skip
    bound = Goal.parse("score" + GOAL.partition("score")[2], task.better)
    good = [
        c.measurement.size_bytes for c in found.candidates
        if bound.met(c.measurement, found.original)
    ]  # fmt: skip
    return min(good, default=found.original.size_bytes)
