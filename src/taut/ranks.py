"""Ranks of matrices: how much of one is signal, and the best approximation for the data at hand.

    W ≈ A · B,    A: [out, rank], B: [rank, in],    least ‖(W − A B) R‖,    R Rᵀ = Σ x xᵀ

By the Eckart-Young theorem the singular value decomposition of W R gives the best A and B; with R the
identity that is the plain one. What the data never use costs nothing then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from taut.products import Product


def factors(weight: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best A [out, rank] and B [rank, in] for a weight [out, in], each of like magnitude.

    root: R, [in, in], of full rank; None for the identity.
    """
    u, s, vh = _svd(weight, root)
    half = s[:rank].sqrt()
    right = half[:, None] * vh[:rank]
    if root is not None:
        right = torch.linalg.solve(root.double(), right, left=False)
    return (u[:, :rank] * half).to(weight.dtype), right.to(weight.dtype)


def spectrum(weight: Tensor, root: Tensor | None = None) -> Tensor:
    """The singular values of W R, float64, falling."""
    return _svd(weight, root)[1]


def _svd(weight: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    seen = weight.double() if root is None else weight.double() @ root.double()
    u, s, vh = torch.linalg.svd(seen, full_matrices=False)
    return u, s, vh


def input_root(products: Sequence[Product], columns: int) -> Tensor | None:
    """R for the inputs that a weight of so many columns meets, [columns, columns] float64.

    A thousandth of their mean square is added to each, so that it can be inverted. None where the
    products do not cover the columns once: then nothing is known.
    """
    root = torch.zeros(columns, columns, dtype=torch.float64)
    covered = torch.zeros(columns, dtype=torch.long)
    for product in products:
        at = product.index[0] % columns
        if product.moments.dim() != 2 or bool((product.index % columns != at).any()):
            return None
        moments = product.moments / max(product.rows, 1)
        steady = 1e-3 * moments.diagonal().mean().clamp(min=1e-12)
        factor = torch.linalg.cholesky(moments + steady * torch.eye(len(at), dtype=torch.float64))
        root[at[:, None], at] = factor
        covered[at] += 1
    return root if bool((covered == 1).all()) else None


def rank_of_energy(values: Tensor, energy: float) -> int:
    """The least rank whose squared singular values sum up to this share of all."""
    part = values.square().cumsum(0) / values.square().sum().clamp(min=1e-300)
    return min(int((part < energy - 1e-12).sum()) + 1, len(values))


def rank_of_signal(values: Tensor, shape: tuple[int, int]) -> int:
    """The rank that stands out of noise: empirical variational Bayes, in closed form.

    values: the singular values of a matrix of this shape, falling. Nakajima, Sugiyama, Babacan,
    Tomioka: Global analytic solution of fully-observed variational Bayesian matrix factorization
    (JMLR 2013), theorem 2 and corollary 1: a value counts above √(M σ² (1 + τ)(1 + α/τ)) with
    τ ≈ 2.5129 √α and α = L/M; σ² is where the free energy is least, found on a grid and refined.
    At least 1.
    """
    small, large = sorted(shape)
    alpha = small / large
    tau = 2.5129 * math.sqrt(alpha)
    above = (1 + tau) * (1 + alpha / tau)
    s2 = values.double().square()[:small]
    if not float(s2.sum()) > 0:
        return 1
    most = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    upper = float(s2.sum()) / (small * large)
    lower = max(float(s2[max(most, 0)]) / (large * above), float(s2[most:].mean()) / large)
    lower = min(max(lower, 1e-12 * upper), upper)
    logs = torch.linspace(math.log(lower), math.log(upper), 200, dtype=torch.float64)
    for _ in range(4):
        costs = torch.stack([_free_energy(float(v.exp()), s2, large, alpha, above) for v in logs])
        best = int(costs.argmin())
        ends = logs[max(best - 1, 0)], logs[min(best + 1, len(logs) - 1)]
        logs = torch.linspace(float(ends[0]), float(ends[1]), 50, dtype=torch.float64)
    noise = float(logs[len(logs) // 2].exp())
    return max(1, int((s2 > large * noise * above).sum()))


def _free_energy(noise: float, s2: Tensor, large: int, alpha: float, above: float) -> Tensor:
    """Twice the free energy over M, up to what does not depend on the noise (their equation 34)."""
    x = s2 / (large * noise)
    signal = x > above
    kept, rest = x[signal], x[~signal]
    total = (rest - rest.clamp(min=1e-300).log()).sum()
    root = kept - (1 + alpha)
    tau = (root + (root.square() - 4 * alpha).clamp(min=0).sqrt()) / 2
    terms = kept - tau + ((tau + 1) / kept).log() + alpha * (tau / alpha + 1).log()
    return total + terms.sum()
