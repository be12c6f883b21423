"""Reference architectures, with the exact parameter counts of their papers."""

from taut.zoo.language import LstmLanguageModel, TransformerLanguageModel
from taut.zoo.lenet import LeNet5, LeNet300
from taut.zoo.resnet import ResNet

__all__ = ["LeNet5", "LeNet300", "LstmLanguageModel", "ResNet", "TransformerLanguageModel"]
