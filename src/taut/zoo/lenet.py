"""The two LeNets of the compression literature, for images of 28 × 28.

LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition (1998);
the layer widths are those of the Caffe examples that later papers compress.
"""

import torch
from torch import Tensor, nn

from taut.errors import ZooError
from taut.zoo.registry import Rule, architecture


class LeNet300(nn.Module):
    """784-300-100-10 with ReLU. [n, in_channels, size, size] or [n, in_channels · size²] → [n, 10].

    266,610 parameters, 266,200 MACs.
    """

    def __init__(
        self, classes: int = 10, dropout: float = 0.0, in_channels: int = 1, size: int = 28
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * size**2, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(self.drop(x)))
        return self.fc3(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe, 20-50-500: two 5×5 convolutions, each with 2×2 max pooling, two layers.

    [n, in_channels, size, size] → [n, 10]. 431,080 parameters, 2,293,000 MACs. Raises ValueError
    for a size below 16.
    """

    def __init__(
        self, classes: int = 10, dropout: float = 0.0, in_channels: int = 1, size: int = 28
    ) -> None:
        super().__init__()
        left = ((size - 4) // 2 - 4) // 2
        if left < 1:
            raise ZooError(f"lenet_5: size must be at least 16, got {size}; scale the images up")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * left**2, 500)
        self.fc2 = nn.Linear(500, classes)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x))
        x = self.pool(self.conv2(x))
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc2(self.drop(x))  # type: ignore[no-any-return]


@architecture(size=Rule(low=1, remedy="it is the height and width of the images, in pixels"))
def lenet_300_100(
    *, classes: int = 10, in_channels: int = 1, size: int = 28, dropout: float = 0.0
) -> LeNet300:
    """LeNet-300-100: a perceptron of 300 and 100 hidden units with ReLU.

    [n, in_channels, size, size] → [n, classes]. 266,610 parameters; 266,200 MACs at 28 × 28.
    LeCun et al. 1998; ReLU as in Han et al. 2015.
    """
    return LeNet300(classes, dropout, in_channels, size)


@architecture(size=Rule(low=16, remedy="scale the images up"))
def lenet_5(
    *, classes: int = 10, in_channels: int = 1, size: int = 28, dropout: float = 0.0
) -> LeNet5:
    """LeNet-5 as in Caffe: 20 and 50 channels of 5 × 5 with 2 × 2 max pooling, 500 units.

    [n, in_channels, size, size] → [n, classes]. 431,080 parameters; 2,293,000 MACs at 28 × 28.
    LeCun et al. 1998, with the widths of Caffe's example.
    """
    return LeNet5(classes, dropout, in_channels, size)
