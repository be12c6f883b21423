"""Pruning by second order: what goes is chosen, and what stays is adjusted, by a matrix H.

The damage of a change d of the weights w is ½ · dᵀ · H · d. To remove one weight, at best,

    costs ½ · w[i]² / [H⁻¹][i, i],    and moves the others by d = −w[i] / [H⁻¹][i, i] · H⁻¹[:, i]

(Hassibi, Stork: Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992);
to remove all but a set K leaves w'[K] = H[K, K]⁻¹ · H[K, :] · w.

OBS, layer by layer: H is c times the moments of the layer's inputs, which all output rows share, so
d is what changes the outputs least (Frantar, Alistarh: SparseGPT, ICML 2023), in blocks of columns.
Where we differ:
- c is what the loss feels of a row's output, Σ of the squared gradients of the row over Σ of its
  squared inputs, as if the two were independent (Martens, Grosse: K-FAC, ICML 2015). It makes rows
  and layers comparable and leaves the solution for each row alone.
- SparseGPT goes once through the columns and adjusts only those to come. Here rows are solved for
  exactly, in stages that halve what is left, or lead to N:M in two. Each takes the smallest
  ½ · w'[i]² · H[i, i], the damage before the others are adjusted: the formula above counts on
  neighbours that go at the same stage, and measures worse the more of them do. Blocks go by the
  sum of these.

Rounding: the columns go one by one, those of the largest H[i, i] first. Each is rounded, and its
error is made good in the columns that follow,

    w[j:] −= (w[j] − round(w[j])) / U[j, j] · U[j, j:],    H⁻¹ = Uᵀ · U, U upper triangular

(Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023; OBQ, whose order each row finds for itself:
Frantar, Singh, Alistarh, NeurIPS 2022). Where we differ: `SWEEPS` times more each column is rounded
anew to where the damage is least, the others as they are, which only lessens it.

Block Fisher: H is the empirical Fisher matrix F, mean of g · gᵀ over single examples, in blocks
along the flattened weight (Singh, Alistarh: WoodFisher, NeurIPS 2020). Where we differ: the blocks
are summed and factored once, which gives what their rank-one updates of the inverse give.

Both fit what the layer gave for the inputs x₀ that it had before other layers were changed, not
what its old weights would make of today's: they start from

    w + w · D · H⁻¹,    D = Σ over n of (x₀[n] − x[n])ᵀ · x[n]

(Li and others: GPTAQ, ICML 2025, whose correction goes column by column; here it is the least
squares solution).

Either matrix gets `DAMPING` times the mean of its diagonal added to the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.pattern import NOfM, Pattern, largest
from taut.products import Product

DAMPING = 0.01
SWEEPS = 3
_MOST_NUMBERS = 2**24  # in the matrices that are factored at once


def damped(hessian: Tensor) -> Tensor:
    """H + DAMPING · mean(diag H) · I: [..., n, n] float64, a ridge that makes it invertible.

    What never is there, diag H = 0, gets next to nothing, so that it goes first; the identity
    stands in for an H that is zero.
    """
    own = hessian.diagonal(dim1=-2, dim2=-1)
    mean = own.mean(-1, keepdim=True)
    ridge = torch.where(own > 0, DAMPING * mean, 1e-9 * mean).where(mean > 0, 1.0)
    return hessian + ridge.diag_embed()


def inverse(hessian: Tensor) -> Tensor:
    """The inverse of positive definite matrices [..., n, n]."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def refit(hessian: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """What the weights that stay become: argmin of (w' − w)ᵀ · H · (w' − w), zero off the mask.

    weights: [rows, n] float64; mask: the same shape, bool; hessian: [n, n] for all rows or
    [rows, n, n], positive definite.
    """
    fitted, counts = torch.zeros_like(weights), mask.sum(1)
    rows = counts.argsort(descending=True)  # so that those solved together are of like size
    while len(rows):
        some = rows[: max(1, _MOST_NUMBERS // max(1, int(counts[rows[0]])) ** 2)]
        own = hessian[some] if hessian.dim() == 3 else hessian
        fitted[some] = _solve(own, weights[some], mask[some])
        rows = rows[len(some) :]
    return fitted


def _solve(hessian: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    wide = max(1, int(mask.sum(1).max()))
    order = mask.long().argsort(dim=1, descending=True, stable=True)[:, :wide]
    stays = mask.gather(1, order)
    left, right = order[:, :, None], order[:, None, :]
    if hessian.dim() == 2:
        square, pull = hessian[left, right], weights @ hessian
    else:
        each = torch.arange(len(weights))[:, None, None]
        square, pull = hessian[each, left, right], (hessian @ weights[..., None]).squeeze(-1)
    one = torch.eye(wide, dtype=square.dtype)
    square = torch.where(stays[:, :, None] & stays[:, None, :], square, one)
    pull = pull.gather(1, order) * stays
    solved = torch.cholesky_solve(pull[..., None], torch.linalg.cholesky(square)).squeeze(-1)
    return torch.zeros_like(weights).scatter(1, order, solved * stays)


# ---- OBS ------------------------------------------------------------------------------------


def disjoint(products: Sequence[Product], numel: int) -> list[Product]:
    """Products of which each weight is in one at most, on the CPU.

    A tied weight may be in several, as the rows of an embedding and as a matrix. The first with
    correlations is kept; of the others the mean over its rows goes to its diagonal.
    """
    taken, extra = torch.zeros(numel, dtype=torch.bool), torch.zeros(numel, dtype=torch.float64)
    kept = []
    for product in sorted(products, key=lambda p: -p.moments.dim()):
        index, squares = product.index.cpu(), product.squares.cpu()
        if bool(taken[index].any()):
            extra[index] += squares
        else:
            taken[index] = True
            drift = None if product.drift is None else product.drift.cpu()
            kept.append(
                Product(index, product.moments.cpu(), product.sums.cpu(), product.rows, drift)
            )
    for product in kept:
        more = extra[product.index].mean(0)
        product.moments = product.moments + (more.diag() if product.moments.dim() == 2 else more)
    return kept


def realigned(rows: Tensor, hessian: Tensor, drift: Tensor | None) -> Tensor:
    """The rows, [out, in], that give for today's inputs what these gave before; hessian: damped."""
    if drift is None or not bool(drift.any()):
        return rows
    factor = torch.linalg.cholesky(hessian)
    return rows + torch.cholesky_solve(drift.T @ rows.T, factor).T


