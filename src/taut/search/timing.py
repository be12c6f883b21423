"""Latencies that can be compared: every network in turn, in a process that does nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from taut.errors import SearchError, did_you_mean
from taut.measure import BATCHES, latency
from taut.modules import clone
from taut.pack import load
from taut.trial import Ground
from taut.tune import run_chosen, tune
from taut.types import Choice, Latency

ENGINES = ("torch",)
_SECONDS = 0.05  # of one block; the rounds repeat it


def check_engine(engine: str) -> None:
    """Raise SearchError for an engine that cannot be timed here."""
    if engine not in ENGINES:
        raise SearchError(f"search: no engine is named {engine!r}{did_you_mean(engine, ENGINES)}")


def timed_in_turn(
    ground: Ground, files: Sequence[str], *, threads: int = 0, engine: str = "torch",
    rounds: int = 5, batches: Sequence[int] = BATCHES,
) -> list[tuple[tuple[Latency, ...], tuple[Choice, ...]]]:  # fmt: skip
    """Latencies of the original, then of each file, at each batch, with how its layers ran.

    In each round every network is timed once; each figure is the median of the rounds' medians,
    its spread their interquartile range, or the median one within a round where that is wider.
    threads: 0 for as many as PyTorch has.
    """
    check_engine(engine)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        nets = [ground.model, *(load(f, clone(ground.model)) for f in files)]
        found: list[list[Latency]] = [[] for _ in nets]
        choices: list[list[Choice]] = [[] for _ in nets]
        for batch in batches:
            example = ground.task.example(batch)
            for i, net in enumerate(nets[1:], 1):
                choices[i] += [replace(c, batch=batch) for c in tune(net, example)]
            rows = [[_once(net, choices[i], ground, batch) for i, net in enumerate(nets)]
                    for _ in range(rounds)]  # fmt: skip
            for i, each in enumerate(zip(*rows, strict=True)):
                found[i].append(_together(each))
    finally:
        torch.set_num_threads(before)
    return [(tuple(f), tuple(c)) for f, c in zip(found, choices, strict=True)]


def _once(net: nn.Module, choices: Sequence[Choice], ground: Ground, batch: int) -> Latency:
    run_chosen(net, choices, batch)
    return latency(net, ground.task.example(batch), batch, _SECONDS)


def _together(rounds: Sequence[Latency]) -> Latency:
    medians = [r.median_ms for r in rounds]
    within = statistics.median(r.iqr_ms for r in rounds)
    spread = 0.0
    if len(medians) > 1:
        low, _, high = statistics.quantiles(medians, n=4, method="inclusive")
        spread = high - low
    return replace(
        rounds[0], median_ms=statistics.median(medians), iqr_ms=max(within, spread),
        runs=sum(r.runs for r in rounds),
    )  # fmt: skip


def from_json(
    data: Sequence[Mapping[str, Sequence[Mapping[str, object]]]],
) -> list[tuple[tuple[Latency, ...], tuple[Choice, ...]]]:
    """What `to_json` wrote."""
    return [
        (tuple(Latency(**t) for t in one["latencies"]),  # type: ignore[arg-type]
         tuple(Choice(**c) for c in one["choices"]))  # type: ignore[arg-type]
        for one in data
    ]  # fmt: skip


def to_json(
    found: Sequence[tuple[Sequence[Latency], Sequence[Choice]]],
) -> list[dict[str, list[dict[str, object]]]]:
    """Plain types, for another process."""
    return [{"latencies": [vars(t) for t in ts], "choices": [vars(c) for c in cs]}
            for ts, cs in found]  # fmt: skip
