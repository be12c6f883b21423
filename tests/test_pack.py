"""The .taut file: what goes in comes out, at the size that is reported, or nothing changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from taut.container import encode
from taut.errors import FormatError
from taut.layers import packed_layers, run_dense
from taut.pack import inspect, load, pack, packed_state
from taut.packed import Plain
from taut.recoding import Recoding, chain
from taut.sparse_weight import SparseWeight
from taut.techniques import PruneWeights, ShareValues
from taut.techniques.share_values import SharedValues
from taut.types import Site

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PRUNE, SHARE = PruneWeights(sparsity=0.8), ShareValues(bits=3, iterations=5)


def recode(model: nn.Module, *names: str | tuple[str, ...], steps: tuple[Recoding, ...]) -> None:
    """Apply techniques to weights by name; several names are those of one tied weight."""
    for given in names:
        first, *others = (given,) if isinstance(given, str) else given
        shape = tuple(model.get_parameter(first).shape)
        site = Site(name=first, kind="linear", shape=shape, macs=0, aliases=tuple(others))
        for step in steps:
            step.apply(model, site)


def values(model: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model as it uses them, by the names that a fresh one gives them."""
    found = {}
    for name in like.state_dict():
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        found[name] = getattr(module, leaf).detach().clone()
    return found


def rounded(weight: Tensor) -> Tensor:
    """What `auto` makes of numbers of one scale: float16."""
    return weight.half().to(weight.dtype) if weight.is_floating_point() else weight


def same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype is tensor.dtype, name
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True)


