"""Networks whose convolutions are swapped: fitted in order, stored, replayed, or left whole."""

import functools
import math
import re
import sys

import pytest
import torch
from conftest import _digits
from torch import nn
from torch.nn import functional as F

import taut
from taut import edits
from taut.conv_fits import lost, met
from taut.conv_swaps import KINDS, Swap
from taut.data import Batches
from taut.errors import RecipeError, TaskError
from taut.modules import clone
from taut.pack import load, pack
from taut.statistics import Statistics
from taut.techniques import SwapConvs, swap_convs


def conv_net():
    """Three convolutions of 5 × 5 and a layer, for digits of 8 × 8."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(),
        nn.Conv2d(12, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def image_task(**changes):
    x, y = _digits()
    x = x.reshape(-1, 1, 8, 8)
    options = {
        "train": Batches(x[:600], y[:600], 50, shuffle=True),
        "test": Batches(x[1200:], y[1200:], 597), "name": "images",
    }  # fmt: skip
    return taut.Task(**{**options, **changes})


@functools.cache
def _state():
    torch.manual_seed(0)
    net = conv_net()
    taut.recover(net, image_task(), taut.Recover(epochs=4, learning_rate=5e-3, distill=0.0))
    return net.state_dict()


@pytest.fixture
def net():
    made = conv_net()
    made.load_state_dict(_state())
    return made.eval()


@pytest.fixture
def images():
    return image_task()


WORTH = {"separable": 0.5, "grouped": 0.5, "fire": 0.35, "stacked": 0.5, "asymmetric": 0.8,
         "parallel": 0.35}  # fmt: skip
"""The share of its accuracy that the network keeps at least, without any training."""


@pytest.mark.parametrize("to", KINDS)
def test_least_squares_alone_keep_much_of_what_the_network_knows(net, images, to):
    made = taut.apply(
        clone(net), SwapConvs(to=to, block_steps=0, tolerance=1, width=0.4, only="!0"), images
    )
    assert [(e.layer, e.to) for e in edits.of(made)] == [("2", to), ("5", to)]
    assert sum(p.numel() for p in made.parameters()) < sum(p.numel() for p in net.parameters())
    score, was = images.evaluate(made), images.evaluate(net)
    assert was > 0.93
    assert score > WORTH[to] * was
    assert not made.training


def test_a_block_that_was_trained_misses_less(net, images, caplog):
    caplog.set_level("INFO", "taut")
    taut.apply(clone(net), SwapConvs(only="2", tolerance=1, block_steps=100), images)
    ((after, before),) = re.findall(r"missing ([\d.]+) % of .* \(([\d.]+) % before", caplog.text)
    assert 0 < float(after) < 0.99 * float(before)


def test_each_block_learns_from_what_it_will_read(net, caplog):
    """The second block's inputs come from the network with the first one swapped."""
    caplog.set_level("INFO", "taut")
    x, y = _digits()
    whole = [(x[:600].reshape(-1, 1, 8, 8), y[:600])]
    task = taut.Task(train=whole, test=whole)
    made = taut.apply(clone(net), SwapConvs(only="!0", block_steps=20, tolerance=1), task).eval()
    run = task.calibration_loss()
    target = met(lambda: run(net), net[5])[1]
    read = met(lambda: run(made), made[5])[0]
    told = re.findall(r"5 becomes separable: .* missing ([\d.]+) %", caplog.text)
    assert 100 * lost(made[5], read, target) == pytest.approx(float(told[0]), abs=0.06)


@pytest.mark.parametrize("to", KINDS)
def test_it_is_stored_and_replayed(net, images, to, tmp_path):
    step = SwapConvs(to=to, block_steps=2, tolerance=1, width=0.4, only="!0")
    made, x = taut.apply(clone(net), step, images).eval(), _pictures()[:50]
    pack(made, tmp_path / "net.taut", "float32")
    loaded = load(tmp_path / "net.taut", conv_net())
    assert edits.of(loaded) == edits.of(made)
    assert len(edits.of(made)) == 2
    torch.testing.assert_close(loaded(x), made(x))


