"""What a layer reads, rounded: trained, stored, read back and run in whole numbers."""

import copy

import pytest
import torch
from torch import nn

import taut
from taut.activations import (
    InputForm,
    LevelCode,
    StepCode,
    decoded,
    input_forms,
    nearest_step,
    place_input,
)
from taut.container import encode
from taut.errors import FormatError, RecipeError
from taut.kernels import Levels
from taut.layers import run_dense
from taut.modules import clone
from taut.pack import load, pack
from taut.packed import Plain


class Steps(InputForm):
    """A step that learns nothing."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def forward(self, x):
        return x + (self.code.rounded(x, self.dim) - x).detach()

    def pack(self):
        return self.code


def steps(bits=4, signed=False, step=0.1):
    high = 2 ** (bits - signed) - 1
    return StepCode(torch.tensor([step]), -high - 1 if signed else 0, high)


def three_levels():
    """-0.5, 0.25 and 1, with two thresholds for each of four channels."""
    thresholds = torch.tensor([[0.0, 0.1, -0.2, 0.3], [0.5, 0.6, 0.4, 0.9]])
    pattern = torch.tensor([0, 1, 3], dtype=torch.uint8)
    return LevelCode(
        Levels(thresholds=thresholds, pattern=pattern, scale=torch.tensor([0.375] * 2), offset=0.25)
    )


CODES = {
    "1 bit": steps(1),
    "4 bits": steps(),
    "4 bits, signed": steps(signed=True),
    "8 bits": steps(8, step=0.01),
    "8 bits, signed": steps(8, True, 0.02),
    "dynamic": StepCode(torch.zeros(0), -127, 127),
    "levels": three_levels(),
    "signs": LevelCode(Levels.sign(0.2)),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4), nn.Linear(4, 3),
    ).eval()  # fmt: skip


def rounded(code):
    """The net with the inputs of its first and last layers rounded."""
    model = net()
    for path in ("0", "5"):
        place_input(model, path, Steps(copy.deepcopy(code)), "test()")
    return model


X = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_the_input_is_what_is_rounded(code):
    model, plain = rounded(code), net()
    y = plain[0](code.rounded(X, 1))
    y = plain[5](code.rounded(plain[1:5](y)))
    torch.testing.assert_close(model(X), y)
    assert not torch.equal(y, plain(X))


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_it_is_stored_and_read_back(code, tmp_path):
    model = rounded(code)
    pack(model, tmp_path / "net.taut", "float32")
    loaded = load(tmp_path / "net.taut", net())
    torch.testing.assert_close(loaded(X), model(X))
    run_dense(loaded, False)
    torch.testing.assert_close(loaded(X), model(X))
    pack(loaded, tmp_path / "again.taut", "float32")
    assert (tmp_path / "again.taut").read_bytes() == (tmp_path / "net.taut").read_bytes()
    names = [t.names[0] for t in taut.inspect(tmp_path / "net.taut").tensors]
    assert names[-2:] == ["0:input", "5:input"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_few_levels_are_sums_of_bits(bits, signed):
    code = steps(bits, signed) if (bits, signed) != (1, True) else steps(2, True)
    x = torch.cat([torch.randn(200), torch.tensor([0.05, 0.15, -0.05, torch.nan])])[None]
    torch.testing.assert_close(decoded(code.levels(), x), code.rounded(x))


def test_many_levels_are_no_bits():
    assert steps(8).levels() is None
    assert CODES["dynamic"].levels() is None


def test_the_nearest_step_by_its_definition():
    x, step = torch.randn(1000), torch.tensor(0.07)
    for low, high in ((0, 7), (-8, 7), (-127, 127), (0, 255)):
        n = nearest_step(x, step, low, high)
        every = step * torch.arange(low, high + 1)
        best = (x[:, None] - every).abs().amin(1)
        torch.testing.assert_close((x - step * n).abs(), best)


def test_rows_and_examples_have_steps_of_their_own():
    code = CODES["dynamic"]
    x = torch.stack([torch.linspace(-1, 1, 8), torch.linspace(-10, 10, 8)])
    whole, step = code.whole(x)
    torch.testing.assert_close(step, torch.tensor([[1.0], [10.0]]) / 127)
    assert whole.dtype is torch.int8
    assert torch.equal(whole[0], whole[1])
    torch.testing.assert_close(whole * step, code.rounded(x))


def test_a_copy_rounds_by_its_own_form():
    model = rounded(CODES["4 bits"])
    copied = clone(model)
    before = model(X)
    dict(input_forms(copied))["0"].code = steps(1)
    assert torch.equal(model(X), before)
    assert not torch.equal(copied(X), before)


def test_a_second_form_takes_the_place_of_the_first():
    model = rounded(CODES["4 bits"])
    place_input(model, "0", Steps(CODES["8 bits"]), "other()")
    place_input(model, "5", Steps(CODES["8 bits"]), "other()")
    torch.testing.assert_close(model(X), rounded(CODES["8 bits"])(X))
    assert [f.recipe for _, f in input_forms(model)] == ["other()"] * 2


def test_only_some_layers_can_round():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.LSTM(4, 4)})
    for path, kind in (("b", "LSTM"), ("a.out_proj", "NonDynamicallyQuantizableLinear")):
        told = rf"test\(\): the input of layer '{path}', a {kind}, cannot be rounded; .*only='!"
        with pytest.raises(RecipeError, match=told):
            place_input(model, path, Steps(steps()), "test()")


def refused(message, state, tmp_path):
    (tmp_path / "bad.taut").write_bytes(encode(state))
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "bad.taut", net())


def stored(**more):
    """The net's tensors as a file holds them, and more."""
    state = {(n,): Plain.of(t, "float32") for n, t in net().state_dict().items()}
    return state | {(n,): v for n, v in more.items()}


