"""What each criterion keeps, on networks small enough to compute it by hand; and its refusals."""

import math

import pytest
import torch
from conftest import digits_task
from nets import Net, traced, weight
from torch import nn

import taut
from taut.data import Batches
from taut.errors import RecipeError, TaskError
from taut.importance import CRITERIA, FISHER_WIDTH, taylor, wanda
from taut.modules import clone, tensor_at
from taut.pattern import NOfM
from taut.statistics import Statistics
from taut.techniques import PruneWeights, ShareValues

SITES = ("0.weight", "3.weight", "5.weight")
NEED_DATA = sorted(set(CRITERIA) - {"magnitude", "random"})


def few(task, examples=60):
    """The same task with little to calibrate on."""
    x, y = task._data["train"].inputs[:examples], task._data["train"].targets[:examples]
    return digits_task(train=Batches(x, y, 16))


def one_by_one(net, task, name):
    """The gradient of each example's loss: [examples, *shape]."""
    found = []
    for x, y in task._data["train"]:
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
            found.append(torch.autograd.grad(loss, net.get_parameter(name))[0])
    return torch.stack(found)


def pruned(net, task, **options):
    options = {"sparsity": 0.8, "scope": "layer", **options}
    return taut.apply(clone(net), PruneWeights(**options), task)


def kept(net, name):
    return tensor_at(net, name).detach() != 0


# Facts


def test_gradients_are_those_of_the_examples(trained, task):
    task = few(task)
    statistics = Statistics(trained, task.calibration_loss())
    for site in traced(trained, torch.zeros(2, 64)).sites:
        each, found = one_by_one(trained, task, site.name), statistics.gradients(site)
        torch.testing.assert_close(found.mean, each.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.squares, each.square().mean(0), rtol=1e-4, atol=1e-7)
        flat = nn.functional.pad(each.flatten(1), (0, -each[0].numel() % 50)).unflatten(1, (-1, 50))
        explicit = torch.einsum("nbi,nbj->bij", flat, flat) / len(each)
        statistics._fisher.clear()
        torch.testing.assert_close(statistics.fisher(site, 50), explicit, rtol=1e-4, atol=1e-7)


def test_large_networks_get_their_fisher_blocks_site_by_site(trained, task, monkeypatch):
    statistics = Statistics(trained, few(task).calibration_loss())
    sites = traced(trained, torch.zeros(2, 64)).sites
    at_once = [statistics.fisher(s, 8) for s in sites]
    assert len(statistics._fisher) == 3
    monkeypatch.setattr("taut.statistics._MOST_BYTES", 0)
    statistics._fisher.clear()
    for site, wanted in zip(sites, at_once, strict=True):
        torch.testing.assert_close(statistics.fisher(site, 8), wanted)
        assert list(statistics._fisher) == [site.name]


def test_gradients_stay_those_of_the_network_as_it_was(trained, task):
    task = few(task)
    net = clone(trained)
    statistics = Statistics(net, task.calibration_loss())
    sites = traced(net, torch.zeros(2, 64)).sites
    first = statistics.gradients(sites[0])
    PruneWeights(sparsity=0.9, scope="layer").apply(net, sites[0], statistics)
    assert statistics.gradients(sites[0]) is first
    each = one_by_one(trained, task, "5.weight")
    torch.testing.assert_close(
        statistics.gradients(sites[2]).mean, each.mean(0), rtol=1e-4, atol=1e-7
    )


