"""The report of a run: first compute, then draw.

`report_data` gathers every number into one frozen dataclass, and `write_report` draws it as
report.html: one file that opens without a network.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import jinja2
import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs
from torch import Tensor, nn

from taut.compress import Result
from taut.errors import RunError
from taut.files import write_atomically
from taut.goal import value_of
from taut.layers import Packed
from taut.modules import owner, tensor_at
from taut.pack import FileSummary, StoredTensor, inspect
from taut.recipe import Recipe
from taut.recoding import PackedWeight
from taut.types import Direction, EpochRecord, Latency, Measurement

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
class CandidateRow:
    """One recipe that was tried. latency: at the smallest batch measured."""

    number: int
    recipe: str
    epochs: float
    score: float
    size_bytes: int
    latency_ms: float | None
    latency_iqr_ms: float | None
    on_frontier: bool
    chosen: bool
    meets_goal: bool | None


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """One part of a stored tensor: its coded bytes, and those of a plain Huffman code."""

    name: str
    size_bytes: float
    huffman_bytes: float


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of the file. before_bytes: of the original tensor, written plainly."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    format: str
    before_bytes: int
    after_bytes: float
    huffman_bytes: float
    bits_per_weight: float
    parts: tuple[PartRow, ...]


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
    tensors: tuple[TensorRow, ...]
    weights: tuple[SiteWeights, ...]
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


def report_data(result: Result, original_model: nn.Module) -> ReportData:
    """Gather what the report of a finished run tells.

    original_model: the network that was compressed, for its weights. Raises RunError where the
    run's folder lacks its record or holds another file than the one measured.
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
        candidates=_candidates(result),
        tensors=tuple(_tensor(t, original_model) for t in summary.tensors),
        weights=_weights(result.model, original_model, summary),
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
    each = [f"{_plural(x.threads, 'thread')}, {x.engine}" for x in latencies if x is not None]
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


def _candidates(result: Result) -> tuple[CandidateRow, ...]:
    unbeaten = result.frontier
    return tuple(
        CandidateRow(
            number=i + 1, recipe=c.recipe, epochs=c.epochs, score=got.score,
            size_bytes=got.size_bytes, latency_ms=latency.median_ms if latency else None,
            latency_iqr_ms=latency.iqr_ms if latency else None,
            on_frontier=c in unbeaten, chosen=c is result.candidate,
            meets_goal=result.goal.met(got, result.original) if result.goal else None,
        )
        for i, c in enumerate(result.candidates)
        for got, latency in [(c.measurement, c.measurement.latency())]
    )  # fmt: skip


def _tensor(stored: StoredTensor, original: nn.Module) -> TensorRow:
    raw = tensor_at(original, stored.names[0])
    parts = tuple(
        PartRow(name=name, size_bytes=p.bits / 8, huffman_bytes=p.huffman_bits / 8)
        for name, p in stored.parts.items()
    )
    return TensorRow(
        names=stored.names, shape=stored.shape, numel=stored.numel, format=stored.format,
        before_bytes=raw.numel() * raw.element_size(), after_bytes=stored.size_bytes,
        huffman_bytes=sum(p.huffman_bytes for p in parts),
        bits_per_weight=8 * stored.size_bytes / max(stored.numel, 1), parts=parts,
    )  # fmt: skip


def _weights(
    packed: nn.Module, original: nn.Module, summary: FileSummary
) -> tuple[SiteWeights, ...]:
    """The sites: tensors of two dimensions or more, and any other that is not stored plainly."""
    rows = []
    for stored in summary.tensors:
        name = stored.names[0]
        before = tensor_at(original, name).detach()
        is_site = stored.format != "plain.v1" or len(stored.shape) >= 2
        if is_site and before.is_floating_point() and stored.numel:
            module, leaf = owner(packed, name)
            weight = None
            if isinstance(module, Packed) and leaf in module.packed:
                weight = cast(PackedWeight, module.packed[leaf])
            after = tensor_at(packed, name).detach() if weight is None else weight.dense()
            rows.append(_site_weights(name, _floats(before), _floats(after), weight))
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
    source, asked = shlex.quote(record.get("source") or "task.py"), shlex.quote(record["asked"])
    words = ["taut", "compress", source, f"--{option}", asked]
    for name, default in (("seed", 0), ("precision", "auto"), ("epochs", 12), ("trials", 5)):
        if record.get(name, default) != default:
            words += [f"--{name}", str(record[name])]
    return " ".join(words)


