"""Training as if in whole numbers: forms that round in each forward and pass gradients through.

    affine   W' = step · (n − zero),   n = round(W / step) + zero;     ∂W' / ∂W = 1
    learned  the same with a trained step and clipped gradients (LSQ)
    dorefa   W' = step · (n − (2**bits − 1) / 2),   n = round((2**bits − 1) · r),
             r = tanh(W) / (2 · max |tanh(W)|) + 1/2;                  ∂n / ∂r = 2**bits − 1

Steps are stored as bfloat16 and used as stored. What a layer reads is rounded likewise, x' = step ·
n, by a step that stands still, is learned, or follows from each input.

LSQ: Esser, McKinstry, Bablani, Appuswamy, Modha: Learned step size quantization (ICLR 2020): the
gradient to a step is scaled by 1 / sqrt(numbers · most), `most` the largest n. Where we differ: it
starts where the range rule puts it, not at 2 · mean|W| / sqrt(most).
DoReFa: Zhou et al.: DoReFa-Net (2016). Where we differ: its weights lie in [-1, 1], and with one
bit at ±mean|W|; here they are scaled by a trained number for each group, fitted by least squares
at the start, so that a trained network stays one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.activations import InputForm, StepCode, dynamic_step, nearest_step
from taut.affine_weight import AffineWeight
from taut.packed import PackedWeight, Plain
from taut.ranges import whole
from taut.recoding import Form, Pack

# ---- weights --------------------------------------------------------------------------------


class WholeNumbers(Form):
    """weight = step · (n − zero), a step and a zero for each of `count` equal runs of the core.

    bits: of n. used: how many of the steps count; 1 where they cannot belong to rows.
    """

    zeros: Tensor
    learns = False

    def __init__(self, bits: int, steps: Tensor, zeros: Tensor, used: int) -> None:
        super().__init__()
        self.bits, self.used = bits, used
        self.steps = nn.Parameter(steps, requires_grad=self.learns)
        self.register_buffer("zeros", zeros)

    def get_extra_state(self) -> Tensor:
        """What the checkpoint has besides parameters: as a tensor, like all that it holds."""
        return torch.tensor([self.bits, self.used])

    def set_extra_state(self, state: Tensor) -> None:
        """Take what `get_extra_state` gave."""
        self.bits, self.used = state.tolist()

    def step(self) -> Tensor:
        """As the file holds it, a bfloat16 above 0: [used, 1]."""
        exact = self.steps[: self.used, None].abs().clamp(min=1e-30)
        return _stands_for(exact.bfloat16().float(), exact)

    def numbers(self, core: Tensor) -> Tensor:
        """n, [used, …], of the core [used, …], as floats."""
        return whole(core, self.step(), self.zeros[: self.used, None], 2**self.bits)

    def forward(self, core: Tensor) -> Tensor:
        return self.weight(core.reshape(self.used, -1)).reshape(core.shape)

    def weight(self, core: Tensor) -> Tensor:
        """The weight, [used, …]."""
        n = self.numbers(core).detach()
        return _stands_for(self.step() * (n - self.zeros[: self.used, None]), core)

    def clear(self, core: Tensor | None, where: Tensor) -> bool:
        if core is not None:
            core[where] = 0.0
        return core is not None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        index = self.numbers(core.reshape(self.used, -1)).long().reshape(core.shape)
        if keep is not None:
            assert self.used == 1
            index = index[keep]
        zeros = (2 * self.zeros[: self.used]).round()
        if bool((zeros == zeros[0]).all()):
            zeros = zeros[0]
        steps = self.step().detach().squeeze(1)
        return AffineWeight(index, self.bits, Plain.of(steps, "bfloat16"), zeros)


class LearnedSteps(WholeNumbers):
    """The steps train too."""

    learns = True

    def weight(self, core: Tensor) -> Tensor:
        zero = self.zeros[: self.used, None]
        step = _slowed(self.step(), core[0].numel(), 2 ** (self.bits - 1) - 1)
        scaled = core / step
        inside = torch.minimum(torch.maximum(scaled, -zero), 2**self.bits - 1 - zero)
        return step * _stands_for((self.numbers(core) - zero).detach(), inside)


class Projected(WholeNumbers):
    """DoReFa's: the core is squeezed by tanh; no weight is zero."""

    learns = True

    def _share(self, core: Tensor) -> Tensor:
        """Where each lies between the ends, [0, 1]; one bit passes the gradient as it is."""
        if self.bits == 1:
            return _stands_for((core >= 0).float(), core)
        squeezed = core.tanh()
        top = squeezed.abs().amax(1, keepdim=True).clamp(min=1e-30).detach()
        share: Tensor = squeezed / (2 * top) + 0.5
        return share

    def numbers(self, core: Tensor) -> Tensor:
        most = 2**self.bits - 1
        n: Tensor = (most * self._share(core)).round().clamp(0, most)
        return n

    def weight(self, core: Tensor) -> Tensor:
        most = 2**self.bits - 1
        n = _stands_for(self.numbers(core).detach(), most * self._share(core))
        weight: Tensor = self.step() * (n - most / 2)
        return weight

    def clear(self, core: Tensor | None, where: Tensor) -> bool:
        return False

    def fit(self, core: Tensor, counts: Tensor | None) -> None:
        """The steps of least squared error for a core [used, …]; counts: bool, what counts."""
        n = self.numbers(core) - (2**self.bits - 1) / 2
        kept = n if counts is None else n * counts
        best = (core * kept).sum(1) / kept.square().sum(1).clamp(min=1e-30)
        with torch.no_grad():
            self.steps[: self.used] = torch.where(best > 0, best, 1.0)


