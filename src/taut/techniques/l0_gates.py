"""L0 regularisation: a gate before each weight, or each row, that learns whether to stay open.

    W'[i, j] = W[i, j] · z[i, j],   z = clip(s · (zeta - gamma) + gamma, 0, 1)
    s = sigmoid((log u - log(1 - u) + log alpha) / beta),   u ~ uniform(0, 1)
    P(z > 0) = sigmoid(log alpha - beta · log(-gamma / zeta))

s is the concrete distribution, stretched to (gamma, zeta) = (-0.1, 1.1) and clipped, so that z is
exactly 0 and exactly 1 with probabilities of their own; beta = 2/3. The price of the expected
bytes, `recover(bytes_weight=...)`, closes gates:

    bits = gates · H(p) + bits · sum of P(z > 0) over the weights,   p = mean P(z > 0)

H is the entropy of positions, bits what the value of a kept weight takes.

Louizos, Welling, Kingma: Learning Sparse Neural Networks through L0 Regularization (ICLR 2018).
Where we differ: the penalty is in bits of the file and counts positions; in training z is divided
by its median, as in inverted dropout, so that a gate that is kept counts as 1 and a file needs
nothing but positions and values; gates are fixed after seven tenths of a training, and the rest of
it trains what they kept; log alpha starts by magnitude and learns ten times as fast as the weights,
which were trained before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.recoding import Form, Recoding
from taut.selection import Selection
from taut.sparse_weight import sparse_bytes
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.types import Site

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
_SHIFT = -BETA * math.log(-GAMMA / ZETA)  # P(z > 0) = sigmoid(log alpha + shift)
_SPEED = 10.0


@register_step
@dataclass(frozen=True, kw_only=True)
class L0Gates(Recoding):
    """Gates that learn to close, at the price that the following recover sets on a byte.

    Where each weight has its gate, a small one starts nearer to being shut, log alpha being larger
    by log(|w| / RMS); those that this shuts at once are a few in a hundred.
    """

    groups: str = option(
        "weights", choices=("weights", "rows", "columns"),
        help="what one gate opens; the rows of a convolution are its filters",
    )  # fmt: skip
    start: float = option(
        0.97, low=0.9, below=1, help="chance to be open at first, of a weight as large as the RMS"
    )
    bits: float = option(12.0, low=0, high=32, unit="bit", help="of the value of a kept weight")

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        """Before training: weights spread evenly around 0 lose the smallest."""
        gone = math.exp(-self._at_rms) / math.sqrt(3) if self.groups == "weights" else 0.0
        return sparse_bytes(count, max(1, round((1 - gone) * count)), inner)

    @property
    def _at_rms(self) -> float:
        """log alpha at first, of a weight as large as the RMS."""
        return math.log(self.start / (1 - self.start)) - _SHIFT

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        if shape != site.shape:
            raise RecipeError(
                f"l0_gates: site {site.name!r} is written in {math.prod(shape)} numbers already, "
                "not one for each weight; put l0_gates before the technique that shares them"
            )
        if self.groups == "columns" and len(shape) < 2:
            raise RecipeError(
                f"l0_gates: site {site.name!r} of shape {list(shape)} has no columns; use "
                "groups='weights'"
            )

    def blank(self, core: Tensor) -> tuple[Gates, Tensor]:
        return Gates(core, self.groups, self._at_rms, self.bits), core

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"l0_gates: site {site.name!r} holds NaN or infinite weights")
        form, core = self.blank(core)
        if self.groups == "weights":
            size = core.abs() / core.square().mean().sqrt().clamp(min=1e-30)
            form.slow_log_alpha.data += size.clamp(1e-3, 1e3).log() / _SPEED
        return form, core


class Gates(Selection):
    """weight = core · gate. log_alpha: of the core's shape, or one for each of its rows or columns.

    It is kept divided by the speed at which it learns.
    """

    def __init__(self, core: Tensor, groups: str, log_alpha: float, value_bits: float) -> None:
        super().__init__(core)
        whole = {"weights": range(core.dim()), "rows": (0,), "columns": (1,)}[groups]
        shape = [n if d in whole else 1 for d, n in enumerate(core.shape)]
        self.slow_log_alpha = nn.Parameter(torch.full(shape, log_alpha / _SPEED))
        self.value_bits = value_bits

    @property
    def log_alpha(self) -> Tensor:
        """Above 0 a gate is more likely open than shut: the median of z is above one half."""
        return self.slow_log_alpha * _SPEED

    def gate(self, noise: Tensor) -> Tensor:
        """z for noise in (0, 1), of log_alpha's shape; noise of one half gives the median."""
        logit = (noise.log() - (-noise).log1p() + self.log_alpha) / BETA
        return torch.clamp(logit.sigmoid() * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)

    def noisy(self, core: Tensor) -> Tensor:
        noise = torch.rand_like(self.slow_log_alpha).clamp(1e-6, 1 - 1e-6)
        median = self.gate(torch.full_like(noise, 0.5)).detach()
        return core * (self.gate(noise) / median.clamp(min=0.5))

    def merit(self, core: Tensor) -> Tensor:
        return self.log_alpha.detach().expand_as(core)

    def bits(self, core: Tensor, outer: Tensor | None) -> Tensor:
        log_alpha, count = self.log_alpha, core.numel()
        if outer is not None:
            log_alpha = log_alpha.expand_as(core)[outer]
            count = log_alpha.numel()
        chance = (log_alpha + _SHIFT).sigmoid()
        p = chance.mean()
        entropy: Tensor = (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)
        return p * (self.value_bits * count) + entropy * chance.numel()
