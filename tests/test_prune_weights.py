"""Magnitude pruning: what each rule removes, the floor, and neurons that die."""

import logging
import re

import pytest
import torch
from torch import nn

import taut
from taut.errors import RecipeError
from taut.keep_search import SEARCHES, Reinforcement
from taut.modules import clone, tensor_at
from taut.recipe import Recipe
from taut.recoding import chain
from taut.techniques import PruneWeights, ShareValues


def sparsity(model, name):
    held = tensor_at(model, name)
    return 1 - int(held.count_nonzero()) / held.numel()


def test_the_largest_magnitudes_survive_unchanged(trained, task):
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.75, scope="layer"), task)
    for name in ("0.weight", "3.weight", "5.weight"):
        before, after = tensor_at(trained, name), tensor_at(net, name)
        kept = after != 0
        assert sparsity(net, name) == pytest.approx(0.75, abs=0.002)
        assert torch.equal(after[kept], before[kept])
        assert before[kept].abs().min() >= before[~kept].abs().max()


@pytest.mark.parametrize("scope", ["sensitivity", "lamp", "global", *SEARCHES])
def test_a_shared_fraction_is_the_fraction_of_all_weights(trained, task, scope, monkeypatch):
    monkeypatch.setitem(SEARCHES, "reinforcement", Reinforcement(updates=1))  # a quick one
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.9, scope=scope), task)
    names = ("0.weight", "3.weight", "5.weight")
    total = sum(tensor_at(net, n).numel() for n in names)
    left = sum(int(tensor_at(net, n).count_nonzero()) for n in names)
    assert left / total == pytest.approx(0.1, abs=0.002)


def test_global_ranks_all_weights_together(trained, task):
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.9, scope="global"), task)
    names = ("0.weight", "3.weight", "5.weight")
    kept = torch.cat([tensor_at(net, n).detach().flatten() for n in names])
    gone = torch.cat([tensor_at(trained, n).detach().flatten() for n in names])[kept == 0]
    assert kept[kept != 0].abs().min() > gone.abs().max()


@pytest.mark.parametrize("scope", ["sensitivity", "particles", "evolution"])
def test_what_data_share_out_hurts_less_than_the_same_fraction_everywhere(trained, task, scope):
    def loss(scope):
        net = taut.apply(clone(trained), PruneWeights(sparsity=0.7, scope=scope), task)
        return task.calibration_loss()(net)

    assert loss(scope) < loss("layer")


def test_threshold_and_quality_remove_what_lies_below(trained, task):
    net = taut.apply(clone(trained), PruneWeights(threshold=0.1), task)
    held = tensor_at(trained, "0.weight").detach()
    assert torch.equal(tensor_at(net, "0.weight") != 0, held.abs() >= 0.1)
    net = taut.apply(clone(trained), PruneWeights(quality=1.0), task)
    cut = held.std(correction=0)
    assert torch.equal(tensor_at(net, "0.weight") != 0, held.abs() >= cut)


def test_pruned_again_it_only_loses_more(trained, task):
    traced = taut.trace(trained, task.example())
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.5, scope="layer"), task)
    first = tensor_at(net, "0.weight") != 0
    taut.apply(net, PruneWeights(sparsity=0.8, scope="layer"), task, traced)
    second = tensor_at(net, "0.weight") != 0
    assert sparsity(net, "0.weight") == pytest.approx(0.8, abs=0.002)
    assert not bool((second & ~first).any())
    assert len(chain(net, traced.site("0.weight")).recipe) == 1


def test_the_floor_keeps_a_layer_alive_and_says_so(trained, task, caplog):
    with caplog.at_level(logging.WARNING, "taut"):
        net = taut.apply(clone(trained), PruneWeights(threshold=1e9), task)
    assert "the floor keeps 6 weights where 0 were asked for" in caplog.text
    assert all(int(tensor_at(net, n).count_nonzero()) >= 1 for n in ("0.weight", "5.weight"))


def test_empty_rows_are_named(trained, task):
    technique = PruneWeights(sparsity=0.99, scope="global")
    net = taut.apply(clone(trained), technique, task)
    lines = technique.finish(net, taut.trace(trained, task.example()))
    rows = (tensor_at(net, "0.weight") != 0).any(1)
    assert f"0.weight: {int((~rows).sum())} of 48 output rows are empty" in lines


def test_the_scan_tells_each_layers_quality(trained, task, caplog):
    with caplog.at_level(logging.INFO, "taut"):
        net = taut.apply(clone(trained), PruneWeights(sparsity=0.8), task)
    name, part, quality = re.search(
        r"prune_weights: (3.weight): sparsity ([\d.]+), quality ([\d.]+)", caplog.text
    ).groups()
    held = tensor_at(trained, name).detach()
    assert float(part) == pytest.approx(sparsity(net, name), abs=2e-3)
    below = (held.abs() < float(quality) * held.std(correction=0)).double().mean()
    assert float(below) == pytest.approx(float(part), abs=0.01)


