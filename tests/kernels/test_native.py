"""Loading the kernels, and what happens where that is not possible."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch

from taut.kernels import native, reference


def test_without_kernels_the_definition_runs_and_says_so_once(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=r"native kernels \(they were not built\)") as said:
        assert native._load() is None
    assert len(said) == 1
    monkeypatch.setattr(native, "LOADED", False)
    assert native.features() == native.operations() == ()
    assert native.build() is None
    assert native.variants("lookup_matmul") == ("reference",)


def test_kernels_that_do_not_load_are_done_without(monkeypatch, tmp_path) -> None:
    broken = tmp_path / "native_ops.so"
    broken.write_bytes(b"no library")
    spec = ModuleSpec("taut.kernels.native_ops", None, origin=str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.warns(RuntimeWarning, match=r"without its native kernels \(.*native_ops\.so"):
        assert native._load() is None


@pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built")
def test_every_operation_runs_somewhere_and_has_a_definition() -> None:
    assert "lookup_matmul" in native.operations()
    for op in native.operations():
        assert native.variants(op, ())[-1] == "portable"
        assert hasattr(torch.ops.taut, op)
        assert hasattr(reference, op)
    with pytest.raises(RuntimeError, match="no operation is called add; there are"):
        native.variants("add")
    assert "PyTorch" in native.build()