def test_inputs_are_those_after_what_was_pruned_before(trained, task):
    task = few(task)
    net = clone(trained)
    statistics = Statistics(net, task.calibration_loss())
    sites = traced(net, torch.zeros(2, 64)).sites
    PruneWeights(sparsity=0.9, scope="layer").apply(net, sites[0], statistics)
    x = net[1](net[0](task._data["train"].inputs)).detach().double()
    (found,) = statistics.products(sites[1])
    torch.testing.assert_close(found.moments, x.T @ x, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("layer", ["lstm", "attention", "embedding", "conv", "tied", "frozen"])
@pytest.mark.parametrize("criterion", NEED_DATA)
def test_every_kind_of_site_can_be_ranked(layer, criterion):
    build = {
        "lstm": lambda: Net(lambda n, x: n.a(x)[0][:, -1], a=nn.LSTM(4, 6, batch_first=True)),
        "attention": lambda: Net(
            lambda n, x: n.a(x, x, x)[0].mean(1), a=nn.MultiheadAttention(4, 2, batch_first=True)
        ),
        "embedding": lambda: Net(lambda n, x: n.a(x).mean(1), a=nn.Embedding(9, 5)),
        "conv": lambda: Net(lambda n, x: n.a(x).mean(2), a=nn.Conv1d(3, 4, 2)),
        "tied": lambda: Net(
            lambda n, x: n.b(n.a(x)).mean(1), a=nn.Embedding(9, 5), b=nn.Linear(5, 9)
        ),
        "frozen": lambda: Net(lambda n, x: n.a(x).mean(1), a=nn.Linear(4, 5)).requires_grad_(False),
    }
    net = build[layer]()
    if layer == "tied":
        net.b.weight = net.a.weight
    tokens = layer in ("embedding", "tied")
    x = torch.randint(0, 9, (20, 3)) if tokens else torch.randn(20, 3, 4)
    data = Batches(x, torch.randint(0, 4, (20,)), 8)
    task = taut.Task(train=data, test=data)
    net = taut.apply(net, PruneWeights(sparsity=0.5, scope="layer", criterion=criterion), task)
    for site in traced(build[layer](), x).sites[: 1 if layer == "tied" else None]:
        held = tensor_at(net, site.name)
        assert int(held.count_nonzero()) == round(0.5 * held.numel())
        assert bool(held.isfinite().all())


# Criteria


def test_taylor_and_obd_keep_the_largest_of_their_scores(trained, task):
    task = few(task)
    for criterion, score in (
        ("taylor", lambda w, g: (g.mean(0) * w).abs()),
        ("obd", lambda w, g: 0.5 * g.square().mean(0) * w.square()),
    ):
        net = pruned(trained, task, criterion=criterion)
        for name in SITES:
            w, mask = trained.get_parameter(name).detach(), kept(net, name)
            scores = score(w, one_by_one(trained, task, name))
            assert scores[mask].min() >= 0.999 * scores[~mask].max()
            assert torch.equal(tensor_at(net, name)[mask], w[mask])
            assert int(mask.sum()) == round(0.2 * w.numel())


def test_wanda_keeps_the_largest_of_each_row(trained, task):
    task = few(task)
    net = pruned(trained, task, criterion="wanda")
    x = task._data["train"].inputs
    scores, mask = trained[0].weight.detach().abs() * x.norm(dim=0), kept(net, "0.weight")
    assert {int(n) for n in mask.sum(1)} == {12, 13}  # 0.2 · 64
    for row, keep in zip(scores, mask, strict=True):
        assert row[keep].min() >= row[~keep].max()


def test_wanda_shares_a_fraction_of_all_by_score(trained, task):
    task = few(task)
    net = pruned(trained, task, criterion="wanda", scope="global")
    left = sum(int(kept(net, n).sum()) for n in SITES)
    total = sum(trained.get_parameter(n).numel() for n in SITES)
    assert left / total == pytest.approx(0.2, abs=0.002)
    statistics = Statistics(trained, task.calibration_loss())
    scores = [
        wanda(trained.get_parameter(s.name).detach(), statistics.products(s, diagonal=True))
        for s in traced(trained, torch.zeros(2, 64)).sites
    ]
    cut = torch.cat([s.flatten() for s in scores]).sort(descending=True).values[left]
    for name, score in zip(SITES, scores, strict=True):
        assert int(kept(net, name).sum()) == pytest.approx(int((score > cut).sum()), abs=2)


def test_random_follows_the_seed(trained, task):
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(kept(pruned(trained, task, criterion="random"), "0.weight"))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_lamp_by_another_score(trained, task):
    task = few(task)
    net = pruned(trained, task, criterion="obd", scope="lamp")
    left = sum(int(kept(net, n).sum()) for n in SITES)
    total = sum(trained.get_parameter(n).numel() for n in SITES)
    assert left / total == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize("options", [{"sparsity": 0.7}, {"pattern": "1:4"}], ids=str)
def test_obs_hurts_least(trained, task, options):
    loss = task.calibration_loss()
    hurt = {c: loss(pruned(trained, task, criterion=c, **options)) for c in ("magnitude", "obs")}
    assert loss(trained) < hurt["obs"] < 0.5 * hurt["magnitude"]


def test_fisher_adjusts_what_stays(trained, task):
    task = few(task)
    net = pruned(trained, task, criterion="fisher")
    w, now = trained[0].weight.detach(), tensor_at(net, "0.weight").detach()
    assert not torch.equal(now[now != 0], w[now != 0])
    statistics = Statistics(trained, task.calibration_loss())
    h = statistics.fisher(traced(trained, torch.zeros(2, 64)).sites[0], FISHER_WIDTH)
    change, bare = (
        v.flatten().unflatten(0, (-1, FISHER_WIDTH)) for v in (now - w, w * (now != 0) - w)
    )
    quadratic = [torch.einsum("bi,bij,bj->", d, h, d) for d in (change, bare)]
    assert quadratic[0] < quadratic[1]


def test_a_loss_without_the_weight_costs_nothing():
    w = torch.tensor([1.0, -2.0])
    assert torch.equal(taylor(w, torch.zeros(2)), torch.zeros(2).double())


def test_another_criterion_prunes_further_what_one_has_pruned(trained, task):
    task = few(task)
    chart = taut.trace(trained, task.example())
    net = pruned(trained, task, sparsity=0.5)
    before = kept(net, "3.weight")
    taut.apply(net, PruneWeights(sparsity=0.8, scope="layer", criterion="obs"), task, chart)
    after = kept(net, "3.weight")
    assert not bool((after & ~before).any())
    assert int(after.sum()) == round(0.2 * after.numel())


def test_a_schedule_follows_magnitudes_alone(trained, task):
    task = few(task)
    for criterion, opens in (("magnitude", True), ("obs", False), ("wanda", False)):
        net = pruned(trained, task, criterion=criterion)
        before = kept(net, "0.weight")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        taut.attach_schedules(net, optimizer, 10, "schedule(kind='cubic', steps=5)")
        assert torch.equal(kept(net, "0.weight"), before) is not opens


# Patterns


def test_a_pattern_keeps_n_of_every_m_in_a_row(trained, task):
    for criterion in ("magnitude", "obs"):
        net = pruned(trained, few(task), criterion=criterion, pattern="2:4", scope="sensitivity")
        for name in SITES:
            groups = kept(net, name).unflatten(1, (-1, 4))
            assert bool((groups.sum(-1) == 2).all())
    magnitudes = trained[0].weight.detach().abs().unflatten(1, (-1, 4))
    mask = kept(pruned(trained, task, pattern="2:4"), "0.weight").unflatten(1, (-1, 4))
    largest = magnitudes.topk(2).indices
    assert torch.equal(mask, torch.zeros_like(mask).scatter(-1, largest, True))


@pytest.mark.parametrize("shape", [(3, 8), (3, 10), (2, 3, 3), (5,), (4, 1)])
def test_the_rest_of_a_row_keeps_as_many_or_all(shape):
    pattern, scores = NOfM(2, 4), torch.rand(shape)
    chosen = pattern.choose(scores, pattern.kept(shape))
    assert int(chosen.sum()) == pattern.kept(shape)
    rows = chosen.reshape(shape[0] if len(shape) > 1 else 1, -1)
    for row in rows:
        assert [int(g.sum()) for g in row.split(4)] == [min(2, len(g)) for g in row.split(4)]


def test_a_pattern_takes_none_that_an_earlier_mask_removed():
    among = torch.tensor([[True, False, False, False, True, True, True, True]])
    chosen = NOfM(2, 4).choose(torch.rand(1, 8), 4, among)
    assert chosen[0, :4].tolist() == [True, False, False, False]
    assert int(chosen.sum()) == 3


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "24", "2:4:8", "a:b", "2:500", " 2:4"])
def test_what_is_no_pattern(text):
    with pytest.raises(RecipeError, match=rf"a pattern is N:M with 0 < N < M.*got '{text}'"):
        PruneWeights(pattern=text)


