"""Reference architectures, with the exact parameter counts of their papers."""

from taut.zoo.lenet import LeNet5, LeNet300

__all__ = ["LeNet5", "LeNet300"]
