"""The report of a run, drawn: one HTML file that opens without a network.

Its numbers come from report_data; report.html is the page, report.css its style and report.js its
plots, which are written into the one file.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from plotly.offline import get_plotlyjs
from torch import nn

from taut.compress import Result
from taut.files import write_atomically
from taut.report_data import ReportData, Row, Unit, plural, report_data
from taut.task import Task


def write_report(
    result: Result, original_model: nn.Module, path: str | Path | None = None,
    task: Task | None = None,
) -> Path:  # fmt: skip
    """Write the report of a finished run as one HTML file, and return its path.

    path: by default report.html in the run's folder. task: to tell which answers changed. Raises
    RunError as `report_data` does, and where the file cannot be written.
    """
    path = result.folder / "report.html" if path is None else Path(path)
    write_atomically(path, render(report_data(result, original_model, task)).encode())
    return path


def render(data: ReportData) -> str:
    """The report as HTML. Nothing in it is fetched; all text of the run is escaped."""
    return drawn("report.html", data, percent=data.score_is_fraction)


def drawn(template: str, data: Any, *, percent: bool) -> str:
    """A page from a template beside this file, with the data, the style and the plots inside.

    percent: whether scores are told in per cent.
    """
    here = Path(__file__)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here.parent), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        amount=partial(format_amount, percent=percent),
        changed=partial(format_change, percent=percent),
        significant=significant,
        plural=plural,
    )
    return environment.get_template(template).render(
        data=data,
        style=here.with_suffix(".css").read_text("utf-8"),
        script=with_shared(here.with_suffix(".js").read_text("utf-8")),
        numbers=htmlsafe_json_dumps(_finite(asdict(data)), allow_nan=False),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )


def with_shared(script: str) -> str:
    """A page's script with the pictures that have files of their own in their places."""
    for name in ("frontier", "answers"):
        own = Path(__file__).with_name(f"{name}.js").read_text("utf-8")
        script = script.replace(f"// {name.upper()}\n", own)
    return script


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