def test_two_rules_are_refused():
    with pytest.raises(RecipeError, match=r"threshold and pattern are two rules for one thing"):
        PruneWeights(threshold=0.1, pattern="2:4")
    with pytest.raises(RecipeError, match=r"rules for magnitudes, got quality=1.0 and criterion="):
        PruneWeights(quality=1.0, criterion="obs")
    with pytest.raises(RecipeError, match=r"criterion has no choice 'obdd'; did you mean 'obd'"):
        PruneWeights(criterion="obdd")


# Refusals


@pytest.mark.parametrize("criterion", NEED_DATA)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_without_data(trained, criterion, scope):
    sites = traced(trained, torch.zeros(2, 64)).sites
    technique = PruneWeights(criterion=criterion, scope=scope)
    with pytest.raises(TaskError, match=r"needs a task with data, got none.*criterion='magnitude'"):
        technique.localise(trained, sites, Statistics(trained))["0.weight"].apply(trained, sites[0])


def refused(trained, criterion, x, message):
    data = Batches(x, torch.arange(40) % 10, 10)
    task = taut.Task(train=data, test=data)
    with pytest.raises(TaskError, match=message):
        taut.apply(trained, PruneWeights(scope="layer", criterion=criterion), task)


@pytest.mark.parametrize("criterion", NEED_DATA)
def test_data_that_are_no_numbers(trained, criterion):
    x = torch.randn(40, 64)
    x[3, 5] = math.nan
    refused(trained, criterion, x, "site '0.weight'.*look for NaN in the training data")


