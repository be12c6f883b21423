"""What the commands share: the terminal, loading a task, showing measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from taut.compress import Result
from taut.errors import TaskError
from taut.task import Task, load_task
from taut.types import Measurement

out, err = Console(), Console(stderr=True)

TaskFile = Annotated[Path, typer.Argument(help="a Python file with model(), train() and test()")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
RunFolder = Annotated[
    Path | None, typer.Option(help="where everything goes; by default runs/<name>")
]
Seed = Annotated[int, typer.Option(help="of every random choice")]
Precision = Annotated[
    str, typer.Option(help="of biases and norms: auto, float16, bfloat16 or float32")
]
Fresh = Annotated[bool, typer.Option(help="forget an earlier run of the same name")]

EXIT_NOT_MET = 3  # the run went well, but a bound of the goal does not hold


def loaded(path: Path) -> tuple[Task, nn.Module]:
    """A task and its trained network."""
    task = load_task(path)
    if task.model is None:
        raise TaskError(f"{path} lacks a function model()")
    return task, task.model().eval()


def print_result(result: Result, report: Path) -> None:
    """Before and after, each bound of the goal, and where everything lies."""
    out.print(side_by_side({"original": result.original, "net.taut": result.measurement}))
    for verdict in result.verdicts:
        word = "[green]met[/]" if verdict.holds else "[bold red]not met[/]"
        out.print(
            f"  {word}  {verdict.bound.text}: asked {verdict.bound.relation} "
            f"{verdict.asked:,.6g}, reached {verdict.reached:,.6g}",
            highlight=False,
        )
    if not result.met:
        out.print("  [yellow]this is the nearest that was found[/]")
    out.print(f"recipe  {result.candidate.recipe}", highlight=False, soft_wrap=True)
    out.print(f"file    {result.folder / 'net.taut'}", highlight=False, soft_wrap=True)
    out.print(f"report  {report}", highlight=False, soft_wrap=True)


def side_by_side(found: dict[str, Measurement]) -> Table:
    """Measurements side by side; with two of them the ratio."""
    first = next(iter(found.values()))
    shown = Table()
    shown.add_column("")
    for name in found:
        shown.add_column(name, justify="right")
    if len(found) > 1:
        shown.add_column("ratio", justify="right")

    def row(label: str, values: list[float], form: str = "{:,.0f}", ratio: bool = True) -> None:
        cells = [form.format(v) for v in values]
        if len(values) > 1:
            cells.append(f"{values[0] / values[1]:.1f}×" if ratio and values[1] else "")
        shown.add_row(Text(label), *cells)

    each = list(found.values())
    row("score", [m.score for m in each], "{:.4f}", ratio=False)
    row("bytes", [m.size_bytes for m in each])
    row("non-zero parameters", [m.nonzero_parameters for m in each])
    row("effective MACs", [m.effective_macs for m in each])
    for batch in dict.fromkeys(t.batch for t in first.latencies):
        timed = [t for m in each if (t := m.latency(batch)) is not None]
        threads = f"{timed[0].threads} thread{'' if timed[0].threads == 1 else 's'}"
        engines = ", ".join(dict.fromkeys(t.engine for t in timed))
        label = f"latency, batch {batch}, {threads}, {engines} [ms]"
        if len(timed) == len(each):
            row(label, [t.median_ms for t in timed], "{:.3f}")
    row("peak memory of a forward [bytes]", [m.peak_memory_bytes for m in each])
    return shown


def result_json(result: Result, report: Path) -> dict[str, Any]:
    """What a run came to, for machines."""
    return {
        "met": result.met,
        "recipe": result.candidate.recipe,
        "original": result.original.to_json(),
        "measurement": result.measurement.to_json(),
        "verdicts": [
            {"bound": v.bound.text, "asked": v.asked, "reached": v.reached, "holds": v.holds}
            for v in result.verdicts
        ],
        "file": str(result.folder / "net.taut"),
        "report": str(report),
    }


def print_json(data: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")
