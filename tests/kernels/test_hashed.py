"""hashed_matmul, its weight and the buckets' gradient against their definitions."""

import pytest
import torch
from torch.nn import functional as F

from taut.kernels import hashed_matmul, hashed_weight, native, reference, wrap_buckets
from taut.kernels.hashed import REACH, RUNS

from .conftest import AROUND_WIDTHS, assert_as_exact_as_torch, needs_native

COUNTS = (1, 2, 15, 63, 64, 65, 1000, 4096)
"""Buckets: fewer than a start reaches, as many, more."""


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("columns", AROUND_WIDTHS)
def test_the_weight_is_exactly_the_definition(
    variant: tuple[str, ...], run: int, columns: int
) -> None:
    for out, count in zip((1, 3, 16, 17, 33, 5, 2, 40), COUNTS, strict=True):
        buckets = torch.randn(count)
        weight = hashed_weight(buckets, (out, columns), 2**32 - count, run)
        wanted = reference.hashed_weight(buckets, (out, columns), 2**32 - count, run)
        assert torch.equal(weight, wanted), (out, count)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("columns", AROUND_WIDTHS)
def test_the_product_is_the_definition(variant: tuple[str, ...], run: int, columns: int) -> None:
    for out, batch in ((1, 1), (3, 2), (16, 4), (33, 5), (31, 13)):
        buckets, x = torch.randn(100), torch.randn(batch, columns)
        weight = reference.hashed_weight(buckets, (out, columns), 3, run)
        assert_as_exact_as_torch(hashed_matmul(x, buckets, out, 3, run), x, weight)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("columns", [1, 16, 17, 127, 129, 300])
def test_the_gradient_is_the_definition(variant: tuple[str, ...], run: int, columns: int) -> None:
    for out, count in zip((1, 3, 16, 17, 33, 5, 2, 40), COUNTS, strict=True):
        gradient = torch.randn(out, columns)
        found, truth = (torch.randn(count, dtype=t) for t in (torch.float32, torch.float64))
        hashed_weight(found.requires_grad_(), (out, columns), 5, run).backward(gradient)
        reference.hashed_weight(truth.requires_grad_(), (out, columns), 5, run).backward(
            gradient.double()
        )
        assert found.grad is not None
        assert truth.grad is not None
        # Each bucket errs by no more than its chain of additions allows.
        terms = out * columns / count + 8
        assert (found.grad - truth.grad).abs().max() <= 1e-6 * terms


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", [1, 40])
def test_threads_change_nothing(threads: int, run: int, batch: int) -> None:
    buckets, x = torch.randn(2000), torch.randn(batch, 500)
    weight = reference.hashed_weight(buckets, (300, 500), 9, run)
    assert torch.equal(hashed_weight(buckets, (300, 500), 9, run), weight)
    assert_as_exact_as_torch(hashed_matmul(x, buckets, 300, 9, run), x, weight)


@needs_native
@pytest.mark.parametrize("run", RUNS)
def test_gradients_are_the_same_bits_whatever_the_threads(run: int) -> None:
    gradient, found = torch.randn(300, 700), []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(torch.ops.taut.hashed_gradient(gradient, 3000, 1, run))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("out", "columns", "batch"), [(0, 5, 2), (4, 0, 2), (4, 5, 0), (0, 0, 0)])
def test_nothing_in_gives_nothing_out(
    variant: tuple[str, ...], run: int, out: int, columns: int, batch: int
) -> None:
    buckets = torch.randn(7, requires_grad=True)
    weight = hashed_weight(buckets, (out, columns), 0, run)
    assert weight.shape == (out, columns)
    weight.sum().backward()
    if out * columns == 0:
        assert torch.equal(buckets.grad, torch.zeros(7))
    y = hashed_matmul(torch.randn(batch, columns), buckets.detach(), out, 0, run)
    assert torch.equal(y, torch.zeros(batch, out))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", [1, 6])
def test_what_is_no_number_stays_where_it_is(
    variant: tuple[str, ...], run: int, batch: int
) -> None:
    index, _ = reference.hash_map((20, 130), 300, 4, run)
    buckets, x = torch.randn(300), torch.randn(batch, 130)
    buckets[0], buckets[299], buckets[7] = float("nan"), float("-nan"), float("inf")
    hit = (index == 0) | (index == 299) | (index == 7)
    y = hashed_matmul(x, buckets, 20, 4, run)
    assert torch.equal(y.isfinite(), ~hit.any(1).expand(batch, 20))
    weight = hashed_weight(buckets, (20, 130), 4, run)
    wanted = reference.hashed_weight(buckets, (20, 130), 4, run)
    assert torch.equal(weight.isnan(), wanted.isnan())
    assert torch.equal(weight.nan_to_num(), wanted.nan_to_num())
    gradient = torch.zeros(20, 130)
    gradient[11, 129] = float("nan")
    leaf = torch.randn(300, requires_grad=True)
    hashed_weight(leaf, (20, 130), 4, run).backward(gradient)
    assert leaf.grad is not None
    assert leaf.grad.isnan().nonzero().flatten().tolist() == [int(index[11, 129])]