def test_a_whole_run_goes_on_where_it_was_cut_off(net, images, tmp_path, monkeypatch):
    recipe = "swap_convs(block_steps=5, tolerance=1, only='!0') > recover(epochs=1) > quantize()"
    whole = taut.compress(net, images, recipe, folder=tmp_path / "whole")
    assert whole.measurement.macs < 0.5 * whole.original.macs
    assert whole.measurement.score > 0.8
    assert taut.inspect(whole.folder / "net.taut").edits == ("swap", "swap")
    module = sys.modules["taut.trial"]
    monkeypatch.setattr(module, "recover", _stopped)
    with pytest.raises(KeyboardInterrupt):
        taut.compress(net, images, recipe, folder=tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(SwapConvs, "reshape", _stopped)  # it was done
    again = taut.compress(net, images, recipe, folder=tmp_path / "cut")
    files = [(r.folder / "net.taut").read_bytes() for r in (whole, again)]
    assert files[0] == files[1]


def _stopped(*args, **kwargs):
    raise KeyboardInterrupt


def test_same_data_same_bytes(net, images):
    states = []
    for seed in (1, 2):
        task = image_task(train=Batches(*(t[:300] for t in (_pictures(), _digits()[1])), 50))
        torch.manual_seed(seed)
        step = SwapConvs(to="stacked", block_steps=5, tolerance=1)
        states.append(taut.apply(clone(net), step, task).state_dict())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def _pictures():
    return _digits()[0].reshape(-1, 1, 8, 8)


# ---- what stays as it is --------------------------------------------------------------------


class Mixed(nn.Module):
    """What cannot be swapped, beside what can."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.point = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 16, 3, padding=1)
        self.other = nn.Conv2d(16, 16, 3, padding=1)
        self.other.weight = self.one.weight
        self.plain = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.point(F.relu(self.grouped(F.relu(self.first(x))))))
        x = F.relu(self.plain(F.relu(self.other(F.relu(self.one(F.relu(self.up(x))))))))
        return self.last(x.mean((2, 3)))


def test_what_cannot_be_swapped_stays_and_is_named(images, caplog):
    caplog.set_level("INFO", "taut")
    net = Mixed().eval()
    made = taut.apply(clone(net), SwapConvs(block_steps=0, tolerance=1, only="!first"), images)
    assert [e.layer for e in edits.of(made)] == ["plain"]
    for told in (
        "grouped stays as it is: its channels come in groups",
        "point stays as it is: its kernel is 1 × 1, a mix of channels alone",
        "up stays as it is: it is a ConvTranspose2d",
        "one stays as it is: its weight is other.weight too",
        "plain becomes separable: 448 numbers of 2320",
    ):
        assert f"swap_convs: {told}" in caplog.text, told
    assert made.one.weight is made.other.weight


def test_more_products_are_refused_though_the_numbers_are_fewer(images, caplog):
    caplog.set_level("INFO", "taut")
    net = nn.Sequential(
        nn.Conv2d(1, 4, 5, 4, padding=2), nn.ReLU(), nn.Conv2d(4, 12, 5, 2, padding=2),
        nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip
    told = r"no convolution of only='2' gets smaller by swap_convs\(only='2', to='stacked'\)"
    with pytest.raises(RecipeError, match=told):
        taut.apply(net, SwapConvs(to="stacked", only="2"), images)
    assert re.search(r"2 stays as it is: it would take [\d,]+ MACs, and takes 1,200", caplog.text)
    assert isinstance(net[2], nn.Conv2d)


def test_tolerance_decides_which_blocks_stay(net, images, caplog):
    caplog.set_level("INFO", "taut")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(
        RecipeError,
        match=r"0: it would miss .*raise tolerance or multiplier, or choose another kind",
    ):
        taut.apply(net, SwapConvs(block_steps=0, tolerance=0.01), images)
    assert re.search(
        r"stays as it is: it would miss [\d.]+% of its .*\(tolerance=0.01\)", caplog.text
    )
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not edits.of(net)


@pytest.mark.parametrize("tolerance", [0.8, 0.15])
@pytest.mark.parametrize("to", KINDS)
def test_an_outline_swaps_the_same_blocks_and_trains_none(net, images, to, tolerance, monkeypatch):
    step = SwapConvs(to=to, tolerance=tolerance, block_steps=100)
    traced = taut.trace(net, images.example())
    statistics = Statistics(net, images.calibration_loss(), traced)

    def done(change):
        try:
            return edits.of(change(clone(net), traced, statistics))
        except RecipeError:
            return "refused"

    whole = done(step.reshape)
    monkeypatch.setattr(swap_convs, "train", lambda *_: 1 / 0)
    assert done(step.outline) == whole


def test_more_filters_for_each_channel_miss_less(net, images):
    errors = []
    for multiplier in (1, 2, 3):
        step = SwapConvs(
            multiplier=multiplier, between="nothing", block_steps=0, tolerance=1, only="2"
        )
        made = taut.apply(clone(net), step, images)
        run = image_task().calibration_loss()
        target = met(lambda run=run: run(net), net[2])
        errors.append(lost(made[2], *target))
        assert made[2][0].weight.shape == (12 * multiplier, 1, 5, 5)
    assert errors[0] > 1.2 * errors[1] > 1.4 * errors[2]


@pytest.mark.parametrize(
    ("step", "width"),
    [
        (SwapConvs(to="grouped", groups=4), 4),
        (SwapConvs(to="fire", width=0.25), 4),
        (SwapConvs(to="fire", width=1), 12),
        (SwapConvs(to="stacked"), 14),
        (SwapConvs(to="asymmetric", width=0.5), 7),
        (SwapConvs(to="asymmetric", width=4), 55),
        (SwapConvs(to="parallel"), 1),
    ],
    ids=str,
)
def test_widths_follow_from_the_options(net, images, step, width):
    planned, _ = step._planned(net, taut.trace(net, images.example()))
    if step.width != 4:
        assert planned["2"].width == width
    else:
        assert "2" not in planned  # it would not be smaller
    local = step.predict(taut.trace(net, images.example()).site("2.weight"))
    assert 0 < local.size_bytes <= 2 * 4800
    if "2" in planned:
        made = planned["2"].made(net[2])
        assert local.size_bytes == 2 * sum(t.numel() for t in (*made.parameters(), *made.buffers()))


class ByHand(nn.Module):
    """It multiplies by the convolution's weight itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 5, padding=2)
        self.free = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Linear(16, 10)

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight) + self.conv(x).mean((2, 3), keepdim=True)
        return self.last(self.free(x).mean((2, 3)))


