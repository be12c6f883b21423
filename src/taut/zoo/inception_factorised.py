"""Inception v3 and v4: n × n filters become 1 × n and n × 1, in sequence and side by side.

V3: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception architecture for computer
vision (CVPR 2016). V4: Szegedy, Ioffe, Vanhoucke, Alemi: Inception-v4, Inception-ResNet and the
impact of residual connections on learning (AAAI 2017).
"""

from torch import nn

from taut.zoo.blocks import Classifier, Parallel, conv, head, mean, shrink, tower
from taut.zoo.inception import Auxiliary
from taut.zoo.registry import architecture

ACROSS, ALONG = (1, 7), (7, 1)


@architecture()
def inception_v3(
    *, classes: int = 1000, in_channels: int = 3, dropout: float = 0.5, aux: bool = False,
    stem: str = "paper",
) -> nn.Module:  # fmt: skip
    """Inception v3: eleven modules over maps of 35, 17 and 8 pixels.

    [n, in_channels, height, width] → [n, classes]. 23,834,568 parameters; 5.713G MACs at 299 × 299.
    aux: with the further head 27,161,264 parameters; in training the output is then a tuple, the
    last head first. stem: 'small' begins with a 3 × 3 convolution that leaves all pixels, and pads.
    Szegedy et al. 2016; the further head pools to 5 × 5 whatever the size of the image.
    """
    small = stem == "small"
    layers: list[nn.Module] = [
        conv(in_channels, 32, 3, 1 if small else 2, valid=not small),
        conv(32, 32, 3, valid=not small),
        conv(32, 64, 3),
        *([] if small else [shrink(valid=True)]),
        conv(64, 80),
        conv(80, 192, 3, valid=not small),
        shrink(valid=True),
        _mixed35(192, 32),
        _mixed35(256, 64),
        _mixed35(288, 64),
        Parallel(
            tower(288, (384, 3, 2), valid=True),
            tower(288, (64, 1), (96, 3), (96, 3, 2), valid=True),
            shrink(valid=True),
        ),
        *(_mixed17(inner) for inner in (128, 160, 160, 192)),
    ]
    heads = {len(layers) - 1: _v3_head(classes)} if aux else {}
    layers += [
        Parallel(
            tower(768, (192, 1), (320, 3, 2), valid=True),
            tower(768, (192, 1), (192, ACROSS), (192, ALONG), (192, 3, 2), valid=True),
            shrink(valid=True),
        ),
        _mixed8(1280),
        _mixed8(2048),
    ]
    top, smallest = head(2048, classes, dropout), 15 if small else 75
    return Auxiliary("inception_v3", nn.Sequential(*layers), top, heads, smallest, stem)


def _mixed35(inputs: int, pooled: int) -> Parallel:
    return Parallel(
        tower(inputs, (64, 1)),
        tower(inputs, (48, 1), (64, 5)),
        tower(inputs, (64, 1), (96, 3), (96, 3)),
        tower(inputs, (pooled, 1), before=mean()),
    )


def _mixed17(n: int) -> Parallel:
    return Parallel(
        tower(768, (192, 1)),
        tower(768, (n, 1), (n, ACROSS), (192, ALONG)),
        tower(768, (n, 1), (n, ALONG), (n, ACROSS), (n, ALONG), (192, ACROSS)),
        tower(768, (192, 1), before=mean()),
    )


def _mixed8(inputs: int) -> Parallel:
    return Parallel(
        tower(inputs, (320, 1)),
        nn.Sequential(conv(inputs, 384), _cross(384, 384)),
        nn.Sequential(*tower(inputs, (448, 1), (384, 3)), _cross(384, 384)),
        tower(inputs, (192, 1), before=mean()),
    )


def _cross(inputs: int, outputs: int) -> Parallel:
    """1 × 3 and 3 × 1 side by side."""
    return Parallel(conv(inputs, outputs, (1, 3)), conv(inputs, outputs, (3, 1)))


def _v3_head(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(5), conv(768, 128), conv(128, 768, 5, valid=True),
        nn.Flatten(), nn.Linear(768, classes),
    )  # fmt: skip


@architecture()
def inception_v4(
    *, classes: int = 1000, in_channels: int = 3, dropout: float = 0.2, stem: str = "paper"
) -> nn.Module:
    """Inception v4: a stem of branches, then 4, 7 and 3 modules over maps of 35, 17 and 8 pixels.

    [n, in_channels, height, width] → [n, classes]. 42,679,816 parameters; 12.25G MACs at 299 × 299.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels, and pads. Szegedy et al.
    2017.
    """
    small = stem == "small"
    layers = [
        *_v4_stem(in_channels, small),
        *(_a() for _ in range(4)),
        Parallel(
            tower(384, (384, 3, 2), valid=True),
            tower(384, (192, 1), (224, 3), (256, 3, 2), valid=True),
            shrink(valid=True),
        ),
        *(_b() for _ in range(7)),
        Parallel(
            tower(1024, (192, 1), (192, 3, 2), valid=True),
            tower(1024, (256, 1), (256, ACROSS), (320, ALONG), (320, 3, 2), valid=True),
            shrink(valid=True),
        ),
        *(_c() for _ in range(3)),
    ]
    top, smallest = head(1536, classes, dropout), 15 if small else 75
    return Classifier("inception_v4", nn.Sequential(*layers), top, smallest, stem)


def _v4_stem(in_channels: int, small: bool) -> list[nn.Module]:
    stride, pads = (1, {}) if small else (2, {"valid": True})
    return [
        conv(in_channels, 32, 3, stride, valid=not small),
        conv(32, 32, 3, valid=not small),
        conv(32, 64, 3),
        Parallel(shrink(3, stride, **pads), conv(64, 96, 3, stride, **pads)),
        Parallel(
                nn.Sequential(conv(160, 64), conv(64, 96, 3, **pads)),
                nn.Sequential(*tower(160, (64, 1), (64, ACROSS), (64, ALONG)),
                              conv(64, 96, 3, **pads)),
        ),
        Parallel(conv(192, 192, 3, 2, valid=True), shrink(valid=True)),
    ]  # fmt: skip


def _a() -> Parallel:
    return Parallel(
        tower(384, (96, 1)),
        tower(384, (64, 1), (96, 3)),
        tower(384, (64, 1), (96, 3), (96, 3)),
        tower(384, (96, 1), before=mean()),
    )


def _b() -> Parallel:
    return Parallel(
        tower(1024, (384, 1)),
        tower(1024, (192, 1), (224, ACROSS), (256, ALONG)),
        tower(1024, (192, 1), (192, ALONG), (224, ACROSS), (224, ALONG), (256, ACROSS)),
        tower(1024, (128, 1), before=mean()),
    )


def _c() -> Parallel:
    return Parallel(
        tower(1536, (256, 1)),
        nn.Sequential(conv(1536, 384), _cross(384, 256)),
        nn.Sequential(*tower(1536, (384, 1), (448, (3, 1)), (512, (1, 3))), _cross(512, 256)),
        tower(1536, (256, 1), before=mean()),
    )
