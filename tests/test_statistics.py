"""Sensitivities: the curve of a site, its hull, and sparsities that do the least damage."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Net, traced
from torch import Tensor, nn

from taut.errors import TaskError
from taut.statistics import SPARSITIES, Curve, Statistics
from taut.techniques import PruneWeights, ShareValues
from taut.types import Site


def curve(*losses: float, baseline: float = 0.0) -> Curve:
    """A curve at equal distances up to 0.9."""
    at = tuple(0.9 * (i + 1) / len(losses) for i in range(len(losses)))
    return Curve(sparsities=at, losses=losses, baseline=baseline)


class Known(Statistics):
    """Statistics whose curves are given."""

    def __init__(self, curves: dict[str, Curve]) -> None:
        super().__init__(nn.Identity())
        self._curves = curves


def site(name: str, numel: int = 100) -> Site:
    return Site(name=name, kind="linear", shape=(numel,), macs=numel)


# The hull


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (curve(1, 3, 6), [(1 / 30, 30), (2 / 30, 30), (3 / 30, 30)]),
        (curve(11, 13, 16, baseline=10), [(1 / 30, 30), (2 / 30, 30), (3 / 30, 30)]),
        (curve(2, 4, 6), [(6 / 90, 90)]),
        (curve(3, 3, 3), [(3 / 90, 90)]),
        (curve(5, 6, 6), [(6 / 90, 90)]),
        (curve(1, 5, 6), [(1 / 30, 30), (5 / 60, 60)]),
        (curve(0, 0, 6), [(0.0, 60), (6 / 30, 30)]),
        (curve(-1, -2, 3), [(0.0, 60), (3 / 30, 30)]),
        (curve(2, 1, 2), [(2 / 90, 90)]),
        (curve(1, math.inf, math.inf), [(1 / 30, 30), (math.inf, 60)]),
    ],
)
def test_slopes(found: Curve, expected: list[tuple[float, float]]) -> None:
    slopes = found.slopes(100)
    assert [n for _, n in slopes] == pytest.approx([n for _, n in expected])
    assert [d for d, _ in slopes] == pytest.approx([d for d, _ in expected])


LOSSES = st.lists(st.floats(-2, 10), min_size=1, max_size=9)


@given(LOSSES, st.integers(1, 1000))
def test_slopes_rise_and_lie_under_the_curve(losses: list[float], numel: int) -> None:
    found = curve(*losses)
    slopes = found.slopes(numel)
    assert [d for d, _ in slopes] == sorted(d for d, _ in slopes)
    assert sum(n for _, n in slopes) == pytest.approx(found.sparsities[-1] * numel)
    assert sum(d * n for d, n in slopes) == pytest.approx(max(0.0, *losses), abs=1e-9)
    worst, done, damage, corners = 0.0, 0.0, 0.0, []
    for d, n in slopes:
        done, damage = done + n, damage + d * n
        corners.append((done, damage))
    for sparsity, loss in zip(found.sparsities, losses, strict=True):
        worst = max(worst, loss)
        assert hull_at(corners, sparsity * numel) <= worst + 1e-9


def hull_at(corners: list[tuple[float, float]], weights: float) -> float:
    """The hull's damage after some weights, between its corners."""
    before = (0.0, 0.0)
    for done, damage in corners:
        if weights <= done:
            share = (weights - before[0]) / (done - before[0])
            return before[1] + share * (damage - before[1])
        before = (done, damage)
    return before[1]


# The least damage


def test_the_insensitive_site_goes_first() -> None:
    statistics = Known({"hard": curve(10, 30, 60), "easy": curve(1, 2, 9)})
    sites = (site("hard"), site("easy"))
    assert statistics.least_damage(sites, 0.3) == pytest.approx({"hard": 0.0, "easy": 0.6})
    assert statistics.least_damage(sites, 0.4) == pytest.approx({"hard": 0.0, "easy": 0.8})
    assert statistics.least_damage(sites, 0.6) == pytest.approx({"hard": 0.3, "easy": 0.9})


