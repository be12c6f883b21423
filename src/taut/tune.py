"""Choosing how each packed layer runs: packed or dense, whichever is faster here and now."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from taut.layers import Packed, packed_layers, run_dense
from taut.modules import device_of, to_device
from taut.timing import Run, by_turns
from taut.trace import Example
from taut.types import Choice


@torch.no_grad()
def tune(model: nn.Module, example: Example | Tensor, seconds: float = 0.03) -> tuple[Choice, ...]:
    """Time every packed layer in both ways, on what one forward gives it, and keep the faster.

    The model is left in eval mode, running as chosen; the choice holds for the example's batch,
    PyTorch's present number of threads and this machine, and is not part of the file. A layer that
    the forward does not call runs dense; what PyTorch runs as one, a transformer's encoder layer
    too, is chosen as one. example: the model's input, a tensor or (args, kwargs); seconds: how long
    each layer is timed in each way.

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
    tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    batch = next((len(t) for t in tensors if t.dim()), 1)
    choices = []
    for name, call in seen.items():
        packed_ms, dense_ms = _race(layers[name], call, seconds)
        times = {"packed_ms": packed_ms, "dense_ms": dense_ms}
        choices.append(Choice(layer=name, batch=batch, threads=torch.get_num_threads(), **times))
    run_chosen(model, choices, batch)
    return tuple(choices)


def run_chosen(model: nn.Module, choices: Iterable[Choice], batch: int) -> None:
    """Let every packed layer run as was chosen at this batch, and dense where nothing was."""
    run_dense(model, True)
    for choice in choices:
        if choice.batch == batch and choice.runs_packed:
            run_dense(model.get_submodule(choice.layer), False)


def _outermost(model: nn.Module) -> dict[str, nn.Module]:
    """The layers to choose for: packed ones, and what runs the packed ones inside it by itself.

    An encoder layer whose attention runs dense reads the dense weights of all its parts.
    """
    found: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        packed = [layer] if isinstance(layer, Packed) else packed_layers(layer).values()
        multiplies = any(p.multiplies for p in packed)
        if not inside and isinstance(layer, _RUN_AS_ONE) and multiplies:
            found[name] = layer
    return found


_RUN_AS_ONE = (Packed, nn.TransformerEncoderLayer)


def _inputs(
    model: nn.Module, layers: dict[str, nn.Module], args: Any, kwargs: Any
) -> dict[str, tuple[Any, Any]]:
    """What each layer is called with first in one forward of the packed network."""
    seen: dict[str, tuple[Any, Any]] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, a, k, name=name: seen.setdefault(name, (a, k)) and None, with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    for name, layer in layers.items():
        if isinstance(layer, nn.MultiheadAttention):  # what `caches.attend` runs: as many products
            hooks.append(layer.out_proj.register_forward_pre_hook(_as_of(name, seen)))
    run_dense(model, False)  # packed attention calls its parts one by one
    try:
        if layers:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        run_dense(model, True)
    return seen


def _as_of(name: str, seen: dict[str, tuple[Any, Any]]) -> Callable[[nn.Module, Any], None]:
    """A hook of attention's last projection: where nothing called the whole, this stands for it."""

    def look(_: nn.Module, given: Any) -> None:
        seen.setdefault(name, ((given[0],) * 3, {"need_weights": False}))

    return look


def _race(layer: nn.Module, call: tuple[Any, Any], seconds: float) -> tuple[float, float]:
    """Median milliseconds packed and dense, timed by turns, so that noise falls on both."""
    args, kwargs = call

    def ready(dense: bool) -> Run:
        run_dense(layer, dense)  # the first call decodes
        return partial(layer, *args, **kwargs)

    packed_ms, dense_ms = by_turns(
        [partial(ready, False), partial(ready, True)], device_of(layer), seconds=seconds, least=3,
        most=100, repeats=5,
    )  # fmt: skip
    return packed_ms, dense_ms
