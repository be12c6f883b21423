"""Networks compiled ahead of time: they answer alike, or it is said what is missing."""

import shutil

import pytest
import torch
from torch import nn

import taut
from taut.errors import ExportError
from taut.export import targets

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.skipif(shutil.which("g++") is None, reason="it compiles C++")
def test_a_compiled_network_answers_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    found = taut.export(net, tmp_path / "net.pt2", X, to="aoti")
    assert found.engine == "aoti"
    torch.testing.assert_close(found.network(X[:2]), net(X[:2]))


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match=r"there is no no-such-compiler here; .*to='torch'"):
        taut.export(nn.Linear(8, 4).eval(), tmp_path / "net.pt2", X, to="aoti")


def test_a_damaged_file(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"no network")
    with pytest.raises(ExportError, match="no network compiled for this machine"):
        targets.TARGETS["aoti"].module().opened(tmp_path / "net.pt2")