def test_damage_is_counted_by_the_weight() -> None:
    """The same curve costs more a weight where there are fewer weights."""
    same = curve(1, 2, 3)
    statistics = Known({"small": same, "large": same})
    found = statistics.least_damage((site("small", 10), site("large", 1000)), 0.5)
    assert found["small"] == 0.0
    assert found["large"] == pytest.approx(0.505)


def test_what_breaks_the_network_is_taken_last() -> None:
    statistics = Known({"a": curve(1, math.inf, math.inf), "b": curve(90, 95, 99)})
    found = statistics.least_damage((site("a"), site("b")), 0.6)
    assert found == pytest.approx({"a": 0.3, "b": 0.9})


def test_beyond_the_last_point_all_shrink_alike() -> None:
    statistics = Known({"a": curve(1, 2, 3), "b": curve(4, 5, 9)})
    found = statistics.least_damage((site("a", 100), site("b", 300)), 0.95)
    assert found == pytest.approx({"a": 0.95, "b": 0.95})


CURVES = st.lists(st.tuples(LOSSES, st.integers(1, 500)), min_size=1, max_size=4)


@given(CURVES, st.floats(0, 0.999))
def test_exactly_the_fraction_is_removed(
    drawn: list[tuple[list[float], int]], sparsity: float
) -> None:
    sites = tuple(site(str(i), numel) for i, (_, numel) in enumerate(drawn))
    statistics = Known({str(i): curve(*losses) for i, (losses, _) in enumerate(drawn)})
    found = statistics.least_damage(sites, sparsity)
    assert list(found) == [s.name for s in sites]
    assert all(0 <= f <= 1 for f in found.values())
    total = sum(s.numel for s in sites)
    assert sum(found[s.name] * s.numel for s in sites) == pytest.approx(sparsity * total)


@given(CURVES, st.floats(0, 0.99), st.floats(0, 0.99))
def test_more_sparsity_takes_more_of_every_site(
    drawn: list[tuple[list[float], int]], one: float, other: float
) -> None:
    sites = tuple(site(str(i), numel) for i, (_, numel) in enumerate(drawn))
    statistics = Known({str(i): curve(*losses) for i, (losses, _) in enumerate(drawn)})
    low = statistics.least_damage(sites, min(one, other))
    high = statistics.least_damage(sites, max(one, other))
    assert all(low[n] <= high[n] + 1e-9 for n in low)


CONVEX = st.lists(st.floats(0, 5), min_size=3, max_size=3).map(
    lambda steps: curve(*(sum(sorted(steps)[: i + 1]) for i in range(3)))
)


@given(CONVEX, CONVEX, st.integers(0, 6), st.integers(0, 6))
def test_no_other_share_does_less_damage(a: Curve, b: Curve, of_a: int, of_b: int) -> None:
    """Against any other way to remove as many weights, at the points of the curves."""
    of_a, of_b = min(of_a, 3), min(of_b, 3)
    sites = (site("a"), site("b"))
    found = Known({"a": a, "b": b}).least_damage(sites, 0.3 * (of_a + of_b) / 2)

    def damage(curve: Curve, sparsity: float) -> float:
        corners, done, hurt = [], 0.0, 0.0
        for d, n in curve.slopes(100):
            done, hurt = done + n, hurt + d * n
            corners.append((done, hurt))
        return hull_at(corners, 100 * sparsity)

    other = damage(a, 0.3 * of_a) + damage(b, 0.3 * of_b)
    assert damage(a, found["a"]) + damage(b, found["b"]) <= other + 1e-6


# The scan


def two_layers() -> Net:
    torch.manual_seed(0)
    return Net(lambda n, x: n.b(n.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 3))


X = torch.linspace(-1, 1, 60).reshape(10, 6)


def norm_of(name: str) -> Callable[[nn.Module], float]:
    """A loss that only one parameter has a part in: the share of its squares that is gone."""
    whole = float(two_layers().get_parameter(name).detach().square().sum())

    def loss(model: nn.Module) -> float:
        return 1 - float(model.get_parameter(name).detach().square().sum()) / whole

    return loss


