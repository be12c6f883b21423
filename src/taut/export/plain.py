"""What other engines understand of a packed network: plain layers, whole numbers, rounded inputs.

An engine knows no packed weight. Masked, shared, hashed and factored weights become dense ones; an
affine weight stays the whole numbers that it is, beside the plain network, for an engine that
multiplies them:

    W = step · (n − zero),    n, zero: int8

What a layer reads goes through `round_input`, an operation that each engine writes its own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from taut.activations import InputCode, LevelCode, StepCode, channels_at, nearest_step
from taut.affine_weight import AffineWeight
from taut.engine_ops import EngineLayer, place
from taut.export.attention import as_products
from taut.export.recurrent import as_operations
from taut.kernels import Levels
from taut.layers import packed_layers, unpack_layer
from taut.modules import clone
from taut.packed import PackedWeight
from taut.sparse_weight import SparseWeight


@dataclass(frozen=True, kw_only=True)
class Integers:
    """A weight as whole numbers. numbers: [*shape] int8; steps: [count] float32, for the whole
    weight, each row, or each run of columns of a row; zeros: [count] int8, None where all are 0.
    bits: that the numbers take.
    """

    numbers: Tensor
    steps: Tensor
    zeros: Tensor | None
    bits: int


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A network of plain layers, and by parameter name the weights that are whole numbers.

    rounds: whether any layer's input is rounded. kept: the layers that stay compressed, by path,
    with the names of Taut's operations that run them.
    """

    network: nn.Module
    integers: Mapping[str, Integers]
    rounds: bool
    kept: Mapping[str, str]


def plain(
    packed: nn.Module, all_layers: bool = True, keep: bool = False, rounded: bool = True
) -> Plain:
    """A plain copy of a packed network, with the same answers.

    all_layers: else those that run packed now are left as they are. keep: whether layers for which
    Taut has an operation become that. rounded: whether the others round what they read; without,
    the answers tell what that rounding costs.
    """
    copied = clone(packed).eval()
    kept = {path: o.name for path, o in place(copied).items()} if keep else {}
    integers: dict[str, Integers] = {}
    made: dict[int, tuple[nn.Parameter, Integers | None]] = {}
    rounds = False
    for placed in {m for m in copied.modules() if isinstance(m, EngineLayer)}:
        code = placed.layer.input_code
        if code is not None:
            rounds = True
            if placed.operation.rounds:
                placed.register_forward_pre_hook(_Rounds(code, channels_at(placed.layer)))
    for path, layer in packed_layers(copied).items():
        if not (all_layers or layer.runs_dense):
            continue
        parameters = {}
        for name, child in layer.packed.items():
            weight = cast(PackedWeight, child)
            if id(weight) not in made:
                dense = weight.dense().to(layer._dtypes[name])
                made[id(weight)] = nn.Parameter(dense, requires_grad=False), as_integers(weight)
            parameters[name], numbers = made[id(weight)]
            if numbers is not None:
                integers[f"{path}.{name}" if path else name] = numbers
        code = layer.input_code
        unpack_layer(layer, parameters)
        if code is not None and rounded:
            rounds = True
            layer.register_forward_pre_hook(_Rounds(code, channels_at(layer)))
    as_operations(copied)
    as_products(copied)
    return Plain(network=copied, integers=integers, rounds=rounds, kept=kept)


def as_integers(weight: PackedWeight) -> Integers | None:
    """A weight as whole numbers, where it is made of them.

    A zero that lies half way between two numbers doubles all of them, which int8 holds up to seven
    bits.
    """
    if isinstance(weight, SparseWeight) and isinstance(weight.values, AffineWeight):
        return _sparse_integers(weight, weight.values)
    if not isinstance(weight, AffineWeight) or len(weight.shape) < 2:
        return None
    index, zeros = weight.index.to(torch.int16), weight.zeros.reshape(-1)  # of twice the numbers
    steps = weight.steps.dense().float().reshape(-1)
    if bool((zeros % 2).any()):
        if weight.bits > 7:
            return None
        by_step = zeros.expand(len(steps)).reshape(-1, 1)
        numbers = (2 * index.reshape(len(steps), -1) - by_step).reshape(index.shape)
        return Integers(
            numbers=numbers.to(torch.int8), steps=steps / 2, zeros=None, bits=weight.bits + 1
        )
    middle = 1 << weight.bits - 1
    numbers, zeros = (index - middle).to(torch.int8), zeros // 2 - middle
    beside = zeros.to(torch.int8).expand(len(steps)).clone() if bool(zeros.any()) else None
    return Integers(numbers=numbers, steps=steps, zeros=beside, bits=weight.bits)


def _sparse_integers(weight: SparseWeight, values: AffineWeight) -> Integers | None:
    """Whole numbers of which those that are not there are zero."""
    if not values.single or int(values.zeros) % 2 or len(weight.shape) < 2:
        return None
    kept = values.index.to(torch.int16) - int(values.zeros) // 2
    numbers = torch.zeros(weight.numel, dtype=torch.int16)
    numbers[weight.positions] = kept
    if int(numbers.min()) < -128 or int(numbers.max()) > 127:
        return None
    steps = values.steps.dense().float().reshape(-1)
    return Integers(
        numbers=numbers.reshape(weight.shape).to(torch.int8), steps=steps, zeros=None,
        bits=values.bits,
    )  # fmt: skip


class _Rounds:
    """A hook that gives a layer its first input rounded as the code says."""

    def __init__(self, code: InputCode, dim: int) -> None:
        self.code, self.dim = code, dim
        self.levels = ToLevels(code.levels()) if isinstance(code, LevelCode) else None

    def __call__(self, layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        code, x = self.code, given[0]
        if isinstance(code, StepCode) and not code.dynamic:
            rounded = round_input(x, float(code.step), code.low, code.high)
        elif self.levels is not None:
            rounded = self.levels(x, self.dim)
        else:
            rounded = code.rounded(x, self.dim)
        return rounded, *given[1:]


class ToLevels:
    """What levels make of x: a step up at each threshold.

    y = v[0] + Σ_i (v[i + 1] − v[i]) · [x >= threshold[i]], v the values of the levels
    """

    def __init__(self, levels: Levels) -> None:
        bits = levels.pattern[:, None].long() >> torch.arange(len(levels.scale)) & 1
        values = levels.offset + ((2.0 * bits - 1) * levels.scale).sum(1)
        self.first: float = values[0].item()
        self.rises: list[float] = values.diff().tolist()
        self.thresholds = levels.thresholds

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """x, whose channels stand at dim, 1 or -1, as levels."""
        shape = [-1] if dim == -1 else [-1] + [1] * (x.dim() - 2)
        y = torch.full_like(x, self.first)
        for threshold, rise in zip(self.thresholds, self.rises, strict=True):
            y = y + (x >= threshold.reshape(shape)).to(x.dtype) * rise
        return y


@torch.library.custom_op("taut::round_input", mutates_args=())
def round_input(x: Tensor, step: float, low: int, high: int) -> Tensor:
    """x' = step · n, with n the whole number in [low, high] nearest to x / step."""
    exact = torch.tensor(step, device=x.device)
    return (exact * nearest_step(x.float(), exact, low, high)).to(x.dtype).clone()


@round_input.register_fake
def _(x: Tensor, step: float, low: int, high: int) -> Tensor:
    return torch.empty_like(x)
