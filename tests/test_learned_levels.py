"""Levels that are sums of a learned basis: fitting, training, and running by counted bits."""

import itertools

import pytest
import torch
from torch import nn

import taut
from taut.activations import input_forms
from taut.errors import RecipeError
from taut.layers import run_dense
from taut.modules import clone, tensor_at
from taut.pack import load, packed_state
from taut.techniques import LearnedLevels
from taut.techniques.learned_levels import InputLevels, WeightLevels, _codes, _improved


def every_level(basis):
    return sorted(sum(s * b for s, b in zip(signs, basis, strict=True))
                  for signs in itertools.product((-1, 1), repeat=len(basis)))  # fmt: skip


def error(form, core):
    return float((form(core) - core).square().sum())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_value_goes_to_its_nearest_level(bits):
    basis = torch.rand(1, bits)
    values = torch.randn(1, 50)
    codes = _codes(values, basis)[0]
    levels = torch.tensor(every_level(basis[0].tolist()))
    for value, code in zip(values[0], codes, strict=True):
        meant = sum((1 if code >> p & 1 else -1) * float(basis[0, p]) for p in range(bits))
        assert abs(float(value) - meant) <= float((levels - value).abs().min()) + 1e-6


def test_the_basis_is_the_least_squares_one():
    values, basis = torch.randn(3, 200), torch.tensor([[0.3, 0.9]] * 3)
    found = _improved(values, torch.ones_like(values), basis)
    codes = _codes(values, basis)
    for row in range(3):
        signs = torch.stack([2.0 * (codes[row] >> p & 1) - 1 for p in range(2)], 1)
        wanted = torch.linalg.lstsq(signs, values[row, :, None]).solution[:, 0]
        torch.testing.assert_close(found[row], wanted, rtol=1e-3, atol=1e-3)


def test_fitting_finds_levels_that_are_there():
    basis = torch.tensor([0.25, 1.0])
    signs = torch.randint(0, 2, (40, 500, 2)) * 2.0 - 1
    form = WeightLevels(torch.zeros(40, 2), True)
    form.settle(signs @ basis)
    torch.testing.assert_close(form.basis, basis.expand(40, 2), rtol=1e-3, atol=1e-3)


def test_more_bits_and_more_rounds_fit_better():
    core, errors = torch.randn(20, 300), []
    for bits in (1, 2, 3, 4):
        form = WeightLevels(torch.zeros(20, bits), True).eval()
        form.settle(core)
        errors.append(error(form, core) / core.numel())
    # the optimal scalar quantizers of a normal variable (Max 1960); bases with fewer degrees of
    # freedom come near
    for found, best in zip(errors, (0.3634, 0.1175, 0.03454, 0.009497), strict=True):
        assert best * 0.93 < found < best * 1.35


def test_the_basis_follows_the_weights_while_training():
    core = torch.randn(4, 100)
    form = WeightLevels(torch.zeros(4, 2), True)
    form.settle(core)
    before = form.basis.clone()
    form.eval()(2 * core)
    assert torch.equal(form.basis, before)
    form.train()
    for _ in range(60):
        form(2 * core)
    torch.testing.assert_close(form.basis, 2 * before, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("signed", [False, True])
def test_inputs_have_levels_from_zero_up_unless_some_are_negative(signed):
    x = torch.randn(40, 100)
    x = x if signed else x.relu()
    form = InputLevels(2).eval()
    form.settle(x)
    got = form(x).unique()
    assert len(got) == 4
    assert float(got.min()) == pytest.approx(float(-got.max()) if signed else 0.0, abs=1e-5)
    torch.testing.assert_close(form.pack().rounded(x), form(x))
    assert float((form(x) - x).square().mean()) < 0.15 * float(x.var())


def test_gradients_pass_between_the_lowest_and_the_highest_level():
    form = InputLevels(2).eval()
    form.settle(torch.rand(1000))
    x = torch.tensor([-1.0, 0.3, 0.5, 5.0], requires_grad=True)
    form(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_trained_it_runs_by_counting_bits(trained, task, tmp_path):
    recipe = "learned_levels(bits=2, activations=2) > recover(epochs=3, learning_rate=0.002)"
    result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
    assert result.measurement.score > 0.9
    loaded = load(result.folder / "net.taut", clone(trained))
    x = torch.cat([b.args[0] for b in task.batches("test")])
    dense = loaded(x)
    run_dense(loaded, False)
    torch.testing.assert_close(loaded(x), dense, rtol=1e-4, atol=1e-4)


def test_what_a_mask_keeps_has_one_basis(trained, task):
    net = clone(trained)
    traced = taut.trace(net, task.example())
    for step in ("prune_weights(sparsity=0.8, scope='layer')", "learned_levels(bits=2)"):
        taut.apply(net, step, task, traced)
    assert len(tensor_at(net, "3.weight").detach().unique()) == 5
    packed = packed_state(net)["3.weight",]
    assert packed.values.format == "bits.v1"
    torch.testing.assert_close(packed.dense(), tensor_at(net, "3.weight").detach())


def test_layers_that_read_no_input_of_their_own_keep_it(task, caplog):
    caplog.set_level("INFO", "taut")
    data = [(torch.randn(8, 5, 6), torch.randint(0, 3, (8,)))]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    net = taut.apply(
        Net(), "learned_levels(activations=2, ends=True)", taut.Task(train=data, test=data)
    )
    assert [path for path, _ in input_forms(net)] == ["head"]
    assert "rnn.weight_hh_l0, rnn.weight_ih_l0 read stays as it is" in caplog.text


def test_levels_of_inputs_need_data(trained, task):
    site = taut.trace(trained, task.example()).site("3.weight")
    with pytest.raises(RecipeError, match=r"need data, and site '3.weight' was given none; use"):
        LearnedLevels(activations=2).apply(clone(trained), site)
