"""Packed layers as operations of another engine: which kernel runs a layer, and on what numbers.

    operation = operation_of(layer)        BitplaneMatmul, LookupMatmul, SparseConv2d, …
    operation.constant()                   all its arrays as one vector of bytes
    place(network)                         packed layers give way to their operations

The names, attributes and arrays are those of csrc/openvino/*.h, whose domain is `taut`. An
operation does more than the product: y = max(scale · product + shift, 0), so that bias and batch
norm are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from taut.activations import InputCode, StepCode
from taut.affine_weight import EXACT, AffineWeight
from taut.bit_weight import BitWeight
from taut.hashed_weight import HashedWeight
from taut.indexed_weight import IndexedWeight
from taut.kernels import BitWeights, Levels
from taut.kernels.lookup import pack_indices
from taut.layers import Packed
from taut.packed import PackedWeight
from taut.sparse_weight import SparseWeight

DOMAIN = "taut"
WHOLE = "LookupMatmulInt8"  # which rounds its input itself
NAMES = (
    "BitplaneMatmul", "BitplaneConv2d", "LookupMatmul", WHOLE, "HashedMatmul",
    "SparseMatmul", "SparseConv2d",
)  # fmt: skip
"""Of all the operations."""

_ALIGNED = 64
_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)
"""Of a sparse weight's values, in the order in which the operation counts them."""

