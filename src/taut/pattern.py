"""Which weights stay, by their scores: the largest of all, or N of every M in a row."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.errors import RecipeError


def largest(scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
    """The `count` largest scores, of all or of those that a bool tensor selects: bool."""
    scores = scores if among is None else scores.masked_fill(~among, -math.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool).flatten()
    chosen[scores.flatten().topk(min(count, scores.numel())).indices] = True
    chosen = chosen.reshape(scores.shape)
    return chosen if among is None else chosen & among


@dataclass(frozen=True)
class Pattern:
    """`keep` of every `of` weights in a row stay: a row of [out, in], later dimensions joined.

    What is left at the end of a row, where its length is no multiple, keeps as many, or all.
    """

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `2:4`. Raises RecipeError for what is no pattern.

        >>> Pattern.parse("2:4")
        Pattern(keep=2, of=4)
        """
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        keep, of = (int(n) for n in found.groups()) if found else (0, 0)
        if not 0 < keep < of <= 128:
            raise RecipeError(
                "prune_weights: a pattern is N:M with 0 < N < M <= 128, like '2:4' (two of every "
                f"four weights in a row stay), got {text!r}"
            )
        return cls(keep, of)

    def kept(self, shape: Sequence[int]) -> int:
        """How many weights of this shape stay."""
        rows = shape[0] if len(shape) > 1 else 1
        whole, rest = divmod(torch.Size(shape).numel() // max(rows, 1), self.of)
        return rows * (whole * self.keep + min(self.keep, rest))

    def choose(self, scores: Tensor, among: Tensor) -> Tensor:
        """The largest of every group, of those that a bool tensor selects: bool."""
        scores = scores.masked_fill(~among, -math.inf)
        flat = scores.reshape(scores.shape[0] if scores.dim() > 1 else 1, -1)
        padded = F.pad(flat, (0, -flat.shape[1] % self.of), value=-math.inf)
        groups = torch.unflatten(padded, 1, (-1, self.of))
        best = groups.topk(self.keep).indices
        chosen = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True)
        return chosen.flatten(1)[:, : flat.shape[1]].reshape(scores.shape) & among
