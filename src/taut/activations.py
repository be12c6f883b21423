"""Activations: what a layer reads, rounded to few values; trained, stored and run.

    y = W · x',    x' = form(x)

A technique puts an `InputForm` on a layer, which rounds the layer's first input from then on, in
training too. In a file it is an `InputCode` under the layer's name and `:input`, and a packed
layer multiplies what the code makes of its input: by counting bits or by whole numbers where the
weight has such a product, else by the rounded floats. It may stand on Linear and Conv layers,
whatever their weights are.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from taut.coding import Coder
from taut.errors import FormatError, RecipeError
from taut.kernels import Levels
from taut.modules import owner
from taut.packed import Meta, PackedWeight, Pair, ReadChild, register_format
from taut.types import Site

_log = logging.getLogger("taut")

SUFFIX = ":input"
"""What is added to a layer's name for the name of its code in a file."""

TAKERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""The layers whose input may be rounded."""

# ---- trainable ------------------------------------------------------------------------------


class InputForm(nn.Module, ABC):
    """Rounds what a layer reads; gradients pass through as the technique says.

    recipe: the text of the technique that put it there; dim: where the channels stand, 1 for
    convolutions and -1 for Linear layers. Both are set as it is placed.
    """

    recipe: str = ""
    dim: int = -1

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x, rounded: of the same shape and dtype."""

    @abstractmethod
    def pack(self) -> InputCode:
        """The code whose `rounded` gives what `forward` gives in eval mode."""


def may_round(model: nn.Module, path: str) -> bool:
    """Whether the input of the layer of this path may be rounded.

    The output projection of nn.MultiheadAttention may not: attention reads its weight itself.
    """
    module = model.get_submodule(path)
    above = model.get_submodule(path.rpartition(".")[0])
    plain = any(type(module).forward is t.forward for t in TAKERS)
    return plain and not isinstance(above, nn.MultiheadAttention)


def reads_once(model: nn.Module, site: Site) -> bool:
    """Whether what the site is multiplied with is the input of a layer that may be rounded."""
    path, _, leaf = site.name.rpartition(".")
    return leaf == "weight" and len(site.names) == 1 and may_round(model, path)


def left_real(model: nn.Module, sites: Iterable[Site], who: str) -> set[str]:
    """The sites whose layer's input cannot be rounded, by name; the log tells them."""
    names = {s.name for s in sites if not reads_once(model, s)}
    if names:
        _log.info("%s: what %s read stays as it is", who, ", ".join(sorted(names)))
    return names


def place_input(model: nn.Module, path: str, form: InputForm, recipe: str) -> None:
    """Round the input of a layer by this form from now on, instead of by an earlier one."""
    if not may_round(model, path):
        kind = type(model.get_submodule(path)).__name__
        raise RecipeError(
            f"{recipe}: the input of layer {path!r}, a {kind}, cannot be rounded; only those of "
            f"Linear, Conv1d and Conv2d layers can; leave it out by only='!{path}'"
        )
    layer = model.get_submodule(path)
    if not isinstance(getattr(layer, "input_form", None), InputForm):
        layer.register_forward_pre_hook(_round)
    form.recipe, form.dim = recipe, channels_at(layer)
    weight = next(layer.parameters())
    layer.input_form = form.to(weight.device).train(layer.training)


def drop_input(model: nn.Module, path: str) -> None:
    """Let a layer read its input as it is again."""
    layer = model.get_submodule(path)
    del layer.input_form
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _round:
            del layer._forward_pre_hooks[key]


