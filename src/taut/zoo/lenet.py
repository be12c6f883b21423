"""The two LeNets of the compression literature, for images of 28 × 28.

LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition (1998);
the layer widths are those of the Caffe examples that later papers compress.
"""

import torch
from torch import Tensor, nn


class LeNet300(nn.Module):
    """LeNet-300-100: 784-300-100-10 with ReLU. [n, 1, 28, 28] or [n, 784] → [n, 10].

    266,610 parameters, 266,200 MACs.
    """

    def __init__(self, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x.flatten(1)))
        x = torch.relu(self.fc2(self.drop(x)))
        return self.fc3(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe, 20-50-500: two 5×5 convolutions, each with 2×2 max pooling, two layers.

    [n, 1, 28, 28] → [n, 10]. 431,080 parameters, 2,293,000 MACs.
    """

    def __init__(self, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1(x))
        x = self.pool(self.conv2(x))
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc2(self.drop(x))  # type: ignore[no-any-return]
