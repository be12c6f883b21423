"""sparse_matmul and sparse_conv2d against their definitions."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taut.kernels import native, reference
from taut.kernels import sparse as kernels
from taut.kernels.sparse import Rows, check_rows, pack_rows, sparse_conv2d, sparse_matmul

from .conftest import AROUND_WIDTHS, assert_as_exact_as_torch

needs_native = pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built")


def sparse(*shape: int, kept: float = 0.3) -> Tensor:
    """A random weight most of which is zero."""
    return torch.randn(shape) * (torch.rand(shape) < kept)


def rows_of(weight: Tensor) -> Rows:
    positions = weight.flatten().nonzero().squeeze(1)
    return Rows(*pack_rows(positions, tuple(weight.shape)), weight.flatten()[positions])


KINDS = ("float32", "float16", "bfloat16", "int8", "table of 16", "table of 200")


def stored(weight: Tensor, kind: str) -> tuple[Rows, dict[str, Tensor], Tensor]:
    """The rows of a weight, its values stored as `kind`; and the weight that they stand for."""
    rows, more = rows_of(weight), {}
    if kind == "int8":
        more["scale"] = torch.rand(len(weight)) + 0.5
        values = torch.randint(-128, 128, rows.values.shape, dtype=torch.int8)
    elif kind.startswith("table"):
        entries = int(kind.split()[-1])
        more["table"] = torch.randn(entries)
        values = torch.randint(0, entries, rows.values.shape, dtype=torch.uint8)
    else:
        values = rows.values.to(getattr(torch, kind))
    rows = rows._replace(values=values)
    width = weight[0].numel()
    dense = reference.rows_weight(*rows, width, **more)
    return rows, more, dense.reshape(weight.shape)


# Packing


@pytest.mark.parametrize("shape", [(5, 40), (3, 4, 3, 3), (4, 70000), (0, 7), (3, 0)])
def test_rows_pack_and_unpack(shape: tuple[int, ...]) -> None:
    weight = sparse(*shape)
    rows = rows_of(weight)
    assert rows.columns.dtype is (torch.int32 if shape[-1] > 2**16 else torch.uint16)
    width = weight[:1].numel() if len(weight) else 7
    positions = kernels.unpack_rows(rows.starts, rows.columns, width)
    assert torch.equal(positions, weight.flatten().nonzero().squeeze(1))
    dense = reference.rows_weight(*rows, width)
    assert torch.equal(dense.reshape(shape), weight)
    check_rows(rows.starts, rows.columns, width)


@pytest.mark.parametrize(
    ("positions", "said"),
    [([0, 20], r"lie in \[0, 20\)"), ([-1, 4], r"lie in \[0, 20\)"), ([4, 4], "must rise")],
)
def test_bad_positions_are_refused(positions: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack_rows(torch.tensor(positions), (4, 5))


@pytest.mark.parametrize(
    ("starts", "columns", "said"),
    [
        ([0, 2, 1, 3], [0, 1, 2], "rise from 0 to 3"),
        ([1, 2, 3], [0, 1, 2], "rise from 0 to 3"),
        ([0, 2], [0, 1, 2], "rise from 0 to 3"),
        ([], [], "rise from 0 to 0"),
        ([0, 3], [0, 1, 5], r"columns must lie in \[0, 5\), got 0 … 5"),
        ([0, 3], [0, -1, 2], r"columns must lie in \[0, 5\), got -1 … 2"),
    ],
)
def test_bad_rows_are_refused(starts: list[int], columns: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_rows(torch.tensor(starts).int(), torch.tensor(columns).int(), 5)


# Products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", AROUND_WIDTHS)
def test_it_is_the_definition(variant: tuple[str, ...], kind: str, columns: int) -> None:
    for out, batch in ((1, 1), (3, 2), (16, 17), (33, 33), (31, 64), (18, 65)):
        rows, more, dense = stored(sparse(out, columns), kind)
        x = torch.randn(batch, columns)
        assert_as_exact_as_torch(sparse_matmul(x, *rows, **more), x, dense)


@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("kept", [0.002, 0.1, 1.0])
def test_rows_may_be_nearly_empty_or_full(
    variant: tuple[str, ...], batch: int, kept: float
) -> None:
    weight = sparse(37, 1500, kept=kept)
    weight[5] = weight[36] = 0
    x = torch.randn(batch, 1500)
    y = sparse_matmul(x, *rows_of(weight))
    assert_as_exact_as_torch(y, x, weight)
    assert not y[:, 5].any()


@pytest.mark.parametrize("batch", [1, 20])
def test_wide_rows_have_wide_columns(variant: tuple[str, ...], batch: int) -> None:
    weight = sparse(9, 70000, kept=0.01)
    x = torch.randn(batch, 70000)
    assert_as_exact_as_torch(sparse_matmul(x, *rows_of(weight)), x, weight)


@pytest.mark.parametrize("batch", [1, 40, 100])
def test_threads_change_nothing(threads: int, batch: int) -> None:
    torch.manual_seed(3)
    weight, x = sparse(900, 500), torch.randn(batch, 500)
    y = sparse_matmul(x, *rows_of(weight))
    assert_as_exact_as_torch(y, x, weight)
    torch.set_num_threads(1)
    assert torch.equal(y, sparse_matmul(x, *rows_of(weight)))


@pytest.mark.parametrize(
    ("out", "columns", "batch", "kept"),
    [(0, 5, 2, 1), (4, 0, 2, 1), (4, 5, 0, 1), (4, 5, 1, 0), (40, 50, 9, 0)],
)
def test_nothing_in_gives_nothing_out(
    variant: tuple[str, ...], out: int, columns: int, batch: int, kept: float
) -> None:
    starts, at, values = rows_of(sparse(out, columns, kept=kept))
    y = sparse_matmul(torch.randn(batch, columns), starts, at, values)
    if kept == 0 or columns == 0:
        assert torch.equal(y, torch.zeros(batch, out))
    assert y.shape == (batch, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 6, 64])
def test_what_is_no_number_meets_stored_weights_only(
    variant: tuple[str, ...], kind: str, batch: int
) -> None:
    weight = sparse(20, 130)
    weight[:, 7] = weight[:, 129] = weight[3:] = 0
    weight[1, 129] = 1
    rows, more, _ = stored(weight, kind)
    if kind == "int8":
        rows = rows._replace(values=rows.values.clamp(min=1))
    x = torch.randn(batch, 130)
    x[:, 7] = float("nan")
    x[0, 129] = float("inf")
    y = sparse_matmul(x, *rows, **more)
    assert bool(y[0, 1].isinf())
    assert bool(y[:, [0, *range(2, 20)]].isfinite().all())
    assert bool(y[1:].isfinite().all())


def test_inputs_may_be_strided_unaligned_or_narrow() -> None:
    weight = sparse(9, 130)
    rows = rows_of(weight)
    wide = torch.randn(3, 5, 261)
    for x in (wide[..., 1:131], wide[..., ::2][..., :130], wide.transpose(0, 1)[..., :130]):
        assert_as_exact_as_torch(sparse_matmul(x, *rows), x, weight)
    for dtype, near in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        narrow = wide[..., :130].to(dtype)
        y = sparse_matmul(narrow, *rows)
        assert y.dtype is dtype
        wanted = F.linear(narrow.float(), weight).to(dtype)
        torch.testing.assert_close(y, wanted, rtol=near, atol=near)


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_exist_is_not_read(variant: tuple[str, ...], batch: int, kind: str) -> None:
    rows, more, _ = stored(sparse(30, 40), kind)
    columns = torch.randint(0, 2**16, rows.columns.shape).to(torch.uint16)
    if kind.startswith("table"):
        rows = rows._replace(values=torch.full_like(rows.values, 255))
    x = torch.randn(batch, 40)
    wanted = reference.rows_weight(
        rows.starts, columns.int().clamp(max=39), rows.values.clamp(max=15 if more else 127)
        if kind.startswith("table") else rows.values, 40, **more,
    )  # fmt: skip
    y = sparse_matmul(x, rows.starts, columns, rows.values, **more)
    if not kind.startswith("table"):  # an index beyond the table takes some entry, or zero
        torch.testing.assert_close(y, F.linear(x, wanted), rtol=1e-4, atol=1e-3)
    wild = torch.randint(-(2**31), 2**31, rows.columns.shape).int()
    assert sparse_matmul(x, rows.starts, wild, rows.values, **more).shape == (batch, 30)


def test_gradients_go_by_the_definition() -> None:
    weight = sparse(9, 40)
    rows = rows_of(weight)
    values = rows.values.clone().requires_grad_()
    x = torch.randn(3, 40, requires_grad=True)
    sparse_matmul(x, rows.starts, rows.columns, values).sum().backward()
    assert x.grad is not None
    assert values.grad is not None
    torch.testing.assert_close(x.grad[0], weight.sum(0))
    torch.testing.assert_close(values.grad, x.detach().sum(0)[rows.columns.long()])


# Convolutions


@pytest.mark.parametrize(
    ("channels", "out", "size", "kernel", "options"),
    [
        (3, 5, (9, 11), (3, 3), {"padding": 1}),
        (3, 5, (9, 11), (3, 3), {}),
        (16, 33, (7, 7), (1, 1), {}),
        (4, 18, (20, 70), (5, 3), {"padding": (2, 1)}),
        (4, 6, (17, 16), (3, 3), {"padding": 1, "stride": 2}),
        (4, 6, (17, 16), (1, 1), {"stride": 2}),
        (4, 6, (23, 19), (7, 7), {"padding": 3, "stride": (2, 3)}),
        (4, 6, (23, 19), (3, 3), {"padding": 2, "dilation": 2}),
        (4, 6, (23, 19), (3, 2), {"padding": (4, 1), "dilation": (3, 2), "stride": (2, 1)}),
        (4, 6, (23, 19), (2, 2), {"dilation": 3, "stride": 2}),
        (8, 8, (12, 12), (3, 3), {"padding": 1, "groups": 8}),
        (6, 40, (12, 12), (3, 3), {"padding": 1, "groups": 2, "stride": 2}),
        (2, 3, (4, 4), (2, 2), {"padding": 5, "stride": 4}),
        (1, 1, (1, 1), (1, 1), {}),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_is_the_definition(
    variant: tuple[str, ...], batch: int, channels: int, out: int,
    size: tuple[int, int], kernel: tuple[int, int], options: dict[str, int],
) -> None:  # fmt: skip
    weight = sparse(out, channels // options.get("groups", 1), *kernel, kept=0.5)
    x = torch.randn(batch, channels, *size)
    y = sparse_conv2d(x, *rows_of(weight), kernel, **options)
    assert_as_exact_as_torch(y, x, weight, lambda x, w: F.conv2d(x, w, None, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_takes_all_values(variant: tuple[str, ...], kind: str) -> None:
    rows, more, dense = stored(sparse(17, 5, 3, 3), kind)
    x = torch.randn(2, 5, 13, 10)
    y = sparse_conv2d(x, *rows, kernel=3, padding=1, **more)
    assert_as_exact_as_torch(y, x, dense, lambda x, w: F.conv2d(x, w, None, padding=1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(50, 90), (700, 30), (3, 3000)])
def test_large_images_go_in_bands(threads: int, size: tuple[int, int], stride: int) -> None:
    weight = sparse(20, 64, 3, 3, kept=0.05)
    x = torch.randn(2, 64, *size)
    y = sparse_conv2d(x, *rows_of(weight), 3, padding=1, stride=stride)
    assert_as_exact_as_torch(
        y, x, weight, lambda x, w: F.conv2d(x, w, None, stride=stride, padding=1)
    )
    torch.set_num_threads(1)
    assert torch.equal(y, sparse_conv2d(x, *rows_of(weight), 3, padding=1, stride=stride))


def test_convolutions_of_nothing_and_of_no_numbers(variant: tuple[str, ...]) -> None:
    weight = sparse(5, 3, 3, 3)
    rows = rows_of(weight)
    assert sparse_conv2d(torch.randn(0, 3, 8, 8), *rows, 3).shape == (0, 5, 6, 6)
    none = rows_of(torch.zeros_like(weight))
    assert not sparse_conv2d(torch.randn(1, 3, 8, 8), *none, 3).any()
    weight[:, 1] = 0
    x = torch.randn(1, 3, 8, 8)
    x[:, 1] = float("nan")
    assert bool(sparse_conv2d(x, *rows_of(weight), 3).isfinite().all())


def test_gradients_of_a_convolution_go_by_the_definition() -> None:
    weight = sparse(6, 2, 3, 3)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    (got,) = torch.autograd.grad(sparse_conv2d(x, *rows_of(weight), 3, groups=2).square().sum(), x)
    (wanted,) = torch.autograd.grad(F.conv2d(x, weight, groups=2).square().sum(), x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
