"""Merging of units: copies go without a trace in every structure, and what cannot be told stays."""

import logging

import pytest
import torch
from nets import Net
from structures import STRUCTURES, conv, example, pooled
from torch import nn

import taut
from taut import edits
from taut.errors import RecipeError
from taut.groups import Groups, readers
from taut.modules import clone, tensor_at
from taut.statistics import Statistics
from taut.techniques import MergeNeurons
from taut.trace import trace


def merged(net, x, **options):
    """The network after merging, with one batch as its data."""
    statistics = Statistics(net.eval(), lambda m: float(m(x).float().square().mean()))
    return MergeNeurons(**options).reshape(net, trace(net, ((x[:2],), {})), statistics)


def many(shape):
    return example(shape) if shape == (2, 7) else torch.randn(24, *shape[1:])


def build(name):
    make, shape = STRUCTURES[name]
    net, x = make().eval(), many(shape)
    return net, x, Groups(net, ((x[:2],), {}))


def only(group):
    """Patterns of one group: of the weights whose rows its units are."""
    makers = [m.name for m in group.members if m.trained and m.dim == 0]
    return ", ".join(makers) or group.members[0].name


@torch.no_grad()
def copy_units(net, groups, group):
    """Make the last quarter of a group's units copies of its first ones; returns how many."""
    read = {(r.name, r.dim) for r in readers(groups, group)[0]}
    count = group.units // 4
    for member in group.members:
        if (member.name, member.dim) not in read:
            rows = tensor_at(net, member.name).data.movedim(member.dim, 0)
            places = torch.from_numpy(member.places)
            rows[places[-count:]] = rows[places[:count]]
    return count


EXACT = ("plain", "residual", "depthwise", "grouped", "shuffled halves", "up and down", "attention",
         "encoder", "bilstm", "gru", "cells")  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact_copies_go_without_a_trace(name):
    net, x, groups = build(name)
    able = [g for g in groups.groups if not readers(groups, g)[1] and g.units >= 4]
    assert able
    for i, group in enumerate(able):
        copied = clone(net)
        count = copy_units(copied, groups, group)
        with torch.no_grad():
            wanted = copied(x)
        before = sum(p.numel() for p in copied.parameters())
        fit = ("pairs", "least_squares")[i % 2]
        made = merged(copied, x, ratio=count / group.units, fit=fit, only=only(group))
        assert sum(p.numel() for p in made.parameters()) < before
        with torch.no_grad():
            torch.testing.assert_close(made(x), wanted, atol=1e-4, rtol=1e-3)


def test_two_fits_of_what_is_not_quite_parallel():
    """Least squares errs less than pairs, which errs less than the cut alone."""
    base = torch.randn(6, 5)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        net[0].weight.copy_((base @ torch.randn(5, 12)).T * 0.3)
    x = torch.randn(500, 6)
    with torch.no_grad():
        wanted = net(x)
        errors = []
        for fit in ("least_squares", "pairs"):
            made = merged(clone(net), x, ratio=0.5, fit=fit)
            errors.append(float((made(x) - wanted).norm()))
        keep = sorted(range(12), key=lambda i: -float(net[2].weight[:, i].norm()))[:6]
        alone = torch.tanh(net[0](x))[:, keep] @ net[2].weight[:, keep].T + net[2].bias
        errors.append(float((alone - wanted).norm()))
    assert errors[0] < errors[1] < errors[2]


def test_units_of_opposite_sign_and_other_size_are_one(caplog):
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False)).eval()
    with torch.no_grad():
        net[0].weight[5:] = torch.tensor([[-2.0], [0.5], [3.0]]) * net[0].weight[:3]
    x = torch.randn(50, 6)
    wanted = net(x)
    with caplog.at_level(logging.INFO, "taut"):
        made = merged(net, x, ratio=0.9, angle=1, fit="pairs")
    assert tuple(made[0].weight.shape) == (5, 6)
    torch.testing.assert_close(made(x), wanted, atol=1e-5, rtol=1e-4)
    assert (
        "merge_neurons: 0.weight: 3 of 8 units are told by the others, at most 0.0" in caplog.text
    )
    assert "0.weight: 5 of 8 units" in caplog.text


def behind_a_norm(net, x):
    return pooled(net, torch.relu(net.norm(net.b(torch.relu(net.a(x))))))