@pytest.mark.parametrize("run", RUNS)
def test_inputs_may_be_strided_unaligned_or_narrow(run: int) -> None:
    wide, spread = torch.randn(3, 5, 261), torch.randn(2001)
    for buckets in (spread[1:1001], spread[::2]):
        for x in (wide[..., 1:131], wide[..., ::2][..., :130], wide.transpose(0, 1)[..., :130]):
            wanted = reference.hashed_matmul(x, buckets, 9, 1, run)
            torch.testing.assert_close(
                hashed_matmul(x, buckets, 9, 1, run), wanted, rtol=1e-4, atol=1e-4
            )
        weight = hashed_weight(buckets, (9, 130), 1, run)
        assert torch.equal(weight, reference.hashed_weight(buckets, (9, 130), 1, run))
    leaf = torch.randn(1000, requires_grad=True)
    hashed_weight(leaf, (130, 9), 1, run).backward(wide[0, 0, 1:10].expand(130, 9))
    half = wide[..., :130].half()
    y = hashed_matmul(half, spread, 9, 1, run)
    assert y.dtype is torch.float16
    wanted = reference.hashed_matmul(half.float(), spread, 9, 1, run).half()
    torch.testing.assert_close(y, wanted, rtol=4e-3, atol=4e-3)


def test_buckets_of_any_width_go_by_the_definition() -> None:
    x = torch.randn(3, 40)
    for dtype in (torch.float64, torch.float16):
        buckets = torch.randn(50).to(dtype)
        weight = hashed_weight(buckets, (9, 40), 1)
        assert weight.dtype is dtype
        assert torch.equal(hashed_matmul(x, buckets, 9, 1), F.linear(x, weight.float()))


@pytest.mark.parametrize("run", RUNS)
def test_the_definition_has_its_gradients(run: int) -> None:
    buckets = torch.randn(70, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: hashed_weight(b, (3, 33), 2, run), buckets)
    assert torch.autograd.gradcheck(lambda x, b: hashed_matmul(x, b, 3, 2, run), (x, buckets))


@pytest.mark.parametrize("run", RUNS)
def test_products_have_gradients_in_both(run: int) -> None:
    given = torch.randn(3, 130), torch.randn(500)
    found = [t.clone().requires_grad_() for t in given]
    truth = [t.double().requires_grad_() for t in given]
    hashed_matmul(found[0], found[1], 20, 8, run).square().sum().backward()
    reference.hashed_matmul(truth[0], truth[1], 20, 8, run).square().sum().backward()
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f.grad.double(), t.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", COUNTS)
def test_buckets_are_wrapped_by_copies_of_the_first(count: int) -> None:
    buckets = torch.randn(count)
    wrapped = wrap_buckets(buckets)
    assert torch.equal(wrapped, buckets[torch.arange(count + REACH) % count])
    shape, x = (5, 200), torch.randn(3, 200)
    for run in RUNS:
        weight = hashed_weight(wrapped, shape, 2, run, wrapped=True)
        assert torch.equal(weight, hashed_weight(buckets, shape, 2, run))
        y = hashed_matmul(x, wrapped, 5, 2, run, wrapped=True)
        assert torch.equal(y, hashed_matmul(x, buckets, 5, 2, run))
        exact = hashed_weight(wrapped.double(), shape, 2, run, wrapped=True)
        assert torch.equal(exact, weight.double())


def test_what_cannot_be_wrapped_is_refused() -> None:
    for buckets in (torch.randn(0), torch.randn(2, 3)):
        with pytest.raises(ValueError, match=r"wrap_buckets: buckets must be \[n\], n > 0, got"):
            wrap_buckets(buckets)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises((RuntimeError, ValueError), match="buckets"):
            hashed_weight(torch.zeros(REACH, dtype=dtype), (2, 3), 1, wrapped=True)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapped_buckets_have_the_gradient_and_their_copies_none(
    run: int, dtype: torch.dtype
) -> None:
    plain = torch.randn(40, dtype=dtype)
    wrapped = wrap_buckets(plain).requires_grad_()
    x = torch.randn(2, 130, dtype=dtype)
    hashed_matmul(x, wrapped, 7, 3, run, wrapped=True).sum().backward()
    hashed_matmul(x, plain.requires_grad_(), 7, 3, run).sum().backward()
    assert wrapped.grad is not None
    assert plain.grad is not None
    assert torch.equal(wrapped.grad[:40], plain.grad)
    assert torch.equal(wrapped.grad[40:], torch.zeros(REACH, dtype=dtype))


@needs_native
def test_wrapped_buckets_are_not_copied() -> None:
    buckets, x = wrap_buckets(torch.randn(2**21)), torch.randn(1, 64)
    before = torch.ops.taut.scratch_bytes()
    hashed_matmul(x, buckets, 32, 1, 16, wrapped=True)
    hashed_weight(buckets, (32, 64), 1, 16, wrapped=True)
    assert torch.ops.taut.scratch_bytes() - before < 2**20


