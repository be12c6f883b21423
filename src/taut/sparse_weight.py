"""The sparse weight: which weights are there, and their values, packed in any way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from taut.coding import Coder
from taut.errors import FormatError
from taut.kernels.sparse import pack_rows, sparse_conv2d, sparse_matmul, unpack_rows
from taut.packed import Meta, PackedWeight, Pair, ReadChild, register_format


@register_format("sparse.v1")
class SparseWeight(PackedWeight):
    """Which weights are there, and their values, packed in any way.

    In memory: compressed rows of [out, in] (later dimensions joined), starts [out + 1] int32 and
    columns [n] uint16 (int32 for wide rows), and values, a packed weight of shape [n]. In a file
    the rows are a bitmap.
    """

    starts: Tensor
    columns: Tensor
    values: PackedWeight

    def __init__(self, mask: Tensor, values: PackedWeight) -> None:
        super().__init__(mask.shape)
        starts, columns = pack_rows(mask.cpu().flatten().nonzero().squeeze(1), self._matrix())
        self.register_buffer("starts", starts)
        self.register_buffer("columns", columns)
        self.values = values

    def _matrix(self) -> tuple[int, int]:
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.numel // max(rows, 1)

    @property
    def positions(self) -> Tensor:
        """Where the values belong: [n], row-major, rising."""
        return unpack_rows(self.starts, self.columns, self._matrix()[1])

    def write(self, coder: Coder) -> None:
        mask = torch.zeros(self.numel, dtype=torch.int64)
        mask[self.positions.cpu()] = 1
        rows, columns = self._matrix()
        coder.bitmap("positions", mask.reshape(rows, columns).numpy(), rows, columns)
        with coder.inside("values"):
            self.values.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        if not shape or math.prod(shape) >= 2**31:
            raise FormatError(
                "sparse.v1 needs a shape of at least one dimension and fewer than 2**31 weights, "
                f"got {list(shape)}"
            )
        rows = shape[0] if len(shape) > 1 else 1
        columns = math.prod(shape) // max(rows, 1)
        mask = torch.from_numpy(coder.bitmap("positions", None, rows, columns))
        return cls(mask.reshape(shape), child("values", (int(mask.sum()),)))

    def dense(self) -> Tensor:
        values = self.values.dense()
        flat = torch.zeros(self.numel, dtype=values.dtype, device=values.device)
        flat[self.positions] = values
        return flat.reshape(self.shape)

    def matmul(self, x: Tensor) -> Tensor:
        values, table = self.values.operands()
        return sparse_matmul(x, self.starts, self.columns, values, table=table)

    def conv2d(
        self, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor:
        values, table = self.values.operands()
        kernel = (1, *self.shape[2:]) if len(self.shape) == 3 else self.shape[2:]
        return sparse_conv2d(
            x, self.starts, self.columns, values, (kernel[0], kernel[1]), stride, padding,
            dilation, groups, table=table,
        )  # fmt: skip

    def count_nonzero(self) -> int:
        return self.values.count_nonzero()


def sparse_bytes(
    count: int, kept: int, inner: Callable[[int], float] | None = None, *, by_size: bool = True
) -> float:
    """Predicted bytes of the file for `count` weights of which so many are kept.

    inner: gives the bytes of so many values; by default they are float16. by_size: whether the
    largest magnitudes were kept. The low byte of a value is noise. The high one holds sign,
    exponent and two digits: the fewer are kept by size, the closer together magnitudes lie.
    """
    p = kept / count
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) if p < 1 else 0.0
    spread = p if by_size else max(p, 0.6)
    octaves = -math.log2(1 - spread) if spread < 1 else math.inf
    high_bits = 1.3 + min(4.0, math.log2(1 + 4 * octaves))
    values = kept * (1 + high_bits / 8) if inner is None else inner(kept)
    return count * entropy / 8 + values
