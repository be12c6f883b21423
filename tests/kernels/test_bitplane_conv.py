"""bitplane_conv2d against its definition: windows, borders, groups, layouts."""

import pytest
import torch

from taut.kernels import BitWeights, Levels, bitplane_conv2d, native, reference

from .bitplane_cases import KINDS, activations, assert_conv, levels_of, packed

LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_definition(
    variant: tuple[str, ...], kind: str, layout: torch.memory_format
) -> None:
    for planes, out, channels, height, width in (
        (1, 5, 3, 7, 9), (2, 16, 64, 8, 8), (3, 17, 65, 5, 17), (4, 33, 130, 4, 6),
        (1, 65, 63, 6, 5),
    ):  # fmt: skip
        levels = levels_of(kind, channels)
        x = activations(levels, 2, channels, height, width).to(memory_format=layout)
        assert_conv(x, packed(out, channels, 3, 3, planes=planes), levels, padding=(1, 1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["sign", "learned3", "int8"])
def test_every_size_of_image(
    variant: tuple[str, ...], kind: str, layout: torch.memory_format
) -> None:
    levels = levels_of(kind, 5)
    weights = packed(17, 5, 3, 3, planes=2)
    for width in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65):  # 16 pixels at a time, 64 a piece
        x = activations(levels, 1, 5, 3, width).to(memory_format=layout)
        assert_conv(x, weights, levels, padding=(1, 1))
        assert_conv(x.transpose(2, 3), weights, levels, padding=(1, 1))


@pytest.mark.parametrize("pad", [0.0, 1.0, -1.0, 0.5])
@pytest.mark.parametrize("kind", ["sign", "uniform2", "uniform4", "learned3", "ternary", "int8"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((1, 1), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 3), (1, 1), (2, 2), (2, 2)),
        ((1, 5), (1, 2), (0, 4), (1, 2)),
        ((5, 2), (3, 1), (4, 0), (1, 3)),
        ((2, 4), (2, 3), (1, 5), (3, 1)),
        ((7, 9), (1, 1), (6, 8), (1, 1)),  # some windows see one pixel
        ((3, 3), (1, 1), (5, 5), (1, 1)),  # and some none
    ],
)
def test_windows_and_borders(kind: str, pad: float, kernel, stride, padding, dilation) -> None:
    levels = levels_of(kind, 6)
    levels = Levels(
        thresholds=levels.thresholds, pattern=levels.pattern, scale=levels.scale,
        offset=levels.offset, pad=pad, takes_int8=levels.takes_int8,
    )  # fmt: skip
    x = activations(levels, 2, 6, 8, 11)
    assert_conv(x, packed(18, 6, *kernel, planes=2), levels, stride, padding, dilation)


@pytest.mark.parametrize("pad", [0.0, 1.0])
def test_windows_in_every_variant(variant: tuple[str, ...], pad: float) -> None:
    for height, width in ((1, 1), (2, 1), (3, 7), (11, 5)):
        for groups in (1, 2):
            levels = levels_of("uniform3", 34, pad)
            x = activations(levels, 3, 34, height, width)
            weights = packed(34, 34, 3, 3, planes=2, groups=groups)
            assert_conv(x, weights, levels, (2, 1), (2, 3), (1, 2))


