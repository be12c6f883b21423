"""Sparse layers: Taut's product beside PyTorch's compressed rows (CSR), and its dense one.

Weights are normal, the smallest of them gone; products are timed by turns, the median counts. The
figure is PyTorch's best time, of CSR or dense, over Taut's: who stays dense where that is faster
loses nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Figure
from torch import Tensor
from torch.nn import functional as F

from taut.kernels import sparse_matmul
from taut.kernels.sparse import pack_rows

_spec = importlib.util.spec_from_file_location(
    "benchmark_of_kernels", Path(__file__).parent.parent / "kernels.py"
)  # by its path: the tests have a package of this name
assert _spec is not None
assert _spec.loader is not None
_kernels = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_kernels)
Bench = _kernels.Bench

NAME = "sparse"
SIDES, ZEROS, BATCHES = (512, 2048), (0.8, 0.9, 0.95), (1, 16, 64)


def figures(options: argparse.Namespace) -> list[Figure]:
    """The rows of this section."""
    torch.manual_seed(options.seed)
    return list(_figures(options.quick))


def _figures(quick: bool) -> Iterator[Figure]:
    bench = Bench(quick)
    for side in (64,) if quick else SIDES:
        weight = torch.randn(side, side)
        for zeros in ZEROS[-1:] if quick else ZEROS:
            smallest = weight.abs().flatten().kthvalue(int(zeros * side * side)).values
            mask = weight.abs() > smallest
            starts, columns = pack_rows(mask.flatten().nonzero().squeeze(1), (side, side))
            values, dense = weight[mask], weight * mask
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch calls its own layout a beta
                csr = dense.to_sparse_csr()
            for batch in BATCHES[:1] if quick else BATCHES:
                x = torch.randn(batch, side)
                ours = partial(sparse_matmul, x, starts, columns, values)
                _check(ours(), F.linear(x, dense))
                yield _figure(bench, f"{side} × {side}, {zeros:.0%} zeros, batch {batch}", ours,
                              partial(F.linear, x, csr), partial(F.linear, x, dense))  # fmt: skip


def _figure(
    bench: Any, case: str, ours: partial[Tensor], csr: partial[Tensor], dense: partial[Tensor]
) -> Figure:
    took, rows, whole = (1e3 * s for s in bench.medians(ours, csr, dense))
    threads = f"{bench.threads} thread{'s' * (bench.threads > 1)}"
    return Figure(
        name=f"sparse: {case}, {threads}: times faster than PyTorch",
        paper=f"Taut {took:.3g} ms, CSR {rows:.3g} ms, dense {whole:.3g} ms",
        ours=min(rows, whole) / took, asked=1, at_most=False, unit="×",
    )  # fmt: skip


def _check(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)