class Mixed(nn.Module):
    """A little of every kind of layer, 8 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.rnn = nn.LSTM(16, 6, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(2)
        x, _ = self.rnn(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


WEIGHTS = (
    "conv.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0_reverse", "attention.in_proj_weight",
    "attention.out_proj.weight", "head.weight",
)  # fmt: skip
FORMATS_OF = {
    (): "plain.v1",
    (PRUNE,): "sparse.v1",
    (SHARE,): "shared_values.v1",
    (PRUNE, SHARE): "sparse.v1",
}


# ---- round trips ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", FORMATS_OF, ids=lambda s: "+".join(t.name for t in s) or "plain")
def test_a_model_comes_back(tmp_path: Path, steps: tuple[Recoding, ...]) -> None:
    model = Mixed()
    model.norm(torch.randn(5, 4, 3, 3))  # give the running statistics something to tell
    if steps:
        recode(model, *WEIGHTS, steps=steps)
    size_bytes = pack(model.eval(), tmp_path / "net.taut")
    assert size_bytes == (tmp_path / "net.taut").stat().st_size
    expected = {n: t.dense() for names, t in packed_state(model).items() for n in names}

    loaded = load(tmp_path / "net.taut", Mixed())
    assert not loaded.training
    got = values(loaded, Mixed())
    same_tensors(got, {n: expected[n].to(got[n].dtype) for n in got})
    for name, before in values(model, Mixed()).items():
        limit = 0 if not before.is_floating_point() else 2.0**-9 * float(before.abs().max())
        torch.testing.assert_close(got[name], before, rtol=0, atol=limit)
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-2, atol=1e-2)
    dense = loaded(x)
    run_dense(loaded, False)
    torch.testing.assert_close(loaded(x), dense, rtol=1e-5, atol=1e-5)
    found = {t.names[0]: t.format for t in inspect(tmp_path / "net.taut").tensors}
    assert {found[n] for n in WEIGHTS} == {FORMATS_OF[steps]}
    assert {f for n, f in found.items() if n not in WEIGHTS} == {"plain.v1"}


@pytest.mark.parametrize("steps", FORMATS_OF, ids=lambda s: "+".join(t.name for t in s) or "plain")
@pytest.mark.parametrize("precision", ["auto", "float32", "float16", "bfloat16"])
def test_packing_what_was_loaded_gives_the_same_bytes(
    tmp_path: Path, steps: tuple[Recoding, ...], precision: str
) -> None:
    model = Mixed()
    if steps:
        recode(model, *WEIGHTS, steps=steps)
    for name in ("first", "again"):
        pack(model, tmp_path / name, precision)
    pack(load(tmp_path / "first", Mixed()), tmp_path / "loaded", precision)
    first = (tmp_path / "first").read_bytes()
    assert (tmp_path / "again").read_bytes() == first
    assert (tmp_path / "loaded").read_bytes() == first


def test_a_shared_weight_is_what_its_parts_say() -> None:
    """The definition, by hand: positions, then indices into the table, then the table."""
    layer = nn.Linear(6, 5)
    recode(layer, "weight", steps=(PRUNE, SHARE))
    links = chain(layer, Site(name="weight", kind="linear", shape=(5, 6), macs=0))
    assert links is not None
    packed = packed_state(layer)[("weight",)]
    assert isinstance(packed, SparseWeight)
    assert isinstance(packed.values, SharedValues)
    table, index = packed.values.table.dense(), packed.values.index
    by_hand = torch.zeros(30)
    for position, at in zip(packed.positions.tolist(), index.tolist(), strict=True):
        by_hand[position] = table[at]
    assert torch.equal(packed.dense(), by_hand.reshape(5, 6))
    assert torch.equal(packed.dense() != 0, layer.weight != 0)
    torch.testing.assert_close(packed.dense(), layer.weight.detach(), rtol=2e-3, atol=2e-4)
    assert index.max() == table.numel() - 1  # entries without a weight are left out
    assert packed.count_nonzero() == int(layer.weight.count_nonzero()) == len(index)


# ---- tied weights and shared modules --------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.embed(index))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("steps", FORMATS_OF, ids=lambda s: "+".join(t.name for t in s) or "plain")
def test_tied_weights_are_stored_once_and_stay_tied(
    tmp_path: Path, steps: tuple[Recoding, ...]
) -> None:
    model = Tied()
    if steps:
        recode(model, ("embed.weight", "head.weight"), steps=steps)
    pack(model, tmp_path / "net.taut")
    (stored,) = inspect(tmp_path / "net.taut").tensors
    assert stored.names == ("embed.weight", "head.weight")
    loaded = load(tmp_path / "net.taut", Tied())
    if steps:
        assert loaded.embed.packed["weight"] is loaded.head.packed["weight"]
    else:
        assert loaded.embed.weight is loaded.head.weight
    index = torch.arange(20)
    torch.testing.assert_close(loaded(index), model(index), rtol=2e-2, atol=2e-2)
    pack(loaded, tmp_path / "again.taut")
    assert (tmp_path / "again.taut").read_bytes() == (tmp_path / "net.taut").read_bytes()


@pytest.mark.parametrize("steps", FORMATS_OF, ids=lambda s: "+".join(t.name for t in s) or "plain")
def test_a_module_under_two_names_is_one_module(
    tmp_path: Path, steps: tuple[Recoding, ...]
) -> None:
    model = Twice()
    if steps:
        recode(model, ("first.weight", "second.weight"), steps=steps)
    pack(model, tmp_path / "net.taut")
    stored = {t.names for t in inspect(tmp_path / "net.taut").tensors}
    assert stored == {("first.weight", "second.weight"), ("first.bias", "second.bias")}
    loaded = load(tmp_path / "net.taut", Twice())
    assert loaded.first is loaded.second
    x = torch.randn(3, 6)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-2, atol=1e-2)
    pack(loaded, tmp_path / "again.taut")
    assert (tmp_path / "again.taut").read_bytes() == (tmp_path / "net.taut").read_bytes()


def test_ties_of_the_file_reach_a_model_without_them(tmp_path: Path) -> None:
    pack(Tied(), tmp_path / "net.taut")
    loaded = load(tmp_path / "net.taut", Tied(tied=False))
    assert torch.equal(loaded.embed.weight, loaded.head.weight)


# ---- tensors of every kind ------------------------------------------------------------------


class Buffers(nn.Module):
    """A module that holds these tensors as buffers."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def through(tmp_path: Path, precision: str = "auto", **tensors: Tensor) -> dict[str, Tensor]:
    """These tensors, written and read back."""
    pack(Buffers(**tensors), tmp_path / "buffers.taut", precision)
    fresh = Buffers(**{n: torch.zeros_like(t) for n, t in tensors.items()})
    return load(tmp_path / "buffers.taut", fresh).state_dict()


