"""What the report of a run tells: every number, before anything is drawn."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from taut.angles import RowAngles, angles
from taut.answers import Answers, answers
from taut.compress import Result
from taut.errors import RunError
from taut.frontier_data import CandidateRow, Curve, candidate_rows, curves
from taut.goal import value_of
from taut.layers import Packed
from taut.modules import owner, tensor_at, tensor_or_none
from taut.pack import FileSummary, StoredTensor, inspect
from taut.packed import PackedWeight
from taut.recipe import Recipe
from taut.task import Task
from taut.types import Choice, Direction, EpochRecord, Latency, LeftAlone, Measurement

BINS = 64
Unit = Literal["score", "bytes", "count", "ms"]


# ---- what the report tells ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One quantity before and after. spreads: interquartile ranges, where it was timed."""

    label: str
    detail: str = ""
    unit: Unit
    better: Direction = "lower"
    before: float | None
    after: float | None
    before_spread: float | None = None
    after_spread: float | None = None

    @property
    def change(self) -> Literal["better", "worse", "same", "unknown"]:
        """Better or worse only by more than the wider of the two spreads."""
        if self.before is None or self.after is None or math.isnan(self.after - self.before):
            return "unknown"
        gain = self.after - self.before if self.better == "higher" else self.before - self.after
        if abs(gain) <= max(self.before_spread or 0.0, self.after_spread or 0.0):
            return "same"
        return "better" if gain > 0 else "worse"


