"""Layers that become Taut's operations in OpenVINO: alone in a file, in networks, and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taut.activations import LevelCode, StepCode
from taut.affine_weight import AffineWeight
from taut.bit_weight import BitWeight
from taut.engine_ops import Operation, operation_of
from taut.export.job import Job
from taut.export.onnx_file import model_of, save
from taut.export.targets import TARGETS
from taut.hashed_weight import Drawing, HashedWeight
from taut.kernels import Levels
from taut.layers import pack_layer, run_dense
from taut.packed import PackedWeight, Plain
from taut.shared_weight import SharedValues
from taut.sparse_weight import SparseWeight

pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
helper = onnx.helper


def plain(*shape: int) -> Plain:
    return Plain.of(torch.randn(*shape), "float32")


def shared(shape: tuple[int, ...], entries: int) -> SharedValues:
    return SharedValues(torch.randint(0, entries, shape), plain(entries))


def bits(shape: tuple[int, ...], planes: int, rows: bool = True) -> BitWeight:
    scale = Plain.of(torch.rand(planes, shape[0] if rows else 1) + 0.1, "float32")
    return BitWeight(torch.randint(0, 2**planes, shape), scale)


def affine(shape: tuple[int, ...], width: int, steps: int, zero: int | None = None) -> AffineWeight:
    zeros = torch.tensor(2**width if zero is None else zero)
    each = Plain.of(torch.rand(steps) + 0.1, "float32")
    return AffineWeight(torch.randint(0, 2**width, shape), width, each, zeros)


def sparse(shape: tuple[int, ...], values: str = "float32") -> SparseWeight:
    mask = torch.rand(shape) < 0.2
    count = int(mask.sum())
    numbers = torch.randn(count)
    inner = shared((count,), 31) if values == "shared" else Plain.of(numbers, values)
    return SparseWeight(mask, inner)


def hashed(shape: tuple[int, ...], run: int) -> HashedWeight:
    return HashedWeight(Drawing(shape, (37,), 12345, run), plain(37), 0.5)


def signs(channels: int = 1) -> LevelCode:
    return LevelCode(Levels.sign(torch.randn(channels) / 2))


def pair() -> LevelCode:
    sign = Levels.sign(0.25)
    return LevelCode(
        Levels(
            thresholds=sign.thresholds, pattern=sign.pattern, scale=torch.tensor([0.5]), offset=0.25
        )
    )


def two_bits() -> StepCode:
    return StepCode(torch.tensor([0.4]), 0, 3)


LINEAR = {
    "binary": (lambda: bits((33, 130), 1), lambda: signs(130), "BitplaneMatmul"),
    "ternary, pair": (lambda: bits((16, 64), 2), pair, "BitplaneMatmul"),
    "learned levels": (lambda: bits((5, 65), 3), two_bits, "BitplaneMatmul"),
    "real inputs": (lambda: bits((17, 31), 2, rows=False), None, "BitplaneMatmul"),
    "k bits": (lambda: affine((31, 63), 2, 31), two_bits, "BitplaneMatmul"),
    "shared": (lambda: shared((33, 129), 16), None, "LookupMatmul"),
    "shared, 5 bits": (lambda: shared((7, 15), 27), None, "LookupMatmul"),
    "shared, 8 bits": (lambda: shared((4, 200), 256), None, "LookupMatmul"),
    "steps of rows": (lambda: affine((17, 33), 4, 17), None, "LookupMatmul"),
    "steps of runs": (lambda: affine((6, 256), 4, 12), None, "LookupMatmul"),
    "odd zero": (lambda: affine((6, 40), 3, 6, zero=5), None, "LookupMatmul"),
    "rounded inputs": (
        lambda: shared((9, 40), 16), lambda: StepCode(torch.tensor([0.02]), -127, 127),
        "LookupMatmul",
    ),
    "whole numbers": (
        lambda: affine((17, 133), 4, 17), lambda: StepCode(torch.tensor([0.02]), -127, 127),
        "LookupMatmulInt8",
    ),
    "whole numbers above zero": (
        lambda: affine((10, 300), 3, 10), lambda: StepCode(torch.tensor([0.01]), 0, 127),
        "LookupMatmulInt8",
    ),
    "signs, whole inputs": (
        lambda: bits((33, 130), 1), lambda: StepCode(torch.tensor([0.02]), -127, 127),
        "LookupMatmulInt8",
    ),
    "signs of one scale, whole inputs": (
        lambda: bits((9, 64), 1, rows=False), lambda: StepCode(torch.tensor([0.01]), 0, 127),
        "LookupMatmulInt8",
    ),
    "sparse": (lambda: sparse((33, 70)), None, "SparseMatmul"),
    "sparse halves": (lambda: sparse((15, 31), "float16"), None, "SparseMatmul"),
    "sparse, shared": (lambda: sparse((17, 100), "shared"), None, "SparseMatmul"),
    "hashed": (lambda: hashed((19, 45), 1), None, "HashedMatmul"),
    "hashed runs": (lambda: hashed((33, 130), 16), None, "HashedMatmul"),
}  # fmt: skip

CONVS = {
    "conv, binary": (
        lambda: bits((33, 65, 3, 3), 1), pair, (65, 33, 3, 1, 1, 1, 1), "BitplaneConv2d",
    ),
    "conv, grouped": (
        lambda: bits((6, 5, 3, 2), 2), signs, (10, 6, (3, 2), 2, 0, 1, 2), "BitplaneConv2d",
    ),
    "conv, k bits": (
        lambda: affine((17, 9, 1, 1), 2, 17), two_bits, (9, 17, 1, 2, 0, 1, 1), "BitplaneConv2d",
    ),
    "conv, sparse": (lambda: sparse((7, 6, 5, 5)), None, (6, 7, 5, 1, 2, 1, 1), "SparseConv2d"),
    "conv, sparse, shared": (
        lambda: sparse((8, 3, 3, 3), "shared"), None, (6, 8, 3, 2, 1, 2, 2), "SparseConv2d",
    ),
}  # fmt: skip


def packed(layer: nn.Module, weight: PackedWeight, code=None) -> nn.Sequential:
    """A network of one layer, packed."""
    pack_layer(layer, {"weight": weight}, code() if code else None)
    return nn.Sequential(layer).eval()


def one(operation: Operation, x: Tensor) -> bytes:
    """An ONNX file of one operation, whose channels stand where PyTorch has them."""
    node = helper.make_node(
        operation.name, ["x", "weight"], ["y"], domain="taut", **operation.attributes
    )
    nodes, end = [node], "y"
    if operation.channels_last:
        nodes.append(helper.make_node("Transpose", ["y"], ["turned"], perm=[0, 3, 1, 2]))
        end = "turned"
    weight = onnx.numpy_helper.from_array(operation.constant().numpy(), "weight")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "one", [value("x", 1, ["n", *x.shape[1:]])], [value(end, 1, None)], [weight]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("taut", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def answer(core, file: bytes, x: Tensor) -> Tensor:
    """What OpenVINO says."""
    model = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(np.array(model(x.numpy())[0]))


def answers(core, network: nn.Module, x: Tensor) -> Tensor:
    """What OpenVINO says of a network of one layer."""
    operation, code = operation_of(network[0]), network[0].input_code
    dim = -1 if x.dim() == 2 else 1
    return answer(core, one(operation, x), code.rounded(x, dim) if operation.rounds else x)


def close(found: Tensor, network: nn.Module, x: Tensor) -> None:
    run_dense(network, True)
    with torch.no_grad():
        wanted = network(x)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def alike(found: Tensor, wanted: Tensor) -> None:
    """The same, but that a number next to a threshold may fall to its other side."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def kept_onnx(network: nn.Module, x: Tensor, to: Path) -> bytes:
    """The ONNX file that OpenVINO reads of a network whose layers stay compressed."""
    job = Job(packed=network, example=((x,), {}), about={}, keep=True)
    engine = TARGETS["openvino"].module()
    save(model_of(job, engine.opened, engine.suit), to)
    return to.read_bytes()


def damaged(case: str, change: Callable[[Tensor], Tensor] | None = None, **attributes) -> bytes:
    """The file of a linear case or a convolution, with attributes, or its constant, changed."""
    weight, code, *rest = (LINEAR | CONVS)[case]
    held = weight()
    if case in LINEAR:
        layer: nn.Module = nn.Linear(held.shape[1], held.shape[0])
        x = torch.randn(2, held.shape[1])
    else:
        channels, out, kernel, stride, padding, dilation, groups = rest[0]
        layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups)
        x = torch.randn(2, channels, 9, 10)
    pack_layer(layer, {"weight": held}, code() if code else None)
    operation = operation_of(layer)
    operation.attributes.update(attributes)
    file = onnx.load_from_string(one(operation, x))
    if change is not None:
        tensor = onnx.numpy_helper.from_array(change(operation.constant()).numpy(), "weight")
        file.graph.initializer[0].CopyFrom(tensor)
    return file.SerializeToString()
