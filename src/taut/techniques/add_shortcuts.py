"""Shortcuts around layers, past the norm behind each: what a layer reads is added to what it gives.

    y = norm(W · x') + x        where x and y have the same shape

A layer of bits tells only so much; the real numbers that it read go on beside it (Liu, Wu, Luo et
al.: Bi-Real Net, ECCV 2018). Put it before `binarize`, and train at a full rate: the network
computes something else from then on. Where we differ: the shortcuts of the network's own blocks
stay, and layers that change the shape of their input get none.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taut import edits
from taut.activations import TAKERS
from taut.edits import Edit, register_edit
from taut.errors import FormatError, RecipeError
from taut.reshaping import Reshaping
from taut.statistics import Statistics
from taut.technique import register_step
from taut.trace import Trace

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class AddShortcuts(Reshaping):
    """Add what a Linear or Conv layer reads to what it, or the norm behind it, gives."""

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        chosen = {s.name.rpartition(".")[0] for s in self.sites(trace)}
        ends = _where(model, trace)
        found = {path: end for path, end in ends.items() if path in chosen}
        if not found:
            raise RecipeError(
                f"add_shortcuts: no layer of only={self.only!r} gives the shape that it reads; "
                f"layers that do: {', '.join(ends) or 'none'}"
            )
        for path, end in found.items():
            change = Shortcut(layer=path, end=end)
            model = change.replay(model)
            edits.note(model, change)
            _log.info("add_shortcuts: what %s reads is added to what %s gives", path, end)
        return model


@torch.no_grad()
def _where(model: nn.Module, trace: Trace) -> dict[str, str]:
    """The layers that can have a shortcut, and the layer behind which it ends, by their paths."""
    read: dict[str, Tensor] = {}
    gave: dict[int, tuple[str, Tensor]] = {}  # by the identity of the result
    found: dict[str, str] = {}

    def look(path: str, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        x = given[0] if given else None
        if not (isinstance(x, Tensor) and isinstance(out, Tensor)):
            return
        if isinstance(module, TAKERS):
            read[path] = x
            gave[id(out)] = (path, out)
            if x.shape == out.shape:
                found[path] = path
        elif isinstance(module, _NORMS) and id(x) in gave:
            path_before, _ = gave[id(x)]
            if read[path_before].shape == out.shape:
                found[path_before] = path

    probe = copy.deepcopy(model).eval()
    for path, module in probe.named_modules():
        module.register_forward_hook(lambda m, given, out, path=path: look(path, m, given, out))
    args, kwargs = trace.example_on(probe)
    probe(*args, **kwargs)
    return found


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


@register_edit
@dataclass(frozen=True, kw_only=True)
class Shortcut(Edit):
    """What `layer` reads is added to what `end` gives."""

    layer: str
    end: str

    def replay(self, model: nn.Module) -> nn.Module:
        for path in (self.layer, self.end):
            if not isinstance(model.get_submodule(path), TAKERS + _NORMS):
                raise FormatError(f"shortcut: {path!r} is no Linear, Conv or norm layer")
        held = _Held()
        model.get_submodule(self.layer).register_forward_pre_hook(_Take(held), prepend=True)
        model.get_submodule(self.end).register_forward_hook(_Add(held))
        return model


@dataclass
class _Held:
    """What the layer read, until the end has given its result."""

    x: list[Tensor] = field(default_factory=list)


@dataclass
class _Take:
    held: _Held

    def __call__(self, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.held.x = [given[0]]


@dataclass
class _Add:
    held: _Held

    def __call__(self, end: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        (x,), self.held.x = self.held.x, []
        return out + x