def channels_at(layer: nn.Module) -> int:
    """The dimension of its input that holds the channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def input_forms(model: nn.Module) -> Iterator[tuple[str, InputForm]]:
    """The layers whose input is rounded, by path, with their forms."""
    for path, module in model.named_modules():
        form = module._modules.get("input_form")
        if isinstance(form, InputForm):
            yield path, form


def _round(layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return layer.input_form(given[0]), *given[1:]  # type: ignore[operator]


# ---- stored and run -------------------------------------------------------------------------


class InputCode(PackedWeight):
    """What a layer's input is rounded to. shape: of its own few numbers, which `dense` gives."""

    def __init__(self, shape: Iterable[int]) -> None:
        super().__init__(shape)
        self._kept: list[Levels | None] = []

    def forget(self) -> None:
        super().forget()
        self._kept = []

    def kept_levels(self) -> Levels | None:
        """`levels`, made once: every forward reads them."""
        if not self._kept:
            self._kept = [self.levels()]
        return self._kept[0]

    @abstractmethod
    def rounded(self, x: Tensor, dim: int = -1) -> Tensor:
        """x as it is multiplied: the definition that every kernel is held to.

        dim: where its channels stand, 1 or -1.
        """

    def levels(self) -> Levels | None:
        """The code as products of bits read it; None where it has too many levels."""
        return None

    def whole(self, x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor] | None:
        """x as int8 numbers and the step of one of them (a scalar, or one for each row, or image).

        dim: where its channels stand, 1 or -1. None where the numbers do not fit into int8.
        """
        return None

    def product(self, weight: PackedWeight, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]: the weight's product with `rounded(x)`."""
        levels = self.kept_levels()
        y = None if levels is None else weight.matmul_levels(x, levels)
        if y is None and (numbers := self.whole(x)) is not None:
            y = weight.matmul_int8(*numbers)
        return weight.matmul(self.rounded(x)) if y is None else y.to(x.dtype)

    def convolution(
        self, weight: PackedWeight, x: Tensor, stride: Pair, padding: Pair, dilation: Pair,
        groups: int,
    ) -> Tensor:  # fmt: skip
        """x [n, in, height, width] → [n, out, height, width]; zeros pad what was rounded."""
        levels = self.kept_levels()
        y = None
        if levels is not None:
            y = weight.conv2d_levels(x, levels, stride, padding, dilation, groups)
        if y is None and (numbers := self.whole(x, 1)) is not None:
            y = weight.conv2d_int8(*numbers, stride, padding, dilation, groups)
        if y is not None:
            return y.to(x.dtype)
        return weight.conv2d(self.rounded(x, 1), stride, padding, dilation, groups)


