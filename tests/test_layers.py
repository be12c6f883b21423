"""Packed layers give the answers of the layer that holds the decoded weight, dense and packed."""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from taut.layers import Packed, pack_layer, packed_layers, run_dense
from taut.packed import PackedWeight, Plain
from taut.sparse_weight import SparseWeight
from taut.techniques.share_values import SharedValues

Make = Callable[[Tensor], PackedWeight]


def plain(weight: Tensor) -> PackedWeight:
    return Plain.of(weight, "float32")


def shared(weight: Tensor) -> PackedWeight:
    """Eight levels over the weight's range."""
    table = torch.linspace(float(weight.min()), float(weight.max()), 8)
    index = torch.bucketize(weight.float().contiguous(), (table[1:] + table[:-1]) / 2)
    return SharedValues(index, Plain.of(table, "float16"))


def sparse(weight: Tensor) -> PackedWeight:
    """The upper half of the weights, kept as they are."""
    mask = weight > weight.median()
    return SparseWeight(mask, Plain.of(weight[mask], "float32"))


def sparse_shared(weight: Tensor) -> PackedWeight:
    mask = weight > weight.median()
    return SparseWeight(mask, shared(weight[mask]))


MAKERS = (plain, shared, sparse, sparse_shared)


@pytest.fixture(autouse=True)
def _fixed_random() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def pack(module: nn.Module, make: Make = sparse_shared) -> nn.Module:
    """Pack every weight of two or more dimensions in place; returns the reference.

    That is a copy of the module whose weights are the decoded ones, in PyTorch's own layers.
    """
    reference = copy.deepcopy(module)
    with torch.no_grad():
        for path, layer in list(module.named_modules()):
            chosen = {n: p for n, p in layer.named_parameters(recurse=False) if p.dim() > 1}
            weights = {name: make(p.detach()) for name, p in chosen.items()}
            for name, weight in weights.items():
                reference.get_submodule(path).get_parameter(name).copy_(weight.dense())
            if weights:
                pack_layer(layer, weights)
    return reference


def leaves(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, a PackedSequence being one."""
    if isinstance(value, tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if value is None else [value]


def same(got: Any, expected: Any, tolerance: float) -> None:
    assert type(got) is type(expected)
    assert len(leaves(got)) == len(leaves(expected))
    for g, e in zip(leaves(got), leaves(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def check(module: nn.Module, *inputs: Any, make: Make = sparse_shared, **options: Any) -> None:
    """Both ways of running must equal the reference, to the rounding of float32."""
    reference = pack(module.eval(), make)
    expected = reference(*inputs, **options)
    same(module(*inputs, **options), expected, 1e-6)
    run_dense(module, False)
    same(module(*inputs, **options), expected, 1e-5)
    run_dense(module, True)
    same(module(*inputs, **options), expected, 1e-6)


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on a layer that decodes a weight fails the test."""

    def refuse(self: Packed, name: str) -> Tensor:
        raise AssertionError(f"{name} was decoded")

    return lambda: monkeypatch.setattr(Packed, "decoded", refuse)


# ---- feed-forward layers --------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(make: Make, shape: tuple[int, ...], bias: bool) -> None:
    check(nn.Linear(7, 5, bias=bias), torch.randn(shape), make=make)


CONV1D: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 3},
    {"groups": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
)
CONV2D: tuple[dict[str, Any], ...] = (
    *CONV1D,
    {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"stride": (1, 3), "padding": (2, 1)},
    {"groups": 4},
)


@pytest.mark.parametrize("options", CONV1D, ids=str)
def test_conv1d(options: dict[str, Any]) -> None:
    check(nn.Conv1d(4, 6, 3, **options), torch.randn(2, 4, 11))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", CONV2D, ids=str)
@pytest.mark.parametrize("kernel", [3, (3, 2)], ids=str)
def test_conv2d(options: dict[str, Any], kernel: Any) -> None:
    outputs = 8 if options.get("groups") == 4 else 6
    check(nn.Conv2d(4, outputs, kernel, **options), torch.randn(2, 4, 9, 8))


@pytest.mark.parametrize("make", MAKERS)
def test_conv2d_in_every_format(make: Make) -> None:
    check(nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 7), make=make)


def test_convolutions_of_one_example_and_of_none() -> None:
    check(nn.Conv1d(4, 6, 3), torch.randn(4, 11))
    check(nn.Conv2d(4, 6, 3), torch.randn(4, 9, 8))
    check(nn.Conv1d(4, 6, 3), torch.randn(0, 4, 11))
    check(nn.Conv2d(4, 6, 3), torch.randn(0, 4, 9, 8))


def test_layers_without_a_packed_form_run_dense() -> None:
    check(nn.Conv3d(2, 3, 2), torch.randn(1, 2, 4, 4, 4))
    check(nn.ConvTranspose2d(3, 2, 2, stride=2), torch.randn(1, 3, 4, 4))
    check(nn.Bilinear(3, 4, 5), torch.randn(2, 3), torch.randn(2, 4))
    check(nn.EmbeddingBag(9, 4), torch.tensor([1, 2, 8, 0]), torch.tensor([0, 3]))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"max_norm": 1.0}], ids=str)
