"""Structured weights: entries as defined, projections against least squares, products, refusals."""

import itertools
import math

import pytest
import torch
from nets import traced
from torch import nn

from taut.errors import RecipeError
from taut.modules import tensor_at
from taut.pack import packed_state
from taut.packed import Plain
from taut.plan import check
from taut.recipe import Recipe
from taut.recoding import core
from taut.structured_weight import (
    BlockCirculant,
    BlockToeplitz,
    CirculantWeight,
    Kronecker,
    KroneckerWeight,
    ToeplitzWeight,
)
from taut.techniques import PruneWeights, ShareValues, StructuredMatrix

STRUCTURES = [
    BlockCirculant(shape=(8, 12), block=4),
    BlockCirculant(shape=(7, 10), block=4),
    BlockCirculant(shape=(1, 5), block=5),
    BlockCirculant(shape=(3, 5, 2, 2), block=5),
    BlockToeplitz(shape=(8, 12), block=4),
    BlockToeplitz(shape=(7, 10), block=3),
    BlockToeplitz(shape=(6, 4, 3), block=2),
    BlockToeplitz(shape=(2, 9), block=1),
    Kronecker(shape=(8, 12), high=2, wide=3),
    Kronecker(shape=(8, 12), high=4, wide=2, terms=3),
    Kronecker(shape=(6, 4, 3, 1), high=3, wide=4, terms=2),
    Kronecker(shape=(7,), high=1, wide=7),
]
WEIGHTS = {
    BlockCirculant: CirculantWeight, BlockToeplitz: ToeplitzWeight, Kronecker: KroneckerWeight,
}  # fmt: skip
each = pytest.mark.parametrize("structure", STRUCTURES, ids=str)


def as_defined(structure, g):
    """The weight, one entry after another; inputs are counted last."""
    shape = structure.shape if len(structure.shape) > 1 else (1, *structure.shape)
    weight = torch.zeros(shape)
    places = list(itertools.product(*map(range, shape[2:])))
    for i, c, (at, place) in itertools.product(range(shape[0]), range(shape[1]), enumerate(places)):
        j = at * shape[1] + c
        if isinstance(structure, Kronecker):
            high, wide = structure.high, structure.wide
            m, n = shape[0] // high, math.prod(shape[1:]) // wide
            total = 0.0
            for t in range(structure.terms):
                a = g[t * m * n + (i // high) * n + j // wide]
                start = structure.terms * m * n + t * high * wide
                total += a * g[start + (i % high) * wide + j % wide]
        else:
            b = structure.block
            toeplitz = isinstance(structure, BlockToeplitz)
            d = i % b - j % b + b - 1 if toeplitz else (i - j) % b
            total = g[i // b, j // b, d]
        weight[(i, c, *place)] = total
    return weight.reshape(structure.shape)


def generators(structure):
    torch.manual_seed(0)
    return torch.randn(structure.generators)


@each
def test_each_entry_is_as_defined(structure):
    g = generators(structure)
    torch.testing.assert_close(structure.weight(g), as_defined(structure, g))


@each
def test_the_product_and_the_rows_are_those_of_the_dense_weight(structure):
    packed = WEIGHTS[type(structure)](structure, Plain.of(generators(structure), "float32"))
    dense = packed.dense().reshape(structure.size)
    x = torch.randn(3, 2, dense.shape[1])
    torch.testing.assert_close(packed.matmul(x), x @ dense.T, rtol=1e-5, atol=1e-5)
    half = packed.matmul(x.bfloat16())
    assert half.dtype is torch.bfloat16
    if len(structure.shape) > 1:
        index = torch.tensor([[0, structure.shape[0] - 1]])
        torch.testing.assert_close(packed.rows(index), packed.dense()[index])


@pytest.mark.parametrize(
    "structure", [s for s in STRUCTURES if not isinstance(s, Kronecker)], ids=str
)
def test_the_fit_is_the_least_squares_solution(structure):
    torch.manual_seed(1)
    weight, count = torch.randn(structure.shape), math.prod(structure.generators)
    units = torch.eye(count).reshape(count, *structure.generators)
    system = torch.stack([structure.weight(u).flatten() for u in units], 1).double()
    solved = torch.linalg.lstsq(system, weight.double().flatten(), driver="gelsd").solution
    wanted = (system @ solved).float().reshape(weight.shape)
    torch.testing.assert_close(structure.weight(structure.fit(weight)), wanted)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if isinstance(s, Kronecker)], ids=str)
def test_no_descent_finds_a_nearer_sum_of_kronecker_products(structure):
    torch.manual_seed(1)
    weight = torch.randn(structure.shape)
    reached = float((structure.weight(structure.fit(weight)) - weight).square().sum())
    found = []
    for _ in range(2):
        g = torch.randn(structure.generators, requires_grad=True)
        optimizer = torch.optim.LBFGS([g], max_iter=150, line_search_fn="strong_wolfe")

        def loss(g=g, optimizer=optimizer):
            optimizer.zero_grad()
            distance = (structure.weight(g) - weight).square().sum()
            distance.backward()
            return distance

        optimizer.step(loss)
        found.append(float(loss().detach()))
    assert reached <= min(found) + 1e-4
    assert min(found) <= reached + 1e-2 * float(weight.square().sum())  # the search was able to


@each
def test_a_weight_of_the_structure_is_kept(structure):
    weight = structure.weight(generators(structure))
    torch.testing.assert_close(structure.weight(structure.fit(weight)), weight)


def test_factors_of_a_kronecker_product_are_equally_large():
    structure = Kronecker(shape=(40, 60), high=4, wide=5)
    a, b = structure.factors(structure.fit(torch.randn(40, 60)))
    assert float(a.square().mean()) == pytest.approx(float(b.square().mean()), rel=1e-4)


@pytest.mark.parametrize("structure", ["circulant", "toeplitz", "kronecker"])
def test_from_scratch_the_weight_keeps_its_size(structure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 64))
    spread = float(net[0].weight.detach().norm())
    site = traced(net, torch.zeros(1, 96)).sites[0]
    StructuredMatrix(structure=structure).apply(net, site)
    assert float(tensor_at(net, site.name).detach().norm()) < 0.6 * spread
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 64))
    StructuredMatrix(structure=structure, start="scratch").apply(net, site)
    assert float(tensor_at(net, site.name).detach().norm()) == pytest.approx(spread, rel=1e-4)


