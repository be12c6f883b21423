"""Ranks: the best approximation there is, by the weights alone and by the data; how many count."""

import math

import pytest
import torch

from taut.products import Product
from taut.ranks import Matrix, input_root, rank_of_energy, rank_of_signal, refitted


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def searched(weight, root, rank):
    """The least error of any product of two factors, by gradients from a random start."""
    a = normal(weight.shape[0], rank, seed=1).requires_grad_()
    b = normal(rank, weight.shape[1], seed=2).requires_grad_()
    optimizer = torch.optim.LBFGS([a, b], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = ((weight - a @ b) @ root).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float(loss().detach())


@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_factors_come_nearer(rank):
    weight, root = normal(7, 9), torch.linalg.cholesky(torch.cov(normal(9, 30, seed=5)))
    for seen_by in (None, root):
        r = torch.eye(9, dtype=torch.float64) if seen_by is None else root
        a, b = Matrix(weight, seen_by).factors(rank)
        assert (a.shape, b.shape) == ((7, rank), (rank, 9))
        error = float(((weight - a @ b) @ r).square().sum())
        tail = Matrix(weight, seen_by).spectrum[rank:].square().sum()
        assert error == pytest.approx(float(tail))
        assert error == pytest.approx(searched(weight, r, rank), rel=1e-4)
        assert error <= searched(weight, r, rank) * (1 + 1e-9)


def test_at_full_rank_nothing_is_lost():
    weight = normal(5, 8)
    for matrix in (
        Matrix(weight), Matrix(weight, torch.linalg.cholesky(torch.cov(normal(8, 30)))),
        Matrix(weight, normal(8).abs() + 0.1), Matrix(weight, normal(5).abs() + 0.1, by_row=True),
    ):  # fmt: skip
        a, b = matrix.factors(5)
        torch.testing.assert_close(a @ b, weight)


def test_rows_that_are_looked_up_often_are_kept_best():
    table, often = normal(6, 4), torch.tensor([10.0, 1, 1, 1, 1, 1]).double()
    plain, by_use = Matrix(table).factors(1), Matrix(table, often, by_row=True).factors(1)
    errors = [(table - a @ b).square().sum(1) for a, b in (plain, by_use)]
    assert errors[1][0] < 0.1 * errors[0][0]
    used = [float((e * often.square()).sum()) for e in errors]
    assert used[1] < used[0]


def test_the_last_factor_is_the_least_squares_one():
    weight, basis = normal(4, 9), normal(2, 9, seed=3)
    root = torch.linalg.cholesky(torch.cov(normal(9, 30, seed=5)))
    found = refitted(weight, basis, root)
    moments = root @ root.T
    wanted = weight @ moments @ basis.T @ torch.linalg.inv(basis @ moments @ basis.T)
    torch.testing.assert_close(found, wanted)


def product(index, x):
    return Product(index, x.T @ x, x.sum(0), len(x))


def test_the_root_is_that_of_the_moments():
    x = normal(50, 6)
    index = torch.arange(4 * 6).reshape(4, 6)
    halves = [product(index[:, :3], x[:, :3]), product(index[:, 3:], x[:, 3:])]
    whole, blocks = input_root([product(index, x)], 6), input_root(halves, 6)
    moments = 4 * x.T @ x
    moments /= moments.diagonal().mean()
    torch.testing.assert_close(whole @ whole.T, moments + 1e-3 * torch.eye(6).double())
    assert torch.equal(blocks[3:, :3], torch.zeros(3, 3).double())
    assert input_root(halves[:1], 6) is None
    assert input_root([product(index.T[:4].contiguous(), x[:, :4])], 6) is None
    assert input_root([product(index, 0 * x)], 6) is None


def test_energy():
    values = torch.tensor([3.0, 2.0, 1.0]).double()  # squares: 9, 4 and 1 of 14
    shares = {0.01: 1, 9 / 14: 1, 0.65: 2, 13 / 14: 2, 0.95: 3, 1.0: 3}
    assert {e: rank_of_energy(values, e) for e in shares} == shares
    assert rank_of_energy(torch.zeros(3), 0.9) == 1


@pytest.mark.parametrize(("out", "columns"), [(60, 60), (40, 200), (200, 40)])
@pytest.mark.parametrize("rank", [2, 7, 12])
def test_what_stands_out_of_noise_is_found(out, columns, rank):
    signal = normal(out, rank) @ normal(rank, columns, seed=1)
    for noise in (1e-3, 0.1, 0.5):
        weight = signal + noise * normal(out, columns, seed=2)
        assert rank_of_signal(torch.linalg.svdvals(weight), (out, columns)) == rank
        scaled = torch.linalg.svdvals(1e-3 * weight)
        assert rank_of_signal(scaled, (columns, out)) == rank


def test_weak_signal_drowns_and_noise_has_none():
    noise, signal = normal(80, 120), normal(80, 1) @ normal(1, 120, seed=1)
    edge = math.sqrt(80) + math.sqrt(120)  # where the singular values of noise end
    for strength, counts in ((0.3, 1), (1.6, 2)):
        strong = 3 * edge * normal(80, 1, seed=5) @ normal(1, 120, seed=6) / math.sqrt(80 * 120)
        added = strength * edge * signal / math.sqrt(80 * 120)
        assert rank_of_signal(torch.linalg.svdvals(noise + strong + added), (80, 120)) == counts
    assert rank_of_signal(torch.linalg.svdvals(noise), (80, 120)) == 0
    assert rank_of_signal(torch.zeros(5), (5, 9)) == 0


def test_a_rank_without_noise_is_exact():
    weight = normal(30, 4) @ normal(4, 50, seed=1)
    assert rank_of_signal(torch.linalg.svdvals(weight), (30, 50)) == 4


def test_the_noise_found_has_the_least_free_energy():
    """Against a fine scan of the objective, written out value by value from the paper."""
    weight = normal(20, 3) @ normal(3, 50, seed=1) + normal(20, 50, seed=2)
    values = torch.linalg.svdvals(weight).tolist()
    q = 20 / 50
    t = 2.5129 * math.sqrt(q)
    edge = (1 + t) * (1 + q / t)

    def energy(noise):
        total = 0.0
        for s in values:
            x = s * s / (50 * noise)
            if x <= edge:
                total += x - math.log(x)
                continue
            y = 0.5 * (x - (1 + q) + math.sqrt((x - (1 + q)) ** 2 - 4 * q))
            total += x - y + math.log((y + 1) / x) + q * math.log(y / q + 1)
        return total

    best = min((energy(10 ** (k / 500)), 10 ** (k / 500)) for k in range(-700, 500))[1]
    assert best == pytest.approx(1.0, abs=0.1)
    counted = sum(s * s > 50 * best * edge for s in values)
    assert rank_of_signal(torch.tensor(values), (20, 50)) == counted == 3
