"""lookup_matmul_int8 against its definition, to the bit."""

import pytest
import torch
from torch import Tensor

from taut.kernels import lookup_matmul_int8, native, reference
from taut.kernels.lookup import pack_indices

from .conftest import AROUND_WIDTHS, needs_native


def weights(out: int, columns: int, bits: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Random indices, tables and scales."""
    index = torch.randint(0, 2**bits, (out, columns))
    return index, integers(rows, 2**bits), torch.rand(out) + 0.5


def integers(*shape: int) -> Tensor:
    """All that int8 holds."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", AROUND_WIDTHS)
def test_it_is_the_definition(variant: tuple[str, ...], bits: int, columns: int) -> None:
    for out, batch, rows in ((1, 1, 1), (3, 2, 3), (16, 4, 1), (33, 5, 33), (31, 13, 1)):
        index, table, scale = weights(out, columns, bits, rows)
        x = integers(batch, columns)
        y = lookup_matmul_int8(x, pack_indices(index, bits), table, scale, bits)
        assert torch.equal(y, reference.lookup_matmul_int8(x, index, table, scale))


def test_the_definition_is_the_sum_written_out() -> None:
    index, table, scale = weights(2, 3, 4, 2)
    x = integers(1, 3)
    y = reference.lookup_matmul_int8(x, index, table, scale)
    for o in range(2):
        total = sum(int(x[0, k]) * int(table[o, index[o, k]]) for k in range(3))
        assert float(y[0, o]) == float(torch.tensor(float(total)) * scale[o])


@pytest.mark.parametrize("extreme", [-128, 127])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_longest_sums_fit(variant: tuple[str, ...], extreme: int, batch: int) -> None:
    columns = 2**17 - 1
    x = torch.full((batch, columns), -128, dtype=torch.int8)
    table = torch.full((1, 2), extreme, dtype=torch.int8)
    codes = pack_indices(torch.zeros(4, columns, dtype=torch.int64), 1)
    y = lookup_matmul_int8(x, codes, table, torch.ones(4), 1)
    assert torch.equal(y, torch.tensor(float(-128 * extreme * columns)).expand(batch, 4))


@pytest.mark.parametrize("batch", [1, 40])
def test_threads_change_nothing(threads: int, batch: int) -> None:
    index, table, scale = weights(301, 2049, 4)
    x = integers(batch, 2049)
    y = lookup_matmul_int8(x, pack_indices(index, 4), table, scale, 4)
    assert torch.equal(y, reference.lookup_matmul_int8(x, index, table, scale))


@pytest.mark.parametrize(("out", "columns", "batch"), [(0, 5, 2), (4, 0, 2), (4, 5, 0)])
def test_nothing_in_gives_nothing_out(
    variant: tuple[str, ...], out: int, columns: int, batch: int
) -> None:
    index, table, scale = weights(out, columns, 2)
    y = lookup_matmul_int8(integers(batch, columns), pack_indices(index, 2), table, scale, 2)
    assert torch.equal(y, torch.zeros(batch, out))


def test_inputs_may_be_strided_or_unaligned() -> None:
    index, table, scale = weights(9, 130, 4)
    codes = pack_indices(index, 4)
    wide = integers(3, 5, 261)
    for x in (wide[..., 1:131], wide[..., ::2][..., :130], wide.transpose(0, 1)[..., :130]):
        wanted = reference.lookup_matmul_int8(x, index, table, scale)
        assert torch.equal(lookup_matmul_int8(x, codes, table, scale, 4), wanted)


def test_gradients_of_scales_go_by_the_definition() -> None:
    index, table, scale = weights(9, 40, 4)
    x = integers(3, 40)
    scale.requires_grad_()
    lookup_matmul_int8(x, pack_indices(index, 4), table, scale, 4).sum().backward()
    with torch.no_grad():
        ones = reference.lookup_matmul_int8(x, index, table, torch.ones(9))
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, ones.sum(0))


@needs_native
def test_it_compiles_and_exports_whole() -> None:
    index, table, scale = weights(9, 40, 4)
    codes, x = pack_indices(index, 4), integers(3, 40)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lookup_matmul_int8(x, codes, table, scale, 4) + 1

    with torch.no_grad():
        exported = torch.export.export(Net(), (x,)).module()
        assert torch.equal(exported(x), Net()(x))
    torch.library.opcheck(
        torch.ops.taut.lookup_matmul_int8.default, (x, codes, table, scale, 4),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@needs_native
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {**a, "x": a["x"].float()}, "x has the wrong dtype"),
        (lambda a: {**a, "x": a["x"][0]}, r"x must have 2 dimensions, got \[40\]"),
        (lambda a: {**a, "x": integers(3, 200)}, "200 columns of 4 bits take 32 words"),
        (lambda a: {**a, "x": integers(1, 2**17)}, "at most 131071 columns .* got 131072"),
        (lambda a: {**a, "codes": a["codes"].long()}, "codes has the wrong dtype"),
        (lambda a: {**a, "table": a["table"].float()}, "table has the wrong dtype"),
        (lambda a: {**a, "table": integers(1, 8)}, r"table must be \[1 or 9, 16\], got \[1, 8\]"),
        (lambda a: {**a, "scale": a["scale"][:5]}, r"scale must be \[9\], got \[5\]"),
        (lambda a: {**a, "bits": 0}, "bits must lie in 1 … 8, got 0"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(change, said: str) -> None:
    index, table, scale = weights(9, 40, 4)
    arguments = {
        "x": integers(3, 40), "codes": pack_indices(index, 4), "table": table, "scale": scale,
        "bits": 4,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=said):
        torch.ops.taut.lookup_matmul_int8(**change(arguments))


def test_dispatch_is_a_function_of_the_features() -> None:
    if "portable" not in native.variants("lookup_matmul_int8", ()):
        pytest.skip("the native kernels are not built")
    if native.variants("lookup_matmul_int8", ("avx2",))[0] != "avx2":
        pytest.skip("not an x86 processor")
    everything = ("avx2", "avx512", "avx512_vnni")
    names = (*everything[::-1], "portable")
    assert native.variants("lookup_matmul_int8", everything) == names
    assert native.variants("lookup_matmul_int8", ("avx2", "avx512")) == names[1:]
    assert native.variants("lookup_matmul_int8", ("avx2", "avx512_vnni")) == names[2:]