def test_a_scan_prunes_by_magnitude_and_only_this_site() -> None:
    net = two_layers()
    sites = {s.name: s for s in traced(net, X).sites}
    statistics = Statistics(net, norm_of("a.weight"))
    squares = net.a.weight.detach().flatten().square().sort().values.double()
    found = statistics.sensitivity(sites["a.weight"])
    assert found.sparsities == SPARSITIES
    assert found.baseline == pytest.approx(0.0, abs=1e-6)
    gone = [float(squares[: round(48 * s)].sum() / squares.sum()) for s in SPARSITIES]
    assert found.losses == pytest.approx(gone, abs=1e-6)
    assert statistics.sensitivity(sites["b.weight"]).losses == pytest.approx(
        [0.0] * len(SPARSITIES), abs=1e-6
    )
    only_b = statistics.least_damage(tuple(sites.values()), 0.3)
    assert only_b["b.weight"] > 0.8
    assert only_b["a.weight"] == pytest.approx((0.3 * 72 - 24 * only_b["b.weight"]) / 48)


def test_a_scan_is_made_once() -> None:
    calls: list[nn.Module] = []
    statistics = Statistics(two_layers(), lambda model: float(len(calls.append(model) or calls)))
    found = [s for s in traced(two_layers(), X).sites if s.name == "a.weight"]
    assert calls == []
    first = statistics.sensitivity(found[0])
    assert len(calls) == 1 + len(SPARSITIES)
    assert statistics.sensitivity(found[0]) is first
    assert len(calls) == 1 + len(SPARSITIES)


def test_the_model_stays_untouched() -> None:
    net = two_layers().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    seen: list[nn.Module] = []
    statistics = Statistics(net, lambda model: float(len(seen.append(model) or seen)))
    statistics.least_damage(traced(net, X).sites, 0.5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert net.training
    assert net not in seen


@pytest.mark.parametrize("layer", ["lstm", "channels last", "tied"])
def test_a_scan_reaches_the_weights_that_the_forward_uses(layer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    if layer == "lstm":
        net, x = Net(lambda n, x: n.a(x)[0], a=nn.LSTM(4, 5, batch_first=True)), x[:, 0]
    elif layer == "tied":
        net = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(4, 4, bias=False), b=nn.Linear(4, 4))
        net.b.weight = net.a.weight
    else:
        net = Net(lambda n, x: n.a(x), a=nn.Conv2d(3, 4, 3))
        net = net.to(memory_format=torch.channels_last)
    wanted = net(x).detach()

    def loss(model: nn.Module) -> float:
        return float((model(x).detach() - wanted).square().mean())

    found = Statistics(net, loss).sensitivity(traced(net, x).sites[0])
    assert found.baseline == 0.0
    assert found.losses[-1] > found.losses[0] > 0


def test_a_scan_of_a_network_that_carries_forms() -> None:
    net = two_layers()
    found = traced(net, X)
    ShareValues(bits=2).apply(net, found.site("a.weight"))
    statistics = Statistics(net, norm_of("a.weight"))
    assert statistics.sensitivity(found.site("a.weight")).losses[-1] > 0.9
    assert len(net.a.weight.unique()) <= 4


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    net = two_layers()
    count = 0

    def loss(model: nn.Module) -> float:
        nonlocal count
        count += 1
        return math.nan if count > len(SPARSITIES) - 1 else float(count)

    found = Statistics(net, loss).sensitivity(traced(net, X).site("a.weight"))
    assert found.losses[-2:] == (math.inf, math.inf)
    assert found.slopes(100)[-1][0] == math.inf


# Without data


def test_without_data_a_scan_refuses() -> None:
    net = two_layers()
    statistics = Statistics(net)
    sites = traced(net, X).sites
    with pytest.raises(TaskError, match=r"needs a task with data, got none; without data choose"):
        statistics.sensitivity(sites[0])
    with pytest.raises(TaskError, match="sensitivity scan"):
        PruneWeights(scope="sensitivity").localise(net, sites, statistics)
    with pytest.raises(TaskError, match="search for what to keep needs a task with data, got none"):
        PruneWeights(scope="evolution").localise(net, sites, statistics)
    local = PruneWeights(sparsity=0.5, scope="layer").localise(net, sites, statistics)
    assert set(local) == {"a.weight", "b.weight"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_whose_loss_is_no_number(value: float) -> None:
    net = two_layers()
    with pytest.raises(TaskError, match=rf"loss on the training data is {value}, not a number"):
        Statistics(net, lambda model: value).sensitivity(traced(net, X).sites[0])


def test_scans_take_no_gradients() -> None:
    net = two_layers()

    def loss(model: nn.Module) -> float:
        out: Tensor = model(X)
        assert not out.requires_grad
        return float(out.square().mean())

    Statistics(net, loss).sensitivity(traced(net, X).sites[0])


# What a layer reads


def images(*shapes: tuple[int, ...]) -> Statistics:
    """Of a convolution after a ReLU, shown a batch of each shape."""
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 3, 3))
    batches = [
        torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)
    ]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(sum(model(b).square().mean() for b in batches))

    return Statistics(net, loss)


