"""Compressed rows, blocks and N:M weights to and from the layouts of PyTorch and SciPy.

PyTorch's CSR, CSC and BSR tensors (the last with blocks of 4 × 1 or 16 × 1), the same of SciPy, and
weights of which two in four are kept, as those two and their positions. PyTorch's own
`to_sparse_semi_structured` is not reproduced: its metadata are ordered for one GPU's matrix units
and its products run on CUDA alone; on such a device give it `from_two_four(…)`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from taut.kernels import reference
from taut.kernels.sparse import Blocks, Rows, check_rows, column_type

LAYOUTS = (torch.sparse_csr, torch.sparse_csc)


def rows_to_torch(rows: Rows, width: int, layout: torch.layout = torch.sparse_csr) -> Tensor:
    """Compressed rows of float values → a CSR or CSC tensor [out, width]."""
    if layout not in LAYOUTS:
        raise ValueError(f"rows_to_torch: layout must be one of {LAYOUTS}, got {layout}")
    check_rows(rows.starts, rows.columns, width)
    starts, columns, values = rows.starts, rows.columns.int(), rows.values
    shape = (len(starts) - 1, width)
    with _beta():
        if layout is torch.sparse_csr:
            return torch.sparse_csr_tensor(starts, columns, values, shape)
        starts, at, values = _turned(starts, columns, values, width)
        return torch.sparse_csc_tensor(starts, at, values, shape)


def rows_from_torch(matrix: Tensor) -> Rows:
    """A CSR or CSC tensor → compressed rows, columns rising in each."""
    _two_dimensions(matrix)
    width = matrix.shape[1]
    if matrix.layout is torch.sparse_csr:
        starts, columns = matrix.crow_indices().int(), matrix.col_indices()
        values = matrix.values()
        at = (reference.row_of_each(starts, len(columns)) * width + columns).argsort(stable=True)
        columns, values = columns[at], values[at]
    elif matrix.layout is torch.sparse_csc:
        parts = (matrix.ccol_indices(), matrix.row_indices(), matrix.values())
        starts, columns, values = _turned(*parts, len(matrix))
    else:
        raise ValueError(f"rows_from_torch: layout must be one of {LAYOUTS}, got {matrix.layout}")
    return Rows(starts, column_type(columns, width), values.contiguous())


def blocks_to_torch(blocks: Blocks, width: int) -> Tensor:
    """Blocks → a BSR tensor [out, width] with blocks of R × 1; out is a multiple of R."""
    starts, columns, values = blocks
    check_rows(starts, columns, width)
    shape = ((len(starts) - 1) * values.shape[1], width)
    with _beta():
        return torch.sparse_bsr_tensor(starts, columns.int(), values[..., None], shape)


def blocks_from_torch(matrix: Tensor) -> Blocks:
    """A BSR tensor whose blocks are 4 × 1 or 16 × 1 → blocks."""
    _two_dimensions(matrix)
    if matrix.layout is not torch.sparse_bsr:
        raise ValueError(f"blocks_from_torch: layout must be torch.sparse_bsr, got {matrix.layout}")
    values = matrix.values()
    _block_size("blocks_from_torch", tuple(values.shape[1:]))
    starts, columns = matrix.crow_indices().int(), matrix.col_indices().to(torch.uint16)
    return Blocks(starts, columns, values[..., 0].contiguous())


def rows_to_scipy(rows: Rows, width: int, layout: str = "csr") -> Any:
    """Compressed rows of float values → scipy.sparse's `csr` or `csc` array."""
    from scipy import sparse

    if layout not in ("csr", "csc"):
        raise ValueError(f"rows_to_scipy: layout must be 'csr' or 'csc', got {layout!r}")
    check_rows(rows.starts, rows.columns, width)
    parts = (rows.values.numpy(), rows.columns.int().numpy(), rows.starts.numpy())
    return sparse.csr_array(parts, shape=(len(rows.starts) - 1, width)).asformat(layout)


def rows_from_scipy(matrix: Any) -> Rows:
    """Any scipy.sparse matrix or array → compressed rows, columns rising and duplicates summed."""
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()  # sorts too
    starts, columns = (torch.from_numpy(part).int() for part in (csr.indptr, csr.indices))
    return Rows(starts, column_type(columns, csr.shape[1]), torch.from_numpy(csr.data))


def blocks_to_scipy(blocks: Blocks, width: int) -> Any:
    """Blocks → scipy.sparse's bsr array with blocks of R × 1; out is a multiple of R."""
    from scipy import sparse

    starts, columns, values = blocks
    check_rows(starts, columns, width)
    parts = (values[..., None].numpy(), columns.int().numpy(), starts.numpy())
    return sparse.bsr_array(parts, shape=((len(starts) - 1) * values.shape[1], width))


def blocks_from_scipy(matrix: Any) -> Blocks:
    """A scipy.sparse bsr matrix whose blocks are 4 × 1 or 16 × 1 → blocks."""
    _block_size("blocks_from_scipy", tuple(matrix.blocksize))
    bsr = matrix.copy()
    bsr.sum_duplicates()
    starts, columns = (torch.from_numpy(part).int() for part in (bsr.indptr, bsr.indices))
    values = torch.from_numpy(bsr.data)[..., 0].contiguous()
    return Blocks(starts, columns.to(torch.uint16), values)


def to_two_four(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] with at most two nonzeros in each four → values and positions, [out, in / 2] each.

    positions: uint8 in 0 … 3, rising in each pair; zeros fill up what has fewer than two.
    """
    if weight.shape[1] % 4:
        raise ValueError(f"to_two_four: columns must be a multiple of 4, got {weight.shape[1]}")
    fours = weight.reshape(len(weight), -1, 4)
    if bool(((fours != 0).sum(2) > 2).any()):
        raise ValueError("to_two_four: more than two of four weights are nonzero")
    # Nonzeros come first in a stable order; then the chosen two are put in rising order.
    chosen = (fours == 0).int().argsort(dim=2, stable=True)[..., :2].sort(2).values
    shape = (len(weight), weight.shape[1] // 2)
    return fours.gather(2, chosen).reshape(shape), chosen.to(torch.uint8).reshape(shape)


def from_two_four(values: Tensor, positions: Tensor) -> Tensor:
    """What `to_two_four` gave → the dense weight [out, in]."""
    pairs = (len(values), values.shape[1] // 2, 2)
    fours = values.new_zeros(*pairs[:2], 4)
    fours.scatter_(2, positions.long().reshape(pairs), values.reshape(pairs))
    return fours.flatten(1)


def _turned(
    starts: Tensor, columns: Tensor, values: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed rows → the same compressed by columns (or the other way)."""
    rows = reference.row_of_each(starts, len(columns))
    order = columns.long().argsort(stable=True)
    counts = columns.long().bincount(minlength=width)
    turned = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return turned, rows[order].int(), values[order]


def _two_dimensions(matrix: Tensor) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"a sparse weight must have 2 dimensions, got {list(matrix.shape)}")


def _block_size(op: str, size: tuple[int, ...]) -> None:
    if size not in ((4, 1), (16, 1)):
        raise ValueError(f"{op}: blocks must be 4 × 1 or 16 × 1, got {size}; for others use rows")


def _beta() -> warnings.catch_warnings[None]:
    """PyTorch warns once that its sparse tensors are in beta; who asks for one knows."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
