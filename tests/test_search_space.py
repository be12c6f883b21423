"""What a search may try is read from the techniques, also from one that nobody knows."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import digits_task, small_net
from torch import nn

import taut
from taut.errors import RecipeError, SearchError
from taut.goal import Goal
from taut.measure import measure
from taut.recipe import Recipe
from taut.reshaping import Reshaping
from taut.search.outlook import Outlook, in_turn
from taut.search.space import Fixed, Knob, aim_knob, strength
from taut.technique import STEPS, register_step, techniques
from taut.techniques import ShareValues
from taut.trial import Ground, Trial
from taut.types import Measurement, Site
from taut.watch import Watch

SITE = Site(name="fc.weight", kind="linear", shape=(64, 32), macs=2048)


def made(goal="bytes<=15%", **options):
    return outlook_of(small_net().eval(), digits_task(), goal), options


def outlook_of(net, task, goal):
    traced = taut.trace(net, task.example())
    original = measure(net, task, traced, seconds=0.01, score=0.9)
    ground = Ground(
        model=net, task=task, trace=traced, folder=Path(), seed=0, precision="auto", watch=Watch()
    )
    return Outlook(ground, original, Goal.parse(goal))


@pytest.mark.parametrize(
    ("name", "option", "scale"),
    [
        ("prune_weights", "sparsity", "logit"),
        ("share_values", "bits", "whole"),
        ("quantize", "bits", "whole"),
        ("hash_weights", "ratio", "logit"),
        ("factor_weights", "ratio", "log"),  # energy comes first, but moves nothing
        ("learned_levels", "bits", "whole"),
        ("structured_matrix", "block", "whole"),
        ("low_rank", "energy", "logit"),
        ("prune_channels", "ratio", "logit"),
        ("binarize", "weights", "words"),
    ],
)
def test_the_strength_of_a_technique_is_found(name, option, scale):
    knob = strength(techniques()[name], SITE)
    assert knob is not None
    assert (knob.option, knob.scale) == (option, scale)


@pytest.mark.parametrize("name", ["student", "add_shortcuts", "fold_norms"])
def test_what_has_no_strength_has_none(name):
    assert strength(techniques()[name], SITE) is None


@pytest.mark.parametrize("name", sorted(techniques()))
def test_every_value_of_a_strength_makes_the_technique(name):
    knob = strength(techniques()[name], SITE)
    for sample in knob.spread(5) if knob else []:
        value = sample if knob.scale == "words" else knob.value(sample)
        assert getattr(techniques()[name](**{knob.option: value}), knob.option) == value


def test_sparsities_crowd_near_one_and_shares_near_zero():
    sparsity = strength(techniques()["prune_weights"], SITE)
    values = [sparsity.value(s) for s in sparsity.spread(5)]
    assert values == sorted(values)
    assert values[-1] > 0.99
    assert sum(v > 0.8 for v in values) >= 3
    ratio = strength(techniques()["hash_weights"], SITE)
    assert ratio.value(ratio.spread(5)[0]) < 0.01
    assert Knob(step="", option="", scale="logit", low=-1, high=5).value(2.2) == 0.9002


def test_a_spread_goes_from_end_to_end():
    knob = Knob(step="a", option="b", scale="log", low=1.0, high=100.0)
    assert knob.spread(3) == pytest.approx([1, 10, 100])
    assert knob.spread(1) == pytest.approx([10])
    assert Knob(step="a", option="b", scale="whole", low=1, high=8).spread(3) == [1, 4, 8]
    assert Knob(step="a", option="b", scale="words", words=("x", "y")).spread(3) == ["x", "y"]


def test_a_knob_is_narrowed_to_what_goes():
    knob = Knob(step="a", option="b", scale="whole", low=2, high=4096)
    asked = []
    narrow = knob.narrowed(lambda v: asked.append(v) or v <= 36)
    assert narrow.low == 2
    assert 18 < narrow.high <= 36
    assert asked[:2] == [2, 4096]
    assert knob.narrowed(lambda v: True) is knob
    assert knob.narrowed(lambda v: False) is knob  # its row says why
    words = Knob(step="a", option="b", scale="words", words=("x", "y"))
    assert words.narrowed(lambda v: v == "y").words == ("y",)


def test_a_strength_goes_on_every_site_of_the_network():
    outlook, _ = made()
    space = outlook.space("structured_matrix")
    inputs = [s.numel // s.shape[0] for s in outlook.trace.sites]
    assert space.knobs["structured_matrix"].high <= min(inputs) < 4096


def test_aims_stay_within_the_bound():
    knob = aim_knob(100_000, bound=3000.0)
    assert (knob.low, knob.high) == (200, 2910)
    assert aim_knob(100_000).high == 40_000
    assert aim_knob(100_000, bound=100.0).low < aim_knob(100_000, bound=100.0).high


def test_the_space_has_what_works_here_and_says_what_does_not():
    outlook, _ = made()
    space = outlook.space("*, !student")
    assert space.reshape[0] == "nothing"
    assert {"low_rank", "prune_channels"} <= set(space.reshape)
    assert {"prune_weights", "share_values", "code_length"} <= set(space.recode)
    assert "prune_weights > share_values" in space.recode
    assert "share_values > quantize" not in space.recode  # a table is no use to quantize
    assert "code_length" in space.aims
    assert "quantize > binarize" in {**outlook.refused, **dict.fromkeys(space.recode)} or all(
        r != "quantize > binarize" for r in space.recode
    )


def test_a_recipe_is_made_of_what_was_suggested():
    space = made()[0].space("prune_weights, share_values, code_length")
    logit = space.knobs["prune_weights"].name
    values = {"reshape": "nothing", "recode": "prune_weights > share_values",
              logit: math.log(9), "share_values.bits": 4}  # fmt: skip
    text = "prune_weights() > recover(epochs=2) > share_values(bits=4) > recover(epochs=4)"
    assert str(space.suggest(Fixed(values), 6)) == text
    assert "recover(epochs=2) > share" not in str(space.suggest(Fixed(values), 2))
    coded = {"reshape": "nothing", "recode": "code_length", "aim.size_bytes": 1234.0}
    assert str(space.suggest(Fixed(coded), 2)) == (
        "code_length() > aim(size_bytes=1230) > recover(epochs=2)"
    )


def test_every_point_of_the_grid_is_a_recipe():
    space = made()[0].space("prune_weights, share_values, code_length")
    recipes = {str(space.suggest(Fixed(values), 3)) for values in space.grid(2)}
    assert len(recipes) == len(list(space.grid(2))) >= 8
    assert all(str(Recipe.parse(r)) == r for r in recipes)


def test_predictions_rule_out_what_is_hopeless():
    outlook, _ = made("bytes<=3%, macs<=50%")
    weak = Recipe.parse("share_values(bits=8) > recover()")
    excess = outlook.excess(weak)
    assert excess["bytes"] > 1
    assert "bytes predicted at" in outlook.rules_out(excess)
    assert "macs predicted at" in outlook.rules_out(excess)
    fits = outlook.excess(Recipe.parse("prune_weights(sparsity=0.98) > share_values(bits=3)"))
    assert not outlook.rules_out(fits)
    aimed = outlook.excess(Recipe.parse("code_length() > aim(size_bytes=500) > recover()"))
    assert aimed["bytes"] == 0.0


def test_reshaped_networks_are_predicted_as_reshaped():
    outlook, _ = made()
    whole = outlook.forecast(Recipe.parse("share_values(bits=4)"))
    half = outlook.forecast(Recipe.parse("prune_channels(ratio=0.5) > share_values(bits=4)"))
    assert half.size_bytes < 0.7 * whole.size_bytes
    assert half.macs < 0.7 * whole.macs


def test_what_fits_but_cannot_be_is_ruled_out():
    outlook, _ = made("bytes<=10%")
    fits = "prune_weights(sparsity=0.98) > recover()"
    assert outlook.excess(Recipe.parse(fits)) == {"bytes": 0.0}
    assert outlook.excess(Recipe.parse(f"low_rank(energy=0.9) > {fits}")) == {"bytes": 0.0}
    with pytest.raises(RecipeError, match=r"no layer .* gets smaller"):
        outlook.excess(Recipe.parse(f"low_rank(energy=1) > {fits}"))
    with pytest.raises(RecipeError, match="block must be at most the inputs"):
        outlook.excess(
            Recipe.parse("low_rank(rank='ratio', ratio=0.1) > structured_matrix(block=8)")
        )


def test_a_search_starts_by_the_mildest_of_each_mix_that_keeps_the_bounds():
    outlook, _ = made("bytes<=10%, score>=-1%")
    space = outlook.space("prune_weights, share_values, code_length")
    starts = outlook.starts(space)
    assert [s["recode"] for s in starts] == list(space.recode)
    for start in starts:
        recipe = space.suggest(Fixed(start), 2)
        assert not any(outlook.excess(recipe).values())
        if start["recode"] == "prune_weights":
            (prune,) = (s for s in recipe.steps if s.name == "prune_weights")
            milder = Recipe.parse(f"prune_weights(sparsity={prune.sparsity - 0.02})")
            assert outlook.excess(milder)["bytes"] > 0
        if start["recode"] == "code_length":
            assert 0.9 < start["aim.size_bytes"] / (0.1 * outlook.original.size_bytes) < 1


def test_a_search_starts_by_what_reshapes_too_at_the_mildest_of_a_few_strengths():
    outlook, _ = made("bytes<=10%, score>=-1%")
    space = outlook.space("low_rank, prune_weights, share_values")
    starts = outlook.reshaped_starts(space)
    assert starts
    assert {s["reshape"] for s in starts} == {"low_rank"}
    assert len({s["recode"] for s in starts}) == len(starts)
    low_rank, recoded = space.knobs["low_rank"], set()
    for start in starts:
        assert not any(outlook.excess(space.suggest(Fixed(start), 2)).values())
        share = 1 - low_rank.share(start[low_rank.name])  # a low energy is the stronger
        assert any(share == pytest.approx(s) for s in (0.25, 0.5, 0.75))
        if share > 0.3:
            names = start["recode"].split(" > ")
            recoded.update(names)
            knobs = [low_rank, *(space.knobs[n] for n in names)]
            up = [outlook.rises(space, n) for n in ("low_rank", *names)]
            milder = {
                **start,
                **{k.name: k.at(share - 0.25 if u else 1.25 - share)
                   for k, u in zip(knobs, up, strict=True)},
            }  # fmt: skip
            assert outlook.forecast(space.suggest(Fixed(milder), 2)).size_bytes > (
                0.1 * outlook.original.size_bytes
            )
    assert recoded


def test_what_a_search_starts_by_is_not_reshaped_again(monkeypatch):
    outlook, _ = made("bytes<=10%, score>=-1%")
    space = outlook.space("low_rank, prune_weights, share_values")
    asked, outline = [], techniques()["low_rank"].outline
    monkeypatch.setattr(
        techniques()["low_rank"], "outline", lambda *a: asked.append(a) or outline(*a)
    )
    starts = outlook.reshaped_starts(space)
    assert len(asked) == 1  # at the default `space` did
    recipes = [space.suggest(Fixed(start), 5) for start in starts]
    told = [outlook.forecast(recipe) for recipe in recipes]
    assert len(asked) == 1
    assert any(s.energy == 0.9 for r in recipes for s in r.steps if s.name == "low_rank")
    for recipe, found in zip(recipes, told, strict=True):
        fresh = Outlook(outlook.ground, outlook.original, outlook.goal).forecast(recipe)
        assert found.size_bytes == fresh.size_bytes


def test_what_is_known_of_a_recipe_does_not_let_another_pass():
    outlook, _ = made()
    goes = (
        "low_rank(energy=0.8) > prune_weights(sparsity=0.9) > schedule() > recover(epochs=2) > "
        "share_values(bits=4) > recover(epochs=2)"
    )
    late = (
        "low_rank(energy=0.8) > prune_weights(sparsity=0.9) > schedule() > share_values(bits=4) > "
        "recover(epochs=4)"
    )
    ground = outlook._reshaped(Recipe.parse("low_rank(energy=0.8)").steps)
    assert outlook._noted(Recipe.parse(goes), ground) == outlook.forecast(Recipe.parse(goes))
    with pytest.raises(RecipeError, match="mask"):
        outlook.forecast(Recipe.parse(late))


def test_a_strength_whose_end_does_not_go_is_judged_nearer_to_the_default():
    net = nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2), nn.ReLU(), nn.Conv2d(12, 16, 5, padding=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 10),
    ).eval()  # fmt: skip
    x = torch.randn(64, 1, 8, 8)
    data = [(x, x[:, 0, 0, 0].long() % 10)]
    outlook = outlook_of(net, taut.Task(train=data, test=data), "bytes<=15%")
    space = outlook.space("swap_convs, prune_weights")
    assert not outlook.rises(space, "swap_convs")  # more filters for each channel
    starts = outlook.reshaped_starts(space)
    assert [s["swap_convs.multiplier"] for s in starts] == [1]


def test_predictions_are_not_logged_as_deeds(caplog):
    caplog.set_level("INFO", "taut")
    outlook, _ = made()
    outlook.reshaped_starts(outlook.space("low_rank, prune_weights"))
    assert not [r for r in caplog.records if "becomes" in r.message or "sparsity" in r.message]
    taut.apply(outlook.model, "low_rank(energy=0.5)", outlook.task)
    assert [r for r in caplog.records if "becomes" in r.message]


def test_kinds_of_starts_take_turns():
    plain, reshaped = [{"a": i} for i in range(4)], [{"b": i} for i in range(2)]
    found = in_turn((plain, reshaped), seed=3)
    assert [next(iter(s)) for s in found] == ["a", "b", "a", "b", "a", "a"]
    assert sorted(s["a"] for s in found if "a" in s) == [0, 1, 2, 3]
    assert found == in_turn((plain, reshaped), seed=3)


def test_without_a_bound_that_is_predicted_a_search_starts_in_the_middle():
    outlook, _ = made("latency<=1ms")
    space = outlook.space("low_rank, prune_weights, share_values", flat=True)
    assert outlook.reshaped_starts(space) == []
    starts = outlook.starts(space)
    assert [s["recode"] for s in starts] == list(space.recode)
    assert starts[list(space.recode).index("share_values")]["share_values.bits"] == 4


def test_a_sensitivity_is_scanned_once_for_all_trials(monkeypatch, tmp_path):
    outlook, _ = made("bytes<=10%")
    outlook.forecast(Recipe.parse("prune_weights(sparsity=0.9)"))
    assert outlook.ground.curves
    monkeypatch.setattr("taut.statistics.Statistics._scan", lambda *a: 1 / 0)
    outlook.forecast(Recipe.parse("prune_weights(sparsity=0.8)"))
    recipe = Recipe.parse("prune_weights(sparsity=0.8)")
    assert Trial(outlook.ground, recipe, tmp_path).go().measurement.nonzero_parameters
    again = Recipe.parse("prune_weights(sparsity=0.8) > recover(epochs=1) > prune_weights()")
    with pytest.raises(ZeroDivisionError):  # another network by then
        Trial(outlook.ground, again, tmp_path / "again").go()


def test_patterns_that_name_nothing_are_refused():
    with pytest.raises(SearchError, match=r"techniques='prune' names no technique; known: "):
        made()[0].space("prune")
    with pytest.raises(SearchError, match=r"none of the techniques 'fold_norms' has a strength"):
        made()[0].space("fold_norms")


def test_a_technique_of_an_outside_author_is_searched(monkeypatch):
    monkeypatch.setattr("taut.technique.STEPS", STEPS)

    @register_step
    @dataclass(frozen=True, kw_only=True)
    class ShareMore(ShareValues):
        """The same by another name."""

    try:
        space = made()[0].space("share_more, prune_weights")
        assert "share_more" in space.recode
        assert "prune_weights > share_more" in space.recode
        assert space.knobs["share_more"].option == "bits"
    finally:
        del STEPS["share_more"]


def test_reshaping_is_a_kind_of_its_own():
    assert issubclass(techniques()["low_rank"], Reshaping)
    assert isinstance(made()[0].original, Measurement)
