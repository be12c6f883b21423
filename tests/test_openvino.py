"""Taut's operations in OpenVINO: each against its definition, whole networks, and bad constants."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from taut.activations import LevelCode, StepCode
from taut.affine_weight import AffineWeight
from taut.bit_weight import BitWeight
from taut.engine_graph import graph_of, onnx_of
from taut.engine_ops import Operation, operation_of
from taut.errors import ExportError
from taut.hashed_weight import Drawing, HashedWeight
from taut.kernels import Levels
from taut.kernels import openvino as built
from taut.layers import pack_layer, run_dense
from taut.packed import PackedWeight, Plain
from taut.shared_weight import SharedValues
from taut.sparse_weight import SparseWeight

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
helper = onnx.helper
pytest.importorskip("onnxscript")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def core(tmp_path_factory):
    """OpenVINO with Taut's operations, which are compiled once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAUT_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            library = built.extension()
        except ExportError as error:
            pytest.skip(str(error))
    found = openvino.Core()
    found.add_extension(str(library))
    found.set_property("CPU", {"INFERENCE_NUM_THREADS": 1})
    return found


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
    inner: PackedWeight
    if values == "shared":
        inner = shared((count,), 31)
    else:
        inner = Plain.of(torch.randn(count), values)
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
    "sparse": (lambda: sparse((33, 70)), None, "SparseMatmul"),
    "sparse halves": (lambda: sparse((15, 31), "float16"), None, "SparseMatmul"),
    "sparse, shared": (lambda: sparse((17, 100), "shared"), None, "SparseMatmul"),
    "hashed": (lambda: hashed((19, 45), 1), None, "HashedMatmul"),
    "hashed runs": (lambda: hashed((33, 130), 16), None, "HashedMatmul"),
}  # fmt: skip

CONVS = {
    "binary": (lambda: bits((33, 65, 3, 3), 1), pair, (65, 33, 3, 1, 1, 1, 1), "BitplaneConv2d"),
    "grouped": (lambda: bits((6, 5, 3, 2), 2), signs, (10, 6, (3, 2), 2, 0, 1, 2), "BitplaneConv2d"),
    "k bits": (
        lambda: affine((17, 9, 1, 1), 2, 17), two_bits, (9, 17, 1, 2, 0, 1, 1), "BitplaneConv2d",
    ),
    "sparse": (lambda: sparse((7, 6, 5, 5)), None, (6, 7, 5, 1, 2, 1, 1), "SparseConv2d"),
    "sparse, shared": (
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


@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_layer_gives_what_its_dense_weight_gives(core, case):
    weight, code, name = LINEAR[case]
    held = weight()
    network = packed(nn.Linear(held.shape[1], held.shape[0]), held, code)
    assert operation_of(network[0]).name == name
    x = torch.randn(5, held.shape[1])
    close(answers(core, network, x), network, x)


@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_gives_what_its_dense_weight_gives(core, case):
    weight, code, (channels, out, kernel, stride, padding, dilation, groups), name = CONVS[case]
    layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups)
    network = packed(layer, weight(), code)
    assert operation_of(network[0]).name == name
    x = torch.randn(3, channels, 9, 10)
    close(answers(core, network, x), network, x)
