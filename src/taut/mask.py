"""A mask: which entries of a weight are there, and what of the others is watched in training."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from taut.packed import PackedWeight
from taut.pattern import largest
from taut.recoding import Form, Pack
from taut.sparse_weight import SparseWeight


class Mask(Form):
    """weight = core · mask. mask: bool of the core's shape.

    kept: how many entries are to be left once a schedule, if the mask follows one, is through.
    followed: whether it has begun to follow one; set it where the choice is to stand. What the
    core holds under the mask stays as it was, so that a schedule can open the mask again.
    """

    mask: Tensor
    kept: Tensor
    followed: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("kept", mask.sum())
        self.register_buffer("followed", torch.tensor(False))
        self.straight_through = False
        """Whether entries that are not there get the gradient that they would have."""
        self.gathers = ""
        """What backward passes add up in `gathered`: "gradient", "movement", or nothing.

        gradient: of the weight, dense, where the core's own is masked. movement: -gradient · core.
        """
        self.gathered: Tensor | None = None

    def forward(self, core: Tensor) -> Tensor:
        weight = core * self.mask
        if self.straight_through:
            weight = core + (weight - core).detach()
        if self.gathers and weight.requires_grad:
            weight.register_hook(partial(self._gather, core.detach()))  # type: ignore[no-untyped-call]
        return weight

    def _gather(self, core: Tensor, gradient: Tensor) -> None:
        part = gradient if self.gathers == "gradient" else -gradient * core
        part = part.detach().nan_to_num(0.0, 0.0, 0.0)  # a step that a loss scaler will skip
        self.gathered = part if self.gathered is None else self.gathered + part

    def choose(self, scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
        """The mask that a cut leaves, of all entries or of those in a mask."""
        return largest(scores, count, among)

    def matters(self, core: Tensor, outer: Tensor | None) -> Tensor | None:
        return self.mask if outer is None else self.mask & outer

    def clear(self, core: Tensor | None, where: Tensor) -> bool:
        self.mask[where] = False
        return True

    def settled(self) -> bool:
        return bool(self.mask.sum() <= self.kept)

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        mask = self.mask if keep is None else self.mask[keep]
        kept = self.mask if keep is None else self.mask & keep
        return SparseWeight(mask, inner(kept))
