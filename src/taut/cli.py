"""The command line: arguments and printing only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from taut import edits
from taut.angles import RowAngles, angles
from taut.cli_search import compare_command, search_command
from taut.compress import compress
from taut.doctor import Diagnosis, diagnose, remedy
from taut.engine_commands import bench_command, export_command, run_command
from taut.errors import TautError
from taut.fallback import fall_back
from taut.goal import is_goal
from taut.measure import measure
from taut.modules import clone
from taut.pack import FileSummary, inspect, load
from taut.processes import is_main, once
from taut.recipe import describe_range
from taut.report import write_report
from taut.sensitivity import Sensitivity, sensitivity, write_plot
from taut.technique import STEPS, Step, techniques
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
    side_by_side,
)
from taut.trace import trace
from taut.types import Choice, EpochRecord
from taut.watch import Watch

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Makes trained neural networks smaller and faster, and measures that it did.",
)


def main() -> None:
    """Run the command line; what Taut refuses is one line on stderr, and exit code 2."""
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    try:
        app()
    except TautError as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
    err.print(str(error), markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(2) from error


@app.command("compress")
def compress_command(
    task_file: TaskFile,
    recipe: Annotated[
        str | None, typer.Option(help="steps joined by '>': what to do, in order")
    ] = None,
    goal: Annotated[
        str | None, typer.Option(help="bounds to keep, like 'bytes<=5%, score>=-0.5%'")
    ] = None,
    run_folder: RunFolder = None,
    seed: Seed = 0,
    precision: Precision = "auto",
    epochs: Annotated[int, typer.Option(help="with --goal: recovery in the first trial")] = 12,
    trials: Annotated[int, typer.Option(help="with --goal: how many trials at most")] = 5,
    fresh: Fresh = False,
    engine: Annotated[
        str, typer.Option(help="whose latency counts: pytorch, one of bench's engines, or auto")
    ] = "pytorch",
    fall_back_to: Annotated[
        str | None,
        typer.Option("--fall-back", help="with --recipe: leave out layers until 'score>=-0.5%'"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a network by --recipe, or to a --goal. Started again, it goes on where it was.

    Exit code 3 means that the run went well but a bound of the goal does not hold. Several
    processes train together by `torchrun --nproc-per-node 2 --no-python taut compress ...`.
    """
    wanted = _wanted(recipe, goal)
    task, model = loaded(task_file)
    if fall_back_to is not None:
        wanted = str(fall_back(model, task, wanted, fall_back_to).recipe)
    try:
        with _progress(quiet=as_json or not is_main(), split=task.chooses_by) as watch:
            result = compress(
                model, task, wanted, folder=run_folder, seed=seed, precision=precision,
                epochs=epochs, trials=trials, fresh=fresh, engine=engine, watch=watch,
            )  # fmt: skip
            report = once(lambda: write_report(result, model, task=task))
    except KeyboardInterrupt as stop:
        err.print("stopped; the same command goes on from here (without --fresh)")
        raise typer.Exit(130) from stop
    if as_json and is_main():
        print_json(result_json(result, report))
    elif is_main():
        print_result(result, report)
    if not result.met:
        raise typer.Exit(EXIT_NOT_MET)


def _wanted(recipe: str | None, goal: str | None) -> str:
    if (recipe is None) == (goal is None):
        raise typer.BadParameter("give either --recipe or --goal")
    wanted = recipe if recipe is not None else goal
    assert wanted is not None
    if goal is None and is_goal(wanted):
        raise typer.BadParameter(f"{wanted!r} belongs to --goal")
    if recipe is None and not is_goal(wanted):
        raise typer.BadParameter(
            f"{wanted!r} is no goal, like 'bytes<=5%, score>=-0.5%'; a recipe belongs to --recipe"
        )
    return wanted


app.command("search")(search_command)
app.command("compare")(compare_command)


