"""MobileNetV1: each convolution split into one over pixels and one over channels.

Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam: MobileNets: efficient convolutional
neural networks for mobile vision applications (2017).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from taut.zoo.blocks import Classifier, conv, depthwise, head, pairs
from taut.zoo.blocks import stem as first_layers
from taut.zoo.registry import Rule, architecture

_WIDTHS = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]


@architecture(resolution=Rule(low=0.1, high=1, remedy="0.5 halves the image's height and width"))
def mobilenet_v1(
    *, width: float = 1.0, resolution: float = 1.0, classes: int = 1000, in_channels: int = 3,
    stem: str = "paper",
) -> nn.Module:  # fmt: skip
    """MobileNetV1: 13 pairs of a depthwise 3 × 3 and a 1 × 1 convolution.

    [n, in_channels, height, width] → [n, classes]. 4,231,976 parameters; 568.7M MACs at 224 × 224.
    width: the paper's multiplier; a layer has round(width · channels) channels, eight at least.
    resolution: the paper's multiplier; images are scaled to round(resolution · size) first. stem:
    'small' where the first convolution leaves all pixels. Howard et al. 2017; that the network
    scales the images itself, so that one task serves all resolutions, is ours.
    """
    first, *widths = (max(8, round(width * c)) for c in [32, *_WIDTHS])
    return _MobileNet(resolution, first, widths, classes, in_channels, stem)


class _MobileNet(Classifier):
    def __init__(
        self, resolution: float, first: int, widths: list[int], classes: int, in_channels: int,
        stem: str,
    ) -> None:  # fmt: skip
        layers: list[nn.Module] = [first_layers(stem, in_channels, first, 3, pool=False)]
        for i, (a, b) in enumerate(pairs(first, widths)):
            stride = 2 if i in (1, 3, 5, 11) else 1
            layers += [depthwise(a, 3, stride), conv(a, b)]
        super().__init__("mobilenet_v1", nn.Sequential(*layers), head(widths[-1], classes))
        self.resolution = resolution

    def forward(self, x: Tensor) -> Tensor:
        if self.resolution < 1:
            size = [max(1, round(self.resolution * n)) for n in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return super().forward(x)
