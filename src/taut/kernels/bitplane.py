"""bitplane_matmul: products of numbers that are sums of scaled bits.

    W[o, k] = Σ_p scale[o, p] · B[o, p, k]        B = +1 where the bit is set, −1 where it is not
    X[n, k] = offset + Σ_q scale[q] · A[n, q, k]  for activations split into bits (`Levels`)

Binary and ternary networks, k-bit activations and learned levels are all this one product, and its
inner loop counts the bits in which A and B differ. Floats and half floats may also meet bit weights
as they are. csrc/bitplane/bitplane.h holds the same formulas in C++.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    lowest: float = field(init=False, repr=False)
    """What bits of which none is set stand for; a number from the start, so that models export."""

    def __post_init__(self) -> None:
        levels, planes = len(self.pattern), len(self.scale)
        if not (1 <= levels <= 16 and 1 <= planes <= 8):
            raise ValueError(f"Levels: at most 16 levels of 8 planes, got {levels} of {planes}")
        t = self.thresholds
        if t.dim() != 2 or len(t) != levels - 1:
            raise ValueError(
                f"Levels: thresholds must be [{levels - 1}, 1 or channels], got {list(t.shape)}"
            )
        if len(t) > 1 and not bool((t[1:] >= t[:-1]).all()):
            raise ValueError("Levels: thresholds must rise")
        dtypes = (t.dtype, self.pattern.dtype, self.scale.dtype)
        if dtypes != (torch.float32, torch.uint8, torch.float32):
            raise ValueError(f"Levels: thresholds, pattern and scale have the dtypes {dtypes}")
        lowest = self.offset - float(self.scale.detach().double().sum())
        object.__setattr__(self, "lowest", lowest)

    @classmethod
    def sign(cls, threshold: Tensor | float = 0.0, pad: float = 0.0) -> Levels:
        """+1 where x reaches the threshold ([channels], or one), −1 elsewhere."""
        t = torch.as_tensor(threshold, dtype=torch.float32).reshape(1, -1)
        pattern = torch.tensor([0, 1], dtype=torch.uint8)
        return cls(thresholds=t, pattern=pattern, scale=torch.ones(1), pad=pad)

    @classmethod
    def uniform(cls, bits: int, step: float, low: float = 0.0, pad: float = 0.0) -> Levels:
        """low + step · n for n in 0 … 2**bits − 1, the nearest (ties go up). bits: 1 to 4."""
        if not 1 <= bits <= 4:
            raise ValueError(f"Levels.uniform: bits must lie in 1 … 4, got {bits}")
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
        if bits.dtype is not torch.bool or bits.dim() < 3:
            raise ValueError(
                "BitWeights.pack: bits must be [out, planes, in, …] bool, got "
                f"{list(bits.shape)} {bits.dtype}"
            )
        out, planes, channels = bits.shape[:3]
        if not 1 <= planes <= 8:
            raise ValueError(f"BitWeights.pack: there may be 1 … 8 planes, got {planes}")
        if scale.shape != (out, planes):
            raise ValueError(
                f"BitWeights.pack: scale must be {[out, planes]}, got {list(scale.shape)}"
            )
        if groups < 1 or out % groups:
            raise ValueError(f"BitWeights.pack: {out} outputs do not fall into {groups} groups")
        shape = (out, channels, *bits.shape[3:])
        each, words, taps = out // groups, -(-channels // 64), math.prod(bits.shape[3:])
        strips = -(-each // 16)
        flat = bits.reshape(out, planes, channels, taps)
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
        strips, planes, taps, words, _ = self.bits.shape
        each, padded = out // self.groups, strips // self.groups * 16
        rows = self.bits.permute(0, 4, 1, 2, 3)
        octets = rows.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        bits = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device) & 1
        signs = 2.0 * bits.reshape(self.groups, padded, planes, taps, words * 64) - 1
        scale = self.scale.reshape(planes, self.groups, padded).permute(1, 2, 0)[:, :each]
        weight = (signs[:, :each, :, :, :channels] * scale[..., None, None]).sum(2)
        return weight.transpose(2, 3).reshape(self.shape)


def bitplane_matmul(x: Tensor, weights: BitWeights, levels: Levels | None = None) -> Tensor:
    """x [..., in] → [..., out].

    levels: how activations become bits; None leaves them the floats they are.
    """
    op = "bitplane_matmul"
    if x.dim() < 1 or len(weights.shape) != 2 or weights.groups != 1:
        raise ValueError(
            f"{op}: x {list(x.shape)} and a weight {list(weights.shape)} in {weights.groups} "
            "groups are not those of a linear layer"
        )
    _check_channels(op, x.shape[-1], weights, levels)
    flat = native.rows_of(x)
    out = weights.shape[0]
    if levels is None:
        if not x.is_floating_point():
            raise ValueError(f"{op}: without levels x must hold floats, not {x.dtype}")
        if not native.runs(x, weights.bits, weights.scale):
            return reference.bitplane_real(x, weights.dense().to(x.dtype))
        y: Tensor = torch.ops.taut.bitplane_real(flat.float(), weights.bits, weights.scale, out)
        return native.shaped_as(x, y)
    if not _counts(op, x, weights, levels):
        y = reference.bitplane_matmul(levels.decoded(flat), weights.dense())
    else:
        y = torch.ops.taut.bitplane_matmul(
            flat if levels.takes_int8 else flat.float(), *_arguments(weights, levels), out
        )
    return native.shaped_as(x, y, torch.float32 if levels.takes_int8 else x.dtype)


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
    op = "bitplane_conv2d"
    if x.dim() != 4 or len(weights.shape) != 4:
        raise ValueError(
            f"{op}: x must be [n, in, height, width] and the weight have 4 dimensions, got "
            f"{list(x.shape)} and {list(weights.shape)}"
        )
    _check_channels(op, x.shape[1], weights, levels)
    for name, pair in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        least = 0 if name == "padding" else 1
        if not isinstance(pair, Sequence) or len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{op}: {name} must be two numbers of at least {least}, got {pair!r}")
    if not _counts(op, x, weights, levels):
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
        weights.shape[2:], stride, padding, dilation,
    )  # fmt: skip
    return counted if levels.takes_int8 else counted.to(x.dtype)


def _check_channels(op: str, channels: int, weights: BitWeights, levels: Levels | None) -> None:
    wanted = weights.shape[1] * weights.groups
    if channels != wanted:
        raise ValueError(f"{op}: x has {channels} channels, and the weight takes {wanted}")
    if levels is not None and levels.thresholds.shape[1] not in (1, channels):
        raise ValueError(
            f"{op}: the levels have thresholds for {levels.thresholds.shape[1]} channels, and x "
            f"has {channels}"
        )


def _counts(op: str, x: Tensor, weights: BitWeights, levels: Levels) -> bool:
    """Whether bits are counted natively; the definition differentiates and knows every device."""
    if (x.dtype is not torch.int8) if levels.takes_int8 else (not x.is_floating_point()):
        wanted = "int8" if levels.takes_int8 else "floats"
        raise ValueError(f"{op}: these levels take {wanted}, not {x.dtype}")
    first = weights.scale if levels.takes_int8 else x
    return native.runs(first, x, weights.bits, weights.scale, levels.scale, levels.thresholds)


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
    y = x.new_empty(x.shape[0], out, *size, dtype=torch.float32)
    return y.contiguous(memory_format=torch.channels_last)
