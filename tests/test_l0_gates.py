"""L0 gates: their distribution, their price, what they close, and how they stay closed."""

import math

import pytest
import torch
from conftest import digits_task

import taut
from taut.aim import coded_bytes
from taut.errors import RecipeError
from taut.modules import clone, tensor_at
from taut.recover import Recover, recover
from taut.schedules import advance, settled
from taut.selection import SETTLES
from taut.techniques import L0Gates, PruneWeights, ShareValues
from taut.techniques.l0_gates import BETA, GAMMA, ZETA, Gates

NAMES = ("0.weight", "3.weight", "5.weight")


def gated(trained, task, **options):
    return taut.apply(clone(trained), L0Gates(**options), task)


def form_of(net, name="0.weight"):
    module, _, parameter = name.rpartition(".")
    return net.get_submodule(module).parametrizations[parameter][0].forms[0]


def gates(log_alpha):
    """Gates for weights of one, each with this log alpha."""
    form = Gates(torch.ones(len(log_alpha)), "weights", 0.0, 12.0)
    form.slow_log_alpha.data = torch.tensor(log_alpha) / 10
    return form


def kept(net):
    return sum(int(tensor_at(net, n).count_nonzero()) for n in NAMES)


LOG_ALPHA = [-4.0, -1.5, 0.0, 0.7, 3.0]


def test_gates_are_hard_concrete():
    """The formula of the paper, number by number."""
    form, u = gates(LOG_ALPHA), [0.02, 0.9, 0.5, 0.31, 0.999]
    got = form.gate(torch.tensor(u)).tolist()
    for z, x, a in zip(got, u, LOG_ALPHA, strict=True):
        s = 1 / (1 + math.exp(-(math.log(x) - math.log(1 - x) + a) / BETA))
        assert z == pytest.approx(min(1, max(0, s * (ZETA - GAMMA) + GAMMA)), abs=1e-6)


def test_the_chance_to_be_open_is_what_sampling_finds():
    form = gates(LOG_ALPHA)
    z = torch.stack([form.gate(torch.rand(5).clamp(1e-6, 1 - 1e-6)) for _ in range(40_000)])
    found = (z > 0).double().mean(0)
    for i, a in enumerate(LOG_ALPHA):
        one = gates([a])
        bits = float(one.bits(torch.ones(1), None).detach())
        p = 1 / (1 + math.exp(-(a - BETA * math.log(-GAMMA / ZETA))))
        entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
        assert bits == pytest.approx(12 * p + entropy, rel=1e-4)
        assert float(found[i]) == pytest.approx(p, abs=0.01)


def test_gradients_of_the_price_and_of_a_sample():
    core = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    form = Gates(core.detach(), "columns", 0.4, 5.0).double()
    noise = torch.full_like(form.slow_log_alpha, 0.4)

    def run(log_alpha):
        form._parameters["slow_log_alpha"] = log_alpha
        return form.bits(core, None), form.gate(noise)

    start = form.slow_log_alpha.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (start,))


def test_in_training_a_weight_is_a_sample_around_itself(trained, task):
    net = gated(trained, task, start=0.999).train()
    torch.manual_seed(1)
    samples = torch.stack([tensor_at(net, "0.weight").detach() for _ in range(400)])
    weight = trained[0].weight.detach()
    big = weight.abs() > weight.square().mean().sqrt()
    assert float(samples.std(0)[big].mean()) > 0
    ratio = (samples.mean(0) / weight)[big]
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(tensor_at(net.eval(), "0.weight")[big], weight[big])


@pytest.mark.parametrize(("groups", "axis"), [("rows", 1), ("columns", 0)])
def test_one_gate_for_a_group(trained, task, groups, axis):
    net = gated(trained, task, groups=groups)
    form = form_of(net)
    assert form.slow_log_alpha.numel() == (64 if groups == "columns" else 48)
    with torch.no_grad():
        form.slow_log_alpha.flatten()[5] = -1
    net.eval()
    empty = ~tensor_at(net, "0.weight").any(axis)
    assert empty.nonzero().flatten().tolist() == [5]


def test_small_weights_start_nearer_to_being_shut(trained, task):
    form = form_of(gated(trained, task, start=0.97))
    order = trained[0].weight.detach().abs().flatten().argsort()
    assert bool((form.log_alpha.flatten()[order].diff() >= 0).all())
    shut = float((form.log_alpha < 0).float().mean())
    assert 0 < shut < 0.15


@pytest.mark.parametrize(("share", "rel"), [(1.0, 0.15), (0.1, 0.15)])
def test_the_price_is_near_the_bytes_of_the_file(trained, task, tmp_path, share, rel):
    net = gated(trained, task)
    for name in NAMES:
        form = form_of(net, name)
        sizes = tensor_at(trained, name).detach().abs()
        cut = sizes.flatten().quantile(1 - share)
        with torch.no_grad():
            form.slow_log_alpha.copy_(torch.where(sizes >= cut, 2.0, -2.0))
    estimate = float(coded_bytes(net).detach())
    taut.pack(net.eval(), tmp_path / "net.taut", "float16")
    tensors = taut.inspect(tmp_path / "net.taut").tensors
    written = sum(t.size_bytes for t in tensors if t.names[0] in NAMES)
    assert estimate == pytest.approx(written, rel=rel)


