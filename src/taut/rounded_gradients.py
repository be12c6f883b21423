"""Training with gradients of few bits: what comes back to each layer is rounded, with noise.

    g' = 2 · m · (round((2**bits − 1) · u) / (2**bits − 1) − 1/2),
    u = g / (2 · m) + 1/2 + noise / (2**bits − 1),    m = max |g| of the example,

noise uniform in [-1/2, 1/2), so that the mean of g' is g. g: the gradient of the loss with respect
to a layer's output, in each example alone; what the layer then hands on, and what its weight gets,
follows from g'. The network that comes of it is like any other.

Zhou et al.: DoReFa-Net: training low bitwidth convolutional neural networks with low bitwidth
gradients (2016), equation 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from taut.activations import TAKERS
from taut.errors import RecipeError
from taut.technique import Setting, matches, option, register_step


@register_step
@dataclass(frozen=True, kw_only=True)
class QuantizeGradients(Setting):
    """Round the gradients at the outputs of Linear and Conv layers in recoveries that follow."""

    bits: int = option(6, low=1, high=8, unit="bit", help="of a gradient")
    only: str = option("*", help="layers: comma-separated patterns, `!` excludes")

    def attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Begin; removing the handles ends it. Raises RecipeError where no layer is chosen."""
        layers = {p: m for p, m in model.named_modules() if isinstance(m, TAKERS)}
        chosen = [m for p, m in layers.items() if matches(self.only, (p,))]
        if not chosen:
            known = ", ".join(layers) or "none is Linear or Conv"
            raise RecipeError(
                f"quantize_gradients: only={self.only!r} matches no layer; known: {known}"
            )
        return [m.register_forward_hook(self._watch) for m in chosen]

    def _watch(self, layer: nn.Module, given: Any, output: Tensor) -> Tensor:
        watched: Tensor = _Rounded.apply(output, self.bits)  # type: ignore[no-untyped-call]
        return watched if layer.training else output


class _Rounded(torch.autograd.Function):
    """The same forward; the gradient rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.most = 2**bits - 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad, most = grads[0], ctx.most
        over = tuple(range(1, grad.dim()))
        top = grad.abs().amax(over, keepdim=True).clamp(min=torch.finfo(grad.dtype).tiny)
        share = grad / (2 * top) + 0.5 + (torch.rand_like(grad) - 0.5) / most
        return 2 * top * ((share * most).round().clamp(0, most) / most - 0.5), None