def test_embedding(make: Make, options: dict[str, Any]) -> None:
    check(nn.Embedding(11, 6, **options), torch.tensor([[0, 2, 10], [2, 2, 5]]), make=make)


def test_packed_running_never_makes_a_dense_copy(never_dense: Callable[[], None]) -> None:
    cases: list[tuple[nn.Module, Tensor]] = [
        (nn.Linear(7, 5), torch.randn(3, 7)),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 11)),
        (nn.Conv2d(4, 6, 3, stride=2), torch.randn(2, 4, 9, 8)),
        (nn.Embedding(11, 6), torch.tensor([1, 2])),
        (nn.LSTM(4, 3, proj_size=2), torch.randn(5, 2, 4)),
        (nn.GRU(4, 3, 2, bidirectional=True), torch.randn(5, 2, 4)),
    ]
    for layer, _ in cases:
        pack(layer.eval())
        run_dense(layer, False)
    never_dense()
    for layer, x in cases:
        layer(x)
        with pytest.raises(AssertionError, match="was decoded"):
            getattr(layer, next(iter(layer.packed)))


# ---- recurrent layers -----------------------------------------------------------------------

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
RECURRENT: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
)


def recurrent(kind: type[nn.RNNBase], options: dict[str, Any]) -> nn.RNNBase:
    return kind(4, 3, **options)


