"""The indexed weight: small indices into one table of values, and the kernels that run it."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.kernels import lookup_lstm, lookup_matmul
from taut.kernels.lookup import pack_indices, unpack_indices
from taut.packed import PackedWeight


class IndexedWeight(PackedWeight):
    """weight = entries()[index], of at most 256 entries. What the entries are, subclasses say.

    codes: what `pack_indices` makes of [out, in] indices (later dimensions joined), so that a
    3-bit index takes three bits; those of a one-dimensional weight, the values of a sparse one,
    stay [n] uint8, as sparse products read them.
    """

    codes: Tensor

    def __init__(self, index: Tensor, count: int) -> None:
        super().__init__(index.shape)
        self.bits = max(1, (count - 1).bit_length())
        codes = index.to(torch.uint8).cpu().contiguous()
        if index.dim() > 1:
            codes = pack_indices(codes.flatten(1), self.bits)
        self.register_buffer("codes", codes)
        self._floats: Tensor | None = None

    @abstractmethod
    def entries(self) -> Tensor:
        """The values that the indices stand for: [count] float32."""

    @property
    def index(self) -> Tensor:
        """The indices, [*shape] uint8."""
        if len(self.shape) < 2:
            return self.codes
        columns = math.prod(self.shape[1:])
        return unpack_indices(self.codes, self.bits, columns).reshape(self.shape)

    def float_table(self) -> Tensor:
        """[2**bits] float32, kept between calls; entries that no weight uses are zero."""
        if self._floats is None:
            table = self.entries().float()
            self._floats = F.pad(table, (0, 2**self.bits - len(table)))
        return self._floats

    def forget(self) -> None:
        super().forget()
        self._floats = None

    def dense(self) -> Tensor:
        return self.entries()[self.index.int()]

    def matmul(self, x: Tensor) -> Tensor:
        return lookup_matmul(x, self.codes, self.float_table()[None, None], self.bits)

    def lstm(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        table = self.float_table()[None, None]
        return lookup_lstm(inputs, hidden, cell, self.codes, table, self.bits)

    def rows(self, index: Tensor) -> Tensor:
        columns = math.prod(self.shape[1:])
        picked = unpack_indices(self.codes[index.flatten()], self.bits, columns)
        return self.entries()[picked.int()].reshape(*index.shape, *self.shape[1:])

    def operands(self) -> tuple[Tensor, Tensor | None]:
        return (self.codes, self.float_table()) if len(self.shape) == 1 else super().operands()

    def count_nonzero(self) -> int:
        return int((self.entries() != 0)[self.index.int()].sum())
