"""What a weight is multiplied with, seen below the layers: every product that a network computes.

Whatever its layer is called, a weight that meets inputs is one or more matrices,

    y[n, o] = Σ over i of x[n, i] · W[o, i],    moments[i, j] = Σ over n of x[n, i] · x[n, j]
    drift[i, j] = Σ over n of (x₀[n, i] − x[n, i]) · x[n, j]

x₀ is what the weight met in the network as it was before other weights were changed.

A linear layer is one; a convolution is one for each group, whose inputs are its windows; each of
attention's three projections is one where they read different tensors; a recurrent weight meets
the hidden states step by step; an embedding meets one-hot rows, whose moments are the counts of the
tokens. PyTorch's operations are watched as they run, so layers written by hand are seen like its
own, as long as they multiply by the weight, by views or by copies of it.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

WIDEST = 1024
"""Columns of one matrix of moments; what is wider is cut into blocks, as if uncorrelated."""


@dataclass(eq=False)
class Product:
    """A matrix that a weight, or a part of it, is multiplied as, and what it meets.

    index: [out, in] int64, where its numbers lie in the flattened weight. moments: [in, in]
    float64, or [in], the diagonal alone. sums: [in] float64, Σ x. rows: how many inputs it met.
    drift: [in, in] float64, and shift: [in] float64, Σ (x₀ − x), or None where the network before
    was not run beside.
    """

    index: Tensor
    moments: Tensor
    sums: Tensor = field(repr=False)
    rows: int = 0
    drift: Tensor | None = None
    shift: Tensor | None = field(default=None, repr=False)

    @property
    def squares(self) -> Tensor:
        """Σ over n of x[n, i]²: [in]."""
        return self.moments if self.moments.dim() == 1 else self.moments.diagonal()


def products(
    run: Callable[[], object], weight: Tensor, diagonal: bool = False, before: Tensor | None = None
) -> list[Product]:
    """Every way in which `weight` is multiplied while `run` runs; none where it cannot be seen.

    weight: the tensor that the network uses, of at least one dimension. diagonal: no correlations,
    only the moments' diagonals. before: the same weight of the network as it was, where `run` runs
    that one, too, just before on the same inputs.
    """
    earlier = None if before is None or diagonal else _Earlier(before)
    watch = _Watch(weight, diagonal, earlier)
    with earlier or contextlib.nullcontext(), watch:
        _plainly(run)
    return watch.found()


def _plainly(run: Callable[[], object]) -> None:
    """Run something without gradients, and so that every product is an operation of its own."""
    one_dnn = cast(Any, torch.backends.mkldnn)
    fused, kernels = torch.backends.mha.get_fastpath_enabled(), one_dnn.enabled
    try:  # these hide the products inside one operation
        torch.backends.mha.set_fastpath_enabled(False)
        one_dnn.enabled = False
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        one_dnn.enabled = kernels


def centred(product: Product) -> Product:
    """Of the inputs less their mean, x − x̄, and of those before less theirs."""
    mean = product.sums / max(product.rows, 1)
    drift = product.drift
    if drift is not None and product.shift is not None:
        drift = drift - product.shift[:, None] * mean
    moments = product.moments - product.sums[:, None] * mean
    return Product(product.index, moments, torch.zeros_like(mean), product.rows, drift)


@dataclass(eq=False)
class UnitMoments:
    """What the units that a weight reads are like together.

    moments: [units, units] float64, Σ a_u · a_v; sums: [units] float64, Σ a_u; rows: how many
    numbers of each unit were summed. Where a unit lies in several columns of the weight (the
    window of a convolution, the pixels of a flattened channel) its numbers there are all counted,
    each beside those of the other units at the same place.
    """

    moments: Tensor
    sums: Tensor = field(repr=False)
    rows: int = 0


def unit_moments(
    run: Callable[[], object], wanted: Sequence[tuple[Tensor, int, Tensor]]
) -> list[UnitMoments]:
    """The moments of what weights read, while `run` runs: once for every few weights.

    wanted: for each group of units the weight that reads it, as the network uses it, the dimension
    along which the units lie, and their places there, [units, places of each]. What is not seen
    has rows = 0.
    """
    watches: dict[int, _UnitWatch] = {}
    found = []
    for weight, dim, places in wanted:
        if id(weight) not in watches:
            watches[id(weight)] = _UnitWatch(weight)
        found.append(watches[id(weight)].want(dim, places))
    left = list(watches.values())
    while left:
        some, left = left[:_MOST_WATCHED], left[_MOST_WATCHED:]
        with contextlib.ExitStack() as stack:
            for watch in some:
                watch.begin()
                stack.enter_context(watch)
            _plainly(run)
        for watch in some:
            watch.known.clear()
    return found


_MOST_WATCHED = 16
"""Weights in one run: each looks at every operation, and maps all of its numbers."""
_MATRICES = {"mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
"""Operations that multiply two arguments, and the place of the first."""
_COPIES = {"clone", "_to_copy"}
_LOOKUPS = {"embedding", "_embedding_bag", "_embedding_bag_forward_only"}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation; knows by their storage which tensors are the weight, or parts of it."""

    def __init__(
        self, weight: Tensor, diagonal: bool = False, earlier: _Earlier | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.diagonal, self.earlier = diagonal, earlier
        self.numel = weight.numel()
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # kept, so that no address is used again
        self.blocks: dict[Any, list[Product]] = {}
        self._follow(weight, torch.arange(self.numel, device=weight.device).reshape(weight.shape))

    def found(self) -> list[Product]:
        """The products, those of one matrix added up."""
        merged: list[Product] = []
        for product in (p for blocks in self.blocks.values() for p in blocks):
            same = [
                p for p in merged
                if p.moments.dim() == product.moments.dim() and torch.equal(p.index, product.index)
            ]  # fmt: skip
            if same:
                same[0].moments += product.moments
                if same[0].drift is not None and product.drift is not None:
                    same[0].drift += product.drift
                if same[0].shift is not None and product.shift is not None:
                    same[0].shift += product.shift
                same[0].sums += product.sums
                same[0].rows += product.rows
            else:
                merged.append(product)
        return merged

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func.overloadpacket.__name__
        if op in _MATRICES:
            self._matrices(*args[_MATRICES[op] :][:2])
        elif op == "convolution":
            self._convolution(*args)
        elif op in _LOOKUPS and (places := self._places(args[0])) is not None:
            counts = torch.bincount(args[1].flatten(), minlength=len(places))
            self._meet(("rows", _layout(places)), places.T, counts=counts)
        elif op in _COPIES and (places := self._places(args[0])) is not None:
            self._follow(result, places)
        return result

    def _follow(self, tensor: Tensor, places: Tensor) -> None:
        """From here on this tensor's storage is known to hold the weight's numbers."""
        storage = tensor.untyped_storage()
        held = storage.nbytes() // tensor.element_size()
        mapped = torch.full((held,), -1, dtype=torch.int64, device=tensor.device)
        mapped.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(places)
        self.known[storage.data_ptr()] = tensor, mapped

    def _places(self, tensor: Tensor) -> Tensor | None:
        """Where the numbers of a tensor lie in the flattened weight; None where they do not."""
        if tensor.layout is not torch.strided or tensor.dim() < 2:
            return None
        _, mapped = self.known.get(tensor.untyped_storage().data_ptr(), (None, None))
        if mapped is None:
            return None
        places = mapped.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return places if places.numel() and int(places[(0,) * places.dim()]) >= 0 else None

    def _matrices(self, a: Tensor, b: Tensor) -> None:
        """a [..., rows, in] @ b [..., in, out]; either may be the weight."""
        if (places := self._places(b)) is not None:
            inputs, places = a, places.mT
        elif (places := self._places(a)) is not None:
            inputs = b.mT if b.dim() > 1 else b[None]
        else:
            return
        if places.dim() == 3 and (places.stride(0) == 0 or len(places) == 1):
            places, inputs = places[0], inputs.flatten(0, 1)  # one matrix for the whole batch
        if places.dim() == 2:
            places, inputs = places[None], inputs[None]
        for matrix, rows in zip(places, inputs, strict=True):
            self._meet(_layout(matrix), matrix, rows)

    def _convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], transposed: bool,
        output_padding: Sequence[int], groups: int,
    ) -> None:  # fmt: skip
        places = self._places(weight)
        if places is None:
            return
        key, size = _layout(places), weight.shape[2:]
        around = [(p, p) for p in padding]
        if transposed:  # a convolution by the flipped kernel over inputs that stand `stride` apart
            reach = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
            around = [
                (r - p, r - p + more)
                for r, p, more in zip(reach, padding, output_padding, strict=True)
            ]
            x = _spread(x, stride)
            stride = [1] * len(size)
            places = torch.unflatten(places, 0, (groups, -1)).transpose(1, 2).flatten(0, 1)
            places = places.flip(tuple(range(2, places.dim())))
        x = F.pad(x, [p for pair in reversed(around) for p in pair])
        matrices = places.reshape(groups, -1, math.prod(places.shape[1:]))
        few = max(1, _MOST_NUMBERS // max(1, x[0].numel() * math.prod(size)))
        for part in torch.split(x, few):
            seen = torch.unflatten(windows(part, size, stride, dilation), 1, (groups, -1))
            spots = range(3, 3 + len(size))  # [n, groups, channels, *spots, *size]
            rows = seen.permute(1, 0, *spots, 2, *(s + len(size) for s in spots))
            for group, (matrix, inputs) in enumerate(zip(matrices, rows, strict=True)):
                self._meet((key, group), matrix, inputs.reshape(-1, matrix.shape[1]))

    def _meet(
        self, key: Any, index: Tensor, x: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        """Add inputs x [n, in], or the counts of one-hot ones [in], to those of a matrix."""
        if key not in self.blocks:
            width = index.shape[1] if self.diagonal or counts is not None else WIDEST
            parts = torch.split(index.clone(), width, 1)
            self.blocks[key] = [self._empty(part, counts is None) for part in parts]
        other = self.earlier.met.popleft() if self.earlier and self.earlier.met else None
        at = 0
        for product in self.blocks[key]:
            part = slice(at, at + product.index.shape[1])
            at = part.stop
            if counts is not None:
                product.moments += counts
                product.sums += counts
                product.rows += int(counts.sum())
            elif x is not None:
                seen = x[:, part] if x.dtype is torch.float64 else x[:, part].float()
                product.moments += seen.square().sum(0) if self.diagonal else seen.T @ seen
                product.sums += seen.sum(0)
                product.rows += len(seen)
                if other is None or other.shape != x.shape:
                    product.drift = product.shift = None
                elif product.drift is not None and product.shift is not None:
                    moved = other[:, part].to(seen) - seen
                    product.drift += moved.T @ seen
                    product.shift += moved.sum(0)

    def _empty(self, index: Tensor, correlated: bool) -> Product:
        n = index.shape[1]
        shape = (n, n) if correlated and not self.diagonal else (n,)
        zeros = torch.zeros(shape, dtype=torch.float64, device=index.device)
        drift = torch.zeros_like(zeros) if self.earlier and len(shape) == 2 else None
        shift = None if drift is None else zeros.new_zeros(n)
        return Product(index, zeros, zeros.new_zeros(n), drift=drift, shift=shift)


class _Earlier(_Watch):  # type: ignore[no-untyped-call]
    """Keeps what the weight of the network as it was has met, for the other to meet beside it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.met: deque[Tensor | None] = deque()

    def _meet(
        self, key: Any, index: Tensor, x: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        self.met.append(x)


class _UnitWatch(_Watch):  # type: ignore[no-untyped-call]
    """Adds up what units have to do with each other, in place of columns."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, diagonal=True)
        self.known.clear()
        self.weight = weight
        self.asked: list[tuple[int, Tensor, UnitMoments]] = []
        self.order: dict[Any, list[Tensor | None]] = {}

    def want(self, dim: int, places: Tensor) -> UnitMoments:
        """What will be found of these units."""
        zeros = torch.zeros(len(places), len(places), dtype=torch.float64)
        zeros = zeros.to(self.weight.device)
        made = UnitMoments(zeros, zeros.new_zeros(len(places)))
        self.asked.append((dim, places.to(self.weight.device), made))
        return made

    def begin(self) -> None:
        numbers = torch.arange(self.numel, device=self.weight.device)
        self._follow(self.weight, numbers.reshape(self.weight.shape))

    def _meet(
        self, key: Any, index: Tensor, x: Tensor | None = None, counts: Tensor | None = None
    ) -> None:
        if x is None:
            return
        if key not in self.order:
            self.order[key] = [self._columns(index, dim, places) for dim, places, _ in self.asked]
        for columns, (_, _, found) in zip(self.order[key], self.asked, strict=True):
            if columns is not None:
                seen = x[:, columns].double().flatten(0, 1)  # [inputs · columns of each, units]
                found.moments += seen.T @ seen
                found.sums += seen.sum(0)
                found.rows += len(seen)

    def _columns(self, index: Tensor, dim: int, places: Tensor) -> Tensor | None:
        """[columns of each, units]: where the units are read; None where they are made.

        None, too, for a part of the weight in which not all of them are.
        """
        lies = index // math.prod(self.weight.shape[dim + 1 :]) % self.weight.shape[dim]
        each = torch.bincount(lies[0], minlength=self.weight.shape[dim])
        if not bool((lies == lies[:1]).all() and (each == each[0]).all()):
            return None
        order = lies[0].argsort(stable=True).reshape(self.weight.shape[dim], -1)
        return order[places].flatten(1).T


_MOST_NUMBERS = 2**24
"""Of the windows that are held at once."""


def _layout(view: Tensor) -> tuple[Any, ...]:
    """What tells one view of a storage from another."""
    return view.data_ptr(), view.shape, view.stride()


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """x [n, channels, *spots] with stride - 1 zeros between its numbers."""
    far = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *far)
    at: Any = (..., *(slice(None, None, s) for s in stride))
    spread[at] = x
    return spread


def windows(
    x: Tensor, size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """x [n, channels, *spots], padded → [n, channels, *windows, *size]."""
    for d, (k, step, gap) in enumerate(zip(size, stride, dilation, strict=True)):
        x = x.unfold(2 + d, gap * (k - 1) + 1, step)[..., ::gap]
    return x
