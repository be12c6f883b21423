"""Inception v1 and v2: filters of several sizes side by side.

V1: Szegedy, Liu, Jia, Sermanet, Reed, Anguelov, Erhan, Vanhoucke, Rabinovich: Going deeper with
convolutions (CVPR 2015). V2: Ioffe, Szegedy: Batch normalization (ICML 2015).
"""

from typing import cast

from torch import Tensor, nn

from taut.zoo.blocks import Classifier, Parallel, conv, head, mean, shrink, tower
from taut.zoo.blocks import stem as first_layers
from taut.zoo.registry import architecture


class Auxiliary(Classifier):
    """A classifier with further heads, which help the layers below them to learn.

    [n, channels, height, width] → [n, classes]; in training a tuple of these, the last head first,
    and a loss must take all. auxiliary: heads by the number of the feature layer that they read.
    """

    def __init__(
        self, net: str, features: nn.Sequential, head: nn.Module, auxiliary: dict[int, nn.Module],
        smallest: int = 1, stem: str = "small",
    ) -> None:  # fmt: skip
        super().__init__(net, features, head, smallest, stem)
        self.auxiliary = nn.ModuleDict({str(i): h for i, h in auxiliary.items()})

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        self.check(x)
        scores = []
        for i, layer in enumerate(cast(nn.Sequential, self.features)):
            x = layer(x)
            if self.training and str(i) in self.auxiliary:
                scores.append(self.auxiliary[str(i)](x))
        last = cast(Tensor, self.head(x))
        return (last, *reversed(scores)) if scores else last


_V1 = (
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip
"""Of each module: 1 × 1; before 3 × 3 and after; before 5 × 5 and after; after the pooling."""


@architecture()
def inception_v1(
    *, classes: int = 1000, in_channels: int = 3, dropout: float = 0.4, aux: bool = False,
    stem: str = "paper",
) -> nn.Module:  # fmt: skip
    """Inception v1 (GoogLeNet): nine modules of 1 × 1, 3 × 3, 5 × 5 and pooling side by side.

    [n, in_channels, height, width] → [n, classes]. 6,998,552 parameters; 1.583G MACs at 224 × 224.
    aux: with the two further heads 13,378,280 parameters; in training the output is then a tuple,
    the last head first. stem: 'small' begins with a 3 × 3 convolution that leaves all pixels.
    Szegedy et al. 2015; its local response norms, which later networks do without, are left out.
    """
    layers: list[nn.Module] = [
        first_layers(stem, in_channels, 64, 7, norm=False),
        conv(64, 64, norm=False),
        conv(64, 192, 3, norm=False),
        shrink(),
    ]
    channels, heads = 192, {}
    for i, (one, *three, five, wide, pooled) in enumerate(_V1):
        if i in (2, 7):
            layers.append(shrink())
        layers.append(
            Parallel(
                tower(channels, (one, 1), norm=False),
                tower(channels, (three[0], 1), (three[1], 3), norm=False),
                tower(channels, (five, 1), (wide, 5), norm=False),
                tower(channels, (pooled, 1), norm=False, before=shrink(stride=1)),
            )
        )
        channels = one + three[1] + wide + pooled
        if aux and i in (2, 5):
            heads[len(layers) - 1] = _v1_head(channels, classes)
    top = head(channels, classes, dropout)
    return Auxiliary("inception_v1", nn.Sequential(*layers), top, heads)


def _v1_head(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4), conv(channels, 128, norm=False), nn.Flatten(),
        nn.Linear(2048, 1024), nn.ReLU(), nn.Dropout(0.7), nn.Linear(1024, classes),
    )  # fmt: skip


_V2 = (
    (64, 64, 64, 64, 96, 32), (64, 64, 96, 64, 96, 64), (0, 128, 160, 64, 96, 0),
    (224, 64, 96, 96, 128, 128), (192, 96, 128, 96, 128, 128), (160, 128, 160, 128, 160, 128),
    (96, 128, 192, 160, 192, 128), (0, 128, 192, 192, 256, 0),
    (352, 192, 320, 160, 224, 128), (352, 192, 320, 192, 224, 128),
)  # fmt: skip
"""Of each module: 1 × 1; before 3 × 3 and after; before two 3 × 3 and after; after the pooling."""


@architecture()
def inception_v2(
    *, classes: int = 1000, in_channels: int = 3, dropout: float = 0.2, stem: str = "paper"
) -> nn.Module:
    """Inception v2 (BN-Inception): batch norm everywhere, and two 3 × 3 in place of a 5 × 5.

    [n, in_channels, height, width] → [n, classes]. 11,285,224 parameters; 2.033G MACs at 224 × 224.
    stem: 'small' begins with a 3 × 3 convolution that leaves all pixels. Ioffe, Szegedy 2015; the
    convolutions have no biases, which batch norm makes idle (11,295,240 parameters with them).
    """
    layers: list[nn.Module] = [
        first_layers(stem, in_channels, 64, 7), conv(64, 64), conv(64, 192, 3), shrink(),
    ]  # fmt: skip
    channels = 192
    for i, (one, low, three, narrow, double, pooled) in enumerate(_V2):
        stride = 1 if one else 2
        branches = [
            tower(channels, (low, 1), (three, 3, stride)),
            tower(channels, (narrow, 1), (double, 3), (double, 3, stride)),
        ]
        pool = shrink(stride=stride) if not one or i == len(_V2) - 1 else mean()
        branches += [tower(channels, (one, 1))] if one else []
        branches += [tower(channels, *([(pooled, 1)] if one else []), before=pool)]
        layers.append(Parallel(*branches))
        channels = (one + pooled if one else channels) + three + double
    return Classifier("inception_v2", nn.Sequential(*layers), head(channels, classes, dropout))
