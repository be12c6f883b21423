"""Finding, copying and reading the parameters of a live module, parametrized or not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, skip_init


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter of this dotted name, and its name there."""
    path, _, parameter = name.rpartition(".")
    return model.get_submodule(path), parameter


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """The tensor of this dotted name as the module uses it now."""
    module, parameter = owner(model, name)
    return cast(Tensor, getattr(module, parameter))


def tensor_or_none(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of this dotted name, or None where the model has none."""
    try:
        found = tensor_at(model, name)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def parametrization(model: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    """What computes the parameter of this name; None where it is stored plainly."""
    module, parameter = owner(model, name)
    if not parametrize.is_parametrized(module, parameter):
        return None
    lists = cast(nn.ModuleDict, module.parametrizations)
    return cast(parametrize.ParametrizationList, lists[parameter])


def parametrized_names(model: nn.Module) -> list[str]:
    """The dotted names of all parameters that a parametrization computes, by every path."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        if parametrize.is_parametrized(module)
        for name in cast(nn.ModuleDict, module.parametrizations)
    ]


def weights_in_use(model: nn.Module) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every parameter as its modules use it, computed ones included, with all its dotted names.

    A tied one comes once. What computes another is no parameter of the network, and left out.
    """
    found: dict[tuple[int, int], list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        held = {n: (id(p), 0) for n, p in module._parameters.items() if p is not None}
        if parametrize.is_parametrized(module):
            for name, computed in cast(nn.ModuleDict, module.parametrizations).items():
                held[name] = _source(cast(parametrize.ParametrizationList, computed))
        for name, source in held.items():
            found.setdefault(source, []).append(f"{path}.{name}" if path else name)
    for names in found.values():
        yield tuple(names), tensor_at(model, names[0])


def _source(computed: parametrize.ParametrizationList) -> tuple[int, int]:
    """What tied weights have in common: what is trained, and what computes the weight from it."""
    return id(getattr(computed, "original", computed)), id(computed[0])


def device_of(model: nn.Module) -> torch.device:
    """The device of a network's tensors; the CPU for one without any."""
    first = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device


def to_device(value: Any, device: torch.device | None) -> Any:
    """A tensor, or the tensors nested in a value, on a device; None leaves them where they are."""
    if device is not None and isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(to_device(v, device) for v in value)
    return {k: to_device(v, device) for k, v in value.items()} if type(value) is dict else value


def clone(model: nn.Module) -> nn.Module:
    """A deep copy of a model that shares nothing with it.

    Two traits of PyTorch's parametrizations need care. Recurrent layers keep the weights that were
    computed, which cannot be copied: they are dropped (the next forward computes them again). And
    a copy shares the class that carries the computed properties: it gets one of its own.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and parametrize.is_parametrized(module):
            drop_flat_weights(module)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            shared = type(module)
            namespace = {k: v for k, v in vars(shared).items() if k not in _OF_THE_CLASS}
            module.__class__ = type(shared.__name__, shared.__bases__, namespace)
    return copied


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy whose computed parameters are ordinary ones of the same values. Ties are kept."""
    copied = clone(model)
    names = parametrized_names(copied)
    values = {n: tensor_at(copied, n).detach().clone() for n in names}
    lists = {n: parametrization(copied, n) for n in names}
    cores = {n: _source(found) for n, found in lists.items() if found is not None}
    made: dict[tuple[int, int], nn.Parameter] = {}
    for name in names:
        module, parameter = owner(copied, name)
        if parametrize.is_parametrized(module):
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
        plain = made.setdefault(cores[name], nn.Parameter(values[name]))
        module.register_parameter(parameter, plain)
    return copied


def unfilled(kind: type[nn.Module], like: Tensor, *args: Any, **options: Any) -> nn.Module:
    """A layer whose numbers are not set, of the device and type of a tensor, trained as it is."""
    make = cast(Any, skip_init)
    made: nn.Module = make(kind, *args, **options, device=like.device, dtype=like.dtype)
    return made.requires_grad_(like.requires_grad)


def drop_flat_weights(layer: nn.RNNBase) -> None:
    """Drop the weights that a recurrent layer keeps in a list; its next forward reads them anew."""
    names = layer._flat_weights_names
    kept = cast(Any, layer)
    kept._flat_weights, kept._flat_weight_refs = [None] * len(names), [_gone] * len(names)


_OF_THE_CLASS = {"__dict__", "__weakref__"}


def _gone() -> None:
    """Stands for a weak reference whose tensor is gone, so that the layer looks again."""
