"""Latencies that can be compared: all networks in one run, in a process that does nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from taut.errors import ExportError, SearchError, did_you_mean
from taut.fastest import ENGINES, latencies
from taut.measure import BATCHES
from taut.modules import clone
from taut.pack import load
from taut.timing import in_turn
from taut.trial import Ground
from taut.tune import run_chosen, tune
from taut.types import Choice, Latency

Timed = tuple[tuple[Latency, ...], tuple[Choice, ...]]
"""A network's latencies, and how its layers ran."""

_log = logging.getLogger("taut")
_ALIASES = {"torch": "pytorch", "onnxruntime": "onnx"}
_KNOWN = ("pytorch", "auto", *ENGINES)


def engine_named(name: str) -> str:
    """An engine by the name that the rest of Taut uses. Raises SearchError for one there is not.

    >>> engine_named("onnxruntime"), engine_named("pytorch")
    ('onnx', 'pytorch')
    """
    found = _ALIASES.get(name, name)
    if found not in _KNOWN:
        near = did_you_mean(name, (*_KNOWN, *_ALIASES))
        raise SearchError(f"search: no engine is named {name!r}{near}")
    return found


def timed_in_turn(
    ground: Ground, files: Sequence[str], *, threads: int = 0, engine: str = "pytorch",
    rounds: int = 5, batches: Sequence[int] = BATCHES,
) -> list[Timed]:  # fmt: skip
    """Latencies of the original, then of each file, at each batch, with how its layers ran.

    In PyTorch they take turns, round after round (see `timing.in_turn`). In another engine each
    runs in a process of its own, one after the other; what the engine does not run has no latency.
    threads: 0 for as many as PyTorch has.
    """
    engine = engine_named(engine)
    nets = [ground.model, *(load(f, clone(ground.model)) for f in files)]
    if engine != "pytorch":
        return [(_in_engine(ground, net, engine, batches, threads), ()) for net in nets]
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        found: list[list[Latency]] = [[] for _ in nets]
        choices: list[list[Choice]] = [[] for _ in nets]
        for batch in batches:
            example = ground.task.example(batch)
            for i, net in enumerate(nets[1:], 1):
                choices[i] += [replace(c, batch=batch) for c in tune(net, example)]
            ready = [partial(_ready, *pair, batch) for pair in zip(nets, choices, strict=True)]
            for mine, taken in zip(
                found, in_turn(ready, example, batch, rounds=rounds), strict=True
            ):
                mine.append(taken)
    finally:
        torch.set_num_threads(before)
    return [(tuple(f), tuple(c)) for f, c in zip(found, choices, strict=True)]


def _ready(net: nn.Module, choices: Iterable[Choice], batch: int) -> nn.Module:
    run_chosen(net, choices, batch)
    return net


def _in_engine(
    ground: Ground, net: nn.Module, engine: str, batches: Sequence[int], threads: int
) -> tuple[Latency, ...]:
    try:
        return latencies(net, ground.task, engine, batches, threads or None)
    except ExportError as error:
        _log.warning("%s", error)
        return ()


def from_json(
    data: Sequence[Mapping[str, Sequence[Mapping[str, object]]]],
) -> list[Timed]:
    """What `to_json` wrote."""
    return [
        (tuple(Latency(**t) for t in one["latencies"]),  # type: ignore[arg-type]
         tuple(Choice(**c) for c in one["choices"]))  # type: ignore[arg-type]
        for one in data
    ]  # fmt: skip


def to_json(
    found: Sequence[Timed],
) -> list[dict[str, list[dict[str, object]]]]:
    """Plain types, for another process."""
    return [{"latencies": [vars(t) for t in ts], "choices": [vars(c) for c in cs]}
            for ts, cs in found]  # fmt: skip
