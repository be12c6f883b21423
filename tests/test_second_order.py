"""OBS and block Fisher against what they stand for, on matrices small enough to try everything."""

import itertools
import statistics

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taut
from taut import second_order
from taut.importance import CRITERIA, by_row
from taut.modules import clone
from taut.pattern import NOfM, Pattern, largest
from taut.products import Product
from taut.second_order import (
    DAMPING,
    damped,
    disjoint,
    fisher_refit,
    fisher_scores,
    inverse,
    obs,
    obs_scores,
    refit,
    rounded,
)
from taut.second_order import (
    damage as damage_of,
)


def correlated(rows, n):
    """Inputs [rows, n] of different sizes, in which neighbours go together."""
    near = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    mixed = torch.randn(rows, n, dtype=torch.float64) @ (0.5**near).double()
    return mixed * torch.linspace(0.2, 2, n).double()[torch.randperm(n)]


def product(x, shape, index=None):
    numel = torch.Size(shape).numel()
    index = torch.arange(numel).reshape(shape) if index is None else index
    return Product(index, x.T @ x, x.sum(0), len(x))


def even(w, products):
    """Squared gradients by which the loss feels every output alike: c = 1."""
    squares = torch.zeros(w.numel(), dtype=torch.float64)
    for p in products:
        squares[p.index] = p.squares.expand(p.index.shape)
    return squares.reshape(w.shape)


def prune(w, products, allowed=None, kept=0, pattern=None):
    allowed = torch.ones_like(w, dtype=torch.bool) if allowed is None else allowed
    return obs(w, products, even(w, products), allowed, kept, pattern)


def least_squares(x, w, mask):
    """Row by row, the weights on the mask that give x @ w as nearly as they can, with the ridge."""
    h = x.T @ x
    ridge = (DAMPING * h.diagonal().mean()).sqrt() * torch.eye(len(h), dtype=x.dtype)
    x = torch.cat([x, ridge])
    out = torch.zeros_like(w)
    for i, (row, keep) in enumerate(zip(w, mask, strict=True)):
        out[i, keep] = torch.linalg.lstsq(x[:, keep], x @ row).solution
    return out


def damage(h, before, after):
    """Σ over rows of ½ · dᵀ · H · d."""
    change = (after - before).double()
    return float(0.5 * (change @ h * change).sum())


# Refitting


def test_a_refit_is_the_least_squares_solution():
    x, w = correlated(40, 8), torch.randn(5, 8).double()
    mask = torch.rand(5, 8) < 0.5
    mask[2] = False
    mask[3] = True
    found = refit(damped(x.T @ x), w, mask)
    torch.testing.assert_close(found, least_squares(x, w, mask), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[3], w[3], rtol=1e-8, atol=1e-10)


def test_a_refit_with_a_matrix_for_each_row(monkeypatch):
    x, w, mask = correlated(40, 6), torch.randn(7, 6).double(), torch.rand(7, 6) < 0.5
    each = torch.stack([damped((i + 1) * x[i:].T @ x[i:]) for i in range(7)])
    wanted = torch.cat([refit(h, w[i : i + 1], mask[i : i + 1]) for i, h in enumerate(each)])
    torch.testing.assert_close(refit(each, w, mask), wanted)
    monkeypatch.setattr("taut.second_order._MOST_NUMBERS", 40)  # a few rows at once
    torch.testing.assert_close(refit(each, w, mask), wanted)
    one = refit(each[0], w, mask)
    monkeypatch.undo()
    torch.testing.assert_close(one, refit(each[0], w, mask))


# OBS


def test_the_score_of_a_weight_is_the_damage_of_removing_it_at_best():
    x, w = correlated(50, 6), torch.randn(3, 6)
    h = damped(x.T @ x)
    given = [product(x, (3, 6))]
    found = obs_scores(w, given, even(w, given))
    for i, j in itertools.product(range(3), range(6)):
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[i, j] = False
        best = damage(h, w, refit(h, w.double(), mask))
        assert float(found[i, j]) == pytest.approx(best, rel=1e-5)


def test_obs_keeps_so_many_and_refits_them():
    x, w = correlated(60, 9), torch.randn(4, 9)
    mask, new = prune(w, [product(x, (4, 9))], torch.ones(4, 9, dtype=torch.bool), kept=13)
    assert int(mask.sum()) == 13
    wanted = least_squares(x, w.double(), mask).float()
    torch.testing.assert_close(new, wanted, rtol=1e-4, atol=1e-5)


def test_obs_does_less_damage_than_other_choices_and_than_no_refit():
    torch.manual_seed(3)
    for _ in range(5):
        x, w = correlated(200, 16), torch.randn(6, 16)
        h = damped(x.T @ x)
        mask, new = prune(w, [product(x, (6, 16))], torch.ones(6, 16, dtype=torch.bool), kept=40)
        by_size = largest(w.abs(), 40)
        assert damage(h, w, new) < damage(h, w, refit(h, w.double(), by_size))
        assert damage(h, w, refit(h, w.double(), by_size)) < damage(h, w, w * by_size)
        assert damage(h, w, new) < damage(h, w, w * mask)


