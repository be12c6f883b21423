"""Tensors for other tools: a .safetensors file of a network's parameters and buffers.

Floats go by their names. A weight of whole numbers is `<name>.numbers` (int8) and `<name>.step`
([count] float32: for all, each row, or each run of columns of a row), with `<name>.zero` where its
zeros are not 0; W = step · (numbers − zero). A tied tensor stands there once, by its first name.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from taut.errors import ExportError
from taut.export.check import EXACT, Agreement, difference
from taut.export.job import Job


def write(job: Job, path: Path) -> None:
    """Write the tensors of the network."""
    kind = getattr(torch, job.precision)
    found: dict[str, Tensor] = {}
    for name, value in _tensors(job).items():
        whole = job.plain.integers.get(name)
        if whole is None:
            narrow = value.is_floating_point() and value.numel() > 1
            found[name] = (value.to(kind) if narrow else value).contiguous()
            continue
        found |= {f"{name}.numbers": whole.numbers, f"{name}.step": whole.steps}
        if whole.zeros is not None:
            found[f"{name}.zero"] = whole.zeros
    about = {k: v if isinstance(v, str) else json.dumps(v) for k, v in job.about.items()}
    save_file(found, str(path), metadata=about)


def compared(job: Job, path: Path) -> Agreement:
    """Read a file back, and compare each tensor with the network's."""
    stored = load_file(str(path))
    wanted = _tensors(job)
    found = {}
    for name in wanted:
        if name in stored:
            found[name] = stored[name]
            continue
        numbers, steps = stored[f"{name}.numbers"], stored[f"{name}.step"]
        zeros = stored.get(f"{name}.zero", torch.zeros(len(steps)))
        groups = numbers.reshape(len(steps), -1).float()
        found[name] = ((groups - zeros[:, None]) * steps[:, None]).reshape(numbers.shape)
    pairs = [difference([found[n].to(wanted[n].dtype)], [wanted[n]]) for n in wanted]
    worst = max((p[0] for p in pairs), default=0.0)
    error = max((p[1] for p in pairs), default=0.0)
    return Agreement(
        max_error=worst, error=error, allowed=EXACT[job.precision], samples=len(wanted)
    )


def opened(path: Path, threads: int | None = None, precision: str = "float32") -> None:
    """Tensors do not run."""
    raise ExportError(
        f"{path.name} holds tensors and no network; export to an engine, like to='onnx'"
    )


def _tensors(job: Job) -> dict[str, Tensor]:
    """Every tensor of the plain network, by its first name."""
    seen: dict[int, str] = {}
    found = {}
    for name, value in job.plain.network.state_dict(keep_vars=True).items():
        if seen.setdefault(id(value), name) == name:
            found[name] = value.detach()
    return found
