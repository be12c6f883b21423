"""Clusters of numbers and of short vectors: k-means (Lloyd) that leaves no cluster empty.

An empty cluster takes half of the one with the largest error: pruning leaves a hole around zero,
in which centroids that start evenly spread would stay unused.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k_means(values: Tensor, entries: int, init: str, iterations: int) -> Tensor:
    """Centroids of numbers [n], sorted: [entries].

    init: where they start: "linear" between the extremes, at ranks evenly spread ("density"), or
    at random numbers ("random").
    """
    if values.numel() == 0:
        return values.new_zeros(entries)
    if init == "linear":
        table = torch.linspace(0, 1, entries, device=values.device, dtype=values.dtype)
        table = values.min() + table * (values.max() - values.min())
    elif init == "density":
        ranked = values.sort().values
        at = torch.linspace(0, values.numel() - 1, entries, device=values.device)
        table = ranked[at.round().long()]
    else:
        pick = torch.randint(values.numel(), (entries,)).to(values.device)
        table = values[pick].sort().values
    exact = values.double()
    for _ in range(iterations):
        index = nearest(values, table)
        counts = torch.bincount(index, minlength=entries)
        sums = torch.bincount(index, weights=exact, minlength=entries)
        squares = torch.bincount(index, weights=exact.square(), minlength=entries)
        means = sums / counts.clamp(min=1)
        spread = (squares - sums * means).clamp(min=0)  # summed squared distance to the mean
        empty = (counts == 0).nonzero().squeeze(1)
        widest = spread.argsort(descending=True)[: len(empty)]
        half = (spread[widest] / counts[widest].clamp(min=1)).sqrt()
        moved = means.clone()
        moved[widest], moved[empty] = means[widest] - half, means[widest] + half
        moved = moved.to(table.dtype).sort().values
        if torch.equal(moved, table):
            break
        table = moved
    return table


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of a sorted table."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


def vector_k_means(
    vectors: Tensor, weights: Tensor, entries: int, init: str, iterations: int, mirrored: bool
) -> Tensor:
    """Centroids of vectors [n, width] whose coordinates weigh differently: [entries, width].

    They make Σ weights · (vector - its centroid)² small. weights: [n, width], at least 0.
    mirrored: whether the opposite of each centroid is one too. init: "random" vectors, else those
    of evenly spread ranks along the principal direction.
    """
    x, w = vectors.double(), weights.double()
    table = x[_starts(x, entries, init)]
    for _ in range(iterations):
        index = nearest_vector(x, w, mirror(table) if mirrored else table)
        own = index % entries
        signed = torch.where((index < entries)[:, None], x, -x)
        mass = torch.zeros_like(table).index_add(0, own, w)
        means = torch.zeros_like(table).index_add(0, own, w * signed) / mass.clamp(min=1e-300)
        errors = torch.zeros_like(table).index_add(0, own, w * (signed - means[own]).square())
        empty = (torch.bincount(own, minlength=entries) == 0).nonzero().squeeze(1)
        widest = errors.sum(1).argsort(descending=True, stable=True)[: len(empty)]
        half = (errors[widest] / mass[widest].clamp(min=1e-300)).sqrt()
        moved = means.clone()
        moved[widest], moved[empty] = means[widest] - half, means[widest] + half
        if torch.equal(moved, table):
            break
        table = moved
    return table.to(vectors.dtype)


def _starts(x: Tensor, entries: int, init: str) -> Tensor:
    """Which vectors the centroids start at."""
    if init == "random":
        return torch.randint(len(x), (entries,))
    direction = torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]
    direction = direction * direction[direction.abs().argmax()].sign()
    ranks = torch.linspace(0, len(x) - 1, entries).round().long()
    order: Tensor = (x @ direction).argsort(stable=True)
    return order[ranks]


def nearest_vector(vectors: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The index of the centroid at the least weighted distance: [n]."""
    squares, found = table.square().T, []
    for x, w in zip(*(torch.split(t, 1 << 14) for t in (vectors, weights)), strict=True):
        found.append((w @ squares - 2 * (w * x) @ table.T).argmin(1))
    return torch.cat(found)


def mirror(table: Tensor) -> Tensor:
    """A table and its opposite: [n, …] → [2 n, …]."""
    return torch.cat([table, -table])


def k_lines(
    rows: Tensor, weights: Tensor, count: int, scaled: bool, iterations: int, relative: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines through zero that rows [n, d] lie near: index [n], scale [n], and book [count, d].

    They make Σ weights · |row − scale · book[index]|² small, by turns in each of the three (scale
    1 unless `scaled`): the best rank-one matrix of each cluster's rows. weights: [n], above 0. They
    start at rows that are farthest from those before, as `far_rows` finds them.
    """
    x, w = rows.double(), weights.double()
    book = x[far_rows(x, w, scaled, relative, count)]
    squares = x.square().sum(1)
    for turn in range(iterations + 1):
        index, scale, saved = _on_lines(x, book, scaled)
        if turn == iterations:
            break
        weighed = w * scale
        moved = torch.zeros_like(book).index_add(0, index, weighed[:, None] * x)
        mass = torch.zeros(count, dtype=x.dtype).index_add(0, index, weighed * scale)
        moved = torch.where(mass[:, None] > 0, moved / mass[:, None].clamp(min=1e-300), book)
        empty = (torch.bincount(index, minlength=count) == 0).nonzero().squeeze(1)
        far = (w * (squares - saved)).argsort(descending=True, stable=True)[: len(empty)]
        moved[empty] = x[far]
        if torch.allclose(moved, book, rtol=1e-9, atol=0):
            break
        book = moved
    return index, scale, book


def far_rows(
    rows: Tensor, weights: Tensor, scaled: bool, relative: bool, count: int, bound: float = -1.0
) -> Tensor:
    """Rows [n, d] float64, each the farthest from the lines (or points) of those before.

    `count` of them, or fewer where all are within the bound. relative: distances count beside a
    row's own length. Gonzalez: Clustering to minimize the maximum intercluster distance (1985).
    """
    squares = rows.square().sum(1)
    sizes = squares.clamp(min=1e-300)
    beside = weights / sizes if relative else weights
    left, chosen = squares.clone(), list[int]()
    while len(chosen) < count:
        farthest = int((beside * left).argmax())
        if chosen and float(beside[farthest] * left[farthest]) <= bound:
            break
        chosen.append(farthest)
        _, _, saved = _on_lines(rows, rows[farthest : farthest + 1], scaled)
        left = torch.minimum(left, (squares - saved).clamp(min=0))
        left[farthest] = -1.0  # never twice
    return torch.tensor(chosen)


def _on_lines(x: Tensor, book: Tensor, scaled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest line or point for each row: its index, the scale, |row|² less the distance²."""
    squares = book.square().sum(1).clamp(min=1e-300)
    found = []
    for part in torch.split(x, 1 << 12):
        dots = part @ book.T
        gains = dots.square() / squares if scaled else 2 * dots - squares
        gain, index = gains.max(1)
        by = dots.gather(1, index[:, None])[:, 0] / squares[index]
        found.append((index, by if scaled else torch.ones_like(by), gain))
    index, scale, gain = (torch.cat(each) for each in zip(*found, strict=True))
    return index, scale, gain
