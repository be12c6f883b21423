"""SqueezeNet: fire modules, which squeeze the channels before they expand them.

Iandola, Han, Moskewicz, Ashraf, Dally, Keutzer: SqueezeNet: AlexNet-level accuracy with 50x fewer
parameters and <0.5MB model size (2016). Scores pass no ReLU here: one that is negative for every
example would never learn.
"""

from torch import nn

from taut.zoo.blocks import Classifier, Parallel, conv
from taut.zoo.registry import architecture


@architecture()
def squeezenet_1_0(
    *, classes: int = 1000, in_channels: int = 3, dropout: float = 0.5, stem: str = "paper"
) -> nn.Module:
    """SqueezeNet 1.0: a 7 × 7 convolution of 96 channels, eight fire modules, a 1 × 1 convolution.

    [n, in_channels, height, width] → [n, classes]. 1,248,424 parameters; 818.9M MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. Iandola et al. 2016.
    """
    return _squeezenet("squeezenet_1_0", 96, 7, (3, 7), classes, in_channels, dropout, stem)


@architecture()
def squeezenet_1_1(
    *, classes: int = 1000, in_channels: int = 3, dropout: float = 0.5, stem: str = "paper"
) -> nn.Module:
    """SqueezeNet 1.1: the first convolution is 3 × 3 with 64 channels, and pooling comes earlier.

    [n, in_channels, height, width] → [n, classes]. 1,235,496 parameters; 349.2M MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. Iandola et al. 2016, as
    their repository improved it.
    """
    return _squeezenet("squeezenet_1_1", 64, 3, (2, 4), classes, in_channels, dropout, stem)


def _squeezenet(
    name: str, first: int, kernel: int, pools: tuple[int, int], classes: int, in_channels: int,
    dropout: float, stem: str,
) -> nn.Module:  # fmt: skip
    layers: list[nn.Module] = [conv(in_channels, first, kernel, 2, valid=True, norm=False), _pool()]
    if stem == "small":
        layers = [conv(in_channels, first, 3, norm=False)]
    channels = first
    for i, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
        layers += [_pool()] * (i in pools) + [fire(channels, squeeze, 4 * squeeze)]
        channels = 8 * squeeze
    scores = [
        nn.Dropout(dropout), conv(channels, classes, norm=False, relu=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ]  # fmt: skip
    smallest = 4 if stem == "small" else 21 if kernel == 7 else 17
    return Classifier(name, nn.Sequential(*layers), nn.Sequential(*scores), smallest, stem)


def fire(channels: int, squeeze: int, expand: int) -> nn.Sequential:
    """1 × 1 to a few channels, then 1 × 1 and 3 × 3 side by side. [n, c, h, w] → 2 · expand."""
    wider = Parallel(conv(squeeze, expand, 1, norm=False), conv(squeeze, expand, 3, norm=False))
    return nn.Sequential(conv(channels, squeeze, norm=False), wider)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)
