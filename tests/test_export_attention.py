"""Attention in other engines: every mask, shared heads, rows that may look nowhere, any length."""

from pathlib import Path

import pytest
import torch
from nets import Net
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

import taut

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HEADS, WIDTH = 4, 8


def heads(x, layer, count=HEADS):
    batch, length, _ = x.shape
    return layer(x).reshape(batch, length, count, WIDTH).transpose(1, 2)


def attend(net, x, mask=None, **options):
    count = net.k.out_features // WIDTH
    q, k, v = heads(x, net.q), heads(x, net.k, count), heads(x, net.v, count)
    mixed = attention(q, k, v, mask, enable_gqa=count < HEADS, **options)
    return net.out(mixed.transpose(1, 2).flatten(2))


def build(run, shared=1):
    torch.manual_seed(0)
    wide = HEADS * WIDTH
    return Net(
        run, q=nn.Linear(16, wide), k=nn.Linear(16, wide // shared),
        v=nn.Linear(16, wide // shared), out=nn.Linear(wide, 16),
    ).eval()  # fmt: skip


RUNS = {
    "no mask": attend,
    "causal": lambda net, x: attend(net, x, is_causal=True),
    "scaled": lambda net, x: attend(net, x, scale=0.1),
    "three dimensions": lambda net, x: net.out(attention(net.q(x), net.k(x), net.v(x))),
    "signs": lambda net, x: attend(net, x, (x[:, None, None, :, 0] > 0)),
    "each row": lambda net, x: attend(net, x, (x[:, None, :, :1] + x[:, None, None, :, 1]) > 0),
    "minus infinity": lambda net, x: attend(
        net, x, torch.where(x[:, None, None, :, 0] > 0, x[:, None, None, :, 1], -torch.inf)
    ),
    "the lowest": lambda net, x: attend(
        net, x, torch.where(x[:, None, None, :, 0] > 0, 0, torch.finfo(torch.float32).min)
    ),
}


@pytest.mark.parametrize("suffix", ["onnx", "xml"])
@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_it_is_pytorchs_at_any_length(name: str, suffix: str, tmp_path: Path) -> None:
    if suffix == "xml":
        pytest.importorskip("openvino")
    net = build(RUNS[name])
    example = torch.randn(2, 5, 16)
    found = taut.export(net, tmp_path / f"net.{suffix}", example, dynamic_length=True)
    assert found.network is not None
    for batch, length in ((1, 1), (3, 7)):
        x = torch.randn(batch, length, 16)
        x[-1, :, 0] = -x[-1, :, 0].abs()  # where signs decide, the last one may look nowhere
        wanted = net(x)
        assert wanted.isfinite().all()
        close = {"onnx": 1e-4, "xml": 0.02}[suffix]  # OpenVINO may take bfloat16 where that is fast
        torch.testing.assert_close(found.network(x), wanted, rtol=close, atol=close)


@pytest.mark.parametrize("shared", [2, 4])
@torch.no_grad()
def test_heads_that_share_their_keys(shared: int, tmp_path: Path) -> None:
    net, x = build(attend, shared), torch.randn(2, 5, 16)
    found = taut.export(net, tmp_path / "net.onnx", x, dynamic_length=True)
    assert found.network is not None
    longer = torch.randn(3, 7, 16)
    torch.testing.assert_close(found.network(longer), net(longer), rtol=1e-3, atol=1e-3)


def test_nothing_stands_between_that_an_engine_does_not_fuse(tmp_path: Path) -> None:
    for name, most in (("causal", 1), ("signs", 2)):
        found = taut.export(build(RUNS[name]), tmp_path / f"{name}.onnx", torch.randn(2, 5, 16))
        kinds = [n.op_type for n in onnx.load(found.path).graph.node]
        assert kinds[kinds.index("Softmax") + 1] == "MatMul"
        assert "IsNaN" not in kinds
        assert kinds.count("Mul") == most  # the scale, and what looks nowhere
