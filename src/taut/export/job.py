"""What is to be exported: the network, an example of its input, and how the file is to be."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from taut.errors import ExportError, did_you_mean
from taut.export.plain import Plain, plain
from taut.trace import Example
from taut.trace import export as traced

PRECISIONS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Job:
    """packed: the network, in eval mode; example: of at least two examples where the batch is to be
    free. precision: of the floats in the file. about: what the file tells of itself. calibration:
    inputs on which ranges are found of what lies between rounded layers; none: it is left alone.
    keep: whether layers for which Taut has an operation stay compressed.
    """

    packed: nn.Module
    example: Example
    dynamic_batch: bool = True
    dynamic_length: bool = False
    precision: str = "float32"
    about: Mapping[str, Any]
    calibration: Sequence[Example] = ()
    keep: bool = False

    @cached_property
    def plain(self) -> Plain:
        """The network as other engines understand it."""
        return plain(self.packed, keep=self.keep)

    @cached_property
    def program(self) -> ExportedProgram:
        """The plain network, traced."""
        return traced(
            self.plain.network, self.example, any_batch=self.dynamic_batch,
            any_length=self.dynamic_length,
        )[1]  # fmt: skip

    @property
    def free(self) -> tuple[int, ...]:
        """The dimensions of inputs that are to take any size."""
        return (0,) * self.dynamic_batch + (1,) * self.dynamic_length

    def refuse_fixed(self, name: str, shape: Iterable[object]) -> None:
        """Raise ExportError where an input's shape fixes a dimension that was to be free.

        An input of one step beside longer ones keeps that: the next one of those that are kept.
        """
        sizes = list(shape)
        for dim in (d for d in self.free if d < len(sizes)):
            size = getattr(sizes[dim], "value", sizes[dim])  # of ONNX's symbols
            if str(size) == "1" and dim == 1 and longest(self.example, 1) > 1:
                continue
            if str(size).isdigit():  # PyTorch's symbols may stand for one size only
                what, option = (("batch", "dynamic_batch"), ("length", "dynamic_length"))[dim]
                raise ExportError(
                    f"export: the network fixes the {what} of its input {name!r} at {size}; "
                    f"give an example of the {what} to come and {option}=False, or take that size "
                    "out of the network"
                )


def longest(example: Example, dim: int) -> int:
    """The largest size that an input has along a dimension; 0 where none has it."""
    tensors = [t for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim() > dim]
    return max((t.shape[dim] for t in tensors), default=0)


def check_precision(precision: str) -> None:
    """Raise ExportError for a precision that no file has."""
    if precision not in PRECISIONS:
        near = did_you_mean(precision, PRECISIONS)
        raise ExportError(f"export: there is no precision {precision!r}{near}")


def as_example(given: Any) -> Example:
    """Arguments of a forward: from a tensor, a tuple, a dict, or (args, kwargs)."""
    if isinstance(given, Tensor):
        return (given,), {}
    if isinstance(given, dict):
        return (), dict(given)
    if isinstance(given, tuple | list):
        pair = len(given) == 2 and isinstance(given[0], tuple | list) and type(given[1]) is dict
        args, kwargs = given if pair else (given, {})
        if tree_leaves((args, kwargs)):
            return tuple(args), dict(kwargs)
    what = "nothing" if given is None else f"a {type(given).__name__}"
    raise ExportError(
        "export: the example must be the input of one forward, a tensor, a tuple or dict of "
        f"tensors, or (args, kwargs), got {what}"
    )


def bound(network: nn.Module, example: Example) -> Example:
    """The same arguments in the order of the forward's signature.

    Raises ExportError where it does not take them.
    """
    try:
        found = inspect.signature(network.forward).bind(*example[0], **example[1])
    except TypeError as error:
        raise ExportError(
            f"export: {type(network).__name__}.forward does not take the example: {error}"
        ) from error
    return found.args, dict(found.kwargs)


def at_least_two(example: Example) -> Example:
    """The example twice where it is of one: a batch of one would be traced as fixed."""
    tensors = [t for t in tree_leaves(example) if isinstance(t, Tensor) and t.dim()]
    if not tensors or len(tensors[0]) != 1:
        return example

    def twice(value: Any) -> Any:
        alone = isinstance(value, Tensor) and value.dim() and len(value) == 1
        return torch.cat([value, value]) if alone else value

    args, kwargs = tree_map(twice, example)
    return args, kwargs


@torch.no_grad()
def answers(network: nn.Module, example: Example) -> tuple[list[Any], Any]:
    """What a network answers, flattened, and how to unflatten it.

    Raises ExportError, with the network's own reason, where it does not run on the example.
    """
    try:
        output = network(*example[0], **example[1])
    except Exception as error:
        raise ExportError(
            f"export: {type(network).__name__} does not run on the example: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error
    return tree_flatten(output)
