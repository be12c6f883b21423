"""Each packed layer runs the faster of its two ways, and gives the same answers in both."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import taut
from taut.layers import pack_layer, packed_layers, run_dense
from taut.packed import PackedWeight, Plain
from taut.tune import run_chosen, tune
from taut.types import Choice
from taut.zoo import TransformerLanguageModel

Make = Callable[[Tensor], PackedWeight]


class Clock:
    """Everything takes a millisecond by it, unless it was told otherwise."""

    now, step = 0.0, 1e-3

    def __call__(self) -> float:
        self.now += self.step
        self.step = 1e-3
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _times_are_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", CLOCK)


class Slow(Plain):
    """A weight that takes five milliseconds to decode, which multiplying by it needs each time."""

    def dense(self) -> Tensor:
        CLOCK.now += 5e-3
        return super().dense()


class Zeros(Plain):
    """A weight of zeros, which multiplies by them in half the time."""

    def matmul(self, x: Tensor) -> Tensor:
        CLOCK.step = 5e-4
        return x.new_zeros(*x.shape[:-1], self.shape[0])


def plain(weight: Tensor) -> PackedWeight:
    return Plain.of(weight, "float32")


def slow(weight: Tensor) -> PackedWeight:
    return Slow.of(weight, "float32")


def zeros(weight: Tensor) -> PackedWeight:
    return Zeros.of(torch.zeros_like(weight), "float32")


def pack(module: nn.Module, make: Make = plain) -> nn.Module:
    """Pack every matrix of a module and of what it is made of, in place; returns the module."""
    for layer in list(module.modules()):
        chosen = {n: p for n, p in layer.named_parameters(recurse=False) if p.dim() > 1}
        if chosen:
            pack_layer(layer, {n: make(p.detach()) for n, p in chosen.items()})
    return module.eval()


def ways(model: nn.Module) -> dict[str, str]:
    """How each packed layer runs."""
    return {n: "dense" if m.runs_dense else "packed" for n, m in packed_layers(model).items()}


def choice(layer: str, packed_ms: float, dense_ms: float, batch: int = 1) -> Choice:
    return Choice(layer=layer, batch=batch, threads=1, packed_ms=packed_ms, dense_ms=dense_ms)


# ---- the choice -----------------------------------------------------------------------------


def test_the_faster_way_is_kept() -> None:
    model = nn.Sequential(pack(nn.Linear(8, 8), slow), nn.ReLU(), pack(nn.Linear(8, 8), zeros))
    first, last = tune(model, torch.randn(64, 8))
    assert (first.layer, last.layer) == ("0", "2")
    assert (first.packed_ms, first.dense_ms) == (pytest.approx(6), pytest.approx(1))
    assert (last.packed_ms, last.dense_ms) == (pytest.approx(0.5), pytest.approx(1))
    assert (first.runs_packed, last.runs_packed) == (False, True)
    assert ways(model) == {"0": "dense", "2": "packed"}
    for found in (first, last):
        assert (found.batch, found.threads) == (64, torch.get_num_threads())


def test_the_batch_decides_anew() -> None:
    """Only the example's batch counts, not what was chosen before."""

    class Wide(Plain):
        def matmul(self, x: Tensor) -> Tensor:
            CLOCK.step = 1e-4 if len(x) == 1 else 1e-2
            return super().matmul(x)

    model = nn.Sequential(pack(nn.Linear(8, 8), lambda w: Wide.of(w, "float32")))
    for batch, way in ((1, "packed"), (8, "dense"), (1, "packed")):
        (found,) = tune(model, torch.randn(batch, 8))
        assert (found.batch, ways(model)) == (batch, {"0": way})


def test_a_layer_that_the_forward_does_not_call_runs_dense() -> None:
    spare, used = pack(nn.Linear(4, 4), zeros), pack(nn.Linear(4, 4))
    model = Net(lambda net, x: net.used(x), spare=spare, used=used)
    run_dense(model, False)
    (found,) = tune(model, torch.randn(2, 4))
    assert found.layer == "used"
    assert ways(model)["spare"] == "dense"


def test_nothing_packed_nothing_chosen() -> None:
    calls = []
    model = Net(lambda _, x: calls.append(x), layer=nn.Linear(4, 4))
    assert tune(model, torch.randn(2, 4)) == ()
    assert tune(model, torch.tensor(1.0)) == ()
    assert not calls
    assert not model.training


def test_a_shared_layer_is_timed_once() -> None:
    model = Net(lambda net, x: net.b(net.a(x)), a=nn.Linear(4, 4))
    model.b = model.a
    pack(model)
    x = torch.randn(2, 4)
    expected = model(x)
    (found,) = tune(model, x)
    assert found.layer == "a"
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["attention", ""])
def test_attention_is_one_layer_with_its_output(name: str) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model = Net(lambda net, x: net.attention(x, x, x), attention=layer) if name else layer
    pack(model)
    x = torch.randn(2, 3, 8)
    example = ((x,), {}) if name else ((x, x, x), {})
    (found,) = tune(model, example)
    assert found.layer == name
    assert len(packed_layers(model)) == 2
    assert set(ways(model).values()) == {"packed" if found.runs_packed else "dense"}


