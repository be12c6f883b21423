"""The packed weight: a weight as it is stored and run, and the formats that files know it by."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.coding import Coder
from taut.errors import FormatError
from taut.kernels import Levels, lstm_cell

Meta = dict[str, Any]
Pair = tuple[int, int]
ReadChild = Callable[[str, tuple[int, ...]], "PackedWeight"]


class PackedWeight(nn.Module, ABC):
    """A weight as it is stored and run: integer and float parts, no dense copy.

    The parts are buffers and child PackedWeights, so they move between devices with the module
    that holds them; they keep their dtype, whatever the module is cast to. shape: the weight's.
    """

    format: ClassVar[str]

    def __init__(self, shape: Iterable[int]) -> None:
        super().__init__()
        self.shape = tuple(int(n) for n in shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def meta(self) -> Meta:
        """The JSON scalars that `read` needs."""
        return {}

    @abstractmethod
    def write(self, coder: Coder) -> None:
        """Code the parts in order; a child codes itself by `child.write` inside its name."""

    @classmethod
    @abstractmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        """Decode what `write` coded, checking every count and range before it is used."""

    def nested(self) -> dict[str, PackedWeight]:
        """The packed weights inside this one, by part name."""
        return {n: c for n, c in self.named_children() if isinstance(c, PackedWeight)}

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight: the definition that every kernel and test is held to."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], the weight seen as [out, in] (later dimensions joined)."""
        return F.linear(x, self.dense().flatten(1).to(x.dtype))

    def conv2d(
        self, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor:
        """x [n, in, height, width] → [n, out, height, width], as a product with its windows.

        The kernel of a weight [out, in, width] has the height one.
        """
        kernel = (*(1,) * (4 - len(self.shape)), *self.shape[2:])
        if groups > 1:
            weight = self.dense().to(x.dtype).reshape(*self.shape[:2], *kernel)
            return F.conv2d(x, weight, None, stride, padding, dilation, groups)
        windows = F.unfold(x, kernel, dilation, padding, stride)  # [n, in · window, places]
        y = self.matmul(windows.transpose(1, 2)).transpose(1, 2)
        size = (
            (x.shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d in range(2)
        )
        return y.reshape(len(x), self.shape[0], *size)

    def matmul_levels(self, x: Tensor, levels: Levels) -> Tensor | None:
        """x [..., in] → [..., out], x split into bits by the levels, and the bits counted.

        None where the weight has no such product.
        """
        return None

    def conv2d_levels(
        self, x: Tensor, levels: Levels, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> Tensor | None:
        """The same for a convolution, whose border counts as `levels.pad`."""
        return None

    def matmul_int8(self, x: Tensor, step: Tensor) -> Tensor | None:
        """x [..., in] int8, times step (a scalar or [..., 1]) → [..., out] float32, the sum exact.

        None where the weight has no such product.
        """
        return None

    def conv2d_int8(
        self, x: Tensor, step: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int = 1
    ) -> Tensor | None:
        """For a convolution: x [n, in, height, width] int8, step a scalar or [n, 1, 1, 1].

        None, too, where rounded floats are multiplied faster.
        """
        return None

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, for embeddings: index [...] → [..., *shape[1:]]."""
        return self.dense()[index]

    def lstm(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """All steps of an LSTM of which this is the recurrent weight, [4 · size, size].

        inputs: [steps, batch, 4 · size], the gates' products with the input, biases added; hidden,
        cell: [batch, size] → hidden states [steps, batch, size] and the last cell.
        """
        states = []
        for step in inputs:
            hidden, cell = lstm_cell(step, self.matmul(hidden), cell)
            states.append(hidden)
        return torch.stack(states), cell

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """One-dimensional values as sparse products read them.

        Floats and None, or uint8 indices and the float32 table that they point into.
        """
        return self.dense(), None

    def count_nonzero(self) -> int:
        """How many of its numbers are not zero."""
        return int(self.dense().count_nonzero())

    def forget(self) -> None:
        """Drop what was computed from the parts and kept for speed; they may have changed."""
        for child in self.nested().values():
            child.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget()

        def keep_dtype(part: Tensor) -> Tensor:
            moved = fn(part)
            return moved if moved.dtype is part.dtype else part.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


FORMATS: dict[str, type[PackedWeight]] = {}
"""Every packed format, by the name that files use."""

P = TypeVar("P", bound=PackedWeight)


def register_format(name: str) -> Callable[[type[P]], type[P]]:
    """Make a packed weight known to files under a name like `sparse.v1`."""
    if not re.fullmatch(r"[a-z0-9_]+\.v\d+", name):
        raise FormatError(f"a format is named like 'sparse.v1', got {name!r}")

    def register(cls: type[P]) -> type[P]:
        if name in FORMATS:
            raise FormatError(f"two packed weights use the format name {name!r}; rename one")
        cls.format = name
        FORMATS[name] = cls
        return cls

    return register


# How each is written: as little-endian integers of the same width.
_BITS = {
    torch.float32: (torch.int32, "<i4"),
    torch.float16: (torch.int16, "<i2"),
    torch.bfloat16: (torch.int16, "<i2"),
}

PRECISIONS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
}


@register_format("plain.v1")
class Plain(PackedWeight):
    """Numbers stored one by one at a declared precision. values: [*shape]."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape)
        self.register_buffer("values", values.detach().cpu().clone())

    @classmethod
    def of(cls, values: Tensor, precision: str = "auto") -> Plain:
        """Floats rounded to `precision`: a name in PRECISIONS, or `auto`.

        auto is float16 where the root mean square of its rounding is at most 2**-10 of the
        tensor's own, else float32. Integers are kept as they are. Raises FormatError for complex
        numbers and for numbers too large for the precision.
        """
        if values.is_complex():
            raise FormatError(
                f"plain.v1 holds real numbers, got {values.dtype}; keep them in the model as two "
                "real tensors (torch.view_as_real)"
            )
        if not values.is_floating_point():
            return cls(values.to(torch.int64))
        if precision == "auto":
            exact = values.detach().double()
            error = exact.to(torch.float16).double() - exact
            fine = float(error.square().sum()) <= 2.0**-20 * float(exact.square().sum())
            precision = "float16" if fine else "float32"
        rounded = values.to(PRECISIONS[precision])
        if not torch.equal(rounded.isinf(), values.isinf()):
            raise FormatError(
                f"{precision} cannot hold numbers as large as {values.abs().max():.3g}; "
                + ("scale them down" if precision == "float32" else "use precision='float32'")
            )
        return cls(rounded)

    @property
    def precision(self) -> str:
        return next(n for n, d in PRECISIONS.items() if d is self.values.dtype)

    def meta(self) -> Meta:
        return {} if self.precision == "float16" else {"as": self.precision}

    def write(self, coder: Coder) -> None:
        flat = self.values.cpu().flatten()
        if flat.dtype is torch.int64:
            coder.integers("values", flat.numpy(), flat.numel())
        else:
            same_bits, written = _BITS[flat.dtype]
            raw = flat.view(same_bits).numpy().astype(written).view(np.uint8)
            coder.plain("values", raw, flat.element_size(), flat.numel())

    @classmethod
    def read(cls, coder: Coder, shape: tuple[int, ...], meta: Meta, child: ReadChild) -> Self:
        precision = meta.get("as", "float16")
        if precision not in PRECISIONS:
            raise FormatError(f"plain.v1 has no precision {precision!r}")
        dtype, count = PRECISIONS[precision], math.prod(shape)
        if dtype is torch.int64:
            return cls(torch.from_numpy(coder.integers("values", None, count)).reshape(shape))
        written = _BITS[dtype][1]
        raw = np.frombuffer(coder.plain("values", None, dtype.itemsize, count), written)
        return cls(torch.from_numpy(raw.astype(written[1:])).view(dtype).reshape(shape))

    def dense(self) -> Tensor:
        return self.values.float() if self.values.is_floating_point() else self.values

    def operands(self) -> tuple[Tensor, Tensor | None]:
        return self.values if self.values.is_floating_point() else self.dense(), None
