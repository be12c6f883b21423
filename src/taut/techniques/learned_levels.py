"""Learned levels (LQ-Nets): what a weight or an input may be are sums of a learned basis.

    W'[o, i] = Σ_p ±basis[p, o],     x' = Σ_p basis[p] · (0 or 1)     the nearest such level

A basis of k numbers gives 2**k levels, not evenly spaced, and a product of such numbers is a sum of
counted bits all the same. It is fitted by turns (QEM): each number goes to its nearest level, then
the basis becomes the least-squares one for those bits,

    basis = (Bᵀ B)⁻¹ Bᵀ w,    B: [weights, k] of ±1 (or 0 and 1)

once in every training step, and the basis in use is a moving average, 0.9 · old + 0.1 · new.
Gradients pass straight through; for inputs where they lie between the lowest and highest level.

Zhang, Yang, Ye, Hua: LQ-Nets (ECCV 2018): a basis for each output and one for a layer's inputs.
Where we differ: as a technique is put on a trained network, the basis is fitted to it by 20 rounds
from the best of four even starts; where the calibration data have inputs below zero, their levels
lie around it.
"""

from __future__ import annotations

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

_KEPT = 0.9  # of the old basis, at each step
_ROUNDS = 20
_STARTS = (1.2, 1.6, 2.0, 2.6)  # the highest level, in mean magnitudes


@register_step
@dataclass(frozen=True, kw_only=True)
class LearnedLevels(InnerRecoding):
    """Write weights as sums of a learned basis for each row, and inputs as sums of another."""

    bits: int = option(2, low=1, high=4, unit="bit", help="of a weight: numbers in its basis")
    activations: int = option(
        0, low=0, high=4, unit="bit", help="of what a Linear or Conv layer reads; 0: as it is"
    )

    def localise(
        self, model: nn.Module, sites: tuple[Site, ...], statistics: Statistics
    ) -> dict[str, Technique]:
        local = super().localise(model, sites, statistics)
        real = left_real(model, sites, self.name) if self.activations else set()
        left = replace(self, activations=0)
        return {n: left if n in real else step for n, step in local.items()}

    def predict_bytes(
        self, site: Site, count: int, inner: Callable[[int], float] | None = None
    ) -> float:
        whole = count == site.numel and len(site.shape) > 1
        rows = site.shape[0] if whole else 1
        entropy = {1: 1.0, 2: 1.92, 3: 2.8, 4: 3.7}[self.bits]  # of normal weights
        return count * entropy / 8 + 1.35 * rows * self.bits

    def blank(self, core: Tensor) -> tuple[Form, Tensor]:
        rows = len(core) if core.dim() > 1 else 1
        return WeightLevels(core.new_zeros(rows, self.bits), core.dim() > 1), core

    def fit(
        self, core: Tensor, matters: Tensor | None, site: Site, statistics: Statistics | None
    ) -> tuple[Form, Tensor]:
        if not bool(core.isfinite().all()):
            raise RecipeError(f"learned_levels: site {site.name!r} holds NaN or infinite weights")
        form, core = self.blank(core)
        assert isinstance(form, WeightLevels)
        if matters is not None:  # what is kept has no rows
            form.by_row.fill_(False)
            core = core * matters
        form.settle(core)
        return form, core

    def blank_input(self, model: nn.Module, site: Site) -> InputForm | None:
        return InputLevels(self.activations) if self.activations else None

    def fit_input(
        self, model: nn.Module, site: Site, statistics: Statistics | None
    ) -> InputForm | None:
        form = self.blank_input(model, site)
        if isinstance(form, InputLevels):
            if statistics is None:
                raise RecipeError(
                    f"learned_levels: the levels of activations need data, and site {site.name!r} "
                    "was given none; use activations=0"
                )
            form.settle(statistics.inputs(site))
        return form


# ---- fitting --------------------------------------------------------------------------------


