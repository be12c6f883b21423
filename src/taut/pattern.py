"""Which weights stay, by their scores: the largest of all, N of every M in a row, or whole blocks.

A weight is seen as a matrix [out, in], later dimensions joined. The largest are chosen one by one,
or as a pattern says:

    N:M   the N largest of every M neighbours in a row; a shorter rest of it keeps as many, or all
    R×1   blocks of R neighbouring rows and one column stay or go as one, by the sum of their scores

Where R does not divide the rows, the last block of a column has fewer, and its sum is scaled up to
that of a whole one. A count of weights to keep is rounded down, to whole blocks, one at least, or
to as many of every group, N at least.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.errors import RecipeError

BLOCK_ROWS = (4, 16)
"""Rows of the blocks that the kernel takes."""


def largest(
    scores: Tensor, count: int, among: Tensor | None = None, pattern: Pattern | None = None
) -> Tensor:
    """The `count` largest scores, of all or of those that a bool tensor selects: bool.

    pattern: what stays or goes together; as many then stay as it lets, at most `count`.
    """
    if pattern is not None:
        return pattern.choose(scores, count, among)
    scores = scores if among is None else scores.masked_fill(~among, -math.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool).flatten()
    chosen[scores.flatten().topk(min(count, scores.numel())).indices] = True
    chosen = chosen.reshape(scores.shape)
    return chosen if among is None else chosen & among


class Pattern(ABC):
    """Weights that stay or go together. Its text is what a recipe calls it."""

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read `2:4` or `16x1`. Raises RecipeError for what is no pattern.

        >>> Pattern.parse("2:4"), Pattern.parse("16x1")
        (NOfM(keep=2, of=4), Blocks(rows=16))
        """
        block = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text)
        if block:
            if block[2] != "1" or int(block[1]) not in BLOCK_ROWS:
                raise RecipeError(
                    "prune_weights: blocks are 4x1 or 16x1 (so many neighbouring outputs and one "
                    f"input, as the kernel takes them), got {text!r}"
                )
            return Blocks(int(block[1]))
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        keep, of = (int(n) for n in found.groups()) if found else (0, 0)
        if not 0 < keep < of <= 128:
            raise RecipeError(
                "prune_weights: a pattern is N:M with 0 < N < M <= 128, like '2:4' (two of every "
                "four weights in a row stay), or blocks of outputs, '4x1' or '16x1', got "
                f"{text!r}"
            )
        return NOfM(keep, of)

    @abstractmethod
    def misfit(self, shape: Sequence[int]) -> str:
        """What a weight of this shape lacks to be cut in this way; nothing where it can be."""

    @abstractmethod
    def choose(self, scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
        """The best by score, at most `count` weights, of those that a bool tensor selects: bool."""

    @abstractmethod
    def compared(self, scores: Tensor) -> Tensor:
        """For each weight the score by which it stays or goes, of the scores' shape."""

    @abstractmethod
    def cover(self, mask: Tensor) -> Tensor | None:
        """The smallest mask of this pattern that holds all of this one; None where none does."""

    @abstractmethod
    def position_bits(self, shape: Sequence[int], kept: int) -> float:
        """Bits that tell which weights of this shape stay, where one choice is as good as another.

        kept: how many do.
        """


@dataclass(frozen=True)
class NOfM(Pattern):
    """`keep` of every `of` weights in a row stay."""

    keep: int
    of: int

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def kept(self, shape: Sequence[int], keep: int | None = None) -> int:
        """How many weights of this shape stay, of every group so many (or the pattern's own)."""
        keep, (rows, columns) = self.keep if keep is None else keep, _matrix(shape)
        whole, rest = divmod(columns, self.of)
        return rows * (whole * keep + min(keep, rest))

    def misfit(self, shape: Sequence[int]) -> str:
        columns = _matrix(shape)[1]
        return "" if columns >= self.of else f"rows of {self.of} inputs at least, and has {columns}"

    def choose(self, scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
        """Of every group the largest: never fewer than `keep`, more as the count allows."""
        keep = self.keep
        while keep < self.of and self.kept(scores.shape, keep + 1) <= count:
            keep += 1
        scores = scores if among is None else scores.masked_fill(~among, -math.inf)
        chosen = self._first(scores.reshape(_matrix(scores.shape)), keep).reshape(scores.shape)
        return chosen if among is None else chosen & among

    def compared(self, scores: Tensor) -> Tensor:
        return scores

    def cover(self, mask: Tensor) -> Tensor | None:
        flat = mask.reshape(_matrix(mask.shape))
        groups = torch.unflatten(F.pad(flat, (0, -flat.shape[1] % self.of)), 1, (-1, self.of))
        if bool((groups.sum(2) > self.keep).any()):
            return None
        return self._first(flat.float(), self.keep).reshape(mask.shape)

    def _first(self, scores: Tensor, keep: int) -> Tensor:
        """The largest of every group of a matrix, of equal ones the first."""
        padded = F.pad(scores, (0, -scores.shape[1] % self.of), value=-math.inf)
        groups = torch.unflatten(padded, 1, (-1, self.of))
        best = groups.argsort(dim=2, descending=True, stable=True)[..., :keep]
        chosen = torch.zeros_like(groups, dtype=torch.bool).scatter(2, best, True)
        return chosen.flatten(1)[:, : scores.shape[1]]

    def position_bits(self, shape: Sequence[int], kept: int) -> float:
        rows, columns = _matrix(shape)
        whole, rest = divmod(columns, self.of)
        last = max(1, math.comb(rest, self.keep))
        return rows * (whole * math.log2(math.comb(self.of, self.keep)) + math.log2(last))


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of `rows` neighbouring outputs and one input stay or go as one."""

    rows: int

    def __str__(self) -> str:
        return f"{self.rows}x1"

    def misfit(self, shape: Sequence[int]) -> str:
        outputs = shape[0] if len(shape) > 1 else 1
        return "" if outputs >= self.rows else f"{self.rows} outputs at least, and has {outputs}"

    def choose(self, scores: Tensor, count: int, among: Tensor | None = None) -> Tensor:
        """The blocks of the largest sums whose weights are at most `count`, but one at least."""
        if count <= 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        there = torch.ones_like(scores, dtype=torch.bool) if among is None else among
        sizes = self._sums(there.long())
        sums = self._scaled(scores.masked_fill(~there, 0.0)).masked_fill(sizes == 0, -math.inf)
        order = sums.flatten().argsort(descending=True, stable=True)
        fit = int((sizes.flatten()[order].cumsum(0) <= count).sum())
        chosen = torch.zeros_like(order, dtype=torch.bool)
        chosen[order[: max(1, fit)]] = True
        return self.spread(chosen.reshape(sums.shape), scores.shape) & there

    def compared(self, scores: Tensor) -> Tensor:
        return self.spread(self._scaled(scores), scores.shape)

    def cover(self, mask: Tensor) -> Tensor | None:
        return self.spread(self.blocks(mask), mask.shape)

    def blocks(self, mask: Tensor) -> Tensor:
        """Which blocks hold anything of a mask: bool [⌈out / rows⌉, in]."""
        return self._sums(mask.long()) > 0

    def spread(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """For each weight of this shape what its block has. blocks: [⌈out / rows⌉, in]."""
        return blocks.repeat_interleave(self.rows, 0)[: shape[0]].reshape(*shape)

    def _sums(self, each: Tensor) -> Tensor:
        """The sum over each block: [⌈out / rows⌉, in]."""
        flat = each.flatten(1)
        padded = F.pad(flat, (0, 0, 0, -len(flat) % self.rows))
        return padded.reshape(-(-len(flat) // self.rows), self.rows, flat.shape[1]).sum(1)

    def _scaled(self, scores: Tensor) -> Tensor:
        """The sums, those of the last blocks as if they were whole."""
        sums = self._sums(scores)
        sums[-1:] *= self.rows / ((len(scores) - 1) % self.rows + 1)
        return sums

    def position_bits(self, shape: Sequence[int], kept: int) -> float:
        rows, columns = _matrix(shape)
        p = min(1.0, kept / max(1, rows * columns))
        entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0
        return -(-rows // self.rows) * columns * entropy


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a weight of this shape; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(rows, 1)
