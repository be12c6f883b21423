"""What Taut found on this machine: processor, kernels, PyTorch, engines."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from taut.kernels import native
from taut.machine import machine

ENGINES = {"onnxruntime": "onnx", "openvino": "openvino", "executorch": "executorch"}
"""The packages that run exported networks, and the extra that installs each."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What results on this machine depend on.

    machine: system, processor, PyTorch's threads, GPU; versions: of Python, Taut and PyTorch;
    features: of the processor, as far as kernels ask; library and build: the compiled kernels,
    None without them; operations: the variant that each runs; engines: their versions.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    features: tuple[str, ...]
    library: str | None
    build: str | None
    operations: Mapping[str, str]
    engines: Mapping[str, str | None]

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine."""
    return Diagnosis(
        machine=machine(),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("taut", "torch")},
        },
        features=native.features(),
        library=native.LIBRARY,
        build=native.build(),
        operations={op: native.variants(op)[0] for op in native.operations()},
        engines={name: _version(name) for name in ENGINES},
    )


def remedy(engine: str) -> str | None:
    """The command that installs an engine, where Taut has an extra for it."""
    extra = ENGINES[engine]
    offered = metadata.metadata("taut").get_all("Provides-Extra") or []
    return f"pip install taut[{extra}]" if extra in offered else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
