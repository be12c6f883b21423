"""PyTorch's exported program, compiled ahead of time for this machine (AOTInductor).

The file runs here, and where there is the same processor and PyTorch; it holds machine code, so
load none that you do not trust.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from taut.errors import ExportError
from taut.export.job import Job
from taut.export.targets import Runner
from taut.export.to_torch import program_of


def write(job: Job, path: Path) -> None:
    """Compile the network as it runs now, its layers packed or dense."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ExportError(
            f"aoti compiles C++, and there is no {compiler} here; install a compiler, or use "
            "to='torch', which PyTorch compiles where it runs by torch.compile"
        )
    program, inductor = program_of(job), cast(Any, torch)._inductor
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what PyTorch itself is to give up
            inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # whatever the compiler makes of itself
        reason = str(error).strip().splitlines()[0][:300]
        raise ExportError(
            f"AOTInductor does not compile the network: {reason}; use to='torch'"
        ) from error


def opened(path: Path, threads: int | None = None, precision: str = "float32") -> Runner:
    """The compiled network, on as many threads as PyTorch has."""
    try:
        compiled = cast(Any, torch)._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise ExportError(
            f"{path.name} is no network compiled for this machine: {error}"
        ) from error

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [t for t in tree_leaves(compiled(*tensors)) if isinstance(t, Tensor)]

    return run
