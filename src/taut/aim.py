"""Steering the price of a byte, so that a recovery ends at a file of the size asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from taut.technique import Setting, option, register_step


@register_step
@dataclass(frozen=True, kw_only=True)
class Aim(Setting):
    """Let the recoveries that follow end at a file of this size, by steering the price of a byte.

    For techniques that tell what they take in the file, like code_length. A price given as
    recover(bytes_weight=…) is where the steering starts.
    """

    size_bytes: int = option(100_000, low=1, unit="byte", help="of the whole file")


class Steering:
    """A controller: the price rises while the file is larger than it should be by now.

    What it should be falls exponentially from the first size to the goal, which it reaches when
    seven tenths of the training are done. The price is a proportional and an integral part of the
    error, in logarithms, so neither the loss's unit nor the number of steps matters.
    """

    def __init__(self, goal: int, price: float) -> None:
        self.goal = goal
        self.log_price = math.log(price or _FIRST / goal)
        self.first = 0.0
        self.progress = 0.0

    def price(self, progress: float, size_bytes: float) -> float:
        """What a byte costs now. size_bytes: of the whole file, as it is estimated."""
        self.first = self.first or size_bytes
        done = min(1.0, progress / _REACHED)
        wanted = (1 - done) * math.log(self.first) + done * math.log(self.goal)
        error = max(-1.0, min(1.0, math.log(size_bytes) - wanted))
        self.log_price += _INTEGRAL * error * (progress - self.progress)
        self.progress = progress
        return math.exp(self.log_price + _PROPORTIONAL * error)

    def state(self) -> dict[str, Any]:
        return vars(self)

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


_REACHED = 0.7
_FIRST = 0.02  # units of the loss for the whole file: a cross-entropy of a network that knows
_PROPORTIONAL, _INTEGRAL = 2.0, 20.0
