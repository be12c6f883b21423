"""Penalties on the weights while they train, so that they can be removed or written shorter.

    l1           sum of |w|
    l2           sum of w²
    group_lasso  sum over groups of sqrt(n) · ‖w_g‖              n weights in the group
    hoyer        sum over layers of (sum of ‖w_g‖)² / sum of ‖w_g‖²
    slimming     sum of |gamma| over the batch norms' channels

They act on the weights as the layers use them, whatever form those are written in, so a penalty
means the same before and after a technique, and a weight that a mask removed is not counted. What
a form owns besides (gates, noise, biases and scales of norms too) is left alone.

Hoyer's measure does not change when a layer is scaled: it counts how many weights (or groups)
would have to be equal and not zero. group_lasso and hoyer draw whole groups towards zero. Training
by gradients leaves them near it, at the size of the last steps, and not at it: a following
`prune_weights(threshold=...)` removes them.

L1 with retraining: Han et al. (NIPS 2015). Group lasso: Yuan, Lin (2006), whose factor sqrt(n)
makes groups of any size comparable, where Wen et al. (Learning Structured Sparsity in Deep Neural
Networks, NIPS 2016; Learning Intrinsic Sparse Structures within LSTMs, ICLR 2018) have 1. Hoyer:
Yang, Wen, Li: DeepHoyer (ICLR 2020). Slimming: Liu et al., Learning Efficient Convolutional
Networks through Network Slimming (ICCV 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from taut.errors import RecipeError
from taut.modules import device_of, weights_in_use
from taut.technique import Setting, matches, option, register_step


@register_step
@dataclass(frozen=True, kw_only=True)
class Regularise(Setting):
    """Add a penalty on the weights to the loss of the recoveries that follow.

    Groups: filters are [o, :, :, :] of a convolution and channels [:, i, :, :]; rows and columns
    are those of matrices; blocks are squares of the matrix [out, rest], cut short at its edges. A
    unit of a recurrent layer is all that makes it and all that reads it inside the layer: its row
    in each gate of weight_ih, weight_hh and the biases, and its column in weight_hh and in the
    weight_ih of the next level.
    """

    kind: str = option(
        "l1", choices=("l1", "l2", "group_lasso", "hoyer", "slimming"), help="the penalty"
    )
    weight: float = option(1e-5, low=0, help="its price, in units of the loss")
    groups: str = option(
        "weights",
        choices=("weights", "filters", "channels", "rows", "columns", "blocks", "units"),
        help="what group_lasso and hoyer draw to zero together",
    )
    block: int = option(4, low=2, high=1024, help="side of a block, in weights")
    only: str = option("*", help="parameters: comma-separated patterns, `!` excludes")

    def __post_init__(self) -> None:
        super().__post_init__()
        grouped = self.groups != "weights"
        if self.kind == "group_lasso" and not grouped:
            raise RecipeError(
                "regularise: kind='group_lasso' needs groups, got groups='weights'; name some, as "
                "in groups='filters', or use kind='l1'"
            )
        if grouped and self.kind not in ("group_lasso", "hoyer"):
            raise RecipeError(
                f"regularise: kind={self.kind!r} knows no groups, got groups={self.groups!r}; use "
                "kind='group_lasso' or kind='hoyer'"
            )

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty on the network as it stands, a differentiable scalar.

        Raises RecipeError where the network has nothing that it would act on.
        """
        terms = [self._term(norms, size) for norms, size in self._norms(model)]
        if not terms:
            what = "batch norms" if self.kind == "slimming" else self.groups
            raise RecipeError(
                f"regularise: the network has no {what} that only={self.only!r} matches, so "
                f"kind={self.kind!r} would do nothing; choose other groups or patterns"
            )
        total = torch.zeros((), device=device_of(model))
        for term in terms:
            total = total + term
        return self.weight * total

    def _term(self, norms: Tensor, size: int) -> Tensor:
        if self.kind == "l2":
            return norms.square().sum()
        if self.kind == "hoyer":
            return norms.sum().square() / norms.square().sum().clamp(min=1e-12)
        return math.sqrt(size) * norms.sum()

    def _norms(self, model: nn.Module) -> Iterator[tuple[Tensor, int]]:
        """The groups' norms, one tensor for each layer, and how many weights a group has."""
        if self.kind == "slimming":
            for norm in _modules(model, _BatchNorm, self.only):
                if norm.affine:
                    yield norm.weight.abs(), 1
        elif self.groups == "units":
            for layer in _modules(model, nn.RNNBase, self.only):
                for level in range(layer.num_layers):
                    for way in range(1 + layer.bidirectional):
                        units = torch.cat(_unit_parts(layer, level, way), 1)
                        yield _norm(units), units.shape[1]
        else:
            for names, weight in weights_in_use(model):
                groups = self._split(weight) if weight.dim() >= 2 else None
                if groups is not None and matches(self.only, names):
                    yield _norm(groups), groups.shape[1]

    def _split(self, weight: Tensor) -> Tensor | None:
        """The weight as [groups, weights of a group]; None where it has no such groups."""
        if self.groups == "weights":
            return weight.reshape(-1, 1)
        if self.groups == "blocks":
            matrix, n = weight.flatten(1), self.block
            high, wide = (-(-s // n) for s in matrix.shape)
            padded = F.pad(matrix, (0, wide * n - matrix.shape[1], 0, high * n - matrix.shape[0]))
            return padded.reshape(high, n, wide, n).transpose(1, 2).reshape(-1, n * n)
        if (weight.dim() > 2) != (self.groups in ("filters", "channels")):
            return None
        across = self.groups in ("channels", "columns")
        return (weight.transpose(0, 1) if across else weight).flatten(1)


M = TypeVar("M", bound=nn.Module)


def _modules(model: nn.Module, kind: type[M], only: str) -> Iterator[M]:
    """The modules of this kind whose path the patterns match, each once."""
    for path, module in model.named_modules():
        if isinstance(module, kind) and matches(only, (path,)):
            yield module


def _unit_parts(layer: nn.RNNBase, level: int, way: int) -> list[Tensor]:
    """All weights of the units of one level and direction, as [units, ...] each."""
    size = layer.hidden_size

    def tensor(name: str, level: int = level, way: int = way) -> Tensor:
        return cast(Tensor, getattr(layer, f"{name}_l{level}{'_reverse' if way else ''}"))

    makers = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if layer.bias else [])
    parts = [_rows_of_units(tensor(name), size) for name in makers]
    if layer.proj_size:  # what leaves the layer are projections, which belong to no unit
        return [*parts, tensor("weight_hr").T]
    others = ~torch.eye(size, dtype=torch.bool, device=parts[0].device)
    read = tensor("weight_hh").reshape(-1, size, size).permute(2, 0, 1)  # [unit, gate, reader]
    parts.append(read.transpose(1, 2)[others].reshape(size, -1))  # its own rows are above already
    if level + 1 < layer.num_layers:
        for reader in range(1 + layer.bidirectional):
            after = tensor("weight_ih", level + 1, reader)
            parts.append(after[:, way * size : (way + 1) * size].T)
    return parts


def _rows_of_units(tensor: Tensor, size: int) -> Tensor:
    """[gates · size, ...] → [size, gates · ...]."""
    return tensor.reshape(-1, size, tensor[0].numel()).transpose(0, 1).flatten(1)


def _norm(groups: Tensor) -> Tensor:
    """The norm of each row; where a row is zero its gradient is zero, so that it stays."""
    if groups.shape[1] == 1:
        return groups.abs().squeeze(1)
    return cast(Tensor, torch.linalg.vector_norm(groups, dim=1))