@dataclass(frozen=True, kw_only=True)
class BoundRow:
    """One bound of the goal. limit, before and reached: in the axis's plain unit."""

    axis: str
    text: str
    relation: str
    unit: Unit
    limit: float
    before: float
    reached: float
    holds: bool


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """One part of a stored tensor: its coded bytes, and those of a plain Huffman code."""

    name: str
    size_bytes: float
    huffman_bytes: float


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of the file. before_bytes: of the original tensor, written plainly.

    left: the steps that left it alone, since they would have made it larger.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    format: str
    before_bytes: int
    after_bytes: float
    huffman_bytes: float
    bits_per_weight: float
    parts: tuple[PartRow, ...]
    left: tuple[LeftAlone, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """How one packed layer runs: the faster way of the two. gain: how many times faster it is."""

    name: str
    packed_ms: float
    dense_ms: float
    runs_packed: bool
    gain: float


@dataclass(frozen=True, kw_only=True)
class LayersAt:
    """How the packed layers run at one batch and number of threads, in the order of the calls."""

    batch: int
    threads: int
    packed: int
    layers: tuple[LayerRow, ...]


@dataclass(frozen=True, kw_only=True)
class SiteWeights:
    """A site's weights before and after, counted in the same bins.

    edges: [bins + 1]; before: [bins], all weights; after: [bins], those that are not zero; zeros:
    the others. centroids: the values that weights share, ascending, and how many weights have
    each; empty where none are shared. Weights that are not finite are not counted.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    zeros: int
    centroids: tuple[float, ...]
    centroid_counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SensitivityRow:
    """The loss as one weight of the original alone is pruned; None where it is no number."""

    name: str
    baseline: float
    sparsities: tuple[float, ...]
    losses: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class EngineRow:
    """One forward in one engine at one batch, before and after, where it was timed."""

    engine: str
    batch: int
    threads: int
    before_ms: float | None
    before_iqr_ms: float | None
    after_ms: float | None
    after_iqr_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The epochs of one recovery, counted through the recipe, and the techniques before it."""

    first: int
    last: int
    techniques: str
    recovery: str


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Every number of the report, before anything is drawn."""

    task: str
    network: str
    better: Direction
    score_is_fraction: bool
    score_before: float
    score_after: float
    before_bytes: int
    after_bytes: int
    overhead_bytes: int
    rows: tuple[Row, ...]
    goal: str | None
    bounds: tuple[BoundRow, ...]
    candidates: tuple[CandidateRow, ...]
    tried: int
    curves: tuple[Curve, ...]
    tensors: tuple[TensorRow, ...]
    layers: tuple[LayersAt, ...]
    engines: tuple[EngineRow, ...]
    sensitivities: tuple[SensitivityRow, ...]
    answers: Answers | None
    weights: tuple[SiteWeights, ...]
    angles: tuple[RowAngles, ...]
    epochs: tuple[EpochRecord, ...]
    phases: tuple[Phase, ...]
    recipe: str
    command: str
    chooses_by: str
    versions: Mapping[str, str]
    machine: Mapping[str, str]

    @property
    def ratio(self) -> float:
        """How many times smaller the written file is than the original's tensors."""
        return self.before_bytes / self.after_bytes

    @property
    def met(self) -> bool:
        return all(b.holds for b in self.bounds)


# ---- computing it ---------------------------------------------------------------------------


def report_data(result: Result, original_model: nn.Module, task: Task | None = None) -> ReportData:
    """Gather what the report of a finished run tells.

    original_model: the network that was compressed, for its weights. task: to tell which answers
    changed, by one pass over its test data. Raises RunError where the run's folder lacks its record
    or holds another file than the one measured.
    """
    record = _record(result.folder)
    path = result.folder / "net.taut"
    summary = inspect(path)
    original, reached = result.original, result.measurement
    if summary.size_bytes != reached.size_bytes:
        raise RunError(
            f"{path} has {summary.size_bytes:,} bytes, not the {reached.size_bytes:,} that were "
            "measured; it was replaced since, run compress with fresh=True (--fresh)"
        )
    better = result.better
    candidates = candidate_rows(
        result.candidates, result.frontier, result.original, better, result.goal, result.candidate
    )
    recipe = Recipe.parse(result.candidate.recipe)
    scores = [original.score, *(c.measurement.score for c in result.candidates)]
    return ReportData(
        task=result.task, network=type(original_model).__name__, better=better,
        score_is_fraction=better == "higher" and all(0 <= s <= 1 for s in scores),
        score_before=original.score, score_after=reached.score,
        before_bytes=original.size_bytes, after_bytes=summary.size_bytes,
        overhead_bytes=summary.overhead_bytes,
        rows=_rows(original, reached, better),
        goal=str(result.goal) if result.goal else None,
        bounds=_bounds(result),
        candidates=candidates, tried=len(result.candidates), curves=curves(candidates, better),
        tensors=tuple(
            _tensor(t, original_model, result.candidate.left) for t in summary.tensors
        ),
        layers=_layers(reached.choices, type(original_model).__name__),
        engines=_engines(original, reached), sensitivities=_sensitivities(record),
        answers=None if task is None else answers(original_model, result.model, task),
        weights=_weights(result.model, original_model, summary),
        angles=angles(original_model, result.model),
        epochs=result.history, phases=_phases(result.history, recipe),
        recipe=str(recipe), command=_command(record, "goal" if result.goal else "recipe"),
        chooses_by=record["chooses_by"], versions=record["versions"],
        machine={k: "none" if v is None else str(v) for k, v in record["machine"].items()},
    )  # fmt: skip


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}; a report needs the run's record") from error
    if record.get("status") != "done":
        raise RunError(f"{path} is of a run that is not finished; run compress again to go on")
    return record


def _rows(before: Measurement, after: Measurement, better: Direction) -> tuple[Row, ...]:
    batches = sorted({x.batch for m in (before, after) for x in m.latencies})
    return (
        Row(label="Score", detail=f"{better} is better", unit="score", better=better,
            before=before.score, after=after.score),
        Row(label="Bytes of the file", detail="original: its tensors, written plainly",
            unit="bytes", before=before.size_bytes, after=after.size_bytes),
        Row(label="Parameters", unit="count", before=before.parameters, after=after.parameters),
        Row(label="Non-zero parameters", unit="count", before=before.nonzero_parameters,
            after=after.nonzero_parameters),
        Row(label="MACs", detail="of one example", unit="count", before=before.macs,
            after=after.macs),
        Row(label="Effective MACs", detail="those by a weight that is not zero", unit="count",
            before=before.effective_macs, after=after.effective_macs),
        *(_latency_row(b, before, after) for b in batches),
        Row(label="Peak memory", detail="weights and one forward, in bytes", unit="bytes",
            before=before.peak_memory_bytes, after=after.peak_memory_bytes),
    )  # fmt: skip


