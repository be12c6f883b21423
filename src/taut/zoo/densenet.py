"""DenseNet: every layer reads the outputs of all layers before it.

Huang, Liu, van der Maaten, Weinberger: Densely connected convolutional networks (CVPR 2017). The
networks are those with bottlenecks and with transitions that halve the channels (BC).
"""

from collections.abc import Sequence

from torch import nn

from taut.zoo.blocks import Classifier, Parallel, head
from taut.zoo.blocks import stem as first_layers
from taut.zoo.registry import architecture


@architecture()
def densenet_121(*, classes: int = 1000, in_channels: int = 3, stem: str = "paper") -> nn.Module:
    """DenseNet-121: blocks of 6, 12, 24 and 16 layers that add 32 channels each.

    [n, in_channels, height, width] → [n, classes]. 7,978,856 parameters; 2.834G MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. Huang et al. 2017.
    """
    return _imagenet("densenet_121", (6, 12, 24, 16), classes, in_channels, stem)


@architecture()
def densenet_169(*, classes: int = 1000, in_channels: int = 3, stem: str = "paper") -> nn.Module:
    """DenseNet-169: blocks of 6, 12, 32 and 32 layers that add 32 channels each.

    [n, in_channels, height, width] → [n, classes]. 14,149,480 parameters; 3.360G MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. Huang et al. 2017.
    """
    return _imagenet("densenet_169", (6, 12, 32, 32), classes, in_channels, stem)


@architecture()
def densenet_201(*, classes: int = 1000, in_channels: int = 3, stem: str = "paper") -> nn.Module:
    """DenseNet-201: blocks of 6, 12, 48 and 32 layers that add 32 channels each.

    [n, in_channels, height, width] → [n, classes]. 20,013,928 parameters; 4.291G MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. Huang et al. 2017.
    """
    return _imagenet("densenet_201", (6, 12, 48, 32), classes, in_channels, stem)


@architecture()
def densenet_bc_100_12(*, classes: int = 10, in_channels: int = 3) -> nn.Module:
    """DenseNet-BC of CIFAR: three blocks of 16 layers that add 12 channels each.

    [n, in_channels, height, width] → [n, classes]. 769,162 parameters; 287.9M MACs at 32 × 32.
    Huang et al. 2017.
    """
    first = nn.Conv2d(in_channels, 24, 3, padding=1, bias=False)
    return _densenet("densenet_bc_100_12", first, 24, (16, 16, 16), 12, classes, smallest=4)


def _imagenet(
    name: str, blocks: Sequence[int], classes: int, in_channels: int, stem: str
) -> nn.Module:
    first, smallest = first_layers(stem, in_channels, 64, 7), 8 if stem == "small" else 29
    return _densenet(name, first, 64, blocks, 32, classes, smallest, stem)


def _densenet(
    name: str, first: nn.Module, channels: int, blocks: Sequence[int], growth: int, classes: int,
    smallest: int, stem: str = "small",
) -> nn.Module:  # fmt: skip
    layers = [first]
    for block, count in enumerate(blocks):
        if block:
            layers += [_norm_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(count):
            inner = 4 * growth
            layer = nn.Sequential(_norm_conv(channels, inner, 1), _norm_conv(inner, growth, 3))
            layers.append(Parallel(nn.Identity(), layer))
            channels += growth
    layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return Classifier(name, nn.Sequential(*layers), head(channels, classes), smallest, stem)


def _norm_conv(channels: int, outputs: int, kernel: int) -> nn.Sequential:
    """Batch norm and ReLU stand before the convolution here."""
    convolution = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), convolution)
