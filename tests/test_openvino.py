"""Taut's operations in OpenVINO: each against its definition, whole networks, and bad constants."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_layers import (
    CONVS,
    LINEAR,
    alike,
    answer,
    answers,
    bits,
    close,
    damaged,
    kept_onnx,
    one,
    onnx,
    packed,
    pair,
    shared,
    sparse,
)
from torch import Tensor, nn

from taut.engine_ops import operation_of
from taut.errors import ExportError
from taut.export import export
from taut.kernels import openvino as built
from taut.layers import pack_layer

openvino = pytest.importorskip("openvino")
ROOT = Path(__file__).parents[1]


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


# ---- whole networks -------------------------------------------------------------------------


class Residual(nn.Module):
    """Two binary convolutions and a sum, as in a ResNet, between plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(20, 20, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(20) for _ in range(2))
        self.fc = nn.Linear(20, 7)
        for norm in self.norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.norms[0](self.convs[0](x)))
        x = torch.relu(x + self.norms[1](self.convs[1](y)))
        return self.fc(x.mean((2, 3)))


def residual() -> nn.Module:
    """The same, packed."""
    network = Residual()
    for conv in network.convs:
        pack_layer(conv, {"weight": bits((20, 20, 3, 3), 1)}, pair())
    pack_layer(network.fc, {"weight": shared((7, 20), 16)})
    return network.eval()


@pytest.fixture(scope="module")
def residual_file(library, tmp_path_factory):
    """A packed network, and its ONNX file with Taut's operations."""
    torch.manual_seed(1)
    network = residual()
    folder = tmp_path_factory.mktemp("residual")
    return network, kept_onnx(network, torch.randn(2, 3, 12, 12), folder / "net.onnx")


def test_norms_sums_and_relu_go_into_the_operations(residual_file):
    nodes = onnx.load_from_string(residual_file[1]).graph.node
    ours = [n for n in nodes if n.domain == "taut"]
    assert [n.op_type for n in ours] == ["BitplaneConv2d", "BitplaneConv2d", "LookupMatmul"]
    assert [len(n.input) for n in ours] == [2, 3, 2]
    assert not {"BatchNormalization", "Relu", "Gemm"} & {n.op_type for n in nodes}
    assert sum(n.op_type == "Transpose" for n in nodes) == 2  # to channels last, and back


def test_a_whole_network_gives_its_answers(core, residual_file, tmp_path):
    network, file = residual_file
    x = torch.randn(3, 3, 12, 12)
    alike(answer(core, file, x), network(x).detach())
    xml = tmp_path / "net.xml"  # OpenVINO's own format holds the operations too
    openvino.save_model(core.read_model(file), xml, compress_to_fp16=False)
    found = core.compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())
    alike(torch.from_numpy(np.array(found[0])), network(x).detach())


