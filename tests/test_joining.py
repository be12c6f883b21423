"""The arithmetic of merging against its definitions: moments, pairs, least squares, angles."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taut.joining import FITS, Reading, least_squares, pairs
from taut.products import unit_moments

UNITS = 7


def activations(seed=0):
    """Units that are alike in some degree: [2,000, units]."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(2000, 4, generator=g, dtype=torch.float64)
    mixed = base @ torch.randn(4, UNITS, generator=g, dtype=torch.float64)
    return mixed + 0.3 * torch.randn(2000, UNITS, generator=g, dtype=torch.float64) + 0.5


def reading(a, weight, centred=False):
    means = a.mean(0) if centred else torch.zeros(UNITS, dtype=torch.float64)
    seen = a - means
    return Reading(moments=seen.T @ seen / len(a), means=means, weight=weight)


def normal(*shape, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(a, weight, joined, r, mix):
    """What a layer gives after the fold, by its definition."""
    folded = weight[joined.keep] + mix @ weight[joined.gone]
    return a[:, joined.keep] @ folded + joined.shift(r, mix) @ weight[joined.gone]


@pytest.mark.parametrize("centred", [False, True])
def test_least_squares_is_the_best_that_any_fold_can_do(centred):
    a, weight = activations(), normal(UNITS, 5)
    r = reading(a, weight, centred)
    joined = least_squares([r], 4, 90)
    ones = torch.ones(len(a), 1, dtype=torch.float64)
    given = torch.cat([a[:, joined.keep], ones], 1) if centred else a[:, joined.keep]
    best = given @ torch.linalg.lstsq(given, a @ weight).solution
    got = outputs(a, weight, joined, r, joined.mixes[0])
    torch.testing.assert_close(got, best, atol=1e-6, rtol=1e-6)
    told = given @ torch.linalg.lstsq(given, a[:, joined.gone]).solution
    missed = (a[:, joined.gone] - told).square().sum(0)
    power = (a - r.means)[:, joined.gone].square().sum(0)
    widest = math.degrees(math.asin(float((missed / power).max().sqrt())))
    assert joined.angle == pytest.approx(widest, abs=1e-3)
    assert joined.error == pytest.approx(
        float((got - a @ weight).square().sum() / ((a - r.means)[:, :, None] * weight).sum(1)
              .square().sum()), rel=1e-5,
    )  # fmt: skip


def test_the_first_to_go_is_the_one_that_costs_least_of_all():
    a, weight = activations(3), normal(UNITS, 5)
    r = reading(a, weight)
    for fit in (pairs, least_squares):
        (gone,) = fit([r], UNITS - 1, 90).gone
        damage = []
        for j in range(UNITS):
            rest = [i for i in range(UNITS) if i != j]
            groups = [[i] for i in rest] if fit is pairs else [rest]
            missed = min(
                float((a[:, [j]] - a[:, g] @ torch.linalg.lstsq(a[:, g], a[:, [j]]).solution)
                      .square().sum())
                for g in groups
            )  # fmt: skip
            damage.append(missed * float(weight[j].square().sum()))
        assert gone == min(range(UNITS), key=damage.__getitem__)


def test_pairs_are_told_by_one_unit_and_no_medoid_serves_better():
    a, weight = activations(5), normal(UNITS, 5)
    r = reading(a, weight)
    joined = pairs([r], 4, 90)
    mix = joined.mixes[0]
    for column, j in enumerate(joined.gone):
        (place,) = mix[:, column].nonzero()[:, 0].tolist()
        i = joined.keep[place]
        cosine = float((a[:, i] @ a[:, j]) / a[:, i].square().sum())
        assert float(mix[place, column]) == pytest.approx(cosine)

    def price(keep):
        total = 0.0
        for j in set(range(UNITS)) - set(keep):
            left = [
                float(
                    a[:, j].square().sum() - (a[:, i] @ a[:, j]).square() / a[:, i].square().sum()
                )
                for i in keep
            ]
            total += min(left) * float(weight[j].square().sum())
        return total

    best = min(price(k) for k in itertools.combinations(range(UNITS), 4))
    assert price(joined.keep) <= 1.5 * best


@pytest.mark.parametrize("fit", FITS)
def test_what_several_weights_read_is_fitted_to_each(fit):
    first, second = activations(), activations(1)
    second[:, 6] = -2 * second[:, 0]
    first[:, 6] = 3 * first[:, 0]
    readings = [reading(first, normal(UNITS, 5)), reading(second, normal(UNITS, 4))]
    joined = FITS[fit](readings, UNITS - 1, 90)
    (gone,) = joined.gone
    assert gone in (0, 6)
    factors = [3, -2] if gone == 6 else [1 / 3, -1 / 2]
    place = joined.keep.index(6 - gone)
    assert [float(m[place, 0]) for m in joined.mixes] == pytest.approx(factors, abs=1e-5)
    assert joined.angle < 0.1


@pytest.mark.parametrize("fit", FITS)
def test_the_angle_bounds_what_goes(fit):
    a = activations()
    a[:, 3] = a[:, 1] + 0.05 * normal(2000) * a[:, 1].std()
    r = reading(a, normal(UNITS, 5))
    near, none = (FITS[fit]([r], 1, angle) for angle in (6.0, 0.5))
    assert near.gone in ([1], [3])
    assert 1 < near.angle <= 6
    assert not none.gone
    wide = FITS[fit]([r], 3, 60)
    assert wide.angle <= 60


@pytest.mark.parametrize("fit", FITS)
def test_units_that_say_nothing_go_first(fit):
    a = activations()
    a[:, 2] = 0
    a[:, 5] = 0.7
    r = reading(a, normal(UNITS, 5), centred=True)
    joined = FITS[fit]([r], UNITS - 2, 90)
    assert joined.gone == [2, 5]
    assert joined.shift(r, joined.mixes[0]).tolist() == pytest.approx([0, 0.7], abs=1e-6)
    assert joined.error < 1e-6


# ---- moments --------------------------------------------------------------------------------


def moments_of(layer, x, dim, places):
    (found,) = unit_moments(lambda: layer(x), [(layer.weight, dim, torch.tensor(places))])
    return found


def test_moments_of_units_by_their_definition():
    linear, x = nn.Linear(6, 3), torch.randn(5, 4, 6)
    found = moments_of(linear, x, 1, [[0, 3], [1, 4], [2, 5]])
    each = x.double().reshape(-1, 2, 3).reshape(-1, 3)
    torch.testing.assert_close(found.moments, each.T @ each)
    torch.testing.assert_close(found.sums, each.sum(0))
    assert found.rows == 5 * 4 * 2

    conv, x = nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 7, 7)
    found = moments_of(conv, x, 1, [[0], [1], [2], [3]])
    each = (
        F.unfold(x.double(), 3, padding=1, stride=2)
        .reshape(2, 4, -1)
        .permute(0, 2, 1)
        .flatten(0, 1)
    )
    torch.testing.assert_close(found.moments, each.T @ each)
    assert found.rows == len(each)


def test_a_weight_that_makes_the_units_shows_none():
    found = moments_of(nn.Linear(4, 3), torch.randn(5, 4), 0, [[0], [1], [2]])
    assert found.rows == 0