def test_two_rules_at_once_are_refused():
    with pytest.raises(RecipeError, match=r"got threshold=0.1 and quality=1.0; give one"):
        PruneWeights(threshold=0.1, quality=1.0)


def test_pruning_a_shared_site_is_refused_by_name(trained, task):
    net = taut.apply(clone(trained), ShareValues(bits=3), task)
    traced = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match=r"site '0.weight' is written in 8 numbers already"):
        taut.apply(net, PruneWeights(scope="layer"), task, traced)


def test_a_scan_without_data_is_refused(trained, task):
    from taut.errors import TaskError
    from taut.statistics import Statistics

    traced = taut.trace(trained, task.example())
    with pytest.raises(TaskError, match="choose prune_weights"):
        PruneWeights().localise(trained, traced.sites, Statistics(trained))


# ---- neurons that die -----------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self, act=torch.relu, padding=0):
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 5, 3, padding=padding)
        self.c = nn.Linear(5 * (4 if padding else 1), 7)
        self.d = nn.Linear(7, 10)
        self.act = act

    def forward(self, x):
        x = self.act(self.a(x.reshape(-1, 1, 8, 8)))
        x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.max_pool2d(self.act(self.b(x)), 2)
        return self.d(self.act(self.c(x.flatten(1))))


def killed(net, task, kill):
    """The net pruned lightly, with some mask entries cleared, before and after finish()."""
    traced = taut.trace(net, task.example())
    technique = PruneWeights(sparsity=0.1, scope="layer")
    taut.apply(net, technique, task, traced)
    with torch.no_grad():
        for name, index in kill:
            chain(net, traced.site(name)).forms[0].mask[index] = False
    x = next(task.batches("test")).args[0]
    with torch.no_grad():
        before = net.eval()(x)
        log = technique.finish(net, traced)
        after = net(x)
    return before, after, log, traced


def test_what_nothing_reads_is_dropped(task):
    net = Conv()
    kill = [("b.weight", (slice(None), 2)), ("d.weight", (slice(None), slice(3, 5)))]
    before, after, log, _ = killed(net, task, kill)
    torch.testing.assert_close(after, before)
    assert int(tensor_at(net, "a.weight")[2].count_nonzero()) == 0
    assert int(tensor_at(net, "c.weight")[3:5].count_nonzero()) == 0
    assert net.a.bias[2] == 0
    assert any("a.weight: 1 neurons that nothing reads" in line for line in log)


@pytest.mark.parametrize("act", [torch.relu, torch.sigmoid])
def test_what_reads_nothing_is_folded_into_the_bias(task, act):
    net = Conv(act)
    before, after, log, _ = killed(net, task, [("c.weight", (slice(1, 3), slice(None)))])
    torch.testing.assert_close(after, before)
    assert int(tensor_at(net, "d.weight")[:, 1:3].count_nonzero()) == 0
    assert any("2 neurons that read nothing folded" in line for line in log)


def test_a_constant_that_padding_breaks_stays(task):
    net = Conv(torch.sigmoid, padding=1)
    kept_before, kept_after, log, _ = killed(net, task, [("a.weight", (0, slice(None)))])
    torch.testing.assert_close(kept_after, kept_before)
    assert int(tensor_at(net, "b.weight")[:, 0].count_nonzero()) > 0
    assert log == ["a.weight: 1 of 6 output rows are empty"]


def test_a_neuron_with_a_second_reader_stays(task):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 6), nn.Linear(6, 10)

        def forward(self, x):
            h = torch.relu(self.a(x))
            return self.b(h) + h.sum(1, keepdim=True)

    net = Two()
    before, after, log, _ = killed(net, task, [("b.weight", (slice(None), 1))])
    torch.testing.assert_close(after, before)
    assert int(tensor_at(net, "a.weight")[1].count_nonzero()) > 0
    assert log == []


def test_dead_neurons_leave_the_file(tmp_path, task):
    net = Conv()
    kill = [("d.weight", (slice(None), slice(0, 6)))]
    killed(net, task, kill)
    taut.pack(net, tmp_path / "net.taut")
    parts = {t.names[0]: t for t in taut.inspect(tmp_path / "net.taut").tensors}
    assert parts["c.weight"].parts["values.values"].count <= 5 * 2  # two bytes a kept weight


def test_options_are_documented_in_their_ranges():
    assert str(Recipe.parse("prune_weights(sparsity=0.5)")) == "prune_weights(sparsity=0.5)"
    with pytest.raises(RecipeError, match=r"sparsity must lie in \[0, 1\), got 1.2"):
        PruneWeights(sparsity=1.2)
