"""Ranks of matrices: how much of one is signal, and the best approximation for the data at hand.

    W ≈ A · B,    A: [out, rank], B: [rank, in],    least ‖(W − A B) R‖,    R Rᵀ = Σ x xᵀ

By the theorem of Eckart, Young (Psychometrika 1936) and Mirsky the singular value decomposition of
W R gives the best A and B, and ‖(W − A B) R‖² = Σ over the data of ‖W x − A B x‖²: an error of the
layer's outputs. With R the identity it is one of the weights alone. What the data never use costs
nothing then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from taut.errors import RecipeError, TaskError
from taut.products import Product
from taut.statistics import Statistics
from taut.types import Site

RULES = ("energy", "ratio", "vbmf")
"""How a rank is chosen: `rank_of_energy`, a share of the numbers, `rank_of_signal`."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight [out, in], and what the data use of it.

    root: R, [in, in] lower triangular, or [in] for a diagonal one; None for the identity. by_row:
    the root is one of the rows, as a table's whose rows are looked up more or less often.
    """

    weight: Tensor
    root: Tensor | None = None
    by_row: bool = False

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight.detach().cpu().double()
        seen = weighed(weight.T if self.by_row else weight, self.root)
        u, s, vh = torch.linalg.svd(seen, full_matrices=False)
        return u, s, vh

    @property
    def spectrum(self) -> Tensor:
        """The singular values of W R, float64, falling."""
        return self._svd[1]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best A [out, rank] and B [rank, in], float64, of like magnitude."""
        u, s, vh = self._svd
        half = s[:rank].sqrt()
        left, right = u[:, :rank] * half, half[:, None] * vh[:rank]
        if self.root is not None:
            right = unweighed(right, self.root)
        return (right.T, left.T) if self.by_row else (left, right)


def weighed(weight: Tensor, root: Tensor | None) -> Tensor:
    """W R, for R a matrix, a diagonal or the identity."""
    if root is None:
        return weight
    seen: Tensor = weight * root if root.dim() == 1 else weight @ root
    return seen


def unweighed(weight: Tensor, root: Tensor) -> Tensor:
    """W R⁻¹."""
    if root.dim() == 1:
        return weight / root
    found: Tensor = torch.linalg.solve_triangular(root, weight, upper=False, left=False)
    return found


def refitted(weight: Tensor, basis: Tensor, root: Tensor | None) -> Tensor:
    """The L [out, rank] with the least ‖(W − L C) R‖, for a basis C [rank, in]; all float64."""
    seen, wanted = weighed(basis, root), weighed(weight, root)
    found: Tensor = torch.linalg.lstsq(seen.T, wanted.T, driver="gelsd").solution.T
    return found


# ---- from the data --------------------------------------------------------------------------


def seen_by_data(weight: Tensor, site: Site, statistics: Statistics, technique: str) -> Matrix:
    """A site's weight, later dimensions joined, as the calibration data see it.

    By its columns, or where it is only looked up by its rows. Where they do not meet all of it in
    one way, it is seen plainly. Raises RecipeError without data to go by.
    """
    return seen_by(weight, products_of(site, statistics, technique))


def seen_by(weight: Tensor, found: Sequence[Product]) -> Matrix:
    """A weight as what it is multiplied with sees it."""
    matrix = weight.detach().flatten(1)
    multiplied = [p for p in found if p.moments.dim() == 2]
    if multiplied:
        return Matrix(matrix, input_root(multiplied, matrix.shape[1]))
    return Matrix(matrix, _row_root(found, *matrix.shape), by_row=True)


def products_of(site: Site, statistics: Statistics, technique: str) -> list[Product]:
    """What a site's weight is multiplied with. Raises RecipeError without data to go by."""
    try:
        return statistics.products(site)
    except TaskError as error:
        raise RecipeError(f"{technique}: {error}; or go without data by weighted=False") from error


_STEADY = 1e-3
"""Of the mean square of the inputs, added to each, so that every root can be inverted."""


def input_root(products: Sequence[Product], columns: int) -> Tensor | None:
    """R for the inputs that a weight of so many columns meets, [columns, columns] float64.

    Where rows meet different inputs, as attention's three projections may, their moments are added
    up. None where a product's columns are not the weight's or some column meets nothing.
    """
    moments = torch.zeros(columns, columns, dtype=torch.float64)
    met = torch.zeros(columns, dtype=torch.bool)
    for product in products:
        index = product.index.cpu()
        at = index[0] % columns
        if bool((index % columns != at).any()):
            return None
        moments[at[:, None], at] += len(index) * product.moments.cpu()
        met[at] = True
    mean = moments.diagonal().mean()
    if not bool(met.all()) or not float(mean) > 0:
        return None
    return _sound_root(moments / mean, _STEADY)


_FELT = 0.05
"""Of the mean of what outputs feel, added to each, as few random draws tell it."""


