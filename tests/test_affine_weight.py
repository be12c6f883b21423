"""The affine weight: its products by every kernel, its file, and what a file may not say."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taut.activations import StepCode
from taut.affine_weight import AffineWeight
from taut.errors import FormatError
from taut.kernels.reference import lookup_matmul_int8
from taut.pack import encode, load
from taut.packed import Plain


def affine(shape, bits=4, per="row", zeros="middle", seed=0):
    rng = torch.Generator().manual_seed(seed)
    count = {"one": 1, "row": shape[0], "group": 2 * shape[0]}[per]
    index = torch.randint(0, 2**bits, shape, generator=rng)
    steps = (0.01 + torch.rand(count, generator=rng)).bfloat16()
    odd = torch.tensor(2**bits - 1)
    each = 2 * torch.randint(0, 2**bits, (count,), generator=rng)
    chosen = {"middle": torch.tensor(2**bits), "odd": odd, "each": each}[zeros]
    return AffineWeight(index, bits, Plain(steps), chosen)


def exact(weight):
    """n − zero, step by step, as a person would."""
    n = weight.index.reshape(weight.steps.numel, -1).double()
    zeros = weight.zeros.double().reshape(-1, 1) / 2
    return ((n - zeros) * weight.steps.dense().double()[:, None]).reshape(weight.shape)


EVERY = list(itertools.product((1, 3, 4, 8), ("one", "row", "group"), ("middle", "odd", "each")))


@pytest.mark.parametrize(("bits", "per", "zeros"), EVERY)
def test_products_and_rows(bits, per, zeros):
    weight = affine((6, 40), bits, per, zeros)
    torch.testing.assert_close(weight.dense(), exact(weight).float())
    x = torch.randn(5, 40)
    wanted = (x.double() @ exact(weight).T).float()
    torch.testing.assert_close(weight.matmul(x), wanted, rtol=1e-4, atol=1e-4)
    picked = torch.tensor([[0, 5], [3, 3]])
    torch.testing.assert_close(weight.rows(picked), exact(weight).float()[picked])
    assert weight.count_nonzero() == int((exact(weight) != 0).sum())


def test_groups_of_whole_vectors_run_on_the_kernel(monkeypatch):
    weight = affine((6, 256), 4, "group", "each")
    monkeypatch.setattr(weight, "dense", None)
    x = torch.randn(5, 256)
    torch.testing.assert_close(
        weight.matmul(x), (x.double() @ exact(weight).T).float(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("per", ["one", "row"])
@pytest.mark.parametrize("zeros", ["middle", "odd", "each"])
@pytest.mark.parametrize("bits", [2, 8])
def test_whole_numbers_are_multiplied_exactly(bits, per, zeros):
    weight = affine((7, 50), bits, per, zeros)
    x = torch.randint(-128, 128, (4, 50)).to(torch.int8)
    for step in (torch.tensor(0.25), torch.rand(4, 1)):
        found = weight.matmul_int8(x, step)
        wanted = x.double() @ exact(weight).T * step
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-4)
    assert affine((7, 50), bits, "group").matmul_int8(x, torch.tensor(1.0)) is None


@pytest.mark.parametrize(("per", "zeros"), [("one", "middle"), ("row", "odd"), ("row", "each")])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 9), (9,)])
def test_convolutions_multiply_whole_numbers(kernel, per, zeros):
    weight = affine((7, 16, *kernel), 8, per, zeros)
    x = torch.randint(-128, 128, (3, 16, 9, 11)).to(torch.int8)
    window = (1,) * (2 - len(kernel)) + kernel
    for step in (torch.tensor(0.25), torch.rand(3, 1, 1, 1)):
        for how in (((1, 1), (0, 4), (1, 1)), ((2, 1), (1, 2), (1, 2)), ((1, 2), (2, 4), (2, 1))):
            if x.shape[3] + 2 * how[1][1] <= how[2][1] * (window[1] - 1):
                continue
            found = weight.conv2d_int8(x, step, *how)
            dense = exact(weight).reshape(7, 16, *window)
            wanted = F.conv2d(x.double(), dense, None, *how) * step
            torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-3)
            code = StepCode(torch.tensor([0.25]), -128, 127)
            ran = code.convolution(weight, x.float() * 0.25, *how, 1)
            if step.dim() == 0:
                assert torch.equal(ran, found)


def test_narrow_windows_and_groups_are_multiplied_as_floats():
    """Windows of few numbers are gathered faster as floats; those of groups are many matrices."""
    x, how = torch.ones(1, 3, 8, 8, dtype=torch.int8), ((1, 1), (0, 0), (1, 1))
    step = torch.tensor(1.0)
    assert affine((7, 3, 3, 3), 8).conv2d_int8(x, step, *how) is None
    wide = torch.ones(1, 32, 8, 8, dtype=torch.int8)
    assert affine((8, 16, 3, 3), 8).conv2d_int8(wide, step, *how, 2) is None
    assert affine((8, 32, 3, 3), 8, "group").conv2d_int8(wide, step, *how) is None
    assert affine((8, 32, 3, 3), 8).conv2d_int8(wide, step, *how) is not None


def test_what_the_exact_product_is_given_fits_into_bytes():
    weight = affine((7, 50), 8, "row", "each")
    table = weight._numbers()
    assert (int(table.min()), int(table.max())) == (-128, 127)
    y = lookup_matmul_int8(
        torch.ones(1, 50).char(), weight.index, table[None].char(), torch.ones(7)
    )
    assert torch.equal(y[0], (weight.index.float() - 128).sum(1))


@pytest.mark.parametrize(("bits", "per", "zeros"), [e for e in EVERY if e[0] <= 4])
@pytest.mark.parametrize(
    "code", [StepCode(torch.tensor([0.1]), 0, 15), StepCode(torch.tensor([0.3]), -2, 1)]
)
def test_few_bits_are_counted(bits, per, zeros, code):
    weight, x = affine((20, 70), bits, per, zeros), torch.randn(5, 70)
    found = weight.matmul_levels(x, code.levels())
    if per == "group":
        assert found is None
        return
    wanted = code.rounded(x).double() @ exact(weight).T
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("zeros", ["middle", "odd", "each"])
def test_convolutions_count_bits_within_zeros(groups, zeros):
    weight, x = affine((8, 6 // groups, 3, 3), 3, "row", zeros), torch.randn(2, 6, 7, 7)
    code = StepCode(torch.tensor([0.2]), 0, 7)
    how = ((1, 2), (1, 1), (1, 1), groups)
    wanted = F.conv2d(code.rounded(x, 1).double(), exact(weight), None, *how).float()
    found = weight.conv2d_levels(x, code.levels(), *how)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        weight.conv2d(code.rounded(x, 1), *how), wanted, rtol=1e-4, atol=1e-4
    )


def test_what_was_kept_for_speed_is_dropped():
    weight, x = affine((6, 256), 4, "group"), torch.randn(3, 256)
    before = weight.matmul(x)
    weight.steps.values.mul_(2)
    weight.forget()
    torch.testing.assert_close(weight.matmul(x), 2 * before)


def test_eight_bits_are_no_bit_planes():
    assert (
        affine((4, 40), 8).matmul_levels(torch.randn(2, 40), StepCode(torch.ones(1), 0, 3).levels())
        is None
    )


def test_indices_take_their_width_in_memory():
    weight = affine((64, 512), 4)
    assert weight.codes.numel() * weight.codes.element_size() == 64 * 512 // 2


class Forged(AffineWeight):
    """An affine weight that says of itself what is not so."""

    format = "affine.v1"

    def meta(self):
        return self.said


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, r"bits must lie in \[1, 8\], got None"),
        ({"bits": 9}, r"bits must lie in \[1, 8\], got 9"),
        ({"bits": True}, r"bits must lie in \[1, 8\], got True"),
        ({"bits": 4, "steps": 5}, r"got 5 for the shape \[3, 4\]"),
        ({"bits": 4, "steps": 9}, r"got 9 for the shape \[3, 4\]"),
        ({"bits": 4, "steps": 0}, r"got 0 for the shape \[3, 4\]"),
        ({"bits": 4, "steps": 3_000_000}, "steps must be one, or a number that divides"),
        ({"bits": 4, "steps": "3"}, "got '3'"),
        ({"bits": 4, "zero": 31}, r"zero must be 'each' or in \[0, 30\], got 31"),
        ({"bits": 4, "zero": -1}, r"got -1"),
        ({"bits": 4, "zero": "none"}, r"got 'none'"),
    ],
)
def test_what_cannot_be_is_refused(said, message, tmp_path):
    weight = affine((3, 4))
    weight.__class__, weight.said = Forged, said
    state = {("weight",): weight, ("bias",): Plain.of(torch.zeros(3))}
    (tmp_path / "bad.taut").write_bytes(encode(state))
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "bad.taut", nn.Linear(4, 3))
