"""Penalties: each against its definition, what it leaves alone, and that groups really vanish."""

import math

import pytest
import torch
from conftest import digits_task
from torch import nn

import taut
from taut.errors import RecipeError
from taut.modules import clone, tensor_at
from taut.recover import Recover, recover
from taut.regularise import Regularise
from taut.techniques import L0Gates, PruneWeights, ShareValues


class Net(nn.Module):
    """A convolution, a norm and a matrix, for 8 × 8 digits."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3)
        self.norm = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3)
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv1(x.reshape(-1, 1, 8, 8))))
        return self.fc(torch.relu(self.conv2(x)).flatten(1))


def small():
    """[5, 6] and [4, 3, 2, 2] in float64, of no symmetry."""
    net = nn.ModuleDict({"fc": nn.Linear(6, 5), "conv": nn.Conv2d(3, 4, 2)})
    return net.double()


def norm(weight):
    return math.sqrt(sum(w * w for w in weight.flatten().tolist()))


def lasso(groups):
    return sum(math.sqrt(g.numel()) * norm(g) for g in groups)


def hoyer(groups):
    norms = [norm(g) for g in groups]
    return sum(norms) ** 2 / sum(n * n for n in norms)


def blocks(weight, n):
    matrix = weight.flatten(1)
    return [b for rows in matrix.split(n) for b in rows.split(n, 1)]


def defined(net, kind, groups):
    """The penalty of `small`, written out group by group."""
    fc, conv = net["fc"].weight.detach(), net["conv"].weight.detach()
    match kind, groups:
        case "l1", _:
            return float(fc.abs().sum() + conv.abs().sum())
        case "l2", _:
            return float(fc.square().sum() + conv.square().sum())
        case "hoyer", "weights":
            return hoyer(fc.flatten()) + hoyer(conv.flatten())
    parts = {
        "filters": [list(conv)],
        "channels": [list(conv.transpose(0, 1))],
        "rows": [list(fc)],
        "columns": [list(fc.T)],
    }[groups]
    return sum((lasso if kind == "group_lasso" else hoyer)(p) for p in parts)


CASES = [
    ("l1", "weights"), ("l2", "weights"), ("hoyer", "weights"),
    *[(k, g) for k in ("group_lasso", "hoyer") for g in ("filters", "channels", "rows", "columns")],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "groups"), CASES)
def test_a_penalty_is_its_definition(kind, groups):
    net = small()
    got = Regularise(kind=kind, groups=groups, weight=0.25).penalty(net)
    assert float(got.detach()) == pytest.approx(0.25 * defined(net, kind, groups), rel=1e-6)


def test_blocks_are_squares_cut_short_at_the_edges():
    net = small()
    got = Regularise(kind="group_lasso", groups="blocks", block=4, weight=1.0).penalty(net)
    parts = [blocks(net[n].weight.detach(), 4) for n in ("fc", "conv")]
    assert [len(p) for p in parts] == [4, 3]
    wanted = sum(4 * norm(b) for p in parts for b in p)
    assert float(got.detach()) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("kind", "groups"), [*CASES, ("group_lasso", "blocks")])
def test_gradients_are_those_of_the_formula(kind, groups):
    net = small()
    penalty = Regularise(kind=kind, groups=groups, weight=0.7)

    given = [nn.Parameter(net[n].weight.detach().clone()) for n in ("fc", "conv")]

    def of(fc, conv):
        for name, value in (("fc", fc), ("conv", conv)):
            net[name]._parameters["weight"] = value
        return penalty.penalty(net)

    assert torch.autograd.gradcheck(of, given)


def lstm_units(layer, level, way):
    """Each unit's weights by their indices, as sets, so that none counts twice."""
    size, end = layer.hidden_size, "_reverse" if way else ""
    names = [f"{n}_l{level}{end}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    for unit in range(size):
        group = set()
        for name in names:
            tensor = getattr(layer, name)
            for gate in range(4):
                row = gate * size + unit
                if tensor.dim() == 1:
                    group.add((name, row, 0))
                else:
                    group |= {(name, row, c) for c in range(tensor.shape[1])}
        hidden = getattr(layer, names[1])
        group |= {(names[1], r, unit) for r in range(hidden.shape[0])}
        if level + 1 < layer.num_layers:
            for reader in ("", "_reverse"):
                after = f"weight_ih_l{level + 1}{reader}"
                rows = range(getattr(layer, after).shape[0])
                group |= {(after, r, way * size + unit) for r in rows}
        yield torch.stack([
            getattr(layer, n)[r] if "bias" in n else getattr(layer, n)[r, c] for n, r, c in group
        ])  # fmt: skip


def test_a_unit_of_an_lstm_is_all_that_makes_it_and_reads_it():
    layer = nn.LSTM(3, 4, num_layers=2, bidirectional=True).double()
    got = Regularise(kind="group_lasso", groups="units", weight=1.0).penalty(layer)
    with torch.no_grad():
        groups = [g for n in range(4) for g in lstm_units(layer, *divmod(n, 2))]
    assert len(groups) == 16
    assert float(got.detach()) == pytest.approx(lasso(groups), rel=1e-6)


def test_a_unit_without_weights_is_silent():
    layer = nn.LSTM(3, 4, batch_first=True)
    penalty = Regularise(kind="group_lasso", groups="units", weight=1.0)
    penalty.penalty(layer).backward()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            touched = p.grad.reshape(4, 4, -1)  # [gate, unit, rest]
            assert bool((touched != 0).all()), name
            p.reshape(4, 4, -1)[:, 2] = 0
    assert not layer(torch.randn(2, 6, 3))[0][..., 2].any()


@pytest.mark.parametrize(
    "layer", [nn.GRU(3, 4), nn.RNN(3, 4, bias=False), nn.LSTM(3, 4, proj_size=2)]
)
def test_other_recurrent_layers_have_units_too(layer):
    penalty = Regularise(kind="group_lasso", groups="units", weight=1.0)
    penalty.penalty(layer).backward()
    for name, p in layer.named_parameters():
        assert bool((p.grad != 0).all()), name


def test_slimming_is_the_norms_scales():
    net = Net()
    nn.init.normal_(net.norm.weight)
    got = Regularise(kind="slimming", weight=2.0).penalty(net)
    assert float(got.detach()) == pytest.approx(2 * float(net.norm.weight.detach().abs().sum()))
    got.backward()
    assert torch.equal(net.norm.weight.grad, 2 * net.norm.weight.detach().sign())
    assert net.conv1.weight.grad is None


def trained_by(task, *, epochs=20, learning_rate=1e-2, **options):
    """The network after training with a penalty from the start."""
    net = Net()
    recovery = Recover(epochs=epochs, learning_rate=learning_rate)
    recover(net, task, recovery, settings=[Regularise(**options)])
    assert task.evaluate(net) > 0.93
    return net


def test_slimming_drives_scales_to_zero(task):
    net = trained_by(task, kind="slimming", weight=0.3, learning_rate=2e-2)
    scales = net.norm.weight.detach().abs()
    assert 2 <= int((scales < 1e-2).sum()) <= 11


# What it acts on


def test_weights_count_as_they_are_used(trained, task):
    l1 = Regularise(weight=1.0)
    for technique in (PruneWeights(sparsity=0.8), ShareValues(bits=3)):
        net = taut.apply(clone(trained), technique, task)
        used = sum(tensor_at(net, f"{i}.weight").detach().abs().sum() for i in (0, 3, 5))
        assert float(l1.penalty(net).detach()) == pytest.approx(float(used), rel=1e-5)


def test_what_a_mask_removed_is_left_alone(trained, task):
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.8, scope="layer"), task)
    Regularise(weight=1.0).penalty(net).backward()
    grad = net[0].parametrizations.weight.original.grad
    assert torch.equal(grad != 0, tensor_at(net, "0.weight") != 0)


