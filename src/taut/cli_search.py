"""The commands that try many candidates: `taut search` and `taut compare`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from taut.comparison import write_comparison
from taut.goal import value_of
from taut.report import write_report
from taut.search import Comparison, SearchResult, compare, search
from taut.terminal import (
    EXIT_NOT_MET,
    AsJson,
    Fresh,
    Precision,
    RunFolder,
    Seed,
    TaskFile,
    err,
    loaded,
    out,
    print_json,
    print_result,
    result_json,
)
from taut.types import Candidate, Direction, EpochRecord
from taut.watch import Watch

Techniques = Annotated[str, typer.Option(help="which of them: patterns, `!` excludes")]
Settings = Annotated[
    str, typer.Option(help="steps that every recipe starts by, like training(clip=1)")
]
Workers = Annotated[int, typer.Option(help="processes on this machine")]


def search_command(
    task_file: TaskFile,
    goal: Annotated[str, typer.Option(help="bounds to keep, like 'bytes<=5%, score>=-0.5%'")],
    minimize: Annotated[
        str, typer.Option(help="what is least among those that keep the goal, like latency")
    ] = "bytes",
    trials: Annotated[int, typer.Option(help="recipes that are trained")] = 60,
    epochs: Annotated[int, typer.Option(help="of recovery, in all of a recipe")] = 5,
    sampler: Annotated[
        str, typer.Option(help="who proposes: tpe, gp, nsga2, nsga3, random or grid")
    ] = "tpe",
    halving: Annotated[
        str, typer.Option(help="tournaments on epochs: none, halving or hyperband")
    ] = "none",
    techniques: Techniques = "*",
    settings: Settings = "",
    workers: Workers = 1,
    ray: Annotated[
        str | None, typer.Option(help="address of a Ray cluster; '' starts one here")
    ] = None,
    batch: Annotated[int, typer.Option(help="trials under way; 0: twice the workers")] = 0,
    storage: Annotated[
        str | None, typer.Option(help="a database's URL; by default a journal in the run folder")
    ] = None,
    study: Annotated[str, typer.Option(help="its name there; by default the task's")] = "",
    engine: Annotated[
        str, typer.Option(help="that latencies are taken with: pytorch, one of bench's, or auto")
    ] = "pytorch",
    threads: Annotated[int, typer.Option(help="that latencies are taken at; 0: all")] = 0,
    precision: Precision = "auto",
    run_folder: RunFolder = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Search recipes of all techniques for a --goal. Started again, it goes on where it was.

    Exit code 3 means that the search went well but a bound of the goal does not hold; what is
    nearest, and which bound binds, is told then.
    """
    task, model = loaded(task_file)
    with _stoppable(), _live(quiet=as_json, trials=trials, better=task.better) as watch:
        result = search(
            model, task, goal, folder=run_folder, fresh=fresh, watch=watch, minimize=minimize,
            trials=trials, epochs=epochs, sampler=sampler, halving=halving, techniques=techniques,
            settings=settings, workers=workers, ray=ray, batch=batch, storage=storage, study=study,
            engine=engine, threads=threads, precision=precision, seed=seed,
        )  # fmt: skip
        report = write_report(result, model, task=task)
    if as_json:
        print_json(_search_json(result, report))
    else:
        print_result(result, report)
        out.print(result.explain(), highlight=False, soft_wrap=True, markup=False)
    if not result.met:
        raise typer.Exit(EXIT_NOT_MET)