Numbers = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation: its name, its attributes, and the arrays of its weight in order.

    out: rows of the weight. rounds: the input has to be rounded before it, by the layer's code.
    channels_last: whether a convolution gives [n, height, width, out].
    """

    name: str
    out: int
    numbers: Numbers
    arrays: tuple[Tensor, ...]
    scale: Tensor | None = None
    bias: Tensor | None = None
    rounds: bool = False
    channels_last: bool = False
    attributes: Numbers = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", {"out": self.out, "relu": 0, **self.numbers})

    def constant(self) -> Tensor:
        """Scale, shift and the arrays, each from a multiple of 64 bytes on: [n] uint8."""
        scale = torch.ones(self.out) if self.scale is None else self.scale.float()
        shift = torch.zeros(self.out) if self.bias is None else self.bias.float()
        return joined(scale, shift, *self.arrays)


def joined(*arrays: Tensor) -> Tensor:
    """Arrays one after the other, each from a multiple of 64 bytes on: [n] uint8."""
    parts = []
    for array in arrays:
        flat = array.detach().cpu().contiguous().flatten().view(torch.uint8)
        parts += [flat, flat.new_zeros(-len(flat) % _ALIGNED)]
    return torch.cat(parts)


def operation_of(layer: nn.Module) -> Operation | None:
    """What runs a packed layer; None for layers and weights that no operation takes.

    Linear layers of bits, indices, sparse rows and hashed buckets; convolutions in two dimensions
    of bits whose inputs are bits, and of sparse rows. Whole numbers of more than four bits with
    inputs of eight have none: engines multiply those faster themselves.
    """
    if not isinstance(layer, Packed) or "weight" not in layer.packed:
        return None
    weight = cast(PackedWeight, layer.packed["weight"])
    code = layer.input_code
    levels = None if code is None else code.kept_levels()
    if levels is not None and levels.takes_int8:
        return None
    wide = isinstance(weight, AffineWeight) and weight.bits > 4
    if wide and isinstance(code, StepCode) and not code.dynamic:
        return None
    if isinstance(layer, nn.Linear):
        found = _whole_numbers(weight, code) if levels is None else None
        found = found or _linear(weight, levels)
    elif isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        found = None if isinstance(layer.padding, str) else _convolution(layer, weight, levels)
    else:
        return None
    if found is None:
        return None
    name, numbers, arrays = found
    return Operation(
        name=name, out=weight.shape[0], numbers=numbers, arrays=arrays,
        scale=_row_scale(weight) if name == "LookupMatmul" else None,
        bias=layer.bias,
        rounds=code is not None and not numbers.get("input_planes") and name != WHOLE,
        channels_last=name == "BitplaneConv2d",
    )  # fmt: skip


Found = tuple[str, Numbers, tuple[Tensor, ...]]


def _whole_numbers(weight: PackedWeight, code: InputCode | None) -> Found | None:
    """Whole numbers or signs times whole numbers; the operation rounds its input itself."""
    if not isinstance(code, StepCode) or code.dynamic or code.high > 127 or len(weight.shape) != 2:
        return None
    out, columns = weight.shape
    if not 0 < columns <= EXACT or not out:
        return None
    if isinstance(weight, BitWeight) and weight.planes == 1:
        bits, codes, values = 1, pack_indices(weight.symbols(), 1), torch.tensor([-1, 1])
        steps: Tensor | None = weight.scale.dense()[0].float().expand(out)
    elif isinstance(weight, AffineWeight) and weight.bits <= 4:
        bits, codes, steps = weight.bits, weight.codes, _row_scale(weight)
        values = torch.arange(2**bits) - 2 ** (bits - 1)
    else:
        return None
    if steps is None:
        return None
    numbers = {"in": columns, "bits": bits, "low": code.low, "high": code.high}
    return WHOLE, numbers, (codes, values.to(torch.int8), steps * code.step, code.step)


def _linear(weight: PackedWeight, levels: Levels | None) -> Found | None:
    if len(weight.shape) != 2 or 0 in weight.shape:
        return None
    size = {"in": weight.shape[1]}
    bits = _bits(weight, 1, levels)
    if bits is not None:
        numbers, arrays = _planes(bits, levels)
        return "BitplaneMatmul", size | numbers, arrays
    if isinstance(weight, SparseWeight):
        numbers, arrays = _rows(weight)
        return "SparseMatmul", size | numbers, arrays
    if isinstance(weight, HashedWeight) and len(weight.drawing.bands) == 1:
        drawing = weight.drawing
        numbers = {"count": drawing.bands[0], "seed": drawing.seed, "run": drawing.run}
        return "HashedMatmul", size | numbers, (weight.wrapped()[0],)
    tables = _tables(weight)
    if isinstance(weight, IndexedWeight) and tables is not None:
        group = weight.shape[1] // tables.shape[1]
        numbers = {"bits": weight.bits, "tables": len(tables), "group": group}
        return "LookupMatmul", size | numbers, (weight.codes, tables)
    return None


def _convolution(layer: nn.Conv2d, weight: PackedWeight, levels: Levels | None) -> Found | None:
    if len(weight.shape) != 4 or 0 in weight.shape:
        return None
    window = {
        "channels": layer.in_channels, "groups": layer.groups, "kernel": list(layer.kernel_size),
        "stride": list(layer.stride), "padding": list(cast("tuple[int, ...]", layer.padding)),
        "dilation": list(layer.dilation),
    }  # fmt: skip
    bits = None if levels is None else _bits(weight, layer.groups, levels)
    if bits is not None:
        numbers, arrays = _planes(bits, levels)
        return "BitplaneConv2d", {**window, **numbers, "channels_last": 0}, arrays
    if isinstance(weight, SparseWeight):
        numbers, arrays = _rows(weight)
        return "SparseConv2d", window | numbers, arrays
    return None


def _bits(weight: PackedWeight, groups: int, levels: Levels | None) -> BitWeights | None:
    if isinstance(weight, BitWeight):
        return weight.weights(groups)
    if isinstance(weight, AffineWeight) and levels is not None:
        return weight.bit_planes(groups, levels)
    return None


def _planes(bits: BitWeights, levels: Levels | None) -> tuple[Numbers, tuple[Tensor, ...]]:
    numbers: Numbers = {
        "planes": bits.bits.shape[1], "input_planes": 0, "levels": 1, "per_channel": 0,
        "offset": 0.0, "pad": 0.0,
    }  # fmt: skip
    arrays = (bits.bits, bits.scale, bits.sums)
    if levels is None:
        return numbers, arrays
    numbers |= {
        "input_planes": len(levels.scale), "levels": len(levels.pattern),
        "per_channel": int(levels.thresholds.shape[1] != 1), "offset": levels.offset,
        "pad": levels.pad - levels.lowest, "signs": 0,
    }  # fmt: skip
    return numbers, (*arrays, levels.scale, levels.thresholds, levels.pattern)


def _rows(weight: SparseWeight) -> tuple[Numbers, tuple[Tensor, ...]]:
    values, table = weight.values.operands()
    kind = _KINDS.index(values.dtype)
    numbers = {"count": len(values), "values": kind, "entries": 0}
    arrays = [weight.starts, weight.columns, values]
    if table is not None:
        numbers["entries"] = len(table)
        arrays.append(nn.functional.pad(table.float(), (0, 256 - len(table))))
    return numbers, tuple(arrays)


def _tables(weight: PackedWeight) -> Tensor | None:
    """[1 or out, groups, 2**bits] float32; None where there is no such table."""
    if not isinstance(weight, IndexedWeight):
        return None
    if isinstance(weight, AffineWeight) and not weight.single:
        if _row_scale(weight) is not None:  # one table stays in registers
            numbers = torch.arange(2**weight.bits) - 2.0 ** (weight.bits - 1)
            return numbers[None, None]
        width = weight.numel // weight.steps.numel
        return weight.row_tables() if weight.by_row or width % 128 == 0 else None
    return weight.float_table()[None, None]


def _row_scale(weight: PackedWeight) -> Tensor | None:
    """The step of each row, where rows differ in nothing else."""
    if not isinstance(weight, AffineWeight) or weight.single or not weight.by_row:
        return None
    even = bool((weight.middle() == 2 ** (weight.bits - 1)).all())
    return weight.steps.dense().float() if even else None


# ---- in a network ---------------------------------------------------------------------------


class EngineLayer(nn.Module):
    """A layer that is one operation of another engine: exported as that, run as the packed layer.

    Where `operation.rounds`, whoever exports it rounds what it reads.
    """

    constant: Tensor

    def __init__(self, operation: Operation, like: Packed) -> None:
        super().__init__()
        self.operation = operation
        self._like = [like]  # in a list: its weights are not exported
        self.register_buffer("constant", operation.constant())

    @property
    def layer(self) -> Packed:
        """The packed layer that it stands for."""
        return self._like[0]

    def forward(self, x: Tensor) -> Tensor:
        """The operation, its channels where PyTorch has them."""
        if not torch.compiler.is_exporting():
            return cast(Tensor, self.layer(x))
        y: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.operation.name}", (x.float(), self.constant),
            self.operation.attributes, dtype=torch.float32, shape=self._shape(x), version=1,
        )  # fmt: skip
        return y.permute(0, 3, 1, 2) if self.operation.channels_last else y

    def _shape(self, x: Tensor) -> list[int]:
        out, a = self.operation.out, self.operation.attributes
        if "kernel" not in a:
            return [*x.shape[:-1], out]
        window = zip(a["kernel"], a["stride"], a["padding"], a["dilation"], strict=True)
        size = [
            (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for n, (kernel, stride, padding, dilation) in zip(x.shape[2:], window, strict=True)
        ]
        image = [*size, out] if self.operation.channels_last else [out, *size]
        return [x.shape[0], *image]


def place(
    network: nn.Module, wanted: Callable[[str, Operation], bool] = lambda path, operation: True
) -> Mapping[str, Operation]:
    """Put operations in place of packed layers, in place; which ones, by path, is returned.

    wanted: chooses among the layers for which there is an operation, by path. Layers that stand
    at several paths become one operation.
    """
    found: dict[str, Operation] = {}
    made: dict[int, EngineLayer] = {}
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if not isinstance(module, Packed) or not path:
            continue
        above = network.get_submodule(path.rpartition(".")[0])
        if isinstance(above, nn.MultiheadAttention):
            continue  # it reads the weight of its last projection itself
        if id(module) not in made:
            operation = operation_of(module)
            if operation is None or not wanted(path, operation):
                continue
            found[path] = operation
            made[id(module)] = EngineLayer(operation, module)
        network.set_submodule(path, made[id(module)])
    return found
