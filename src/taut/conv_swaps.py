"""Swaps of convolutions: the few smaller ones that take the place of a large one, as structure.

A convolution of `in` to `out` channels, kernel k × k, becomes

    separable    k × k of each channel by itself, `width` times; 1 × 1 to out
    grouped      k × k in `width` groups of channels; a shuffle: the next groups see them all
    fire         1 × 1 to `width` channels; 1 × 1 and k × k side by side, half of the outputs each
    stacked      (k − 1) / 2 of 3 × 3 in a row, `width` channels between them
    asymmetric   1 × k, then k × 1, `width` channels between them
    parallel     1 × k and k × 1 side by side, half of the outputs each

for one, two and three dimensions: asymmetric and parallel have a part for each dimension. Stride,
padding and dilation go to the parts that span their dimension, so that every part of the image is
seen as before. Between parts in a row stand a batch norm and a ReLU, a ReLU, or nothing.

separable: Sifre (PhD thesis, 2014); Howard and others: MobileNets (2017). grouped: Zhang, Zhou,
Lin, Sun: ShuffleNet (CVPR 2018). fire: Iandola and others: SqueezeNet (2016). stacked, asymmetric
and parallel: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception architecture (CVPR
2016), figures 5, 6 and 7. Where we differ: these are blocks of networks that are designed with
them; here each takes the place of one layer, and keeps its inputs and outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from taut.edits import Edit, put_layer, register_edit
from taut.errors import FormatError
from taut.modules import unfilled
from taut.zoo.blocks import Parallel, Shuffle

KINDS = ("separable", "grouped", "fire", "stacked", "asymmetric", "parallel")
BETWEEN = ("norm", "relu", "nothing")
LAYERS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_BY_DIMENSIONS: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)
}  # fmt: skip
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution by its numbers. padding: of both sides of each dimension, 'same' or 'valid'."""

    inputs: int
    outputs: int
    kernel: Shape
    stride: Shape
    padding: Shape | str
    dilation: Shape
    groups: int = 1
    mode: str = "zeros"

    @classmethod
    def of(cls, layer: nn.Module) -> Conv:
        """What a live layer is."""
        conv = cast(nn.Conv2d, layer)
        padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
        return cls(
            inputs=conv.in_channels, outputs=conv.out_channels, kernel=tuple(conv.kernel_size),
            stride=tuple(conv.stride), padding=padding, dilation=tuple(conv.dilation),
            groups=conv.groups, mode=conv.padding_mode,
        )  # fmt: skip

    @classmethod
    def plain(cls, shape: Shape) -> Conv:
        """One with a weight of this shape that leaves the image its size."""
        ones = (1,) * len(shape[2:])
        return cls(
            inputs=shape[1], outputs=shape[0], kernel=shape[2:], stride=ones, padding="same",
            dilation=ones,
        )  # fmt: skip

    @property
    def shape(self) -> Shape:
        """Of the weight."""
        return self.outputs, self.inputs // self.groups, *self.kernel

    @property
    def numel(self) -> int:
        """Numbers of the weight."""
        return math.prod(self.shape)

    @property
    def around(self) -> list[tuple[int, int]]:
        """The padding before and after each dimension; PyTorch's 'same' pads more after."""
        if isinstance(self.padding, str):
            reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            same = self.padding == "same"
            return [(r // 2, r - r // 2) if same else (0, 0) for r in reach]
        return [(p, p) for p in self.padding]

    def spots(self, size: Shape) -> Shape:
        """The places at which it is computed, for an image of this size."""
        sides = zip(size, self.around, self.kernel, self.dilation, self.stride, strict=True)
        return tuple((n + a + b - d * (k - 1) - 1) // s + 1 for n, (a, b), k, d, s in sides)

    def after(self, first: Conv) -> Conv:
        """What remains to be done of this convolution once `first` has done its part."""
        padding = self.padding
        if not isinstance(padding, str) and not isinstance(first.padding, str):
            padding = tuple(p - q for p, q in zip(padding, first.padding, strict=True))
        return replace(
            self,
            inputs=first.outputs,
            kernel=tuple(k - j + 1 for k, j in zip(self.kernel, first.kernel, strict=True)),
            stride=tuple(s // t for s, t in zip(self.stride, first.stride, strict=True)),
            padding=padding,
        )

    def build(self, bias: bool, like: Tensor) -> nn.Module:
        """A layer whose numbers are not set, of the device and type of a tensor."""
        kind = _BY_DIMENSIONS[len(self.kernel)][0]
        return unfilled(
            kind, like, self.inputs, self.outputs, self.kernel, self.stride, self.padding,
            self.dilation, self.groups, bias=bias, padding_mode=self.mode,
        )  # fmt: skip

    def _part(
        self, inputs: int, outputs: int, axes: Shape, *, groups: int = 1, strided: bool = False
    ) -> Conv:
        """One that spans some dimensions of the kernel. strided: it has the stride of them all."""
        spans = [d in axes for d in range(len(self.kernel))]

        def own(values: Shape, otherwise: int) -> Shape:
            return tuple(v if s else otherwise for v, s in zip(values, spans, strict=True))

        return Conv(
            inputs=inputs, outputs=outputs, kernel=own(self.kernel, 1), groups=groups,
            stride=self.stride if strided else own(self.stride, 1),
            padding=self.padding if isinstance(self.padding, str) else own(self.padding, 0),
            dilation=own(self.dilation, 1), mode=self.mode,
        )  # fmt: skip


Stage = tuple[Conv, ...]
"""Convolutions side by side: they read the same, and their outputs are joined."""


def stages(to: str, conv: Conv, width: int) -> tuple[Stage, ...]:
    """What a convolution becomes, in a row. `why_not` must have nothing against it."""
    a, b, every = conv.inputs, conv.outputs, tuple(range(len(conv.kernel)))
    long = tuple(d for d in every if conv.kernel[d] > 1)
    if to == "separable":
        return (conv._part(a, a * width, every, groups=a),), (conv._part(a * width, b, ()),)
    if to == "grouped":
        return ((conv._part(a, b, every, groups=width),),)
    if to == "fire":
        half = b // 2
        beside = conv._part(width, half, (), strided=True), conv._part(width, b - half, every)
        return (conv._part(a, width, ()),), beside
    if to == "stacked":
        return tuple((c,) for c in _stacked(conv, width))
    if to == "asymmetric":
        short = tuple(d for d in every if d not in long)  # their strides come last
        axes = [(d,) for d in reversed(long[1:])] + [(long[0], *short)]
        widths = [a, *[width] * (len(axes) - 1), b]
        return tuple(
            (conv._part(i, o, some),) for i, o, some in zip(widths, widths[1:], axes, strict=False)
        )
    shares = [b // len(long) + (i < b % len(long)) for i in range(len(long))]
    others = [tuple(e for e in every if e == d or e not in long) for d in long]
    return (
        tuple(
            conv._part(a, share, axes, strided=True)
            for share, axes in zip(reversed(shares), reversed(others), strict=True)
        ),
    )


def _stacked(conv: Conv, width: int) -> list[Conv]:
    """3 × 3 in a row: the padding is split, the stride is the last one's."""
    count = (conv.kernel[0] - 1) // 2
    widths, made = [conv.inputs, *[width] * (count - 1), conv.outputs], []
    for i in range(count):
        padding = conv.padding
        if not isinstance(padding, str):
            padding = tuple(p // count + (i < p % count) for p in padding)
        made.append(
            replace(
                conv, inputs=widths[i], outputs=widths[i + 1], padding=padding,
                kernel=(3,) * len(conv.kernel),
                stride=conv.stride if i + 1 == count else (1,) * len(conv.kernel),
            )
        )  # fmt: skip
    return made


def why_not(to: str, conv: Conv, width: int) -> str:
    """Why a convolution cannot become such; "" where it can, be it smaller or not."""
    kernel = " × ".join(map(str, conv.kernel))
    long = [d for d, k in enumerate(conv.kernel) if k > 1]
    if conv.groups > 1:
        return "its channels come in groups"
    if to == "grouped":
        if conv.inputs % width or conv.outputs % width:
            return f"{conv.inputs} and {conv.outputs} channels do not divide into {width} groups"
        return ""
    if not long:
        return f"its kernel is {kernel}, a mix of channels alone"
    if to == "stacked":
        fits = len({*conv.kernel}) == 1 and conv.kernel[0] % 2 == 1 and conv.kernel[0] >= 5
        return "" if fits else f"its kernel is {kernel}, and not 5 × 5, 7 × 7 or larger"
    if to in ("asymmetric", "parallel") and len(long) < 2:
        return f"its kernel is {kernel}, of one dimension"
    if to in ("fire", "parallel"):
        if conv.outputs < len(long):
            return f"{conv.outputs} outputs cannot be split into {len(long)} branches"
        reach = [c * (k - 1) / 2 for c, k in zip(conv.dilation, conv.kernel, strict=True)]
        off = [d for d in long if conv.around[d] != (reach[d], reach[d])]
        if off:
            return (
                f"its padding {conv.padding!r} does not centre the kernel {kernel} on each output, "
                "as branches side by side need it"
            )
    return ""


def numbers(to: str, conv: Conv, width: int, between: str, bias: bool) -> int:
    """How many the swap has, those of the norms and biases too."""
    row = stages(to, conv, width)
    inner = sum(part.outputs for stage in row[:-1] for part in stage)
    more = {"norm": 4 * inner + len(row) - 1, "relu": inner, "nothing": 0}[between]
    last = conv.outputs * has_bias(row, between, bias)
    return sum(part.numel for stage in row for part in stage) + more + last


def has_bias(row: tuple[Stage, ...], between: str, bias: bool) -> bool:
    """Whether the last stage has one: as before, or where it must take away a ReLU's mean."""
    return bias or (len(row) > 1 and between != "nothing")


def macs(to: str, conv: Conv, width: int, size: Shape) -> int:
    """Multiply-accumulates of the swap for one image of this size."""
    total = 0
    for stage in stages(to, conv, width):
        total += sum(part.numel * math.prod(part.spots(size)) for part in stage)
        size = stage[-1].spots(size)
    return total


def build(row: tuple[Stage, ...], between: str, bias: bool, shuffle: int, like: Tensor) -> Swapped:
    """The layers of a swap, their numbers not set. shuffle: groups of outputs to be mixed, or 1."""
    made: list[nn.Module] = []
    for stage in row:
        last = stage is row[-1]
        biased = has_bias(row, between, bias) if last else between == "relu"
        convs = [part.build(biased, like) for part in stage]
        made.append(convs[0] if len(convs) == 1 else Parallel(*convs))
        if not last and between == "norm":
            kind: Any = _BY_DIMENSIONS[len(stage[0].kernel)][1]
            norm = kind(stage[0].outputs, device=like.device, dtype=like.dtype)
            made.append(norm.requires_grad_(like.requires_grad))
        if not last and between != "nothing":
            made.append(nn.ReLU())
    return Swapped(*made, *[Shuffle(shuffle)] * (shuffle > 1))


class Swapped(nn.Sequential):
    """What stands in the place of one convolution."""


# ---- the edit -------------------------------------------------------------------------------


@register_edit
@dataclass(frozen=True, kw_only=True)
class Swap(Edit):
    """A convolution becomes smaller ones; its hooks stay on the whole.

    to: one of `KINDS`; width: what its table above says, 1 for parallel. between: one of `BETWEEN`.
    """

    layer: str
    to: str
    width: int
    between: str

    def replay(self, model: nn.Module) -> nn.Module:
        layer = model.get_submodule(self.layer)
        told = odd(layer)
        if told:
            raise FormatError(f"swap: {self.layer!r} is no plain convolution: {told}")
        for value, known in ((self.to, KINDS), (self.between, BETWEEN)):
            if value not in known:
                raise FormatError(
                    f"swap: {self.layer!r} must become one of {', '.join(known)}, got {value!r}"
                )
        conv, weight = Conv.of(layer), cast(Tensor, layer.weight)
        if self.width < 1 or (self.to == "parallel" and self.width > 1):
            raise FormatError(
                f"swap: width of {self.layer!r} must be 1 or more, and 1 for parallel, "
                f"got {self.width}"
            )
        if told := why_not(self.to, conv, self.width):
            raise FormatError(f"swap: {self.layer!r} cannot become {self.to}: {told}")
        takes = numbers(self.to, conv, self.width, self.between, layer.bias is not None)
        had = weight.numel() + (conv.outputs if layer.bias is not None else 0)
        if takes >= had:
            raise FormatError(
                f"swap: {self.layer!r} would take {takes:,} numbers, which must be fewer than its "
                f"{had:,}"
            )
        return put_layer(model, self.layer, self.made(layer))

    def made(self, layer: nn.Module) -> Swapped:
        """The layers, their numbers not set, that take the place of this one."""
        row = stages(self.to, Conv.of(layer), self.width)
        shuffle = self.width if self.to == "grouped" else 1
        return build(row, self.between, layer.bias is not None, shuffle, cast(Tensor, layer.weight))


def odd(layer: nn.Module) -> str:
    """Why a layer is no plain convolution; "" where it is one."""
    if type(layer) not in LAYERS:
        return f"it is a {type(layer).__name__}"
    held = {*layer._parameters, *layer._buffers, *layer._modules}
    return "" if held <= {"weight", "bias"} else "it holds more than a weight and a bias"
