"""Ranks of many layers at once, for a budget: what is kept goes where it saves the most loss.

    least  Σ over layers of loss(ranks)    with    Σ over layers of cost(ranks) ≤ budget

loss: the share of the energy of a layer's outputs that its ranks lose (decompositions.py). cost:
numbers, or multiply-accumulates of one example. The choices of a layer, and the layer as it is, at
loss 0, give a lower convex hull; each step along it has a price, the loss for each unit of cost
that it saves. All layers' steps are taken in the order of their prices until the budget is met, and
the layer of the last step then has the best of its choices that the budget allows. No ranks that
cost as little as what stands before and after a step lose less than it does.

Everett: Generalized Lagrange multiplier method for solving problems of optimum allocation of
resources (Operations Research, 1963).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from taut.decompositions import Shape, parts
from taut.modules import device_of, to_device
from taut.trace import Example, batch_of

BUDGETS = ("macs", "bytes", "latency")
"""What a budget is of: multiply-accumulates, bytes at one width for all, time at batch 1."""


@dataclass(frozen=True)
class Choice:
    """What a layer may be: of these ranks, or without any as it is."""

    ranks: tuple[int, ...]
    cost: int
    loss: float


def spread(layers: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice for each layer, together within the budget; where none are, those of least cost.

    layers: of each the layer as it is, and its other choices in any order.
    """
    hulls = [_hull(choices) for choices in layers]
    chosen = [hull[0] for hull in hulls]
    cost, last = sum(c.cost for c in chosen), -1
    steps = ((_price(a, b), i, b) for i, hull in enumerate(hulls) for a, b in pairwise(hull))
    for _, i, choice in sorted(steps, key=lambda s: s[:2]):
        if cost <= budget:
            break
        cost += choice.cost - chosen[i].cost
        chosen[i], last = choice, i
    if cost <= budget and last >= 0:
        most = budget - cost + chosen[last].cost
        within = (c for c in layers[last] if c.cost <= most)
        chosen[last] = min(within, key=lambda c: (c.loss, c.cost))
    return chosen


def _price(a: Choice, b: Choice) -> float:
    """The loss for each unit of cost that b saves against a."""
    return (b.loss - a.loss) / (a.cost - b.cost)


def _hull(choices: Iterable[Choice]) -> list[Choice]:
    """Those that are best at some price, by falling cost and rising loss."""
    hull: list[Choice] = []
    for c in sorted(choices, key=lambda c: (-c.cost, c.loss)):
        if hull and c.cost == hull[-1].cost:
            continue
        while hull and c.loss <= hull[-1].loss:
            hull.pop()
        while len(hull) > 1 and _price(hull[-1], c) <= _price(hull[-2], hull[-1]):
            hull.pop()
        hull.append(c)
    return hull


# ---- work -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One use of a layer: rows for each example, and the sides of what comes in and goes out."""

    rows: float
    before: Shape
    after: Shape


@torch.no_grad()
def calls_of(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Example
) -> dict[str, list[Call]]:
    """How each layer (Linear, Embedding, Conv1d, Conv2d) is used in one forward, in eval mode."""
    found: dict[str, list[Call]] = {name: [] for name in layers}
    training = {m: m.training for m in model.modules()}
    device, fused = device_of(model), torch.backends.mha.get_fastpath_enabled()
    batch = max(batch_of(*example), 1)

    def seen(name: str, layer: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        sides = len(layer.kernel_size) if isinstance(layer, nn.Conv1d | nn.Conv2d) else 0
        first = next(iter((*args, *kwargs.values())))
        after = tuple(out.shape[out.dim() - sides :])
        width = out.shape[-1 - sides]
        rows = out.numel() / max(width * math.prod(after), 1) / batch
        found[name].append(Call(rows, tuple(first.shape[first.dim() - sides :]), after))

    hooks = [
        layer.register_forward_hook(
            lambda m, a, k, out, name=name: seen(name, m, a, k, out), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past their layers
        model.eval()(*to_device(example[0], device), **to_device(example[1], device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for hook in hooks:
            hook.remove()
        for module, was in training.items():
            module.training = was
    return found


def macs_of(
    kind: str, shape: Shape, ranks: Sequence[int], calls: Sequence[Call], table: bool
) -> int:
    """Multiply-accumulates of one example by the parts of a weight; without ranks by the whole.

    table: an embedding's, turned: its first part, or the whole of it, is only looked up.
    """
    every = range(len(shape) - 2)
    made = [(set(every), math.prod(shape))]
    if ranks:
        made = [(set(p.axes), math.prod(p.shape(shape[2:]))) for p in parts(kind, shape, ranks)]
    total, spanned = 0.0, set[int]()
    for i, (axes, numbers) in enumerate(made):
        spanned |= axes
        places = sum(
            c.rows * math.prod(c.after[d] if d in spanned else c.before[d] for d in every)
            for c in calls
        )
        total += 0 if table and i == 0 else numbers * places
    return round(total)