def test_obs_is_near_the_best_of_all_masks():
    torch.manual_seed(1)
    x, w = correlated(80, 8), torch.randn(1, 8)
    h = damped(x.T @ x)
    every = []
    for keep in itertools.combinations(range(8), 3):
        mask = torch.zeros(1, 8, dtype=torch.bool)
        mask[0, list(keep)] = True
        every.append(damage(h, w, refit(h, w.double(), mask)))
    _, new = prune(w, [product(x, (1, 8))], torch.ones(1, 8, dtype=torch.bool), kept=3)
    assert damage(h, w, new) <= sorted(every)[5]  # of 56


def test_without_correlations_obs_is_obd():
    x = torch.diag(torch.rand(6).double() + 0.5)
    w = torch.randn(4, 6)
    mask, new = prune(w, [product(x, (4, 6))], torch.ones(4, 6, dtype=torch.bool), kept=10)
    assert torch.equal(mask, largest(w.square() * damped(x.T @ x).diagonal(), 10))
    torch.testing.assert_close(new, w * mask)
    counts = (x.T @ x).diagonal()
    rows = Product(torch.arange(24).reshape(4, 6), counts, counts, 6)
    again, same = prune(w, [rows], torch.ones(4, 6, dtype=torch.bool), kept=10)
    assert torch.equal(again, mask)
    assert torch.equal(same, w * mask)


def test_what_an_earlier_mask_removed_stays_removed():
    x, w = correlated(60, 10), torch.randn(5, 10)
    allowed = torch.rand(5, 10) < 0.6
    w = w * allowed
    mask, new = prune(w, [product(x, (5, 10))], allowed, kept=12)
    assert int(mask.sum()) == 12
    assert not bool((mask & ~allowed).any())
    assert bool((new[~mask] == 0).all())


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:5"])
def test_obs_by_a_pattern(text):
    pattern, x, w = Pattern.parse(text), correlated(300, 22), torch.randn(6, 22)
    everything = torch.ones(6, 22, dtype=torch.bool)
    mask, new = prune(w, [product(x, (6, 22))], everything, kept=0, pattern=pattern)
    assert int(mask.sum()) == pattern.kept((6, 22))
    for group in mask.split(pattern.of, 1):
        assert bool((group.sum(1) == min(pattern.keep, group.shape[1])).all())
    h = damped(x.T @ x)
    by_size = pattern.choose(w.abs(), 0)
    assert damage(h, w, new) < damage(h, w, refit(h, w.double(), by_size))


def test_a_pattern_lies_along_the_weights_rows_even_where_inputs_do_not():
    x, w = correlated(100, 6), torch.randn(6, 8)  # x @ w: the inputs run along its columns
    across = torch.arange(48).reshape(6, 8).T
    everything = torch.ones(6, 8, dtype=torch.bool)
    mask, new = prune(w, [product(x, (6, 8), across)], everything, 0, NOfM(2, 4))
    assert bool((mask.unflatten(1, (2, 4)).sum(-1) == 2).all())
    wanted = least_squares(x, w.T.double(), mask.T).T.float()
    torch.testing.assert_close(new, wanted, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_never_there_go_first():
    x = correlated(50, 8)
    x[:, [1, 5]] = 0.0
    mask, new = prune(torch.randn(4, 8), [product(x, (4, 8))], torch.ones(4, 8).bool(), kept=24)
    assert not bool(mask[:, [1, 5]].any())
    assert bool(new.isfinite().all())


def test_parts_of_a_weight_have_inputs_of_their_own():
    x, y, w = correlated(50, 6), 10 * correlated(50, 6), torch.randn(4, 6)
    index = torch.arange(24).reshape(4, 6)
    both = [product(x, (), index[:2]), product(y, (), index[2:])]
    mask, new = prune(w, both, torch.ones(4, 6, dtype=torch.bool), kept=12)
    assert int(mask[2:].sum()) > int(mask[:2].sum())
    for inputs, rows in ((x, slice(2)), (y, slice(2, 4))):
        wanted = least_squares(inputs, w[rows].double(), mask[rows]).float()
        torch.testing.assert_close(new[rows], wanted, rtol=1e-4, atol=1e-5)


def test_rows_that_the_loss_feels_more_keep_more():
    x, w = correlated(60, 10), torch.randn(4, 10)
    given = [product(x, (4, 10))]
    squares = even(w, given) * torch.tensor([100.0, 1, 1, 0])[:, None]
    mask, new = obs(w, given, squares, torch.ones(4, 10, dtype=torch.bool), kept=18)
    rows = mask.sum(1)
    assert rows[0] > rows[1:3].max()
    assert rows[3] == 0
    torch.testing.assert_close(
        new, least_squares(x, w.double(), mask).float(), rtol=1e-4, atol=1e-5
    )
    scores = obs_scores(w, given, squares)
    plain = obs_scores(w, given, even(w, given))
    torch.testing.assert_close(scores[0], 100 * plain[0], rtol=1e-3, atol=0)


def test_without_gradients_all_rows_count_alike():
    x, w = correlated(60, 10), torch.randn(4, 10)
    given = [product(x, (4, 10))]
    mask, _ = obs(w, given, torch.zeros(4, 10), torch.ones(4, 10, dtype=torch.bool), kept=18)
    assert torch.equal(mask, prune(w, given, kept=18)[0])


def test_a_tied_weight_is_read_as_a_matrix_whose_rows_count():
    x, counts = correlated(50, 4), torch.tensor([3.0, 0, 1, 0, 2]).double()
    index = torch.arange(20).reshape(5, 4)
    lookup = Product(index.T, counts, counts, 6)
    (found,) = disjoint([lookup, product(x, (5, 4))], 20)
    assert torch.equal(found.index, index)
    mean = counts.mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found.moments, x.T @ x + mean)