def obs_scores(weights: Tensor, products: Sequence[Product], squares: Tensor) -> Tensor:
    """½ · c · w² / [H⁻¹][i, i], of the weight's shape; zero for what nothing multiplies by."""
    flat, scores = weights.double().flatten(), torch.zeros(weights.numel(), dtype=torch.float64)
    for part in _parts(products, squares):
        best = 1 / inverse(part.hessian).diagonal() if part.correlated else part.hessian
        scores[part.index] = 0.5 * part.rows * flat[part.index].square() * best
    return scores.reshape(weights.shape)


def obs(
    weights: Tensor, products: Sequence[Product], squares: Tensor, allowed: Tensor, kept: int,
    pattern: Pattern | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mask of what stays, and the weights with what stays adjusted: both of their shape.

    squares: the mean of the squared gradients of single examples, of the weights' shape. allowed:
    bool, what an earlier mask left, of which `kept` stay, or as many as a pattern lets.
    """
    parts = _parts(products, squares)
    before = weights.double().flatten()
    for part in parts:
        before[part.index] = realigned(before[part.index], part.hessian, part.drift)
    now, mask = before.clone(), allowed
    for stage in _stages(allowed, kept, pattern):
        scores = torch.zeros_like(now)
        for part in parts:
            curvature = part.hessian.diagonal() if part.correlated else part.hessian
            scores[part.index] = part.rows * now[part.index].square() * curvature
        mask = largest(scores.reshape(weights.shape), stage, mask, pattern)
        now = before * mask.flatten()
        for part in parts:
            if part.correlated:
                stays = mask.flatten()[part.index]
                now[part.index] = refit(part.hessian, before[part.index], stays)
    return mask, now.to(weights.dtype).reshape(weights.shape)


def damage(changes: Sequence[Tensor], products: Sequence[Product], squares: Tensor) -> list[float]:
    """½ · Σ over rows of c · dᵀ · H · d for each of several changes of a weight, of its shape."""
    totals = [0.0] * len(changes)
    for part in _parts(products, squares):
        for i, change in enumerate(changes):
            d = change.double().flatten()[part.index]
            bent = d @ part.hessian if part.correlated else d * part.hessian
            totals[i] += 0.5 * float((part.rows * d * bent).sum())
    return totals


def rounded(
    weights: Tensor, products: Sequence[Product], nearest: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The weights rounded so that the outputs change least, of their shape.

    nearest: (values, places) → what they are rounded to, alone; places: int64, where the values lie
    in the flattened weights.
    """
    flat = weights.double().flatten()
    done = nearest(flat, torch.arange(len(flat)))
    for product in disjoint(products, weights.numel()):
        if product.moments.dim() < 2:
            continue
        hessian = damped(product.moments)
        order = hessian.diagonal().argsort(descending=True, stable=True)
        upper = torch.linalg.cholesky(inverse(hessian[order][:, order]), upper=True)
        index = product.index[:, order]
        flat[product.index] = realigned(flat[product.index], hessian, product.drift)
        columns = flat[index]
        for j in range(len(order)):
            on_grid = nearest(columns[:, j], index[:, j])
            error = (columns[:, j] - on_grid) / upper[j, j]
            columns[:, j:] -= error[:, None] * upper[j, j:]
            columns[:, j] = on_grid
        done[index] = _settled(columns, flat[index], hessian[order][:, order], index, nearest)
    return done.to(weights.dtype).reshape(weights.shape)


def _settled(
    found: Tensor, weights: Tensor, hessian: Tensor, index: Tensor,
    nearest: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The rounded weights, [rows, n], after sweeps of coordinate descent on the damage."""
    slope = (found - weights) @ hessian
    for _ in range(SWEEPS):
        for j in range(len(hessian)):
            best = nearest(found[:, j] - slope[:, j] / hessian[j, j], index[:, j])
            slope += (best - found[:, j])[:, None] * hessian[j]
            found[:, j] = best
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of a product, index [out, in]; the damped H that they share; c of each, [out, 1].

    hessian: [in, in], or [in], the diagonal, where the inputs are not correlated. drift: D, if any.
    """

    index: Tensor
    hessian: Tensor
    rows: Tensor
    drift: Tensor | None

    @property
    def correlated(self) -> bool:
        return self.hessian.dim() == 2


def _parts(products: Sequence[Product], squares: Tensor) -> list[_Part]:
    parts = []
    for product in disjoint(products, squares.numel()):
        h = product.moments
        h = damped(h) if h.dim() == 2 else h + DAMPING * h.mean()
        felt = squares.double().flatten()[product.index].sum(1, keepdim=True)
        rows = felt / product.squares.sum().clamp(min=1e-300)
        parts.append(_Part(product.index, h, rows, product.drift))
    least = max(float(p.rows.mean()) for p in parts) * 1e-6 or 1.0
    return [replace(p, rows=p.rows + least) for p in parts]


def _stages(allowed: Tensor, kept: int, pattern: Pattern | None) -> list[int]:
    """How many stay after each stage."""
    if isinstance(pattern, NOfM):
        return [pattern.kept(allowed.shape, (pattern.keep + pattern.of) // 2), kept]
    count = int(allowed.sum())
    halves = range(1, max(1, count // max(kept, 1)).bit_length())
    return [*(count >> k for k in halves if count >> k > kept), kept]


# ---- block Fisher ---------------------------------------------------------------------------


def fisher_scores(weights: Tensor, blocks: Tensor) -> Tensor:
    """½ · w² / [F⁻¹][i, i], of the weight's shape. blocks: [blocks, width, width], not damped."""
    spread = inverse(damped(blocks.double())).diagonal(dim1=1, dim2=2).flatten()
    scores = 0.5 * weights.double().flatten().square() / spread[: weights.numel()]
    return scores.reshape(weights.shape)


def fisher_refit(weights: Tensor, blocks: Tensor, mask: Tensor) -> Tensor:
    """The weights with what stays adjusted for what goes, of their shape."""
    count, width = blocks.shape[:2]
    more = count * width - weights.numel()
    rows = F.pad(weights.double().flatten(), (0, more)).reshape(count, width)
    stays = F.pad(mask.flatten(), (0, more)).reshape(count, width)
    fitted = refit(damped(blocks.double()), rows, stays).flatten()[: weights.numel()]
    return fitted.to(weights.dtype).reshape(weights.shape)