def test_blocks_of_a_convolution_join_channels_at_one_place():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False))
    site = traced(net, torch.zeros(1, 8, 5, 5)).sites[0]
    StructuredMatrix(block=8).apply(net, site)
    weight = tensor_at(net, site.name).detach()
    for place in itertools.product(range(3), range(3)):
        matrix = weight[:, :, *place]
        assert torch.equal(matrix.roll((1, 1), (0, 1)), matrix)


def test_kronecker_takes_divisors_and_no_more_terms_than_there_are():
    net = nn.Sequential(nn.Linear(14, 9, bias=False))
    weight = net[0].weight.detach().clone()
    site = traced(net, torch.zeros(1, 14)).sites[0]
    StructuredMatrix(structure="kronecker", block=4, terms=64).apply(net, site)
    packed = packed_state(net)[site.names]
    assert packed.meta() == {"high": 3, "wide": 2, "terms": 6}
    torch.testing.assert_close(tensor_at(net, site.name).detach(), weight)


def test_later_techniques_recode_the_generators():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32))
    site = traced(net, torch.zeros(1, 64)).sites[0]
    StructuredMatrix(block=8).apply(net, site)
    ShareValues(bits=2).apply(net, site)
    assert core(net, site).shape == (4,)
    packed = packed_state(net)[site.names]
    assert packed.format == "circulant.v1"
    assert packed.nested()["generators"].format == "shared_values.v1"
    assert len(packed.dense().unique()) == 4
    assert packed.nested()["generators"].shape == (4, 8, 8)


def test_fewer_inputs_than_a_block_are_refused():
    net = nn.Sequential(nn.Linear(6, 32))
    site = traced(net, torch.zeros(1, 6)).sites[0]
    message = (
        r"structured_matrix: block must be at most the inputs of a weight, got 8 for the 6 of site "
        r"'0.weight'; take a smaller block, or leave the site out by only='!0.weight'"
    )
    with pytest.raises(RecipeError, match=message):
        StructuredMatrix().apply(net, site)
    StructuredMatrix(block=6).apply(net, site)


def test_terms_are_of_kronecker_products():
    with pytest.raises(RecipeError, match=r"terms count Kronecker products, got terms=2 and stru"):
        StructuredMatrix(terms=2)


@pytest.mark.parametrize("block", [1, 5000])
def test_blocks_out_of_range_are_refused(block):
    with pytest.raises(RecipeError, match=rf"block must lie in \[2, 4096\], got {block}"):
        StructuredMatrix(block=block)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("prune_weights > structured_matrix", "structured_matrix: site '0.weight' is masked, and"),
        ("l0_gates > structured_matrix", "in which no weight can be left out; prune nothing there"),
        ("share_values > structured_matrix", "in 32 numbers already, .* put structured_matrix fir"),
        ("structured_matrix > prune_weights", "prune_weights: .* in 256 numbers already"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_any_work(recipe, reason):
    net = nn.Sequential(nn.Linear(64, 32))
    with pytest.raises(RecipeError, match=reason):
        check(Recipe.parse(recipe), traced(net, torch.zeros(1, 64)))


def test_a_mask_that_is_there_is_refused_by_apply_too():
    net = nn.Sequential(nn.Linear(64, 32))
    site = traced(net, torch.zeros(1, 64)).sites[0]
    PruneWeights(scope="layer").apply(net, site)
    with pytest.raises(RecipeError, match=r"site '0.weight' is masked"):
        StructuredMatrix().apply(net, site)
