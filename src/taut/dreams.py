"""Training data out of a trained network, where there are no other: DeepInversion.

    input* = argmin over x of  cross-entropy(network(x), class)
             + statistics · Σ over batch norms (‖mean(x) - running mean‖ + ‖var(x) - running var‖)
             + smoothness · total variation(x) + size · ‖x‖²

mean(x), var(x): of what reaches each batch norm, per channel; both norms are Euclidean. Yin et
al.: Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion (CVPR 2020). Where we
differ: the last two terms are means over the examples, all norms weigh alike, and images are
rolled by up to `shift` pixels before each step but not flipped, so that digits stay digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.data import Batches
from taut.distances import between_outputs
from taut.errors import DataError
from taut.modules import device_of

_Norm = nn.modules.batchnorm._BatchNorm


def dream(
    network: nn.Module,
    example: Tensor,
    *,
    examples: int = 256,
    batch_size: int = 64,
    steps: int = 200,
    learning_rate: float = 0.1,
    statistics: float = 1.0,
    smoothness: float = 1e-3,
    size: float = 1e-5,
    shift: int = 0,
    compete: float = 0.0,
    student: nn.Module | None = None,
    seed: int = 0,
) -> Batches:
    """Inputs that the network takes for data it was trained on, with their classes, as batches.

    network: a classifier, [n, ...] → [n, classes], with batch norms that know their statistics; it
    comes back untouched. example: [n, ...], any input of the right shape and type: its values do
    not matter. Every class comes up equally often. compete: also look for what the student does
    not know, by -compete · JS(network, student) (adaptive DeepInversion). The same seed gives the
    same data. Raises DataError where there is nothing to learn from.

        task = taut.Task(train=dream(network, torch.zeros(1, 3, 32, 32)), test=...)
    """
    if not example.is_floating_point():
        raise DataError(
            f"dream: an input must be of floats to be improved step by step, got {example.dtype}; "
            "train on real data"
        )
    device = device_of(network)
    with _frozen(network), _frozen(student), _statistics(network) as seen:
        random = torch.Generator().manual_seed(seed)
        classes = _classes(network, example.to(device))
        inputs, targets = [], torch.arange(examples) % classes
        for target in torch.split(targets, batch_size):
            x = torch.randn(len(target), *example.shape[1:], generator=random)
            x = x.to(device, example.dtype).requires_grad_()
            optimizer = torch.optim.Adam([x], lr=learning_rate)
            for _ in range(steps):
                seen.clear()
                optimizer.zero_grad()
                shown = _rolled(x, shift, random)
                output = network(shown)
                loss = F.cross_entropy(output, target.to(device))
                loss = loss + statistics * torch.stack(seen).sum() + smoothness * _variation(x)
                loss = loss + size * x.square().flatten(1).sum(1).mean()
                if student is not None and compete:
                    other = student(shown)
                    loss = loss - compete * between_outputs("js", other, output, 1, 1.0, None)
                torch.autograd.backward(loss)
                optimizer.step()
            inputs.append(x.detach().cpu())
    return Batches(torch.cat(inputs), targets, batch_size, shuffle=True)


@contextmanager
def _frozen(network: nn.Module | None) -> Iterator[None]:
    """In eval mode, and without gradients of its own; both are put back."""
    if network is None:
        yield
        return
    modes = {m: m.training for m in network.modules()}
    wanted = {p: p.requires_grad for p in network.parameters()}
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


@contextmanager
def _statistics(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each batch norm adds how far its inputs are from what it remembers."""
    norms = [m for m in network.modules() if isinstance(m, _Norm) and m.running_mean is not None]
    if not norms:
        raise DataError(
            f"dream: {type(network).__name__} has no batch norm with running statistics, and "
            "nothing else in it tells what its data looked like; train on real data"
        )
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, _Norm)
        x = args[0].transpose(0, 1).flatten(1)
        mean, var = x.mean(1), x.var(1, correction=0)
        assert module.running_mean is not None
        assert module.running_var is not None
        seen.append((mean - module.running_mean).norm() + (var - module.running_var).norm())

    handles = [m.register_forward_pre_hook(before) for m in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _classes(network: nn.Module, example: Tensor) -> int:
    with torch.no_grad():
        output = network(example)
    if not isinstance(output, Tensor) or output.dim() != 2:
        form = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"dream: the network must be a classifier, [n, ...] → [n, classes], got outputs {form}"
        )
    return output.shape[1]


def _rolled(x: Tensor, shift: int, random: torch.Generator) -> Tensor:
    if not shift or x.dim() != 4:
        return x
    by = torch.randint(-shift, shift + 1, (2,), generator=random).tolist()
    return torch.roll(x, by, (2, 3))


def _variation(x: Tensor) -> Tensor:
    """Σ of squared steps between neighbours of an image, a mean over the examples."""
    if x.dim() != 4:
        return x.new_zeros(())
    down, right = x.diff(dim=2), x.diff(dim=3)
    return (down.square().flatten(1).sum(1) + right.square().flatten(1).sum(1)).mean()
