"""Residual networks: those of CIFAR for small images of any size, and those of ImageNet.

He, Zhang, Ren, Sun: Deep residual learning for image recognition (CVPR 2016).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.zoo.blocks import Classifier, Residual, conv, head
from taut.zoo.blocks import stem as first_layers
from taut.zoo.registry import architecture


class ResNet(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks with 16, 32 and 64 channels, a layer.

    [n, in_channels, height, width] → [n, classes]. depth: 6n + 2. stride: of the first
    convolution; 2 makes the work a quarter. Shortcuts are the paper's option A, which has no
    parameters. Raises ValueError for another depth. Section 4.2 of the paper.
    """

    def __init__(
        self, depth: int = 20, in_channels: int = 3, classes: int = 10, stride: int = 1
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2, like 20, 56 or 110, got {depth}")
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, 16, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(
            *(_Block(a, b) for a, b in zip([16, *widths], widths, strict=False))
        )
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """relu(x + f(x)); where the channels double, the shortcut skips pixels and adds zeros."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.grows = width - channels
        stride = 2 if self.grows else 1
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.grows:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grows // 2, self.grows // 2))
        return torch.relu(x + y)


@architecture()
def resnet_20(*, classes: int = 10, in_channels: int = 3, stride: int = 1) -> ResNet:
    """ResNet-20 of CIFAR: three stages of three blocks with 16, 32 and 64 channels.

    [n, in_channels, height, width] → [n, classes]. 269,722 parameters; 40.55M MACs at 32 × 32.
    stride: of the first convolution. He et al. 2016, section 4.2, with shortcuts of option A.
    """
    return ResNet(20, in_channels, classes, stride)


@architecture()
def resnet_56(*, classes: int = 10, in_channels: int = 3, stride: int = 1) -> ResNet:
    """ResNet-56 of CIFAR: three stages of nine blocks with 16, 32 and 64 channels.

    [n, in_channels, height, width] → [n, classes]. 853,018 parameters; 125.5M MACs at 32 × 32.
    stride: of the first convolution. He et al. 2016, section 4.2, with shortcuts of option A.
    """
    return ResNet(56, in_channels, classes, stride)


@architecture()
def resnet_110(*, classes: int = 10, in_channels: int = 3, stride: int = 1) -> ResNet:
    """ResNet-110 of CIFAR: three stages of eighteen blocks with 16, 32 and 64 channels.

    [n, in_channels, height, width] → [n, classes]. 1,727,962 parameters; 252.9M MACs at 32 × 32.
    stride: of the first convolution. He et al. 2016, section 4.2, with shortcuts of option A.
    """
    return ResNet(110, in_channels, classes, stride)


@architecture()
def resnet_18(*, classes: int = 1000, in_channels: int = 3, stem: str = "paper") -> nn.Module:
    """ResNet-18: four stages of two blocks, each of two 3 × 3 convolutions.

    [n, in_channels, height, width] → [n, classes]. 11,689,512 parameters; 1.814G MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. He et al. 2016.
    """
    return _imagenet("resnet_18", (2, 2, 2, 2), 1, classes, in_channels, stem)


@architecture()
def resnet_50(*, classes: int = 1000, in_channels: int = 3, stem: str = "paper") -> nn.Module:
    """ResNet-50: four stages of 3, 4, 6 and 3 blocks, 1 × 1 to a quarter, 3 × 3, 1 × 1 back.

    [n, in_channels, height, width] → [n, classes]. 25,557,032 parameters; 4.089G MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. He et al. 2016; the 3 × 3
    of a block shrinks the image, not the 1 × 1 before it, as is usual since.
    """
    return _imagenet("resnet_50", (3, 4, 6, 3), 4, classes, in_channels, stem)


def _imagenet(
    name: str, counts: tuple[int, ...], expansion: int, classes: int, in_channels: int, stem: str
) -> nn.Module:
    """expansion: 4 for blocks with a bottleneck, whose outputs are four times as wide."""
    layers: list[nn.Module] = [first_layers(stem, in_channels, 64, 7)]
    channels = 64
    for stage, count in enumerate(counts):
        inner = 64 * 2**stage
        for i in range(count):
            stride = 2 if stage and not i else 1
            layers.append(_residual(channels, inner, inner * expansion, stride))
            channels = inner * expansion
    return Classifier(name, nn.Sequential(*layers), head(channels, classes))


def _residual(channels: int, inner: int, outputs: int, stride: int) -> Residual:
    """A block whose shortcut is a 1 × 1 convolution where the shape changes (option B)."""
    if inner == outputs:
        body = nn.Sequential(conv(channels, inner, 3, stride), conv(inner, outputs, 3, relu=False))
    else:
        body = nn.Sequential(
            conv(channels, inner), conv(inner, inner, 3, stride), conv(inner, outputs, relu=False)
        )
    same = channels == outputs and stride == 1
    return Residual(body, None if same else conv(channels, outputs, 1, stride, relu=False))
