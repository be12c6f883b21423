"""Sparse weights to and from PyTorch's and SciPy's layouts."""

import pytest
import torch
from torch import Tensor

from taut.kernels import reference
from taut.kernels.sparse import Rows, pack_blocks, pack_rows
from taut.kernels.sparse_layouts import (
    blocks_from_scipy,
    blocks_from_torch,
    blocks_to_scipy,
    blocks_to_torch,
    from_two_four,
    rows_from_scipy,
    rows_from_torch,
    rows_to_scipy,
    rows_to_torch,
    to_two_four,
)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(32, 45) * (torch.rand(32, 45) < 0.2)


@pytest.fixture
def rows(weight: Tensor) -> Rows:
    positions = weight.flatten().nonzero().squeeze(1)
    return Rows(*pack_rows(positions, (32, 45)), weight.flatten()[positions])


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(x.dtype is y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
def test_rows_go_to_torch_and_back(weight: Tensor, rows: Rows, layout: torch.layout) -> None:
    matrix = rows_to_torch(rows, 45, layout)
    assert matrix.layout is layout
    assert torch.equal(matrix.to_dense(), weight)
    assert same(rows_from_torch(matrix), rows)
    assert same(rows_from_torch(weight.to_sparse(layout=layout)), rows)


@pytest.mark.parametrize("r", [4, 16])
def test_blocks_go_to_torch_and_back(weight: Tensor, r: int) -> None:
    blocks = pack_blocks(weight, r)
    matrix = blocks_to_torch(blocks, 45)
    assert torch.equal(matrix.to_dense(), weight)
    assert same(blocks_from_torch(matrix), blocks)
    assert same(blocks_from_torch(weight.to_sparse_bsr((r, 1))), blocks)


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_rows_go_to_scipy_and_back(weight: Tensor, rows: Rows, layout: str) -> None:
    pytest.importorskip("scipy")
    matrix = rows_to_scipy(rows, 45, layout)
    assert matrix.format == layout
    assert torch.equal(torch.from_numpy(matrix.toarray()), weight)
    assert same(rows_from_scipy(matrix), rows)


@pytest.mark.parametrize("r", [4, 16])
def test_blocks_go_to_scipy_and_back(weight: Tensor, r: int) -> None:
    pytest.importorskip("scipy")
    blocks = pack_blocks(weight, r)
    matrix = blocks_to_scipy(blocks, 45)
    assert torch.equal(torch.from_numpy(matrix.toarray()), weight)
    assert same(blocks_from_scipy(matrix), blocks)


def test_other_layouts_are_refused(weight: Tensor, rows: Rows) -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        rows_to_torch(rows, 45, torch.sparse_bsr)
    with pytest.raises(ValueError, match=r"layout must be one of .* got torch.strided"):
        rows_from_torch(weight)
    with pytest.raises(ValueError, match=r"must be torch.sparse_bsr, got torch.strided"):
        blocks_from_torch(weight)
    with pytest.raises(ValueError, match=r"4 × 1 or 16 × 1, got \(4, 5\); for others use rows"):
        blocks_from_torch(weight.to_sparse_bsr((4, 5)))
    with pytest.raises(ValueError, match="2 dimensions"):
        rows_from_torch(torch.ones(2, 3, 4).to_sparse_csr())
    with pytest.raises(ValueError, match=r"columns must lie in \[0, 3\)"):
        rows_to_torch(rows, 3)
    pytest.importorskip("scipy")
    with pytest.raises(ValueError, match="'csr' or 'csc', got 'coo'"):
        rows_to_scipy(rows, 45, "coo")


def test_two_of_four() -> None:
    weight = torch.randn(9, 32) * (torch.rand(9, 8, 4).argsort(2) < 2).flatten(1)
    weight[0] = 0
    weight[1, 1:4] = 0  # fewer than two
    values, positions = to_two_four(weight)
    assert values.shape == positions.shape == (9, 16)
    pairs = positions.reshape(-1, 2)
    assert bool((pairs[:, 0] < pairs[:, 1]).all())
    assert torch.equal(from_two_four(values, positions), weight)
    with pytest.raises(ValueError, match="more than two of four"):
        to_two_four(torch.ones(1, 4))
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        to_two_four(torch.zeros(1, 6))


def test_definitions_sum_what_stands_twice() -> None:
    starts, columns = torch.tensor([0, 2]).int(), torch.tensor([1, 1]).int()
    weight = reference.rows_weight(starts, columns, torch.tensor([2.0, 3.0]), 3)
    assert torch.equal(weight, torch.tensor([[0.0, 5.0, 0.0]]))
