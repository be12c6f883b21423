"""Weights of 4 and of 3 bits without training: what plain and what second-order rounding cost.

LeNet-5 on MNIST and a small Transformer on the King James text. Both roundings put every weight on
the same grid, a step for each output channel where the squared error is least; one rounds each
weight to the nearest, the other column by column with the error made good in those to come. It sees
the inputs of 1,024 training examples and is asked to lose at most a third of what plain rounding
loses, in the loss on test examples; at 3 bits the same is asked. The embedding, which is looked up
and not summed, so that no other weight can make its errors good, stays as it is.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch
from second_order import NETS, Net

import taut
from taut.data import Batches
from taut.modules import clone
from taut.techniques import Quantize

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import Figure, run

BITS = (4, 3)


def measure(options: argparse.Namespace) -> list[Figure]:
    logging.getLogger("taut").setLevel(logging.WARNING)  # each site's own line, each time
    nets = [net for net in NETS if options.only in net.name]
    return [figure for net in nets for figure in _figures(net, options)]


def _figures(net: Net, options: argparse.Namespace) -> list[Figure]:
    quick = options.quick
    torch.manual_seed(options.seed)
    train, test = net.data(quick)
    task, model = taut.Task(train=train, test=test), net.build()
    taut.recover(model, task, taut.Recover(epochs=1, distill=0.0) if quick else net.training)
    held = taut.Task(train=test, test=test).calibration_loss(len(test.inputs))
    whole, score = held(model), task.evaluate(model)
    print(f"{net.name} as it is: loss {whole:.4f}, score {score:.4f}")
    seen = 48 if quick else 1024
    few = taut.Task(train=Batches(train.inputs[:seen], train.targets[:seen], 64), test=test)
    figures = []
    for bits in BITS:
        lost, scores = {}, {}
        for method in ("affine", "gptq"):
            rounded = taut.apply(
                clone(model), Quantize(bits=bits, method=method, only="!embedding"), few
            )
            lost[method], scores[method] = held(rounded) - whole, task.evaluate(rounded)
            print(f"{net.name}, {bits} bits, {method}: loss {held(rounded):.4f}")
        scored = f"{scores['affine']:.4f} and {scores['gptq']:.4f} of {score:.4f}"
        one = Figure(
            name=f"{net.name}, {bits} bits: loss added by second-order rounding",
            paper=f"{lost['affine']:.4f}; scores {scored}",
            ours=lost["gptq"], asked=lost["affine"] / 3, at_most=True,
            command=f"quantize(bits={bits}, method='gptq', only='!embedding')",
        )  # fmt: skip
        figures.append(one)
    return figures


if __name__ == "__main__":
    run("Weights of few bits without training", measure, beside="plain rounding")