def _start(bits: int, reach: Tensor) -> Tensor:
    """A basis whose levels lie evenly from -reach to reach: [rows, bits] for reach [rows]."""
    powers = 2.0 ** torch.arange(bits, device=reach.device)
    return reach[:, None] * powers / powers.sum()


def _levels(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted levels [rows, 2**k] of a basis [rows, k], and the bits of each as one number."""
    k = basis.shape[1]
    every = torch.arange(2**k, device=basis.device)
    signs = 2.0 * (every[:, None] >> torch.arange(k, device=basis.device) & 1) - 1
    levels, order = (basis @ signs.T).sort(1)
    return levels, order


def _codes(values: Tensor, basis: Tensor) -> Tensor:
    """The bits of the level nearest to each value: [rows, n] int64."""
    levels, order = _levels(basis)
    thresholds = (levels[:, 1:] + levels[:, :-1]) / 2
    return order.gather(
        1, torch.searchsorted(thresholds.contiguous(), values.contiguous(), right=True)
    )


def _decoded(codes: Tensor, basis: Tensor) -> Tensor:
    """What bits stand for: [rows, n] of codes [rows, n]."""
    total = torch.zeros_like(codes, dtype=basis.dtype)
    for p in range(basis.shape[1]):
        total += ((codes >> p & 1) * 2 - 1) * basis[:, p, None]
    return total


def _improved(values: Tensor, used: Tensor, basis: Tensor) -> Tensor:
    """The least-squares basis for the bits that the present one gives.

    values: [rows, n]; used: [rows, n], 1 where a value counts and 0 elsewhere.
    """
    codes = _codes(values, basis)
    k = basis.shape[1]
    signs = [((codes >> p & 1) * 2 - 1).to(values.dtype) * used for p in range(k)]
    gram = torch.stack([torch.stack([(a * b).sum(1) for b in signs], 1) for a in signs], 1)
    right = torch.stack([(s * values).sum(1) for s in signs], 1)
    count = used.sum(1).clamp(min=1)[:, None, None]
    steady = 1e-4 * count * torch.eye(k, device=basis.device)
    solved = torch.linalg.solve(gram + steady, right + (steady @ basis[..., None]).squeeze(-1))
    improved: Tensor = solved.nan_to_num()
    return improved


# ---- trainable forms ------------------------------------------------------------------------


class WeightLevels(Form):
    """The core is the real weight; entries that a mask outside leaves out are zero in it.

    basis: [rows, k]; by_row: bool, whether rows differ in it.
    """

    basis: Tensor
    by_row: Tensor

    def __init__(self, basis: Tensor, by_row: bool) -> None:
        super().__init__()
        self.register_buffer("basis", basis)
        self.register_buffer("by_row", torch.tensor(by_row))

    def _matrix(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """Values that share a basis, [rows, n], and which of them count."""
        values = core.detach().float().reshape(len(self.basis) if self.by_row else 1, -1)
        return values, (values != 0).float()

    def _fit(self, core: Tensor, basis: Tensor) -> Tensor:
        values, used = self._matrix(core)
        return _improved(values, used, basis[: len(values)]).expand_as(self.basis)

    @torch.no_grad()
    def settle(self, core: Tensor) -> None:
        """Fit the basis to a weight: the best of several starts, which are even levels."""
        values, used = self._matrix(core)
        size = values.abs().sum(1) / used.sum(1).clamp(min=1)
        best = values.new_full((len(values),), torch.inf)
        for reach in _STARTS if self.basis.shape[1] > 1 else (1.0,):
            basis = _start(self.basis.shape[1], reach * size)
            for _ in range(_ROUNDS):
                basis = _improved(values, used, basis)
            error = ((values - _decoded(_codes(values, basis), basis)) * used).square().sum(1)
            better = error < best
            best = torch.where(better, error, best)
            self.basis.copy_(torch.where(better[:, None], basis, self.basis[: len(basis)]))

    def codes(self, core: Tensor) -> Tensor:
        """The bits of each weight as one number, [*shape] int64."""
        values, _ = self._matrix(core)
        return _codes(values, self.stored()[: len(values)]).reshape(core.shape)

    def stored(self) -> Tensor:
        """The basis as a file has it."""
        return self.basis.bfloat16().to(self.basis.dtype)

    def forward(self, core: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training:
                new = self._fit(core, self.basis)
                self.basis.copy_(_KEPT * self.basis + (1 - _KEPT) * new)
            codes = self.codes(core).reshape(len(self.basis) if self.by_row else 1, -1)
            hard = _decoded(codes, self.stored()[: len(codes)]).to(core.dtype)
        return hard.reshape(core.shape) + (core - core.detach())

    def pack(self, core: Tensor, keep: Tensor | None, inner: Pack) -> PackedWeight:
        codes = self.codes(core)
        basis = self.stored() if self.by_row else self.stored()[:1]
        return BitWeight(
            codes if keep is None else codes[keep], Plain.of(basis.T.contiguous(), "bfloat16")
        )


class InputLevels(InputForm):
    """Levels of a layer's input. basis: [1, k], half of what each bit adds; middle: [1].

    signed: whether there are inputs below zero; else the lowest level is zero.
    """

    basis: Tensor
    signed: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.ones(1, bits))
        self.register_buffer("signed", torch.tensor(False))

    def middle(self) -> Tensor:
        """Halfway between the lowest and the highest level, a scalar."""
        return torch.zeros_like(self.basis[0, 0]) if self.signed else self.basis.sum()

    def _fit(self, x: Tensor) -> Tensor:
        """One round on at most 2**16 of the inputs, evenly taken."""
        values = x.detach().float().flatten()
        values = values[:: -(-len(values) // 2**16)][None]
        used = torch.ones_like(values)
        if self.signed:
            return _improved(values, used, self.basis)
        return _raised(values, self.basis)

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        """Fit the basis to inputs, from even levels up to three times their mean magnitude."""
        self.signed.fill_(bool((x < 0).any()))
        reach = x.abs().mean().reshape(1) * (3.0 if self.basis.shape[1] > 1 else 1.0)
        self.basis.copy_(_start(self.basis.shape[1], reach if self.signed else reach / 2))
        for _ in range(_ROUNDS):
            self.basis.copy_(self._fit(x))

    def levels(self) -> Levels:
        """As the kernel reads them."""
        levels, order = _levels(self.basis)
        middle = float(self.middle())
        half = (levels[0, 1:] + levels[0, :-1]) / 2
        return Levels(
            thresholds=(half + middle)[:, None].cpu(), pattern=order[0].to(torch.uint8).cpu(),
            scale=self.basis[0].detach().clone().cpu(), offset=middle,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training:
                self.basis.copy_(_KEPT * self.basis + (1 - _KEPT) * self._fit(x))
            levels, _ = _levels(self.basis)
            levels = levels[0] + self.middle()
            half = (levels[1:] + levels[:-1]) / 2
            hard = levels[torch.bucketize(x.detach().float(), half, right=True)].to(x.dtype)
        inside = x.clamp(float(levels[0]), float(levels[-1]))
        return hard + (inside - inside.detach())

    def pack(self) -> InputCode:
        return LevelCode(self.levels())


def _raised(values: Tensor, basis: Tensor) -> Tensor:
    """`_improved` for levels that start at zero: each bit adds twice its number, or nothing."""
    codes = _codes(values - basis.sum(), basis)
    k = basis.shape[1]
    bits = torch.stack([(codes[0] >> p & 1).to(values.dtype) * 2 for p in range(k)])  # [k, n]
    steady = 1e-4 * values.shape[1] * torch.eye(k, device=basis.device)
    solved = torch.linalg.solve(bits @ bits.T + steady, bits @ values[0] + steady @ basis[0])
    improved: Tensor = solved.nan_to_num()
    return improved[None]
