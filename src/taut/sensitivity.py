"""Sensitivities, computed and drawn: how the loss grows as each weight alone is pruned.

Each site is pruned by magnitude to rising sparsities, every other one left whole, without recovery
(Han, Pool, Tran, Dally, NIPS 2015, figure 6, where it is accuracy).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from plotly.offline import get_plotlyjs
from torch import nn

from taut.files import write_atomically
from taut.statistics import SPARSITIES, Statistics
from taut.task import Task
from taut.trace import Trace, trace


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """losses: for each site, the mean loss on the training data at each of the sparsities.

    baseline: the loss of the whole network; a loss that is no number counts as infinite.
    """

    task: str
    examples: int
    baseline: float
    sparsities: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]
    weights: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain types, in which infinity is None."""
        finite = {
            n: [loss if math.isfinite(loss) else None for loss in curve]
            for n, curve in self.losses.items()
        }
        return {**vars(self), "sparsities": list(self.sparsities), "losses": finite}


def sensitivity(model: nn.Module, task: Task, traced: Trace | None = None) -> Sensitivity:
    """Scan every site of a network on the task's calibration data. Nothing is changed."""
    traced = traced or trace(model, task.example())
    loss = task.calibration_loss()
    statistics = Statistics(model, loss)
    curves = {site.name: statistics.sensitivity(site) for site in traced.sites}
    return Sensitivity(
        task=task.name,
        examples=sum(b.size for b in loss.batches),
        baseline=next((c.baseline for c in curves.values()), math.nan),
        sparsities=SPARSITIES,
        losses={n: c.losses for n, c in curves.items()},
        weights={s.name: s.numel for s in traced.sites},
    )


def write_plot(found: Sensitivity, path: str | Path) -> Path:
    """Draw the curves as one HTML file that loads nothing, and return its path.

    Raises RunError where it cannot be written.
    """
    path = Path(path)
    write_atomically(path, render(found).encode())
    return path


def render(found: Sensitivity) -> str:
    """The plot as HTML."""
    numbers = found.to_json()
    traces = [
        {"name": f"{name} ({found.weights[name]:,})", "x": numbers["sparsities"], "y": curve,
         "mode": "lines+markers", "marker": {"size": 4}}
        for name, curve in numbers["losses"].items()
    ]  # fmt: skip
    line = {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": found.baseline,
        "y1": found.baseline, "line": {"dash": "dot", "color": "#888"},
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "sparsity of the weight"}, "tickformat": ".0%"},
        "yaxis": {"title": {"text": f"loss on {found.examples:,} training examples"}},
        "shapes": [line] if math.isfinite(found.baseline) else [],
        "hovermode": "x unified", "template": "none",
    }  # fmt: skip
    return _PAGE.format(
        title=escape(f"{found.task}: loss as each weight alone is pruned"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        traces=htmlsafe_json_dumps(traces, allow_nan=False),
        layout=htmlsafe_json_dumps(layout, allow_nan=False),
    )


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>body {{ font: 16px system-ui, sans-serif; margin: 2rem; }} #plot {{ height: 80vh; }}</style>
<h1>{title}</h1>
<p>By magnitude, without recovery, every other weight left whole. Dotted: the whole network.</p>
<div id="plot"></div>
<script>{plotly}</script>
<script>
Plotly.newPlot("plot", {traces}, {layout}, {{responsive: true, displaylogo: false}});
</script>
</html>
"""
