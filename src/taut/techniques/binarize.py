"""Weights of one bit, or of three values; activations of one bit too.

    binary    W' = scale · sign(W)
    ternary   W' = scale · sign(W) where |W| > Δ, else 0,    Δ = 0.7 · mean |W|
    trained   W' = up where W > Δ, −down where W < −Δ, else 0,    Δ = 0.05 · max |W|
    signs     x' = ±1: sign(x);    pair   x' = middle ± spread: the nearer of two fitted levels

scale: the mean |W| of each row (or of the site) over the weights that are not zero, or 1; under a
mask, whose weights have no rows, always of the site. The weights that are trained stay real:
gradients pass the sign straight through where |W| ≤ 1 (`scale="none"`) or everywhere, those of the
scale are real ones. Gradients of the activations pass where |x − middle| ≤ spread (|x| ≤ 1 for
signs), flat or as 2 − 2|x|.

Courbariaux, Bengio, David: BinaryConnect (NIPS 2015): binary with scale="none", `stochastic` in
training. Courbariaux, Hubara et al.: Binarized Neural Networks (2016): signs. Rastegari et al.:
XNOR-Net (ECCV 2016): the scales. Li, Zhang, Liu: Ternary Weight Networks (2016): Δ. Zhu, Han, Mao,
Dally: Trained Ternary Quantization (ICLR 2017): up and down, whose gradients are sums over their
weights, and by which those of the weights are multiplied. Liu et al.: Bi-Real Net (ECCV 2018):
gradient="bireal" (its shortcuts: add_shortcuts). Where we differ: inputs have no scale for each
place, as XNOR-Net has, but two levels fitted to what the layer reads, for which a bit stands all
the same, so that networks with ReLU binarize as they are; a sign of 0 is +1.

The first and the last site stay as they are unless `ends` says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from taut.activations import InputCode, InputForm, LevelCode, left_real
from taut.bit_weight import BitWeight
from taut.errors import RecipeError
from taut.kernels import Levels
from taut.packed import PackedWeight, Plain
from taut.recoding import Form, InnerRecoding, Pack
from taut.statistics import Statistics
from taut.technique import Technique, option, register_step
from taut.types import Site


@register_step
@dataclass(frozen=True, kw_only=True)
class Binarize(InnerRecoding):
    """Let each weight be a sign with a scale, or a sign or zero, and each input one of two levels.

    Weights alone cost little; activations cost more, and need training at a full rate, from a
    network with batch norms as a rule.
    """

    weights: str = option(
        "binary", choices=("binary", "ternary", "trained", "stochastic"),
        help="signs; signs and zeros; the same with two trained values for a site; or signs that "
        "are drawn while training",
    )  # fmt: skip
    scale: str = option(
        "row", choices=("row", "site", "none"), help="of each row, of the site, or 1"
    )
    activations: str = option(
        "real", choices=("real", "signs", "pair"), help="as they are, signs, or two fitted levels"
    )
    gradient: str = option(
        "clip", choices=("clip", "bireal"), help="of the activations: 1 or 2 - 2|x| within ±1"
    )

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        local = super().localise(model, sites, statistics)
        real = left_real(model, sites, self.name) if self.activations != "real" else set()
        left = replace(self, activations="real")
        return {n: left if n in real else step for n, step in local.items()}

    @property
    def planes(self) -> int:
        return {"ternary": 2, "trained": 3}.get(self.weights, 1)

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        whole = count == site.numel and len(site.shape) > 1
        rows = site.shape[0] if self.scale == "row" and whole and self.weights != "trained" else 1
        zeros = 0.15 if site.kind == "embedding" else 0.05  # of fresh weights, normal or uniform
        entropy = 1 - zeros - zeros * math.log2(zeros) - (1 - zeros) * math.log2(1 - zeros)
        bits = {"ternary": 1.56, "trained": entropy}.get(self.weights, 1.0)
        return count * bits / 8 + (1.35 * rows if self.scale != "none" else 2) * self.planes

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        if self.weights == "trained":
            return TwoValues(), core
        return Signs(self.weights, self.scale, self.scale == "row" and core.dim() > 1), core

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"binarize: site {site.name!r} holds NaN or infinite weights")
        form, core = self.blank(core)
        if isinstance(form, TwoValues):
            core = core if matters is None else core * matters
            form.settle(core)
            return form, core
        if matters is None:
            return form, core
        return Signs(self.weights, self.scale, False), core * matters  # what is kept has no rows

    def blank_input(self, model: nn.Module, site: Site) -> InputForm | None:
        if self.activations == "real":
            return None
        form = Pair(self.gradient == "bireal")
        if self.activations == "signs":
            form.spread.requires_grad_(False)
            form.middle.requires_grad_(False)
        return form

    def fit_input(
        self, model: nn.Module, site: Site, statistics: Statistics | None
    ) -> InputForm | None:
        form = self.blank_input(model, site)
        if isinstance(form, Pair) and self.activations == "pair":
            if statistics is None:
                raise RecipeError(
                    f"binarize: the levels of activations need data, and site {site.name!r} was "
                    "given none; use activations='signs'"
                )
            form.settle(statistics.inputs(site))
        return form


class Signs(Form):
    """The core is the real weight; entries that a mask outside leaves out are zero in it.

    by_row: bool, whether each row has a scale of its own.
    """

    by_row: Tensor

    def __init__(self, weights: str, scale: str, by_row: bool) -> None:
        super().__init__()
        self.weights, self.scaled = weights, scale != "none"
        self.register_buffer("by_row", torch.tensor(by_row))

    def _rows(self, values: Tensor) -> Tensor:
        """[rows, entries]: what shares a scale."""
        return values.reshape(values.shape[0] if self.by_row else 1, -1)

    def _threshold(self, core: Tensor) -> Tensor:
        """Δ: up to it a ternary weight is zero. A scalar."""
        size = core.detach().abs()
        return 0.7 * size.sum() / size.count_nonzero().clamp(min=1)

    def scales(self, core: Tensor) -> Tensor:
        """[rows, 1]: the mean |W| of the weights that are not zero."""
        size = self._rows(core.abs())
        if not self.scaled:
            return size.new_ones(len(size), 1)
        least = self._threshold(core) if self.weights == "ternary" else 0.0
        used = (size > least).to(size.dtype)
        mean = (size * used).sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)
        return mean.bfloat16().to(mean.dtype)  # as they are stored

    def signs(self, core: Tensor) -> Tensor:
        """−1, 0 and +1, without gradients."""
        held = core.detach()
        if self.weights == "stochastic" and self.training:
            return torch.where(torch.rand_like(held) < ((held + 1) / 2).clamp(0, 1), 1.0, -1.0)
        hard = torch.where(held >= 0, 1.0, -1.0)
        if self.weights == "ternary":
            hard = hard * (held.abs() > self._threshold(held))
        return hard

    def forward(self, core: Tensor) -> Tensor:
        passed = core if self.scaled else core.clamp(-1, 1)
        signs = self.signs(core) + (passed - passed.detach())
        return (self._rows(signs) * self.scales(core)).reshape(core.shape)

    def advance(self, core: Tensor, progress: float) -> None:
        if not self.scaled:  # a weight beyond ±1 would get no gradient again
            core.data.clamp_(-1, 1)

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        was_training = self.training
        with torch.no_grad():
            signs, scales = self.eval().signs(core), self.scales(core)
            self.train(was_training)
        codes = (signs > 0).long()
        if self.weights == "ternary":  # both bits for +, none for −, one for zero
            codes = codes * 3 + (signs == 0).long()
            scales = scales.expand(-1, 2) / 2
        return BitWeight(codes if keep is None else codes[keep], Plain.of(scales.T, "bfloat16"))


class TwoValues(Form):
    """The core is the real weight; up and down, scalars, are what is not zero of it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(()))
        self.down = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def settle(self, core: Tensor) -> None:
        """Start at the means of the weights beyond the threshold."""
        signs = self._signs(core)
        for value, sign in ((self.up, 1), (self.down, -1)):
            beyond = core.abs()[signs == sign]
            value.copy_(beyond.mean() if beyond.numel() else torch.ones(()))

    @staticmethod
    def _signs(core: Tensor) -> Tensor:
        held = core.detach()
        return held.sign() * (held.abs() > 0.05 * held.abs().max())

    def _values(self) -> tuple[Tensor, Tensor]:
        """Up and down as they are stored."""
        return self.up.bfloat16().to(self.up.dtype), self.down.bfloat16().to(self.down.dtype)

    def forward(self, core: Tensor) -> Tensor:
        signs, (up, down) = self._signs(core), self._values()
        above, below = (signs > 0).to(core.dtype), (signs < 0).to(core.dtype)
        speed = torch.where(signs > 0, up.detach(), torch.where(signs < 0, down.detach(), 1.0))
        return above * up - below * down + speed * (core - core.detach())

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        """Three planes, (up − down)/2, down/2, up/2: + + + is up, + − − is −down, + + − is zero."""
        signs, (up, down) = self._signs(core), self._values()
        codes = torch.where(signs > 0, 7, torch.where(signs < 0, 1, 3))
        scale = torch.stack([(up - down) / 2, down / 2, up / 2])[:, None].detach()
        return BitWeight(codes if keep is None else codes[keep], Plain.of(scale, "float32"))