def test_the_price_closes_gates_and_then_they_stay(trained, task):
    def run(price):
        torch.manual_seed(0)
        net = gated(trained, task)
        recover(net, task, Recover(epochs=9, learning_rate=1e-2, bytes_weight=price))
        return net.eval()

    free, dear = run(0.0), run(3e-3)
    assert kept(dear) < 0.4 * kept(free)
    assert task.evaluate(dear) > 0.88
    assert settled(dear)
    assert float(coded_bytes(dear)) == 0  # nothing is open any more
    before = {n: tensor_at(dear, n) != 0 for n in NAMES}
    recover(dear, task, Recover(epochs=2))
    assert all(torch.equal(tensor_at(dear.eval(), n) != 0, before[n]) for n in NAMES)


def test_the_choice_is_made_before_the_end(trained, task):
    net = gated(trained, task).train()
    advance(net, SETTLES - 0.01)
    assert not settled(net)
    assert not torch.equal(tensor_at(net, "0.weight"), tensor_at(net, "0.weight"))
    advance(net, SETTLES)
    assert settled(net)
    assert torch.equal(tensor_at(net, "0.weight"), tensor_at(net, "0.weight"))


def test_a_site_whose_gates_all_close_keeps_the_last(trained, task):
    net = gated(trained, task)
    with torch.no_grad():
        form_of(net).slow_log_alpha.sub_(5)
    advance(net, 1.0)
    assert int(tensor_at(net.eval(), "0.weight").count_nonzero()) == 1


def test_gates_are_not_decayed(trained, task):
    net = gated(trained, task)
    before = [form_of(net, n).slow_log_alpha.detach().clone() for n in NAMES]
    for name in NAMES:
        form_of(net, name).slow_log_alpha.requires_grad_(True)
        form_of(net, name).noisy = lambda core: core  # no gradient but the price's, which is free
    recover(net, task, Recover(epochs=1, weight_decay=1.0, distill=0.0))
    for name, then in zip(NAMES, before, strict=True):
        assert torch.equal(form_of(net, name).slow_log_alpha, then)


def test_gates_then_shared_values(trained, task, tmp_path):
    torch.manual_seed(0)
    net, traced = gated(trained, task), taut.trace(trained, task.example())
    recover(net, task, Recover(epochs=6, learning_rate=1e-2, bytes_weight=1e-3))
    taut.apply(net, ShareValues(bits=3), task, traced)
    recover(net, task, Recover(epochs=2, learning_rate=3e-3))
    taut.pack(net.eval(), tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    for name in NAMES:
        assert len(tensor_at(net, name).unique()) <= 9
    assert task.evaluate(loaded) == pytest.approx(task.evaluate(net), abs=0.01)


def test_a_mask_and_gates_share_a_site(trained, task, tmp_path):
    traced = taut.trace(trained, task.example())
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.5), task)
    taut.apply(net, L0Gates(), task, traced)
    recover(net, task, Recover(epochs=2, bytes_weight=1e-3))
    taut.pack(net.eval(), tmp_path / "net.taut", "float32")
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    x = next(task.batches("test")).args[0]
    torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-4)


def test_a_killed_run_goes_on_with_its_gates(trained, tmp_path):
    recipe = "l0_gates > recover(epochs=3, learning_rate=0.01, bytes_weight=1e-3)"

    class Kill(taut.Watch):
        def on_epoch(self, record):
            if record.epoch == 2:
                raise KeyboardInterrupt

    whole = taut.compress(clone(trained), digits_task(), recipe, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        taut.compress(
            clone(trained), digits_task(), recipe, folder=tmp_path / "killed", watch=Kill()
        )
    again = taut.compress(clone(trained), digits_task(), recipe, folder=tmp_path / "killed")
    assert (tmp_path / "killed/net.taut").read_bytes() == (tmp_path / "whole/net.taut").read_bytes()
    assert again.measurement.nonzero_parameters == whole.measurement.nonzero_parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": "filters"}, "groups has no choice 'filters'"),
        ({"start": 0.5}, r"start must lie in \[0.9, 1\), got 0.5"),
        ({"bits": 64}, r"bits must lie in \[0, 32\], got 64"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        L0Gates(**options)


def test_sites_that_do_not_fit_are_refused(trained, task):
    traced = taut.trace(trained, task.example())
    shared = taut.apply(clone(trained), ShareValues(bits=3), task)
    with pytest.raises(RecipeError, match=r"l0_gates: site '0.weight' is written in 8 numbers"):
        taut.apply(shared, L0Gates(), task, traced)
    vector = taut.types.Site(name="v", kind="linear", shape=(9,), macs=9)
    with pytest.raises(RecipeError, match=r"site 'v' of shape \[9\] has no columns"):
        L0Gates(groups="columns").accepts(vector, (9,))
