"""Half of an LSTM's hidden units: a language model that runs twice as fast.

A model of characters on the King James Bible, 512 hidden units. The 256 that matter least by the
norm of all their weights go, from every gate, from what feeds back and from what reads them; the
rest recover, distilled from the original. Wen et al.: Learning Intrinsic Sparse Structures within
Long Short-Term Memory (ICLR 2018), who draw units to zero by a group lasso first; here they go in
one step.

The text is split in order: nine tenths to train on, a twentieth whose first 32,768 characters tell
the best epoch, and the last twentieth, by whose first 32,768 the perplexity is taken. Both networks
are timed by turns in one run on sequences of 64 characters, in PyTorch at one thread: one sequence
at a time is held to the figure, 16 at a time are printed beside it. At one at a time, the 4 MB of
the larger network's recurrent weights are read anew at every step, where those of the smaller one,
1 MB, may stay in a core's cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from records import STEPS, Excerpts, perplexity, vocabulary
from slim import FAST, Smaller, both, times

import taut
from taut.data import Batches, king_james
from taut.zoo import LstmLanguageModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run

LSTM = Smaller(
    "LSTM of 512, King James",
    lambda: LstmLanguageModel(vocabulary(), 64, 512),
    f"{FAST} > recover(epochs=5, learning_rate=4e-3, distill=0)",
    f"prune_channels(only='lstm.*', ratio=0.5) > {FAST} > "
    "recover(epochs=6, learning_rate=4e-3, temperature=1)",
)


def language_task(quick: bool) -> taut.Task:
    text = king_james()
    signs = {c: i for i, c in enumerate(sorted(set(text)))}
    codes = torch.tensor([signs[c] for c in text])
    count, part = 32 if quick else 512, len(codes) // 20

    def sequences(start: int) -> Batches:
        found = codes[start : start + count * STEPS + 1]
        return Batches(found[:-1].reshape(-1, STEPS), found[1:].reshape(-1, STEPS), 64)

    return taut.Task(
        train=Excerpts(codes[: -2 * part], 128 if quick else 12_800, 64),
        validation=sequences(len(codes) - 2 * part), test=sequences(len(codes) - part),
        score=perplexity, better="lower",
    )  # fmt: skip


def measure(options: argparse.Namespace) -> list[Figure]:
    task, net = language_task(options.quick), LSTM
    model, smaller, result = both(net, task, options)
    before, after = result.original, result.measurement
    worse = 100 * (after.score / before.score - 1)
    scores = f"perplexity {before.score:.3f} → {after.score:.3f}"
    units = [m.lstm.hidden_size for m in (model, smaller)]
    print(f"{net.name}: {scores}, {units[0]} units → {units[1]}, {before.macs:,} MACs → "
          f"{after.macs:,}")  # fmt: skip
    return [
        Figure(name=f"{net.name}: hidden units left", paper=f"of {units[0]}", ours=units[1],
               asked=units[0] // 2, at_most=True, command=net.recipe),
        Figure(name=f"{net.name}: perplexity worse by", paper=scores, ours=worse, asked=5.0,
               at_most=True, unit=" %", command=net.recipe),
        *times(net.name, model, smaller, task, {1: 2.0, 16: 1.0}, options.quick),
    ]  # fmt: skip


if __name__ == "__main__":
    run("An LSTM of half its hidden units", measure, beside="beside it")