def test_whole_numbers_come_back_exactly(tmp_path: Path) -> None:
    int64 = torch.iinfo(torch.int64)
    tensors = {
        "flags": torch.tensor([[True, False], [False, True]]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "small": torch.tensor([-128, 127], dtype=torch.int8),
        "whole": torch.tensor([-(2**31), 0, 2**31 - 1], dtype=torch.int32),
        "long": torch.tensor([int64.min, -(2**62), -1, 0, 1, 2**62, int64.max]),
        "scalar": torch.tensor(12345),
    }
    same_tensors(through(tmp_path, **tensors), tensors)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_come_back_exactly_at_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    inf, tiny = float("inf"), torch.finfo(dtype).tiny
    tensors = {
        "normal": torch.randn(3, 4, 5).to(dtype),
        "odd": torch.tensor([0.0, -0.0, inf, -inf, float("nan"), tiny, tiny / 2, 1 / 3]).to(dtype),
        "scalar": torch.tensor(-1.5, dtype=dtype),
    }
    got = through(tmp_path, "float32", **tensors)
    same_tensors(got, tensors)
    assert torch.equal(got["odd"].signbit(), tensors["odd"].signbit())


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_tensors_without_numbers(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensors = {"empty": torch.zeros(shape, dtype=dtype), "after": torch.tensor([3, 1, 2])}
    same_tensors(through(tmp_path, **tensors), tensors)
    assert inspect(tmp_path / "buffers.taut").tensors[0].shape == shape


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_recoded_weights_without_numbers(tmp_path: Path, shape: tuple[int, int]) -> None:
    empty = torch.zeros(shape)
    table = Plain.of(torch.zeros(0))
    for weight in (SparseWeight(empty > 0, table), SharedValues(empty.byte(), table)):
        (tmp_path / "empty.taut").write_bytes(encode({("weight",): weight}))
        loaded = load(tmp_path / "empty.taut", Buffers(weight=empty))
        assert loaded.weight.shape == shape


def test_packed_weights_nest_freely(tmp_path: Path) -> None:
    """A table may be sparse or whole numbers, the values of a sparse weight sparse again."""
    mask = torch.eye(4) > 0
    index = torch.arange(16).reshape(4, 4) % 3
    sparse_table = SparseWeight(torch.tensor([True, False, True]), Plain.of(torch.tensor([0.5, 2])))
    whole = Plain.of(torch.tensor([7, -8, 9]))
    inner = SparseWeight(torch.tensor([True, False, False, True]), Plain.of(torch.tensor([3.0, 4])))
    cases = (
        (SharedValues(index, sparse_table), torch.tensor([0.5, 0, 2])[index]),
        (SharedValues(index, whole), torch.tensor([7.0, -8, 9])[index]),
        (SparseWeight(mask, inner), torch.diag(torch.tensor([3.0, 0, 0, 4]))),
    )  # fmt: skip
    for packed, expected in cases:
        (tmp_path / "nested.taut").write_bytes(encode({("weight",): packed}))
        layer = load(tmp_path / "nested.taut", nn.Linear(4, 4, bias=False))
        assert torch.equal(layer.weight, expected)
        x = torch.randn(2, 4)
        torch.testing.assert_close(layer(x), x @ expected.T)
        run_dense(layer, False)
        torch.testing.assert_close(layer(x), x @ expected.T)


def test_a_mask_that_keeps_nothing(tmp_path: Path) -> None:
    weight = SparseWeight(torch.zeros(4, 5) > 0, Plain.of(torch.zeros(0)))
    (tmp_path / "nothing.taut").write_bytes(encode({("weight",): weight}))
    loaded = load(tmp_path / "nothing.taut", Buffers(weight=torch.ones(4, 5)))
    assert torch.equal(loaded.weight, torch.zeros(4, 5))


def test_a_model_without_tensors(tmp_path: Path) -> None:
    pack(nn.ReLU(), tmp_path / "net.taut")
    assert inspect(tmp_path / "net.taut").tensors == ()
    assert isinstance(load(tmp_path / "net.taut", nn.ReLU()), nn.ReLU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [(), (PRUNE, SHARE)], ids=["plain", "recoded"])
def test_models_of_other_floats(
    tmp_path: Path, dtype: torch.dtype, steps: tuple[Recoding, ...]
) -> None:
    model = nn.Linear(12, 9).to(dtype)
    if steps:
        recode(model, "weight", steps=steps)
    pack(model, tmp_path / "net.taut")
    loaded = load(tmp_path / "net.taut", nn.Linear(12, 9).to(dtype))
    assert loaded.weight.dtype is loaded.bias.dtype is dtype
    x = torch.randn(3, 12, dtype=dtype)
    torch.testing.assert_close(loaded(x), model(x), rtol=2e-2, atol=2e-2)
    pack(loaded, tmp_path / "again.taut")
    assert (tmp_path / "again.taut").read_bytes() == (tmp_path / "net.taut").read_bytes()


class Stateful(nn.Linear):
    """Keeps state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None: ...


def test_what_a_file_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "net.taut"
    twisted = Buffers(phase=torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(FormatError, match=r"phase: .* real numbers, got torch.complex64; "):
        pack(twisted, path)
    with pytest.raises(FormatError, match=r"_extra_state is dict; .* tensors only"):
        pack(Stateful(2, 2), path)
    with pytest.raises(FormatError, match=r"large: float16 cannot .* 1e\+05; use .*float32"):
        pack(Buffers(large=torch.tensor([1.0, -1e5])), path, "float16")
    with pytest.raises(FormatError, match=r"huge: float32 cannot .* 1e\+50; scale them down"):
        pack(Buffers(huge=torch.tensor(1e50, dtype=torch.float64)), path)
    with pytest.raises(FormatError, match=r"no precision 'float15'; did you mean 'float16'\?"):
        pack(nn.Linear(2, 2), path, "float15")
    with pytest.raises(FormatError, match=r"no precision 'int64'; known: auto, bfloat16"):
        pack(nn.Linear(2, 2), path, "int64")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("bell\a", nn.Linear(2, 2))
    with pytest.raises(FormatError, match=r"printable text .* got 'bell\\x07\.weight'"):
        pack(model, tmp_path / "net.taut")
    with pytest.raises(FormatError, match=r"deep: a shape is up to 8 sizes"):
        pack(Buffers(deep=torch.zeros([1] * 9)), tmp_path / "net.taut")
    assert list(tmp_path.iterdir()) == []


# ---- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_precision_rounds_what_is_not_recoded(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    model = nn.Linear(9, 7)
    pack(model, tmp_path / "net.taut", precision)
    loaded = load(tmp_path / "net.taut", nn.Linear(9, 7))
    same_tensors(
        values(loaded, model), {n: t.to(dtype).float() for n, t in values(model, model).items()}
    )


def test_auto_keeps_float32_where_float16_would_hurt(tmp_path: Path) -> None:
    tensors = {
        "even": torch.randn(50),
        "large": torch.tensor([1e5, 2e5, 3e5]),
        "small": torch.tensor([1e-9, 2e-9]),
        "wide": torch.tensor([1000.0 + 1 / 3, 1e-3]),
    }
    # float16 holds multiples of 2**-24 here: an error of 0.5 in 512.5 is less than 2**-10
    tensors["just fine"] = torch.tensor([512.5 * 2.0**-24, 0, 0])
    tensors["too coarse"] = torch.tensor([511.5 * 2.0**-24, 0, 0])
    tensors["one far out"] = torch.cat([torch.randn(50), torch.tensor([30.0 + 1 / 3])])
    got = through(tmp_path, **tensors)
    assert torch.equal(got["just fine"], rounded(tensors["just fine"]))
    assert torch.equal(got["too coarse"], tensors["too coarse"])
    assert torch.equal(got["one far out"], rounded(tensors["one far out"]))
    assert torch.equal(got["even"], rounded(tensors["even"]))
    assert not torch.equal(got["even"], tensors["even"])
    assert torch.equal(got["wide"], rounded(tensors["wide"]))
    for name in ("large", "small"):
        assert torch.equal(got[name], tensors[name])


# ---- parametrizations and modules of the user's own -----------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 4))


def test_the_users_own_parametrization_is_stored_as_what_it_computes_from(tmp_path: Path) -> None:
    model = normed()
    recode(model, "1.weight", steps=(PRUNE, SHARE))
    pack(model, tmp_path / "net.taut", "float32")
    loaded = load(tmp_path / "net.taut", normed())
    assert torch.equal(loaded[0].weight, model[0].weight)
    assert isinstance(packed_layers(loaded)["1"], nn.Linear)
    x = torch.randn(3, 6)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    loaded[0].parametrizations.weight.original0.data.mul_(2)
    assert not torch.equal(loaded[0].weight, model[0].weight)


def test_a_parametrization_on_top_of_a_recoded_weight_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(6, 5)
    recode(model, "weight", steps=(PRUNE,))
    nn.utils.parametrize.register_parametrization(model, "weight", nn.Identity())
    with pytest.raises(FormatError, match=r"weight carries another parametrization on top"):
        pack(model, tmp_path / "net.taut")


class Packing(nn.Module):
    """A user's module with parts that happen to be called what Taut calls its own."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(3, 2)
        self.inner = nn.ModuleDict({"packed": nn.Linear(2, 2)})


def test_no_name_of_the_users_is_lost(tmp_path: Path) -> None:
    model = Packing()
    recode(model, "packed.weight", steps=(PRUNE,))
    pack(model, tmp_path / "net.taut", "float32")
    assert len(inspect(tmp_path / "net.taut").tensors) == 4
    loaded = load(tmp_path / "net.taut", Packing())
    same_tensors(values(loaded, Packing()), values(model, Packing()))
