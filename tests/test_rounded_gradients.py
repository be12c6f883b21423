"""Training with gradients of few bits: the rule, its mean over the noise, and training."""

import pytest
import torch
from torch import nn

import taut
from taut.errors import RecipeError
from taut.modules import clone
from taut.rounded_gradients import QuantizeGradients


def gradients(bits, upstream, times=1):
    """What a layer hands on of an upstream gradient, once for each of the times."""
    size = upstream.shape[1]
    layer = nn.Linear(size, size, bias=False).train()
    nn.init.eye_(layer.weight)
    handles = QuantizeGradients(bits=bits).attach(nn.Sequential(layer))
    x = torch.randn(upstream.shape, requires_grad=True)
    found = [torch.autograd.grad(layer(x), x, upstream)[0] for _ in range(times)]
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def test_each_example_has_its_own_few_levels():
    upstream = torch.randn(3, 200) * torch.tensor([[1.0], [1e-6], [1e6]])
    found = gradients(2, upstream)[0]
    top = upstream.abs().amax(1, keepdim=True)
    share = found / top  # of 2 · (n / 3 − 1/2)
    levels = ((share + 1) * 1.5).round()
    assert set(levels.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}
    torch.testing.assert_close(share, levels / 1.5 - 1, rtol=1e-5, atol=1e-5)
    assert bool(((found - upstream).abs() <= top * 2 / 3 * 1.0001).all())


def test_the_mean_over_the_noise_is_the_gradient():
    torch.manual_seed(0)
    upstream = torch.tensor([[1.0, 0.3, -0.11, 0.0, -0.77]])
    mean = gradients(3, upstream, times=4000).mean(0)
    torch.testing.assert_close(mean[:, 1:], upstream[:, 1:], rtol=0, atol=0.02)
    assert 0.9 < float(mean[0, 0]) <= 1.0  # what lies at the end can only be rounded inward


def test_many_bits_change_next_to_nothing():
    upstream = torch.randn(5, 50)
    torch.testing.assert_close(gradients(8, upstream)[0], upstream, rtol=0, atol=0.05)


def test_a_gradient_of_zeros_stays_one_of_numbers():
    assert bool(gradients(4, torch.zeros(2, 6))[0].isfinite().all())


def test_a_network_trains_by_them_and_is_left_as_it_was(trained, task):
    torch.manual_seed(0)
    net = clone(trained)
    for layer in (net[0], net[3], net[5]):
        layer.reset_parameters()
    before = task.evaluate(net)
    options = taut.Recover(epochs=4, learning_rate=3e-3, distill=0.0)
    taut.recover(net, task, options, settings=[QuantizeGradients(bits=4)])
    assert task.evaluate(net) > max(0.75, before)
    assert not any(m._forward_hooks for m in net.modules())


def test_a_recipe_trains_by_them(trained, task, tmp_path):
    recipe = "quantize_gradients(bits=6) > quantize(bits=2, activations=2, method='dorefa') > "
    found = taut.compress(trained, task, recipe + "recover(epochs=2)", folder=tmp_path / "a")
    plain = taut.compress(
        trained, task, "quantize(bits=2, activations=2, method='dorefa') > recover(epochs=2)",
        folder=tmp_path / "b",
    )  # fmt: skip
    assert [r.loss for r in found.history] != [r.loss for r in plain.history]
    assert found.measurement.size_bytes < plain.measurement.size_bytes * 1.1


def test_only_training_is_changed(trained):
    handles = QuantizeGradients(only="0").attach(trained)
    x = torch.randn(3, 64, requires_grad=True)
    wanted = torch.autograd.grad(clone(trained).eval()(x).sum(), x)[0]
    found = torch.autograd.grad(trained.eval()(x).sum(), x)[0]
    for handle in handles:
        handle.remove()
    assert torch.equal(found, wanted)


def test_layers_that_are_not_there_are_refused(trained):
    with pytest.raises(RecipeError, match=r"only='conv' matches no layer; known: 0, 3, 5"):
        QuantizeGradients(only="conv").attach(trained)
    with pytest.raises(RecipeError, match=r"bits must lie in \[1, 8\], got 9"):
        QuantizeGradients(bits=9)
