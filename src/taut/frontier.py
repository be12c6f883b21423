"""The frontier: the candidates that no other candidate beats, and the best of them for a goal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from taut.errors import GoalError, RunError, did_you_mean
from taut.goal import AXES, Goal, value_of
from taut.types import Candidate, Direction, Measurement, frontier

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Frontier(Sequence[Candidate]):
    """Candidates that no other beats on bytes, latency and score at once, smallest first.

    original: what relative bounds refer to.
    """

    candidates: tuple[Candidate, ...]
    original: Measurement
    better: Direction

    @classmethod
    def of(cls, tried: Iterable[Candidate], original: Measurement, better: Direction) -> Frontier:
        """The frontier of all that was tried."""
        return cls(tuple(frontier(tried, better)), original, better)

    @overload
    def __getitem__(self, index: int) -> Candidate: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Candidate]: ...
    def __getitem__(self, index: int | slice) -> Candidate | Sequence[Candidate]:
        return self.candidates[index]

    def __len__(self) -> int:
        return len(self.candidates)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.candidates)

    def best(self, goal: str | Goal, minimize: str = "bytes") -> Candidate:
        """Of the candidates that keep every bound the least on one axis; else the nearest.

        goal: `"bytes<=5%, score>=-0.5%"`, another one than the search's if you like. Raises
        GoalError for a goal or an axis that there is not, RunError for an empty frontier.
        """
        check_axis(minimize)
        goal = Goal.parse(goal, self.better) if isinstance(goal, str) else goal
        if not self.candidates:
            raise RunError("the frontier is empty: no trial came to an end; see the run's log.txt")

        def rank(candidate: Candidate) -> tuple[float, float]:
            got = candidate.measurement
            cost = value_of(minimize, got)
            worse = -cost if minimize == "score" and self.better == "higher" else cost
            return goal.distance(got, self.original), worse

        return min(self.candidates, key=rank)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a candidate: recipe, epochs, every axis of goals, latency's spread, file.

        Raises RunError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise RunError(
                "to_dataframe needs pandas, which is not installed: pip install 'taut[pandas]'"
            ) from error
        return pandas.DataFrame(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """The same as plain dictionaries."""
        return [
            {
                "recipe": c.recipe, "epochs": c.epochs,
                **{axis: value_of(axis, c.measurement) for axis in AXES},
                "latency_iqr": t.iqr_ms if (t := c.measurement.latency()) else float("nan"),
                "path": c.path,
            }
            for c in self.candidates
        ]  # fmt: skip


def check_axis(axis: str) -> None:
    """Raise GoalError for what is no axis of goals."""
    if axis not in AXES:
        raise GoalError(f"no axis is named {axis!r}{did_you_mean(axis, AXES)}")
