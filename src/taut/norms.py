"""Moving scales between layers and batch norms while every answer stays the same.

    norm(y) = (y − mean) / sqrt(var + eps) · weight + bias,    y = W · x

Multiply row o of W by s[o] > 0, mean with it, and the norm still gives what it gave if
weight / sqrt(var + eps) is divided by s[o].
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from taut.errors import RecipeError
from taut.modules import owner, parametrization
from taut.statistics import Statistics
from taut.trace import Trace
from taut.types import Site


def traced(name: str, statistics: Statistics | None) -> Trace:
    """The trace, for a step that needs to know which layers follow each other."""
    if statistics is None or statistics.trace is None:
        raise RecipeError(
            f"{name} needs the trace of the network; apply it by taut.apply or taut.compress"
        )
    return statistics.trace


def plain_weight(name: str, model: nn.Module, site: Site) -> Tensor:
    """The weight, to be changed in place. Raises RecipeError where a technique has recoded it."""
    if parametrization(model, site.name) is not None:
        raise RecipeError(
            f"{name}: site {site.name!r} is written in another form already; put {name} first in "
            "the recipe"
        )
    module, leaf = owner(model, site.name)
    return cast(Tensor, getattr(module, leaf)).data


def bias_of(name: str, model: nn.Module, site: Site) -> Tensor | None:
    """The bias that is added to the site's products, to be changed in place; None without one.

    Raises RecipeError where a technique has recoded it.
    """
    module, leaf = owner(model, site.name)
    refuse_recoded(name, module, site.name, (leaf.replace("weight", "bias"),))
    bias = module._parameters.get(leaf.replace("weight", "bias"))
    return None if bias is None else bias.data


def norm_of(name: str, model: nn.Module, trace: Trace, site: Site) -> _BatchNorm | None:
    """The batch norm that alone reads the site's outputs, if it keeps its own statistics.

    Raises RecipeError where a technique has recoded it.
    """
    path = next((trace.norms[n] for n in site.names if n in trace.norms), None)
    norm = None if path is None else model.get_submodule(path)
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return None
    refuse_recoded(name, norm, site.name)
    return norm


def refuse_recoded(
    name: str, module: nn.Module, site: str, parts: tuple[str, ...] = ("weight", "bias")
) -> None:
    """Raise RecipeError where a technique has recoded a part of what stands beside a site."""
    for part in parts:
        if parametrize.is_parametrized(module, part):
            raise RecipeError(
                f"{name}: the {part} beside site {site!r} is written in another form already; put "
                f"{name} before what recodes it"
            )


def scale_rows(weight: Tensor, bias: Tensor | None, scale: Tensor) -> None:
    """Multiply each row of a weight, and its bias, in place. scale: [out]."""
    weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.mul_(scale)


def follow_scale(norm: _BatchNorm, scale: Tensor, spread: Tensor) -> None:
    """Let a norm give what it gave, now that its input is multiplied by `scale`, [channels].

    spread: the square of what sqrt(var + eps) is to become, above 0.
    """
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    factor = norm.weight.data / (var + norm.eps).sqrt() / scale
    var.copy_((spread - norm.eps).clamp(min=0))
    mean.mul_(scale)
    norm.weight.data.copy_(factor * (var + norm.eps).sqrt())


def scale_of(norm: _BatchNorm) -> Tensor:
    """What the norm multiplies each channel by: weight / sqrt(var + eps); 1 where next to 0."""
    scale = norm.weight.data / (cast(Tensor, norm.running_var) + norm.eps).sqrt()
    return torch.where(scale.abs() > 1e-6, scale, 1.0)