@pytest.mark.parametrize("criterion", ["obs", "wanda"])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_inputs_that_are_always_the_same(trained, criterion, value):
    message = r"inputs of site '0.weight' are the same in all .* leave it out by only='!0.weight'"
    refused(trained, criterion, torch.full((40, 64), value), message)


def test_no_data_at_all(trained):
    empty = taut.Task(
        train=lambda: iter(()), test=Batches(torch.zeros(2, 64), torch.zeros(2).long())
    )
    with pytest.raises(TaskError, match=r"train\(\) yields no batch"):
        taut.apply(trained, PruneWeights(scope="layer", criterion="obs"), empty)


@pytest.mark.parametrize("criterion", ["taylor", "obd", "fisher"])
def test_gradients_that_are_all_zero(task, criterion):
    net = nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))
    flat = digits_task(loss=lambda out, y: 0.0 * out.sum())
    with pytest.raises(TaskError, match=r"gradients of the loss .* are all zero"):
        taut.apply(net, PruneWeights(scope="layer", criterion=criterion), flat)


def test_a_loss_that_cannot_be_differentiated(trained):
    lost = digits_task(loss=lambda out, y: nn.functional.cross_entropy(out.detach(), y))
    with pytest.raises(TaskError, match=r"cannot be differentiated.*without detach\(\) or item"):
        taut.apply(trained, PruneWeights(scope="layer", criterion="obd"), lost)


def test_a_loss_of_all_examples_together(trained):
    statistics = Statistics(trained, lambda model: 0.0)
    site = traced(trained, torch.zeros(2, 64)).sites[0]
    with pytest.raises(
        TaskError, match=r"each example's own, got function; give .* calibration_loss"
    ):
        statistics.gradients(site)


def test_a_weight_whose_products_cannot_be_seen():
    net = Net(lambda n, x: x @ (2 * n.w), w=weight(4, 3))
    data = Batches(torch.randn(8, 4), torch.arange(8) % 3, 4)
    site = taut.types.Site(name="w", kind="linear", shape=(4, 3), macs=12)
    task = taut.Task(train=data, test=data)
    statistics = Statistics(net, task.calibration_loss())
    with pytest.raises(TaskError, match=r"site 'w' is multiplied with cannot be seen.*only='!w'"):
        PruneWeights(scope="layer", criterion="obs").apply(net, site, statistics)
    PruneWeights(scope="layer", criterion="obd").apply(net, site, statistics)


def test_a_shared_site_is_refused_by_name(trained, task):
    net = taut.apply(clone(trained), ShareValues(bits=3), task)
    chart = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match=r"site '0.weight' is written in 8 numbers already"):
        taut.apply(net, PruneWeights(scope="layer", criterion="obs"), task, chart)