@needs_native
def test_gradients_have_gradients() -> None:
    buckets = torch.randn(30, requires_grad=True)
    gradient = torch.randn(5, 40, requires_grad=True)
    (first,) = torch.autograd.grad(
        hashed_weight(buckets, (5, 40), 1), buckets, gradient, create_graph=True
    )
    (second,) = torch.autograd.grad((first * buckets.detach()).sum(), gradient)
    assert torch.equal(second, hashed_weight(buckets.detach(), (5, 40), 1))


@needs_native
def test_it_compiles_and_exports_whole() -> None:
    buckets, x = torch.randn(50), torch.randn(3, 40)

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return hashed_matmul(x.relu(), buckets, 9, 6) + 1

    with torch.no_grad():
        exported = torch.export.export(Net(), (x,)).module()
        torch.testing.assert_close(exported(x), Net()(x))
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.taut
    wrapped = wrap_buckets(buckets)
    torch.library.opcheck(ops.hashed_matmul.default, (x, wrapped, 50, 9, 6, 4), test_utils=tests)
    for op, arguments in (
        (ops.hashed_weight.default, (wrapped.requires_grad_(), 50, 9, 40, 6, 1)),
        (ops.hashed_gradient.default, (torch.randn(9, 40, requires_grad=True), 50, 6, 16)),
    ):
        gradients = ("test_autograd_registration", "test_aot_dispatch_static")
        torch.library.opcheck(op, arguments, test_utils=(*tests, *gradients))


@needs_native
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {**a, "x": a["x"].double()}, "hashed_matmul: x has the wrong dtype"),
        (lambda a: {**a, "x": a["x"][0]}, r"x must have 2 dimensions, got \[40\]"),
        (lambda a: {**a, "x": a["x"].T}, "x must be contiguous"),
        (lambda a: {**a, "buckets": a["buckets"].half()}, "buckets has the wrong dtype"),
        (lambda a: {**a, "buckets": a["buckets"][::2]}, "buckets must be contiguous"),
        (lambda a: {**a, "buckets": a["buckets"][None]}, "buckets must have 1 dimensions"),
        (lambda a: {**a, "count": 0}, "must be 1 … 2.*31 - 1 buckets, got 0"),
        (lambda a: {**a, "count": 2**31}, "must be 1 … 2.*31 - 1 buckets, got 2147483648"),
        (lambda a: {**a, "count": 49}, r"buckets must be \[49 \+ 63\], .*, got \[113\]"),
        (lambda a: {**a, "buckets": a["buckets"][:50]}, r"must be \[50 \+ 63\], .*, got \[50\]"),
        (lambda a: {**a, "run": 8}, "run must be 1, 4, 16 or 64, got 8"),
        (lambda a: {**a, "seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
        (lambda a: {**a, "seed": 2**32}, "seed must lie in .* got 4294967296"),
        (lambda a: {**a, "out": -1}, r"up to 2\*\*31 - 1 rows and columns, got \[-1, 40\]"),
        (lambda a: {**a, "out": 2**31}, r"rows and columns, got \[2147483648, 40\]"),
    ],
)
def test_wrong_arguments_are_refused(change, said: str) -> None:
    arguments = {
        "x": torch.randn(3, 40), "buckets": torch.randn(50 + REACH), "count": 50, "out": 9,
        "seed": 6, "run": 1,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=said):
        torch.ops.taut.hashed_matmul(**change(arguments))


@needs_native
def test_weights_and_gradients_refuse_wrong_arguments_too() -> None:
    with pytest.raises(RuntimeError, match="hashed_weight: run must be"):
        torch.ops.taut.hashed_weight(torch.randn(113), 50, 9, 40, 6, 2)
    with pytest.raises(RuntimeError, match="hashed_weight: buckets has the wrong dtype"):
        torch.ops.taut.hashed_weight(torch.randn(113).double(), 50, 9, 40, 6, 1)
    with pytest.raises(RuntimeError, match=r"hashed_weight: buckets must be \[50 \+ 63\]"):
        torch.ops.taut.hashed_weight(torch.randn(50), 50, 9, 40, 6, 1)
    with pytest.raises(RuntimeError, match="hashed_gradient: there must be"):
        torch.ops.taut.hashed_gradient(torch.randn(9, 40), 0, 6, 1)
    with pytest.raises(RuntimeError, match="hashed_gradient: weight must be contiguous"):
        torch.ops.taut.hashed_gradient(torch.randn(9, 40).T, 50, 6, 1)


@pytest.mark.parametrize(
    ("buckets", "seed", "run", "said"),
    [(0, 1, 1, "buckets"), (5, -1, 1, "seed"), (5, 2**32, 1, "seed"), (5, 1, 3, "run")],
)
def test_the_definition_refuses_them_as_well(buckets: int, seed: int, run: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"hash_map: .*{said}"):
        reference.hash_map((3, 4), buckets, seed, run)


def test_dispatch_is_a_function_of_the_features() -> None:
    if "avx2" not in native.FEATURES or not native.LOADED:
        pytest.skip("not an x86 processor")
    assert native.variants("hashed_matmul", ()) == ("portable",)
    assert native.variants("hashed_matmul", ("avx2",)) == ("avx2", "portable")
    assert native.variants("hashed_matmul", ("avx2", "avx512"))[0] == "avx512"
