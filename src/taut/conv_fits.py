"""The numbers of a swapped convolution: least squares on what the old one reads and gives.

The parts in a row are found from the first to the last. Each but the last keeps what the rest of
the weight uses most of its windows x: with W_δ the pieces of the weight under each place δ of the
part's kernel within the whole one, and R Rᵀ = Σ x xᵀ / n,

    F = V R⁻¹,    V: the leading right singular vectors of [W_δ for all δ] R

(of each channel by itself where the part is depthwise, and then by turns with the mix of channels,
each the best for the other). What remains is a convolution of F's outputs y, after the norm and
the ReLU that follow them: the best one, Σ t yᵀ (Σ y yᵀ)⁻¹ for the old outputs t, which is split on
in the same way, or is the last part. Then the parts are trained on the pairs (x, t) alone.

Jaderberg, Vedaldi, Zisserman (BMVC 2014), whose scheme of filters by reconstruction is `asymmetric`
without data; Zhang, Zou, He, Sun (TPAMI 2016): layer after layer, from what the layer reads in the
network that is compressed so far to what it gave in the original one; Romero and others: FitNets
(ICLR 2015), for training by the outputs of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from taut.conv_swaps import Conv, Stage, Swapped
from taut.modules import device_of
from taut.products import windows
from taut.ranks import unweighed
from taut.zoo.blocks import Parallel, Shuffle

SHIFT = 1.0
"""Standard deviations by which what passes an inner ReLU lies above zero at the start."""
_MOST = 2**25
"""Numbers of the windows that moments are taken of."""
_STEADY = 1e-6
_ROUNDS = 10
_BATCH = 64


def met(run: Callable[[], object], layer: nn.Module, most: int = 2**27) -> tuple[Tensor, Tensor]:
    """What a layer reads and gives while `run` runs, joined, on the CPU: [n, ...] each.

    Batches are joined until both have `most` numbers together. Empty where the layer is not called
    with a tensor, or with tensors of several shapes.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        if sum(x.numel() + y.numel() for x, y in seen) < most:
            seen.append((given[0].detach().float().cpu(), out.detach().float().cpu()))

    hook = layer.register_forward_hook(look, prepend=True)
    try:
        run()
    finally:
        hook.remove()
    if not seen or len({x.shape[1:] for x, _ in seen}) > 1:
        return torch.empty(0), torch.empty(0)
    return torch.cat([x for x, _ in seen]), torch.cat([y for _, y in seen])


# ---- by least squares -----------------------------------------------------------------------