def test_an_output_projection_alone_may_be_packed() -> None:
    """Ordinary attention reads the weight of its projection and never calls it."""
    model = nn.MultiheadAttention(8, 2)
    pack(model.out_proj)
    x = torch.randn(3, 2, 8)
    expected = model.eval()(x, x, x)[0]
    assert tune(model, ((x, x, x), {})) == ()
    assert ways(model) == {"out_proj": "dense"}
    torch.testing.assert_close(model(x, x, x)[0], expected)


@torch.no_grad()
def test_an_encoder_layer_is_one() -> None:
    """PyTorch's fused path reads dense weights, so a layer must not run packed in part."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    pack(model.layers[0], slow)
    pack(model.layers[1].linear1, slow)
    x = torch.randn(2, 3, 8)
    model.eval()
    first, second = tune(model, x)
    assert (first.layer, second.layer) == ("layers.0", "layers.1")
    assert set(ways(model).values()) == {"dense"}
    decoded = [m._decoded for m in packed_layers(model).values()]
    assert not any(decoded)
    expected = model(x)
    run_dense(model, False)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


# ---- what goes in and comes out -------------------------------------------------------------

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5)), (3, 7)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), (2, 3, 6, 6)),
    "lstm": (lambda: nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True), (2, 5, 4)),
    "gru": (lambda: nn.GRU(4, 3), (5, 2, 4)),
    "rnn": (lambda: nn.RNN(4, 3), (5, 2, 4)),
}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from tensors(part)


@torch.no_grad()
@pytest.mark.parametrize("make", [plain, slow, zeros])
@pytest.mark.parametrize("net", NETS)
def test_answers_stay(net: str, make: Make) -> None:
    build, shape = NETS[net]
    model, x = pack(build(), make), torch.randn(shape)
    given = x.clone()
    expected = list(tensors(model(x)))
    choices = tune(model, x, seconds=0)
    assert [c.layer for c in choices] == list(packed_layers(model))
    for got, wanted in zip(tensors(model(x)), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, given)


def test_a_slow_recurrent_layer_runs_dense() -> None:
    model = pack(nn.LSTM(4, 3), slow)
    (found,) = tune(model, torch.randn(2, 1, 4))
    assert not found.runs_packed
    assert ways(model) == {"": "dense"}


@pytest.mark.parametrize(
    "example",
    [((torch.zeros(3, 4),), {"scale": torch.tensor(2.0)}), ((), {"x": torch.zeros(3, 4)})],
    ids=["args", "kwargs"],
)
def test_arguments_by_position_and_by_name(example: Any) -> None:
    def forward(net: nn.Module, x: Tensor, scale: float = 1.0) -> Tensor:
        return net.layer(input=x) * scale if isinstance(scale, float) else net.layer(x) * scale

    class Named(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    (found,) = tune(Net(forward, layer=pack(Named(4, 2))), example)
    assert (found.layer, found.batch) == ("layer", 3)


def test_the_model_is_left_in_eval_mode_without_hooks() -> None:
    model = pack(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))).train()
    tune(model, torch.randn(2, 4))
    assert not any(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_fails_leaves_no_hook_and_runs_dense() -> None:
    model = pack(nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tune(model, torch.randn(2, 4))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert ways(model) == {"0": "dense", "1": "dense"}


# ---- what was chosen ------------------------------------------------------------------------


def test_equal_times_run_packed() -> None:
    assert choice("a", 1.0, 1.0).runs_packed
    assert not replace(choice("a", 1.0, 1.0), packed_ms=1.01).runs_packed


def test_choices_are_kept_for_each_batch() -> None:
    model = pack(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    choices = (choice("0", 1, 2), choice("1", 2, 1), choice("0", 2, 1, 64), choice("1", 1, 2, 64))
    for batch, expected in ((1, "packed dense"), (64, "dense packed"), (8, "dense dense")):
        run_chosen(model, choices, batch)
        assert list(ways(model).values()) == expected.split()
    run_dense(model, False)
    run_chosen(model, (), 1)
    assert set(ways(model).values()) == {"dense"}


def test_a_result_runs_as_it_was_measured(tmp_path: Any, trained: Any, task: Any) -> None:
    """And so does that of the same call made again, which times nothing."""
    recipe = "share_values(bits=4)"
    for _ in range(2):
        result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
        chosen = {c.layer: c for c in result.measurement.choices if c.batch == 1}
        assert {c.batch for c in result.measurement.choices} == {1, 64}
        expected = {n: "packed" if c.runs_packed else "dense" for n, c in chosen.items()}
        assert ways(result.model) == expected
    assert list(expected) == ["0", "3", "5"]


class Talks(nn.Module):
    """A step of a generation loop, which runs attention without calling it whole."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, token: Tensor) -> Tensor:
        return self.net.step(token)[0]  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("make", [slow, plain])
def test_attention_that_keeps_keys_and_values_is_chosen_for(make: Make) -> None:
    net = TransformerLanguageModel(20, 16, 2, 1, context=8).eval()
    attention = net.blocks[0].attention
    wanted, token = net.step(torch.tensor([[3]]))[0], torch.tensor([[3]])
    for layer, name in ((attention.out_proj, "weight"), (attention, "in_proj_weight")):
        pack_layer(layer, {name: make(getattr(layer, name).detach())})
    (choice,) = tune(Talks(net), token)
    assert choice.layer == "net.blocks.0.attention"
    assert attention.runs_dense is not choice.runs_packed
    assert choice.batch == 1
    torch.testing.assert_close(net.step(token)[0], wanted)
