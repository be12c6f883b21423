"""The plain facts that Taut passes around: frozen, with units in their names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

Kind = Literal["linear", "conv", "embedding", "lstm", "gru", "rnn", "attention", "vector"]
Direction = Literal["higher", "lower"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where a weight lives: `encoder.rnn.weight_hh_l0`, its kind, shape and work.

    macs are multiply-accumulates for one example. aliases are further names of the same tensor
    (a tied weight is one site). What is no layer's weight is a vector, of any shape: biases, norms,
    tables of positions. Most techniques leave them alone.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    macs: int
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a site is predicted to take: bytes of the file, multiply-accumulates per example."""

    size_bytes: float
    macs: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one forward: median and interquartile range over `runs` timed blocks."""

    batch: int
    threads: int
    engine: str
    median_ms: float
    iqr_ms: float
    runs: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one packed layer runs, and the times that decided it."""

    layer: str
    batch: int
    threads: int
    packed_ms: float
    dense_ms: float

    @property
    def runs_packed(self) -> bool:
        return self.packed_ms <= self.dense_ms


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a network was measured to be. Size is the size of the written file.

    The original network has no .taut file: its size is that of its tensors, written plainly.
    macs count every position of a weight; effective_macs only those whose weight is not zero.
    peak_memory_bytes: weights plus the most that one forward at batch 1 allocates on top. choices:
    how each packed layer ran when the latency at that batch was taken.
    """

    score: float
    size_bytes: int
    parameters: int
    nonzero_parameters: int
    macs: int
    effective_macs: int
    latencies: tuple[Latency, ...] = ()
    peak_memory_bytes: int = 0
    choices: tuple[Choice, ...] = ()

    def latency(self, batch: int | None = None) -> Latency | None:
        """The latency at a batch (by default the smallest one measured), in the fastest engine."""
        at = [x for x in self.latencies if batch is None or x.batch == batch]
        return min(at, key=lambda x: x.batch) if at else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        """Read it back. Records from before layers were tuned have no choices."""
        latencies = tuple(Latency(**x) for x in data["latencies"])
        choices = tuple(Choice(**x) for x in data.get("choices", ()))
        return cls(**{**data, "latencies": latencies, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class LeftAlone:
    """A site that a step was predicted to make larger, and that it therefore left as it was."""

    step: str
    site: str
    before_bytes: int
    after_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.step}: {self.site} would grow from {self.before_bytes:,} to "
            f"{self.after_bytes:,} bytes; left as it is"
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with its measurement and its file. left: the sites that a step left alone."""

    recipe: str
    measurement: Measurement
    path: str
    epochs: float = 0.0
    left: tuple[LeftAlone, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        """Read it back. Records from before sites were left alone name none."""
        left = tuple(LeftAlone(**x) for x in data.get("left", ()))
        measurement = Measurement.from_json(data["measurement"])
        return cls(**{**data, "measurement": measurement, "left": left})


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of a recovery, as the log and the report show it."""

    step: int
    epoch: int
    loss: float
    score: float
    learning_rate: float
    seconds: float = field(compare=False)


def frontier(candidates: Iterable[Candidate], better: Direction) -> list[Candidate]:
    """The candidates that no other beats on bytes, latency and score at once, smallest first.

    Latencies within a tenth of each other count as equal: they are measured, and machines are
    noisy. What was not measured beats nothing.
    """

    everyone = list(candidates)
    if not everyone:
        return []
    axes = [_axes(c, better) for c in everyone]
    sizes, times, worse = np.array(axes).T

    def beaten(i: int) -> bool:
        no_worse = (sizes <= sizes[i]) & (times <= 1.1 * times[i]) & (worse <= worse[i])
        ahead = (sizes < sizes[i]) | (worse < worse[i]) | (1.1 * times < times[i])
        return bool((no_worse & ahead).any())

    kept = [i for i in range(len(everyone)) if not beaten(i)]
    return [everyone[i] for i in sorted(kept, key=axes.__getitem__)]


def _axes(c: Candidate, better: Direction) -> tuple[float, float, float]:
    latency = c.measurement.latency()
    worse = -c.measurement.score if better == "higher" else c.measurement.score
    worse = math.inf if math.isnan(worse) else worse
    return c.measurement.size_bytes, latency.median_ms if latency else math.inf, worse
