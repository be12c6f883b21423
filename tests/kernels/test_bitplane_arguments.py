"""bitplane_matmul as PyTorch and its callers see it: gradients, export, dispatch, refusals."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from taut.kernels import BitWeights, Levels, bitplane_conv2d, bitplane_matmul, native, reference

from .bitplane_cases import activations, levels_of, packed
from .conftest import needs_native

Arguments = dict[str, object]
Change = Callable[[Arguments], Arguments]


def linear_arguments(out: int = 20, channels: int = 70) -> Arguments:
    """What the raw operation takes, by name."""
    w, levels = packed(out, channels, planes=2), levels_of("learned2", channels)
    return {
        "x": torch.randn(3, channels), "w": w.bits, "w_scale": w.scale, "w_sums": w.sums,
        "x_scale": levels.scale, "thresholds": levels.thresholds, "pattern": levels.pattern,
        "x_offset": 0.25, "out": out,
    }  # fmt: skip


def conv_arguments() -> Arguments:
    """As above, for two groups."""
    w, levels = packed(20, 140, 3, 3, planes=2, groups=2), levels_of("learned2", 140)
    return {
        "x": torch.randn(2, 140, 6, 7), "w": w.bits, "w_scale": w.scale, "w_sums": w.sums,
        "x_scale": levels.scale, "thresholds": levels.thresholds, "pattern": levels.pattern,
        "x_offset": 0.25, "pad": 1.0, "out": 20, "groups": 2, "kernel": [3, 3],
        "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1],
    }  # fmt: skip


def real_arguments() -> Arguments:
    """As above, for floats that meet bit weights."""
    w = packed(20, 70, planes=2)
    return {"x": torch.randn(3, 70), "w": w.bits, "w_scale": w.scale, "out": 20}


def to(**new: object) -> Change:
    """These arguments instead."""
    return lambda a: {**a, **new}


def by(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """This argument changed."""
    return lambda a: {**a, name: change(a[name])}  # type: ignore[arg-type]


# Gradients


def test_gradients_go_by_the_definition() -> None:
    weights = packed(9, 40, planes=2)
    x = torch.randn(3, 40, requires_grad=True)
    bitplane_matmul(x, weights).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], weights.dense().sum(0))
    x.grad = None
    y = bitplane_matmul(x, weights, Levels.sign())  # steps have no gradient
    assert torch.equal(y, bitplane_matmul(x.detach(), weights, Levels.sign()))


@pytest.mark.parametrize("kind", ["sign", "int8", None])
def test_trained_scales_get_gradients(kind: str | None) -> None:
    bits = torch.rand(9, 2, 40) < 0.5
    scale = torch.rand(9, 2, requires_grad=True)
    weights = BitWeights.pack(bits, scale)
    levels = levels_of(kind, 40) if kind else None
    x = activations(levels, 3, 40) if levels else torch.randn(3, 40)
    bitplane_matmul(x, weights, levels).sum().backward()
    assert scale.grad is not None
    decoded = levels.decoded(x) if levels else x
    wanted = torch.einsum("nk,opk->op", decoded, 2.0 * bits - 1)
    torch.testing.assert_close(scale.grad, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("conv", [False, True])
def test_trained_levels_get_gradients(conv: bool) -> None:
    of_x = torch.ones(2, requires_grad=True)
    levels = replace(Levels.uniform(2, 1.0), scale=of_x)
    if conv:
        bitplane_conv2d(torch.randn(2, 5, 6, 6), packed(4, 5, 3, 3), levels).sum().backward()
    else:
        bitplane_matmul(torch.randn(3, 40), packed(4, 40), levels).sum().backward()
    assert of_x.grad is not None
    assert bool(of_x.grad.abs().sum() > 0)


# Compilation


@needs_native
@pytest.mark.parametrize("kind", ["sign", "learned2", "int8", None])
def test_linear_layers_export_whole(kind: str | None) -> None:
    weights = packed(9, 40, planes=2)
    levels = levels_of(kind, 40) if kind else None

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bitplane_matmul(x.clamp(-1, 5), weights, levels) + 1

    x = activations(levels, 3, 40) if levels else torch.randn(3, 40)
    with torch.no_grad():
        exported = torch.export.export(Net(), (x,)).module()
        assert torch.equal(exported(x), Net()(x))


@needs_native
@pytest.mark.parametrize("kind", ["sign", "learned2", "int8"])
def test_convolutions_export_whole(kind: str) -> None:
    weights, levels = packed(9, 10, 3, 2, planes=2), levels_of(kind, 10)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bitplane_conv2d(x.clamp(-1, 5), weights, levels, (2, 1), (1, 2), (1, 2)) + 1

    x = activations(levels, 2, 10, 7, 8)
    with torch.no_grad():
        exported = torch.export.export(Net(), (x,)).module()
        assert torch.equal(exported(x), Net()(x))


@needs_native
def test_the_operations_describe_themselves() -> None:
    for name, arguments in (
        ("bitplane_matmul", linear_arguments()),
        ("bitplane_conv2d", conv_arguments()),
        ("bitplane_conv2d", {**conv_arguments(), "stride": [2, 3], "dilation": [2, 1]}),
        ("bitplane_real", real_arguments()),
    ):
        torch.library.opcheck(
            getattr(torch.ops.taut, name).default, (), arguments,
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_dispatch_is_a_function_of_the_features() -> None:
    if "avx2" not in native.FEATURES or not native.LOADED:
        pytest.skip("not an x86 processor")
    for op in ("bitplane_matmul", "bitplane_conv2d", "bitplane_real"):
        assert native.variants(op, ()) == ("portable",)
        assert native.variants(op, ("avx2",)) == ("avx2", "portable")
        assert native.variants(op, ("avx2", "avx512", "avx512_vnni"))[0] == "avx512"
        assert native.variants(op, ("avx2", "avx512_vpopcntdq"))[0] == "avx2"
        every = ("avx2", "avx512", "avx512_vpopcntdq")
        assert native.variants(op, every) == ("avx512_vpopcntdq", "avx512", "avx2", "portable")


# Refusals: of the raw operations, which anyone may call with anything


WRONG_FOR_BOTH = [
    (by("x", Tensor.double), "x must be float32 or int8"),
    (by("x", Tensor.char), "int8 has 8 planes, got 2"),
    (by("w", Tensor.int), "w has the wrong dtype"),
    (by("w", lambda w: w[0]), "w must have 5 dimensions, got"),
    (by("w", lambda w: w[:-1]), r"w must be \[2, planes, \d, 2, 16\], got \[1, 2,"),
    (by("w", lambda w: w[:, :, :, :1].contiguous()), r"w must be .*, got \[2, 2, \d, 1, 16\]"),
    (by("w", lambda w: w[..., :15].contiguous()), r"w must be .*, 15\]"),
    (by("w", lambda w: w[:, :0]), "w may have 1 … 8 planes, got 0"),
    (by("w", lambda w: w[:, :1].repeat(1, 9, 1, 1, 1)), "w may have 1 … 8 planes, got 9"),
    (by("w", lambda w: w[:, :1]), "w must be contiguous"),
    (by("w_scale", Tensor.double), "w_scale has the wrong dtype"),
    (by("w_scale", lambda s: s[:1]), r"w_scale must be \[2, 32\], got \[1, 32\]"),
    (by("w_scale", lambda s: s[:, :20].contiguous()), r"w_scale must be \[2, 32\], got \[2, 20\]"),
    (by("w_scale", lambda s: s.T.contiguous().T), "w_scale must be contiguous"),
    (by("w_sums", lambda s: s[:-1]), r"w_sums must be \[\d+, 32\], got"),
    (by("w_sums", lambda s: s[:, :20].contiguous()), r"w_sums must be .*, 20\]"),
    (by("x_scale", Tensor.half), "x_scale has the wrong dtype"),
    (to(x_scale=torch.ones(0)), "x may have 1 … 8 planes, got 0"),
    (to(x_scale=torch.ones(9)), "x may have 1 … 8 planes, got 9"),
    (to(x_scale=torch.ones(1, 2)), "x_scale must have 1 dimensions"),
    (by("thresholds", Tensor.double), "thresholds has the wrong dtype"),
    (by("thresholds", lambda t: t[:2]), r"4 levels have thresholds \[3, 1 or \d+\], got \[2,"),
    (by("thresholds", lambda t: t[:, :5].contiguous()), r"4 levels have thresholds .*, 5\]"),
    (by("thresholds", lambda t: t[:, :0]), r"4 levels have thresholds .*, 0\]"),
    (by("thresholds", lambda t: t[0]), "thresholds must have 2 dimensions"),
    (by("pattern", Tensor.int), "pattern has the wrong dtype"),
    (to(pattern=torch.zeros(0, dtype=torch.uint8)), "x may have 1 … 16 levels, got 0"),
    (to(pattern=torch.zeros(17, dtype=torch.uint8)), "x may have 1 … 16 levels, got 17"),
    (to(out=40), "w must be"),
    (to(out=-16), "out must lie in 0 … 2\\*\\*30, got -16"),
    (to(out=2**63 - 1), "out must lie in 0"),
]


@needs_native
@pytest.mark.parametrize(
    ("change", "said"),
    [
        *WRONG_FOR_BOTH,
        (by("x", lambda x: x[0]), r"x must be contiguous and have 2 dimensions, got \[70\]"),
        (by("x", lambda x: x[:, ::2]), "x must be contiguous"),
        (to(x=torch.randn(3, 200)), r"w must be \[2, planes, 1, 4, 16\]"),
        (
            to(
                x=torch.zeros(0, 2**24 + 1), out=0, w=torch.zeros(0, 1, 1, 2**18 + 1, 16).long(),
                w_scale=torch.zeros(1, 0), w_sums=torch.zeros(2, 0),
            ),
            r"sums of at most 2\*\*24 products are exact, got 1 × 16777217",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_of_linear_layers(change: Change, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        torch.ops.taut.bitplane_matmul(**change(linear_arguments()))


@needs_native
@pytest.mark.parametrize(
    ("change", "said"),
    [
        *WRONG_FOR_BOTH,
        (by("x", lambda x: x[0]), r"x must have 4 dimensions, got \[140, 6, 7\]"),
        (by("x", lambda x: x[..., ::2]), "its channels, or its columns, side by side"),
        (to(x=torch.randn(2, 141, 6, 7)), "141 channels and 20 outputs do not fall into 2 groups"),
        (to(x=torch.randn(2, 280, 6, 7)), r"w must be \[2, planes, 9, 3, 16\]"),
        (to(out=19), "140 channels and 19 outputs do not fall into 2 groups"),
        (to(groups=0), "do not fall into 0 groups"),
        (to(groups=-2), "do not fall into -2 groups"),
        (to(groups=2**62, out=0, x=torch.zeros(1, 0, 3, 3)), "do not fall into"),
        (to(kernel=[3]), "kernel, stride, padding and dilation are pairs"),
        (to(stride=[1, 1, 1]), "kernel, stride, padding and dilation are pairs"),
        (to(padding=[]), "kernel, stride, padding and dilation are pairs"),
        (to(kernel=[0, 3]), "kernel, stride and dilation are at least 1, .* got 0"),
        (to(stride=[1, 0]), "are at least 1, .* got 0"),
        (to(dilation=[-1, 1]), "are at least 1, .* got -1"),
        (to(padding=[0, -1]), "padding at least 0; got -1"),
        (to(padding=[2**40, 0]), "got 1099511627776"),
        (to(stride=[2**63 - 1, 1]), "got 9223372036854775807"),
        (to(kernel=[9, 1]), r"w must be \[2, planes, 9, 2, 16\]|larger than the padded image"),
        (to(kernel=[1, 9], padding=[0, 0]), "the kernel is larger than the padded image"),
        (to(dilation=[4, 1]), "the kernel is larger than the padded image"),
        (to(kernel=[2**19, 2**19]), r"sums of at most 2\*\*24 products are exact"),
        (to(kernel=[2**12, 2**12]), r"2\*\*24 products are exact, got 16777216 × 70"),
        (to(padding=[2**20 - 1, 2**20 - 1]), "the padded image is too large"),
        (to(x=torch.empty_strided((0, 140, 2**40, 7), (1, 1, 1, 1))), "too large"),
        (to(x=torch.empty_strided((2**50, 140, 0, 7), (1, 1, 1, 1))), "too large"),
    ],
)
def test_wrong_arguments_of_convolutions(change: Change, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        torch.ops.taut.bitplane_conv2d(**change(conv_arguments()))


@needs_native
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (by("x", Tensor.double), "x has the wrong dtype"),
        (by("x", Tensor.char), "x has the wrong dtype"),
        (by("x", lambda x: x[0]), "x must have 2 dimensions"),
        (by("x", lambda x: x[:, ::2]), "x must be contiguous"),
        (to(x=torch.randn(3, 200)), r"w must be \[2, planes, 1, 4, 16\]"),
        (by("w", Tensor.int), "w has the wrong dtype"),
        (by("w", lambda w: w[0]), "w must have 5 dimensions"),
        (by("w", lambda w: w[:-1]), r"w must be \[2, planes, 1, 2, 16\], got \[1, 2,"),
        (by("w", lambda w: w[:, :0]), "w may have 1 … 8 planes, got 0"),
        (by("w", lambda w: w[:, :1].repeat(1, 9, 1, 1, 1)), "w may have 1 … 8 planes, got 9"),
        (by("w_scale", Tensor.half), "w_scale has the wrong dtype"),
        (by("w_scale", lambda s: s[:1]), r"w_scale must be \[2, 32\], got \[1, 32\]"),
        (to(out=40), "w must be"),
        (to(out=-5), "out must lie in 0 … 2\\*\\*30, got -5"),
        (to(out=2**63 - 1), "out must lie in 0"),
    ],
)
def test_wrong_arguments_of_floats(change: Change, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        torch.ops.taut.bitplane_real(**change(real_arguments()))


# Refusals: of the functions, to whom takes the wrong layer


@pytest.mark.parametrize(
    ("x", "weights", "levels", "said"),
    [
        (torch.randn(3, 41), packed(9, 40), Levels.sign(), "x has 41 channels, .* takes 40"),
        (torch.randn(3, 41), packed(9, 40), None, "x has 41 channels, and the weight takes 40"),
        (torch.tensor(1.0), packed(9, 1), None, "are not those of a linear layer"),
        (torch.randn(3, 4), packed(9, 4, 1, 1), None, "are not those of a linear layer"),
        (torch.randn(3, 4), packed(30, 8, groups=2), None, "are not those of a linear layer"),
        (torch.ones(3, 4).char(), packed(9, 4), Levels.sign(), "take floats, not torch.int8"),
        (torch.ones(3, 4).int(), packed(9, 4), Levels.sign(), "take floats, not torch.int32"),
        (torch.ones(3, 4), packed(9, 4), Levels.int8(), "take int8, not torch.float32"),
        (torch.ones(3, 4).char(), packed(9, 4), None, "without levels x must hold floats"),
        (
            torch.randn(3, 4), packed(9, 4), Levels.sign(torch.zeros(5)),
            "thresholds for 5 channels, and x has 4",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_linear_layer(x, weights, levels, said: str) -> None:
    with pytest.raises(ValueError, match="bitplane_matmul: .*" + said):
        bitplane_matmul(x, weights, levels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (to(x=torch.randn(2, 5, 6)), "must be .* and the weight have 4 dimensions"),
        (to(weights=packed(4, 5)), "must be .* and the weight have 4 dimensions"),
        (to(x=torch.randn(2, 5, 6, 7)), "x has 5 channels, and the weight takes 6"),
        (to(levels=Levels.int8()), "take int8, not torch.float32"),
        (to(x=torch.ones(2, 6, 6, 7).char()), "take floats, not torch.int8"),
        (to(levels=Levels.sign(torch.zeros(3))), "thresholds for 3 channels, and x has 6"),
        (to(stride=2), "stride must be two numbers of at least 1, got 2"),
        (to(stride=(1, 0)), "stride must be two numbers of at least 1"),
        (to(padding=(1,)), "padding must be two numbers of at least 0"),
        (to(padding=(1, -1)), "padding must be two numbers of at least 0"),
        (to(dilation=(0, 1)), "dilation must be two numbers of at least 1"),
    ],
)
def test_what_does_not_fit_a_convolution(change: Change, said: str) -> None:
    good: Arguments = {
        "x": torch.randn(2, 6, 6, 7), "weights": packed(4, 6, 3, 3, groups=2),
        "levels": Levels.sign(), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
    }  # fmt: skip
    with pytest.raises(ValueError, match="bitplane_conv2d: .*" + said):
        bitplane_conv2d(**change(good))  # type: ignore[arg-type]


def test_a_definition_stands_in_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []
    for kind in ("sign", "learned2", "int8", None):
        levels = levels_of(kind, 12) if kind else None
        x = activations(levels, 3, 12) if levels else torch.randn(3, 12)
        cases.append((x, packed(9, 12, planes=2), levels))
    native_y = [bitplane_matmul(*c) for c in cases]
    image, window = torch.randn(2, 6, 5, 5), packed(4, 6, 3, 3, groups=2)
    native_conv = bitplane_conv2d(image, window, Levels.sign(pad=1), padding=(1, 1))
    monkeypatch.setattr(native, "LOADED", False)
    for case, y in zip(cases, native_y, strict=True):
        torch.testing.assert_close(bitplane_matmul(*case), y)
    defined = bitplane_conv2d(image, window, Levels.sign(pad=1), padding=(1, 1))
    assert torch.equal(defined, native_conv)
    assert torch.equal(
        defined,
        reference.bitplane_conv2d(
            Levels.sign().decoded(image), window.dense(), 1.0, (1, 1), (1, 1), (1, 1), 2
        ),
    )
