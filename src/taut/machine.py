"""Where a result was measured: versions, processor, threads."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("taut", "torch", "numpy", "constriction", "accelerate")
    return {"python": platform.python_version(), **{n: metadata.version(n) for n in names}}


def machine() -> dict[str, Any]:
    """The machine that a latency depends on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (s for s in info.read_text().splitlines() if s.startswith("model name"))
        name = next(lines, name).rpartition(":")[2].strip()
    return {
        "system": platform.system(),
        "processor": name,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
