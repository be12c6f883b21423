"""Rows in parts: the rows of one kind are packed by themselves, those of another differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor

from taut.coding import Coder
from taut.errors import FormatError
from taut.packed import Meta, PackedWeight, ReadChild, register_format

MOST_PARTS = 16


@register_format("row_parts.v1")
class RowParts(PackedWeight):
    """Which part each row is in, and the parts, each packed in any way.

    kinds: [shape[0]], the part of each row; parts: the rows of each, in their order, at least one.
    """

    kinds: Tensor
    places: Tensor

    def __init__(self, kinds: Tensor, parts: Sequence[PackedWeight]) -> None:
        super().__init__((len(kinds), *parts[0].shape[1:]))
        kinds = kinds.to("cpu", torch.uint8)
        places = torch.empty(len(kinds), dtype=torch.int32)  # of a row, in its part
        for kind, part in enumerate(parts):
            places[kinds == kind] = torch.arange(part.shape[0], dtype=torch.int32)
            self.add_module(f"part{kind}", part)
        self.register_buffer("kinds", kinds)
        self.register_buffer("places", places)

    @property
    def parts(self) -> list[PackedWeight]:
        return [cast(PackedWeight, child) for child in self.children()]

    def meta(self) -> Meta:
        return {"parts": len(self.parts)}

    def write(self, coder: Coder) -> None:
        kinds = self.kinds.cpu().to(torch.int64).numpy()
        coder.symbols("kinds", kinds, len(self.parts), len(kinds))
        for kind, part in enumerate(self.parts):
            with coder.inside(f"part{kind}"):
                part.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        count = meta.get("parts")
        if type(count) is not int or not 2 <= count <= MOST_PARTS or len(shape) < 2:
            raise FormatError(
                f"row_parts.v1 needs 2 to {MOST_PARTS} parts of at least two dimensions, got "
                f"{count!r} of {list(shape)}"
            )
        kinds = torch.from_numpy(coder.symbols("kinds", None, count, shape[0]))
        rows = kinds.bincount(minlength=count).tolist()
        if 0 in rows:
            raise FormatError(f"row_parts.v1: part {rows.index(0)} has no row")
        return cls(kinds, [child(f"part{k}", (n, *shape[1:])) for k, n in enumerate(rows)])

    def dense(self) -> Tensor:
        found = torch.cat([part.dense() for part in self.parts])
        return found[self._order()]

    def _order(self) -> Tensor:
        """Where each row lies among those of all parts, one after the other."""
        starts = torch.tensor([0, *(p.shape[0] for p in self.parts[:-1])], device=self.kinds.device)
        return starts.cumsum(0)[self.kinds.int()] + self.places

    def matmul(self, x: Tensor) -> Tensor:
        return torch.cat([part.matmul(x) for part in self.parts], -1)[..., self._order()]

    def rows(self, index: Tensor) -> Tensor:
        flat = index.flatten()
        kinds, places = self.kinds[flat], self.places[flat]
        found = torch.empty(len(flat), *self.shape[1:], device=self.kinds.device)
        for kind, part in enumerate(self.parts):
            here = kinds == kind
            found[here] = part.rows(places[here].long()).to(found.dtype)
        return found.reshape(*index.shape, *self.shape[1:])

    def count_nonzero(self) -> int:
        return sum(part.count_nonzero() for part in self.parts)
