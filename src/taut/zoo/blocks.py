"""The few blocks of which every network of the zoo is built."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from taut.errors import ZooError

Pair = int | tuple[int, int]
Layer = tuple[int, Pair] | tuple[int, Pair, int]


def conv(
    inputs: int, outputs: int, kernel: Pair = 1, stride: int = 1, *, groups: int = 1,
    valid: bool = False, norm: bool = True, relu: bool = True,
) -> nn.Sequential:  # fmt: skip
    """Convolution, batch norm, ReLU. [n, inputs, h, w] → [n, outputs, h / stride, w / stride].

    valid: without padding, so that kernel − 1 pixels are lost. norm=False: a bias in its place.
    """
    tall, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (0, 0) if valid else (tall // 2, wide // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, (tall, wide), stride, padding, groups=groups, bias=not norm)
    ]
    layers += [nn.BatchNorm2d(outputs)] * norm + [nn.ReLU()] * relu
    return nn.Sequential(*layers)


def depthwise(channels: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """A convolution of each channel by itself."""
    return conv(channels, channels, kernel, stride, groups=channels, relu=relu)


def shrink(kernel: int = 3, stride: int = 2, *, valid: bool = False) -> nn.MaxPool2d:
    """Max pooling: 3 × 3 at every second pixel. valid: without padding."""
    return nn.MaxPool2d(kernel, stride, 0 if valid else kernel // 2)


def mean(kernel: int = 3, stride: int = 1) -> nn.AvgPool2d:
    """The mean of the neighbours that lie in the image."""
    return nn.AvgPool2d(kernel, stride, kernel // 2, count_include_pad=False)


def tower(
    inputs: int, *layers: Layer, norm: bool = True, valid: bool = False,
    before: nn.Module | None = None,
) -> nn.Sequential:  # fmt: skip
    """Convolutions one upon another, each (outputs, kernel) or (outputs, kernel, stride).

    valid: those that stride have no padding. before: what stands below them.
    """
    built: list[nn.Module] = [] if before is None else [before]
    for outputs, kernel, *rest in layers:
        stride = rest[0] if rest else 1
        built.append(conv(inputs, outputs, kernel, stride, norm=norm, valid=valid and stride > 1))
        inputs = outputs
    return nn.Sequential(*built)


class Parallel(nn.Sequential):
    """Branches of one input, their channels joined: y = concat(f1(x), f2(x), ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], 1)


class Residual(nn.Module):
    """y = relu(f(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Shuffle(nn.Module):
    """Channel g · size + i becomes channel i · groups + g: each group then sees all the others."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


def stem(
    kind: str, in_channels: int, outputs: int, kernel: int, *, norm: bool = True, pool: bool = True
) -> nn.Sequential:
    """What meets the image. 'paper': a convolution and a pooling that leave a 16th of the pixels.

    'small', for images of about 32 × 32: a 3 × 3 convolution that leaves them all.
    """
    if kind == "small":
        return conv(in_channels, outputs, 3, norm=norm)
    layers: list[nn.Module] = [conv(in_channels, outputs, kernel, 2, norm=norm)]
    return nn.Sequential(*layers, *[shrink()] * pool)


def head(channels: int, classes: int, dropout: float = 0.0) -> nn.Sequential:
    """The mean over all pixels, then a layer. [n, channels, h, w] → [n, classes]."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, classes)
    )


class Classifier(nn.Module):
    """Features, then a head. [n, channels, height, width] → [n, classes].

    smallest: the height and width of the smallest image it takes; smaller ones raise ZooError,
    which names the small stem where the net could have one.
    """

    def __init__(
        self, net: str, features: nn.Module, head: nn.Module, smallest: int = 1, stem: str = "small"
    ) -> None:
        super().__init__()
        self.features, self.head = features, head
        self.net, self.smallest = net, smallest
        self.remedy = "scale them up" if stem == "small" else "stem='small' takes smaller ones"
        initialise(self)

    def check(self, x: Tensor) -> None:
        """Raise ZooError for images that would have no pixel left at the end."""
        height, width = x.shape[-2:]
        if min(height, width) < self.smallest:
            raise ZooError(
                f"{self.net}: images must have at least {self.smallest} × {self.smallest} pixels, "
                f"got {height} × {width}; {self.remedy}"
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return cast(Tensor, self.head(self.features(x)))


def initialise(net: nn.Module) -> None:
    """Convolutions keep the scale of what passes a ReLU (He et al. 2015)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def pairs(first: int, widths: list[int]) -> Iterator[tuple[int, int]]:
    """The inputs and outputs of each layer of a chain."""
    yield from zip([first, *widths], widths, strict=False)
