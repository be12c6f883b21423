"""lookup_matmul against its definition."""

import pytest
import torch

from taut.kernels import lookup_matmul, native, reference
from taut.kernels.lookup import pack_indices, unpack_indices

from .conftest import AROUND_WIDTHS, assert_as_exact_as_torch, needs_native


def weights(out: int, columns: int, bits: int, rows: int = 1, groups: int = 1):
    """Random indices and tables."""
    return torch.randint(0, 2**bits, (out, columns)), torch.randn(rows, groups, 2**bits)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [0, 1, 16, 17, 128, 600])
def test_indices_pack_into_no_more_bits_than_they_need(bits: int, columns: int) -> None:
    index, _ = weights(5, columns, bits)
    codes = pack_indices(index, bits)
    assert torch.equal(unpack_indices(codes, bits, columns), index.to(torch.uint8))
    if columns == 600:  # five words of strips at most are padding
        assert codes[0].numel() * 32 <= 608 * bits + 3 * 16 * 32


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", AROUND_WIDTHS)
def test_it_is_the_definition(variant: tuple[str, ...], bits: int, columns: int) -> None:
    for out, batch in ((1, 1), (3, 2), (16, 4), (33, 5), (31, 13)):
        index, table = weights(out, columns, bits)
        x = torch.randn(batch, columns)
        y = lookup_matmul(x, pack_indices(index, bits), table, bits)
        assert_as_exact_as_torch(y, x, table[0, 0][index])


@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize(("rows", "group"), [(1, 128), (7, None), (7, 256)])
def test_a_table_for_each_row_and_group(
    variant: tuple[str, ...], batch: int, rows: int, group: int | None
) -> None:
    columns = 700
    groups = 1 if group is None else -(-columns // group)
    index, table = weights(7, columns, 3, rows, groups)
    x = torch.randn(batch, columns)
    y = lookup_matmul(x, pack_indices(index, 3), table, 3, group)
    identity = torch.eye(columns)
    weight = reference.lookup_matmul(identity, index, table, group).T
    assert_as_exact_as_torch(y, x, weight)


@pytest.mark.parametrize("batch", [1, 40])
def test_threads_change_nothing(threads: int, batch: int) -> None:
    index, table = weights(300, 500, 4)
    x = torch.randn(batch, 500)
    y = lookup_matmul(x, pack_indices(index, 4), table, 4)
    assert_as_exact_as_torch(y, x, table[0, 0][index])


@pytest.mark.parametrize(("out", "columns", "batch"), [(0, 5, 2), (4, 0, 2), (4, 5, 0)])
def test_nothing_in_gives_nothing_out(
    variant: tuple[str, ...], out: int, columns: int, batch: int
) -> None:
    index, table = weights(out, columns, 2)
    y = lookup_matmul(torch.randn(batch, columns), pack_indices(index, 2), table, 2)
    assert torch.equal(y, torch.zeros(batch, out))


@pytest.mark.parametrize("batch", [1, 6])
def test_what_is_no_number_stays_where_it_is(variant: tuple[str, ...], batch: int) -> None:
    index, table = weights(20, 130, 4)
    index[index == 7] = 6
    table[..., 7] = float("nan")  # in the table, but no weight uses it
    x = torch.randn(batch, 130)
    codes = pack_indices(index, 4)
    assert bool(lookup_matmul(x, codes, table, 4).isfinite().all())
    x[0, 129] = float("inf")
    y = lookup_matmul(x, codes, table, 4)
    assert bool(y[0].isinf().all())
    assert bool(y[1:].isfinite().all())


def test_inputs_may_be_strided_unaligned_or_narrow() -> None:
    index, table = weights(9, 130, 4)
    codes = pack_indices(index, 4)
    wide = torch.randn(3, 5, 261)
    for x in (wide[..., 1:131], wide[..., ::2][..., :130], wide.transpose(0, 1)[..., :130]):
        assert_as_exact_as_torch(lookup_matmul(x, codes, table, 4), x, table[0, 0][index])
    half = wide[..., :130].half()
    y = lookup_matmul(half, codes, table, 4)
    assert y.dtype is torch.float16
    wanted = reference.lookup_matmul(half.float(), index, table).half()
    near = 2e-3 if native.LOADED else 2e-2  # the definition adds up in half precision
    torch.testing.assert_close(y, wanted, rtol=near, atol=near)


def test_gradients_go_by_the_definition() -> None:
    index, table = weights(9, 40, 4)
    x = torch.randn(3, 40, requires_grad=True)
    lookup_matmul(x, pack_indices(index, 4), table, 4).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], table[0, 0][index].sum(0))


@needs_native
def test_it_compiles_and_exports_whole() -> None:
    index, table = weights(9, 40, 4)
    codes, x = pack_indices(index, 4), torch.randn(3, 40)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return lookup_matmul(x.relu(), codes, table, 4) + 1

    with torch.no_grad():
        exported = torch.export.export(Net(), (x,)).module()
        torch.testing.assert_close(exported(x), Net()(x))
    torch.library.opcheck(
        torch.ops.taut.lookup_matmul.default, (x, codes, table, 4, 128),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {**a, "x": a["x"].double()}, "x has the wrong dtype"),
        (lambda a: {**a, "x": a["x"][0]}, r"x must have 2 dimensions, got \[40\]"),
        (lambda a: {**a, "x": a["x"].T}, "x must be contiguous"),
        (lambda a: {**a, "x": torch.randn(3, 200)}, "200 columns of 4 bits take 32 words"),
        (lambda a: {**a, "codes": a["codes"].long()}, "codes has the wrong dtype"),
        (lambda a: {**a, "codes": a["codes"][:, ::2]}, "codes must be contiguous"),
        (lambda a: {**a, "table": a["table"][..., :8].contiguous()}, r"table must be \[1 or 9"),
        (lambda a: {**a, "bits": 9}, r"bits must lie in 1 … 8, got 9"),
        (lambda a: {**a, "group": 30}, "group must be a multiple of 128, got 30"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(change, said: str) -> None:
    index, table = weights(9, 40, 4)
    arguments = {
        "x": torch.randn(3, 40), "codes": pack_indices(index, 4), "table": table,
        "bits": 4, "group": 40,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=said):
        torch.ops.taut.lookup_matmul(**change(arguments))


def test_dispatch_is_a_function_of_the_features() -> None:
    if "avx2" not in native.FEATURES or not native.LOADED:
        pytest.skip("not an x86 processor")
    assert native.variants("lookup_matmul", ()) == ("portable",)
    assert native.variants("lookup_matmul", ("avx2",)) == ("avx2", "portable")
    assert native.variants("lookup_matmul", ("avx2", "avx512"))[0] == "avx512"