class Steps(nn.Module):
    """A layer whose batch norm is over the steps of a sequence, as many as it has units."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


def test_a_norm_over_other_channels_stays_where_it_is(core, tmp_path):
    network = Steps()
    pack_layer(network.fc, {"weight": shared((5, 6), 16)})
    x = torch.randn(2, 5, 6)
    file = kept_onnx(network.eval(), x, tmp_path / "net.onnx")
    alike(answer(core, file, x), network(x).detach())


def test_export_keeps_layers_compressed_and_brings_the_library(library, residual_file, tmp_path):
    network, x = residual_file[0], torch.randn(3, 3, 12, 12)
    found = export(network, tmp_path / "net.xml", x)
    kinds = {"convs.0": "BitplaneConv2d", "convs.1": "BitplaneConv2d", "fc": "LookupMatmul"}
    assert found.kept == kinds
    assert found.decoded == ""
    assert found.library == tmp_path / "net.taut.so"
    assert found.library.read_bytes() == library.read_bytes()
    assert found.size_bytes == sum((tmp_path / f"net{s}").stat().st_size for s in (".xml", ".bin"))
    assert found.network is not None
    alike(found.network(x), network(x).detach())
    core = openvino.Core()  # as another program loads it
    with pytest.raises(RuntimeError, match="BitplaneConv2d"):
        core.read_model(found.path)
    core.add_extension(str(found.library))
    alike(answer(core, found.path, x), network(x).detach())
    decoded = export(network, tmp_path / "decoded.xml", x, keep="none")
    assert (decoded.kept, decoded.library, decoded.decoded) == ({}, None, "keep='none'")
    assert openvino.Core().read_model(decoded.path) is not None
    assert found.size_bytes < decoded.size_bytes
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "decoded.bin", "decoded.xml", "net.bin", "net.taut.so", "net.xml"
    ]  # fmt: skip


def test_layers_are_decoded_where_the_library_cannot_be_built(tmp_path, monkeypatch):
    def none():
        raise ExportError("no compiler here")

    monkeypatch.setattr(importlib.import_module("taut.export"), "extension", none)
    network, x = packed(nn.Linear(20, 30), shared((30, 20), 16)), torch.randn(2, 20)
    found = export(network, tmp_path / "net.xml", x)
    assert (found.kept, found.library, found.decoded) == ({}, None, "no compiler here")
    with pytest.raises(ExportError, match="no compiler here"):
        export(network, tmp_path / "net.xml", x, keep="all")
    with pytest.raises(ExportError, match=r"keep must be auto, all, none, got 'al'; did you mean"):
        export(network, tmp_path / "net.xml", x, keep="al")
    with pytest.raises(ExportError, match="onnx takes none of Taut's operations"):
        export(network, tmp_path / "net.onnx", x, keep="all")
    plain_network = nn.Sequential(nn.Linear(20, 3)).eval()
    assert export(plain_network, tmp_path / "net.xml", x).decoded == ""


def test_a_program_in_c_plus_plus_prints_the_same_answers(library, residual_file, tmp_path):
    network, file = residual_file
    (tmp_path / "net.onnx").write_bytes(file)
    program = tmp_path / "example"
    headers = built.wheel() / "include"
    built.run(
        [built.compiler(), "-std=c++17", "-O0", "-isystem", str(headers),
         str(ROOT / "examples" / "09_openvino.cpp"), *built.linked(built.wheel()),
         f"-Wl,-rpath,{built.wheel() / 'libs'}", "-o", str(program)]
    )  # fmt: skip
    line = [str(program), str(library), str(tmp_path / "net.onnx")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=300)
    said = torch.tensor([float(word) for word in done.stdout.split()])
    x = torch.linspace(-1, 1, 3 * 144).reshape(1, 3, 12, 12)
    alike(said, network(x).detach()[0])
    bad = subprocess.run(
        [str(program), str(library), "no.onnx"], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert "no.onnx" in bad.stderr


# ---- bad constants --------------------------------------------------------------------------


BAD = {
    "rows": ("shared", {"out": 34}, "ends within"),
    "no rows": ("shared", {"out": 0}, r"out must lie in \[1"),
    "negative": ("sparse", {"in": -1}, "in must lie in"),
    "huge": ("hashed", {"count": 2**31 - 1}, "ends within buckets"),
    "fewer": ("shared", {"out": 20}, "bytes more than it should|ends within"),
    "bits": ("shared", {"bits": 9}, r"bits must lie in \[1, 8\], got 9"),
    "tables": ("shared", {"tables": 2}, "must be 1 or 33 tables"),
    "group": ("steps of runs", {"group": 100}, "multiple of 128"),
    "relu": ("hashed", {"relu": 2}, "relu must lie in"),
    "run": ("hashed", {"run": 5}, "run must be 1, 4, 16 or 64"),
    "seed": ("hashed", {"seed": -1}, "seed must lie in"),
    "planes": ("binary", {"planes": 9}, "at most 8 planes"),
    "levels": ("binary", {"levels": 17}, "16 levels"),
    "kind": ("sparse", {"values": 5}, "of the kind 5"),
    "entries": ("sparse, shared", {"entries": 257}, "1 … 256 entries"),
    "count": ("sparse", {"count": -5}, "no sparse weight has -5 values"),
    "absurd": ("sparse", {"in": 2**28}, "more than 2\\*\\*27 columns"),
    "columns": ("sparse", {"in": 71}, "must have 71 columns"),
    "whole, low": ("whole numbers", {"low": -129}, r"low must lie in \[-128, 0\]"),
    "whole, high": ("whole numbers", {"high": 128}, r"high must lie in \[1, 127\]"),
    "whole, in": ("whole numbers", {"in": 2**17}, "in must lie in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_attributes_throw(core, case):
    name, attributes, said = BAD[case]
    with pytest.raises(RuntimeError, match=said):
        core.read_model(damaged(name, **attributes))


BAD_WINDOWS = {
    "groups": ({"groups": 0}, "do not fall into 0 groups"),
    "odd groups": ({"groups": 2}, "do not fall into 2 groups"),
    "stride": ({"stride": [0, 1]}, "pairs of small numbers"),
    "pair": ({"padding": [1]}, "pairs of small numbers"),
    "large": ({"dilation": [2**19, 1]}, "kernel is larger"),
    "taps": ({"kernel": [2**19, 2**19]}, "at most 2\\*\\*24|absurd size|ends within"),
}


@pytest.mark.parametrize("case", BAD_WINDOWS)
def test_bad_windows_throw(core, case):
    attributes, said = BAD_WINDOWS[case]
    with pytest.raises(RuntimeError, match=said):
        core.read_model(damaged("conv, binary", **attributes))


BAD_CONSTANTS = {
    "cut": (lambda raw: raw[:500], "ends within starts"),
    "longer": (lambda raw: torch.cat([raw, raw[:64]]), "64 bytes more than it should"),
    "nearly empty": (lambda raw: raw[:64], "ends within scale"),
    "floats": (lambda raw: raw.float(), "constant of bytes"),
    "two dimensions": (lambda raw: raw[None], "constant of bytes"),
    "wild": (lambda raw: torch.full_like(raw, 255), "starts must rise from 0"),
}


@pytest.mark.parametrize("case", BAD_CONSTANTS)
def test_bad_constants_throw(core, case):
    change, said = BAD_CONSTANTS[case]
    with pytest.raises(RuntimeError, match=said):
        core.read_model(damaged("sparse", change))


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_a_step_that_is_none_throws(core, step):
    def change(raw):
        raw = raw.clone()
        raw[-64:-60] = torch.tensor([step]).view(torch.uint8)
        return raw

    with pytest.raises(RuntimeError, match="step must be above 0"):
        core.read_model(damaged("whole numbers", change))


def test_starts_that_fall_throw(core):
    held = sparse((4, 20))
    held.starts[1] = 2**30
    layer = nn.Linear(20, 4)
    pack_layer(layer, {"weight": held})
    with pytest.raises(RuntimeError, match="starts must rise from 0"):
        core.read_model(one(operation_of(layer), torch.randn(2, 20)))


# ---- building -------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TAUT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match=r"no C\+\+20 compiler 'no-such-compiler'; install g\+\+"):
        built.compiler()
    monkeypatch.setattr(built.native, "LIBRARY", None)
    with pytest.raises(ExportError, match="without its native kernels"):
        built.extension()
    monkeypatch.setattr(built.native, "LIBRARY", str(tmp_path / "native_ops.so"))
    with pytest.raises(ExportError, match=r"libtaut_kernels\.a is missing"):
        built.extension()
    monkeypatch.setattr(built.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'taut\[openvino\]'"):
        built.extension()


def test_what_a_compiler_says_is_in_the_error(tmp_path):
    with pytest.raises(ExportError, match="cannot compile Taut's operations"):
        built.run([built.compiler(), str(tmp_path / "none.cpp")])
