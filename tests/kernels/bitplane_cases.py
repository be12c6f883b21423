"""Weights and activations for the tests of bitplane_matmul, whose products are exact in float32."""

import torch
from torch import Tensor

from taut.kernels import BitWeights, Levels, bitplane_conv2d, bitplane_matmul, reference

KINDS = (
    "sign", "signs", "uniform1", "uniform2", "uniform3", "uniform4", "learned2", "learned3",
    "learned4", "ternary", "int8",
)  # fmt: skip
"""Of activations; `signs` has a threshold for each channel, and so have the learned ones."""


def packed(out: int, channels: int, *kernel: int, planes: int = 1, groups: int = 1) -> BitWeights:
    """Random bits; scales are whole numbers, or quarters of them."""
    bits = torch.rand(out, planes, channels // groups, *kernel) < 0.5
    scale = torch.randint(1, 5, (out, planes)) * 2.0 ** torch.randint(-2, 1, (out, 1))
    return BitWeights.pack(bits, scale, groups)


def levels_of(kind: str, channels: int, pad: float = 0.0) -> Levels:
    """One of KINDS."""
    if kind == "sign":
        return Levels.sign(0.25, pad)
    if kind == "signs":
        return Levels.sign(torch.randn(channels), pad)
    if kind == "int8":
        return Levels.int8()
    if kind == "ternary":  # −1, 0 and 1 as two planes of a half each
        return Levels(
            thresholds=torch.tensor([[-0.5], [0.5]]),
            pattern=torch.tensor([0, 2, 3], dtype=torch.uint8),
            scale=torch.tensor([0.5, 0.5]),
            pad=pad,
        )
    planes = int(kind[-1])
    if kind.startswith("uniform"):
        return Levels.uniform(planes, 0.5, -1.0, pad)
    count = 2**planes
    return Levels(  # bits in any order
        thresholds=torch.randn(count - 1, channels).sort(0).values,
        pattern=torch.randperm(count).to(torch.uint8),
        scale=torch.tensor([1.0, 0.5, 3.0, 2.0])[:planes],
        offset=0.25,
        pad=pad,
    )


def activations(levels: Levels, *shape: int) -> Tensor:
    """What these levels take: int8, or floats some of which lie on a threshold."""
    if levels.takes_int8:
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    x = torch.randn(shape)
    return torch.where(torch.rand(shape) < 0.1, (4 * x).round() / 4, x)


def assert_linear(x: Tensor, weights: BitWeights, levels: Levels) -> None:
    """Raise unless the product is the definition's, to the last bit."""
    wanted = reference.bitplane_matmul(levels.decoded(x).double(), weights.dense().double())
    y = bitplane_matmul(x, weights, levels)
    assert y.shape == wanted.shape
    assert torch.equal(y.double(), wanted), float((y - wanted).abs().max())


def assert_conv(
    x: Tensor,
    weights: BitWeights,
    levels: Levels,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> None:
    """Raise unless the convolution is the definition's, to the last bit."""
    wanted = reference.bitplane_conv2d(
        levels.decoded(x).double(), weights.dense().double(), levels.pad, stride, padding,
        dilation, weights.groups,
    )  # fmt: skip
    y = bitplane_conv2d(x, weights, levels, stride, padding, dilation)
    assert y.shape == wanted.shape
    assert torch.equal(y.double(), wanted), float((y - wanted).abs().max())
