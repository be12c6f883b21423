"""Quantization: weights as small whole numbers times a step, and what layers read likewise.

    W'[o, i] = step[o] · (n[o, i] − zero[o]),    n in [0, 2**bits)
    x' = step · n,                               n in [0, 2**bits) or [-2**(bits − 1), …)

W: [out, in, …] float32; step: a bfloat16 for the tensor, for each row or for each run of `per`
columns of a row (later dimensions joined); zero: 2**(bits − 1), or a whole number for each step.
What a mask kept, and what is no matrix of weights (tables, buckets), shares one step.

affine rounds to the nearest; trained on, gradients pass straight through and the steps stand (Jacob
et al.: Quantization and training of neural networks for efficient integer-arithmetic-only
inference, CVPR 2018). gptq is affine, rounded column by column with the error made good in the
columns to come (second_order.py). lsq trains the steps, dorefa squeezes the weights by tanh
(fake_quantization.py has both, and their papers). float16 and bfloat16 store that.

mixed: each site gets bits of its own, 2 to 8, so that the summed damage ½ · dᵀ · H · d, d = W' − W
of each site, is least at this mean number of bits. Dong et al.: HAWQ-V2 (NeurIPS 2020). Where we
differ: H is that of second_order.py, not its mean trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from taut.activations import InputForm, reads_once
from taut.errors import RecipeError
from taut.fake_quantization import HalfFloats, LearnedSteps, Projected, Steps, WholeNumbers
from taut.modules import tensor_at
from taut.ranges import (
    RULES,
    affine_grid,
    fit_steps,
    positive_grid,
    symmetric_grid,
    whole,
)
from taut.recoding import Form, Recoding
from taut.second_order import damage, rounded
from taut.statistics import Statistics
from taut.technique import Technique, option, register_step
from taut.types import Site

HALVES = ("float16", "bfloat16")
_FEWEST, _MOST = 2, 8  # bits that a site gets of a mean
_UNITS = 4096  # in which the bits that there are to share out are counted


@register_step
@dataclass(frozen=True, kw_only=True)
class Quantize(Recoding):
    """Write weights, and what layers read, as whole numbers of few bits.

    Inputs are rounded where layers are Linear or Conv. Those that are never negative take all
    levels above zero; with 8 bits [0, 127], so that products run in int8. One bit takes dorefa.
    """

    bits: int = option(8, low=1, high=_MOST, unit="bit", help="of a weight; not for float16")
    activations: int = option(
        0, low=0, high=8, unit="bit", help="of what layers read; 0 leaves it as it is"
    )
    method: str = option(
        "affine", choices=("affine", "gptq", "lsq", "dorefa", *HALVES),
        help="rounded to the nearest, or by second order (gptq); steps that train (lsq); squeezed "
        "by tanh (dorefa); or floats of 16 bits",
    )  # fmt: skip
    per: str | int = option(
        "channel", low=1, help="what shares a step: tensor, channel, or so many columns of a row"
    )
    ranges: str = option(
        "mse", choices=(*RULES, "dynamic"),
        help="how steps are found, on calibration data; dynamic: by mse for weights, and each "
        "input has its own, by its largest",
    )  # fmt: skip
    symmetric: bool = option(True, help="whether zero is the middle number of the weights'")
    mixed: bool = option(False, help="whether bits are a mean that sites share out by sensitivity")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.per, str) and self.per not in ("tensor", "channel"):
            raise RecipeError(
                "quantize: per must be 'tensor', 'channel' or a number of columns, got "
                f"{self.per!r}"
            )
        ones = [n for n in ("bits", "activations") if getattr(self, n) == 1]
        if ones and self.method != "dorefa":
            raise RecipeError(
                f"quantize: {ones[0]} must lie in [2, 8] with method={self.method!r}, got 1; use "
                "method='dorefa' or binarize"
            )
        if not self.symmetric and self.method not in ("affine", "gptq"):
            raise RecipeError(
                f"quantize: method={self.method!r} has its zero in the middle, got "
                "symmetric=False; use method='affine'"
            )
        if self.dynamic and (self.activations < 2 or self.method in ("lsq", "dorefa")):
            raise RecipeError(
                "quantize: ranges='dynamic' needs activations of 2 to 8 bits and a step that is "
                f"not trained, got activations={self.activations} and method={self.method!r}"
            )
        if self.mixed and (self.method in HALVES or self.bits < _FEWEST):
            raise RecipeError(
                f"quantize: mixed needs whole numbers of 2 bits at least, got bits={self.bits} and "
                f"method={self.method!r}"
            )

    @property
    def dynamic(self) -> bool:
        """Whether the step of an input follows from it alone."""
        return self.ranges == "dynamic"

    # ---- strengths ----------------------------------------------------------------------

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        if not self.mixed:
            return super().localise(model, sites, statistics)
        damages = {}
        for site in sites:
            weight = tensor_at(model, site.name).detach().cpu()
            self._refuse_no_numbers(weight, site)
            some = [self._rounded(weight, b) - weight for b in range(_FEWEST, _MOST + 1)]
            felt = statistics.gradients(site).squares
            damages[site.name] = damage(some, statistics.products(site), felt)
        chosen = share_out(damages, {s.name: s.numel for s in sites}, self.bits)
        return {n: replace(self, bits=bits, mixed=False) for n, bits in chosen.items()}

    def _rounded(self, weight: Tensor, bits: int) -> Tensor:
        rows = weight.reshape(self._count(tuple(weight.shape)), -1)
        step, zero = self._steps(rows, bits)
        step, zero = step[:, None], zero[:, None]
        return ((whole(rows, step, zero, 2**bits) - zero) * step).reshape(weight.shape)

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        if self.method in HALVES:
            return count * (1.62 if self.method == "float16" else 1.4)
        steps = self._count(site.shape) if count == site.numel else 1
        used = 0.98 - 0.16 / self.bits if self.bits > 1 else 0.96  # the ends of a range are rare
        zeros = 0.0 if self.symmetric else self.bits / 8 * steps
        return count * self.bits * used / 8 + zeros + 1.2 * steps + min(0.5 * steps, 50)

    # ---- weights ------------------------------------------------------------------------

    def _count(self, shape: tuple[int, ...]) -> int:
        """How many steps a core of this shape has."""
        if self.per == "tensor" or len(shape) < 2:
            return 1
        runs = 1 if self.per == "channel" else math.prod(shape[1:]) // int(self.per)
        return shape[0] * runs

    def accepts(self, site: Site, shape: tuple[int, ...]) -> None:
        columns = math.prod(shape[1:])
        if isinstance(self.per, int) and len(shape) > 1 and columns % self.per:
            raise RecipeError(
                f"quantize: per must divide the columns of a row, got per={self.per} for "
                f"{columns} columns at site {site.name!r}; choose a divisor or per='channel', or "
                f"leave the site out by only='!{site.name}'"
            )
        if self.method == "gptq" and shape != site.shape:
            raise RecipeError(
                f"quantize: method='gptq' needs a number for each weight, and site {site.name!r} "
                f"is written in {math.prod(shape)} numbers already; use method='affine'"
            )

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        count = self._count(tuple(core.shape))
        return self._form(torch.ones(count), torch.zeros(count), count), core

    def _form(self, steps: Tensor, zeros: Tensor, used: int) -> Form:
        if self.method in HALVES:
            return HalfFloats(self.method)
        kind = {"lsq": LearnedSteps, "dorefa": Projected}.get(self.method, WholeNumbers)
        return kind(self.bits, steps, zeros, used)

    def _steps(self, groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        grid = symmetric_grid(2**bits) if self.symmetric else affine_grid(2**bits)
        return fit_steps(groups, 2**bits, "mse" if self.dynamic else self.ranges, grid)

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        self._refuse_no_numbers(core if matters is None else core[matters], site)
        if self.method in HALVES:
            if not bool(core.to(getattr(torch, self.method)).isfinite().all()):
                raise RecipeError(
                    f"quantize: float16 cannot hold weights as large as {core.abs().max():.3g} at "
                    f"site {site.name!r}; use method='bfloat16'"
                )
            return HalfFloats(self.method), core
        count = self._count(tuple(core.shape))
        used = count if matters is None and core.shape == site.shape else 1
        rows = core.reshape(used, -1)
        if self.method == "dorefa":
            zeros = torch.full((count,), (2**self.bits - 1) / 2)
            projected = Projected(self.bits, torch.ones(count), zeros, used)
            projected.fit(rows, None if matters is None else matters.reshape(used, -1))
            return projected, core
        held = rows if matters is None else core[matters][None]
        step, zero = self._steps(held, self.bits)
        steps, zeros = step.new_ones(count), zero.new_zeros(count)
        steps[:used], zeros[:used] = step, zero
        if self.method == "gptq":
            core = self._compensated(core, matters, step, zero, site, statistics)
        return self._form(steps, zeros, used), core

    def _compensated(
        self, core: Tensor, matters: Tensor | None, step: Tensor, zero: Tensor, site: Site,
        statistics: Statistics | None,
    ) -> Tensor:  # fmt: skip
        """The core with every weight on its grid, by the second order."""
        each = core.numel() // len(step)

        def nearest(values: Tensor, places: Tensor) -> Tensor:
            s, z = step[places // each].double(), zero[places // each].double()
            on_grid = s * (whole(values, s, z, 2**self.bits) - z)
            return on_grid if matters is None else on_grid * matters.flatten()[places]

        found = (statistics or Statistics(nn.Identity())).products(site)
        held = core if matters is None else core * matters
        return rounded(held, found, nearest)

    @staticmethod
    def _refuse_no_numbers(weights: Tensor, site: Site) -> None:
        if not bool(weights.isfinite().all()):
            raise RecipeError(f"quantize: site {site.name!r} holds NaN or infinite weights")

    # ---- inputs -------------------------------------------------------------------------

    def blank_input(self, model: nn.Module, site: Site) -> InputForm | None:
        if not self.activations or not reads_once(model, site):
            return None
        return self._input(torch.ones(0 if self.dynamic else 1), signed=True)

    def _input(self, step: Tensor, signed: bool) -> Steps:
        bits = self.activations
        low, high = -(2 ** (bits - 1)) * signed, 2 ** (bits - signed) - 1
        if self.dynamic:
            low = -high
        return Steps(step, low, min(high, 127), learned=self.method == "lsq")

    def fit_input(
        self, model: nn.Module, site: Site, statistics: Statistics | None
    ) -> InputForm | None:
        blank = self.blank_input(model, site)
        if blank is None or self.dynamic:
            return blank
        seen = (statistics or Statistics(nn.Identity())).inputs(site).flatten()
        signed = bool((seen < 0).any()) and self.activations > 1
        form = self._input(torch.ones(1), signed)
        levels = form.high - form.low + 1
        grid = (symmetric_grid if signed else positive_grid)(levels, torch.float32)
        step, _ = fit_steps(seen[None], levels, self.ranges, grid)
        return self._input(step, signed)


def share_out(damages: dict[str, list[float]], numels: dict[str, int], mean: int) -> dict[str, int]:
    """Bits of each site, of this mean over all weights at most, at the least summed damage.

    damages: of each site at 2, 3, … 8 bits. Exact but for the budget, which is counted in `_UNITS`;
    where the mean everywhere does as well, that is it.
    """
    if mean == _FEWEST:
        return dict.fromkeys(damages, mean)
    each = (mean - _FEWEST) * sum(numels.values()) / _UNITS
    costs = {n: [math.ceil(m * numels[n] / each) for m in range(_MOST - 1)] for n in damages}
    best = torch.zeros(_UNITS + 1, dtype=torch.float64)  # the least damage within each budget
    choices = []
    for name, found in damages.items():
        tried = torch.full((_MOST - 1, _UNITS + 1), torch.inf, dtype=torch.float64)
        for more, (cost, value) in enumerate(zip(costs[name], found, strict=True)):
            if cost <= _UNITS:
                tried[more, cost:] = best[: _UNITS + 1 - cost] + value
        best, chosen = tried.min(0)
        choices.append((name, chosen))
    if sum(d[mean - _FEWEST] for d in damages.values()) <= float(best[-1]):
        return dict.fromkeys(damages, mean)
    bits, left = {}, _UNITS
    for name, chosen in reversed(choices):
        more = int(chosen[left])
        bits[name], left = _FEWEST + more, left - costs[name][more]
    return bits
