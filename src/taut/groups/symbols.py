"""Symbols for the places along a dimension, and which of them are one and the same.

Every place along every dimension of a tensor carries a symbol, an integer. Where an operation needs
two places to be the same, their symbols are united; what is united is cut together or not at all.
Symbol 0 stands for a place that can never go; any other may be held, with a reason.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""The symbols along one dimension."""
Dims = list[Labels]
"""Those of a tensor, dimension by dimension."""


class Symbols:
    """Disjoint sets of symbols (union by the smaller, paths halved), each free or held.

    context: what is said of a place that meets symbol 0 or is held without a reason of its own.
    """

    def __init__(self) -> None:
        self._parent: Labels = np.zeros(1024, np.int64)
        self._why: Labels = np.zeros(1024, np.int64)
        self._count = 1
        self._reasons = ["", "its size is fixed"]
        self._number = {r: i for i, r in enumerate(self._reasons)}
        self._why[0] = 1
        self.context = "its size is fixed"

    def fresh(self, count: int) -> Labels:
        """New symbols, each in a set of its own."""
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            more = max(self._count, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(more, np.int64)])
            self._why = np.concatenate([self._why, np.zeros(more, np.int64)])
        labels = np.arange(start, self._count)
        self._parent[labels] = labels
        return labels

    def find(self, labels: Labels) -> Labels:
        """The symbol that stands for the set of each."""
        roots = self._parent[labels]
        while not np.array_equal(up := self._parent[roots], roots):
            roots = up
        self._parent[labels] = roots
        return roots

    def unite(self, a: Labels, b: Labels) -> None:
        """The places of a are those of b, one by one (or all of them the one that stands alone)."""
        pairs = [self.find(x.reshape(-1)) for x in np.broadcast_arrays(a, b)]
        met = np.concatenate(pairs)
        first, second = pairs
        while (differ := first != second).any():
            low = np.minimum(first, second)[differ]
            high = np.maximum(first, second)[differ]
            self.hold(high[low == 0])
            high, low = high[low != 0], low[low != 0]
            self._parent[high] = low
            first, second = self.find(high), self.find(low)
        told = met[self._why[met] != 0]
        roots = self.find(told)
        bare = self._why[roots] == 0
        self._why[roots[bare]] = self._why[told[bare]]

    def hold(self, labels: Labels, reason: str = "") -> None:
        """These places are never cut, for this reason."""
        roots = self.find(labels)
        number = self._number.setdefault(reason or self.context, len(self._reasons))
        if number == len(self._reasons):
            self._reasons.append(reason or self.context)
        self._why[roots[self._why[roots] == 0]] = number

    def held(self, labels: Labels) -> NDArray[np.bool_]:
        """Which places can never be cut."""
        held: NDArray[np.bool_] = self._why[self.find(labels)] != 0
        return held

    def reason(self, label: int) -> str:
        """Why a place is held; empty where it is free."""
        return self._reasons[int(self._why[self.find(np.array([label]))[0]])]

    def kinds(self, labels: Labels) -> int:
        """How many sets the places belong to."""
        return len(np.unique(self.find(labels)))