@torch.no_grad()
def fit(
    made: Swapped, row: Sequence[Stage], conv: Conv, weight: Tensor, x: Tensor, target: Tensor
) -> None:
    """Set the numbers of the layers of a swap.

    weight: of the old layer `conv`, [out, in, *kernel] float64. x: [n, in, ...], what the new one
    reads; target: [n, out, ...], what the old one gave. All on the CPU.
    """
    layers, rest, left = list(made), weight, conv
    for stage in row[:-1]:
        (part,) = stage
        layer = layers.pop(0)
        whole = part if part.groups == 1 else left
        moments = _moments(rows_of(whole, x, _places(whole, x)).flatten(1))
        split = leading if part.groups == 1 else separated
        _set(layer, split(rest, moments, part), None)
        x = _passed(layer, layers, x)
        left = left.after(part)
        if stage is not row[-2]:
            rest = least_squares(left, x, target, False)[0]
    if isinstance(layers[-1], Shuffle):
        target = Shuffle(conv.outputs // layers[-1].groups)(target)
    branches = list(layers[0]) if isinstance(layers[0], Parallel) else [layers[0]]
    for part, layer in zip(row[-1], branches, strict=True):
        mine, target = target[:, : part.outputs], target[:, part.outputs :]
        _set(layer, *least_squares(part, x, mine, layer.bias is not None))


def leading(weight: Tensor, moments: Tensor, part: Conv) -> Tensor:
    """The filters whose outputs the weight uses most: [part.outputs, in, *part.kernel].

    weight: [out, in, *kernel]; moments: [in · window]² of the part's windows. The outputs of the
    filters are uncorrelated and of variance 1 about zero.
    """
    pieces = weight
    for d, k in enumerate(part.kernel):
        pieces = pieces.unfold(2 + d, k, 1)
    dims = len(part.kernel)
    pieces = pieces.movedim(1, 1 + dims).flatten(1 + dims).flatten(0, dims)
    root = _root(moments)
    vectors = torch.linalg.svd(pieces @ root, full_matrices=False)[2][: part.outputs]
    return unweighed(vectors, root).reshape(part.shape)


def separated(weight: Tensor, moments: Tensor, part: Conv, rounds: int = _ROUNDS) -> Tensor:
    """The depthwise filters of the best sum of products: [in · times, 1, *kernel].

        least Σ over the data of ‖W x − P (D x)‖²    for any mix P: [out, in · times]

    by alternating least squares: P for all, then each channel's filters in turn. It starts from
    what is best for each channel by itself. weight: [out, in, *kernel]; moments: [in · window]².
    """
    out, inputs = weight.shape[:2]
    size, times = math.prod(part.kernel), part.outputs // inputs
    at = torch.arange(part.outputs) // times  # the channel of each filter
    blocks = moments.reshape(inputs, size, inputs, size)
    filters = torch.cat([
        _leading_of(weight[:, c].flatten(1), blocks[c, :, c], times) for c in range(inputs)
    ])  # fmt: skip
    wanted = (weight.flatten(1) @ moments).reshape(out, inputs, size)[:, at]
    for _ in range(rounds):
        seen = torch.einsum("jk,jkcl->jcl", filters, blocks[at])  # [filters, in, window]
        gram = torch.einsum("jil,il->ji", seen[:, at], filters)
        mix = _solved(gram, torch.einsum("ojk,jk->jo", wanted, filters))  # [filters, out]
        both, towards = mix @ mix.T, torch.einsum("jo,ojk->jk", mix, wanted)
        for j, c in enumerate(at.tolist()):
            others = both[j].clone()
            others[j] = 0
            rest = torch.einsum("i,il,ilk->k", others, filters, blocks[at, :, c])
            gram = both[j, j] * blocks[c, :, c]
            filters[j] = _solved(gram, (towards[j] - rest)[:, None])[:, 0]
    return filters.reshape(part.shape)


def _leading_of(matrix: Tensor, moments: Tensor, count: int) -> Tensor:
    """[out, window] → the `count` filters that it uses most, zeros where it has fewer."""
    root = _root(moments)
    vectors = torch.linalg.svd(matrix @ root, full_matrices=False)[2][:count]
    return F.pad(unweighed(vectors, root), (0, 0, 0, count - len(vectors)))


def least_squares(part: Conv, x: Tensor, target: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """The weight, and the bias or zeros, whose outputs come nearest to the target; float64."""
    places = _places(part, x)
    rows, wanted = rows_of(part, x, places), _targets(target, places)
    found = []
    both = (torch.unflatten(t, 1, (part.groups, -1)).unbind(1) for t in (rows, wanted))
    for z, t in zip(*both, strict=True):
        z = z.flatten(1)
        means = (z.mean(0), t.mean(0)) if bias else (z.new_zeros(()), t.new_zeros(()))
        z, t = z - means[0], t - means[1]
        weight = _solved(_moments(z), (z.T @ t).double() / len(z)).T
        at = z.new_zeros(z.shape[1]) + means[0]
        found.append((weight, means[1].double() - weight @ at.double()))
    weights, biases = (torch.cat(some) for some in zip(*found, strict=True))
    return weights.reshape(part.shape), biases if bias else biases.new_zeros(part.outputs)


def rows_of(part: Conv, x: Tensor, places: Tensor) -> Tensor:
    """The windows that a convolution reads at some places: [places, in, *kernel].

    places: counted over examples and spots, in row-major order.
    """
    padding = [n for pair in reversed(part.around) for n in pair]
    if any(padding):
        x = F.pad(x, padding, "constant" if part.mode == "zeros" else part.mode)
    dims = len(part.kernel)
    seen = windows(x, part.kernel, part.stride, part.dilation).movedim(1, 1 + dims)
    found: Tensor = seen[torch.unravel_index(places, seen.shape[: 1 + dims])]
    return found


def _places(part: Conv, x: Tensor) -> Tensor:
    """Where to look: everywhere, or at random places, always the same, where that is too much."""
    every = len(x) * math.prod(part.spots(tuple(x.shape[2:])))
    most = max(1, _MOST // (part.inputs * math.prod(part.kernel)))
    if every <= most:
        return torch.arange(every)
    return torch.randint(every, (most,), generator=torch.Generator().manual_seed(0))


def _targets(target: Tensor, places: Tensor) -> Tensor:
    """[n, out, *spots] → [places, out]."""
    return target.movedim(1, -1).flatten(0, -2)[places]


def _moments(rows: Tensor) -> Tensor:
    """Σ x xᵀ / n, float64. rows: [n, in]."""
    return (rows.T @ rows).double() / len(rows)


def _steadied(moments: Tensor) -> Tensor:
    """With a little on the diagonal, so that what is always zero or always alike does no harm."""
    size = moments.diagonal().mean().clamp(min=1e-30)
    return moments + _STEADY * size * torch.eye(len(moments), dtype=moments.dtype)


def _root(moments: Tensor) -> Tensor:
    found: Tensor = torch.linalg.cholesky(_steadied(moments))
    return found


def _solved(moments: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, _root(moments))


def _set(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        held = layer._parameters.get(name)
        if held is not None:
            held.copy_(torch.zeros_like(held) if value is None else value.reshape(held.shape))


def _passed(layer: nn.Module, layers: list[nn.Module], x: Tensor) -> Tensor:
    """What the next part reads: the outputs, brought to a like size, after norm and ReLU.

    layers: what follows; the norm and the ReLU are taken off. With a ReLU, outputs start with mean
    `SHIFT` and variance 1, so that it tells more than half of them.
    """
    y: Tensor = layer(x)
    every = [d for d in range(y.dim()) if d != 1]
    var, mean = torch.var_mean(y, every, correction=0)
    scale = (var + _STEADY * var.mean().clamp(min=1e-30)).rsqrt()
    weight, bias = cast(Tensor, layer.weight), layer._parameters.get("bias")
    if isinstance(layers[0], _BatchNorm):
        norm = layers.pop(0)
        norm.running_mean, norm.running_var = mean, var
        for held, value in ((norm.weight, 1.0), (norm.bias, SHIFT)):
            cast(Tensor, held).fill_(value)
        y = norm.eval()(y)
    else:
        weight.mul_(scale.reshape(-1, *[1] * (weight.dim() - 1)))
        if bias is not None:
            bias.copy_(SHIFT - mean * scale)
        y = layer(x)
    return layers.pop(0)(y) if isinstance(layers[0], nn.ReLU) else y


# ---- by training ----------------------------------------------------------------------------


@torch.no_grad()
def lost(made: nn.Module, x: Tensor, target: Tensor) -> float:
    """The share of the target's variance that a layer misses, 0 where it gives the target."""
    device, missed = device_of(made), 0.0
    every = [d for d in range(target.dim()) if d != 1]
    for part, wanted in zip(torch.split(x, _BATCH), torch.split(target, _BATCH), strict=True):
        missed += float((made(part.to(device)).float().cpu() - wanted).double().square().sum())
    spread = float(target.double().var(every, correction=0).mean()) * target.numel()
    return missed / max(spread, 1e-30)


def train(made: nn.Module, x: Tensor, target: Tensor, steps: int, rate: float = 3e-3) -> None:
    """Train a block on what it reads and shall give: Adam on the mean squared distance.

    The rate falls to zero by a cosine; norms then measure all of the data. Batches come in random
    order, always the same.
    """
    device = device_of(made)
    draw = torch.Generator().manual_seed(0)
    spread = target.var(correction=0).clamp(min=1e-30).to(device)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=rate)
    made.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        some = torch.randint(len(x), (min(_BATCH, len(x)),), generator=draw)
        with torch.enable_grad():
            error = F.mse_loss(made(x[some].to(device)), target[some].to(device)) / spread
            optimizer.zero_grad()
            torch.autograd.backward(error)
        optimizer.step()
    norms = [m for m in made.modules() if isinstance(m, _BatchNorm)]
    momenta = [n.momentum for n in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for part in torch.split(x, _BATCH) if norms else ():
            made(part.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    made.eval()
