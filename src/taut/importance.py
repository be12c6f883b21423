"""How much a weight matters: scores by which pruning ranks, each an estimate of the damage.

    magnitude  w²                        nothing but the weight
    taylor     (g · w)²                  g: the mean gradient (Molchanov et al., CVPR 2019)
    obd        ½ · h · w²                h: the Fisher information, mean of g², as the Hessian's
                                         diagonal (LeCun, Denker, Solla: Optimal Brain Damage, 1989)
    wanda      w² · Σ x² / E             the square of |w| · ‖x‖₂ (Sun et al., ICLR 2024); it is
                                         compared within each output row
    obs        ½ · w² / [H⁻¹]ᵢᵢ          H: moments of the inputs, weighed by row (second_order.py)
    fisher     ½ · w² / [F⁻¹]ᵢᵢ          F: blocks of the empirical Fisher matrix (second_order.py)
    random     uniform                   drawn from PyTorch's generator, so its seed governs them

All but the last are of second order in w, so that scores of one site can be added up. wanda knows
only its layer's outputs: E, their energy as if the inputs were not correlated, makes sites
comparable. Shapes: as the weight's. Where we differ: the Hessian of OBD is the empirical Fisher
matrix, from gradients of single examples; Wanda's scores are squared and over E, which keeps their
order within a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taut.pattern import NOfM, Pattern, largest
from taut.products import Product
from taut.second_order import disjoint, fisher_refit, fisher_scores, obs, obs_scores
from taut.statistics import Statistics
from taut.types import Site

FISHER_WIDTH = 64
"""Weights of one block of the Fisher matrix."""


def magnitude(weights: Tensor) -> Tensor:
    """w²."""
    return weights.double().square()


def taylor(weights: Tensor, gradient: Tensor) -> Tensor:
    """(g · w)²: the loss that removing one weight adds, to first order, whatever its sign."""
    return (weights.double() * gradient).square()


def obd(weights: Tensor, curvature: Tensor) -> Tensor:
    """½ · h · w²: the loss that removing one weight adds at a minimum, without correlations."""
    return 0.5 * curvature.double() * weights.double().square()


def wanda(weights: Tensor, products: Sequence[Product]) -> Tensor:
    """w² · Σ x² / E: the share of the outputs' energy that one weight makes, as if by itself."""
    seen = torch.zeros(weights.numel(), dtype=torch.float64)
    for product in products:  # a tied weight may be in several
        seen[product.index.cpu()] += product.squares.cpu()
    scores = weights.double().square() * seen.reshape(weights.shape)
    return scores / scores.sum().clamp(min=1e-300)


def random(weights: Tensor) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(weights.shape, dtype=torch.float64)


def by_row(scores: Tensor, products: Sequence[Product]) -> Tensor:
    """Scores that rank each weight by its place in its output row, and only then by score.

    The largest of all then hold the same share of every row: a row is what one output sums up.
    """
    ranked = torch.full_like(scores, -2.0).flatten()
    flat = scores.flatten()
    within = flat / flat.max().clamp(min=torch.finfo(flat.dtype).tiny)
    for product in disjoint(products, scores.numel()):
        index = product.index.cpu()
        place = flat[index].argsort(dim=1, descending=True, stable=True).argsort(1)
        ranked[index] = (within[index] - 1 - place) / index.shape[1]
    return ranked.reshape(scores.shape)


Score = Callable[[Tensor, Site, Statistics], Tensor]

CRITERIA: dict[str, Score] = {
    "magnitude": lambda w, site, facts: magnitude(w),
    "taylor": lambda w, site, facts: taylor(w, facts.gradients(site).mean),
    "obd": lambda w, site, facts: obd(w, facts.gradients(site).squares),
    "obs": lambda w, site, facts: obs_scores(
        w, facts.products(site), facts.gradients(site).squares
    ),
    "fisher": lambda w, site, facts: fisher_scores(w, facts.fisher(site, FISHER_WIDTH)),
    "wanda": lambda w, site, facts: wanda(w, facts.products(site, diagonal=True)),
    "random": lambda w, site, facts: random(w),
}
"""The score that each criterion gives the weights of a site, the larger the more it matters."""


def choose(
    criterion: str, weights: Tensor, allowed: Tensor, site: Site, statistics: Statistics,
    kept: int, pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What stays of a site's weights by a criterion: the mask, and the weights to go on with.

    allowed: bool, what an earlier mask left; kept: how many stay, by a pattern at most.
    The second-order criteria, obs and fisher, adjust the weights that stay for those that go.
    """
    if criterion == "obs":
        squares = statistics.gradients(site).squares
        return obs(weights, statistics.products(site), squares, allowed, kept, pattern)
    scores = CRITERIA[criterion](weights, site, statistics)
    if criterion == "wanda" and not isinstance(pattern, NOfM):
        each = pattern.compared(scores) if pattern else scores
        scores = by_row(each, statistics.products(site, diagonal=True))
    mask = largest(scores, kept, allowed, pattern)
    if criterion == "fisher":
        return mask, fisher_refit(weights, statistics.fisher(site, FISHER_WIDTH), mask)
    return mask, weights