class HalfFloats(Form):
    """weight = core as a float of 16 bits."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision

    def forward(self, core: Tensor) -> Tensor:
        return _stands_for(core.to(getattr(torch, self.precision)).to(core.dtype), core)

    def clear(self, core: Tensor | None, where: Tensor) -> bool:
        if core is not None:
            core[where] = 0.0
        return core is not None

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        return Plain.of(core if keep is None else core[keep], self.precision)


def _stands_for(value: Tensor, exact: Tensor) -> Tensor:
    """The value to the last bit, with the gradient that `exact` has."""
    return value.detach() + (exact - exact.detach())


def _slowed(step: Tensor, numbers: int, most: int) -> Tensor:
    """The step, whose gradient is scaled by 1 / sqrt(numbers · most)."""
    scale = (numbers * max(most, 1)) ** -0.5
    return _stands_for(step, step * scale)


# ---- inputs ---------------------------------------------------------------------------------


class Steps(InputForm):
    """x' = step · n, n in [low, high]; gradients pass where x is not clipped.

    step: [1], or [0] where it follows from each input. learned: whether it trains.
    """

    def __init__(self, step: Tensor, low: int, high: int, learned: bool = False) -> None:
        super().__init__()
        self.low, self.high, self.learned = low, high, learned
        self.step = nn.Parameter(step, requires_grad=learned)

    def get_extra_state(self) -> Tensor:
        """What the checkpoint has besides parameters: as a tensor, like all that it holds."""
        return torch.tensor([self.low, self.high])

    def set_extra_state(self, state: Tensor) -> None:
        """Take what `get_extra_state` gave."""
        self.low, self.high = state.tolist()

    def forward(self, x: Tensor) -> Tensor:
        given = x.float()
        if self.step.numel() == 0:
            step = dynamic_step(given, self.high, self.dim)
        else:
            step = self._positive()
            if self.learned:
                step = _slowed(step, given[0].numel(), self.high)
        n = nearest_step(given.detach(), step.detach(), self.low, self.high)
        inside = (given / step).clamp(self.low, self.high)
        return (step * _stands_for(n, inside)).to(x.dtype)

    def _positive(self) -> Tensor:
        return self.step[0].abs().clamp(min=1e-30)

    def pack(self) -> StepCode:
        step = self.step.detach() if self.step.numel() == 0 else self._positive().detach()[None]
        return StepCode(step, self.low, self.high)
