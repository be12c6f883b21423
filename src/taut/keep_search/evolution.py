"""An evolutionary search over what to keep.

    child = one gene after the other from either of two parents, then + step · noise on some genes

A parent is the best of a few drawn from the population; the child takes the place of the worst
where it is better. The step's size is drawn for each child between a wide and a fine one, evenly
in its logarithm, so that there is no schedule to set: leaps and refinements go on side by side.

Steady-state genetic algorithm with tournaments (Goldberg, Deb 1991; Whitley 1989). Masks or the
sites' shares evolve, by the problem's genes; every child meets the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.keep_search.problem import Masks, Problem
from taut.keep_search.search import KeepSearch, State, Walk
from taut.technique import option


@dataclass(frozen=True, kw_only=True)
class Evolution(KeepSearch):
    """Search by evolution."""

    name = "evolution"

    population: int = option(16, low=2, high=10_000, help="how many are alive")
    tournament: int = option(3, low=1, high=100, help="how many are drawn for each parent")
    step: float = option(2.0, low=0, high=10, help="of the widest mutation, in logits")
    finest: float = option(0.05, low=0.001, high=1, help="of the finest, as a share of step")
    mutated: float = option(0.5, low=0, high=1, help="share of the genes that a child changes")

    def start(self, problem: Problem, generator: torch.Generator) -> Walk:
        return _Population(self, problem, generator)


class _Population(Walk):
    def __init__(self, options: Evolution, problem: Problem, generator: torch.Generator) -> None:
        self.options, self.problem, self.generator = options, problem, generator
        self.genomes = problem.first(options.population, options.step, generator)
        self.damages: list[float] = []
        self.child = self.genomes[0]

    def ask(self) -> Masks:
        born = len(self.damages) < self.options.population
        self.child = self.genomes[len(self.damages)] if born else self._child()
        return self.problem.candidate(self.child)

    def tell(self, damage: float) -> None:
        if len(self.damages) < self.options.population:
            self.damages.append(damage)
            return
        worst = max(range(len(self.damages)), key=self.damages.__getitem__)
        if damage <= self.damages[worst]:
            self.genomes[worst], self.damages[worst] = self.child, damage

    def _child(self) -> Tensor:
        size, generator = self.problem.size, self.generator
        mother, father = self._parent(), self._parent()
        crossed = torch.where(torch.rand(size, generator=generator) < 0.5, mother, father)
        fineness = float(torch.rand((), generator=generator))
        step = self.options.step * math.pow(self.options.finest, fineness)
        changed = torch.rand(size, generator=generator) < self.options.mutated
        noise = self.problem.noise(1, generator)[0]
        return crossed + step * noise * changed

    def _parent(self) -> Tensor:
        drawn = torch.randint(
            len(self.damages), (self.options.tournament,), generator=self.generator
        )
        return self.genomes[min(drawn.tolist(), key=self.damages.__getitem__)]

    def state(self) -> State:
        return {"genomes": self.genomes, "damages": self.damages}

    def load(self, state: State) -> None:
        self.genomes, self.damages = state["genomes"], state["damages"]
