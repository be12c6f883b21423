"""The frontier: what nothing beats, the best of it for a goal, as a table, as a picture."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taut.errors import GoalError, RunError
from taut.frontier import Frontier
from taut.frontier_data import candidate_rows, curves, family
from taut.types import Candidate, Latency, Measurement, frontier

ORIGINAL = Measurement(
    score=0.9, size_bytes=10_000, parameters=2500, nonzero_parameters=2500, macs=2500,
    effective_macs=2500,
)  # fmt: skip


def candidate(size, score, ms=1.0, recipe="share_values() > recover()"):
    at = Latency(batch=1, threads=1, engine="pytorch", median_ms=ms, iqr_ms=0.1, runs=5)
    got = replace(ORIGINAL, size_bytes=size, score=score, latencies=(at,), effective_macs=size)
    return Candidate(recipe=recipe, measurement=got, path="net.taut", epochs=2.0)


def of(*candidates, better="higher"):
    return Frontier.of(candidates, ORIGINAL, better)


def test_the_best_is_the_least_of_those_that_keep_the_goal():
    small, fast, good = candidate(100, 0.5, 9.0), candidate(400, 0.88, 1.0), candidate(300, 0.89, 5)
    line = of(small, fast, good)
    assert list(line) == [small, good, fast]
    assert len(line) == 3
    assert line[1:] == (good, fast)
    assert line.best("bytes<=5%, score>=-5%") is good
    assert line.best("bytes<=5%, score>=-5%", minimize="latency") is fast
    assert line.best("bytes<=5%", minimize="score") is good
    assert line.best("bytes<=2%, score>=-1%") is good  # the nearest: 1.5 times the bytes
    assert line.best("bytes<=1%") is small


def test_where_less_is_better():
    line = of(candidate(100, 2.0), candidate(400, 1.0), better="lower")
    assert line.best("score<=+30%", minimize="score").measurement.score == 1.0


def test_there_may_be_no_best():
    with pytest.raises(RunError, match="the frontier is empty: no trial came to an end"):
        of().best("bytes<=5%")
    with pytest.raises(GoalError, match="no axis is named 'size'; known: "):
        of(candidate(1, 1)).best("bytes<=5%", minimize="size")


def test_rows_have_every_axis():
    (row,) = of(candidate(100, 0.5, 2.0)).rows()
    assert row == {
        "recipe": "share_values() > recover()", "epochs": 2.0, "bytes": 100.0, "memory": 0.0,
        "latency": 2.0, "parameters": 2500.0, "macs": 100.0, "score": 0.5, "latency_iqr": 0.1,
        "path": "net.taut",
    }  # fmt: skip


def test_a_dataframe_where_pandas_is(monkeypatch):
    line = of(candidate(100, 0.5))
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(RunError, match=r"to_dataframe needs pandas.*pip install 'taut.pandas.'"):
        line.to_dataframe()
    monkeypatch.undo()
    pandas = pytest.importorskip("pandas")
    frame = line.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["bytes"]) == [100.0]


POINT = st.tuples(st.integers(1, 6), st.integers(0, 6), st.sampled_from([1.0, 1.05, 1.2, math.inf]))


@given(st.lists(POINT, max_size=20))
def test_the_frontier_is_what_no_other_beats(points):
    """By the definition, pair by pair."""
    tried = [candidate(s, g / 10, ms) for s, g, ms in points]

    def beats(a, b):
        (size, good, ms), (size_b, good_b, ms_b) = a, b
        no_worse = size <= size_b and good >= good_b and ms <= 1.1 * ms_b
        return no_worse and (size < size_b or good > good_b or 1.1 * ms < ms_b)

    kept = {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}
    found = frontier(tried, "higher")
    assert {i for i, c in enumerate(tried) if any(c is f for f in found)} == kept


# ---- the picture ----------------------------------------------------------------------------


def test_families_are_the_techniques_of_a_recipe():
    text = "training(clip=1) > low_rank() > recover() > code_length() > aim(size_bytes=9)"
    assert family(text) == "low_rank > code_length"


def test_each_family_has_its_own_curve():
    tried = [candidate(s, g, recipe=r) for s, g, r in (
        (100, 0.5, "quantize(bits=2)"), (200, 0.4, "quantize(bits=3)"),
        (300, 0.8, "quantize(bits=4)"), (50, 0.9, "share_values()"),
    )]  # fmt: skip
    rows = candidate_rows(tried, of(*tried), ORIGINAL, "higher")
    assert of_bytes(rows, "higher") == [("quantize", (1, 3))]
    assert of_bytes(rows, "lower") == [("quantize", (1, 2))]
    assert [r.on_frontier for r in rows] == [False, False, False, True]
    assert [r.macs for r in rows] == [100, 200, 300, 50]


def of_bytes(rows, better):
    return [(c.family, c.numbers) for c in curves(rows, better) if c.axis == "bytes"]


def test_each_cost_has_its_own_curves():
    tried = [candidate(100, 0.5, 3.0), candidate(200, 0.6, 2.0), candidate(300, 0.7, 1.0)]
    rows = candidate_rows(tried, of(*tried), ORIGINAL, "higher")
    assert [(c.axis, c.numbers) for c in curves(rows, "higher")] == [
        ("bytes", (1, 2, 3)), ("macs", (1, 2, 3)),
    ]  # fmt: skip
    assert [c.axis for c in curves(rows, "lower")] == ["latency"]


def test_of_very_many_an_even_choice_is_drawn():
    tried = [candidate(1000 + i, 0.5 - i / 1e5) for i in range(4000)]
    tried.append(candidate(999, 0.9))
    rows = candidate_rows(tried, of(*tried), ORIGINAL, "higher", chosen=tried[-1])
    assert len(rows) == 1501
    assert sum(r.shown for r in rows) == 101
    assert rows[-1].chosen
    assert rows[-1].on_frontier
    assert rows[0].number == 1
    assert rows[-2].number > 3900