def _latency_row(batch: int, before: Measurement, after: Measurement) -> Row:
    old, new = before.latency(batch), after.latency(batch)
    return Row(
        label=f"Latency, batch {batch}", detail=_conditions(old, new), unit="ms",
        before=old.median_ms if old else None, before_spread=old.iqr_ms if old else None,
        after=new.median_ms if new else None, after_spread=new.iqr_ms if new else None,
    )  # fmt: skip


def _conditions(*latencies: Latency | None) -> str:
    """Threads and engine, once where both networks ran alike."""
    each = [f"{plural(x.threads, 'thread')}, {x.engine}" for x in latencies if x is not None]
    return " → ".join(dict.fromkeys(each))


_AXIS_UNITS: dict[str, Unit] = {
    "score": "score", "bytes": "bytes", "memory": "bytes", "latency": "ms",
    "parameters": "count", "macs": "count",
}  # fmt: skip


def _bounds(result: Result) -> tuple[BoundRow, ...]:
    return tuple(
        BoundRow(
            axis=v.bound.axis, text=v.bound.text, relation=v.bound.relation,
            unit=_AXIS_UNITS[v.bound.axis], limit=v.asked,
            before=value_of(v.bound.axis, result.original), reached=v.reached, holds=v.holds,
        )
        for v in result.verdicts
    )  # fmt: skip


def _tensor(stored: StoredTensor, original: nn.Module, left: Sequence[LeftAlone]) -> TensorRow:
    raw = tensor_or_none(original, stored.names[0])  # none: of an input, or of a new structure
    parts = tuple(
        PartRow(name=name, size_bytes=p.bits / 8, huffman_bytes=p.huffman_bits / 8)
        for name, p in stored.parts.items()
    )
    return TensorRow(
        names=stored.names, shape=stored.shape, numel=stored.numel, format=stored.format,
        before_bytes=0 if raw is None else raw.numel() * raw.element_size(),
        after_bytes=stored.size_bytes,
        huffman_bytes=sum(p.huffman_bytes for p in parts),
        bits_per_weight=8 * stored.size_bytes / max(stored.numel, 1), parts=parts,
        left=tuple(g for g in left if g.site in stored.names),
    )  # fmt: skip


def _layers(choices: Sequence[Choice], network: str) -> tuple[LayersAt, ...]:
    """The choices by batch. A layer that is the whole network goes by the network's name."""
    groups = []
    for batch, threads in sorted({(c.batch, c.threads) for c in choices}):
        rows = tuple(
            LayerRow(
                name=c.layer or network, packed_ms=c.packed_ms, dense_ms=c.dense_ms,
                runs_packed=c.runs_packed,
                gain=max(c.packed_ms, c.dense_ms) / min(c.packed_ms, c.dense_ms),
            )
            for c in choices
            if (c.batch, c.threads) == (batch, threads)
        )  # fmt: skip
        kept = sum(r.runs_packed for r in rows)
        groups.append(LayersAt(batch=batch, threads=threads, packed=kept, layers=rows))
    return tuple(groups)


def _engines(before: Measurement, after: Measurement) -> tuple[EngineRow, ...]:
    """By batch, the compressed network's fastest engine first; none where there was one only."""
    old, new = ({(t.batch, t.engine): t for t in m.latencies} for m in (before, after))
    places = sorted({**new, **old}, key=lambda at: at[0])  # within a batch as they were
    if len({engine for _, engine in places}) < 2:
        return ()
    rows = []
    for batch, engine in places:
        was, now = old.get((batch, engine)), new.get((batch, engine))
        threads = was.threads if was else now.threads if now else 0
        rows.append(
            EngineRow(
                engine=engine, batch=batch, threads=threads,
                before_ms=was.median_ms if was else None, before_iqr_ms=was.iqr_ms if was else None,
                after_ms=now.median_ms if now else None, after_iqr_ms=now.iqr_ms if now else None,
            )
        )  # fmt: skip
    return tuple(rows)


