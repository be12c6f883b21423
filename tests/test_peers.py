"""The comparison with other libraries: whoever fails is told of, and the best is compared."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import taut

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import peers  # noqa: E402
from against import extension, int8, racing  # noqa: E402

X = torch.ones(1, 4)


def entry(folder):
    taut.export(nn.Linear(4, 2), folder / "net.onnx", X, dynamic_batch=False)
    return racing.Entry("ours", "onnx", folder / "net.onnx")


def test_every_section_names_itself_and_gives_figures():
    found = peers.sections()
    assert [s.NAME for s in found][:2] == ["int8", "extension"]
    assert all(callable(s.figures) for s in found)


def test_a_peer_that_is_not_installed_is_told_of(tmp_path):
    def missing(folder):
        raise ImportError("No module named 'nncf'\nmore of it")

    entries, failed = racing.made({"a peer": missing, "ours": entry}, tmp_path)
    assert [e.who for e in entries] == ["ours"]
    assert failed == {"a peer": "ImportError: No module named 'nncf'"}


def test_without_openvino_the_rows_of_the_extension_say_so(monkeypatch):
    def missing(*_, **__):
        raise ImportError("No module named 'openvino'")

    for who in extension.QUANTIZERS:
        monkeypatch.setitem(extension.QUANTIZERS, who, missing)
    monkeypatch.setattr(extension.taut, "export", missing)
    options = argparse.Namespace(quick=True, seed=0, only="extension: LeNet-5")
    for tiles in (False, True):
        found_here = {"amx_tile": tiles}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found_here: found)
        found = extension.figures(options)
        assert [f.name.split(", ", 3)[-1] for f in found] == [
            f"{n} threads{limit}: latency beside the best peer's int8"
            for n in (1, 2)
            for limit in ("", ", no tiles")[: 1 + tiles]
        ]
        for figure in found:
            assert not figure.holds
            told = "Taut: ImportError: No module named 'openvino'; NNCF: ImportError"
            assert figure.paper.startswith(told)


def test_a_file_that_does_not_run_is_told_of(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    broken = racing.Entry("a peer", "onnx", tmp_path / "broken.onnx")
    times, failed = racing.race([broken, entry(tmp_path)], [X], tmp_path, 1, 0.01)
    assert [t.entry.who for t in times] == ["ours"]
    assert times[0].median_ms > 0
    assert "ExportError" in failed["a peer"]


def test_the_best_of_ours_is_compared_with_the_best_peer():
    def took(who, ms):
        return racing.Time(racing.Entry(who, "onnx", Path()), ms, 0.1)

    times = [took("Taut, MACs ÷ 2 (onnx)", 1.0), took("Taut (openvino)", 3.0),
             took("NNCF", 4.0), took("Taut (onnx)", 5.0), took("torchao", 6.0)]  # fmt: skip
    whole, half = int8._compared(int8.NETS[0], 1, 1, times, {"ONNX Runtime": "broken"})
    assert (whole.ours, half.ours) == (3 / 4, 1 / 4)
    assert whole.holds
    assert "ONNX Runtime: broken" in whole.paper
    assert "NNCF 4 ± 0.05 ms" in whole.paper


@pytest.mark.parametrize("net", int8.NETS, ids=lambda n: n.name)
def test_inputs_are_such_as_the_networks_take(net):
    with torch.device("meta"):
        assert len(net.build()(net.inputs(2))) == 2


def test_a_tiny_pass_of_the_scores(tmp_path):
    record = tmp_path / "peers.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--quick"]
    only = ["--only", "int8: LeNet-5 on", "--json", str(record)]
    subprocess.run([*script, *only], check=True, capture_output=True)
    found = json.loads(record.read_text())
    assert found["quick"]
    lost = found["figures"][0]
    assert lost["name"] == "int8: LeNet-5 on MNIST: points lost without training"
    assert "Taut (onnx)" in lost["paper"]
    assert abs(lost["ours"]) < 5
