"""The residual networks of CIFAR, for small images of any size.

He, Zhang, Ren, Sun: Deep residual learning for image recognition (CVPR 2016), section 4.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResNet(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks with 16, 32 and 64 channels, a layer.

    [n, in_channels, height, width] → [n, classes]. depth: 6n + 2. stride: of the first
    convolution; 2 makes the work a quarter. Shortcuts are the paper's option A, which has no
    parameters. 269,722, 853,018 and 1,727,962 parameters at depth 20, 56 and 110 for three
    channels and ten classes. Raises ValueError for another depth.
    """

    def __init__(
        self, depth: int = 20, in_channels: int = 3, classes: int = 10, stride: int = 1
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2, like 20, 56 or 110, got {depth}")
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, 16, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        widths = [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(
            *(_Block(a, b) for a, b in zip([16, *widths], widths, strict=False))
        )
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.conv(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """relu(x + f(x)); where the channels double, the shortcut skips pixels and adds zeros."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.grows = width - channels
        stride = 2 if self.grows else 1
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        if self.grows:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grows // 2, self.grows // 2))
        return torch.relu(x + y)