CONV = Site(name="1.weight", kind="conv", shape=(3, 2, 3, 3), macs=0)


def test_inputs_are_what_the_layer_reads_first() -> None:
    statistics = images((4, 2, 6, 6), (2, 2, 6, 6))
    found = statistics.inputs(CONV)
    assert found.shape == (6, 2, 6, 6)
    first = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found[:4], first.relu())
    assert len(statistics.inputs(CONV, most=200)) == 4  # the first batch holds 288 numbers


def test_inputs_are_those_of_the_model_as_it_is_now() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    statistics = Statistics(net, lambda model: float(model(x).detach().sum()))
    site = Site(name="1.weight", kind="linear", shape=(2, 4), macs=0)
    before = statistics.inputs(site)
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[0].bias.zero_()
    assert torch.equal(statistics.inputs(site), net[0](x).detach())
    assert not torch.equal(statistics.inputs(site), before)


def test_inputs_of_several_lengths_are_rows_and_no_more_are_read_than_asked_for() -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 4))
    batches = [torch.randn(2, steps, 3) for steps in (5, 7, 6)]
    read = []

    def loss(model: nn.Module) -> float:
        for batch in batches:
            read.append(len(batch[0]))
            model(batch)
        return 0.0

    site = Site(name="1.weight", kind="linear", shape=(4, 3), macs=0)
    found = Statistics(net, loss).inputs(site)
    assert torch.equal(found, torch.cat([b.reshape(-1, 3) for b in batches]))
    assert read == [5, 7, 6]
    assert len(Statistics(net, loss).inputs(site, most=60)) == 24
    assert read == [5, 7, 6, 5, 7]


def test_inputs_that_tell_nothing_are_refused() -> None:
    with pytest.raises(TaskError, match="come in several shapes; leave it out by only='!1'"):
        images((4, 2, 6, 6), (4, 2, 7, 7)).inputs(CONV)
    with pytest.raises(TaskError, match="the calibration data do not reach it"):
        images().inputs(CONV)
    with pytest.raises(TaskError, match=r"what the layer of site '1\.weight' reads needs a task"):
        Statistics(nn.Identity()).inputs(CONV)
    net = nn.Sequential(nn.Identity(), nn.Conv2d(2, 3, 3))
    for value, message in (
        (3.0, "are all 3 in the calibration data"),
        (torch.nan, "are not all numbers"),
    ):
        x = torch.full((1, 2, 4, 4), value)
        with pytest.raises(TaskError, match=f"the inputs of layer '1' {message}"):
            Statistics(net, lambda model, x=x: float(model(x).detach().sum())).inputs(CONV)
