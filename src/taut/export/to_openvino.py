"""OpenVINO files: an .xml and the .bin that belongs to it; and OpenVINO, which runs them.

Files that name any of Taut's operations are read with the library of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from torch import Tensor

from taut.engine_ops import NAMES
from taut.errors import ExportError
from taut.export import onnx_file
from taut.export.job import Job
from taut.export.targets import Runner, check_count
from taut.export.whole import widen_rest as suit
from taut.kernels.openvino import extension

_HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def write(job: Job, path: Path) -> None:
    """Write the network as OpenVINO's own format, by way of ONNX."""
    with TemporaryDirectory() as folder:
        between = Path(folder) / "net.onnx"
        onnx_file.save(onnx_file.model_of(job, opened, suit), between)
        try:
            model = _core(between).read_model(between)
        except RuntimeError as error:
            raise ExportError(onnx_file.refused("OpenVINO", path, error)) from error
        for key, value in onnx_file.about(between).items():
            model.set_rt_info(value, ["taut", key])
        openvino.save_model(model, path, compress_to_fp16=False)


def opened(path: Path, threads: int | None = None, precision: str = "float32") -> Runner:
    """A file on the processor, with this many threads (by default PyTorch's).

    precision: of its arithmetic, or `auto`: what OpenVINO takes for fastest here.
    """
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    if precision != "auto":
        options["INFERENCE_PRECISION_HINT"] = _HINTS[precision]
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # else what 4-bit weights meet is rounded
    try:
        compiled = _core(path).compile_model(path, "CPU", options)
    except RuntimeError as error:
        raise ExportError(onnx_file.refused("OpenVINO", path, error)) from error
    request = compiled.create_infer_request()
    names = [i.any_name for i in compiled.inputs]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        check_count(tensors, names)
        given = [np.ascontiguousarray(t.detach().cpu().numpy()) for t in tensors]
        try:
            found = request.infer(given, share_inputs=True)
        except RuntimeError as error:
            raise ExportError(onnx_file.refused("OpenVINO", path, error)) from error
        return [torch.from_numpy(np.array(found[o])) for o in compiled.outputs]

    return run


def _core(path: Path) -> openvino.Core:
    """OpenVINO, with Taut's operations where a file names any of them."""
    core = openvino.Core()
    content = path.read_bytes() if path.is_file() else b""
    if any(name.encode() in content for name in NAMES):
        core.add_extension(str(extension()))
    return core


def about(path: Path) -> dict[str, Any]:
    """What a file tells of itself."""
    model = _core(path).read_model(path)
    if not model.has_rt_info(["taut"]):
        return {}
    found = model.get_rt_info(["taut"])
    return {str(k): str(v.value if hasattr(v, "value") else v) for k, v in found.value.items()}
