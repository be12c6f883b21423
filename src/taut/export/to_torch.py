"""PyTorch's own exported program, in which the layers that run packed keep Taut's products.

Who loads it imports taut first: its kernels are operations that PyTorch looks up by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from taut.errors import ExportError
from taut.export.job import Job
from taut.export.plain import plain
from taut.export.targets import Runner, check_count
from taut.files import write_atomically
from taut.trace import export as traced


def program_of(job: Job) -> ExportedProgram:
    """The network as it runs now, traced: its layers packed, or decoded where they run dense."""
    network = plain(job.packed, all_layers=False).network
    free = {"any_batch": job.dynamic_batch, "any_length": job.dynamic_length}
    _, program = traced(network, job.example, **free)
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in program.graph_signature.user_inputs:
            value = node.meta["val"]
            job.refuse_fixed(node.name, value.shape if isinstance(value, Tensor) else ())
    return program


def write(job: Job, path: Path) -> None:
    """Write the network's program."""
    program = program_of(job)
    about = {"taut": json.dumps(dict(job.about), ensure_ascii=False)}
    write_atomically(path, lambda file: torch.export.save(program, file, extra_files=about))


def opened(
    path: Path, threads: int | None = None, precision: str = "float32", compiled: bool = False
) -> Runner:
    """The program, run by PyTorch with as many threads as it has.

    compiled: by torch.compile, which takes its time at the first run.
    """
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # whatever a damaged archive makes of itself
        raise ExportError(f"PyTorch cannot read {path.name}: {error}") from error
    module = program.module()
    module = torch.compile(module) if compiled else module  # type: ignore[assignment]
    leaves, spec = tree_flatten(program.example_inputs)
    names = [str(n) for n in program.graph_signature.user_inputs]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        check_count(tensors, [n for n, v in zip(names, leaves, strict=True) if _is_tensor(v)])
        given = iter(tensors)
        filled = [next(given) if _is_tensor(leaf) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(filled, spec)
        with torch.no_grad():
            found = module(*args, **kwargs)
        return [t for t in tree_leaves(found) if isinstance(t, Tensor)]

    return run


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
