"""Penalties on the weights while they train, so that they can be removed or written shorter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.modules import device_of
from taut.technique import Setting, option, register_step


@register_step
@dataclass(frozen=True, kw_only=True)
class Regularise(Setting):
    """Add a penalty on the weights to the loss of the recoveries that follow.

    l1: weight · Σ|w| over what is trained of every matrix and filter.
    """

    kind: str = option("l1", choices=("l1",), help="the penalty")
    weight: float = option(1e-5, low=0, help="its price, in units of the loss")

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty on the network as it stands, a differentiable scalar."""
        total = torch.zeros((), device=device_of(model))
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() >= 2:
                total = total + parameter.abs().sum()
        return self.weight * total
