"""A particle filter over what to keep: particles are weighted by their damage, resampled, moved.

    w[i] ∝ exp(-b · damage[i]),    1 / Σ w² = effective · particles
    x'   = mean + sqrt(1 - h²) · (x - mean) + h · std · noise

x: the genomes, resampled in proportion to w (systematically); mean and std: of the population
under w; b: found by bisection; h: `noise`. The move keeps the population's mean and variance, so
that it closes in on what does little damage as fast as the weights tell, and no faster.

Anwar, Hwang, Sung: Structured Pruning of Deep Convolutional Neural Networks (2015): particles are
masks, weighted by misclassification, resampled, perturbed. Where we differ: the weights are
tempered to an effective number of particles, so that any damage will do, a loss as well as a rate;
the move is the kernel of Liu and West (Combined parameter and state estimation in simulation-based
filtering, 2001), which needs no schedule; every particle meets the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.keep_search.problem import Masks, Problem
from taut.keep_search.search import KeepSearch, State, Walk
from taut.technique import option


@dataclass(frozen=True, kw_only=True)
class Particles(KeepSearch):
    """Search by a particle filter."""

    name = "particles"

    particles: int = option(20, low=2, high=10_000, help="how many there are")
    effective: float = option(0.3, low=0.01, high=1, help="share that survives, by weight")
    noise: float = option(0.8, low=0, high=1, help="share of the population's spread made anew")
    spread: float = option(2.0, low=0, high=10, help="of the first particles, in logits")

    def start(self, problem: Problem, generator: torch.Generator) -> Walk:
        return _Filter(self, problem, generator)


class _Filter(Walk):
    def __init__(self, options: Particles, problem: Problem, generator: torch.Generator) -> None:
        self.options, self.problem, self.generator = options, problem, generator
        self.genomes = problem.first(options.particles, options.spread, generator)
        self.damages: list[float] = []

    def ask(self) -> Masks:
        return self.problem.candidate(self.genomes[len(self.damages)])

    def tell(self, damage: float) -> None:
        self.damages.append(damage)
        if len(self.damages) < self.options.particles:
            return
        w = weights(torch.tensor(self.damages, dtype=torch.float64), self.options.effective)
        mean = w @ self.genomes
        std = (w @ (self.genomes - mean).square()).sqrt()
        chosen = self.genomes[resample(w, self.generator)]
        h = self.options.noise
        noise = self.problem.noise(len(chosen), self.generator)
        self.genomes = mean + (1 - h * h) ** 0.5 * (chosen - mean) + h * std * noise
        self.damages = []

    def state(self) -> State:
        return {"genomes": self.genomes, "damages": self.damages}

    def load(self, state: State) -> None:
        self.genomes, self.damages = state["genomes"], state["damages"]


def weights(damages: Tensor, effective: float) -> Tensor:
    """Weights [n] of sum one, exp(-b · damage) with the b of `effective` · n effective particles.

    The effective number is 1 / Σ w². Infinite damage weighs nothing; where more than that many are
    equally good, those share the weight.
    """
    worse = damages.double() - damages.min()
    worse = worse.nan_to_num(nan=0.0) if bool(damages.isinf().all()) else worse
    scale = worse[worse.isfinite()].max().clamp(min=1e-300)
    low, high = -30.0, 60.0  # of log2(b · scale)
    for _ in range(60):
        middle = (low + high) / 2
        w = torch.softmax(-(2.0**middle) * worse / scale, 0)
        enough = 1 / float(w.square().sum()) >= effective * len(w)
        low, high = (middle, high) if enough else (low, middle)
    return torch.softmax(-(2.0**low) * worse / scale, 0)


def resample(w: Tensor, generator: torch.Generator) -> Tensor:
    """Systematic resampling: indices [n], each i floor(n · w[i]) or ceil(n · w[i]) times."""
    n = len(w)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    places = (torch.arange(n, dtype=torch.float64) + offset) / n
    return torch.searchsorted(w.cumsum(0), places, right=True).clamp(max=n - 1)