def test_gates_biases_and_norms_are_no_weights(trained, task):
    net = taut.apply(clone(trained), L0Gates(), task)
    Regularise(weight=1.0).penalty(net).backward()
    assert net[0].parametrizations.weight[0].forms[0].slow_log_alpha.grad is None
    assert net[0].bias.grad is None
    assert float(net[0].parametrizations.weight.original.grad.abs().sum()) > 0


def test_a_tied_weight_counts_once():
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight = net[0].weight
    wanted = float(net[0].weight.detach().abs().sum())
    assert float(Regularise(weight=1.0).penalty(net).detach()) == pytest.approx(wanted)


def test_only_chooses_and_excludes():
    net = small()
    for only, chosen in (("fc", ["fc"]), ("!fc", ["conv"]), ("*.weight, !conv*", ["fc"])):
        got = Regularise(weight=1.0, only=only).penalty(net)
        wanted = sum(float(net[n].weight.detach().abs().sum()) for n in chosen)
        assert float(got.detach()) == pytest.approx(wanted)


# What it is for


def test_group_lasso_empties_whole_filters(task):
    net = trained_by(task, kind="group_lasso", groups="filters", weight=2e-2)
    taut.apply(net, PruneWeights(threshold=5e-3), task)
    filled = tensor_at(net, "conv2.weight").detach().flatten(1) != 0
    assert 1 <= int(filled.any(1).sum()) <= 10
    assert float(filled[filled.any(1)].float().mean()) > 0.5  # whole ones went, not parts of all
    assert task.evaluate(net) > 0.93


def test_group_lasso_empties_whole_columns(task):
    net = trained_by(task, kind="group_lasso", groups="columns", weight=1e-2)
    taut.apply(net, PruneWeights(threshold=5e-3), task)
    filled = tensor_at(net, "fc.weight").any(0)
    assert 16 <= int(filled.sum()) < 128
    assert task.evaluate(net) > 0.93


def test_hoyer_leaves_few_weights_that_matter(task):
    weight = trained_by(task, epochs=15, kind="hoyer", weight=3e-3).fc.weight.detach().abs()
    assert float((weight > 1e-2 * weight.max()).float().mean()) < 0.3


def test_a_recipe_with_a_penalty_runs(trained, tmp_path):
    found = taut.compress(
        trained, digits_task(),
        "regularise(kind='group_lasso', groups='rows', weight=1e-4) > recover(epochs=1) > "
        "prune_weights(sparsity=0.5, scope='layer')",
        folder=tmp_path,
    )  # fmt: skip
    assert found.measurement.score > 0.8


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "group_lasso"}, "needs groups, got groups='weights'"),
        ({"groups": "rows"}, "kind='l1' knows no groups, got groups='rows'"),
        ({"kind": "slimming", "groups": "rows"}, "kind='slimming' knows no groups"),
        ({"kind": "l3"}, "kind has no choice 'l3'"),
        ({"weight": -1.0}, r"weight must lie in \[0, inf\), got -1.0"),
        ({"block": 1}, r"block must lie in \[2, 1024\], got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Regularise(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "slimming"}, "the network has no batch norms that only='\\*' matches"),
        ({"kind": "group_lasso", "groups": "filters"}, "has no filters that only="),
        ({"kind": "group_lasso", "groups": "units"}, "has no units that only="),
        ({"only": "head"}, "has no weights that only='head' matches"),
    ],
)
def test_a_penalty_on_nothing_is_refused(trained, options, message):
    with pytest.raises(RecipeError, match=message):
        Regularise(**options).penalty(trained)
