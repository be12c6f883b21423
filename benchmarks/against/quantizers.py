"""The int8 networks that other libraries make, each by what its own documentation recommends.

Each takes a network, batches of inputs to calibrate on and a folder, and gives an `Entry`. The
first batch's shape is that which the file is made for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from against.racing import TORCHAO, Entry
from torch import Tensor, nn

Quantizer = Callable[[nn.Module, Sequence[Tensor], Path], Entry]


def quiet(quantizer: Quantizer) -> Quantizer:
    """The same without what it prints, warns of and logs."""

    def muted(net: nn.Module, batches: Sequence[Tensor], folder: Path) -> Entry:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            try:
                return quantizer(net, batches, folder)
            finally:
                logging.disable(logging.NOTSET)

    return muted


def float_onnx(net: nn.Module, example: Tensor, path: Path) -> Path:
    """The network in floats, by PyTorch's exporter."""
    torch.onnx.export(
        net, (example,), str(path), dynamo=True, verbose=False, external_data=False,
        input_names=["x"],
    )  # fmt: skip
    return path


@quiet
def nncf(net: nn.Module, batches: Sequence[Tensor], folder: Path) -> Entry:
    """`nncf.quantize` of an OpenVINO model; for attention by the model type that it has for it."""
    library, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    library.set_log_level(logging.ERROR)
    model = openvino.convert_model(float_onnx(net, batches[0], folder / "float.onnx"))
    attention = any(isinstance(m, nn.MultiheadAttention) for m in net.modules())
    quantized = library.quantize(
        model, library.Dataset([b.numpy() for b in batches]),
        model_type=library.ModelType.TRANSFORMER if attention else None,
        subset_size=len(batches),
    )  # fmt: skip
    openvino.save_model(quantized, folder / "net.xml", compress_to_fp16=False)
    return Entry("NNCF", "openvino", folder / "net.xml")


@quiet
def onnx_runtime(net: nn.Module, batches: Sequence[Tensor], folder: Path) -> Entry:
    """`quantize_static`, after its preprocessing: QDQ, uint8 inputs, int8 weights by channels."""
    library = importlib.import_module("onnxruntime.quantization")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")

    class Reader(library.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, object] | None:
            batch = next(self.left, None)
            return None if batch is None else {"x": batch.numpy()}

    whole = float_onnx(net, batches[0], folder / "float.onnx")
    shapes.quant_pre_process(str(whole), str(folder / "prepared.onnx"))
    library.quantize_static(
        str(folder / "prepared.onnx"), str(folder / "net.onnx"), Reader(), per_channel=True,
        quant_format=library.QuantFormat.QDQ, activation_type=library.QuantType.QUInt8,
        weight_type=library.QuantType.QInt8,
    )  # fmt: skip
    return Entry("ONNX Runtime", "onnx", folder / "net.onnx")


@quiet
def torchao(net: nn.Module, batches: Sequence[Tensor], folder: Path) -> Entry:
    """Its static quantization for x86, which torch.compile lowers to oneDNN's int8."""
    pt2e = importlib.import_module("torchao.quantization.pt2e")
    steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        program = torch.export.export(net, (batches[0],)).module()
        prepared = steps.prepare_pt2e(program, quantizer)
        for batch in batches:
            prepared(batch)
        converted = steps.convert_pt2e(prepared)
    pt2e.move_exported_model_to_eval(converted)
    made = torch.export.export(converted, (batches[0],))
    torch.export.save(made, folder / "net.pt2")
    return Entry("torchao", TORCHAO, folder / "net.pt2")


QUANTIZERS: dict[str, Quantizer] = {
    "NNCF": nncf,
    "ONNX Runtime": onnx_runtime,
    "torchao": torchao,
}
