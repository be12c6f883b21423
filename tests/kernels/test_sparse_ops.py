"""What the sparse operations refuse, how they export, and which variant runs."""

from typing import Any

import pytest
import torch

from taut.kernels import native
from taut.kernels import sparse as kernels

pytestmark = pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built")

OPS = ("sparse_matmul", "sparse_conv2d", "block_matmul", "bitmap_matmul")


def arguments(op: str) -> dict[str, Any]:
    """Good arguments, by name, in the order that the operation takes them."""
    weight = torch.ones(8, 36)
    starts, columns = kernels.pack_rows(torch.arange(8 * 36), (8, 36))
    rows = {"starts": starts, "columns": columns, "values": torch.ones(8 * 36)}
    if op == "sparse_matmul":
        return {"x": torch.randn(3, 36), **rows, "scale": None, "table": None}
    if op == "sparse_conv2d":
        return {
            "x": torch.randn(2, 8, 6, 6), **rows, "scale": None, "table": None, "kernel": [3, 3],
            "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 2,
        }  # fmt: skip
    if op == "block_matmul":
        blocks = kernels.pack_blocks(weight, 4)
        return {"x": torch.randn(3, 36), **blocks._asdict(), "out": 8}
    masks, starts = kernels.pack_bitmap(weight != 0)
    return {
        "x": torch.randn(3, 36), "masks": masks, "starts": starts, "values": torch.ones(8 * 36),
    }  # fmt: skip


def call(op: str, **change: Any) -> torch.Tensor:
    given = arguments(op)
    for name, how in change.items():
        given[name] = how(given[name]) if callable(how) else how
    return getattr(torch.ops.taut, op)(*given.values())


EACH = [
    ({"x": lambda t: t.double()}, "x has the wrong dtype"),
    ({"x": lambda t: t[0]}, "x must have . dimensions"),
    ({"x": lambda t: t[..., ::2]}, "x must be contiguous"),
    ({"starts": lambda t: t.long()}, "starts has the wrong dtype"),
    ({"values": lambda t: t.double()}, "values has the wrong dtype"),
    ({"values": lambda t: t[..., None]}, "values must have . dimensions"),
    ({"values": lambda t: torch.stack([t, t], -1)[..., 0]}, "values must be contig"),
]
ROWS = [
    ({"starts": torch.tensor([]).int()}, "one item more than there are rows"),
    ({"starts": lambda t: t + 1}, "rise from 0 to the number of values, 288"),
    ({"starts": lambda t: t.flip(0)}, "rise from 0"),
    ({"starts": lambda t: t[:-1]}, "rise from 0"),
    ({"columns": lambda t: t.long()}, "columns has the wrong dtype"),
    ({"columns": lambda t: t[:-1]}, "as many columns as values, 288, got 287"),
    ({"values": lambda t: t.to(torch.int8)}, "int8 values come with a scale"),
    ({"values": lambda t: t.to(torch.uint8)}, "uint8 ones with a table"),
    ({"scale": torch.ones(8)}, "others with neither"),
    ({"values": lambda t: t.to(torch.int8), "scale": torch.ones(7)}, r"scale must be \[8\]"),
    ({"values": lambda t: t.to(torch.uint8), "table": torch.ones(257)}, "1 … 256 entries, got 257"),
    ({"values": lambda t: t.to(torch.uint8), "table": torch.ones(0)}, "1 … 256 entries, got 0"),
]
CASES = [
    *[(op, *case) for op in OPS for case in EACH],
    *[(op, *case) for op in OPS[:2] for case in ROWS],
    ("sparse_matmul", {"x": torch.ones(3, 0)}, "x has no columns, but weights have"),
    ("sparse_conv2d", {"kernel": [3]}, "must be pairs"),
    ("sparse_conv2d", {"stride": [1, 0]}, "must be positive"),
    ("sparse_conv2d", {"padding": [-1, 0]}, "padding not negative"),
    ("sparse_conv2d", {"dilation": [1, 4]}, "larger than the padded image"),
    ("sparse_conv2d", {"padding": [2**19, 2**19]}, r"more than 2\*\*28 values"),
    ("sparse_conv2d", {"groups": 3}, "8 channels do not split into 3 groups"),
    ("sparse_conv2d", {"groups": 0}, "do not split into 0 groups"),
    ("block_matmul", {"starts": lambda t: t + 1}, "rise from 0 to the number of values, 72"),
    ("block_matmul", {"columns": lambda t: t.int()}, "columns has the wrong dtype"),
    ("block_matmul", {"columns": lambda t: t[1:]}, "as many columns as blocks, 72, got 71"),
    ("block_matmul", {"values": torch.ones(72, 8)}, "4 or 16 rows, got 8"),
    ("block_matmul", {"out": 9}, "9 outputs in blocks of 4 take 4 starts, got 3"),
    ("block_matmul", {"out": -1}, "starts, got 3"),
    ("block_matmul", {"x": torch.ones(3, 0)}, "x has no columns"),
    ("bitmap_matmul", {"masks": lambda t: t.int()}, "masks has the wrong dtype"),
    ("bitmap_matmul", {"masks": lambda t: t[:, 1:].contiguous()}, "36 columns take 3 masks"),
    ("bitmap_matmul", {"starts": lambda t: t[1:]}, r"starts must be \[8, 1\], got \[7, 1\]"),
]


@pytest.mark.parametrize(("op", "change", "said"), CASES)
def test_wrong_arguments_are_refused(op: str, change: dict[str, Any], said: str) -> None:
    call(op)
    with pytest.raises(RuntimeError, match=said):
        call(op, **change)


@pytest.mark.parametrize("op", OPS)
def test_it_compiles_and_exports_whole(op: str) -> None:
    given = arguments(op)
    x, *rest = given.values()
    names = [n for n in given if n != "x" and not (n == "out" and op != "block_matmul")]
    function = getattr(kernels, op)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x.relu(), **dict(zip(names, rest, strict=True))) + 1

    with torch.no_grad():
        exported = torch.export.export(Net(), (x,)).module()
        torch.testing.assert_close(exported(x), Net()(x))
    torch.library.opcheck(
        getattr(torch.ops.taut, op).default, tuple(given.values()),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_dispatch_is_a_function_of_the_features(op: str) -> None:
    if "avx2" not in native.FEATURES:
        pytest.skip("not an x86 processor")
    assert native.variants(op, ()) == ("portable",)
    assert native.variants(op, ("avx2",)) == ("avx2", "portable")
    assert native.variants(op, ("avx2", "avx512"))[0] == "avx512"
