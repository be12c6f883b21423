"""Ranges against what they stand for: every number, the tails, the least error, the least KL."""

import math

import pytest
import torch

from taut.ranges import RULES, affine_grid, fit_steps, positive_grid, symmetric_grid, whole


def rounded(x, step, zero, levels):
    step, zero = step[:, None], zero[:, None]
    return (whole(x, step, zero, levels) - zero) * step


def fit(x, levels, rule, grid=symmetric_grid):
    step, zero = fit_steps(x, levels, rule, grid(levels, torch.float32))
    return rounded(x, step, zero, levels), step, zero


@pytest.mark.parametrize("grid", [symmetric_grid, affine_grid])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_min_max_holds_every_number_within_half_a_step(grid, bits):
    x = torch.randn(7, 300) * torch.logspace(-3, 2, 7)[:, None] + 0.2
    found, step, _ = fit(x, 2**bits, "minmax", grid)
    slack = 1 if grid is affine_grid else 0.5  # a whole zero shifts the range by up to half
    assert bool(((found - x).abs() <= slack * step[:, None] * (1 + 1e-5)).all())


def test_an_affine_grid_uses_its_levels_where_the_numbers_are():
    x = torch.linspace(0.5, 3.5, 100)[None]
    _, symmetric, _ = fit(x, 16, "minmax")
    _, affine, zero = fit(x, 16, "minmax", affine_grid)
    assert symmetric == pytest.approx(0.5)
    assert affine == pytest.approx(3.5 / 15)
    assert zero == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [symmetric_grid, affine_grid])
def test_zero_stays_zero(rule, grid):
    x = torch.randn(3, 400) + 0.3
    x[:, 5] = 0.0
    assert bool((fit(x, 16, rule, grid)[0][:, 5] == 0).all())


def test_percentile_leaves_out_the_tails():
    x = torch.linspace(-1, 1, 10_001)[None].clone()
    x[0, 0] = -100.0
    assert fit(x, 256, "minmax")[1] == pytest.approx(100 / 128)
    assert fit(x, 256, "percentile")[1] == pytest.approx(1 / 127, rel=2e-3)


def test_mse_errs_less_than_any_other_rule():
    x = torch.cat([torch.randn(4, 500), 6 * torch.randn(4, 5)], 1)
    errors = {r: (fit(x, 8, r)[0] - x).square().mean(1) for r in RULES}
    for rule in RULES:
        assert bool((errors["mse"] <= errors[rule] + 1e-12).all()), rule
    assert bool((errors["mse"] < 0.6 * errors["minmax"]).all())


def test_mse_finds_the_best_known_range_of_a_bell_curve():
    """Uniform steps for a normal: Max (1960) gives 0.996 at 4 levels and 0.335 at 16."""
    x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    found = fit_steps(x, 16, "mse", symmetric_grid(16, torch.float32))[0]
    assert float(found) == pytest.approx(0.335, rel=0.07)  # one level fewer above zero


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def by_hand(counts, kept, levels):
    """Migacz's loop, one bin after the other."""
    p = [float(c) for c in counts[:kept]]
    q = [0.0] * kept
    for level in range(levels):
        mine = [i for i in range(kept) if i * levels // kept == level]
        filled = [i for i in mine if p[i] > 0]
        for i in filled:
            q[i] = sum(p[j] for j in mine) / len(filled)
    p[-1] += float(sum(counts[kept:]))
    whole_p, whole_q = sum(p), sum(q)
    return divergence([v / whole_p for v in p], [max(v / whole_q, 1e-12) for v in q])


def test_the_divergence_is_that_of_the_two_histograms():
    from_module = __import__("taut.ranges", fromlist=["_divergence"])._divergence
    counts = torch.tensor(
        [[9, 7, 0, 8, 5, 3, 0, 2, 1, 0, 0, 1], [1, 0, 0, 0, 4, 4, 4, 4, 0, 0, 9, 0]]
    )
    for kept in (4, 7, 12):
        found = from_module(counts.double(), kept, 4)
        for row, value in zip(counts.tolist(), found.tolist(), strict=True):
            assert value == pytest.approx(by_hand(row, kept, 4), rel=1e-9)


def test_entropy_gives_up_an_outlier():
    x = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0)).abs()
    x[0, 0] = 60.0
    step = fit_steps(x, 128, "entropy", positive_grid(128, torch.float32))[0]
    assert 2.5 < float(step) * 127 < 8


@pytest.mark.parametrize("rule", RULES)
def test_what_is_all_zero_or_empty_has_a_step(rule):
    for x in (torch.zeros(2, 9), torch.zeros(2, 0)):
        step, zero = fit_steps(x, 16, rule, symmetric_grid(16))
        assert step.tolist() == [1.0, 1.0]
        assert zero.tolist() == [8.0, 8.0]


def test_steps_are_kept_as_they_will_be_stored():
    step, _ = fit_steps(torch.randn(5, 50), 16, "mse", symmetric_grid(16))
    assert torch.equal(step, step.bfloat16().float())
