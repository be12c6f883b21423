"""ShuffleNet: 1 × 1 convolutions in groups, or over half of the channels, and shuffles between.

V1: Zhang, Zhou, Lin, Sun: ShuffleNet: an extremely efficient convolutional neural network for
mobile devices (CVPR 2018). V2: Ma, Zhang, Zheng, Sun: ShuffleNet V2: practical guidelines for
efficient CNN architecture design (ECCV 2018).
"""

import torch
from torch import Tensor, nn

from taut.zoo.blocks import (
    Classifier,
    Parallel,
    Residual,
    Shuffle,
    conv,
    depthwise,
    head,
    mean,
)
from taut.zoo.blocks import stem as first_layers
from taut.zoo.registry import Rule, architecture

_REPEATS = (4, 8, 4)
_V1_WIDTHS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
_V2_WIDTHS = {
    0.5: (48, 96, 192, 1024), 1.0: (116, 232, 464, 1024), 1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}  # fmt: skip


@architecture(groups=Rule(choices=tuple(_V1_WIDTHS), remedy="more groups carry more channels"))
def shufflenet_v1(
    *, groups: int = 3, width: float = 1.0, classes: int = 1000, in_channels: int = 3,
    stem: str = "paper",
) -> nn.Module:  # fmt: skip
    """ShuffleNetV1: three stages of units, 1 × 1 in groups, shuffle, depthwise 3 × 3, 1 × 1.

    [n, in_channels, height, width] → [n, classes]. 1,865,728 parameters; 137.5M MACs at 224 × 224.
    groups 1, 2, 4 and 8: 1,531,936, 1,733,848, 1,968,344 and 2,434,768 parameters. width: the
    paper's s; a stage has the multiple of 4 · groups channels that is nearest to s times the
    paper's, the stem a multiple of groups. stem: 'small' begins with a 3 × 3 convolution that
    leaves all pixels. Zhang et al. 2018; as there, the first 1 × 1 of stage 2 has no groups.
    """
    channels = max(1, round(24 * width / groups)) * groups
    layers: list[nn.Module] = [first_layers(stem, in_channels, channels, 3)]
    for stage, repeats in enumerate(_REPEATS):
        outputs = _V1_WIDTHS[groups] * 2**stage * width
        outputs = max(2, round(outputs / (4 * groups))) * 4 * groups
        for i in range(repeats):
            squeeze = 1 if not stage and not i else groups
            layers.append(_unit(channels, outputs, groups, squeeze, shrinks=not i))
            channels = outputs
    return Classifier("shufflenet_v1", nn.Sequential(*layers), head(channels, classes))


def _unit(channels: int, outputs: int, groups: int, squeeze: int, shrinks: bool) -> nn.Module:
    """relu(f(x) + x); the first of a stage halves the image and joins f(x) to the mean of x."""
    inner = outputs // 4
    body = nn.Sequential(
        conv(channels, inner, groups=squeeze),
        Shuffle(groups),
        depthwise(inner, 3, 2 if shrinks else 1, relu=False),
        conv(inner, outputs - channels * shrinks, groups=groups, relu=False),
    )
    return nn.Sequential(Parallel(mean(3, 2), body), nn.ReLU()) if shrinks else Residual(body)


@architecture(width=Rule(choices=tuple(_V2_WIDTHS), remedy="these are the paper's"))
def shufflenet_v2(
    *, width: float = 1.0, classes: int = 1000, in_channels: int = 3, stem: str = "paper"
) -> nn.Module:
    """ShuffleNetV2: units work on one half of the channels and shuffle it with the other.

    [n, in_channels, height, width] → [n, classes]. 2,278,604 parameters; 144.9M MACs at 224 × 224.
    width 0.5, 1.5 and 2: 1,366,792, 3,503,624 and 7,393,996 parameters. stem: 'small' begins with
    a 3 × 3 convolution that leaves all pixels. Ma et al. 2018.
    """
    *widths, last = _V2_WIDTHS[width]
    channels = 24
    layers: list[nn.Module] = [first_layers(stem, in_channels, channels, 3)]
    for outputs, repeats in zip(widths, _REPEATS, strict=True):
        layers.append(_downward(channels, outputs))
        layers += [_Half(outputs) for _ in range(repeats - 1)]
        channels = outputs
    layers.append(conv(channels, last))
    return Classifier("shufflenet_v2", nn.Sequential(*layers), head(last, classes))


def _branch(channels: int, outputs: int, stride: int) -> nn.Sequential:
    spatial = depthwise(outputs, 3, stride, relu=False)
    return nn.Sequential(conv(channels, outputs), spatial, conv(outputs, outputs))


def _downward(channels: int, outputs: int) -> nn.Sequential:
    """Both halves are made of the whole input, at half its height and width."""
    half = outputs // 2
    beside = nn.Sequential(depthwise(channels, 3, 2, relu=False), conv(channels, half))
    return nn.Sequential(Parallel(beside, _branch(channels, half, 2)), Shuffle(2))


class _Half(nn.Module):
    """[a, b] → shuffle([a, f(b)])."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, 1)
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, 1)
        return self.shuffle(torch.cat([kept, self.branch(worked)], 1))  # type: ignore[no-any-return]