def compare_command(
    task_file: TaskFile,
    epochs: Annotated[int, typer.Option(help="of recovery, the same for all")] = 2,
    strengths: Annotated[int, typer.Option(help="how many of each technique's")] = 3,
    techniques: Techniques = "*",
    settings: Settings = "",
    workers: Workers = 1,
    precision: Precision = "auto",
    run_folder: RunFolder = None,
    seed: Seed = 0,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Compare every technique at several strengths, each with the same training: table, picture."""
    task, model = loaded(task_file)
    with _stoppable(), _live(quiet=as_json, trials=1, better=task.better) as watch:
        result = compare(
            model, task, epochs=epochs, strengths=strengths, techniques=techniques,
            settings=settings, workers=workers, seed=seed, precision=precision,
            folder=run_folder, fresh=fresh, watch=watch,
        )  # fmt: skip
        page = write_comparison(result, model)
    if as_json:
        frontier = {"frontier": result.frontier.rows(), "picture": str(page)}
        print_json({**result.to_json(), **frontier})
    else:
        out.print(_compared(result))
        for why in dict.fromkeys(r.why for r in result.rows if r.why):
            out.print(f"  {why}", style="dim", highlight=False, soft_wrap=True, markup=False)
        out.print(f"picture  {page}", highlight=False, soft_wrap=True)


def _compared(result: Comparison) -> Table:
    table = Table(
        title=f"{result.task}: the original has {result.original.size_bytes:,} bytes, "
        f"score {result.original.score:.4f}"
    )
    table.add_column("recipe", overflow="fold")
    for column in ("bytes", "score", r"latency \[ms]", "MACs", ""):
        table.add_column(column, justify="right", no_wrap=True)
    line = {id(c) for c in result.frontier}
    for row in result.rows:
        if row.candidate is None:
            table.add_row(Text(row.recipe), Text("does not apply"), "", "", "", "")
            continue
        got = row.candidate.measurement
        at = got.latency()
        table.add_row(
            Text(row.recipe), f"{got.size_bytes:,}", f"{got.score:.4f}",
            f"{at.median_ms:.3f}" if at else "", f"{got.effective_macs:,}",
            "frontier" if id(row.candidate) in line else "",
        )  # fmt: skip
    return table


def _search_json(result: SearchResult, report: Path) -> dict[str, Any]:
    return {
        **result_json(result, report),
        "frontier": result.frontier.rows(),
        "trials": len(result.candidates),
        "ruled_out": result.ruled_out,
        "lost": [vars(x) for x in result.lost],
        "explanation": result.explain(),
    }


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C is no error: what was done is kept."""
    try:
        yield
    except KeyboardInterrupt as stop:
        err.print("stopped; the same command goes on from here (without --fresh)")
        raise typer.Exit(130) from stop


class Dashboard(Watch):
    """A search as it goes on: trials, the best so far, a sketch of the frontier, the time left."""

    width, height = 56, 10

    def __init__(self, trials: int, better: Direction) -> None:
        self.trials, self.better = trials, better
        self.began = time.monotonic()
        self.first = self.done = self.lost = 0
        self.found: list[Candidate] = []
        self.said = ""

    def say(self, text: str) -> None:
        self.said = text

    def on_epoch(self, record: EpochRecord) -> None:
        self.said = f"epoch {record.epoch}: score {record.score:.4f}"

    def on_trial(self, candidate: Candidate | None, done: int, trials: int) -> None:
        self.first = self.first or done - 1
        self.done, self.trials = done, trials
        if candidate is None:
            self.lost += 1
        else:
            self.found.append(candidate)

    def __rich__(self) -> Group:
        """What the terminal shows now."""
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"trial {self.done}/{self.trials}",
            ProgressBar(total=self.trials, completed=self.done, width=24),
            f"{self._left()}", f"[dim]{self.lost} lost[/]" if self.lost else "",
        )  # fmt: skip
        return Group(head, Text(self.said, style="dim", no_wrap=True), Text(self.sketch()))

    def _left(self) -> str:
        fresh = self.done - self.first
        if not fresh:
            return ""
        seconds = (time.monotonic() - self.began) / fresh * (self.trials - self.done)
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s left"

    def sketch(self) -> str:
        """Score upwards against bytes, both over what was found: dots, and one ● for the best."""
        if not self.found:
            return ""
        points = [(value_of("bytes", c.measurement), c.measurement.score) for c in self.found]
        sizes, scores = zip(*points, strict=True)
        wide = max(sizes) - min(sizes) or 1.0
        tall = max(scores) - min(scores) or 1.0
        rows = [[" "] * self.width for _ in range(self.height)]
        best = (max if self.better == "higher" else min)(points, key=lambda p: p[1])
        for point in [*points, best]:
            x = round((point[0] - min(sizes)) / wide * (self.width - 1))
            up = (point[1] - min(scores)) / tall
            y = round((up if self.better == "lower" else 1 - up) * (self.height - 1))
            rows[y][x] = "●" if point is best else "·"
        low = f"{min(sizes):,.0f} … {max(sizes):,.0f} bytes"
        ends = [f"{v:.4f}" for v in (max(scores), min(scores))]
        ends = ends if self.better == "higher" else ends[::-1]
        margins = [ends[0], *[" " * len(ends[0])] * (self.height - 2), ends[1]]
        lines = [f"{m} │{''.join(r)}" for m, r in zip(margins, rows, strict=True)]
        return "\n".join([*lines, f"{' ' * len(ends[0])} └{low:─^{self.width}}"])


@contextlib.contextmanager
def _live(quiet: bool, trials: int, better: Direction) -> Iterator[Watch]:
    if quiet:
        yield Watch()
        return
    board = Dashboard(trials, better)
    with Live(board, console=out, refresh_per_second=2, transient=True):
        yield board
