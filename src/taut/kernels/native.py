"""The compiled kernels: loading them, what this machine can run, and forcing a variant.

The C++ lies in csrc/ and is built when Taut is installed. Where that was not possible everything
runs by the definitions in `reference.py`, and says so once.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

FEATURES = ("avx2", "avx512", "avx512_vpopcntdq", "avx512_vnni", "neon")
"""What dispatch looks at; bit i of a number of flags stands for FEATURES[i]."""

_ALL = 2 ** len(FEATURES) - 1


def _load() -> str | None:
    found = importlib.util.find_spec("taut.kernels.native_ops")
    why = "they were not built"
    if found is not None and found.origin is not None:
        try:
            torch.ops.load_library(found.origin)  # type: ignore[no-untyped-call]
            return found.origin
        except OSError as error:  # built for another processor, or against another PyTorch
            why = str(error)
    warnings.warn(
        f"Taut runs without its native kernels ({why}), so packed layers run slowly, in plain "
        "PyTorch; to build them, have a C++20 compiler, `pip install scikit-build-core cmake "
        "ninja`, and reinstall Taut by `pip install --no-build-isolation --no-cache-dir "
        "--force-reinstall --no-deps`",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


LIBRARY = _load()
"""The file of the compiled kernels, if they are there."""

LOADED = LIBRARY is not None


def features() -> tuple[str, ...]:
    """What this processor has, of FEATURES."""
    if not LOADED:
        return ()
    flags = torch.ops.taut.machine_flags()
    return tuple(f for i, f in enumerate(FEATURES) if flags >> i & 1)


def flags_of(names: tuple[str, ...]) -> int:
    """The number that stands for these features."""
    return sum(1 << FEATURES.index(n) for n in names)


def operations() -> tuple[str, ...]:
    """The operations that were compiled."""
    return tuple(torch.ops.taut.operations().split()) if LOADED else ()


def variants(op: str, having: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The variants of an operation that a processor with these features can run, fastest first.

    The first is the one that runs. having: invented features; those of this machine by default.
    """
    if not LOADED:
        return ("reference",)
    known = features() if having is None else having
    return tuple(torch.ops.taut.variants(op, flags_of(known)).split())


def build() -> str | None:
    """What compiled the kernels: compiler, and the PyTorch whose headers it read."""
    return str(torch.ops.taut.build()) if LOADED else None


@contextmanager
def restricted(to: tuple[str, ...]) -> Iterator[None]:
    """Within it, kernels see a processor that has no more than these features (process-wide)."""
    torch.ops.taut.restrict_flags(flags_of(to))
    try:
        yield
    finally:
        torch.ops.taut.restrict_flags(_ALL)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def runs(x: Tensor, *parts: Tensor, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
    """Whether a kernel can take this input: on the CPU, of such a dtype, no gradient asked."""
    if not LOADED or x.dtype not in dtypes or not x.is_cpu:
        return False
    asked = torch.is_grad_enabled()
    if asked and x.requires_grad:
        return False
    for part in parts:  # noqa: SIM110 # a generator takes twice as long, and every call comes here
        if not part.is_cpu or (asked and part.requires_grad):
            return False
    return True


def rows_of(x: Tensor) -> Tensor:
    """x [..., in] as [n, in], contiguous; at once where it has two dimensions.

    What a small layer spends before and after its kernel is more than what the kernel takes.
    """
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x.contiguous()


def floats_of(x: Tensor) -> Tensor:
    """x [..., in] as [n, in] float32, contiguous."""
    return rows_of(x if x.dtype is torch.float32 else x.float())


def shaped_as(x: Tensor, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y [n, out] as [..., out], by the dimensions and the dtype of x, or another dtype."""
    if x.dim() != 2:
        y = y.reshape(*x.shape[:-1], y.shape[-1])
    dtype = dtype or x.dtype
    return y if y.dtype is dtype else y.to(dtype)


F = TypeVar("F", bound=Callable[..., Any])


def fake(op: str) -> Callable[[F], F]:
    """Tell torch.compile and torch.export the shapes that an operation gives."""
    return torch.library.register_fake(f"taut::{op}") if LOADED else lambda f: f
