"""A step that would make a site larger leaves it as it is, says so, and the report shows it."""

import dataclasses
import logging

import pytest
import runs
import torch
from nets import traced
from torch import nn

import taut
from taut.errors import RecipeError
from taut.growth import growth
from taut.modules import parametrized_names
from taut.pack import inspect, pack
from taut.plan import forecast
from taut.recipe import Recipe
from taut.report import render
from taut.report_data import report_data
from taut.statistics import Statistics
from taut.techniques import PruneWeights, ShareValues, StructuredMatrix
from taut.types import Candidate, LeftAlone, Site

SMALL = Site(name="conv1.weight", kind="conv", shape=(4, 4, 3, 3), macs=0)
LARGE = Site(name="conv2.weight", kind="conv", shape=(64, 64, 3, 3), macs=0)


def test_a_table_larger_than_its_weights_would_make_a_site_grow():
    grown = growth(ShareValues(bits=8), [], SMALL)
    assert grown == LeftAlone(
        step="share_values", site="conv1.weight", before_bytes=288,
        after_bytes=288 + 123,  # 144 entries of two bytes, as many indices of 6.8 bits
    )  # fmt: skip
    assert str(grown) == (
        "share_values: conv1.weight would grow from 288 to 411 bytes; left as it is"
    )
    assert growth(ShareValues(bits=8), [], LARGE) is None
    assert growth(ShareValues(bits=4), [], SMALL) is None


def test_what_the_site_carries_already_is_what_counts():
    mask = PruneWeights(sparsity=0.9)
    few = dataclasses.replace(LARGE, shape=(16, 16, 3, 3))
    assert growth(ShareValues(bits=8), [], few) is None
    grown = growth(ShareValues(bits=8), [mask], few)
    assert grown is not None
    assert grown.before_bytes < 16 * 16 * 9 * 2 / 4
    blocks = StructuredMatrix(block=16)
    assert growth(ShareValues(bits=8), [blocks], few) is not None
    again = growth(ShareValues(bits=8), [mask, ShareValues(bits=2)], few)
    assert again == grown  # it would take the other's place


def test_the_prediction_is_true(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    plain = pack(net, tmp_path / "plain.taut")
    ShareValues(bits=8).apply(net, traced(net, torch.zeros(1, 4, 5, 5)).sites[0])
    assert pack(net, tmp_path / "shared.taut") > plain


def small_task():
    return taut.Task(**runs.digits(), name="digits")


def test_apply_leaves_such_a_site_alone_and_says_so(caplog):
    net = runs.network()
    with caplog.at_level(logging.INFO, "taut"):
        taut.apply(net, ShareValues(bits=8), small_task())
    assert parametrized_names(net) == ["0.weight"]
    assert "share_values: 2.weight would grow from 640 to 816 bytes; left as it is" in caplog.text


def test_the_forecast_does_as_apply_does():
    net = runs.network()
    trace = traced(net, torch.zeros(1, 64))
    statistics = Statistics(net)
    both, one = (
        forecast(Recipe.parse(f"share_values(bits=8{only})"), trace, net, statistics).size_bytes
        for only in ("", ", only='0.weight'")
    )
    assert both == one


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    recipe = "share_values(bits=8) > recover(epochs=1)"
    folder = tmp_path_factory.mktemp("run")
    return taut.compress(runs.network(), small_task(), recipe, folder=folder)


def test_the_run_and_its_report_show_it(result):
    left = LeftAlone(step="share_values", site="2.weight", before_bytes=640, after_bytes=816)
    assert result.candidate.left == (left,)
    assert Candidate.from_json(result.candidate.to_json()) == result.candidate
    stored = {t.names[0]: t.format for t in inspect(result.candidate.path).tensors}
    assert (stored["0.weight"], stored["2.weight"]) == ("shared_values.v1", "plain.v1")
    assert str(left) in (result.folder / "log.txt").read_text()
    data = report_data(result, runs.network())
    assert {t.names[0]: t.left for t in data.tensors if t.left} == {"2.weight": (left,)}
    assert "share_values left it as it is: 640 bytes would be 816" in render(data)


class Killing(taut.Watch):
    """Stops the run in its first epoch."""

    def on_epoch(self, record):
        raise KeyboardInterrupt


def test_a_run_that_was_killed_remembers_it(tmp_path, result):
    recipe = "share_values(bits=8) > recover(epochs=2)"
    with pytest.raises(KeyboardInterrupt):
        taut.compress(runs.network(), small_task(), recipe, folder=tmp_path, watch=Killing())
    resumed = taut.compress(runs.network(), small_task(), recipe, folder=tmp_path)
    assert resumed.candidate.left == result.candidate.left


def test_what_cannot_be_is_refused_before_its_bytes_are_predicted(task):
    net = nn.Sequential(nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 10))
    with pytest.raises(RecipeError, match=r"got 8 for the 5 of site '2\.weight'"):
        taut.apply(net, StructuredMatrix(block=8), task)
    assert not parametrized_names(net)
    whole = taut.trace(net, task.example())
    taut.apply(net, PruneWeights(sparsity=0.5, only="2"), task, traced=whole)
    with pytest.raises(RecipeError, match="got 8 for the 5 of site"):
        taut.apply(net, StructuredMatrix(block=8, structure="toeplitz"), task, traced=whole)
    assert parametrized_names(net) == ["2.weight"]
