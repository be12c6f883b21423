"""The ONNX file: the network's graph, the precision of its floats, what it tells of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from torch import Tensor
from torch.utils._pytree import tree_leaves

from taut.export.between import KEPT, round_between
from taut.export.fuse import fuse
from taut.export.graph import graph_of, layer_of
from taut.export.job import Job
from taut.export.targets import Runner
from taut.files import write_atomically

Opened = Callable[[Path], Runner]

_HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_MANY = 64  # floats that are worth a half precision


def model_of(
    job: Job, opened: Opened, suit: Callable[[ir.Model], object] = lambda model: None
) -> ir.Model:
    """The network as an ONNX model, with what it tells of itself.

    opened: opens ONNX files in the engine. suit: brings whole numbers into the form that it likes.
    Raises ExportError where the network fixes a dimension that was to be free.
    """

    def finish(model: ir.Model) -> None:
        if job.plain.kept:
            fuse(model)
        suit(model)
        if job.calibration and job.plain.rounds:
            round_between(model, partial(_seen, job, opened))
            suit(model)

    model = graph_of(job.program, job.plain.integers, finish)
    for value in model.graph.inputs:
        job.refuse_fixed(str(value.name), value.shape or ())
    if job.precision in _HALVES:
        _halve(model.graph, _HALVES[job.precision])
    model.producer_name, model.producer_version = "taut", ""
    for key, value in job.about.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.metadata_props[f"taut.{key}"] = text
    return model


def save(model: ir.Model, path: Path) -> None:
    """Write a model; one of more than two gigabytes keeps its weights in a file beside it."""
    held = (v.const_value for v in model.graph.initializers.values())
    if sum(t.nbytes for t in held if t is not None) < 2**31:
        write_atomically(path, ir.to_proto(model).SerializeToString())
    else:
        ir.save(model, path, external_data=f"{path.name}.data")


def _halve(graph: ir.Graph, kind: ir.DataType) -> None:
    """Store floats in half precision; the engine widens them once, as it loads the file."""
    for name, value in list(graph.initializers.items()):
        held = value.const_value
        scale = any(u.op_type == "DequantizeLinear" for u, _ in value.uses())
        if held is None or held.dtype != ir.DataType.FLOAT or held.size < _MANY or scale:
            continue
        floats = torch.from_numpy(held.numpy().copy())
        half = floats.to(torch.float16 if kind == ir.DataType.FLOAT16 else torch.bfloat16)
        raw = half.view(torch.int16).numpy().tobytes()
        tensor = ir.Tensor(np.frombuffer(raw, kind.numpy()).reshape(held.shape.numpy()), dtype=kind)
        stored = ir.Value(
            name=f"{name}.half", shape=value.shape, type=ir.TensorType(kind), const_value=tensor
        )
        cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT})
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)


def refused(engine: str, path: Path, error: Exception) -> str:
    """What an engine says of a file that it does not run, with the layer where it is named."""
    text = " ".join(str(error).split())
    nodes = [w.strip("'\"().,:") for w in text.split() if ":" in w]
    layers = [layer_of(n) for n in nodes if layer_of(n).replace(".", "").isidentifier()]
    where = f" (layer {layers[0]!r})" if layers else ""
    return (
        f"{engine} does not run {path.name}{where}: {text[:300]}; write that layer with other "
        "operations, or use another engine"
    )


def about(path: Path) -> dict[str, Any]:
    """What a file tells of itself."""
    model = ir.load(path)
    return {
        k.removeprefix("taut."): v for k, v in model.metadata_props.items() if k.startswith("taut.")
    }


def _seen(job: Job, opened: Opened, model: ir.Model, names: Sequence[str]) -> dict[str, Tensor]:
    """What named values of a model are on the calibration data, thinned out."""
    outputs = model.graph.outputs
    made = (v for node in model.graph for v in node.outputs)
    values = {v.name: v for v in (*model.graph.inputs, *made)}
    own = len(outputs)
    outputs.extend(values[n] for n in names)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        save(model, path)
        del outputs[own:]
        run = opened(path)
        found: dict[str, list[Tensor]] = {n: [] for n in names}
        for sample in job.calibration:
            tensors = [t for t in tree_leaves(sample) if isinstance(t, Tensor)]
            for name, output in zip(names, run(tensors)[own:], strict=True):
                flat = output.flatten()
                found[name].append(flat[:: max(1, len(flat) // KEPT)].clone())
    return {n: torch.cat(parts) for n, parts in found.items()}


def save_with_layers(
    job: Job, path: Path, opened: Opened, suit: Callable[[ir.Model], object]
) -> list[tuple[str, int]]:
    """Write a model that gives the output of each layer, too: the layers' paths, and which."""
    model = model_of(job, opened, suit)
    last = {layer_of(n.name or ""): n.outputs[0] for n in model.graph}
    found = []
    for layer, value in last.items():
        if layer and value not in model.graph.outputs:
            model.graph.outputs.append(value)
        if layer:
            found.append((layer, list(model.graph.outputs).index(value)))
    save(model, path)
    return found