def test_a_weight_that_meets_nothing_but_zeros():
    w = torch.randn(3, 4)
    mask, new = prune(w, [product(torch.zeros(5, 4).double(), (3, 4))], w != 0, kept=6)
    assert torch.equal(mask, largest(w.abs(), 6))  # the identity stands in
    torch.testing.assert_close(new * mask, w * mask)


# Block Fisher


def example_gradients(n, numel):
    return correlated(n, numel)


def blocks_of(g, width):
    flat = torch.nn.functional.pad(g, (0, -g.shape[1] % width)).unflatten(1, (-1, width))
    return torch.einsum("nbi,nbj->bij", flat, flat) / len(g)


def test_the_blocks_are_inverted_as_by_rank_one_updates():
    g = example_gradients(30, 6)
    (block,) = blocks_of(g, 6)
    ridge = DAMPING * block.diagonal().mean()
    by_updates = torch.eye(6, dtype=torch.float64) / ridge
    for one in g:  # Sherman, Morrison
        turned = by_updates @ one
        by_updates -= torch.outer(turned, turned) / (len(g) + one @ turned)
    torch.testing.assert_close(inverse(damped(block)), by_updates, rtol=1e-6, atol=1e-8)
    explicit = torch.linalg.inv(block + ridge * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(inverse(damped(block)), explicit, rtol=1e-8, atol=1e-10)


def test_fisher_scores_and_refits_follow_the_explicit_matrix():
    g, w = example_gradients(40, 10), torch.randn(2, 5)
    blocks = blocks_of(g, 4)  # two of four, and one of two
    scores, mask = fisher_scores(w, blocks), torch.rand(2, 5) < 0.5
    new = fisher_refit(w, blocks, mask)
    for block, at in zip(blocks, torch.arange(10).split(4), strict=True):
        n = len(at)
        h = damped(block)[:n, :n]
        wanted = 0.5 * w.flatten()[at].double() ** 2 / torch.linalg.inv(h).diagonal()
        torch.testing.assert_close(scores.flatten()[at], wanted, rtol=1e-6, atol=1e-9)
        keep = mask.flatten()[at]
        rest = torch.linalg.solve(h[keep][:, keep], h[keep] @ w.flatten()[at].double())
        torch.testing.assert_close(new.flatten()[at][keep], rest.float(), rtol=1e-4, atol=1e-5)
    assert bool((new[~mask] == 0).all())


# Wanda's rows


def test_rows_keep_the_same_share():
    scores = torch.rand(6, 10) * torch.tensor([1, 10, 100, 1e3, 1e4, 1e5])[:, None]
    ranked = by_row(scores.double(), [product(correlated(20, 10), (6, 10))])
    for kept in (12, 30, 33):
        mask = largest(ranked, kept)
        per_row = mask.sum(1)
        assert int(per_row.max() - per_row.min()) <= 1
        for row, keep in zip(scores, mask, strict=True):
            assert row[keep].min() > row[~keep].max()


def test_the_criteria_are_those_of_the_option():
    from taut.techniques import PruneWeights

    option = next(f for f in PruneWeights.options() if f.name == "criterion")
    assert option.metadata["choices"] == tuple(CRITERIA)


# Rounding


def to_quarters(values, places):
    return (4 * values).round() / 4


def by_hand(h, row):
    """Column by column: round it, then move those to come to where the damage is least."""
    w, order = row.clone(), h.diagonal().argsort(descending=True).tolist()
    for at, j in enumerate(order):
        rest = order[at + 1 :]
        change = (4 * w[j]).round() / 4 - w[j]
        if rest:  # argmin over d of (change, d)ᵀ · H · (change, d)
            pull = h[rest][:, rest]
            w[rest] -= torch.linalg.solve(pull, h[rest, j] * change)
        w[j] += change
    return w


def test_rounding_makes_errors_good_in_the_columns_to_come(monkeypatch):
    monkeypatch.setattr("taut.second_order.SWEEPS", 0)
    x, w = correlated(60, 9), torch.randn(5, 9).double()
    found = rounded(w, [product(x, (5, 9))], to_quarters)
    h = damped(x.T @ x)
    wanted = torch.stack([by_hand(h, row) for row in w])
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found, to_quarters(found, None))
    assert damage(h, w, found) < damage(h, w, to_quarters(w, None)) / 1.5


