"""The price of a byte of the file, while a network trains: fixed, or steered to a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.modules import device_of
from taut.recoding import Form, chains_of
from taut.technique import Setting, option, register_step


@register_step
@dataclass(frozen=True, kw_only=True)
class Aim(Setting):
    """Let the recoveries that follow end at a file of this size, by steering the price of a byte.

    For techniques that tell what they take in the file, like code_length. A price given as
    recover(bytes_weight=…) is where the steering starts.
    """

    size_bytes: int = option(100_000, low=1, unit="byte", help="of the whole file")


class Price:
    """What a byte of the file costs in the loss, as a training goes on.

    Without an aim it rises to `weight` over the first third, so that the weights can make room.
    With one it rises while the file is larger than it should be by now, which falls exponentially
    from the first size to the goal and reaches that when half of the training is done: a
    proportional and an integral part of the error, in logarithms, so that neither the loss's unit
    nor the number of steps matters.
    """

    def __init__(self, model: nn.Module, weight: float, settings: Sequence[Setting]) -> None:
        self.weight = weight
        self.aim = next((s for s in settings if isinstance(s, Aim)), None)
        if (self.aim or weight) and not coded_bytes(model).requires_grad:
            asked = self.aim or f"bytes_weight={weight}"
            raise RecipeError(
                f"recover: {asked} prices the bytes of the file, but no site tells what it takes; "
                "put code_length before"
            )
        goal = self.aim.size_bytes if self.aim else 1
        self.rest = _uncoded_bytes(model)
        self.log_price = math.log(weight or _FIRST / goal)
        self.first = self.progress = 0.0

    def cost(self, model: nn.Module, progress: float) -> Tensor | float:
        """What the file costs at this share of the training: a differentiable scalar."""
        if self.aim is None and not self.weight:
            return 0.0
        coded = coded_bytes(model)
        return self.now(progress, float(coded.detach())) * coded

    def now(self, progress: float, coded: float) -> float:
        """The price of a byte, where the forms tell so many."""
        if self.aim is None:
            return self.weight * min(1.0, 3 * progress)
        size = math.log(coded + self.rest)
        self.first = self.first or size
        done = min(1.0, progress / _REACHED)
        error = size - (1 - done) * self.first - done * math.log(self.aim.size_bytes)
        error = max(-1.0, min(1.0, error))
        self.log_price += _INTEGRAL * error * (progress - self.progress)
        self.log_price = min(self.log_price, _HIGHEST - math.log(self.aim.size_bytes))
        self.progress = progress
        return math.exp(self.log_price + _PROPORTIONAL * error)

    def haste(self, rate: float, steps: int) -> float:
        """How many times faster than weights scales learn, in a training of so many steps.

        An optimizer like Adam moves a number by its rate a step, whatever the price: where that is
        too little for a scale to get anywhere, a higher price would only ruin the weights.
        """
        if self.aim is None or rate <= 0:
            return 1.0
        return max(1.0, min(_WAY / max(steps, 1), _STRIDE) / rate)

    def state_dict(self) -> dict[str, float]:
        return {"log_price": self.log_price, "first": self.first, "progress": self.progress}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.log_price, self.first = state["log_price"], state["first"]
        self.progress = state["progress"]


_REACHED = 0.5
_WAY = 5.0  # what a scale's logarithm must be able to move by in all
_STRIDE = 0.25  # and at most in a step: with longer ones few steps would only overshoot
_FIRST = 0.02  # units of the loss for the whole file: a cross-entropy of a network that knows
_PROPORTIONAL, _INTEGRAL = 4.0, 60.0
_HIGHEST = math.log(1e3)  # for the whole file: where this does not make it small, nothing does


def coded_bytes(model: nn.Module) -> Tensor:
    """What the forms that can tell estimate to take in the file: differentiable, a scalar."""
    total = torch.zeros((), device=device_of(model))
    for _, links, core in chains_of(model):
        matters: Tensor | None = None
        for form, its_core in links.stages(core):
            bits = form.rate(its_core, matters)
            matters = form.matters(its_core, matters)
            if bits is not None:
                total = total + bits / 8
    return total


def scales_of(model: nn.Module) -> list[nn.Parameter]:
    """The scales of all forms that tell what they take."""
    forms = (form for _, links, _ in chains_of(model) for form in links.forms)
    return [p for form in forms if isinstance(form, Form) for p in form.log_scales()]


def _uncoded_bytes(model: nn.Module) -> float:
    """About what a file takes for all that forms do not tell: plain numbers, names, the header."""
    coded = {id(core) for _, _, core in chains_of(model)}
    chains = [links for _, links, _ in chains_of(model)]
    inside = {id(t) for links in chains for t in (*links.parameters(), *links.buffers())}
    plain = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in coded | inside]
    return 60.0 + 10.0 * len(coded) + sum(2.0 * t.numel() for t in plain if t.dim())