def start(layer: nn.RNNBase, *batch: int) -> Any:
    """A state to begin with, other than zeros."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    hidden = torch.randn(count, *batch, layer.proj_size or layer.hidden_size)
    if not isinstance(layer, nn.LSTM):
        return hidden
    return hidden, torch.randn(count, *batch, layer.hidden_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", RECURRENT, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_recurrent(kind: type[nn.RNNBase], options: dict[str, Any], given: bool) -> None:
    batched, unbatched = recurrent(kind, options), recurrent(kind, options)
    shape = (2, 5, 4) if batched.batch_first else (5, 2, 4)
    check(batched, torch.randn(shape), start(batched, 2) if given else None)
    check(unbatched, torch.randn(5, 4), start(unbatched) if given else None)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("options", RECURRENT, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_lstm_with_a_projection(options: dict[str, Any], given: bool) -> None:
    layer = recurrent(nn.LSTM, {**options, "proj_size": 2})
    shape = (2, 5, 4) if layer.batch_first else (5, 2, 4)
    check(layer, torch.randn(shape), start(layer, 2) if given else None)


def test_rnn_with_relu() -> None:
    check(nn.RNN(4, 3, nonlinearity="relu"), torch.randn(5, 2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", RECURRENT, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("lengths", [(5, 3, 3, 1), (3, 1, 5, 3)], ids=["sorted", "unsorted"])
def test_packed_sequences(
    kind: type[nn.RNNBase], options: dict[str, Any], given: bool, lengths: tuple[int, ...]
) -> None:
    """The output is laid out as PyTorch's is, down to the order of sequences of one length."""
    layer = recurrent(kind, options)
    sequences = [torch.randn(n, 4) for n in lengths]
    x = pack_sequence(sequences, enforce_sorted=lengths[0] == 5)
    check(layer, x, start(layer, 4) if given else None)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_a_recurrent_layer_may_be_packed_in_part(name: str) -> None:
    layer = nn.LSTM(4, 3).eval()
    reference = copy.deepcopy(layer)
    weight = sparse(getattr(layer, name).detach())
    with torch.no_grad():
        getattr(reference, name).copy_(weight.dense())
    pack_layer(layer, {name: weight})
    x = torch.randn(5, 2, 4)
    same(layer(x), reference(x), 0.0)
    run_dense(layer, False)
    same(layer(x), reference(x), 1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_dropout_between_layers_in_training(dense: bool) -> None:
    layer = nn.LSTM(4, 3, 2, dropout=0.5)
    reference = pack(layer)
    run_dense(layer, dense)
    x = torch.randn(5, 2, 4)
    torch.manual_seed(1)
    expected = reference(x)
    torch.manual_seed(1)
    same(layer(x), expected, 0.0)
    assert (reference(x)[0] != expected[0]).any()


def test_a_packed_recurrent_layer_keeps_no_dense_weight() -> None:
    layer = nn.LSTM(4, 3)
    first = weakref.ref(layer.weight_ih_l0)
    pack(layer.eval())
    assert first() is None
    layer(torch.randn(5, 2, 4))
    decoded = weakref.ref(layer.weight_ih_l0)
    assert decoded() is not None
    run_dense(layer, False)
    assert decoded() is None
    layer(torch.randn(5, 2, 4))
    layer.to("cpu")
    assert not any(isinstance(w, Tensor) for w in layer._flat_weights)


# ---- attention and modules of the user's own ------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 7}], ids=str
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention(options: dict[str, Any], need_weights: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, **options)
    query = torch.randn(3, 3, 8)
    key, value = (torch.randn(3, 3, options.get(n, 8)) for n in ("kdim", "vdim"))
    check(layer, query, key, value, need_weights=need_weights)


def test_self_attention_inside_a_transformer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    check(layer, torch.randn(2, 5, 8))
    assert set(packed_layers(layer)) == {"self_attn", "self_attn.out_proj", "linear1", "linear2"}


class Doubling(nn.Linear):
    """A linear layer whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A linear layer with the forward of nn.Linear."""


class Odd(nn.Module):
    """A module that Taut has never heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,oi->no", x, self.weight.tanh()) * self.scale


@pytest.mark.parametrize("make", MAKERS)
def test_modules_of_the_users_own(make: Make) -> None:
    for module in (Doubling(7, 5), Named(7, 5), Odd()):
        check(module, torch.randn(3, 7), make=make)


# ---- what a packed layer stays --------------------------------------------------------------


def test_it_stays_what_it_was() -> None:
    for layer in (nn.Linear(7, 5), nn.Conv2d(4, 6, 3), nn.Embedding(9, 4), nn.GRU(4, 3), Odd()):
        cls = type(layer)
        pack(layer)
        assert isinstance(layer, cls)
        assert isinstance(layer, Packed)
        assert type(layer).__name__ == f"Packed{cls.__name__}"


def test_its_weight_reads_as_before_and_is_no_parameter() -> None:
    layer = nn.Linear(7, 5)
    reference = pack(layer)
    assert torch.equal(layer.weight, reference.weight)
    assert layer.weight is layer.weight
    run_dense(layer, False)
    assert torch.equal(layer.weight, reference.weight)
    assert layer.weight is not layer.weight
    assert [n for n, _ in layer.named_parameters()] == ["bias"]
    with pytest.raises(AttributeError, match="no attribute 'wait'"):
        layer.wait  # noqa: B018 - reading it is the test


def test_what_was_decoded_is_dropped() -> None:
    layer = nn.Linear(7, 5)
    pack(layer)
    for drop in (lambda: layer.to("cpu"), lambda: layer.run_dense(False)):
        layer.run_dense(True)
        layer(torch.randn(1, 7))
        assert list(layer._decoded) == ["weight"]
        drop()
        assert not layer._decoded
    layer(torch.randn(1, 7))
    assert not layer._decoded


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_a_deep_copy_is_another_layer_with_the_same_answers(dense: bool, used: bool) -> None:
    for layer, x in (
        (nn.Linear(4, 5), torch.randn(3, 4)),
        (nn.LSTM(4, 3), torch.randn(5, 2, 4)),
    ):
        pack(layer.eval())
        run_dense(layer, dense)
        expected = layer(x) if used else None
        copied = copy.deepcopy(layer)
        same(copied(x), layer(x) if expected is None else expected, 0.0)
        before = layer(x)
        for part in copied.packed.buffers():
            if part.is_floating_point():
                part.zero_()
        copied.run_dense(dense)
        same(layer(x), before, 0.0)
        assert not torch.equal(leaves(copied(x))[0], leaves(before)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_cast_layer_computes_in_its_dtype_and_stores_what_it_stored(dtype: torch.dtype) -> None:
    for layer, shape in (
        (nn.Linear(4, 5), (3, 4)),
        (nn.Conv2d(2, 3, 2), (1, 2, 5, 5)),
        (nn.LSTM(4, 3), (5, 2, 4)),
    ):
        reference = pack(layer.eval()).to(dtype)
        stored = [b.clone() for b in layer.packed.buffers()]
        layer.to(dtype)
        x = torch.randn(shape, dtype=dtype)
        same(layer(x), reference(x), 0.0)
        run_dense(layer, False)
        same(layer(x), reference(x), 4 * torch.finfo(dtype).eps)
        for before, after in zip(stored, layer.packed.buffers(), strict=True):
            assert before.dtype is after.dtype
            assert torch.equal(before, after)


def test_a_half_layer_is_packed_as_one() -> None:
    layer = nn.Linear(7, 5).half()
    reference = pack(layer)
    x = torch.randn(3, 7).half()
    assert layer.weight.dtype is torch.float16
    same(layer(x), reference(x), 0.0)
    embedding = nn.Embedding(9, 4).to(torch.bfloat16)
    pack(embedding)
    run_dense(embedding, False)
    assert embedding(torch.tensor([1])).dtype is torch.bfloat16


def test_packing_twice_is_refused() -> None:
    layer = nn.Linear(7, 5)
    pack(layer)
    weights = dict(layer.packed.items())
    with pytest.raises(TypeError, match="PackedLinear is packed already"):
        pack_layer(layer, weights)


def test_run_dense_reaches_every_packed_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    pack(model)
    assert list(packed_layers(model)) == ["0", "2.0"]
    run_dense(model, False)
    assert [m.runs_dense for m in packed_layers(model).values()] == [False, False]
    run_dense(model, True)
    assert [m.runs_dense for m in packed_layers(model).values()] == [True, True]
