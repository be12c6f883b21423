"""Ranks for a budget: the least loss by trying all, work as the trace counts it, what is told."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taut
from taut import edits
from taut.decompositions import KINDS, count, decomposed, limits, losses
from taut.errors import RecipeError
from taut.modules import clone
from taut.rank_budget import Choice, calls_of, macs_of, spread
from taut.techniques import LowRank
from taut.trace import trace


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_layers(seed, convex):
    """Four layers with five choices each, and each as it is."""
    numbers = torch.Generator().manual_seed(seed)
    layers = []
    for _ in range(4):
        costs = torch.randperm(40, generator=numbers)[:6].sort(descending=True).values.tolist()
        lost = torch.rand(5, generator=numbers, dtype=torch.float64)
        if convex:  # each saving costs more than the one before
            saved = torch.tensor(costs).diff().neg()
            lost = (lost.sort().values * saved).cumsum(0)
        lost = [0.0, *lost.tolist()]
        layers.append(
            [Choice((r,), c, x) for r, (c, x) in enumerate(zip(costs, lost, strict=True))]
        )
    return layers


def total(choices):
    return sum(c.cost for c in choices), sum(c.loss for c in choices)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_of_that_cost_loses_less(seed, convex):
    layers = random_layers(seed, convex)
    everything = [total(c) for c in itertools.product(*layers)]
    whole, least = (sum(f(c.cost for c in la) for la in layers) for f in (max, min))
    met = set()
    for budget in range(least, whole + 1):
        found = spread(layers, budget)
        cost, loss = total(found)
        assert cost <= budget
        best = min(x for c, x in everything if c <= budget)
        one_step = max(b.loss - a.loss for la in layers for a in la for b in la)
        assert best <= loss + 1e-12 <= best + one_step + 2e-12
        if abs(loss - min(x for c, x in everything if c <= cost)) < 1e-12:
            met.add(cost)
    assert len(met) >= 8  # of the costs that the steps pass through, all


def test_what_cannot_be_met_gives_the_least():
    layers = random_layers(0, True)
    found = spread(layers, -1)
    assert [c.cost for c in found] == [min(c.cost for c in la) for la in layers]
    assert [c.cost for c in spread(layers, 10**6)] == [la[0].cost for la in layers]


def test_what_loses_nothing_is_taken_at_once():
    layers = [[Choice((), 9, 0.0), Choice((2,), 5, 0.0), Choice((1,), 3, 0.5)]]
    assert spread(layers, 100)[0].ranks == (2,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_data", [False, True])
def test_the_losses_are_those_of_the_parts(kind, by_data):
    weight = normal(8, 4, 3, 3).double()
    root = torch.linalg.cholesky(torch.cov(normal(36, 200, seed=1).double())) if by_data else None
    found = list(losses(kind, weight, root))
    assert len(found) >= 5
    for ranks, loss in found:
        assert count(kind, (8, 4, 3, 3), ranks) < weight.numel()
        assert all(1 <= r <= n for r, n in zip(ranks, limits(kind, (8, 4, 3, 3)), strict=True))
        assert 0 <= loss <= 2
        if by_data and kind != "channel":
            continue  # moments are pooled, which the last part makes up for
        made = kernel_of(kind, decomposed(kind, weight, ranks, root))
        error = (made - weight).flatten(1) @ (torch.eye(36).double() if root is None else root)
        seen = weight.flatten(1) @ (torch.eye(36).double() if root is None else root)
        real = float(error.square().sum() / seen.square().sum())
        if kind == "tucker":
            assert real <= loss + 1e-9
        else:
            assert loss == pytest.approx(real, abs=1e-6)


def kernel_of(kind, made):
    """The one kernel that parts in a row amount to."""
    if kind == "channel":
        return torch.einsum("or,rixy->oixy", made[1][:, :, 0, 0], made[0])
    if kind == "spatial":
        return torch.einsum("ory,rix->oixy", made[1][:, :, 0], made[0][..., 0])
    if kind == "tucker":
        first, core, last = made[0][:, :, 0, 0], made[1], made[2][:, :, 0, 0]
        return torch.einsum("or,rsxy,si->oixy", last, core, first)
    first, down, across, last = made[0][..., 0, 0], made[1][:, 0, :, 0], made[2][:, 0, 0], made[3]
    return torch.einsum("or,ri,rx,ry->oixy", last[..., 0, 0], first, down, across)


def test_a_weight_of_zeros_loses_nothing():
    assert next(losses("channel", torch.zeros(6, 6))) == ([1], 0.0)


class Varied(nn.Module):
    """A table, convolutions of one and two dimensions with strides, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 24)
        self.line = nn.Conv1d(24, 36, 5, stride=2, padding=1)
        self.plane = nn.Conv2d(6, 18, (3, 5), stride=(2, 1), padding=(1, 0))
        self.square = nn.Conv2d(18, 20, 3, padding=1)
        self.twice = nn.Linear(20, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, tokens):
        x = self.line(self.table(tokens).mT)
        x = self.square(F.relu(self.plane(x.unflatten(1, (6, 6)))))
        return self.head(self.twice(F.relu(self.twice(x.mean((2, 3))))))


TOKENS = torch.randint(0, 40, (30, 20), generator=torch.Generator().manual_seed(0))


def varied_task():
    return taut.Task(train=[(TOKENS, torch.arange(30) % 5)], test=[(TOKENS, torch.arange(30) % 5)])


