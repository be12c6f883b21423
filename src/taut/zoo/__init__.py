"""Reference architectures, with the exact parameter counts of their papers.

>>> import taut, torch
>>> net = taut.zoo.create("mobilenet_v1", width=0.5, classes=10, in_channels=1, stem="small")
>>> taut.trace(net, ((torch.zeros(1, 1, 28, 28),), {})).macs
10865216

`names()` lists them; each is a function here too, whose docstring gives paper, shapes, parameters
and work: `help(taut.zoo.mobilenet_v1)`.
"""

from taut.zoo.densenet import densenet_121, densenet_169, densenet_201, densenet_bc_100_12
from taut.zoo.inception import inception_v1, inception_v2
from taut.zoo.inception_factorised import inception_v3, inception_v4
from taut.zoo.language import (
    GruLanguageModel,
    LstmLanguageModel,
    TransformerLanguageModel,
    gru_language_model,
    lstm_language_model,
    transformer_language_model,
)
from taut.zoo.lenet import LeNet5, LeNet300, lenet_5, lenet_300_100
from taut.zoo.mobilenet import mobilenet_v1
from taut.zoo.nin import nin
from taut.zoo.registry import create, names
from taut.zoo.resnet import ResNet, resnet_18, resnet_20, resnet_50, resnet_56, resnet_110
from taut.zoo.shufflenet import shufflenet_v1, shufflenet_v2
from taut.zoo.squeezenet import squeezenet_1_0, squeezenet_1_1
from taut.zoo.vgg import vgg_small

__all__ = [
    "GruLanguageModel",
    "LeNet5",
    "LeNet300",
    "LstmLanguageModel",
    "ResNet",
    "TransformerLanguageModel",
    "create",
    "densenet_121",
    "densenet_169",
    "densenet_201",
    "densenet_bc_100_12",
    "gru_language_model",
    "inception_v1",
    "inception_v2",
    "inception_v3",
    "inception_v4",
    "lenet_5",
    "lenet_300_100",
    "lstm_language_model",
    "mobilenet_v1",
    "names",
    "nin",
    "resnet_18",
    "resnet_20",
    "resnet_50",
    "resnet_56",
    "resnet_110",
    "shufflenet_v1",
    "shufflenet_v2",
    "squeezenet_1_0",
    "squeezenet_1_1",
    "transformer_language_model",
    "vgg_small",
]
