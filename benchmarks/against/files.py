"""The files that other libraries make of a trained network, each scored by running it.

A peer takes a network and its task, and gives its files' bytes and scores. NNCodec wants another
numpy than Taut, so it runs in a Python of its own:

    python -m venv nncodec && nncodec/bin/pip install nncodec
    export TAUT_NNCODEC=$PWD/nncodec/bin/python
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import taut
from taut.modules import clone

File = tuple[int, float]
Peer = Callable[[nn.Module, taut.Task], list[File]]

STEPS = (-38, -32, -26, -20)
"""Of NNCodec's quantization, finest first; -32 is its default."""


class PeerError(Exception):
    """A peer that is not there, or that failed."""


class Session(nn.Module):
    """A file that ONNX Runtime runs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = importlib.import_module("onnxruntime").InferenceSession(str(path))
        self.name = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.name: x.numpy()})[0])


def onnx_runtime(net: nn.Module, task: taut.Task) -> list[File]:
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
        return [(small.stat().st_size, task.evaluate(Session(small)))]


CODED = """
import sys
import numpy as np
from nncodec.nn import decode, encode
weights = dict(np.load(sys.argv[1]))
for step in sys.argv[3:]:
    stream = encode(weights, args={"qp": int(step), "verbose": False})
    np.savez(f"{sys.argv[2]}/{step}.npz", **decode(stream))
    print("bytes", step, len(stream))
"""


def nncodec(net: nn.Module, task: taut.Task, steps: Sequence[int] = STEPS) -> list[File]:
    """NNCodec's stream at some steps; what it is decoded to is scored by PyTorch.

    Raises PeerError where it is not installed, or fails.
    """
    python = os.environ.get("TAUT_NNCODEC", sys.executable)
    with tempfile.TemporaryDirectory() as place:
        weights = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
        np.savez(Path(place) / "net.npz", **{k: v.numpy() for k, v in weights.items()})
        done = subprocess.run(
            [python, "-c", CODED, f"{place}/net.npz", place, *map(str, steps)],
            capture_output=True, text=True, check=False, cwd=place,
        )  # fmt: skip
        if done.returncode:
            raise PeerError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        found = []
        for line in done.stdout.splitlines():
            if line.startswith("bytes "):
                _, step, size = line.split()
                decoded = np.load(Path(place) / f"{step}.npz")
                copy = clone(net)
                told = {
                    k: torch.from_numpy(decoded[k]).reshape(v.shape) for k, v in weights.items()
                }
                copy.load_state_dict(told, strict=False)
                found.append((int(size), task.evaluate(copy)))
        return found


PEERS: dict[str, Peer] = {"ONNX Runtime int8": onnx_runtime, "NNCodec": nncodec}
