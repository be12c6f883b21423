"""Forms that choose by noise which weights to keep while they train, then stand by the choice."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from taut.packed import PackedWeight
from taut.recoding import Form, Pack
from taut.sparse_weight import SparseWeight

SETTLES = 0.7
"""How far into a training the choice is made; the rest of it trains what was kept."""


class Selection(Form):
    """weight = core · kept, with kept of 0 and 1; while training, what `noisy` makes of the core.

    The choice is free for the first seven tenths of a training, in which the price of a byte has
    its effect. Then the mask is what `keeps` says, the noise ends, and what was kept trains on.
    mask: bool of the core's shape, meaningful once fixed, a bool, is true.
    """

    mask: Tensor
    fixed: Tensor

    def __init__(self, core: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(core, dtype=torch.bool))
        self.register_buffer("fixed", torch.tensor(False))

    @abstractmethod
    def noisy(self, core: Tensor) -> Tensor:
        """The weight while it is still open what is kept: a sample, differentiable."""

    @abstractmethod
    def merit(self, core: Tensor) -> Tensor:
        """How much speaks for each weight, of the core's shape: above 0 it is kept."""

    @abstractmethod
    def bits(self, core: Tensor, outer: Tensor | None) -> Tensor:
        """What `rate` gives while it is still open what is kept."""

    def keeps(self, core: Tensor) -> Tensor:
        """Which weights are kept, bool of the core's shape: at least one."""
        if bool(self.fixed):
            return self.mask
        merit = self.merit(core.detach())
        return merit > 0 if bool((merit > 0).any()) else merit == merit.max()

    def forward(self, core: Tensor) -> Tensor:
        if self.training and not bool(self.fixed):
            return self.noisy(core)
        return core * self.keeps(core)

    def rate(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return None if bool(self.fixed) else self.bits(core, outer)

    def advance(self, core: Tensor, progress: float) -> None:
        if progress >= SETTLES and not bool(self.fixed):
            self.mask.copy_(self.keeps(core))
            self.fixed.fill_(True)

    def settled(self) -> bool:
        return bool(self.fixed)

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        kept = self.keeps(core)
        return kept if outer is None else kept & outer

    def clear(self, core: Tensor | None, where: Tensor) -> bool:
        if bool(self.fixed):
            self.mask[where] = False
        return bool(self.fixed)

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        kept = self.keeps(core)
        if keep is None:
            return SparseWeight(kept, inner(kept))
        return SparseWeight(kept[keep], inner(kept & keep))
