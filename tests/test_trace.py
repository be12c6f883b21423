"""Tracing: which weights there are, how much work they do, and what feeds what."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Forward, Net, traced, weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from taut.errors import TraceError
from taut.trace import Trace
from taut.zoo import LeNet5, LeNet300


def first(net: Net, x: Tensor) -> Tensor:
    """The first output of the layer."""
    out = net.a(x)
    return out[0] if isinstance(out, tuple) else out


def layer(a: nn.Module) -> Net:
    return Net(first, a=a)


def sites(found: Trace) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(s.name, s.kind, s.shape, s.macs) for s in found.sites]


# Sites and work. Each input's first dimension is the batch.

SEQUENCE, LSTM = (7, 3), {"batch_first": True}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[Any]]] = {
    "linear": (lambda: nn.Linear(3, 4), (3,), [("weight", "linear", (4, 3), 12)]),
    "linear on a sequence": (
        lambda: nn.Linear(3, 4), SEQUENCE, [("weight", "linear", (4, 3), 7 * 12)],
    ),
    "conv1d": (
        lambda: nn.Conv1d(3, 4, 5), (3, 9), [("weight", "conv", (4, 3, 5), 4 * 5 * 3 * 5)],
    ),
    "conv2d": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (3, 6, 6),
        [("weight", "conv", (4, 3, 3, 2), 4 * (3 * 4) * 3 * 6)],
    ),
    "conv2d padded to the same size": (
        lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 6),
        [("weight", "conv", (4, 3, 3, 3), 4 * 36 * 27)],
    ),
    "conv3d": (
        lambda: nn.Conv3d(2, 3, 2), (2, 3, 4, 5),
        [("weight", "conv", (3, 2, 2, 2, 2), 3 * (2 * 3 * 4) * 2 * 8)],
    ),
    "grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5),
        [("weight", "conv", (6, 2, 3, 3), 6 * 9 * 2 * 9)],
    ),
    "depthwise": (
        lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 5), [("weight", "conv", (4, 1, 3), 4 * 3 * 3)],
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), (3, 5, 5),
        [("weight", "conv", (3, 4, 2, 2), 3 * 25 * 4 * 4)],
    ),
    "embedding": (
        lambda: nn.Embedding(9, 4), (7,), [("weight", "embedding", (9, 4), 0)],
    ),
    "embedding bag": (
        lambda: nn.EmbeddingBag(9, 4), (7,), [("weight", "embedding", (9, 4), 0)],
    ),
    "rnn": (
        lambda: nn.RNN(3, 5, nonlinearity="relu", **LSTM), SEQUENCE,
        [("weight_ih_l0", "rnn", (5, 3), 7 * 15), ("weight_hh_l0", "rnn", (5, 5), 7 * 25)],
    ),
    "gru": (
        lambda: nn.GRU(3, 5, bias=False, **LSTM), SEQUENCE,
        [("weight_ih_l0", "gru", (15, 3), 7 * 45), ("weight_hh_l0", "gru", (15, 5), 7 * 75)],
    ),
    "lstm of two layers and directions": (
        lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True, **LSTM), SEQUENCE,
        [
            (f"weight_{kind}_l{depth}{way}", "lstm", (20, width), 7 * 20 * width)
            for depth, inputs in ((0, 3), (1, 10))
            for way in ("", "_reverse")
            for kind, width in (("ih", inputs), ("hh", 5))
        ],
    ),
    "lstm with projections": (
        lambda: nn.LSTM(3, 5, proj_size=2, **LSTM), SEQUENCE,
        [
            ("weight_ih_l0", "lstm", (20, 3), 7 * 60),
            ("weight_hh_l0", "lstm", (20, 2), 7 * 40),
            ("weight_hr_l0", "lstm", (2, 5), 7 * 10),
        ],
    ),
    "cell": (
        lambda: nn.LSTMCell(3, 5), (3,),
        [("weight_ih", "lstm", (20, 3), 60), ("weight_hh", "lstm", (20, 5), 100)],
    ),
}  # fmt: skip


def example_of(name: str, batch: int) -> Tensor:
    shape = LAYERS[name][1]
    return (
        torch.randint(0, 9, (batch, *shape)) if "embedding" in name else torch.randn(batch, *shape)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_sites_and_work_of_a_layer(name: str) -> None:
    build, _, expected = LAYERS[name]
    for batch in (1, 3):  # the work is that of one example
        found = traced(layer(build()), example_of(name, batch))
        assert sites(found) == [(f"a.{n}", *rest) for n, *rest in expected]
        assert found.macs == sum(s.macs for s in found.sites)
    assert found.parameters == sum(p.numel() for p in build().parameters())


def attention(net: Net, x: Tensor, y: Tensor | None = None) -> Tensor:
    other = x if y is None else y
    return net.a(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize(("batch", "cross"), [(1, False), (3, False), (3, True)])
def test_attention(batch: int, cross: bool) -> None:
    net = Net(attention, a=nn.MultiheadAttention(8, 2, batch_first=True))
    keys = 5 if cross else 4
    given = [torch.randn(batch, 4, 8), torch.randn(batch, 5, 8)][: 2 if cross else 1]
    found = traced(net, *given)
    projections = 4 * 64 + 2 * keys * 64
    assert sites(found) == [
        ("a.in_proj_weight", "attention", (24, 8), projections),
        ("a.out_proj.weight", "linear", (8, 8), 4 * 64),
    ]
    assert found.macs == projections + 4 * 64 + 2 * 4 * keys * 8


def test_attention_with_keys_of_another_width() -> None:
    net = Net(attention, a=nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6))
    found = traced(net, torch.randn(2, 4, 8), torch.randn(2, 5, 6))
    names = ["a.q_proj_weight", "a.k_proj_weight", "a.v_proj_weight", "a.out_proj.weight"]
    assert [s.name for s in found.sites] == names
    assert [s.macs for s in found.sites] == [4 * 64, 5 * 48, 5 * 48, 4 * 64]


X34 = (2, 3, 4)
RAW: dict[str, tuple[Forward, tuple[int, ...], tuple[int, ...], int]] = {
    "linear": (lambda n, x: F.linear(x, n.w), (5, 4), X34, 60),
    "linear by name": (lambda n, x: F.linear(input=x, weight=n.w), (5, 4), X34, 60),
    "linear of a view": (lambda n, x: F.linear(x, n.w.t()), (4, 5), X34, 60),
    "matmul": (lambda n, x: x @ n.w, (4, 5), X34, 60),
    "matmul with its transpose": (lambda n, x: x @ n.w.T, (5, 4), X34, 60),
    "matmul from the left": (lambda n, x: n.w @ x, (5, 3), X34, 60),
    "mm": (lambda n, x: torch.mm(x, n.w), (4, 5), (2, 4), 20),
    "addmm": (lambda n, x: torch.addmm(x[:, :1], x, n.w), (4, 5), (2, 4), 20),
    "bmm": (lambda n, x: torch.bmm(x.transpose(0, 1), n.w), (3, 4, 5), X34, 60),
    "einsum": (lambda n, x: torch.einsum("btc,oc->bto", x, n.w), (5, 4), X34, 60),
    "einsum with dots": (lambda n, x: torch.einsum("...c,co", x, n.w), (4, 5), X34, 60),
    "einsum of three, from left to right": (
        lambda n, x: torch.einsum("bi,oij,bj->bo", x, n.w, x),
        (6, 4, 4),
        (2, 4),
        96 + 24,
    ),
    "einsum of three with dots": (
        lambda n, x: torch.einsum("...i,ij,kj", x, n.w, n.w),
        (4, 5),
        X34,
        60 + 60,
    ),
    "einsum that sums first": (lambda n, x: torch.einsum("btc,oc->bo", x, n.w), (5, 4), X34, 20),
    "inner": (lambda n, x: torch.inner(x, n.w), (5, 4), X34, 60),
    "addmv": (lambda n, x: torch.addmv(x[0, :1], n.w, x[0]), (5, 4), (1, 4), 20),
    "addbmm": (lambda n, x: torch.addbmm(x[0, :, :1], x, n.w), (2, 4, 5), X34, 60),
    "multi_dot, in its best order": (
        lambda n, x: torch.linalg.multi_dot([x, n.w, torch.ones(5, 2)]),
        (4, 5),
        (2, 4),
        20 + 8,
    ),
    "tensordot": (lambda n, x: torch.tensordot(x, n.w, 1), (4, 5), X34, 60),
    "conv2d": (lambda n, x: F.conv2d(x, weight=n.w), (5, 3, 2, 2), (2, 3, 4, 4), 5 * 9 * 12),
    "embedding": (lambda n, x: F.embedding(x.long(), n.w), (5, 4), (2, 3), 0),
    "bilinear": (lambda n, x: F.bilinear(x, x, n.w), (5, 4, 4), (2, 4), 80),
    "one part of it": (lambda n, x: F.linear(x, n.w[:5]), (9, 4), X34, 60),
    "all parts of it": (lambda n, x: [x @ w.T for w in n.w.chunk(3)], (15, 4), (2, 4), 60),
    "one of a stack": (lambda n, x: F.linear(x, n.w[1]), (2, 5, 4), X34, 60),
}


@pytest.mark.parametrize("name", RAW)
def test_parameters_without_a_layer_are_sites(name: str) -> None:
    run, shape, given, macs = RAW[name]
    found = traced(Net(run, w=weight(*shape)), torch.rand(given))
    kind = name if name == "embedding" else "conv" if name == "conv2d" else "linear"
    assert sites(found) == [("w", kind, shape, macs)]
    assert found.macs == macs


def test_a_product_without_parameters_is_work_but_no_site() -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        return torch.baddbmm(x @ x.mT, x, x.mT) @ x @ torch.ones(4)

    found = traced(Net(run), torch.randn(2, 3, 4))
    assert found.sites == ()
    assert found.macs == 36 + 36 + 36 + 12
    assert traced(Net(lambda n, x: torch.dot(x[0], x[0])), torch.randn(1, 4)).macs == 4


@pytest.mark.parametrize("use", [lambda n, x: x + n.w, lambda n, x: x * n.w, lambda n, x: x @ n.v])
def test_parameters_that_multiply_no_matrix_are_no_sites(use: Forward) -> None:
    assert traced(Net(use, w=weight(3, 4), v=weight(4)), torch.randn(2, 3, 4)).sites == ()


def test_learned_inputs_and_states_are_no_weights() -> None:
    net = Net(lambda n, x: n.a(n.q) + x, a=nn.Linear(4, 4), q=weight(3, 4))
    assert [s.name for s in traced(net, torch.randn(2, 3, 4)).sites] == ["a.weight"]
    net = Net(lambda n, x: n.a(x, n.h)[0], a=nn.GRU(4, 5, batch_first=True), h=weight(1, 2, 5))
    found = traced(net, torch.randn(2, 3, 4))
    assert [s.name for s in found.sites] == ["a.weight_ih_l0", "a.weight_hh_l0"]


def test_a_product_of_two_parameters_has_two_sites_and_its_work_once() -> None:
    net = Net(lambda n, x: F.linear(x, n.u @ n.v), u=weight(5, 2), v=weight(2, 4))
    found = traced(net, torch.randn(1, 4))
    assert sorted(s.name for s in found.sites) == ["u", "v"]
    assert sum(s.macs for s in found.sites) == 40
    assert found.macs == 40 + 20


@pytest.mark.parametrize(
    "region", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16), torch.enable_grad]
)
def test_what_runs_in_a_region_is_seen(region: Callable[[], Any]) -> None:
    def run(net: Net, x: Tensor) -> Tensor:
        with region():
            x = net.a(x).relu()
        return net.b(x.float())

    found = traced(Net(run, a=nn.Linear(4, 5), b=nn.Linear(5, 3)), torch.randn(2, 4))
    assert sites(found) == [("a.weight", "linear", (5, 4), 20), ("b.weight", "linear", (3, 5), 15)]


# Shared weights


def tied() -> Net:
    net = Net(lambda n, x: n.head(n.a(n.embed(x))), embed=nn.Embedding(9, 4), a=nn.Linear(4, 4))
    net.head = nn.Linear(4, 9, bias=False)
    net.head.weight = net.embed.weight
    return net


def test_a_tied_weight_is_one_site() -> None:
    found = traced(tied(), torch.randint(0, 9, (2, 5)))
    assert sites(found) == [
        ("embed.weight", "embedding", (9, 4), 5 * 36),
        ("a.weight", "linear", (4, 4), 5 * 16),
    ]
    assert [s.aliases for s in found.sites] == [("head.weight",), ()]
    assert found.parameters == 36 + 16 + 4
    assert found.site("head.weight") is found.site("embed.weight")


def test_a_layer_used_twice_works_twice() -> None:
    net = Net(lambda n, x: n.a(n.a(x)), a=nn.Linear(4, 4))
    found = traced(net, torch.randn(2, 4))
    assert sites(found) == [("a.weight", "linear", (4, 4), 32)]
    assert found.macs == 32


def test_one_layer_in_two_places_is_one_site() -> None:
    a = nn.Linear(4, 4)
    found = traced(nn.Sequential(a, nn.ReLU(), a), torch.randn(2, 4))
    assert [(s.names, s.macs) for s in found.sites] == [(("0.weight", "2.weight"), 32)]


# Whole networks


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_work_of_the_lenets(batch: int) -> None:
    x = torch.randn(batch, 1, 28, 28)
    assert traced(LeNet5(), x).macs == 2_293_000
    assert traced(LeNet300(), x).macs == 266_200
    found = traced(LeNet5(), x)
    assert [s.macs for s in found.sites] == [288_000, 1_600_000, 400_000, 5_000]
    assert found.parameters == 431_080


def resnet() -> nn.Module:
    def run(n: Net, x: Tensor) -> Tensor:
        x = n.stem(x).relu()
        x = (n.norm(n.conv(x)) + n.skip(x)).relu()
        return n.head(x.mean((2, 3)))

    return Net(
        run, stem=nn.Conv2d(3, 8, 3, padding=1), conv=nn.Conv2d(8, 16, 3, stride=2, padding=1),
        skip=nn.Conv2d(8, 16, 1, stride=2), norm=nn.BatchNorm2d(16), head=nn.Linear(16, 10),
    )  # fmt: skip


def mobile() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU6(), nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.Conv2d(12, 8, 3, groups=4, dilation=2), nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (LeNet5, (2, 1, 28, 28)),
    "residual": (resnet, (2, 3, 12, 12)),
    "mobile": (mobile, (2, 3, 12, 12)),
    "audio": (lambda: nn.Sequential(nn.Conv1d(2, 4, 9, stride=3), nn.Conv1d(4, 5, 3)), (2, 2, 50)),
    "mixer": (
        lambda: Net(lambda n, x: n.b(n.a(x.mT).mT), a=nn.Linear(6, 7), b=nn.Linear(8, 3)),
        (2, 6, 8),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
        ),
        (2, 5, 16),
    ),
    "attention with raw parameters": (
        lambda: Net(
            lambda n, x: F.scaled_dot_product_attention(x @ n.q, x @ n.k, x @ n.v),
            q=weight(8, 6), k=weight(8, 6), v=weight(8, 4),
        ),
        (2, 5, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_work_is_what_the_flop_counter_of_pytorch_counts(name: str) -> None:
    build, shape = NETWORKS[name]
    model, x = build().train(), torch.randn(shape)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter:
        model(x)
    assert traced(model, x).macs * 2 * shape[0] == counter.get_total_flops()


# Dropout


def test_dropouts_name_the_first_site_after_them() -> None:
    x = torch.randn(2, 1, 28, 28)
    assert traced(LeNet5(dropout=0.5), x).dropouts == {"drop": "fc2.weight"}
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.ReLU(), nn.Dropout(0.1),
                        nn.Linear(4, 4), nn.Dropout(0.3))  # fmt: skip
    assert traced(net, torch.randn(2, 4)).dropouts == {"1": "4.weight", "3": "4.weight"}
    net = Net(lambda n, x: n.a(F.dropout(x, 0.5, n.training)), a=nn.Linear(4, 4))
    assert traced(net, torch.randn(2, 4)).dropouts == {}
    net = Net(lambda n, x: n.b(n.d(n.a(n.d(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 4),
              d=nn.Dropout())  # fmt: skip
    assert traced(net, torch.randn(2, 4)).dropouts == {"d": "a.weight"}


# The model and the example


def test_the_model_comes_back_untouched() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    net[0].weight.requires_grad_(False)
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    traced(net, torch.randn(2, 2, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert [m.training for m in net.modules()] == [True, True, True, False, True]
    assert all(p.grad is None for p in net.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is fused


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_frozen_networks_are_traced_alike(mode: Callable[[], Any]) -> None:
    build, shape = NETWORKS["encoder"]
    with mode():
        found = traced(build().eval().requires_grad_(False), torch.randn(shape))
    assert len(found.sites) == 8


def test_parameters_of_whole_numbers_do_no_harm() -> None:
    net = Net(lambda n, x: n.a(x) + n.steps, a=nn.Linear(4, 4))
    net.steps = nn.Parameter(torch.ones(1, dtype=torch.long), requires_grad=False)
    found = traced(net, torch.randn(2, 4))
    assert [s.name for s in found.sites] == ["a.weight"]
    assert found.parameters == 21


def test_inputs_by_name_and_outputs_of_any_form() -> None:
    net = Net(lambda n, *, x, scale=1.0: {"logits": n.a(x) * scale, "x": [x]}, a=nn.Linear(4, 3))
    x = torch.randn(2, 4)
    found = traced(net, x=x)
    assert sites(found) == [("a.weight", "linear", (3, 4), 12)]
    args, kwargs = found.example_on(net)
    assert (args, list(kwargs)) == ((), ["x"])
    assert kwargs["x"] is x
    assert found.example_on(net.to("meta"))[1]["x"].device.type == "meta"


def test_the_example_is_moved_to_the_model() -> None:
    net = nn.Linear(4, 3).to("meta")
    assert traced(net, torch.randn(2, 4)).macs == 12


# What cannot be traced


def branches(net: Net, x: Tensor) -> Tensor:
    return net.a(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (branches, "GuardOnDataDependentSymNode: Could not guard on data-dependent expression"),
        (lambda n, x: n.a(x[:, :3]), "RuntimeError: .* must have same reduction dim"),
        (lambda n, x: n.missing(x), "AttributeError: 'Net' object has no attribute 'missing'"),
        (lambda n, x: {}["mask"], "KeyError: 'mask'"),
        (lambda n, x: [].pop(), "IndexError: pop from empty list"),
    ],
)
def test_what_cannot_be_traced_says_why(
    run: Forward, reason: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    said = rf"^Net cannot be traced by torch\.export: {reason}.*; the network must run on"
    with pytest.raises(TraceError, match=said) as caught:
        traced(Net(run, a=nn.Linear(4, 4)), torch.randn(2, 4))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")
    logging.getLogger("taut").warning("logs are heard again")
    assert caplog.messages[-1] == "logs are heard again"
