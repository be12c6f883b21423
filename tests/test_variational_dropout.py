"""Variational dropout: its divergence by integration, its noise, and what goes and stays gone."""

import math

import pytest
import torch

import taut
from taut.aim import coded_bytes
from taut.errors import RecipeError
from taut.modules import clone, tensor_at
from taut.recover import Recover, recover
from taut.schedules import advance, settled
from taut.techniques import ShareValues, VariationalDropout
from taut.techniques.variational_dropout import Noise, divergence

NAMES = ("0.weight", "3.weight", "5.weight")


def noisy(trained, task, **options):
    return taut.apply(clone(trained), VariationalDropout(**options), task)


def form_of(net, name="0.weight"):
    module, _, parameter = name.rpartition(".")
    return net.get_submodule(module).parametrizations[parameter][0].forms[0]


def exact(alpha):
    """KL(normal(1, alpha) ‖ 1/|w|) but a constant: E log|1 + sqrt(alpha) e| - log(alpha) / 2."""
    e = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-e * e / 2) / math.sqrt(2 * math.pi)
    values = (1 + math.sqrt(alpha) * e).abs().clamp(min=1e-9).log() * density
    return float(torch.trapezoid(values, e)) - 0.5 * math.log(alpha)


def test_the_divergence_is_near_the_integral():
    """The paper's constant is chosen so that it vanishes for large alpha."""
    zero = exact(1e8)
    for log_alpha in (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0):
        got = float(divergence(torch.tensor(log_alpha)))
        assert got == pytest.approx(exact(math.exp(log_alpha)) - zero, abs=0.02), log_alpha


def test_gradients_of_the_price():
    core = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    form = Noise(core.detach(), 0.3, 3.0).double()

    def run(core, log_variance):
        form._parameters["slow_log_variance"] = log_variance
        return form.bits(core, None)

    start = form.slow_log_variance.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (core, start))


def test_the_price_is_the_divergence_in_bits(trained, task):
    net = noisy(trained, task, noise=0.2)
    total = 0.0
    for name in NAMES:
        weight = tensor_at(trained, name).detach().double()
        variance = (0.2 * weight.square().mean().sqrt()) ** 2
        total += float(divergence((variance / weight.square()).log().clamp(-20, 20)).sum())
    assert float(coded_bytes(net).detach()) == pytest.approx(total / math.log(2) / 8, rel=1e-4)


def test_in_training_a_weight_bears_noise(trained, task):
    net = noisy(trained, task, noise=0.2).train()
    torch.manual_seed(1)
    samples = torch.stack([tensor_at(net, "0.weight").detach() for _ in range(500)])
    weight = trained[0].weight.detach()
    deviation = 0.2 * float(weight.square().mean().sqrt())
    assert float((samples - weight).std()) == pytest.approx(deviation, rel=0.01)
    assert float((samples.mean(0) - weight).abs().max()) < 6 * deviation / math.sqrt(500)


def test_what_is_mostly_noise_goes(trained, task):
    net = noisy(trained, task, noise=0.2, threshold=1.0).eval()
    weight = trained[0].weight.detach()
    least = 0.2 * weight.square().mean().sqrt() / math.exp(0.5)
    got = tensor_at(net, "0.weight").detach()
    assert torch.equal(got, weight * (weight.abs() > least))
    assert 0.01 < float((got == 0).float().mean()) < 0.15


def test_the_price_removes_weights_and_then_they_stay_away(trained, task):
    def run(price):
        torch.manual_seed(0)
        net = noisy(trained, task)
        recover(net, task, Recover(epochs=9, learning_rate=1e-2, bytes_weight=price))
        return net.eval(), sum(int(tensor_at(net, n).count_nonzero()) for n in NAMES)

    (_, free), (net, dear) = run(0.0), run(1e-2)
    assert dear < 0.4 * free
    assert task.evaluate(net) > 0.88
    assert settled(net)
    before = {n: tensor_at(net, n) != 0 for n in NAMES}
    recover(net, task, Recover(epochs=2))
    assert all(torch.equal(tensor_at(net.eval(), n) != 0, before[n]) for n in NAMES)


def test_once_fixed_there_is_no_noise(trained, task):
    net = noisy(trained, task).train()
    assert not torch.equal(tensor_at(net, "0.weight"), tensor_at(net, "0.weight"))
    advance(net, 0.7)
    assert torch.equal(tensor_at(net, "0.weight"), tensor_at(net, "0.weight"))
    assert float(coded_bytes(net)) == 0


def test_noise_then_shared_values(trained, task, tmp_path):
    torch.manual_seed(0)
    net, traced = noisy(trained, task), taut.trace(trained, task.example())
    recover(net, task, Recover(epochs=6, learning_rate=1e-2, bytes_weight=5e-4))
    taut.apply(net, ShareValues(bits=3), task, traced)
    recover(net, task, Recover(epochs=2, learning_rate=3e-3))
    taut.pack(net.eval(), tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    assert all(len(tensor_at(net, n).unique()) <= 9 for n in NAMES)
    assert task.evaluate(loaded) == pytest.approx(task.evaluate(net), abs=0.01)


def test_a_weight_of_zeros_has_a_finite_price():
    form = Noise(torch.zeros(3, 3), 0.1, 3.0)
    assert bool(form.bits(torch.zeros(3, 3), None).isfinite())
    assert int(form.keeps(torch.zeros(3, 3)).sum()) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, r"noise must lie in \[0.0001, 0.5\], got 0.0"),
        ({"threshold": 11}, r"threshold must lie in \[-4, 10\], got 11"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        VariationalDropout(**options)


def test_what_is_shared_already_is_refused(trained, task):
    traced = taut.trace(trained, task.example())
    shared = taut.apply(clone(trained), ShareValues(bits=3), task)
    with pytest.raises(RecipeError, match=r"dropout: site '0.weight' is written in 8 numbers"):
        taut.apply(shared, VariationalDropout(), task, traced)
