"""Small networks for tests, written as functions of their parts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from taut.trace import Trace, trace

Forward = Callable[..., Any]


class Net(nn.Module):
    """Parts, and a function of them and the input."""

    def __init__(self, run: Forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        return self.run(self, *args, **kwargs)


def weight(*shape: int) -> nn.Parameter:
    """A parameter of random numbers."""
    return nn.Parameter(torch.randn(shape))


def traced(model: nn.Module, *args: Any, **kwargs: Any) -> Trace:
    """The trace of a model on these arguments."""
    return trace(model, (args, kwargs))
