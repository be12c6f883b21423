"""bitplane_matmul: products of numbers that are sums of scaled bits.

    W[o, k] = Σ_p scale[o, p] · B[o, p, k]        B = +1 where the bit is set, −1 where it is not
    X[n, k] = offset + Σ_q scale[q] · A[n, q, k]  for activations split into bits (`Levels`)

Binary and ternary networks, k-bit activations and learned levels are all this one product, and its
inner loop counts the bits in which A and B differ. Floats and half floats may also meet bit weights
as they are. csrc/bitplane/bitplane.h holds the same formulas in C++.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.kernels import native, reference


@dataclass(frozen=True, kw_only=True)
class Levels:
    """How activations become bits: the level is how many thresholds x reaches (x ≥ t).

    The bits of pattern[level] are the planes, and the level stands for
    offset + Σ_q ±scale[q]. NaN reaches no threshold. int8 activations are their own bits.

    thresholds: [levels − 1, 1 or channels] float32, rising along the first; pattern: [levels]
    uint8; scale: [planes] float32. pad: what the border of a convolution holds.
    """

    thresholds: Tensor
    pattern: Tensor
    scale: Tensor
    offset: float = 0.0
    pad: float = 0.0
    takes_int8: bool = False

    @functools.cached_property
    def lowest(self) -> float:
        """What bits of which none is set stand for."""
        return self.offset - float(self.scale.sum())

    @classmethod
    def sign(cls, threshold: Tensor | float = 0.0, pad: float = 0.0) -> Levels:
        """+1 where x reaches the threshold ([channels], or one), −1 elsewhere."""
        t = torch.as_tensor(threshold, dtype=torch.float32).reshape(1, -1)
        pattern = torch.tensor([0, 1], dtype=torch.uint8)
        return cls(thresholds=t, pattern=pattern, scale=torch.ones(1), pad=pad)

    @classmethod
    def uniform(cls, bits: int, step: float, low: float = 0.0, pad: float = 0.0) -> Levels:
        """low + step · n for n in 0 … 2**bits − 1, the nearest (ties go up). bits: 1 to 4."""
        count = 2**bits
        return cls(
            thresholds=(low + step * (torch.arange(1, count) - 0.5))[:, None],
            pattern=torch.arange(count, dtype=torch.uint8),
            scale=step * 2.0 ** torch.arange(-1, bits - 1),
            offset=low + step * (count - 1) / 2,
            pad=pad,
        )

    @classmethod
    def int8(cls) -> Levels:
        """Whole numbers from −128 to 127, given as int8."""
        scale = 2.0 ** torch.arange(-1.0, 7.0)
        scale[7] = -scale[7]
        return cls(
            thresholds=torch.zeros(0, 1),
            pattern=torch.zeros(1, dtype=torch.uint8),
            scale=scale,
            offset=-0.5,
            takes_int8=True,
        )

    def decoded(self, x: Tensor) -> Tensor:
        """The numbers that stand for x, channels in its second dimension (or its last of two)."""
        if self.takes_int8:
            return x.to(torch.float32)
        shape = [1, -1] + [1] * (x.dim() - 2)
        level = torch.zeros_like(x, dtype=torch.int64)
        for threshold in self.thresholds.to(x.device):
            level += x >= threshold.reshape(shape)
        bits = self.pattern.to(x.device)[level, None] >> torch.arange(
            len(self.scale), dtype=torch.uint8, device=x.device
        )
        signs = 2.0 * (bits & 1) - 1
        return self.offset + (signs * self.scale.to(x.device)).sum(-1)


@dataclass(frozen=True)
class BitWeights:
    """Packed weights: sixteen outputs side by side, for each plane, tap and 64 channels.

    bits: [out / 16, planes, taps, words, 16] int64; scale: [planes, out] float32; sums:
    [taps + 1, out] float32, Σ_c W[o, c] of each tap and of all. `out` is rounded up to sixteens
    within each group. shape: of the weight, [out, in] or [out, in / groups, height, width].
    """

    bits: Tensor
    scale: Tensor
    sums: Tensor
    shape: tuple[int, ...]
    groups: int = 1

    @classmethod
    def pack(cls, bits: Tensor, scale: Tensor, groups: int = 1) -> BitWeights:
        """bits: [out, planes, in / groups, …] bool; scale: [out, planes] float."""
        out, planes, channels = bits.shape[:3]
        if out % groups or not 1 <= planes <= 8:
            raise ValueError(f"{out} outputs of {planes} planes do not fall into {groups} groups")
        shape = (out, channels, *bits.shape[3:])
        each, words = out // groups, -(-channels // 64)
        strips = -(-each // 16)
        flat = bits.reshape(out, planes, channels, -1)
        taps = flat.shape[-1] if channels else math.prod(bits.shape[3:])
        wide = bits.new_zeros(groups, strips * 16, planes, taps, words * 64, dtype=torch.bool)
        wide[:, :each, :, :, :channels] = flat.reshape(
            groups, each, planes, channels, taps
        ).transpose(3, 4)
        octets = wide.reshape(groups, strips, 16, planes, taps, words, 8, 8)
        weight_of = (1 << torch.arange(8, device=bits.device)).to(torch.uint8)
        packed = (octets * weight_of).sum(-1, dtype=torch.uint8).contiguous()
        sixteens = packed.view(torch.int64).squeeze(-1).permute(0, 1, 3, 4, 5, 2)
        signs = 2.0 * flat.float() - 1
        by_tap = (signs * scale[:, :, None, None]).sum((1, 2))  # [out, taps]
        sums = torch.cat([by_tap, by_tap.sum(1, keepdim=True)], 1).T

        def padded(rows: Tensor) -> Tensor:
            full = rows.new_zeros(len(rows), groups, strips * 16)
            full[:, :, :each] = rows.reshape(len(rows), groups, each)
            return full.reshape(len(rows), groups * strips * 16).float().contiguous()

        return cls(
            bits=sixteens.reshape(groups * strips, planes, taps, words, 16).contiguous(),
            scale=padded(scale.T), sums=padded(sums), shape=shape, groups=groups,
        )  # fmt: skip

    def dense(self) -> Tensor:
        """The weight, [*shape] float32."""
        out, channels = self.shape[:2]
        _, planes, taps, words, _ = self.bits.shape
        each = out // self.groups
        rows = self.bits.permute(0, 4, 1, 2, 3)
        octets = rows.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        bits = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device) & 1
        signs = 2.0 * bits.reshape(self.groups, -1, planes, taps, words * 64) - 1
        scale = self.scale.reshape(planes, self.groups, -1).permute(1, 2, 0)[:, :each]
        weight = (signs[:, :each, :, :, :channels] * scale[..., None, None]).sum(2)
        return weight.transpose(2, 3).reshape(self.shape)


def bitplane_matmul(x: Tensor, weights: BitWeights, levels: Levels | None = None) -> Tensor:
    """x [..., in] → [..., out].

    levels: how activations become bits; None leaves them the floats they are.
    """
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    out = weights.shape[0]
    if levels is None:
        if not native.runs(x, weights.bits):
            return reference.bitplane_matmul(x, weights.dense().to(x.dtype))
        y: Tensor = torch.ops.taut.bitplane_real(flat.float(), weights.bits, weights.scale, out)
        return y.reshape(*x.shape[:-1], out).to(x.dtype)
    if not _counts(x, weights, levels):
        y = reference.bitplane_matmul(levels.decoded(flat), weights.dense())
    else:
        y = torch.ops.taut.bitplane_matmul(
            flat if levels.takes_int8 else flat.float(), *_arguments(weights, levels), out
        )
    return y.reshape(*x.shape[:-1], out).to(torch.float32 if levels.takes_int8 else x.dtype)


def bitplane_conv2d(
    x: Tensor,
    weights: BitWeights,
    levels: Levels,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """x [n, in, height, width] → [n, out, height, width], with its channels last in memory.

    The border counts as `levels.pad`: 0 by default, as PyTorch pads after a sign; ±1 pads with a
    bit, as some binary networks are trained.
    """
    if x.dim() != 4:
        raise ValueError(f"bitplane_conv2d: x must be [n, in, height, width], got {list(x.shape)}")
    if not _counts(x, weights, levels):
        y = reference.bitplane_conv2d(
            levels.decoded(x), weights.dense(), levels.pad, stride, padding, dilation,
            weights.groups,
        )  # fmt: skip
        return y.to(torch.float32 if levels.takes_int8 else x.dtype)
    values = x if levels.takes_int8 else x.float()
    if values.stride(1) != 1 and values.stride(3) != 1:
        values = values.contiguous()
    counted: Tensor = torch.ops.taut.bitplane_conv2d(
        values, *_arguments(weights, levels), levels.pad - levels.lowest,
        weights.shape[0], weights.groups,
        list(weights.shape[2:]), list(stride), list(padding), list(dilation),
    )  # fmt: skip
    return counted.permute(0, 3, 1, 2).to(torch.float32 if levels.takes_int8 else x.dtype)


def _counts(x: Tensor, weights: BitWeights, levels: Levels) -> bool:
    """Whether bits are counted natively; the definition differentiates and knows every device."""
    if levels.takes_int8 != (x.dtype is torch.int8):
        raise ValueError(
            f"these levels take {'int8' if levels.takes_int8 else 'floats'}, not {x.dtype}"
        )
    if levels.takes_int8:
        return native.LOADED and x.device.type == "cpu"
    return native.runs(x, weights.bits)


def _arguments(w: BitWeights, levels: Levels) -> tuple[Tensor | float, ...]:
    return (w.bits, w.scale, w.sums, levels.scale, levels.thresholds, levels.pattern, levels.offset)


@native.fake("bitplane_matmul")
def _(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, x_scale: Tensor, thresholds: Tensor,
    pattern: Tensor, x_offset: float, out: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], out, dtype=torch.float32)


@native.fake("bitplane_real")
def _(x: Tensor, w: Tensor, w_scale: Tensor, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


@native.fake("bitplane_conv2d")
def _(
    x: Tensor, w: Tensor, w_scale: Tensor, w_sums: Tensor, x_scale: Tensor, thresholds: Tensor,
    pattern: Tensor, x_offset: float, pad: float, out: int, groups: int,
    kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
) -> Tensor:  # fmt: skip
    size = [
        (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in range(2)
    ]
    return x.new_empty(x.shape[0], *size, out, dtype=torch.float32)
