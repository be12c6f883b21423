"""The page of a comparison: one table and one picture of every technique on one network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from taut.files import read_json, write_atomically
from taut.frontier_data import CandidateRow, Curve, candidate_rows, curves
from taut.report import drawn
from taut.report_data import BoundRow, Row, SiteWeights
from taut.search import Comparison
from taut.types import Direction


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A technique that came to nothing on this network, and why: each reason once."""

    technique: str
    why: str


@dataclass(frozen=True, kw_only=True)
class ComparisonData:
    """Every number of the page, before anything is drawn. It has no goal, and shows no weights."""

    task: str
    network: str
    better: Direction
    score_is_fraction: bool
    score_before: float
    before_bytes: int
    rows: tuple[Row, ...]
    candidates: tuple[CandidateRow, ...]
    curves: tuple[Curve, ...]
    refused: tuple[Refused, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    bounds: tuple[BoundRow, ...] = ()
    weights: tuple[SiteWeights, ...] = ()


def comparison_data(result: Comparison, model: nn.Module) -> ComparisonData:
    """Gather what the page of a comparison tells. model: the network that was compressed."""
    original = result.original
    scores = [original.score, *(c.measurement.score for c in result.candidates)]
    at = original.latency()
    record = read_json(result.folder / "compare.json")
    rows = candidate_rows(result.candidates, result.frontier, original, result.better)
    return ComparisonData(
        task=result.task, network=type(model).__name__, better=result.better,
        score_is_fraction=result.better == "higher" and all(0 <= s <= 1 for s in scores),
        score_before=original.score, before_bytes=original.size_bytes,
        rows=(
            Row(label="Latency, batch 1", unit="ms", before=at.median_ms if at else None,
                before_spread=at.iqr_ms if at else None, after=None),
            Row(label="Effective MACs", unit="count", before=original.effective_macs, after=None),
        ),
        candidates=rows, curves=curves(rows, result.better),
        refused=tuple(
            Refused(technique=name, why=why)
            for name, why in dict.fromkeys((r.technique, r.why) for r in result.rows if r.why)
        ),
        versions=record["versions"],
        machine={k: "none" if v is None else str(v) for k, v in record["machine"].items()},
    )  # fmt: skip


def write_comparison(result: Comparison, model: nn.Module, path: str | Path | None = None) -> Path:
    """Write the page as one HTML file that loads nothing, and return its path.

    path: by default compare.html in the comparison's folder.
    """
    path = result.folder / "compare.html" if path is None else Path(path)
    data = comparison_data(result, model)
    page = drawn("comparison.html", data, percent=data.score_is_fraction)
    write_atomically(path, page.encode())
    return path
