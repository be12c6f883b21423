"""Attention in other engines: every mask, shared heads, rows that may look nowhere, any length."""

from pathlib import Path

import pytest
import torch
from nets import Net
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

import taut
from taut.export.attention import as_products
from taut.groups.rewrite import as_graph

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_other_floats_run_too(dtype: torch.dtype, tmp_path: Path) -> None:
    for name in ("causal", "signs", "minus infinity"):
        net, x = build(RUNS[name]).to(dtype), torch.randn(2, 5, 16, dtype=dtype)
        x[-1, :, 0] = -x[-1, :, 0].abs()
        found = taut.export(net, tmp_path / f"{name}.onnx", x)
        assert found.network is not None
        close = 0.02 if dtype is torch.float16 else 1e-4
        torch.testing.assert_close(found.network(x), net(x), rtol=close, atol=close)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {}),
        ({"batch_first": False, "bias": False}, {"need_weights": False}),
        ({"kdim": 6, "vdim": 5}, {"need_weights": False}),
        ({}, {"key_padding_mask": torch.tensor([[False, True, False], [False, False, True]])}),
        ({}, {"attn_mask": torch.randn(8, 3, 3), "average_attn_weights": False}),
        ({}, {"attn_mask": torch.ones(3, 3, dtype=torch.bool).triu(1), "need_weights": False}),
        ({"add_bias_kv": True}, {}),
    ],
)
@torch.no_grad()
def test_multi_head_attention_is_pytorchs(options: dict, given: dict) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).eval()
    x, first = torch.randn(2, 3, 16), layer.batch_first
    key, value = (torch.randn(2, 3, n) if "kdim" in options else x for n in (6, 5))
    inputs = [t if first else t.transpose(0, 1) for t in (x, key, value)]
    if "kdim" not in options:
        inputs = inputs[:1] * 3
    wanted = layer(*inputs, **given)
    as_products(layer)
    for found, right in zip(layer(*inputs, **given), wanted, strict=True):
        torch.testing.assert_close(found, right)


def test_what_nobody_asks_for_is_left_out_and_equal_masks_are_one(tmp_path: Path) -> None:
    def run(net, x):
        later = torch.ones(5, 5, dtype=torch.bool).triu(1)
        for layer in (net.a, net.b):
            x, _ = layer(x, x, x, attn_mask=later.clone())
        return x

    a, b = (nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(2))
    found = taut.export(Net(run, a=a, b=b).eval(), tmp_path / "net.onnx", torch.randn(2, 5, 16))
    graph = onnx.load(found.path).graph
    kinds = [n.op_type for n in graph.node]
    counted = {k: kinds.count(k) for k in ("Softmax", "Mul", "Transpose", "Where")}
    assert counted == {"Softmax": 2, "Mul": 2, "Transpose": 8, "Where": 1}
    assert [list(i.dims) for i in graph.initializer].count([5, 5]) == 1


@pytest.mark.parametrize("suffix", ["onnx", "xml"])
@torch.no_grad()
def test_what_one_product_gives_is_taken_apart_where_it_lies(suffix: str, tmp_path: Path) -> None:
    """A graph that takes a network's place has PyTorch's own moves of queries, keys and values."""
    if suffix == "xml":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    net = Net(lambda net, x: net.a(x, x, x, need_weights=False)[0], a=layer).eval()
    x = torch.randn(2, 5, 16)
    graph = as_graph(net, ((x,), {}))
    found = taut.export(graph, tmp_path / f"net.{suffix}", x)
    assert found.network is not None
    torch.testing.assert_close(found.network(x), net(x), rtol=0.02, atol=0.02)
    if suffix == "onnx":
        kinds = [n.op_type for n in onnx.load(found.path).graph.node]
        assert (kinds.count("Split"), kinds.count("Gather"), kinds.count("Squeeze")) == (1, 0, 0)


@pytest.mark.parametrize("kind", ["summed", "last first", "given"])
@torch.no_grad()
def test_what_is_read_as_a_whole_too_is_not_taken_apart(kind: str, tmp_path: Path) -> None:
    def run(net, x):
        y = net.q(x).unflatten(-1, (4, 8))
        y = y.unsqueeze(0).transpose(0, -2).squeeze(-2)
        if kind == "last first":
            return y[-1] - y[0]
        return (y[0] - y[1], y) if kind == "given" else y[0] - y.sum(0)

    net, x = Net(run, q=nn.Linear(16, 32)).eval(), torch.randn(2, 5, 16)
    found = taut.export(net, tmp_path / "net.onnx", x)
    assert found.network is not None
    for got, wanted in zip(
        *(y if isinstance(y, tuple) else (y,) for y in (found.network(x), net(x))), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_value_that_the_network_gives_stays_one(tmp_path: Path) -> None:
    def run(net, x):
        turned = net.q(x).relu().transpose(1, 2)
        return turned, net.out(turned.transpose(1, 2)), turned * torch.ones_like(turned)

    net, x = Net(run, q=nn.Linear(16, 32), out=nn.Linear(32, 4)).eval(), torch.randn(2, 5, 16)
    found = taut.export(net, tmp_path / "net.onnx", x)
    assert found.network is not None
    for got, wanted in zip(found.network(x), net(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_causal_mask_takes_no_room(tmp_path: Path) -> None:
    sizes = [
        taut.export(build(RUNS["causal"]), tmp_path / f"{n}.onnx", torch.randn(1, n, 16))
        for n in (16, 64, 512)
    ]
    small, middle, large = (s.path.stat().st_size for s in sizes)
    assert middle < small + 64 * 64 + 1000  # a byte each
    assert large < small + 1000  # none: an engine makes it as it loads the file


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