def _sensitivities(record: Mapping[str, Any]) -> tuple[SensitivityRow, ...]:
    return tuple(
        SensitivityRow(
            name=name, baseline=curve["baseline"], sparsities=tuple(curve["sparsities"]),
            losses=tuple(curve["losses"]),
        )
        for name, curve in record.get("sensitivity", {}).items()
    )  # fmt: skip


def _weights(
    packed: nn.Module, original: nn.Module, summary: FileSummary
) -> tuple[SiteWeights, ...]:
    """The sites: tensors of two dimensions or more, and any other that is not stored plainly."""
    rows = []
    for stored in summary.tensors:
        name = stored.names[0]
        before = tensor_or_none(original, name)
        is_site = stored.format != "plain.v1" or len(stored.shape) >= 2
        if before is not None and is_site and before.is_floating_point() and stored.numel:
            module, leaf = owner(packed, name)
            weight = None
            if isinstance(module, Packed) and leaf in module.packed:
                weight = cast(PackedWeight, module.packed[leaf])
            after = tensor_at(packed, name).detach() if weight is None else weight.dense()
            rows.append(_site_weights(name, _floats(before.detach()), _floats(after), weight))
    return tuple(rows)


def _site_weights(
    name: str, before: NDArray[np.float64], after: NDArray[np.float64], weight: PackedWeight | None
) -> SiteWeights:
    old, new = (v[np.isfinite(v)] for v in (before, after))
    kept = new[new != 0]
    edges = np.histogram_bin_edges(np.concatenate((old, kept)), BINS)
    shares = None if weight is None else _sharing(weight)
    table, counts = np.zeros(0), np.zeros(0, int)
    if shares is not None:
        table = np.sort(_floats(shares.nested()["table"].dense()).ravel())
        used, how_often = np.unique(_floats(shares.dense()), return_counts=True)
        by_value = dict(zip(used.tolist(), how_often.tolist(), strict=True))
        counts = np.array([by_value.pop(v, 0) for v in table.tolist()], int)
    return SiteWeights(
        name=name, shape=before.shape, numel=before.size, edges=tuple(edges.tolist()),
        before=tuple(np.histogram(old, edges)[0].tolist()),
        after=tuple(np.histogram(kept, edges)[0].tolist()),
        zeros=new.size - kept.size,
        centroids=tuple(table.tolist()), centroid_counts=tuple(counts.tolist()),
    )  # fmt: skip


def _sharing(weight: PackedWeight) -> PackedWeight | None:
    """The packed weight, this one or one inside it, whose values come from a table."""
    if "table" in weight.nested():
        return weight
    inside = (_sharing(child) for child in weight.nested().values())
    return next((found for found in inside if found is not None), None)


def _floats(tensor: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return found


def _phases(history: Sequence[EpochRecord], recipe: Recipe) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    taken = 0  # steps of the recipe that are told already
    for step in sorted({r.step for r in history}):
        numbers = [i + 1 for i, r in enumerate(history) if r.step == step]
        techniques = " > ".join(str(s) for s in recipe.steps[taken:step])
        phases.append(
            Phase(first=numbers[0], last=numbers[-1], techniques=techniques,
                  recovery=str(recipe.steps[step]))
        )  # fmt: skip
        taken = step + 1
    return tuple(phases)


def _command(record: Mapping[str, Any], option: str) -> str:
    """The command line that asks for the same again."""
    if "command" in record:
        return str(record["command"])
    source, asked = shlex.quote(record.get("source") or "task.py"), shlex.quote(record["asked"])
    words = ["taut", "compress", source, f"--{option}", asked]
    for name, default in (("seed", 0), ("precision", "auto"), ("epochs", 12), ("trials", 5)):
        if record.get(name, default) != default:
            words += [f"--{name}", str(record[name])]
    return " ".join(words)


def plural(count: float, word: str) -> str:
    """A count and what is counted.

    >>> plural(1, "layer"), plural(1200, "layer")
    ('1 layer', '1,200 layers')
    """
    return f"{count:,g} {word}{'' if count == 1 else 's'}"