class Pair(InputForm):
    """The nearer of two levels, middle ± spread; both are trained unless they are ±1."""

    def __init__(self, bireal: bool) -> None:
        super().__init__()
        self.bireal = bireal
        self.middle = nn.Parameter(torch.zeros(()))
        self.spread = nn.Parameter(torch.ones(()))

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """Levels of the least squared error (Lloyd): each is the mean of what is nearest to it."""
        cut = x.mean()
        for _ in range(30):
            low, high = x[x < cut].mean(), x[x >= cut].mean()
            cut = (low + high) / 2
        self.middle.copy_(cut)
        self.spread.copy_((high - low) / 2)

    def forward(self, x: Tensor) -> Tensor:
        spread = self.spread.abs()
        at = (x - self.middle) / spread.detach()
        hard = torch.where(x >= self.middle, 1.0, -1.0).to(x.dtype)
        inside = at.clamp(-1, 1)
        soft = inside * (2 - inside.abs()) if self.bireal else inside
        signs = hard + (soft - soft.detach())
        rounded: Tensor = self.middle + spread * signs
        return rounded

    def pack(self) -> InputCode:
        middle, spread = self.middle.detach().float(), self.spread.detach().float().abs()
        sign = Levels.sign(middle)
        return LevelCode(
            Levels(
                thresholds=sign.thresholds, pattern=sign.pattern, scale=spread.reshape(1),
                offset=float(middle),
            )
        )  # fmt: skip
