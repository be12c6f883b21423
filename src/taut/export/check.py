"""Whether an exported file gives the answers of the packed network, and if not, from where on."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taut.activations import StepCode
from taut.errors import ExportError
from taut.export.job import Job
from taut.export.plain import plain
from taut.export.targets import Runner, Target
from taut.layers import packed_layers
from taut.trace import Example

EXACT = {"float32": 1e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""How large the error may be, beside the answers' own size, by the precision of the file."""

ROUNDED = 4.0
"""The same where inputs are rounded, in multiples of what that rounding changes in the answers.

An engine rounds otherwise than the packed network: what a last bit in a sum moves by a whole step,
on finer steps, and in up to three times as many places (between.py). Independent errors of one size
would add up to sqrt(1 + 3) = 2 of it; a Transformer in OpenVINO was measured somewhat above that.
So the bound is set by experience, not derived, and leaves twice the estimate.
"""

MOST, MOST_COARSE = 0.5, 0.1
"""Never more than these: of 8 bits, and of fewer, which engines round to the very same levels."""

_FINE = 127  # steps, of 8 bits


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near a file's answers are to the packed network's.

    max_error: the largest difference; error: the root mean square of the differences over that of
    the answers; allowed: how large that may be. samples: how many examples were compared.
    """

    max_error: float
    error: float
    allowed: float
    samples: int

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed


def difference(found: Sequence[Any], wanted: Sequence[Any]) -> tuple[float, float]:
    """The largest difference, and the relative error, of the worst of some outputs."""
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if isinstance(w, Tensor)]
    worst, relative = 0.0, 0.0
    for f, w in pairs:
        if f.shape != w.shape:
            return math.inf, math.inf
        if not w.numel():
            continue
        a, b = f.double(), w.double()
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        apart = apart.nan_to_num(math.inf)
        size = float(b[b.isfinite()].square().mean().sqrt()) if bool(b.isfinite().any()) else 0.0
        worst = max(worst, float(apart.max()))
        relative = max(relative, float(apart.square().mean().sqrt()) / max(size, 1e-12))
    return worst, relative


@torch.no_grad()
def allowed(packed: nn.Module, samples: Sequence[Example], precision: str) -> float:
    """How large the relative error of a file of this network may be."""
    codes = [p.input_code for p in packed_layers(packed).values() if p.input_code is not None]
    if not codes:
        return EXACT[precision]
    fine = any(isinstance(c, StepCode) and c.high - c.low >= _FINE for c in codes)
    exact, cost = plain(packed, rounded=False).network, 0.0
    for args, kwargs in samples:
        cost = max(cost, difference(*(tree_leaves(n(*args, **kwargs)) for n in (exact, packed)))[1])
    return EXACT[precision] + min(ROUNDED * cost, MOST if fine else MOST_COARSE)


@torch.no_grad()
def agreement(job: Job, running: nn.Module, samples: Sequence[Example]) -> Agreement:
    """Compare a file that runs with the packed network, on some batches."""
    worst, error, count = 0.0, 0.0, 0
    for args, kwargs in samples:
        wanted = tree_leaves(job.packed(*args, **kwargs))
        found = tree_leaves(running(*args, **kwargs))
        a, b = difference(found, wanted)
        worst, error = max(worst, a), max(error, b)
        count += length(args, kwargs)
    most = allowed(job.packed, samples, job.precision)
    return Agreement(max_error=worst, error=error, allowed=most, samples=count)


def length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of how many examples the arguments of a forward are."""
    leaves = tree_leaves((args, kwargs))
    return next((len(t) for t in leaves if isinstance(t, Tensor) and t.dim()), 1)


@torch.no_grad()
def first_apart(job: Job, target: Target, sample: Example, most: float) -> str | None:
    """The first layer whose output in the engine is further off than `most`, and by how much.

    None where none does, or the engine's files do not tell.
    """
    if "onnxscript" not in target.packages:
        return None
    file = importlib.import_module("taut.export.onnx_file")
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                seen[path] = first

        return hook

    hooks = [m.register_forward_hook(keep(n)) for n, m in job.plain.network.named_modules() if n]
    try:
        job.plain.network(*sample[0], **sample[1])
    finally:
        for hook in hooks:
            hook.remove()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        engine = target.module()
        layers = file.save_with_layers(job, path, engine.opened, engine.suit)
        run: Runner = engine.opened(path)
        tensors = [t for t in tree_leaves(sample) if isinstance(t, Tensor)]
        outputs = run(tensors)
    for layer, at in layers:
        output = outputs[at]
        if layer in seen and seen[layer].shape == output.shape:
            worst, error = difference([output], [seen[layer]])
            if error > most:
                return f"from layer {layer!r} on, where it is off by {worst:.3g}"
    return None


def refuse(found: Agreement, kept: Path, where: str | None) -> ExportError:
    """The error that tells that a file disagrees."""
    return ExportError(
        f"the exported file does not give the answers of the packed network: they are off by up to "
        f"{found.max_error:.3g}, {found.error:.1%} of their size where {found.allowed:.1%} may be"
        f"{', ' + where if where else ''}; it is kept as {kept}"
    )