def test_a_code_stands_under_the_name_of_a_layer(tmp_path):
    code = steps()
    refused("rounds the input of '1'", stored(**{"1:input": code}), tmp_path)
    refused("rounds the input of 'no.such'", stored(**{"no.such:input": code}), tmp_path)
    refused("plain.v1 stands where it cannot", stored(**{"0:input": Plain.of(X)}), tmp_path)
    state = stored()
    state["4.bias",] = code
    refused("4.bias: steps.v1 stands where it cannot", state, tmp_path)


class Forged(StepCode):
    """Steps that say of themselves what is not so."""

    format = "steps.v1"

    def __init__(self, step, meta):
        super().__init__(torch.as_tensor(step), 0, 1)
        self._meta = meta

    def meta(self):
        return self._meta


@pytest.mark.parametrize(
    ("step", "meta", "message"),
    [
        ([1.0, 2.0], {"low": 0, "high": 1}, r"one step or none, got the shape \[2\]"),
        ([1.0], {"low": 0, "high": 256}, r"high must lie in \[1, 255\], got 256"),
        ([1.0], {"low": 0, "high": 1.5}, r"high must lie in \[1, 255\], got 1.5"),
        ([1.0], {"low": 3, "high": 7}, "low must be 0, -7 or -8, got 3"),
        ([-1.0], {"low": 0, "high": 1}, "a finite number above 0"),
        ([float("nan")], {"low": 0, "high": 1}, "a finite number above 0"),
    ],
)
def test_steps_that_cannot_be_are_refused(step, meta, message, tmp_path):
    refused(message, stored(**{"0:input": Forged(step, meta)}), tmp_path)


class ForgedLevels(LevelCode):
    """Levels that say of themselves what is not so."""

    format = "levels.v1"

    def __init__(self, numbers=None, **meta):
        super().__init__(Levels.sign())
        if numbers is not None:
            self.numbers = torch.tensor(numbers)
            self.shape = (len(numbers),)
        self._meta = {**super().meta(), **meta}

    def meta(self):
        return self._meta


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (ForgedLevels(planes=9), r"planes must lie in \[1, 8\], got 9"),
        (ForgedLevels(pattern="0002"), "each below 2.*got '0002'"),
        (ForgedLevels(pattern="00"), "2 to 16 bytes"),
        (ForgedLevels(pattern="zz"), "2 to 16 bytes"),
        (ForgedLevels([1.0, 0.0]), r"do not make the shape \[2\]"),
        (ForgedLevels([1.0, 0.0, float("inf")]), "finite numbers"),
        (ForgedLevels([1.0, 0.0, 1.0, 0.0, 2.0], pattern="000101"), "do not make the shape"),
        (ForgedLevels([1.0, 0.0, 1.0, 0.5], pattern="000101"), "thresholds rise"),
    ],
)  # fmt: skip
def test_levels_that_cannot_be_are_refused(code, message, tmp_path):
    refused(message, stored(**{"0:input": code}), tmp_path)