def test_sweeps_end_where_no_single_weight_can_do_better(monkeypatch):
    x, w = correlated(60, 9), torch.randn(5, 9).double()
    h = damped(x.T @ x)

    def after(sweeps):
        monkeypatch.setattr("taut.second_order.SWEEPS", sweeps)
        return rounded(w, [product(x, (5, 9))], to_quarters)

    losses = [damage(h, w, after(n)) for n in (0, 1, 2, 20)]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    settled = after(20)
    for i, j, step in itertools.product(range(5), range(9), (-0.25, 0.25)):
        other = settled.clone()
        other[i, j] += step
        assert damage(h, w, other) >= losses[-1] - 1e-12


def test_without_correlations_rounding_is_to_the_nearest():
    w, x = torch.randn(5, 9), torch.rand(9)
    plain = Product(torch.arange(45).reshape(5, 9), x.double(), x.double(), 3)
    assert torch.equal(rounded(w, [plain], to_quarters), to_quarters(w, None))
    diagonal = Product(plain.index, x.double().diag(), x.double(), 3)
    assert torch.equal(rounded(w, [diagonal], to_quarters), to_quarters(w, None))


def test_rounding_is_told_where_its_numbers_lie():
    """Two groups of a convolution, each with inputs of its own."""
    index = torch.arange(24).reshape(2, 3, 4)
    parts = [product(correlated(30, 4), (3, 4), part) for part in index]
    w, steps = torch.randn(6, 4), torch.rand(24).double() + 0.1

    def nearest(values, places):
        return (values / steps[places]).round() * steps[places]

    found = rounded(w, parts, nearest).double().flatten()
    torch.testing.assert_close(found / steps, (found / steps).round(), rtol=0, atol=1e-4)


def test_the_damage_of_a_change_by_its_definition():
    x, w = correlated(40, 6), torch.randn(4, 6)
    parts = [product(x, (4, 6))]
    small, large = 0.1 * torch.randn(4, 6), torch.randn(4, 6)
    found = damage_of([small, large], parts, even(w, parts))
    wanted = [damage(damped(x.T @ x), w, w + d) for d in (small, large)]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_rows_are_realigned_to_give_what_they_gave(monkeypatch):
    monkeypatch.setattr(second_order, "DAMPING", 1e-9)
    torch.manual_seed(0)
    old = torch.randn(200, 6).double()
    new = old + 0.3 * torch.randn(200, 6).double() + 0.1
    rows = torch.randn(4, 6).double()
    found = second_order.realigned(rows, second_order.damped(new.T @ new), (old - new).T @ new)
    torch.testing.assert_close(found, torch.linalg.lstsq(new, old @ rows.T).solution.T)
    assert second_order.realigned(rows, new.T @ new, None) is rows


@pytest.mark.parametrize("text", ["prune_weights(sparsity=0.6, scope='layer', criterion='obs')",
                                  "quantize(bits=3, method='gptq')"])  # fmt: skip
def test_later_layers_make_good_what_earlier_ones_lost(text, monkeypatch):
    def drop(seed):
        """What is lost beside what was lost without."""
        torch.manual_seed(seed)
        mixed = torch.randn(512, 6) @ torch.randn(6, 16)
        x = mixed + 0.1 * torch.randn(512, 16)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(),
                              nn.Linear(24, 4))  # fmt: skip
        with torch.no_grad():
            y = model(x)
        task = taut.Task(train=[(x, y)], test=[(x, y)], loss=F.mse_loss, score=F.mse_loss,
                         better="lower")  # fmt: skip
        with_it = F.mse_loss(taut.apply(clone(model), text, task)(x), y)
        with monkeypatch.context() as patched:
            patched.setattr(second_order, "realigned", lambda rows, *_: rows)
            without = F.mse_loss(taut.apply(clone(model), text, task)(x), y)
        return float((with_it / without).detach())

    # one draw may go either way, by the last bits that a processor's sums have
    assert statistics.geometric_mean(map(drop, range(5))) < 0.6
