"""What every benchmark shares: its options, its table of figures, its record."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taut.files import write_atomically
from taut.machine import machine, versions

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One stated figure: what was measured, what is asked of it, and what stands beside it.

    paper: the paper's own figure, or whatever else the benchmark's column is for.
    """

    name: str
    paper: str
    ours: float
    asked: float
    at_most: bool
    unit: str = ""
    command: str = ""

    @property
    def holds(self) -> bool:
        return self.ours <= self.asked if self.at_most else self.ours >= self.asked


def run(
    title: str, measure: Callable[[argparse.Namespace], Iterable[Figure]], beside: str = "paper",
    more: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:  # fmt: skip
    """Parse the options, measure, print the table, and keep or check the figures as asked.

    beside: the heading of the column with what each figure is compared with. more: adds options.
    --quick: a tiny pass, whose figures mean nothing. --json PATH: the record, written with each
    row, so that a run that is killed keeps those that it has. --check: exit 1, naming the figure,
    when one falls short. --seed: of everything random. --only: some rows, which take their place
    in a record that is there. Each row tells with what it was measured.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="a tiny pass that CI runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--check", action="store_true", help="fail when a figure falls short")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    if more is not None:
        more(parser)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    figures: list[Figure] = []
    for figure in measure(options):
        figures.append(figure)
        if options.json:
            _keep(title, beside, figures, options, whole=False)
    Console().print(_table(title, figures, beside))
    if options.json:
        _keep(title, beside, figures, options, whole=not options.only)
    short = [f.name for f in figures if not f.holds]
    if options.check and short:
        sys.exit(f"falls short: {', '.join(short)}")


def _keep(
    title: str, beside: str, figures: Sequence[Figure], options: argparse.Namespace, whole: bool
) -> None:
    """Write the record: of these rows alone where they are all, else among those that are there."""
    measured = {"seed": options.seed, "versions": versions(), "machine": machine()}
    record: dict[str, Any] = {
        "title": title,
        "script": Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(),
        "beside": beside,
        "quick": options.quick,
        "figures": [{**asdict(f), "holds": f.holds, "measured": measured} for f in figures],
    }
    if not whole and options.json.is_file():
        record = joined(json.loads(options.json.read_text()), record)
    write_atomically(options.json, (json.dumps(record, indent=1) + "\n").encode())


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A record whose rows come from several runs, each in the place that it has had.

    Rows that were not measured again stay as they are, on whatever machine they were measured; but
    rows of a quick pass and rows that count never stand in one record.
    """
    if old["quick"] != new["quick"]:
        return new
    again = {f["name"]: f for f in new["figures"]}
    kept = [again.pop(f["name"], f) for f in old["figures"]]
    return {**new, "figures": [*kept, *again.values()]}


def _table(title: str, figures: list[Figure], beside: str) -> Table:
    table = Table(title=title)
    for column in ("figure", beside, "asked", "ours", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for f in figures:
        asked = f"{'≤' if f.at_most else '≥'} {f.asked:,.6g}{f.unit}"
        table.add_row(
            f.name, f.paper, asked, f"{f.ours:,.6g}{f.unit}", "" if f.holds else "falls short"
        )
    return table
