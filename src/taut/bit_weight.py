"""The bit weight: each weight is a sum of a few scaled signs, kept and run as bits.

W[o, i] = Σ_p scale[p, o] · B[p, o, i],    B = +1 where the bit is set, −1 where it is not
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from taut.coding import Coder
from taut.errors import FormatError
from taut.kernels import BitWeights, Levels, bitplane_conv2d, bitplane_matmul
from taut.packed import Meta, PackedWeight, Pair, ReadChild, register_format

MOST_PLANES = 4


@register_format("bits.v1")
class BitWeight(PackedWeight):
    """Signs in one to four planes, with a scale for each plane, and for each row or for all.

    scale: a packed weight [planes, rows], rows = shape[0] or 1. In memory a weight of two
    dimensions or more is what the kernel reads, `words`, `scales` and `sums` of a BitWeights; a
    one-dimensional one, the values of a sparse weight, keeps its codes, [n] uint8. In a file the
    bits of one weight are one symbol, bit p for plane p.
    """

    codes: Tensor
    words: Tensor
    scales: Tensor
    sums: Tensor
    scale: PackedWeight

    def __init__(self, codes: Tensor, scale: PackedWeight) -> None:
        super().__init__(codes.shape)
        self.scale = scale
        self.planes = scale.shape[0]
        codes = codes.to(torch.uint8).cpu().contiguous()
        if codes.dim() < 2:
            self.register_buffer("codes", codes)
        else:
            self._keep(codes)
        self._by_groups: dict[int, BitWeights] = {}

    def _keep(self, codes: Tensor) -> None:
        packed = self._packed(codes, 1)
        self.register_buffer("words", packed.bits)
        self.register_buffer("scales", packed.scale)
        self.register_buffer("sums", packed.sums)

    def _packed(self, codes: Tensor, groups: int) -> BitWeights:
        planes = torch.arange(self.planes, dtype=torch.uint8, device=codes.device)
        bits = (codes[:, None] >> planes.reshape(-1, *[1] * (codes.dim() - 1)) & 1).bool()
        scale = self.scale.dense().T.expand(self.shape[0], -1)
        return BitWeights.pack(bits, scale, groups)

    def weights(self, groups: int = 1) -> BitWeights:
        """As the kernel reads them; those of a grouped convolution are made once and kept."""
        if groups not in self._by_groups:
            self._by_groups[groups] = (
                BitWeights(self.words, self.scales, self.sums, self.shape)
                if groups == 1
                else self._packed(self.symbols(), groups)
            )
        return self._by_groups[groups]

    def forget(self) -> None:
        super().forget()
        self._by_groups = {}

    def symbols(self) -> Tensor:
        """The bits of each weight as one number: [*shape] uint8."""
        if len(self.shape) < 2:
            return self.codes
        out, channels, taps = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        rows = _dense_bytes(self.words.permute(0, 4, 1, 2, 3))
        bits = rows[..., None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1
        # [strips, 16, planes, taps, words · 64]: rows and channels are filled up
        bits = bits.reshape(-1, self.planes, taps, self.words.shape[3] * 64)[:out, ..., :channels]
        weight_of = (1 << torch.arange(self.planes, device=bits.device)).to(torch.uint8)
        codes = (bits * weight_of[:, None, None]).sum(1, dtype=torch.uint8)
        return codes.transpose(1, 2).reshape(self.shape)

    def meta(self) -> Meta:
        rows = {"rows": True} if self.scale.shape[1] != 1 else {}
        return {"planes": self.planes, **rows}

    def write(self, coder: Coder) -> None:
        codes = self.symbols().cpu().flatten().to(torch.int64).numpy()
        coder.symbols("bits", codes, 2**self.planes, self.numel)
        with coder.inside("scale"):
            self.scale.write(coder)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        planes, rows = meta.get("planes"), meta.get("rows", False)
        if type(planes) is not int or not 1 <= planes <= MOST_PLANES:
            raise FormatError(f"bits.v1: planes must lie in [1, {MOST_PLANES}], got {planes!r}")
        if type(rows) is not bool or not shape or (rows and shape[0] < 2):
            raise FormatError(
                f"bits.v1: rows, got {rows!r}, needs a shape of two rows or more, got {list(shape)}"
            )
        codes = torch.from_numpy(coder.symbols("bits", None, 2**planes, math.prod(shape)))
        return cls(codes.reshape(shape), child("scale", (planes, shape[0] if rows else 1)))

    def dense(self) -> Tensor:
        codes, scale = self.symbols(), self.scale.dense()
        total = torch.zeros(self.shape, device=codes.device)
        for plane, of_rows in enumerate(scale):
            signs = 2.0 * (codes >> plane & 1) - 1
            total += signs * of_rows.reshape(-1, *[1] * (codes.dim() - 1))
        return total

    def matmul(self, x: Tensor) -> Tensor:
        if len(self.shape) != 2 or not x.is_floating_point():
            return super().matmul(x)
        return bitplane_matmul(x, self.weights())

    def matmul_levels(self, x: Tensor, levels: Levels) -> Tensor | None:
        return bitplane_matmul(x, self.weights(), levels) if len(self.shape) == 2 else None

    def conv2d_levels(
        self, x: Tensor, levels: Levels, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> Tensor | None:
        if len(self.shape) != 4:
            return None
        return bitplane_conv2d(x, self.weights(groups), levels, stride, padding, dilation)

    def rows(self, index: Tensor) -> Tensor:
        if len(self.shape) != 2:
            return super().rows(index)
        flat = index.flatten()
        picked = _dense_bytes(self.words[flat // 16, :, 0, :, flat % 16])  # [n, planes, bytes]
        bits = picked[..., None] >> torch.arange(8, dtype=torch.uint8, device=picked.device)
        signs = 2.0 * (bits & 1).reshape(len(flat), self.planes, -1)[..., : self.shape[1]] - 1
        scale = self.scale.dense().expand(-1, self.shape[0])[:, flat].T  # [n, planes]
        return (signs * scale[..., None]).sum(1).reshape(*index.shape, self.shape[1])

    def operands(self) -> tuple[Tensor, Tensor | None]:
        if len(self.shape) != 1 or self.scale.shape[1] != 1:
            return super().operands()
        every = torch.arange(2**self.planes, dtype=torch.uint8, device=self.codes.device)
        bits = every >> torch.arange(self.planes, dtype=torch.uint8, device=every.device)[:, None]
        signs = 2.0 * (bits & 1) - 1
        return self.codes, (signs * self.scale.dense()).sum(0)


def _dense_bytes(words: Tensor) -> Tensor:
    """The bytes of words in the order of their dimensions: [..., n] int64 → [..., 8 n] uint8."""
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
