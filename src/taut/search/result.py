"""What a search found, and what it says about it."""

from __future__ import annotations

from dataclasses import dataclass

from taut.compress import Result
from taut.frontier import Frontier
from taut.goal import Bound, value_of
from taut.types import Candidate


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A trial that came to nothing, and why."""

    number: int
    recipe: str
    why: str


@dataclass(frozen=True, kw_only=True)
class SearchResult(Result):
    """A result whose candidates are all that the search tried; see its `frontier`.

    candidate: the best of the frontier for the goal, in minimize. line: the frontier. lost: trials
    that failed. ruled_out: how many recipes were predicted to be hopeless, and never trained.
    refused: techniques that cannot be searched on this network, and why.
    """

    minimize: str
    line: Frontier
    lost: tuple[Lost, ...]
    ruled_out: int
    refused: dict[str, str]

    @property
    def frontier(self) -> Frontier:
        """The candidates that no other beats, all timed in one run."""
        return self.line

    def explain(self) -> str:
        """In words: what was chosen and why, or what is nearest to the goal and what binds."""
        return "\n".join([*self._chosen(), *self._binding(), *self._tried()])

    def _chosen(self) -> list[str]:
        assert self.goal is not None
        if self.met:
            keep = sum(self.goal.met(c.measurement, self.original) for c in self.candidates)
            return [
                f"Of {len(self.candidates)} candidates {keep} keep the goal {self.goal}; "
                f"the least {self.minimize} among them: {self.candidate.recipe}"
            ]
        return [
            f"None of {len(self.candidates)} candidates keeps the goal {self.goal}.",
            f"The nearest: {self.candidate.recipe}",
        ]

    def _binding(self) -> list[str]:
        assert self.goal is not None
        lines = []
        for v in self.verdicts:
            word = "kept" if v.holds else "binds"
            line = f"  {v.bound.text}: {word}; asked {v.bound.relation} {v.asked:,.6g}, " + (
                f"reached {v.reached:,.6g}"
            )
            if not v.holds:
                line += f"; {self._alone(v.bound)}"
            lines.append(line)
        return lines

    def _alone(self, bound: Bound) -> str:
        """What the candidates reach on a bound that the nearest breaks, whatever the others say."""

        def reached(c: Candidate) -> float:
            return value_of(bound.axis, c.measurement)

        best = (min if bound.relation == "<=" else max)(self.candidates, key=reached)
        if not bound.holds(best.measurement, self.original):
            if reached(best) == reached(self.candidate):
                return "no candidate does, and none comes nearer"
            return f"no candidate does, the best reaches {reached(best):,.6g} by {best.recipe}"
        assert self.goal is not None
        missed = [b.text for b in self.goal.bounds if not b.holds(best.measurement, self.original)]
        return f"those that do break {' and '.join(missed)}, as {best.recipe}"

    def _tried(self) -> list[str]:
        lines = []
        if self.ruled_out:
            lines.append(f"{self.ruled_out} recipes were predicted to be hopeless and not trained.")
        lines += [f"Trial {x.number} came to nothing: {x.why} ({x.recipe})" for x in self.lost]
        return lines
