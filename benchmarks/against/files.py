"""The files that other libraries make of a trained network, each scored by running it.

A peer takes a network and its task, and gives its file's bytes and the score.
"""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import taut

Peer = Callable[[nn.Module, taut.Task], tuple[int, float]]


class _Session(nn.Module):
    """A file that ONNX Runtime runs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = importlib.import_module("onnxruntime").InferenceSession(str(path))
        self.name = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])


def onnx_runtime(net: nn.Module, task: taut.Task) -> tuple[int, float]:
    """`quantize_dynamic`: int8 weights by channels, inputs rounded as they come."""
    library = importlib.import_module("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, small = Path(place) / "net.onnx", Path(place) / "int8.onnx"
        taut.export(net, whole, task.example(2))
        logging.disable(logging.CRITICAL)
        try:
            library.quantize_dynamic(
                str(whole), str(small), per_channel=True, weight_type=library.QuantType.QInt8
            )
        finally:
            logging.disable(logging.NOTSET)
        return small.stat().st_size, task.evaluate(_Session(small))


PEERS: dict[str, Peer] = {"ONNX Runtime int8": onnx_runtime}