def output_root(moments: Tensor) -> Tensor | None:
    """L with L Lᵀ = G, for what the network's outputs feel of a layer's, G: [out, out]."""
    mean = moments.diagonal().mean()
    if not bool(moments.isfinite().all()) or not float(mean) > 0:
        return None
    return _sound_root(moments.double() / mean, _FELT)


def _sound_root(moments: Tensor, floor: float) -> Tensor:
    """The Cholesky factor of moments, with `floor` added to each eigenvalue.

    Rounding in the sums may have left some below zero by more than that: they count as zero.
    """
    one = torch.eye(len(moments), dtype=moments.dtype)
    root, failed = torch.linalg.cholesky_ex(moments + floor * one)
    if int(failed):  # seldom: eigenvalues take ten times as long
        values, vectors = torch.linalg.eigh(moments)
        root = torch.linalg.cholesky((vectors * (values.clamp(min=0) + floor)) @ vectors.T)
    found: Tensor = root
    return found


def _row_root(products: Sequence[Product], rows: int, columns: int) -> Tensor | None:
    """The roots of how often each row of a table is looked up: [rows] float64."""
    counts = torch.zeros(rows, dtype=torch.float64)
    for product in products:
        counts[product.index[0].cpu() // columns] += product.moments.cpu()
    mean = counts.mean()
    return (counts / mean + _STEADY).sqrt() if float(mean) > 0 else None


# ---- how many -------------------------------------------------------------------------------


def rank_of(matrix: Matrix, rule: str, energy: float, ratio: float) -> int:
    """A rank by one of `RULES`; 0 where none keeps to the ratio, or nothing stands out of noise."""
    out, columns = matrix.weight.shape
    if rule == "ratio":
        return int(ratio * out * columns / (out + columns))
    if rule == "energy":
        return rank_of_energy(matrix.spectrum, energy)
    return rank_of_signal(Matrix(matrix.weight).spectrum, (out, columns))


def rank_of_energy(values: Tensor, energy: float) -> int:
    """The least rank whose squared singular values sum up to this share of all."""
    total = values.square().sum()
    if not float(total) > 0:
        return 1
    part = values.square().cumsum(0) / total
    return min(int((part < energy - 1e-12).sum()) + 1, len(values))


def rank_of_signal(values: Tensor, shape: tuple[int, int]) -> int:
    """The rank that stands out of noise: empirical variational Bayes, in closed form.

    values: the singular values s of a matrix of this shape, plain ones: the noise is taken to be
    alike in all its entries. With L ≤ M the sides, q = L / M, t = 2.5129 √q and
    x = (1 + t) (1 + q / t), a value counts where s² > M v x; v, the variance of the noise, is
    where the free energy of `_free_energy` is least, between the paper's bounds, found on a grid
    that is refined. 0 where nothing stands out: of weights that have hardly left their random start
    that is so, and it does not mean that they can go.

    Nakajima, Sugiyama, Babacan, Tomioka: Global analytic solution of fully-observed variational
    Bayesian matrix factorization (JMLR 2013). Where we differ: they find v by a line search.
    """
    small, large = sorted(shape)
    alpha = small / large
    tau = 2.5129 * math.sqrt(alpha)
    above = (1 + tau) * (1 + alpha / tau)
    s2 = values.double().square()[:small]
    if not float(s2.sum()) > 0:
        return 0
    s2 = s2.clamp(min=1e-30 * float(s2[0]))  # the energy takes its logarithm
    most = max(min(math.ceil(small / (1 + alpha)) - 1, small - 1), 0)
    upper = float(s2.sum()) / (small * large)
    lower = max(float(s2[most]) / (large * above), float(s2[most:].mean()) / large)
    lower = min(max(lower, 1e-12 * upper), upper)
    logs = torch.linspace(math.log(lower), math.log(upper), 200, dtype=torch.float64)
    for _ in range(4):
        costs = torch.stack([_free_energy(float(v.exp()), s2, large, alpha, above) for v in logs])
        best = int(costs.argmin())
        ends = logs[max(best - 1, 0)], logs[min(best + 1, len(logs) - 1)]
        logs = torch.linspace(float(ends[0]), float(ends[1]), 50, dtype=torch.float64)
    noise = float(logs[len(logs) // 2].exp())
    return int((s2 > large * noise * above).sum())


def _free_energy(noise: float, s2: Tensor, large: int, alpha: float, above: float) -> Tensor:
    """Twice the free energy over M, less what does not depend on the noise.

    Σ over values below of x − log x, and above of x − t + log((t + 1) / x) + q log(t / q + 1),
    where x = s² / (M v) and t is the larger root of t² − (x − 1 − q) t + q = 0.
    """
    x = s2 / (large * noise)
    signal = x > above
    kept, rest = x[signal], x[~signal]
    root = kept - (1 + alpha)
    tau = (root + (root.square() - 4 * alpha).clamp(min=0).sqrt()) / 2
    terms = kept - tau + ((tau + 1) / kept).log() + alpha * (tau / alpha + 1).log()
    return (rest - rest.log()).sum() + terms.sum()
