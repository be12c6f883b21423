"""What the calibration data tell low rank: means, what the outputs feel, in few runs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taut
from taut import products, ranks, statistics
from taut.decompositions import KINDS, composed, decomposed
from taut.modules import clone
from taut.products import centred
from taut.statistics import Statistics
from taut.techniques import LowRank


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def task_of(x, y=None):
    y = torch.arange(len(x)) % 4 if y is None else y
    return taut.Task(train=[(x, y)], test=[(x, y)])


X = normal(64, 10, seed=1) + 2.0  # of a mean that is larger than what varies
IMAGES = normal(12, 3, 6, 6, seed=2) + 1.0


class Seen:
    """A loss that runs a network on the inputs it is given."""

    def __init__(self, x):
        self.x = x

    def __call__(self, model):
        with torch.no_grad():
            return float(model(self.x).square().mean())


# ---- the mean -------------------------------------------------------------------------------


def test_the_mean_of_what_a_layer_gives_stays():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 24), nn.Linear(24, 4)).eval()
    made = taut.apply(clone(net), "low_rank(rank='ratio', ratio=0.4, only='0, 2')", task_of(X))
    assert len(made[2]) == 2
    with torch.no_grad():
        torch.testing.assert_close(made[0](X).mean(0), net[0](X).mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made[:3](X).mean(0), net[:3](X).mean(0), atol=1e-5, rtol=1e-4)
        assert float((made[0](X) - net[0](X)).square().mean()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_behind_takes_the_mean_where_there_is_no_bias(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 4),
    )  # fmt: skip
    net.train()(IMAGES)
    net.eval()
    step = LowRank(rank="ratio", ratio=0.5, conv=kind, only="0")
    made = taut.apply(clone(net), step, task_of(IMAGES))
    mean = {
        name: model[:2](IMAGES).detach().mean((0, 2, 3))
        for name, model in (("whole", net), ("parts", made))
    }
    torch.testing.assert_close(mean["parts"], mean["whole"], atol=1e-4, rtol=1e-3)
    assert not torch.equal(made[1].running_mean, net[1].running_mean)


def test_a_layer_with_neither_fits_the_mean_too():
    """Nothing takes the mean: what is least is the error of the outputs as they are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 20, bias=False))
    made = taut.apply(clone(net), LowRank(rank="ratio", ratio=0.3, only="0"), task_of(X))
    moments = X.double().T @ X.double()
    weight, rank = net[0].weight.detach().double(), made[0][0].out_features
    error = float(((made[0].weight.detach().double() - weight) @ X.double().T).square().sum())
    root = torch.linalg.cholesky(moments + 1e-3 * moments.diagonal().mean() * torch.eye(10))
    assert error < 1.1 * float(torch.linalg.svdvals(weight @ root)[rank:].square().sum())


def test_centred_moments_are_those_of_the_inputs_less_their_mean():
    second = nn.Linear(6, 5)
    before, x = normal(64, 6, seed=4), normal(64, 6, seed=5) + 1
    changed = clone(second)

    def run():
        second(before)
        changed(x)

    (found,) = products.products(run, changed.weight, before=second.weight)
    torch.testing.assert_close(found.shift.float(), (before - x).sum(0), atol=1e-4, rtol=1e-4)
    about, was = x - x.mean(0), before - before.mean(0)
    made = centred(found)
    torch.testing.assert_close(made.moments.float(), about.T @ about, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(made.drift.float(), (was - about).T @ about, atol=1e-3, rtol=1e-3)


# ---- what the outputs feel ------------------------------------------------------------------


def test_of_one_output_what_is_felt_is_exact():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5), nn.Tanh(),
        nn.Linear(5, 1),
    )  # fmt: skip
    found = Statistics(net, Seen(IMAGES)).felt(["0", "3"])
    for name, layer, rest in (("0", net[0], net[1:]), ("3", net[3], net[4:])):
        given = net[: int(name)](IMAGES)
        out = layer(given).detach().requires_grad_()
        (slope,) = torch.autograd.grad(rest(out.clone()).sum(), out)
        rows = slope.movedim(1, -1).flatten(0, -2).double()
        torch.testing.assert_close(found[name], statistics._DRAWS * rows.T @ rows)


def test_of_many_outputs_it_is_near_on_the_mean():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 8))
    x = normal(4096, 10, seed=3)
    felt = Statistics(net, Seen(x)).felt(["0"])["0"] / (4096 * statistics._DRAWS)
    exact = net[1].weight.detach().double().T @ net[1].weight.detach().double()
    assert float((felt - exact).norm() / exact.norm()) < 0.05


def test_an_error_that_the_outputs_do_not_feel_costs_nothing():
    weight, felt = normal(6, 8).double(), torch.eye(6).double()
    felt[3:] *= 1e-3  # the last three outputs are hardly read
    for kind, shape in (("channel", (6, 8)), ("spatial", (6, 8, 3, 3)), ("tucker", (6, 8, 3, 3))):
        weight = normal(*shape, seed=7).double()
        few = [3, 3] if kind == "tucker" else [6] if kind == "spatial" else [3]
        lost = {
            how: (composed(kind, decomposed(kind, weight, few, felt=by)) - weight)[:3].norm()
            for how, by in (("felt", felt), ("plain", None))
        }
        assert lost["felt"] < 0.9 * lost["plain"]
    assert float((composed("channel", decomposed("channel", normal(6, 8), [3], felt=felt))
                  - normal(6, 8))[:3].norm()) < 1e-4  # fmt: skip


def test_a_layer_that_is_not_reached_is_left_out():
    net = nn.Sequential(nn.Linear(10, 4))
    net.add_module("spare", nn.Identity())
    net.spare.inner = nn.Linear(3, 3)
    assert set(Statistics(net, Seen(X)).felt(["0", "spare.inner"])) == {"0"}
    assert ranks.output_root(torch.zeros(3, 3)) is None


# ---- how often ------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "runs"), [("energy", 3), ("vbmf", 2), ("ratio", 2)])
def test_moments_are_gathered_once_of_a_first_layer(monkeypatch, rule, runs):
    counted, gather = [], statistics.products

    def count(run, weight, diagonal=False, before=None):
        counted.append(before is not None)
        return gather(run, weight, diagonal, before)

    monkeypatch.setattr(statistics, "products", count)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 40), nn.Linear(40, 4))
    with torch.no_grad():
        net[2].weight.copy_(normal(40, 2) @ normal(2, 40, seed=1))
        net[0].weight.copy_(normal(40, 2) @ normal(2, 10, seed=1))
    taut.apply(net, LowRank(rank=rule, energy=0.7, only="0, 2"), task_of(X))
    assert len(counted) == runs
    assert counted[-1]
    assert sum(counted) == 1  # the network as it was runs beside once something has changed


def test_nothing_drifts_before_anything_changed():
    net = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4))
    traced = taut.trace(net, ((X,), {}))
    found = Statistics(net, Seen(X))
    assert found.products(traced.site("2.weight"))[0].drift is None
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    product = found.products(traced.site("2.weight"))[0]
    inputs = F.relu(net[0](X)).detach().double()
    with torch.no_grad():
        net[0].weight.mul_(2)
    before = F.relu(net[0](X)).detach().double()
    wanted = (before - inputs).T @ inputs
    torch.testing.assert_close(product.drift, wanted, atol=1e-3, rtol=1e-3)
