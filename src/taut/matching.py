"""Which row of one matrix is which of another: the assignment whose products sum to the most."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assignment(gain: Tensor) -> Tensor:
    """order with the largest Σ over i of gain[i, order[i]]: [n] int64, for a gain of [n, n].

    Shortest augmenting paths with potentials (Kuhn 1955; Jonker, Volgenant, Computing 1987).

    >>> assignment(torch.tensor([[1.0, 5.0], [4.0, 6.0]])).tolist()
    [1, 0]
    """
    cost = -gain.double().cpu().numpy()
    n = len(cost)
    rows, columns = np.zeros(n + 1), np.zeros(n + 1)
    taker = np.full(n + 1, n)  # of each column; column n is where a path begins
    for row in range(n):
        taker[n], at = row, n
        least, before = np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, bool)
        while taker[at] != n or at == n:
            done[at] = True
            here = taker[at]
            reach = cost[here] - rows[here] - columns[:n]
            better = ~done[:n] & (reach < least)
            least[better], before[better] = reach[better], at
            following = int(np.where(done[:n], np.inf, least).argmin())
            step = least[following]
            rows[taker[done]] += step
            columns[done] -= step
            least[~done[:n]] -= step
            at = following
        while at != n:
            taker[at] = taker[before[at]]
            at = int(before[at])
    order = torch.empty(n, dtype=torch.int64)
    order[torch.from_numpy(taker[:n])] = torch.arange(n)
    return order
