"""Tournaments: who trains on, by rank and by what each adds to the frontier."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taut.search.halving import (
    brackets,
    hypervolume,
    non_dominated_ranks,
    ranked,
    rungs,
    survivors,
)

POINTS = st.lists(st.tuples(*[st.integers(0, 9).map(float)] * 2), min_size=1, max_size=30)


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@given(POINTS)
def test_ranks_are_those_of_peeling(points):
    ranks = non_dominated_ranks(np.array(points))
    for i, p in enumerate(points):
        above = [ranks[j] for j, q in enumerate(points) if dominates(q, p)]
        assert ranks[i] == max(above, default=-1) + 1


@given(POINTS)
def test_no_point_goes_before_one_that_dominates_it(points):
    order = ranked(points)
    assert sorted(order) == list(range(len(points)))
    for first, second in itertools.combinations(order, 2):
        assert not dominates(points[second], points[first])


def test_within_a_rank_goes_next_what_adds_most():
    """Of the better half by score; the rest, tiny files that know nothing, by score."""
    line = [(0.1, 9.0), (0.2, 8.0), (0.3, 4.0), (0.8, 2.0), (0.85, 1.0), (0.9, 0.0)]
    assert ranked(line) == [0, 2, 1, 3, 4, 5]
    assert ranked([]) == []


@given(POINTS)
def test_the_second_is_the_best_beside_the_first(points):
    order, ranks = ranked(points), non_dominated_ranks(np.array(points))
    first = [i for i in order if ranks[i] == 0]
    costs = [points[i][1] for i in first]
    most = max(costs) + max(max(costs) - min(costs), math.log(2))
    corner = np.median([p[0] for p in points]), most
    for i in first[1:]:
        both = [hypervolume([points[first[0]], points[j]], corner) for j in (first[1], i)]
        assert both[0] >= both[1] - 1e-9


def test_the_best_score_survives_however_large_its_file():
    front = [(0.025, 12.6), (0.035, 11.5), (0.04, 11.0), (0.045, 10.5), (0.05, 10.0)]
    poor = [(0.3 + i / 10, 9.0 - i) for i in range(4)]
    for beaten in ([], [(0.6, 13.7)]):
        assert 0 in ranked([*front, *poor, *beaten])[:3]


def test_a_cost_that_all_share_changes_nothing():
    line = [(0.1, 9.0), (0.2, 8.0), (0.3, 4.0), (0.8, 2.0), (0.85, 1.0), (0.9, 0.0)]
    assert ranked([(*p, 7.0) for p in line]) == ranked(line)


def test_what_failed_comes_last():
    assert ranked([(math.inf, math.inf), (2.0, 2.0), (1.0, 3.0)])[-1] == 0
    assert ranked([(math.nan, 1.0), (2.0, 2.0), (1.0, 3.0)])[-1] == 0
    assert ranked([(math.inf, math.inf)] * 2) == [0, 1]


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 9, 10, 27, 80])
def test_rungs_rise_to_all_epochs(epochs):
    steps = rungs(epochs)
    assert steps[-1] == epochs
    assert steps[0] >= 1
    assert all(a < b for a, b in itertools.pairwise(steps))


def test_halving_takes_a_third_of_the_epochs_or_less():
    steps, (count, start) = rungs(9), next(brackets("halving", 9))
    alive, spent, before = count, 0, 0
    for rung in range(start, len(steps)):
        spent += alive * (steps[rung] - before)
        last = rung + 2 == len(steps)
        alive, before = survivors(count, rung + 1, last=last), steps[rung]
    assert spent <= count * 9 / 3


def test_twice_as_many_train_to_the_end_where_they_were_chosen_twice():
    assert [survivors(27, rung, last=True) for rung in (1, 2, 3)] == [9, 6, 2]
    assert [survivors(27, rung) for rung in (1, 2, 3, 4)] == [9, 3, 1, 1]


def test_hyperband_hedges():
    made = list(itertools.islice(brackets("hyperband", 9), 3))
    assert [start for _, start in made] == [0, 1, 2]
    assert [n for n, _ in made] == [9, 5, 3]


@given(POINTS)
def test_the_hypervolume_is_the_area_that_is_dominated(points):
    cells = sum(any(p[0] <= x and p[1] <= y for p in points) for x in range(10) for y in range(10))
    assert hypervolume(points, (10, 10)) == cells


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=8))
def test_it_is_a_volume_in_three_dimensions(points):
    cells = sum(
        any(all(a <= b for a, b in zip(p, cell, strict=True)) for p in points)
        for cell in itertools.product(range(5), repeat=3)
    )
    assert hypervolume(points, (5, 5, 5)) == cells
