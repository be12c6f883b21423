"""Choosing how each packed layer runs: packed or dense, whichever is faster here and now."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taut.layers import Packed, packed_layers, run_dense
from taut.modules import device_of, to_device
from taut.trace import Example
from taut.types import Choice


@torch.no_grad()
def tune(model: nn.Module, example: Example | Tensor, seconds: float = 0.03) -> tuple[Choice, ...]:
    """Time every packed layer in both ways, on what one forward gives it, and keep the faster.

    The model is left in eval mode, running as chosen; the choice holds for the example's batch,
    PyTorch's present number of threads and this machine, and is not part of the file. A layer that
    the forward does not call runs dense. example: the model's input, a tensor or (args, kwargs);
    seconds: how long each layer is timed in each way.

    >>> import taut
    >>> taut.tune(torch.nn.Linear(2, 2), torch.zeros(1, 2))  # nothing is packed here
    ()
    """
    args, kwargs = ((example,), {}) if isinstance(example, Tensor) else example
    device = device_of(model)
    args, kwargs = to_device(args, device), to_device(kwargs, device)
    model.eval()
    layers = _outermost(model)
    seen = _inputs(model, layers, args, kwargs)
    batch = next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), 1)
    choices = []
    for name, call in seen.items():
        packed_ms, dense_ms = _race(layers[name], call, seconds)
        layers[name].run_dense(dense_ms < packed_ms)
        times = {"packed_ms": packed_ms, "dense_ms": dense_ms}
        choices.append(Choice(layer=name, batch=batch, threads=torch.get_num_threads(), **times))
    return tuple(choices)


def _outermost(model: nn.Module) -> dict[str, Packed]:
    """The packed layers that do not lie inside another one, which runs them itself."""
    found: dict[str, Packed] = {}
    for name, layer in packed_layers(model).items():
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = layer
    return found


def _inputs(
    model: nn.Module, layers: dict[str, Packed], args: Any, kwargs: Any
) -> dict[str, tuple[Any, Any]]:
    """What each layer is called with first in one forward of the packed network."""
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, a, k, name=name: seen.setdefault(name, (a, k)) and None, with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    run_dense(model, False)  # packed attention calls its parts one by one
    try:
        if layers:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        run_dense(model, True)
    return seen


def _race(layer: Packed, call: tuple[Any, Any], seconds: float) -> tuple[float, float]:
    """Median milliseconds packed and dense, timed by turns, so that noise falls on both."""
    args, kwargs = call

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        layer(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    device = device_of(layer)
    times: dict[bool, list[float]] = {False: [], True: []}
    rounds, spent = 0, 0.0
    while rounds < _ROUNDS or (spent < 2e3 * seconds and rounds < 100):
        for dense in times:
            layer.run_dense(dense)
            once()  # decodes, and warms the caches
            many = [once() for _ in range(_REPEATS)]
            times[dense].append(min(many))
            spent += sum(many)
        rounds += 1
    return statistics.median(times[False]), statistics.median(times[True])


_ROUNDS, _REPEATS = 3, 5
