"""Less of the same: strengths rise together, by halves, up to the first that broke the goal."""

import math

import pytest
import torch
from conftest import digits_task, small_net
from test_search_space import made

import taut
from taut.search.further import Tried, further
from taut.search.space import NOTHING, Knob, Space

SPACE = Space(
    reshape=(NOTHING,), recode=("prune", "prune > share", "code"),
    knobs={
        "prune": Knob(step="prune", option="sparsity", scale="logit", low=-4.0, high=4.0),
        "share": Knob(step="share", option="bits", scale="whole", low=1, high=9),
    },
    aims=frozenset({"code"}),
    aim=Knob(step="aim", option="size_bytes", scale="log", low=100, high=10_000),
)  # fmt: skip


def rises(name):
    return name == "prune"


def pruned(logit, keeps=True, size=1000.0):
    given = {"reshape": NOTHING, "recode": "prune", "prune.sparsity (logit)": logit}
    return Tried(given, keeps, size)


def both(logit, bits, keeps=True, size=800.0):
    given = {"prune.sparsity (logit)": logit, "share.bits": bits}
    return Tried({"reshape": NOTHING, "recode": "prune > share", **given}, keeps, size)


def test_half_way_to_the_end_and_then_to_what_broke():
    (first,) = further(SPACE, rises, [pruned(0.0)])
    assert first == {**pruned(0.0).given, "prune.sparsity (logit)": 2.0}
    (then,) = further(SPACE, rises, [pruned(0.0), pruned(2.0, keeps=False, size=500.0)])
    assert then["prune.sparsity (logit)"] == pytest.approx(1.0)
    tried = [pruned(0.0), pruned(2.0, keeps=False, size=500.0), pruned(1.0, size=900.0)]
    (last,) = further(SPACE, rises, tried)
    assert last["prune.sparsity (logit)"] == pytest.approx(1.5)


def test_an_edge_that_is_found_is_left():
    near = [pruned(0.0), pruned(2.0, keeps=False, size=950.0), both(0.0, 5, size=1500.0)]
    (found,) = further(SPACE, rises, near)
    assert found["recode"] == "prune > share"
    larger = [pruned(0.0), pruned(2.0, keeps=False, size=1200.0)]
    assert list(further(SPACE, rises, larger)) == []
    came_to_nothing = [pruned(0.0), pruned(2.0, keeps=False, size=math.inf)]
    assert len(list(further(SPACE, rises, came_to_nothing))) == 1
    far = [pruned(0.0), pruned(2.0, keeps=False, size=850.0)]
    assert len(list(further(SPACE, rises, far))) == 1


def test_strengths_of_a_mix_rise_together_and_mixes_come_smallest_first():
    tried = [
        pruned(0.0),
        both(0.0, 5),
        both(-2.0, 9, size=900.0),
        both(-4.0, 1, keeps=False, size=100.0),
    ]
    first, second = further(SPACE, rises, tried)
    assert (first["prune.sparsity (logit)"], first["share.bits"]) == (2.0, 3)
    assert second["recode"] == "prune"


def test_an_aim_goes_down_and_nothing_goes_on_from_what_broke():
    given = {"reshape": NOTHING, "recode": "code", "aim.size_bytes": 1000}
    (found,) = further(SPACE, rises, [Tried(given, True, 1000.0), pruned(0.0, keeps=False)])
    assert found["aim.size_bytes"] == pytest.approx(316, abs=1)
    assert list(further(SPACE, rises, [pruned(0.0, keeps=False)])) == []


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_is_what_lies_there(share):
    for knob in (SPACE.knobs["prune"], SPACE.aim):
        assert knob.share(knob.at(share)) == pytest.approx(share, abs=0.01)
    words = Knob(step="", option="", scale="words", words=("a", "b", "c"))
    assert [words.share(w) for w in words.words] == [0.0, 0.5, 1.0]


def test_a_search_goes_further_and_goes_on_as_if_it_had_not_stopped(tmp_path):
    torch.manual_seed(0)
    net = small_net()

    def found(folder, *trials):
        for count in trials:
            result = taut.search(
                net, digits_task(), "bytes<=60%, score>=-100%", trials=count, epochs=1,
                techniques="quantize, prune_weights", folder=folder,
            )  # fmt: skip
        return [(c.recipe, c.measurement.size_bytes) for c in result.candidates]

    whole = found(tmp_path / "a", 4)
    assert whole[1][1] < whole[0][1]
    assert found(tmp_path / "b", 2, 4) == whole


def test_another_sampler_may_go_on(tmp_path):
    net, goal = small_net(), "bytes<=60%, score>=-100%"
    for trials, sampler in ((1, "tpe"), (2, "gp")):
        found = taut.search(
            net, digits_task(), goal, trials=trials, epochs=1, sampler=sampler, folder=tmp_path,
            techniques="quantize, prune_weights",
        )  # fmt: skip
    first, second = (c.measurement.size_bytes for c in found.candidates)
    assert second < first


def test_what_keeps_less_of_a_layer_is_known_as_the_stronger():
    outlook, _ = made()
    space = outlook.space("low_rank, prune_weights, quantize")
    assert {n: outlook.rises(space, n) for n in space.knobs} == {
        "low_rank": False, "prune_weights": True, "quantize": False
    }  # fmt: skip