# ---- drawing it -----------------------------------------------------------------------------


def write_report(result: Result, original_model: nn.Module, path: str | Path | None = None) -> Path:
    """Write the report of a finished run as one HTML file, and return its path.

    path: by default report.html in the run's folder. Raises RunError as `report_data` does, and
    where the file cannot be written.
    """
    path = result.folder / "report.html" if path is None else Path(path)
    write_atomically(path, render(report_data(result, original_model)).encode())
    return path


def render(data: ReportData) -> str:
    """The report as HTML. Nothing in it is fetched; all text of the run is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    environment.filters.update(
        amount=partial(format_amount, percent=data.score_is_fraction),
        changed=partial(format_change, percent=data.score_is_fraction),
        significant=significant,
        plural=_plural,
    )
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))
    return template.render(
        data=data,
        numbers=htmlsafe_json_dumps(_finite(asdict(data)), allow_nan=False),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )


def _finite(value: Any) -> Any:
    """The same in JSON's own terms, which has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def significant(value: float, digits: int = 3, like: float | None = None) -> str:
    """A number rounded to `digits` that count, whole ones kept; like: to the places of that one.

    >>> [significant(v) for v in (39.21, 0.05503, 12345.6)], significant(0.0026, like=0.0308)
    (['39.2', '0.0550', '12,346'], '0.0026')
    """
    scale = abs(value if like is None else like)
    if scale < 1e-6:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(scale)))}f}"


def format_amount(
    value: float | None, unit: Unit, spread: float | None = None, *, percent: bool = False
) -> str:
    """A quantity without its unit, but for fractions, which are told in per cent.

    >>> format_amount(1724320, "bytes"), format_amount(0.0308, "ms", 0.0026)
    ('1,724,320', '0.0308 ± 0.0026')
    """
    if value is None or not math.isfinite(value):
        return "not measured" if value is None else "not a finite number"
    if unit == "score":
        return f"{100 * value:.2f}\N{NO-BREAK SPACE}%" if percent else significant(value, 4)
    if unit == "ms":
        around = "" if spread is None else f" ± {significant(spread, like=value)}"
        return significant(value) + around
    return f"{value:,.0f}"


_WORDS = {"bytes": ("smaller", "larger"), "count": ("fewer", "more"), "ms": ("faster", "slower")}


def format_change(row: Row, *, percent: bool = False) -> str:
    """How the quantity changed, in words: `39.2× smaller`, `+0.12 points`, `the same`.

    >>> format_change(Row(label="", unit="ms", before=1.0, after=2.0))
    '2.00× slower'
    """
    if row.before is None or row.after is None or row.change == "unknown":
        return ""
    if row.before == row.after:
        return "the same"
    if row.change == "same":
        return "the same within the spread"
    if row.unit == "score":
        gain = row.after - row.before
        sign = "+" if gain > 0 else "\N{MINUS SIGN}"
        return sign + (f"{100 * abs(gain):.2f} points" if percent else significant(abs(gain)))
    smaller, larger = _WORDS[row.unit]
    low, high = sorted((row.before, row.after))
    times = "" if low <= 0 else f"{significant(high / low)}× "
    return times + (smaller if row.after < row.before else larger)


def _plural(count: float, word: str) -> str:
    return f"{count:,g} {word}{'' if count == 1 else 's'}"
