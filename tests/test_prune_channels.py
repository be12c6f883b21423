"""Pruning of channels: which units go, how many, to what budget, and what is refused."""

import logging

import pytest
import torch
from nets import Net
from structures import STRUCTURES, example
from torch import nn

import taut
from taut import edits
from taut.errors import RecipeError
from taut.groups import Groups
from taut.modules import clone
from taut.statistics import Statistics
from taut.techniques import PruneChannels
from taut.trace import trace
from taut.unit_scores import UNIT_CRITERIA


def pruned(net, x, **options):
    """The network after pruning, without data."""
    net = net.eval()
    return PruneChannels(**options).reshape(net, trace(net, ((x,), {})), Statistics(net))


def build(name):
    make, shape = STRUCTURES[name]
    return make().eval(), example(shape)


def widths(net):
    return [tuple(p.shape) for p in net.parameters() if p.dim() > 1]


def test_a_whole_run_prunes_then_recodes(trained, task, tmp_path):
    recipe = (
        "prune_channels(ratio=0.25) > recover(epochs=1) > prune_channels(ratio=0.3334) > "
        "recover(epochs=2) > share_values(bits=5) > recover(epochs=1)"
    )
    result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
    loaded = taut.load(result.folder / "net.taut", clone(trained))
    assert widths(trained)[0] == (48, 64)
    assert tuple(loaded[0].weight.shape) == (24, 64)
    assert tuple(loaded[3].weight.shape) == (16, 24)
    x = next(task.batches("test")).args[0]
    assert torch.equal(loaded(x), result.model(x))
    assert task.evaluate(loaded) > 0.85
    assert result.measurement.macs == 64 * 24 + 24 * 16 + 160


@pytest.mark.parametrize("criterion", ["group", "l1", "l2", "taylor", "obd", "geometric_median"])
def test_units_that_matter_stay(criterion, trained, task):
    with torch.no_grad():
        for layer, dim in ((trained[0], 0), (trained[3], 1)):
            layer.weight[(slice(None),) * dim + (slice(10, 48),)] *= 1e-3
        trained[0].bias[10:] *= 1e-3
    kept = trained[0].weight[:10].clone()
    net = taut.apply(clone(trained), PruneChannels(ratio=0.79, criterion=criterion), task)
    assert len(net[0].weight) == 10
    if criterion in ("taylor", "obd"):  # some units may be dead or their gradients cancel
        assert int(torch.isin(net[0].weight[:, 30], kept[:, 30]).sum()) >= 8
    else:
        assert torch.equal(net[0].weight, kept)


def test_random_follows_the_seed(trained, task):
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(taut.apply(clone(trained), PruneChannels(criterion="random"), task))
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)


def test_the_scale_of_a_norm_ranks():
    net, x = build("depthwise")
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([5.0, 0.1, 4, 0.2, 3, 0.3, 2, 0.4]))
    pruned(net, x, criterion="scale", only="!out")
    assert net.norm.weight.tolist() == [5, 4, 3, 2]
    assert net.deep.groups == net.deep.in_channels == 4


def test_the_scale_needs_a_norm():
    net, x = build("mlp")
    told = r"criterion 'scale' needs a norm .* got none in '0\.weight'; leave it out by only='!0\.w"
    with pytest.raises(RecipeError, match=told):
        pruned(net, x, criterion="scale")


def two_layers(big: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.1)
        net[0].weight[:6] = big  # six units of the first layer stand out
        net[2].weight[:1] = big  # one of the second does
    return net


def test_ranking_by_group_or_among_all():
    x = torch.randn(3, 4)
    local = pruned(two_layers(10.0), x, criterion="l1")
    assert [tuple(p.shape) for p in local.parameters() if p.dim() > 1] == [(4, 4), (4, 4), (2, 4)]
    everywhere = pruned(two_layers(10.0), x, criterion="l1", ranking="global", floor=0.0)
    assert widths(everywhere) == [(6, 4), (1, 6), (2, 1)]


def test_isomorphic_ranking_compares_groups_of_one_structure():
    net, x = build("attention")
    groups = Groups(net, ((x,), {}))
    step = PruneChannels(ranking="isomorphic")
    pools = [[g.name for g in pool] for pool in step._pools(groups, list(groups.groups))]
    assert sorted(map(len, pools)) == [1, 1, 1]
    twins = two_layers(1.0)
    groups = Groups(twins, ((torch.randn(3, 4),), {}))
    assert [len(p) for p in step._pools(groups, list(groups.groups))] == [2]


