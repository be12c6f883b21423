"""Variational dropout: each weight learns how much noise it bears, and one that is all noise goes.

    training:    W'[i, j] = W[i, j] + sigma[i, j] · e,   e ~ normal(0, 1)
    afterwards:  W'[i, j] = W[i, j] if log alpha[i, j] < 3 else 0,   alpha = sigma² / W²

The price of the expected bytes, `recover(bytes_weight=...)`, is paid on the divergence of this
posterior from a prior that is uniform in log |W|, in bits and up to a constant that is infinite:

    KL = k1 · (1 - sigmoid(k2 + k3 · log alpha)) + log(1 + 1 / alpha) / 2     nats
    k1, k2, k3 = 0.63576, 1.87320, 1.48695

It falls to 0 as alpha grows. With n training examples the evidence lower bound, the paper's
objective, is bytes_weight = 8 · log(2) / n.

Molchanov, Ashukha, Vetrov: Variational Dropout Sparsifies Deep Neural Networks (ICML 2017). Where
we differ: the noise is drawn on the weights, once a batch, and not on the activations (local
reparameterisation, whose gradients vary less), since a form sees nothing but its weight; the noise
is switched off and the choice fixed after seven tenths of a training, and the rest of it trains
what was kept; log sigma² learns ten times as fast as the weights, which were trained before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.errors import RecipeError
from taut.recoding import Form, Recoding
from taut.selection import Selection
from taut.sparse_weight import sparse_bytes
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.types import Site

K1, K2, K3 = 0.63576, 1.87320, 1.48695
_SPEED = 10.0


@register_step
@dataclass(frozen=True, kw_only=True)
class VariationalDropout(Recoding):
    """Noise on every weight that learns to grow, at the price that the next recover sets on a byte.

    A weight of less than 0.22 of its noise goes at once; at the default noise that is one or two
    in a hundred.
    """

    noise: float = option(
        0.1, low=1e-4, high=0.5, help="its deviation at first, relative to the RMS of the weights"
    )
    threshold: float = option(3.0, low=-4, high=10, help="log alpha from which on a weight goes")

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        """Before training: weights spread evenly around 0 lose what the noise at first hides."""
        gone = min(0.5, self.noise * math.exp(-self.threshold / 2) / math.sqrt(3))
        return sparse_bytes(count, max(1, round((1 - gone) * count)), inner)

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"variational_dropout: site {site.name!r} is written in {math.prod(shape)} numbers "
                "already, not one for each weight; put variational_dropout before the technique "
                "that shares them"
            )

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        return Noise(core, self.noise, self.threshold), core

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(
                f"variational_dropout: site {site.name!r} holds NaN or infinite weights"
            )
        return self.blank(core)


class Noise(Selection):
    """weight = core + noise of variance sigma², which is kept as a log of the core's shape.

    The log is kept divided by the speed at which it learns.
    """

    def __init__(self, core: Tensor, relative: float, threshold: float) -> None:
        super().__init__(core)
        scale = relative * float(core.detach().float().square().mean().sqrt())
        first = 2 * math.log(max(scale, 1e-10)) / _SPEED
        self.slow_log_variance = nn.Parameter(torch.full_like(core, first))
        self.threshold = threshold

    @property
    def log_variance(self) -> Tensor:
        """log sigma², one for each weight."""
        return self.slow_log_variance * _SPEED

    def log_alpha(self, core: Tensor) -> Tensor:
        """log(sigma² / core²), held to [-20, 20] as the approximation of the divergence is flat."""
        return (self.log_variance - (core.square() + 1e-20).log()).clamp(-20, 20)

    def noisy(self, core: Tensor) -> Tensor:
        return core + (self.log_variance / 2).exp() * torch.randn_like(core)

    def merit(self, core: Tensor) -> Tensor:
        return self.threshold - self.log_alpha(core).detach()

    def bits(self, core: Tensor, outer: Tensor | None) -> Tensor:
        log_alpha = self.log_alpha(core)
        return divergence(log_alpha if outer is None else log_alpha[outer]).sum() / math.log(2)


def divergence(log_alpha: Tensor) -> Tensor:
    """The approximate divergence of normal(w, alpha · w²) from a log-uniform prior, in nats."""
    return K1 * (1 - (K2 + K3 * log_alpha).sigmoid()) + F.softplus(-log_alpha) / 2
