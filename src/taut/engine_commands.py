"""The commands that leave Taut: export, run, bench."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast
from zipfile import BadZipFile

import numpy as np
import torch
import typer
from numpy.lib.npyio import NpzFile
from torch import Tensor, nn

from taut.errors import ExportError, TaskError
from taut.export import TARGETS, Exported, answers_of, export, target_of
from taut.fastest import ENGINES, race
from taut.files import read_json, write_atomically
from taut.modules import clone
from taut.pack import load
from taut.report_data import plural
from taut.task import Task, load_task
from taut.terminal import AsJson, out, print_json

TautFile = Annotated[Path, typer.Argument(help="a .taut file")]
TaskOption = Annotated[
    Path | None,
    typer.Option("--task", help="the network's task; by default that of the run it lies in"),
]


def export_command(
    taut_file: TautFile,
    to: Annotated[
        str | None,
        typer.Option(help="the engine: onnx, openvino, executorch, torch, aoti; or safetensors"),
    ] = None,
    path: Annotated[
        Path | None, typer.Option("--output", "-o", help="by default beside the .taut file")
    ] = None,
    task_file: TaskOption = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="take the example's batch only")
    ] = False,
    any_length: Annotated[
        bool, typer.Option("--any-length", help="take sequences of any length")
    ] = False,
    precision: Annotated[
        str, typer.Option(help="of the floats in the file: float32, float16, bfloat16")
    ] = "float32",
    keep: Annotated[
        str, typer.Option(help="layers compressed in OpenVINO by Taut's library: auto, all, none")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a network for another engine, and compare it there on the task's test data.

    The engine follows from --to, or from how the output's name ends. A file that does not give the
    packed network's answers is kept under another name.
    """
    if path is None:
        if to is None:
            raise typer.BadParameter("name the engine by --to, or the file by --output")
        path = taut_file.with_suffix(target_of(taut_file, to).suffix)
    task, net = packed_network(taut_file, task_file)
    found = export(
        net, path, to=to, task=task, dynamic_batch=not fixed_batch, dynamic_length=any_length,
        precision=precision, keep=keep, about=recorded(taut_file),
    )  # fmt: skip
    if as_json:
        print_json({**_numbers(found)})
    else:
        _print_exported(found)


def run_command(
    file: Annotated[Path, typer.Argument(help="a .taut file, or one that was exported")],
    inputs: Annotated[Path, typer.Argument(help="an .npy file, or .npz of several inputs")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="an .npy file; else they are printed")
    ] = None,
    task_file: TaskOption = None,
    as_json: AsJson = False,
) -> None:
    """Run a network on the numbers in a file: a .taut file here, an exported one in its engine."""
    tensors = _read(inputs)
    if not file.is_file():
        raise ExportError(f"there is no file {file}; export one, or name a .taut file")
    if file.suffix in {t.suffix for t in TARGETS.values()}:
        answers = target_of(file, None).module().opened(file)(tensors)
    else:
        _, net = packed_network(file, task_file)
        answers = answers_of(net, (tuple(tensors), {}))
    arrays = [a.numpy() for a in answers]
    if as_json:
        shown = {"outputs": [a.tolist() for a in arrays]} if output is None else {}
        print_json({"shapes": [a.shape for a in arrays], "file": output and str(output), **shown})
    if output is None:
        for array in () if as_json else arrays:
            out.print(np.array2string(array), highlight=False)
    elif len(arrays) == 1:
        write_atomically(output, lambda to: np.save(to, arrays[0]))
    else:
        named = {f"output_{i}": a for i, a in enumerate(arrays)}
        write_atomically(output, lambda to: np.savez(to, **cast(Any, named)))


def bench_command(
    taut_file: TautFile,
    task_file: TaskOption = None,
    batch: Annotated[int, typer.Option(help="examples at a time")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="of each engine; by default PyTorch's")
    ] = None,
    engines: Annotated[str, typer.Option(help="which, with commas between them")] = ",".join(
        ENGINES
    ),
    seconds: Annotated[float, typer.Option(help="that each engine is timed")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Time a network in every engine, in turn, each in a process of its own."""
    task, net = packed_network(taut_file, task_file)
    names = [e.strip() for e in engines.split(",") if e.strip()]
    found = race(
        net, task.example(batch), batch=batch, threads=threads, engines=names, seconds=seconds,
        task=task,
    )  # fmt: skip
    if as_json:
        print_json(asdict(found))
    else:
        out.print(found.table())


def _read(path: Path) -> list[Tensor]:
    """The arrays of an .npy or .npz file."""
    try:
        found = np.load(path, allow_pickle=False)
        arrays = [found[n] for n in found.files] if isinstance(found, NpzFile) else [found]
        return [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ExportError(
            f"cannot read {path}: {error}; give an .npy file of numbers, or an .npz file of several"
        ) from error


def packed_network(taut_file: Path, task_file: Path | None) -> tuple[Task, nn.Module]:
    """The task of a .taut file, and the network that it holds.

    Raises TaskError where no task is named and the file lies in no run's folder.
    """
    run = taut_file.parent / "run.json"
    if task_file is None and run.is_file():
        source = read_json(run).get("source")
        task_file = Path(source) if source else None
    if task_file is None:
        raise TaskError(
            f"{taut_file} lies in no run's folder, so its network must be named: --task task.py"
        )
    task = load_task(task_file)
    assert task.model is not None  # load_task refuses a file without one
    original = task.model().eval()
    return task, load(taut_file, clone(original))


def recorded(taut_file: Path) -> dict[str, Any]:
    """What the run that a .taut file lies in knows of it: recipe and measurement."""
    run = taut_file.parent / "run.json"
    record = read_json(run) if run.is_file() else {}
    if record.get("status") != "done":
        return {}
    best = record.get("best")  # of a search
    chosen = record["candidates"][record["chosen"]] if best is None else best
    return {"recipe": chosen["recipe"], "measurement": chosen["measurement"]}


def _numbers(found: Exported) -> dict[str, Any]:
    return {
        "file": str(found.path), "engine": found.engine, "size_bytes": found.size_bytes,
        "agreement": asdict(found.agreement) if found.agreement else None,
        "kept": dict(found.kept), "library": str(found.library) if found.library else None,
        "decoded": found.decoded, "score": found.score, "packed_score": found.packed_score,
    }  # fmt: skip


def _print_exported(found: Exported) -> None:
    out.print(f"file    {found.path}", highlight=False, soft_wrap=True)
    out.print(f"bytes   {found.size_bytes:,}", highlight=False)
    if found.library is not None:
        out.print(f"library {found.library}", highlight=False, soft_wrap=True)
        out.print(
            f"kept    {plural(len(found.kept), 'layer')} compressed, by the library's operations"
        )
    elif found.decoded:
        out.print(f"layers that could stay compressed are decoded: {found.decoded}", markup=False)
    if found.agreement is not None:
        agreed = found.agreement
        out.print(
            f"answers compared on {agreed.samples} examples: off by {agreed.max_error:.2g} at "
            f"most, {agreed.error:.2g} of their size (allowed: {agreed.allowed:g})",
            highlight=False,
        )
    if found.score is not None:
        out.print(
            f"score   {found.score:.4f} in {found.engine}, {found.packed_score:.4f} packed",
            highlight=False,
        )