def nearest_step(x: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers n in [low, high] with step · n nearest to x; ties go up, NaN to low."""
    if high - low < 16:  # as `Levels` decides, bit by bit
        n = torch.full_like(x, low)
        for i in range(low, high):
            n += x >= step * (i + 0.5)
        return n
    return (x / step + 0.5).floor().clamp(low, high).nan_to_num(low)


def dynamic_step(x: Tensor, high: int, dim: int = -1) -> Tensor:
    """The largest magnitude over `high`: of each row of features, [..., 1], where dim is -1.

    Where the channels stand second, of each example: [n, 1, ...].
    """
    over = (-1,) if dim == -1 else tuple(range(1, x.dim()))
    return (x.detach().float().abs().amax(over, keepdim=True) / high).clamp(min=1e-30)


@register_format("steps.v1")
class StepCode(InputCode):
    """Uniform steps: x' = step · n, with n the whole number in [low, high] nearest to x / step.

    step: [1] float32, or [0] where it follows from the input itself (`dynamic_step`). low is -high,
    -high - 1 or 0, so zero stays zero.
    """

    step: Tensor

    def __init__(self, step: Tensor, low: int, high: int) -> None:
        super().__init__(step.shape)
        self.low, self.high = low, high
        self.register_buffer("step", step.detach().float().cpu().clone())

    @property
    def dynamic(self) -> bool:
        return self.step.numel() == 0

    def steps(self, x: Tensor, dim: int = -1) -> Tensor:
        """The step for this input: a scalar, or one for each row, or image, of it."""
        return self.step[0] if not self.dynamic else dynamic_step(x, self.high, dim)

    def meta(self) -> Meta:
        return {"low": self.low, "high": self.high}

    def write(self, coder: Coder) -> None:
        raw = self.step.cpu().numpy().astype("<f4").view(np.uint8)
        coder.plain("step", raw, 4, self.numel)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        low, high = meta.get("low"), meta.get("high")
        if shape not in ((0,), (1,)):
            raise FormatError(f"steps.v1: one step or none, got the shape {list(shape)}")
        if type(low) is not int or type(high) is not int or not 1 <= high <= 255:
            raise FormatError(f"steps.v1: high must lie in [1, 255], got {high!r} and low {low!r}")
        if low not in (0, -high, -high - 1):
            raise FormatError(f"steps.v1: low must be 0, {-high} or {-high - 1}, got {low}")
        raw = np.frombuffer(coder.plain("step", None, 4, math.prod(shape)), "<f4")
        step = torch.from_numpy(raw.astype("f4"))
        if not bool(((step > 0) & step.isfinite()).all()):
            raise FormatError("steps.v1: a step must be a finite number above 0")
        return cls(step, low, high)

    def dense(self) -> Tensor:
        return self.step

    def rounded(self, x: Tensor, dim: int = -1) -> Tensor:
        step = self.steps(x, dim).to(x.device)
        return (step * nearest_step(x.float(), step, self.low, self.high)).to(x.dtype)

    def levels(self) -> Levels | None:
        count = self.high - self.low + 1
        if self.dynamic or count > 16 or count & (count - 1):
            return None
        bits = count.bit_length() - 1
        step = float(self.step)
        half = torch.arange(self.low, self.high) + 0.5
        return Levels(
            thresholds=(self.step.cpu() * half)[:, None],
            pattern=torch.arange(count, dtype=torch.uint8),
            scale=step * 2.0 ** torch.arange(-1, bits - 1),
            offset=step * (self.low + self.high) / 2,
        )

    def whole(self, x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor] | None:
        if self.high > 127:
            return None
        step = self.steps(x, dim).to(x.device)
        return nearest_step(x.float(), step, self.low, self.high).to(torch.int8), step


@register_format("levels.v1")
class LevelCode(InputCode):
    """Any levels that are sums of scaled bits, as `Levels` says, signs among them.

    Its numbers are, one after the other: the scales [planes], the offset, and the thresholds
    [levels − 1, 1 or channels], all float32. pattern: the bits of each level, in the scalars.
    """

    def __init__(self, levels: Levels) -> None:
        numbers = levels.scale.numel() + 1 + levels.thresholds.numel()
        super().__init__((numbers,))
        self.pattern = levels.pattern.tolist()
        self.planes, self.channels = len(levels.scale), levels.thresholds.shape[1]
        parts = (levels.scale, torch.tensor([levels.offset]), levels.thresholds.flatten())
        self.register_buffer("numbers", torch.cat([p.detach().float().cpu() for p in parts]))

    numbers: Tensor

    def meta(self) -> Meta:
        return {"planes": self.planes, "pattern": "".join(f"{p:02x}" for p in self.pattern)}

    def write(self, coder: Coder) -> None:
        raw = self.numbers.cpu().numpy().astype("<f4").view(np.uint8)
        coder.plain("numbers", raw, 4, self.numel)

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        planes, text = meta.get("planes"), meta.get("pattern")
        if type(planes) is not int or not 1 <= planes <= 8:
            raise FormatError(f"levels.v1: planes must lie in [1, 8], got {planes!r}")
        try:
            pattern = list(bytes.fromhex(text)) if isinstance(text, str) else []
        except ValueError:
            pattern = []
        steps = len(pattern) - 1
        if not 1 <= steps <= 15 or max(pattern) >= 2**planes or text != bytes(pattern).hex():
            raise FormatError(
                f"levels.v1: pattern must be 2 to 16 bytes in hexadecimal, each below 2**{planes}, "
                f"got {text!r}"
            )
        channels, over = divmod(shape[0] - planes - 1, steps) if len(shape) == 1 else (0, 0)
        if channels < 1 or over:
            raise FormatError(
                f"levels.v1: {planes} scales, an offset and {steps} thresholds for each channel do "
                f"not make the shape {list(shape)}"
            )
        raw = np.frombuffer(coder.plain("numbers", None, 4, shape[0]), "<f4")
        numbers = torch.from_numpy(raw.astype("f4"))
        thresholds = numbers[planes + 1 :].reshape(steps, channels)
        rise = bool((thresholds[1:] >= thresholds[:-1]).all())
        if not bool(numbers.isfinite().all()) or not rise:
            raise FormatError("levels.v1: scales must be finite numbers, and thresholds rise")
        return cls(
            Levels(
                thresholds=thresholds, pattern=torch.tensor(pattern, dtype=torch.uint8),
                scale=numbers[:planes], offset=float(numbers[planes]),
            )
        )  # fmt: skip

    def dense(self) -> Tensor:
        return self.numbers

    def levels(self) -> Levels:
        numbers, steps = self.numbers.cpu(), len(self.pattern) - 1
        return Levels(
            thresholds=numbers[self.planes + 1 :].reshape(steps, self.channels),
            pattern=torch.tensor(self.pattern, dtype=torch.uint8),
            scale=numbers[: self.planes],
            offset=float(numbers[self.planes]),
        )

    def rounded(self, x: Tensor, dim: int = -1) -> Tensor:
        levels = self.kept_levels()
        assert levels is not None
        return decoded(levels, x, dim)


def decoded(levels: Levels, x: Tensor, dim: int = -1) -> Tensor:
    """What the levels make of x, whose channels stand at dim, 1 or -1."""
    flat = x.float().reshape(-1, x.shape[-1]) if dim == -1 else x.float()
    return levels.decoded(flat).reshape(x.shape).to(x.dtype)


def input_layer(name: str) -> str:
    """The layer that a name of a file's code belongs to."""
    return name.removesuffix(SUFFIX)


def check_layer(model: nn.Module, name: str) -> None:
    """Raise FormatError where a model has no layer that could take the code of this name."""
    path = input_layer(name)
    try:
        owner(model, f"{path}.weight")
        fits = may_round(model, path)
    except AttributeError:
        fits = False
    if not fits:
        raise FormatError(
            f"the file rounds the input of {path!r}, which is no Linear or Conv layer of the model"
        )
