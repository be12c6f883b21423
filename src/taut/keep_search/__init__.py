"""Search for what to keep: particles, evolution and reinforcement learning behind one interface.

    problem = Problem.of(model, sites, measure, kept=0.5, cost="macs", unit="filter")
    found = Evolution(population=16).search(problem, evaluations=200, seed=0)

Nothing is trained while a search runs: a candidate's damage is that of the network right after the
cut. `found.masks` says which weights stay. `prune_weights(scope="evolution")` searches how many
each layer keeps; what magnitude alone would keep is `problem.by_score()`.
"""

from taut.keep_search.evolution import Evolution
from taut.keep_search.particles import Particles
from taut.keep_search.problem import Layer, Problem
from taut.keep_search.reinforcement import Agent, Reinforcement
from taut.keep_search.search import Found, KeepSearch

SEARCHES: dict[str, KeepSearch] = {s.name: s for s in (Particles(), Evolution(), Reinforcement())}
"""Every search with its default options, by name."""

__all__ = [
    "SEARCHES", "Agent", "Evolution", "Found", "KeepSearch", "Layer", "Particles", "Problem",
    "Reinforcement",
]  # fmt: skip