@pytest.mark.parametrize("conv", KINDS)
def test_work_is_what_the_trace_counts(conv):
    torch.manual_seed(0)
    net, task = Varied().train(), varied_task()
    traced = trace(net, task.example())
    names = ("table", "line", "plane", "square", "twice", "head")
    calls = calls_of(net, {n: net.get_submodule(n) for n in names}, task.example())
    assert net.training
    for name in names:
        weight = net.get_submodule(name).weight
        table = name == "table"
        shape = tuple((weight.T if table else weight).shape)
        assert macs_of(conv, shape, (), calls[name], table) == traced.site(f"{name}.weight").macs
    made = taut.apply(clone(net), LowRank(rank="ratio", ratio=0.6, conv=conv), task)
    after = trace(made, task.example())
    for change in edits.of(made):
        weight = net.get_submodule(change.layer).weight
        table = change.layer == "table"
        shape = tuple((weight.T if table else weight).shape)
        predicted = macs_of(change.how, shape, change.ranks, calls[change.layer], table)
        assert predicted == sum(
            s.macs for s in after.sites if s.name.startswith(f"{change.layer}.")
        )


@pytest.mark.parametrize("conv", KINDS)
@pytest.mark.parametrize("budget", ["macs", "bytes"])
def test_a_budget_is_met_and_hardly_undercut(conv, budget):
    torch.manual_seed(0)
    net, task = Varied().eval(), varied_task()
    made = taut.apply(clone(net), LowRank(rank=budget, ratio=0.6, conv=conv), task)
    before, after = (trace(n, task.example()) for n in (net, made))
    left = {
        "macs": after.macs / before.macs, "bytes": after.parameters / before.parameters,
    }[budget]  # fmt: skip
    assert 0.5 < left <= 0.6
    made(TOKENS)


def test_a_layer_whose_energy_lies_in_few_values_pays_first(trained, task):
    with torch.no_grad():
        trained[3].weight.copy_(normal(32, 3) @ normal(3, 48, seed=1) / 8)
    total = sum(p.numel() for p in trained.parameters())
    step = LowRank(rank="bytes", ratio=0.8, weighted=False)
    made = taut.apply(clone(trained), step, task)
    assert sum(p.numel() for p in made.parameters()) <= 0.8 * total
    assert [(e.layer, e.ranks) for e in edits.of(made)] == [("3", [3])]


def test_a_budget_loses_less_than_a_share_of_each_layer_and_least_by_the_data(trained, task):
    by_data, plain, alike = (
        task.calibration_loss()(taut.apply(clone(trained), step, task).eval())
        for step in (
            LowRank(rank="macs", ratio=0.3),
            LowRank(rank="macs", ratio=0.3, weighted=False),
            LowRank(rank="ratio", ratio=0.3),
        )
    )
    assert by_data < 0.7 * plain < 0.7 * 0.7 * alike


def test_a_budget_out_of_reach_names_the_smallest(trained, task):
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    macs = 64 * 48 + 48 * 32 + 320
    least = 112 + 80 + 42
    told = (
        rf"low_rank: ratio=0\.01 of the network's macs is out of reach: with the least ranks in "
        rf"all layers of only='\*' {least / macs:.3f} is left \({least} of {macs:,}\); ask for more"
    )
    with pytest.raises(RecipeError, match=told):
        taut.apply(trained, LowRank(rank="macs", ratio=0.01), task)
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    least = 80 + 48 * 64 + 48 + 32 + 330
    told = rf"of the network's bytes is .* all layers of only='3' .* \({least:,} of 5,018\)"
    with pytest.raises(RecipeError, match=told):
        taut.apply(trained, LowRank(rank="bytes", ratio=0.5, only="3"), task)


def test_a_table_costs_no_work_and_stays_for_a_budget_of_macs(caplog):
    caplog.set_level("INFO", "taut")
    made = taut.apply(Varied(), LowRank(rank="macs", ratio=0.5), varied_task())
    assert "table" not in [e.layer for e in edits.of(made)]
    assert "low_rank: table stays as it is: the budget leaves it whole" in caplog.text


@pytest.fixture
def clock(monkeypatch):
    """Networks that take a microsecond a parameter, and a millisecond besides; what was timed."""
    timed = []

    def race(models, example, seconds=0.1):
        timed.append(models[1])
        assert all(bool(p.isfinite().all()) for m in models for p in m.parameters())
        return [1 + 1e-3 * sum(p.numel() for p in m.parameters()) for m in models]

    monkeypatch.setattr("taut.timing.race", race)
    return timed


def test_a_budget_of_latency_is_met_by_few_measurements(clock, trained, task):
    numbers = sum(p.numel() for p in trained.parameters())
    made = taut.apply(clone(trained), LowRank(rank="latency", ratio=0.6), task)
    after = sum(p.numel() for p in made.parameters())
    assert 0.5 * (1000 + numbers) < 1000 + after <= 0.6 * (1000 + numbers)
    assert len(clock) == 7


def test_a_latency_that_no_rank_reaches_names_the_smallest(clock, trained, task):
    left = (1000 + 112 + 80 + 42 + 90) / (1000 + 5018)
    told = rf"ratio=0\.1 of the network's latency is .* {left:.3f} is left \({100 * left:.1f} % of"
    with pytest.raises(RecipeError, match=told):
        taut.apply(trained, LowRank(rank="latency", ratio=0.1), task)
    assert len(clock) == 1
    assert not math.isnan(left)