def test_a_layer_that_the_network_needs_whole_is_named_and_nothing_changed(images):
    net = ByHand()
    told = r"swap_convs: .* needs layer 'conv' whole \(.*no attribute 'weight'\); .* only='!conv'"
    with pytest.raises(RecipeError, match=told):
        taut.apply(net, SwapConvs(tolerance=1), images)
    assert isinstance(net.conv, nn.Conv2d)
    assert isinstance(net.free, nn.Conv2d)


def test_weights_that_are_no_numbers_are_refused(net, images):
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"swap_convs: site '2.weight' holds NaN or infinite"):
        taut.apply(net, SwapConvs(), images)
    assert not edits.of(net)


def test_inputs_that_are_no_numbers_are_refused(net):
    x = _pictures()[:20].clone()
    x[3] = math.inf
    task = taut.Task(train=[(x, _digits()[1][:20])], test=[(x, _digits()[1][:20])])
    with pytest.raises(RecipeError, match=r"what layer '2' reads or gives is not finite .*'!2'"):
        taut.apply(net, SwapConvs(only="!0"), task)


def test_without_data_it_says_so(net, images):
    traced = taut.trace(net, images.example())
    with pytest.raises(TaskError, match="a search for what to keep needs a task with data"):
        SwapConvs().reshape(net, traced, Statistics(net))


def test_options():
    with pytest.raises(RecipeError, match="to has no choice 'seperable'; did you mean 'separable'"):
        SwapConvs(to="seperable")
    with pytest.raises(RecipeError, match=r"groups must lie in \[2, 1024\], got 1"):
        SwapConvs(groups=1)
    assert str(SwapConvs(to="fire", width=0.25)) == "swap_convs(to='fire', width=0.25)"


# ---- other networks -------------------------------------------------------------------------


def test_a_network_that_is_one_layer():
    net, x = nn.Conv2d(6, 10, 3, padding=1), torch.randn(30, 6, 6, 6)
    task = taut.Task(train=[(x, x)], test=[(x, x)], loss=lambda y, _: y.mean(), score=_mean)
    made = taut.apply(net, SwapConvs(to="grouped", tolerance=1), task)
    assert edits.of(made) == (Swap(layer="", to="grouped", width=2, between="norm"),)
    assert made(x).shape == (30, 10, 6, 6)


def _mean(output, target):
    return float(output.mean())


def test_half_precision_stays_what_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 5, padding=2), nn.Flatten(), nn.Linear(160, 4)).bfloat16()
    x, y = torch.randn(64, 8, 20).bfloat16(), torch.arange(64) % 4
    task = taut.Task(train=[(x, y)], test=[(x, y)])
    made = taut.apply(net, SwapConvs(tolerance=1), task)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert made(x).dtype == torch.bfloat16


def test_hooks_stay_on_the_whole(images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1),
        nn.Flatten(), nn.Linear(768, 10),
    )  # fmt: skip
    x, step = torch.rand(2, 12, 8, 8), SwapConvs(only="2", block_steps=0, tolerance=1)
    both = taut.apply(clone(net), "add_shortcuts(only='2')", images)
    made = taut.apply(both, step, images).eval()
    torch.testing.assert_close(made[2](x), nn.Sequential(*made[2])(x) + x)
