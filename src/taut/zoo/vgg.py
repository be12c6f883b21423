"""VGG-small, the network for small images on which low-bit methods are compared.

Simonyan, Zisserman: Very deep convolutional networks for large-scale image recognition (ICLR 2015);
the widths are those of Courbariaux, Hubara, Soudry, El-Yaniv, Bengio: Binarized neural networks
(2016), with the one layer at the end of Cai, He, Sun, Vasconcelos: Deep learning with low precision
by half-wave Gaussian quantization (CVPR 2017).
"""

from torch import nn

from taut.zoo.blocks import Classifier, conv, pairs
from taut.zoo.registry import Rule, architecture


@architecture(size=Rule(low=8, remedy="three poolings halve the images"))
def vgg_small(
    *, width: float = 1.0, classes: int = 10, in_channels: int = 3, size: int = 32,
    dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """VGG-small: 128, 128, 256, 256, 512 and 512 channels of 3 × 3 with batch norm, then a layer.

    [n, in_channels, size, size] → [n, classes]. 4,660,106 parameters; 607.6M MACs at 32 × 32.
    Max pooling of 2 × 2 follows every second convolution. width: factor on the channels, four at
    least. Courbariaux et al. 2016, Cai et al. 2017.
    """
    widths = [max(4, round(width * c)) for c in (128, 128, 256, 256, 512, 512)]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairs(in_channels, widths)):
        layers += [conv(a, b, 3), *[nn.MaxPool2d(2)] * (i % 2)]
    last = nn.Linear(widths[-1] * (size // 8) ** 2, classes)
    head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), last)
    return Classifier("vgg_small", nn.Sequential(*layers), head, smallest=size // 8 * 8)
