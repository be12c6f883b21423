"""Goals: bounds that a compressed network must keep, relative to the original or absolute.

As text they read

    bytes<=5%, score>=-0.5%      5 % of the original's bytes, at most 0.5 % of its score lost
    bytes<=40kB, latency<=2ms    absolute bounds
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from taut.errors import GoalError, did_you_mean
from taut.types import Direction, Measurement

_UNITS = {
    "bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2, "": 1.0},
    "memory": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2},
    "latency": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "parameters": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "macs": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "score": {"": 1.0},
}
AXES = tuple(_UNITS)
_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_BOUND = re.compile(rf"\s*(\w+)\s*(<=|>=|==|<|>|=)\s*({_NUMBER})\s*(\S*)\s*")


def value_of(axis: str, measurement: Measurement) -> float:
    """A measurement on an axis of goals, in its plain unit (bytes, ms, counts)."""
    if axis == "latency":
        latency = measurement.latency()
        return latency.median_ms if latency else float("inf")
    names = {"bytes": "size_bytes", "memory": "peak_memory_bytes", "macs": "effective_macs",
             "parameters": "nonzero_parameters", "score": "score"}  # fmt: skip
    return float(getattr(measurement, names[axis]))


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One bound. A relative value is a fraction of the original (of a change, for the score)."""

    axis: str
    relation: str
    value: float
    relative: bool
    text: str

    def limit(self, original: Measurement) -> float:
        """The bound in plain units, given the original."""
        if not self.relative:
            return self.value
        base = value_of(self.axis, original)
        return base + abs(base) * self.value if self.axis == "score" else base * self.value

    def holds(self, measurement: Measurement, original: Measurement) -> bool:
        reached, limit = value_of(self.axis, measurement), self.limit(original)
        if not math.isfinite(reached):
            return False  # it was not measured
        return reached <= limit if self.relation == "<=" else reached >= limit

    def excess(self, measurement: Measurement, original: Measurement) -> float:
        """How far the bound is broken: 0 where it holds, 1 a doubling (or 1 % of the score)."""
        if self.holds(measurement, original):
            return 0.0
        gap = abs(value_of(self.axis, measurement) - self.limit(original))
        unit = abs(value_of(self.axis, original)) * 0.01 if self.axis == "score" else None
        excess = gap / max(unit if unit is not None else self.limit(original), 1e-12)
        return math.inf if math.isnan(excess) else excess


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was asked of one axis, and what was reached."""

    bound: Bound
    asked: float
    reached: float
    holds: bool


@dataclass(frozen=True)
class Goal:
    """Bounds, joined by commas. Between networks that keep them all the smaller file wins."""

    bounds: tuple[Bound, ...]

    def __str__(self) -> str:
        return ", ".join(b.text for b in self.bounds)

    @classmethod
    def parse(cls, text: str, better: Direction = "higher") -> Goal:
        """Read `axis<=value[unit], …`. Axes: bytes, score, latency, macs, parameters, memory.

        Raises GoalError for what does not parse, contradicts itself or can never hold.
        """
        parts = [p for p in text.split(",") if p.strip()]
        if not parts:
            raise GoalError("a goal needs at least one bound, like 'bytes<=5%, score>=-0.5%'")
        bounds = tuple(_bound(p, better) for p in parts)
        axes = [b.axis for b in bounds]
        twice = sorted({a for a in axes if axes.count(a) > 1})
        if twice:
            raise GoalError(f"a goal bounds each axis once, got {twice[0]!r} twice in {text!r}")
        return cls(bounds)

    def bound(self, axis: str) -> Bound | None:
        return next((b for b in self.bounds if b.axis == axis), None)

    def verdicts(self, measurement: Measurement, original: Measurement) -> list[Verdict]:
        """Each bound with what was asked and what was reached."""
        return [
            Verdict(
                bound=b,
                asked=b.limit(original),
                reached=value_of(b.axis, measurement),
                holds=b.holds(measurement, original),
            )
            for b in self.bounds
        ]

    def met(self, measurement: Measurement, original: Measurement) -> bool:
        return all(b.holds(measurement, original) for b in self.bounds)

    def distance(self, measurement: Measurement, original: Measurement) -> float:
        """0 where every bound holds, else the sum of the bounds' excesses."""
        return sum(b.excess(measurement, original) for b in self.bounds)


def is_goal(text: str) -> bool:
    """Whether a text reads as a goal rather than as a recipe.

    >>> is_goal("bytes<=5%"), is_goal("prune_weights(sparsity=0.9) > recover()")
    (True, False)
    """
    return "(" not in text and re.search(r"[<=]|>\s*[-+.\d]", text) is not None


def _bound(text: str, better: Direction) -> Bound:
    match = _BOUND.fullmatch(text)
    if match is None:
        raise GoalError(f"a bound is like 'bytes<=5%' or 'latency<=2ms', got {text.strip()!r}")
    axis, relation, number, unit = match.groups()
    if axis not in _UNITS:
        raise GoalError(f"no axis is named {axis!r}{did_you_mean(axis, _UNITS)}")
    right = ">=" if axis == "score" and better == "higher" else "<="
    if relation != right:
        why = f" ({better} is better)" if axis == "score" else ""
        raise GoalError(f"{axis} is bounded by {right}{why}, got {text.strip()!r}")
    value = float(number)
    if axis == "score" and unit == "%" and value and number[0] not in "+-":
        like = "score>=-0.5%" if right == ">=" else "score<=+0.5%"
        raise GoalError(
            f"a percentage of the score is a change and needs its sign, like {like}, got "
            f"{text.strip()!r}; bound the score itself without %"
        )
    if unit == "%":
        value /= 100.0
    elif unit not in _UNITS[axis]:
        known = ", ".join(u for u in (*_UNITS[axis], "%") if u)
        raise GoalError(f"{axis} has no unit {unit!r}; known: {known}")
    else:
        value *= _UNITS[axis][unit]
    if not math.isfinite(value):
        raise GoalError(f"{axis} must be bounded by a finite number, got {text.strip()!r}")
    if axis != "score" and value <= 0:
        raise GoalError(f"{axis} must stay above 0, got {text.strip()!r}; nothing can reach that")
    return Bound(axis=axis, relation=relation, value=value, relative=unit == "%", text=text.strip())
