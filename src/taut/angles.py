"""Angles: how far recoding has turned each row of a weight, and how much shorter it made it.

    angle[o] = arccos(w[o] · v[o] / (|w[o]| · |v[o]|)),    length[o] = |v[o]| / |w[o]|

w[o], v[o]: row o of the original and of the recoded weight, [out, in], later dimensions joined:
what one output sums up. Beside them stands what the signs of a random vector of as many dimensions
do:

    cos = sqrt(d) · Γ(d / 2) / (sqrt(π) · Γ((d + 1) / 2))  →  sqrt(2 / π),   37.07 degrees

Anderson, Berg: The High-Dimensional Geometry of Binary Neural Networks (ICLR 2018), where the limit
stands; the formula is the expectation of the cosine for a normal vector of d independent numbers,
|w|₁ / (sqrt(d) · |w|₂), at every d.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.layers import Packed
from taut.modules import owner, tensor_at
from taut.packed import PackedWeight


@dataclass(frozen=True, kw_only=True)
class RowAngles:
    """One weight: rows of so many dimensions. Means and standard deviations over the rows.

    angle: degrees; length: of the recoded row over the original's. left_out: rows that are all
    zeros, or not all finite, before or after, and have no angle. sign_angle: degrees, of the signs
    of a random vector. Where no row is left, what is counted over rows is NaN.
    """

    name: str
    rows: int
    dimensions: int
    left_out: int
    angle: float
    angle_spread: float
    length: float
    length_spread: float
    sign_angle: float

    def to_json(self) -> dict[str, Any]:
        """Plain types, in which NaN is None."""
        return {
            k: None if isinstance(v, float) and math.isnan(v) else v
            for k, v in asdict(self).items()
        }


def angles(
    original: nn.Module, recoded: nn.Module, names: Iterable[str] | None = None
) -> tuple[RowAngles, ...]:
    """The angles of every recoded weight of two or more dimensions.

    recoded: the same network, loaded from a .taut file, or with forms on it. names: of the weights;
    by default those whose numbers are packed, or differ, and whose shape is as it was.
    """
    if names is None:
        every = (n for n, p in original.named_parameters() if p.dim() > 1)
        names = [n for n in every if _is_recoded(original, recoded, n)]
    return tuple(
        row_angles(name, tensor_at(original, name).detach(), held_at(recoded, name))
        for name in names
    )


def row_angles(name: str, before: Tensor, after: Tensor) -> RowAngles:
    """The angles of one weight. before, after: [out, in, …] of the same shape."""
    old, new = (t.detach().double().cpu().flatten(1) for t in (before, after))
    lengths = old.norm(dim=1), new.norm(dim=1)
    there = (lengths[0] > 0) & (lengths[1] > 0) & lengths[0].isfinite() & lengths[1].isfinite()
    one, other = (t[there] / n[there, None] for t, n in zip((old, new), lengths, strict=True))
    # Twice the angle's half: as exact for small angles as for large ones (Kahan).
    turned = 2 * torch.atan2((one - other).norm(dim=1), (one + other).norm(dim=1)).rad2deg()
    shrunk = lengths[1][there] / lengths[0][there]
    return RowAngles(
        name=name, rows=len(old), dimensions=old.shape[1], left_out=int((~there).sum()),
        angle=float(turned.mean()), angle_spread=_spread(turned),
        length=float(shrunk.mean()), length_spread=_spread(shrunk),
        sign_angle=sign_angle(old.shape[1]),
    )  # fmt: skip


def sign_angle(dimensions: int) -> float:
    """Degrees between a random vector and its signs, of the expected cosine.

    >>> [round(sign_angle(d), 2) for d in (1, 2, 9, 1000)]
    [0.0, 25.8, 34.88, 37.05]
    """
    d = max(1, dimensions)
    gammas = math.lgamma(d / 2) - math.lgamma((d + 1) / 2)
    return math.degrees(math.acos(min(1.0, math.sqrt(d / math.pi) * math.exp(gammas))))


def held_at(model: nn.Module, name: str) -> Tensor:
    """The dense weight of this name, decoded where it is packed, and not kept."""
    module, leaf = owner(model, name)
    if isinstance(module, Packed) and leaf in module.packed:
        weight = module.packed[leaf]
        assert isinstance(weight, PackedWeight)
        return weight.dense()
    return tensor_at(model, name).detach()


def _is_recoded(original: nn.Module, recoded: nn.Module, name: str) -> bool:
    before = tensor_at(original, name)
    try:
        after = held_at(recoded, name)
    except AttributeError:  # another structure
        return False
    module, leaf = owner(recoded, name)
    packed = isinstance(module, Packed) and leaf in module.packed
    return after.shape == before.shape and (packed or not torch.equal(before.cpu(), after.cpu()))


def _spread(each: Tensor) -> float:
    return float(each.std(correction=0)) if each.numel() else math.nan
