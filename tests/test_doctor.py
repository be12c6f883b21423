"""taut doctor: what it found, and what it says of it."""

import json
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import taut.cli
from taut import doctor
from taut.cli import app
from taut.kernels import native


@pytest.fixture
def printed(monkeypatch):
    """What the command prints, on a wide terminal."""
    monkeypatch.setattr(taut.cli.out, "width", 200)
    return lambda: CliRunner().invoke(app, ["doctor"]).output


def test_it_says_what_runs_here(printed):
    text, found = printed(), doctor.diagnose()
    assert torch.__version__ in text
    assert found.machine["processor"] in text
    for op, variant in found.operations.items():
        assert [line.split()[1] for line in text.splitlines() if line.split()[0] == op] == [variant]


def test_json_holds_the_same():
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found == json.loads(json.dumps(doctor.diagnose().to_json()))
    assert found["machine"]["threads"] == torch.get_num_threads()


@pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built")
def test_the_variant_is_the_one_that_is_in_force():
    found = doctor.diagnose()
    assert found.library.endswith("native_ops.so")
    assert set(found.operations) == set(native.operations())
    assert found.operations["lookup_matmul"] == native.variants("lookup_matmul")[0]


def test_without_kernels_it_says_so(monkeypatch, printed):
    monkeypatch.setattr(native, "LOADED", False)
    monkeypatch.setattr(native, "LIBRARY", None)
    assert doctor.diagnose().operations == {}
    assert "not built: plain PyTorch runs instead" in printed()


def test_engines_are_named_with_their_version_or_their_remedy(monkeypatch, printed):
    real = metadata.version

    def version(name):
        if name == "openvino":
            return "2099.1"
        if name in doctor.ENGINES:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(
        doctor, "remedy", lambda engine: "pip install taut[onnx]" if engine[0] == "o" else None
    )
    monkeypatch.setattr(taut.cli, "remedy", doctor.remedy)
    lines = {line.split()[0]: line.split()[1:] for line in printed().splitlines()}
    assert lines["openvino"] == ["2099.1"]
    assert " ".join(lines["onnxruntime"]) == "not installed: pip install taut[onnx]"
    assert " ".join(lines["executorch"]) == "not installed"


def test_a_remedy_is_an_extra_that_exists():
    extras = metadata.metadata("taut").get_all("Provides-Extra")
    for engine, extra in doctor.ENGINES.items():
        assert doctor.remedy(engine) == (f"pip install taut[{extra}]" if extra in extras else None)