def test_a_norm_takes_what_the_reading_layer_has_no_bias_for():
    net = Net(
        behind_a_norm, a=conv(3, 8), b=nn.Conv2d(8, 6, 1, bias=False), norm=nn.BatchNorm2d(6),
        out=nn.Linear(6, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net.a.weight[:2] = 0  # two units that always say the same
        net.a.bias[:2] = torch.tensor([0.8, 0.3])
    x = torch.randn(20, 3, 8, 8)
    wanted = net(x)
    mean = net.norm.running_mean.clone()
    made = merged(net, x, ratio=0.25, only="a")
    assert made.b.in_channels == 6
    assert not torch.equal(made.norm.running_mean, mean)
    torch.testing.assert_close(made(x), wanted, atol=1e-5, rtol=1e-4)


def test_a_whole_run_merges_recovers_and_recodes(trained, task, tmp_path):
    recipe = "merge_neurons(ratio=0.25) > recover(epochs=1) > share_values(bits=5)"
    result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
    loaded = taut.load(result.folder / "net.taut", clone(trained))
    assert tuple(loaded[0].weight.shape) == (36, 64)
    assert tuple(loaded[3].weight.shape) == (24, 36)
    assert taut.inspect(result.folder / "net.taut").edits == ("resize",)
    x = next(task.batches("test")).args[0]
    assert torch.equal(loaded(x), result.model(x))
    assert result.measurement.macs == 64 * 36 + 36 * 24 + 240


def test_it_loses_less_than_pruning_alone(trained, task):
    scores = [
        task.calibration_loss()(taut.apply(clone(trained), step, task))
        for step in ("merge_neurons(ratio=0.5)", "prune_channels(ratio=0.5)")
    ]
    assert scores[0] < 0.5 * scores[1]


# ---- what stays whole -----------------------------------------------------------------------

REASONS = {
    "attention": {"attention.out.weight": "layer_norm looks at the units together in first"},
    "group norm": {"a.weight": "group_norm looks at the units together in norm"},
    "joint attention": {"attention.joint.weight": "einsum looks at the units together"},
    "tied words": {"layer.weight_ih_l0": "words.weight makes the units and reads them too"},
    "weight norm": {"a.parametrizations.weight.original0": "weight_norm looks at"},
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_told_says_why(name):
    _, _, groups = build(name)
    for group, reason in REASONS[name].items():
        found, why = readers(groups, groups[group])
        assert not found
        assert reason in why


def softened(net, x):
    return net.out(net.a(x).softmax(-1)) + net.more(net.b(x) @ net.b(x).mT @ net.c(x))


def test_sums_over_units_that_are_no_weights():
    net = Net(
        softened, a=nn.Linear(6, 8), b=nn.Linear(6, 8), c=nn.Linear(6, 8), more=nn.Linear(8, 4),
        out=nn.Linear(8, 4),
    )  # fmt: skip
    groups = Groups(net.eval(), ((torch.randn(2, 5, 6),), {}))
    told = {g.name: readers(groups, g)[1] for g in groups.groups}
    assert told == {
        "a.weight": "softmax goes over the units in the model",
        "b.weight": "matmul sums over the units of activations in the model",
        "c.weight": "",
    }


def test_where_nothing_can_be_told_it_is_refused():
    net, x, _ = build("weight norm")
    told = r"no group of only='\*' can be joined \(a\..*_weight_norm looks .*\); use prune_channels"
    with pytest.raises(RecipeError, match=told):
        merged(net, x)


def test_nothing_within_the_angle_leaves_the_network_whole(caplog):
    net, x, _ = build("mlp")
    with caplog.at_level(logging.WARNING, "taut"):
        made = merged(net, x, angle=0.01)
    assert "no unit lies within angle=0.01 of what stays (ratio=0.25): every group" in caplog.text
    assert made is net
    assert not edits.of(net)


def test_widths_are_multiples():
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 2)).eval()
    x = torch.randn(50, 6)
    made = merged(clone(net), x, ratio=0.5, round_to=8)
    assert made[0].out_features == 16
    made = merged(clone(net), x, ratio=0.9, angle=60, round_to=4)
    assert made[0].out_features % 4 == 0


# ---- bad input ------------------------------------------------------------------------------


def test_without_data_it_says_what_to_do(trained, task):
    traced = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match=r"merge_neurons: what units are alike needs a task with"):
        MergeNeurons().reshape(trained, traced, Statistics(trained))
    assert not edits.of(trained)


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (2, "merge_neurons: what '4.weight' is multiplied with is not all numbers; look for NaN"),
        (4, "merge_neurons: '4.weight' holds NaN or infinite weights"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(layer, told):
    net, x, _ = build("mlp")
    with torch.no_grad():
        net[layer].weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=told):
        merged(net, x)
    assert tuple(net[0].weight.shape) == (16, 6)
    assert not edits.of(net)


class Sometimes(nn.Module):
    """Has a layer that its loss does not reach, though its example does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def test_what_the_data_do_not_reach_stays_whole(caplog):
    net, x = Sometimes().eval(), torch.randn(20, 6)
    statistics = Statistics(net, lambda m: float(m.b(torch.relu(m.a(x))).square().mean()))
    with caplog.at_level(logging.INFO, "taut"):
        made = MergeNeurons().reshape(net, trace(net, ((x[:2],), {})), statistics)
    assert "merge_neurons: b.weight stays whole: the data do not reach c.weight" in caplog.text
    assert (made.a.out_features, made.b.out_features) == (6, 8)


def test_a_packed_network_is_refused(trained, task, tmp_path):
    net = taut.apply(clone(trained), "share_values()", task)
    taut.pack(net, tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    with pytest.raises(RecipeError, match="merge_neurons: the network is packed already"):
        taut.apply(loaded, MergeNeurons(), task, taut.trace(trained, task.example()))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \[0, 1\), got 1\.0"),
        ({"angle": 91}, r"angle must lie in \[0, 90\], got 91"),
        ({"fit": "pair"}, r"fit has no choice 'pair'; did you mean 'pairs'"),
        ({"round_to": 0}, r"round_to must lie in \[1, 1024\], got 0"),
    ],
)
def test_options_are_checked(options, told):
    with pytest.raises(RecipeError, match=told):
        MergeNeurons(**options)
