"""Network in network: a small perceptron slides over the image where a filter did.

Lin, Chen, Yan: Network in network (ICLR 2014). Scores pass no ReLU here: one that is negative
for every example would never learn.
"""

import functools

from torch import nn

from taut.zoo.blocks import Classifier, conv
from taut.zoo.registry import architecture


@architecture()
def nin(*, classes: int = 10, in_channels: int = 3, dropout: float = 0.5) -> nn.Module:
    """NiN of CIFAR-10: three convolutions, each with two of 1 × 1 after it; no layer at the end.

    [n, in_channels, height, width] → [n, classes]. 966,986 parameters; 222.5M MACs at 32 × 32.
    Lin, Chen, Yan 2014; the widths are those of the authors' CIFAR-10 network.
    """
    plain = functools.partial(conv, norm=False)
    layers = [
        plain(in_channels, 192, 5), plain(192, 160), plain(160, 96),
        nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout),
        plain(96, 192, 5), plain(192, 192), plain(192, 192),
        nn.AvgPool2d(3, 2, ceil_mode=True), nn.Dropout(dropout),
        plain(192, 192, 3), plain(192, 192), plain(192, classes, relu=False),
    ]  # fmt: skip
    scores = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier("nin", nn.Sequential(*layers), scores, smallest=4)