@app.command("measure")
def measure_command(
    task_file: TaskFile,
    taut_file: Annotated[Path | None, typer.Argument(help="a .taut file of this network")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the task's network, and beside it the one in a .taut file."""
    task, model = loaded(task_file)
    traced = trace(model, task.example())
    found = {"original": measure(model, task, traced)}
    if taut_file is not None:
        packed = load(taut_file, clone(model))
        if changes := edits.of(packed):
            traced = trace(edits.replay(clone(model), changes), task.example())
        size = taut_file.stat().st_size
        found[taut_file.name] = measure(packed, task, traced, size_bytes=size)
    if as_json:
        print_json({name: m.to_json() for name, m in found.items()})
    else:
        out.print(side_by_side(found))
        if choices := [c for m in found.values() for c in m.choices]:
            out.print(_choices(choices, type(model).__name__))


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="a .taut file; with --sensitivity a task's file")],
    by_sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="how the loss grows as each weight is pruned")
    ] = False,
    by_angles: Annotated[
        bool, typer.Option("--angles", help="how far each weight's rows have turned; needs --task")
    ] = False,
    task_file: Annotated[
        Path | None, typer.Option("--task", help="with --angles: the task of the original network")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a .taut file holds: bytes by tensor and part, bits a weight, Huffman's bytes.

    With --sensitivity, what a task's network can lose: each weight alone is pruned by magnitude to
    rising sparsities. The table shows the loss; sensitivity.html in the current folder plots it.

    With --angles, the degrees between the rows of each weight in the file and those of the original
    network, and their lengths: mean and deviation, beside the angle of a random vector's signs.
    """
    if by_angles or task_file is not None:
        if by_sensitivity or not by_angles or task_file is None or file.suffix == ".py":
            raise typer.BadParameter(
                "--angles compares a .taut file with the original network of a task: "
                "taut inspect net.taut --angles --task task.py"
            )
        _inspect_angles(file, task_file, as_json)
        return
    if by_sensitivity != (file.suffix == ".py"):
        raise typer.BadParameter(
            f"--sensitivity takes a task's Python file, got {file}"
            if by_sensitivity
            else f"{file} is no .taut file; what its network can lose is shown by --sensitivity"
        )
    if by_sensitivity:
        _inspect_task(file, as_json)
        return
    summary = inspect(file)
    if as_json:
        tensors = [
            {
                "names": t.names, "shape": t.shape, "format": t.format,
                "size_bytes": t.size_bytes, "parts": {k: vars(p) for k, p in t.parts.items()},
            }
            for t in summary.tensors
        ]  # fmt: skip
        print_json({
            "size_bytes": summary.size_bytes, "overhead_bytes": summary.overhead_bytes,
            "tensors": tensors,
        })  # fmt: skip
    else:
        out.print(_inspection(summary))


def _inspect_task(task_file: Path, as_json: bool) -> None:
    task, model = loaded(task_file)
    found = sensitivity(model, task)
    plot = write_plot(found, "sensitivity.html")
    if as_json:
        print_json({**found.to_json(), "plot": str(plot)})
    else:
        out.print(_sensitivities(found))
        out.print(f"plot  {plot}", highlight=False, soft_wrap=True)


def _inspect_angles(file: Path, task_file: Path, as_json: bool) -> None:
    _, model = loaded(task_file)
    found = angles(model, load(file, clone(model)))
    if as_json:
        print_json([one.to_json() for one in found])
    else:
        out.print(_angles(found))


app.command("export")(export_command)
app.command("run")(run_command)
app.command("bench")(bench_command)


@app.command("techniques")
def techniques_command(as_json: AsJson = False) -> None:
    """List the techniques, their options and the ranges that they take."""
    order = sorted(STEPS, key=lambda n: (n not in techniques(), n))
    if as_json:
        print_json({name: _options(STEPS[name]) for name in order})
        return
    for name in order:
        cls = STEPS[name]
        first = (cls.__doc__ or "").strip().splitlines()[0]
        table = Table(title=f"[bold]{name}[/]  {first}", title_justify="left", expand=True)
        for column in ("option", "default", "range", "unit", "meaning"):
            ratio = {"range": 1, "meaning": 2}.get(column)  # the others are never cut
            table.add_column(column, no_wrap=ratio is None, ratio=ratio)
        for f in cls.options():
            rule = f.metadata
            table.add_row(
                f.name, repr(f.default), describe_range(rule).replace("[", "\\["), rule["unit"],
                rule["help"],
            )  # fmt: skip
        out.print(table)


def _options(cls: type[Step]) -> dict[str, Any]:
    """A step for machines. Options are at least `low`, at most `high` and less than `below`."""
    return {
        "summary": (cls.__doc__ or "").strip().splitlines()[0],
        "technique": cls.name in techniques(),
        "options": {f.name: {"default": f.default, **f.metadata} for f in cls.options()},
    }


@app.command("doctor")
def doctor_command(as_json: AsJson = False) -> None:
    """Show what Taut found here: processor, kernels and what each runs, PyTorch, engines."""
    found = diagnose()
    if as_json:
        print_json(found.to_json())
    else:
        out.print(_diagnosis(found))


# ---- loading and showing --------------------------------------------------------------------


class _Bar(Watch):
    """Shows a run as a progress bar with the last score."""

    def __init__(self, progress: Progress, split: str) -> None:
        self.progress, self.split = progress, split
        self.bar = progress.add_task("", total=None, visible=False)

    def say(self, text: str) -> None:
        self.progress.update(self.bar, visible=False)
        self.progress.console.print(f"[dim]·[/] {text}", highlight=False)

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int) -> None:
        done = (epoch - 1) * batches + batch
        self.progress.update(
            self.bar, completed=done, total=epochs * batches, visible=True,
            description=f"  epoch {epoch}/{epochs}",
        )  # fmt: skip

    def on_epoch(self, record: EpochRecord) -> None:
        self.progress.console.print(
            f"  epoch {record.epoch}  loss {record.loss:.4f}  {self.split} score "
            f"{record.score:.4f}  [dim]{record.seconds:.1f} s[/]",
            highlight=False,
        )


@contextmanager
def _progress(quiet: bool, split: str) -> Iterator[Watch]:
    if quiet:
        yield Watch()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=out, transient=True) as progress:
        yield _Bar(progress, split)


def _choices(choices: list[Choice], network: str) -> Table:
    table = Table(title="How each packed layer runs: the faster way")
    table.add_column("layer", overflow="fold")
    for column in ("batch", "threads", r"packed \[ms]", r"dense \[ms]", "runs"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in choices:
        way = "[bold green]packed[/]" if c.runs_packed else "dense"
        table.add_row(
            Text(c.layer or network), f"{c.batch}", f"{c.threads}", f"{c.packed_ms:.4f}",
            f"{c.dense_ms:.4f}", way,
        )  # fmt: skip
    return table


def _inspection(summary: FileSummary) -> Table:
    table = Table(
        title=f"{summary.size_bytes:,} bytes, {summary.overhead_bytes} of them container and header"
    )
    table.add_column("tensor and its parts")
    for column in ("numbers", "bytes", "bits each", "Huffman, no table"):
        table.add_column(column, justify="right")
    for t in summary.tensors:
        shape = " × ".join(map(str, t.shape))
        table.add_row(
            f"[bold]{' = '.join(t.names)}[/]  [dim]{shape}  {t.format}[/]", f"{t.numel:,}",
            f"{t.size_bytes:,.0f}", f"{8 * t.size_bytes / max(t.numel, 1):.3f}", "",
        )  # fmt: skip
        for name, part in t.parts.items():
            table.add_row(
                f"    {name}", f"{part.count:,}", f"{part.bits / 8:,.0f}",
                f"{part.bits / max(part.count, 1):.3f}", f"{part.huffman_bits / 8:,.0f}",
            )  # fmt: skip
    return table


def _sensitivities(found: Sensitivity) -> Table:
    table = Table(
        title=f"Loss as each weight alone is pruned by magnitude; {found.baseline:.4g} unpruned"
    )
    table.add_column("weight", overflow="fold")
    table.add_column("numbers", justify="right", no_wrap=True)
    shown = [i for i, s in enumerate(found.sparsities) if s in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)]
    for i in shown:
        table.add_column(f"{found.sparsities[i]:.0%}", justify="right", no_wrap=True)
    for name, losses in found.losses.items():
        cells = (f"{losses[i]:.4g}" for i in shown)
        table.add_row(Text(name), f"{found.weights[name]:,}", *cells)
    return table


def _angles(found: tuple[RowAngles, ...]) -> Table:
    table = Table(title="Rows of each weight beside the original's: mean ± deviation")
    table.add_column("weight", overflow="fold")
    for column in ("rows", "of", "degrees", "random signs", "length", "left out"):
        table.add_column(column, justify="right", no_wrap=True)
    for a in found:
        table.add_row(
            Text(a.name), f"{a.rows:,}", f"{a.dimensions:,}",
            f"{a.angle:.2f} ± {a.angle_spread:.2f}", f"{a.sign_angle:.2f}",
            f"{a.length:.3f} ± {a.length_spread:.3f}", f"{a.left_out:,}",
        )  # fmt: skip
    return table


def _diagnosis(found: Diagnosis) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")

    def row(label: str, text: object) -> None:
        table.add_row(label, Text(str(text)))

    versions, here = found.versions, found.machine
    row("Taut", f"{versions['taut']}, Python {versions['python']}, {here['system']}")
    row("PyTorch", f"{versions['torch']}, CUDA: {here['cuda'] or 'none'}")
    row("processor", here["processor"])
    row("threads", here["threads"])
    if found.library is None:
        row("kernels", "not built: plain PyTorch runs instead, slowly (see CONTRIBUTING.md)")
    else:
        row("features", ", ".join(found.features) or "none that a kernel asks for")
        row("kernels", found.library)
        row("built by", found.build)
    for op, variant in found.operations.items():
        row(f"  {op}", variant)
    for engine, version in found.engines.items():
        hint = f": {command}" if (command := remedy(engine)) else ""
        row(engine, version or f"not installed{hint}")
    return table


if __name__ == "__main__":
    main()
