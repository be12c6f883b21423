"""block_matmul and bitmap_matmul against their definitions."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taut.kernels import bitmap_matmul, block_matmul, reference
from taut.kernels.sparse import Bitmap, pack_bitmap, pack_blocks, unpack_bitmap

from .conftest import AROUND_WIDTHS, assert_as_exact_as_torch

SHAPES = ((1, 1), (3, 2), (16, 17), (33, 33), (31, 64), (18, 65))


def blocky(out: int, columns: int, rows: int, kept: float = 0.3) -> Tensor:
    """A weight that is zero but for some blocks of `rows` rows and one column."""
    mask = torch.rand(-(-out // rows), 1, columns) < kept
    return torch.randn(out, columns) * mask.expand(-1, rows, -1).flatten(0, 1)[:out]


def kept_of(out: int, columns: int, n: int, m: int) -> Tensor:
    """N of M columns, at random; m = 0 for a mask without structure."""
    if m == 0:
        return torch.rand(out, columns) < n / 10
    order = torch.rand(out, -(-columns // m), m).argsort(2)
    return (order < n).flatten(1)[:, :columns]


def bitmap_of(weight: Tensor, mask: Tensor) -> Bitmap:
    return Bitmap(*pack_bitmap(mask), weight[mask])


# Blocks


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("out", [0, 1, 4, 17, 32])
def test_blocks_pack_what_is_not_zero(rows: int, out: int) -> None:
    weight = blocky(out, 50, rows)
    blocks = pack_blocks(weight, rows)
    assert blocks.values.shape[1] == rows
    assert torch.equal(reference.blocks_weight(*blocks, out, 50), weight)


def test_blocks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="4 or 16 rows, got 8"):
        pack_blocks(torch.ones(8, 8), 8)
    with pytest.raises(ValueError, match="at most 65536 columns, got 65537"):
        pack_blocks(torch.ones(4, 65537), 4)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("columns", AROUND_WIDTHS)
def test_block_matmul_is_the_definition(
    variant: tuple[str, ...], rows: int, half: bool, columns: int
) -> None:
    for out, batch in SHAPES:
        weight = blocky(out, columns, rows)
        starts, at, values = pack_blocks(weight, rows)
        if half:
            values, weight = values.half(), weight.half().float()
        x = torch.randn(batch, columns)
        assert_as_exact_as_torch(block_matmul(x, starts, at, values, out), x, weight)


@pytest.mark.parametrize("batch", [1, 9, 70])
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("kept", [0.0, 0.002, 1.0])
def test_block_rows_may_be_empty_or_full(
    variant: tuple[str, ...], rows: int, batch: int, kept: float
) -> None:
    weight = blocky(40, 1100, rows, kept)
    x = torch.randn(batch, 1100)
    y = block_matmul(x, *pack_blocks(weight, rows), 40)
    assert_as_exact_as_torch(y, x, weight)
    x[:, (weight != 0).sum(0) == 0] = float("nan")  # in no block
    assert bool(block_matmul(x, *pack_blocks(weight, rows), 40).isfinite().all())


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("batch", [1, 20])
def test_columns_that_do_not_exist_are_not_read(
    variant: tuple[str, ...], rows: int, batch: int
) -> None:
    starts, at, values = pack_blocks(blocky(20, 30, rows), rows)
    wild = torch.randint(0, 2**16, at.shape)
    x = torch.randn(batch, 30)
    weight = reference.blocks_weight(starts, wild.clamp(max=29), values, 20, 30)
    y = block_matmul(x, starts, wild.to(torch.uint16), values, 20)
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-4, atol=1e-4)


# Bitmaps


@pytest.mark.parametrize("columns", [0, *AROUND_WIDTHS])
def test_bitmaps_pack_and_unpack(columns: int) -> None:
    mask = kept_of(7, columns, 4, 0)
    masks, starts = pack_bitmap(mask)
    assert masks.shape == (7, -(-columns // 16))
    assert torch.equal(unpack_bitmap(masks, columns), mask)
    before = mask.flatten().cumsum(0).reshape(mask.shape) - mask.long()
    assert torch.equal(starts, before[:, ::128].int())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 0)])
@pytest.mark.parametrize("columns", AROUND_WIDTHS)
def test_bitmap_matmul_is_the_definition(
    variant: tuple[str, ...], n: int, m: int, half: bool, columns: int
) -> None:
    for out, batch in SHAPES:
        mask = kept_of(out, columns, n, m)
        weight = torch.randn(out, columns) * mask
        masks, starts, values = bitmap_of(weight, mask)
        if half:
            values, weight = values.half(), weight.half().float()
        x = torch.randn(batch, columns)
        assert_as_exact_as_torch(bitmap_matmul(x, masks, starts, values), x, weight)


@pytest.mark.parametrize("batch", [1, 6])
def test_half_values_of_every_kind_are_read(variant: tuple[str, ...], batch: int) -> None:
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    halves = halves[halves.isfinite()]  # zeros, subnormals, both signs
    weight = F.pad(halves, (0, -len(halves) % 512)).reshape(-1, 512)
    mask = torch.ones_like(weight, dtype=torch.bool)
    x = torch.zeros(batch, 512)
    for column in (0, 3, 511):
        x.zero_()[:, column] = 1
        y = bitmap_matmul(x, *bitmap_of(weight, mask))
        assert torch.equal(y, weight[:, column].float().expand(batch, -1))


@pytest.mark.parametrize("batch", [1, 9])
def test_wild_masks_and_starts_read_nothing_else(variant: tuple[str, ...], batch: int) -> None:
    masks = torch.full((5, 17), 2**16 - 1).to(torch.uint16)
    starts = torch.tensor([[-(2**31), 0, 2**31 - 1]]).int().expand(5, -1).contiguous()
    for count in (0, 1, 130):
        y = bitmap_matmul(torch.randn(batch, 270), masks, starts, torch.randn(count))
        assert y.shape == (batch, 5)


# Both


@pytest.mark.parametrize("batch", [1, 40])
def test_threads_change_nothing(threads: int, batch: int) -> None:
    torch.manual_seed(5)
    x, mask = torch.randn(batch, 500), kept_of(700, 500, 2, 4)
    weight = torch.randn(700, 500) * mask
    blocks, bitmap = pack_blocks(blocky(700, 500, 16), 16), bitmap_of(weight, mask)
    ys = block_matmul(x, *blocks, 700), bitmap_matmul(x, *bitmap)
    torch.set_num_threads(1)
    assert torch.equal(ys[0], block_matmul(x, *blocks, 700))
    assert torch.equal(ys[1], bitmap_matmul(x, *bitmap))


@pytest.mark.parametrize(("out", "columns", "batch"), [(0, 5, 2), (4, 0, 2), (4, 5, 0)])
def test_nothing_in_gives_nothing_out(
    variant: tuple[str, ...], out: int, columns: int, batch: int
) -> None:
    x, weight = torch.randn(batch, columns), torch.ones(out, columns)
    for y in (
        block_matmul(x, *pack_blocks(weight, 4), out),
        bitmap_matmul(x, *bitmap_of(weight, weight != 0)),
    ):
        assert torch.equal(y, torch.zeros(batch, out))


def test_inputs_may_be_strided_or_narrow_and_want_gradients() -> None:
    weight = blocky(12, 40, 4)
    blocks, bitmap = pack_blocks(weight, 4), bitmap_of(weight, weight != 0)
    wide = torch.randn(3, 5, 81)
    for product in (
        lambda x: block_matmul(x, *blocks, 12),
        lambda x: bitmap_matmul(x, *bitmap),
    ):
        for x in (wide[..., 1:41], wide[..., ::2][..., :40], wide.transpose(0, 1)[..., :40]):
            assert_as_exact_as_torch(product(x), x, weight)
        narrow = wide[..., :40].bfloat16()
        assert product(narrow).dtype is torch.bfloat16
        x = torch.randn(3, 40, requires_grad=True)
        product(x).sum().backward()
        torch.testing.assert_close(x.grad[0], weight.sum(0))