def test_widths_are_multiples_and_keep_a_floor():
    x = torch.randn(3, 4)
    net = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 2))
    assert widths(pruned(clone(net), x, ratio=0.6, round_to=8)) == [(16, 4), (2, 16)]
    assert widths(pruned(clone(net), x, ratio=0.7, round_to=8)) == [(16, 4), (2, 16)]
    assert widths(pruned(clone(net), x, ratio=0.99, floor=0.25)) == [(10, 4), (2, 10)]
    heads, words = build("attention")
    pruned(heads, words, ratio=0.7, round_to=8, only="attention.*")
    assert heads.attention.num_heads == 2  # of width 4


@pytest.mark.parametrize("name", ["residual", "lstm", "attention"])
@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_a_budget_is_met_and_hardly_undercut(name, budget):
    net, x = build(name)
    groups = Groups(net, ((x,), {}))
    whole = getattr(groups, budget)({})
    pruned(net, x, ratio=0.4, of=budget, floor=0.0)
    left = getattr(Groups(net, ((x,), {})), budget)({})
    assert 0.4 * whole < left <= 0.6 * whole


def test_a_budget_below_the_floors_names_the_smallest():
    net, x = build("mlp")
    before = [p.clone() for p in net.parameters()]
    told = (
        r"ratio=0\.9 of macs is out of reach: with floor=0\.5 and round_to=1 at most 0\.643 can "
        r"go \(120 of 336 are left\); lower the floor or ask for less"
    )
    with pytest.raises(RecipeError, match=told):
        pruned(net, x, ratio=0.9, of="macs", floor=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_so_does_one_of_parameters():
    net, x = build("mlp")
    told = (
        r"ratio=0\.9 of parameters is out of reach: with floor=0\.5 and round_to=1 at most 0\.625 "
        r"can go \(138 of 368 are left\); lower the floor or ask for less"
    )
    with pytest.raises(RecipeError, match=told):
        pruned(net, x, ratio=0.9, of="parameters", floor=0.5)
    assert widths(net) == [(16, 6), (12, 16), (4, 12)]


@pytest.fixture
def clock(monkeypatch):
    """Networks that take a microsecond a parameter, and a millisecond besides; what was timed."""
    timed = []

    def race(models, example, seconds=0.1):
        timed.append((models, example))
        return [1 + 1e-3 * sum(p.numel() for p in m.parameters()) for m in models]

    monkeypatch.setattr("taut.timing.race", race)
    return timed


def test_a_budget_of_latency_is_met_by_few_measurements_at_batch_1(clock):
    net, x = build("mlp")
    pruned(net, x, ratio=0.1, of="latency")
    (whole, part), ((one,), _) = clock[0]
    assert sum(p.numel() for p in whole.parameters()) == 368
    assert len(x) > 1
    assert len(one) == 1
    assert len(clock) == 7
    assert 200 < sum(p.numel() for p in net.parameters()) <= 0.9 * 1368 - 1000
    assert edits.of(part)
    assert part is not net


def test_a_latency_that_no_cut_reaches_names_the_smallest(clock):
    net, x = build("mlp")
    told = (
        r"ratio=0\.5 of latency is out of reach: with floor=0\.5 and round_to=1 at most 0\.168 can "
        r"go \(83\.2 % of the time is left\)"
    )
    with pytest.raises(RecipeError, match=told):
        pruned(net, x, ratio=0.5, of="latency", floor=0.5)
    assert len(clock) == 1
    assert widths(net) == [(16, 6), (12, 16), (4, 12)]


def test_latency_is_measured_on_what_takes_the_networks_place(clock):
    small = pruned(stubborn(), torch.randn(2, 5, 6), ratio=0.1, of="latency", floor=0.0)
    assert [e.kind for e in edits.of(small)] == ["as_graph", "resize"]
    assert sum(p.numel() for p in small.parameters()) <= 0.9 * (1000 + 330) - 1000


def test_only_chooses_by_the_rows_of_weights():
    net, x = build("residual")
    pruned(net, x, only="a, c")
    assert net.a.out_channels == net.b.in_channels == 3
    assert net.c.out_channels == 5
    assert net.stem.out_channels == 8
    net, x = build("residual")
    pruned(net, x, only="!side")  # whatever goes through it stays whole: the trunk on both sides
    assert net.stem.out_channels == 8
    assert net.a.out_channels == 3
    told = r"only='stem' leaves no group that can be cut; known: stem\.weight, a\.weight"
    with pytest.raises(RecipeError, match=told):
        pruned(net, x, only="stem")


def test_nothing_to_cut_says_why():
    net = nn.Linear(4, 2)
    told = r"known: none \(weight: an output of the model; .*weight: an input of the model"
    with pytest.raises(RecipeError, match=told):
        pruned(net, torch.randn(3, 4))


def test_so_little_that_nothing_goes(caplog):
    net, x = build("mlp")
    with caplog.at_level(logging.WARNING, "taut"):
        pruned(net, x, ratio=0.01)
    assert "so little is to go that every group stays whole" in caplog.text
    assert widths(net) == [(16, 6), (12, 16), (4, 12)]


def heads_in_code(net, x):
    n, t, _ = x.shape
    mixed = net.a(x).view(n, t, 4, 4).softmax(2).reshape(n, t, 16)
    return net.out(net.more(net.b(mixed).relu()).relu())


def stubborn():
    return Net(
        heads_in_code, a=nn.Linear(6, 16), b=nn.Linear(16, 8), more=nn.Linear(8, 6),
        out=nn.Linear(6, 4),
    )  # fmt: skip


def test_where_the_code_says_sizes_its_graph_takes_over(caplog):
    net, x = stubborn(), torch.randn(2, 5, 6)
    with caplog.at_level(logging.WARNING, "taut"):
        small = pruned(net, x)
    assert {n: tuple(p.shape) for n, p in small.named_parameters() if p.dim() > 1} == {
        "a.weight": (8, 6), "b.weight": (4, 8), "more.weight": (3, 4), "out.weight": (4, 3),
    }  # fmt: skip
    assert [e.kind for e in edits.of(small)] == ["as_graph", "resize"]
    assert "sizes stand in the code of Net as plain numbers, so its exported graph" in caplog.text
    assert widths(net)[0] == (16, 6)


def test_what_cannot_be_cut_stays_whole_and_is_reported(caplog):
    net = stubborn()
    with caplog.at_level(logging.WARNING, "taut"):
        pruned(net, torch.randn(2, 5, 6), as_graph=False)
    assert widths(net) == [(16, 6), (4, 16), (3, 4), (4, 3)]
    assert "prune_channels: a.weight stays whole: cut: the network does not run" in caplog.text


def test_where_nothing_runs_it_is_refused():
    net = Net(heads_in_code, a=nn.Linear(6, 16), b=nn.Linear(16, 8), more=nn.ReLU(), out=nn.Tanh())
    with pytest.raises(RecipeError, match=r"nothing can be cut: cut: the network does not run"):
        pruned(net, torch.randn(2, 5, 6), as_graph=False)
    assert widths(net) == [(16, 6), (8, 16)]


def read(net, x):
    rows = net.into(x.unflatten(1, (8, 8)))
    return net.out(net.layer(rows).mean(1))


def test_attention_of_pytorch_is_pruned_to_any_ratio_in_a_run(task, tmp_path):
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.1, batch_first=True)
    net = Net(read, into=nn.Linear(8, 16), layer=layer, out=nn.Linear(16, 10))
    recipe = "prune_channels(ratio=0.3) > recover(epochs=1) > share_values(bits=6)"
    result = taut.compress(net, task, recipe, folder=tmp_path / "run")
    found = taut.inspect(result.folder / "net.taut")
    assert found.edits == ("as_graph", "resize")
    shapes = {t.names[0]: t.shape for t in found.tensors}
    assert shapes["layer.self_attn.in_proj_weight"] == (36, 11)
    loaded = taut.load(result.folder / "net.taut", clone(net))
    x = next(task.batches("test")).args[0]
    assert torch.equal(loaded(x), result.model(x))


def test_a_packed_network_is_refused(trained, task, tmp_path):
    net = taut.apply(clone(trained), "share_values()", task)
    taut.pack(net, tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    traced = trace(trained, task.example())
    with pytest.raises(RecipeError, match="packed already; give the network as it was before"):
        taut.apply(loaded, PruneChannels(), task, traced)


def test_weights_that_are_no_numbers_are_refused():
    net, x = build("mlp")
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"group '0\.weight' holds NaN or infinite weights"):
        pruned(net, x)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1\.0"),
        ({"of": "mac"}, r"of has no choice 'mac'; did you mean 'macs'"),
        ({"round_to": 0}, r"round_to must lie in \[1, 1024\], got 0"),
        ({"criterion": "l3"}, r"criterion has no choice 'l3'"),
    ],
)
def test_options_are_checked(options, told):
    with pytest.raises(RecipeError, match=told):
        PruneChannels(**options)


def test_every_criterion_scores_every_structure():
    for name in ("residual", "gru"):
        net, x = build(name)
        for criterion in UNIT_CRITERIA.keys() - {"taylor", "obd", "scale"}:
            pruned(clone(net), x, criterion=criterion)