def test_a_small_image_in_a_wide_border(variant: tuple[str, ...]) -> None:
    for kind, pad in (("sign", 0.0), ("sign", -1.0), ("uniform2", 0.5), ("int8", 0.0)):
        levels = levels_of(kind, 3, pad)
        for size in ((1, 1), (2, 1), (1, 2), (0, 0), (3, 0), (0, 3)):  # the last: only border
            x = activations(levels, 2, 3, *size)
            assert_conv(x, packed(5, 3, 5, 5), levels, padding=(3, 3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kind", ["sign", "signs", "uniform3", "learned2", "int8"])
@pytest.mark.parametrize(
    ("channels", "groups", "out"),
    [(6, 2, 10), (9, 9, 9), (9, 9, 27), (70, 70, 70), (68, 4, 132), (130, 2, 64), (192, 3, 51)],
)
def test_groups(
    variant: tuple[str, ...], channels: int, groups: int, out: int, kind: str,
    layout: torch.memory_format,
) -> None:  # fmt: skip
    levels = levels_of(kind, channels, 0.0 if kind == "int8" else 1.0)
    x = activations(levels, 2, channels, 5, 6).to(memory_format=layout)
    weights = packed(out, channels, 3, 3, planes=2, groups=groups)
    assert_conv(x, weights, levels, padding=(1, 1))


@pytest.mark.parametrize("kind", ["sign", "signs", "learned2", "int8"])
def test_inputs_may_be_slices_and_views(variant: tuple[str, ...], kind: str) -> None:
    levels, weights = levels_of(kind, 20, 0.0), packed(9, 20, 3, 3, planes=2)
    whole = activations(levels, 4, 43, 19, 21)
    last = whole.to(memory_format=torch.channels_last)
    for x in (whole, last):
        for view in (
            x[:, 3:23], x[1:3, 20:40, 1:-1, 2:-3], x[::2, :20], x[:, 1:41:2], x[:, :20, ::2],
            x[:, :20, :, ::3], x[:, :20].transpose(2, 3), x[:1, :20].expand(3, 20, 19, 21),
            x[:, :20, :, :1].expand(4, 20, 19, 5), x[:, :1].expand(4, 20, 19, 21),
        ):  # fmt: skip
            assert_conv(view, weights, levels, padding=(1, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_narrow_and_wide_floats(variant: tuple[str, ...], dtype: torch.dtype) -> None:
    levels, weights = levels_of("learned2", 7), packed(9, 7, 3, 3)
    x = torch.randn(2, 7, 5, 6).to(dtype)
    y = bitplane_conv2d(x, weights, levels, padding=(1, 1))
    assert y.dtype is dtype
    wanted = bitplane_conv2d(x.float(), weights, levels, padding=(1, 1)).to(dtype)
    assert torch.equal(y, wanted)


def test_what_is_no_number_reaches_no_threshold(variant: tuple[str, ...]) -> None:
    nan, inf = float("nan"), float("inf")
    for layout in LAYOUTS:
        x = torch.randn(2, 70, 5, 18)
        for value in (nan, inf, -inf):
            x[torch.rand_like(x) < 0.2] = value
        for kind in ("sign", "signs", "learned3"):
            levels = levels_of(kind, 70, -1.0)
            assert_conv(x.to(memory_format=layout), packed(17, 70, 3, 3), levels, padding=(1, 1))


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)])
@pytest.mark.parametrize("out", [0, 4])
@pytest.mark.parametrize("kind", ["sign", "uniform2", "int8"])
def test_nothing_in_gives_nothing_out(
    variant: tuple[str, ...], kind: str, out: int, shape: tuple[int, ...]
) -> None:
    levels = levels_of(kind, shape[1])
    weights = packed(out, shape[1], 3, 3, planes=2)
    y = bitplane_conv2d(activations(levels, *shape), weights, levels, padding=(1, 1))
    assert torch.equal(y, torch.zeros(shape[0], out, 5, 5))


def test_scales_that_round(variant: tuple[str, ...]) -> None:
    weights = BitWeights.pack(torch.rand(33, 2, 40, 3, 3) < 0.5, torch.rand(33, 2) + 0.5)
    levels = Levels(
        thresholds=torch.randn(3, 40).sort(0).values, pattern=torch.randperm(4).to(torch.uint8),
        scale=torch.rand(2) + 0.5, offset=0.123, pad=0.77,
    )  # fmt: skip
    x = torch.randn(2, 40, 7, 9)
    decoded, dense = levels.decoded(x).double(), weights.dense().double()
    window = ((1, 1), (1, 1), (1, 1), 1)
    wanted = reference.bitplane_conv2d(decoded, dense, levels.pad, *window)
    most = reference.bitplane_conv2d(decoded.abs(), dense.abs(), levels.pad, *window).max()
    y = bitplane_conv2d(x, weights, levels, padding=(1, 1))
    assert (y - wanted).abs().max() <= 1e-6 * most


@pytest.mark.parametrize("kind", ["sign", "int8"])
def test_a_batch_of_more_bits_than_are_kept_at_once(variant: tuple[str, ...], kind: str) -> None:
    levels = levels_of(kind, 64)  # depthwise: a word for each channel of each pixel
    planes = len(levels.scale)
    side = 92 if planes == 1 else 30
    weights = packed(64, 64, 3, 3, groups=64)
    for layout in LAYOUTS:
        x = activations(levels, 7, 64, side, side).to(memory_format=layout)
        assert x.numel() * planes > 1 << 21
        y = bitplane_conv2d(x, weights, levels, (2, 2), (1, 1))
        each = [bitplane_conv2d(x[n : n + 1], weights, levels, (2, 2), (1, 1)) for n in range(7)]
        assert torch.equal(y, torch.cat(each))
    assert_conv(x[:2, :, :9, :9], weights, levels, (2, 2), (1, 1))


@pytest.mark.parametrize("kind", ["sign", "learned3", "int8"])
@pytest.mark.parametrize("groups", [1, 2])
def test_threads_change_nothing(kind: str, groups: int) -> None:
    before = torch.get_num_threads()
    bits, scale = torch.rand(70, 2, 60 // groups, 3, 3) < 0.5, torch.rand(70, 2)
    weights, levels = BitWeights.pack(bits, scale, groups), levels_of(kind, 60)
    x = activations(levels, 3, 60, 20, 30)
    try:
        torch.set_num_threads(1)
        alone = bitplane_conv2d(x, weights, levels, padding=(2, 2))
        torch.set_num_threads(2)
        for _ in range(3):
            assert torch.equal(bitplane_conv2d(x, weights, levels, padding=(2, 2)), alone)
    finally:
        torch.set_num_threads(before)


def test_variants_agree_to_the_last_bit(variant: tuple[str, ...]) -> None:
    weights = BitWeights.pack(torch.rand(33, 3, 20, 3, 3) < 0.5, torch.rand(33, 3))
    levels = Levels.uniform(3, 0.37, -0.9, pad=0.3)
    x = torch.randn(2, 20, 9, 8)
    y = bitplane_conv2d(x, weights, levels, padding=(1, 1))
    with native.restricted(()):
        assert torch.equal(bitplane_conv2d(x, weights, levels, padding=(1, 1)), y)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_the_outputs_channels_lie_last(layout: torch.memory_format) -> None:
    x = torch.randn(2, 5, 6, 7).to(memory_format=layout)
    y = bitplane_conv2d(x, packed(8, 5, 3, 3), Levels.sign())
    if native.LOADED:
        assert y.is_contiguous(memory_format=torch.channels_last)
