"""ONNX Runtime, which runs ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxscript import ir
from torch import Tensor

from taut.errors import ExportError
from taut.export.job import Job
from taut.export.onnx_file import about, model_of, refused, save
from taut.export.targets import Runner, check_count
from taut.export.whole import flatten_products, unsign, widen_rest

_RECURRENT = (b"LSTM", b"GRU", b"RNN")

__all__ = ["about", "opened", "write"]


def write(job: Job, path: Path) -> None:
    """Write the network as ONNX."""
    save(model_of(job, opened, suit), path)


def suit(model: ir.Model) -> None:
    """Whole numbers as ONNX Runtime has most products for them: uint8 by int8, flat."""
    unsign(model.graph)
    flatten_products(model.graph)


def opened(path: Path, threads: int | None = None, precision: str = "float32") -> Runner:
    """A session of ONNX Runtime on the processor, with this many threads (by default PyTorch's).

    precision: float32, or `auto`: it may round the inputs of products with whole numbers, too.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if precision != "auto":
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if _only_weights(path):
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        session = onnxruntime.InferenceSession(
            _widened(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own types have no common base
        raise ExportError(refused("ONNX Runtime", path, error)) from error
    names = [i.name for i in session.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        check_count(tensors, names)
        given = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        try:
            found = session.run(None, given)
        except Exception as error:
            raise ExportError(refused("ONNX Runtime", path, error)) from error
        return [torch.from_numpy(np.asarray(y)) for y in found]

    return run


def _widened(path: Path) -> str | bytes:
    """The file, or its content where recurrent layers would widen their weights at every run."""
    content = path.read_bytes() if path.is_file() else b""
    layers = any(kind in content for kind in _RECURRENT)
    if not layers or b"QuantizeLinear" not in content or _only_weights(path):
        return str(path)
    model = ir.from_proto(onnx.load_from_string(content))
    widen_rest(model)
    return bytes(ir.to_proto(model).SerializeToString())


def _only_weights(path: Path) -> bool:
    """Whether only weights are whole numbers, and of layers that would widen them at every run."""
    content = path.read_bytes() if path.is_file() else b""
    layers = any(kind in content for kind in (b"Conv", *_RECURRENT))
    return layers and b"QuantizeLinear" not in content.replace(b"DequantizeLinear", b"")
