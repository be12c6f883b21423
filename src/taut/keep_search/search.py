"""The one interface of all searches: ask for a candidate, measure it, tell the damage.

Every step is one measurement, so searches of equal `evaluations` cost the same, and each can be
stopped after any step and taken up from its state as if nothing had happened.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.errors import RecipeError, RunError
from taut.keep_search.problem import Masks, Problem, spread
from taut.technique import Step

State = dict[str, Any]
"""Plain values and tensors: `torch.save` writes it, `torch.load(weights_only=True)` reads it."""

_log = logging.getLogger("taut")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best candidate of a search.

    masks: for each site which of its weights are kept, bool [*shape]. kept: for each site the
    share of its units. cost: MACs or parameters of what is kept. trail: the least damage after
    each evaluation, a function of the problem, the options and the seed.
    """

    masks: dict[str, Tensor]
    kept: dict[str, float]
    damage: float
    cost: float
    trail: tuple[float, ...]


class Walk(ABC):
    """One search under way."""

    @abstractmethod
    def ask(self) -> Masks:
        """The candidate to measure next."""

    @abstractmethod
    def tell(self, damage: float) -> None:
        """The damage of the candidate that was asked for."""

    @abstractmethod
    def state(self) -> State:
        """All that `load` needs to go on from here."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Go on from a state."""


@dataclass(frozen=True, kw_only=True)
class KeepSearch(Step, ABC):
    """A way to look for what to keep. Its options are checked when it is made."""

    @abstractmethod
    def start(self, problem: Problem, generator: torch.Generator) -> Walk:
        """A search that has measured nothing yet. All its chance comes from the generator."""

    def search(
        self, problem: Problem, *, evaluations: int = 200, seed: int = 0,
        state: State | None = None, on_step: Callable[[State], None] | None = None,
    ) -> Found:  # fmt: skip
        """The best of `evaluations` candidates, those of an earlier part of the search included.

        The same problem, options and seed give the same answer. state: what on_step was given in
        the search to be taken up; the end is then the same as without a break. Raises RecipeError
        for less than one evaluation and RunError for a state of another search or problem.
        """
        if evaluations < 1:
            raise RecipeError(f"{self.name}: evaluations must be at least 1, got {evaluations}")
        generator = torch.Generator().manual_seed(seed)
        walk = self.start(problem, generator)
        best, trail = None, list[float]()
        identity = {"search": str(self), "problem": problem.fingerprint(), "seed": seed}
        if state is not None:
            for what, ours in identity.items():
                theirs = state.get(what)
                if theirs != ours:
                    raise RunError(
                        f"{self.name}: the state to go on from belongs to another {what}: "
                        f"{theirs!r}, not {ours!r}; take this one's own, or start anew"
                    )
            best, trail = tuple(state["best"]), list(state["trail"])
            generator.set_state(state["random"])
            walk.load(copy.deepcopy(state["walk"]))
        while len(trail) < evaluations:
            masks = walk.ask()
            damage = problem.damage(masks)
            walk.tell(damage)
            if best is None or damage < trail[-1]:
                best = masks
                _log.info("%s: %d: damage %.4g", self.name, len(trail) + 1, damage)
            trail.append(min(damage, trail[-1]) if trail else damage)
            if on_step is not None:
                own = {"random": generator.get_state(), "best": best, "trail": tuple(trail)}
                on_step({**identity, **own, "walk": copy.deepcopy(walk.state())})
        assert best is not None
        chosen = list(zip(problem.layers, best, strict=True))
        return Found(
            masks={x.name: spread(m, x.shape) for x, m in chosen},
            kept={x.name: float(m.double().mean()) for x, m in chosen},
            damage=trail[-1],
            cost=problem.cost(best),
            trail=tuple(trail),
        )
