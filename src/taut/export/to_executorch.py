"""ExecuTorch's programs, for phones and small machines: XNNPACK runs what it can.

Memory is planned as the file is written: it takes inputs of the example's own shape. Everything is
floats: whole numbers are decoded, and what layers round is rounded in floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import Tensor

from taut.errors import ExportError
from taut.export.job import Job
from taut.export.targets import Runner, check_count
from taut.files import write_atomically
from taut.quiet import silenced


def write(job: Job, path: Path) -> None:
    """Lower the network and write it. Raises ExportError for what ExecuTorch lacks."""
    if job.precision != "float32":
        raise ExportError(
            f"export: files for ExecuTorch hold float32, got precision={job.precision!r}; leave it "
            "out, or use to='onnx'"
        )
    rounding: Any = {torch.ops.taut.round_input.default: _round_input}
    try:
        with silenced():
            program = job.program.run_decompositions(rounding)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            lowered = edge.to_executorch()
    except Exception as error:  # whatever its passes make of a network
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"ExecuTorch does not take the network: {reason}; write that layer with other "
            "operations, or use another engine"
        ) from error
    write_atomically(path, bytes(lowered.buffer))


def opened(path: Path, threads: int | None = None, precision: str = "float32") -> Runner:
    """A program in ExecuTorch's own runtime, which chooses its threads itself."""
    content = path.read_bytes()
    try:
        program = Runtime.get().load_program(content)
        method = program.load_method("forward")
        assert method is not None
        metas = [method.metadata.input_tensor_meta(i) for i in range(method.metadata.num_inputs())]
    except Exception as error:
        raise ExportError(f"ExecuTorch cannot read {path.name}: {error}") from error
    shapes = [list(m.sizes()) for m in metas]
    kept = content, program  # the method reads both as it runs

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        assert kept
        check_count(tensors, [f"input {i}" for i in range(len(shapes))])
        given = [t.detach().cpu().contiguous() for t in tensors]
        if [list(t.shape) for t in given] != shapes:
            raise ExportError(
                f"ExecuTorch does not run {path.name} on inputs of shapes "
                f"{[list(t.shape) for t in given]}: its memory is planned for {shapes}; export it "
                "with an example of that shape"
            )
        found = method.execute(given)
        return [t.clone() for t in found if isinstance(t, Tensor)]  # it owns their memory

    return run


def _round_input(x: Tensor, step: float, low: int, high: int) -> Tensor:
    return (x / step + 0.5).floor().clamp(low, high) * step
