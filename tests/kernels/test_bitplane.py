"""bitplane_matmul against its definition: levels, packed weights, linear layers."""

import math

import pytest
import torch

from taut.kernels import BitWeights, Levels, bitplane_matmul, native, reference

from .bitplane_cases import KINDS, activations, assert_linear, levels_of, packed
from .conftest import assert_as_exact_as_torch

INF, NAN = float("inf"), float("nan")


def random_weights(out: int, planes: int, channels: int) -> BitWeights:
    """Scales that round."""
    return BitWeights.pack(torch.rand(out, planes, channels) < 0.5, torch.rand(out, planes) + 0.5)


# What levels stand for


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "int8"])
def test_levels_decode_as_they_say(kind: str) -> None:
    levels = levels_of(kind, 3)
    x = activations(levels, 40, 3)
    got = levels.decoded(x)
    thresholds = levels.thresholds.expand(-1, 3)
    for n in range(40):
        for c in range(3):
            reached = sum(float(x[n, c]) >= float(t) for t in thresholds[:, c])
            bits = int(levels.pattern[reached])
            value = levels.offset + sum(
                float(s) if bits >> q & 1 else -float(s) for q, s in enumerate(levels.scale)
            )
            assert float(got[n, c]) == value


def test_int8_stands_for_itself() -> None:
    levels = Levels.int8()
    x = torch.arange(-128, 128).to(torch.int8)[None]
    assert torch.equal(levels.decoded(x), x.float())
    bits = x[..., None].long() >> torch.arange(8) & 1
    of_bits = levels.offset + ((2.0 * bits - 1) * levels.scale).sum(-1)
    assert torch.equal(of_bits, x.float())
    assert levels.lowest == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("zero_point", [0, 1])
def test_uniform_levels_are_those_of_fake_quantization(bits: int, zero_point: int) -> None:
    step, most = 0.3, 2**bits - 1
    levels = Levels.uniform(bits, step, -zero_point * step)
    x = torch.linspace(-3, 6, 4001)
    x = x[((x / step - 0.5) - (x / step - 0.5).round()).abs() > 1e-3]  # away from ties
    wanted = torch.fake_quantize_per_tensor_affine(x, step, zero_point, 0, most)
    torch.testing.assert_close(levels.decoded(x[None])[0], wanted, rtol=1e-6, atol=1e-6)
    assert levels.lowest == pytest.approx(-zero_point * step, abs=1e-6)


def test_sign_is_plus_one_from_the_threshold_on() -> None:
    x = torch.tensor([[-INF, -1.0, -0.0, 0.0, 1e-30, 1.0, INF, NAN]])
    wanted = torch.tensor([[-1.0, -1, 1, 1, 1, 1, 1, -1]])
    assert torch.equal(Levels.sign().decoded(x), wanted)
    each = Levels.sign(torch.tensor([-INF, -1.0, 1, INF, 0, 0.5, INF, 0]))
    assert torch.equal(each.decoded(x), torch.tensor([[1.0, 1, -1, -1, 1, 1, 1, -1]]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pattern": torch.zeros(0, dtype=torch.uint8)}, "at most 16 levels of 8 planes, got 0"),
        ({"pattern": torch.zeros(17, dtype=torch.uint8)}, "got 17 of 2"),
        ({"scale": torch.ones(9)}, "got 4 of 9"),
        ({"thresholds": torch.zeros(2, 1)}, r"thresholds must be \[3, 1 or channels\], got \[2, 1"),
        ({"thresholds": torch.zeros(3)}, r"got \[3\]"),
        ({"thresholds": torch.tensor([[0.0], [2.0], [1.0]])}, "thresholds must rise"),
        ({"thresholds": torch.tensor([[NAN], [2.0], [3.0]])}, "thresholds must rise"),
        ({"thresholds": torch.arange(3.0).double()[:, None]}, "have the dtypes"),
        ({"pattern": torch.arange(4)}, "have the dtypes"),
        ({"scale": torch.ones(2).half()}, "have the dtypes"),
    ],
)
def test_levels_that_are_none_are_refused(change: dict, said: str) -> None:
    good = {
        "thresholds": torch.arange(3.0)[:, None], "pattern": torch.arange(4, dtype=torch.uint8),
        "scale": torch.tensor([0.5, 1.0]),
    }  # fmt: skip
    Levels(**good)
    with pytest.raises(ValueError, match=said):
        Levels(**{**good, **change})


@pytest.mark.parametrize("bits", [0, 5])
def test_uniform_levels_have_one_to_four_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must lie in 1 … 4, got {bits}"):
        Levels.uniform(bits, 1.0)


# Packed weights


@pytest.mark.parametrize("planes", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1), 1), ((15, 63), 1), ((16, 64), 1), ((17, 65), 1), ((40, 130), 1),
        ((20, 70, 3, 2), 1), ((34, 5, 1, 3), 2), ((9, 1, 3, 3), 9), ((0, 5), 1), ((5, 0), 1),
        ((0, 2, 3, 3), 1), ((4, 0, 3, 3), 2),
    ],
)  # fmt: skip
def test_weights_pack_and_come_back(planes: int, shape: tuple[int, ...], groups: int) -> None:
    out, *rest = shape
    bits = torch.rand(out, planes, *rest) < 0.5
    scale = torch.randint(1, 9, (out, planes)).float()
    weights = BitWeights.pack(bits, scale, groups)
    ones = [1] * len(rest)
    wanted = ((2.0 * bits - 1) * scale.reshape(out, planes, *ones)).sum(1)
    dense = weights.dense()
    assert dense.shape == wanted.shape
    assert torch.equal(dense, wanted)
    each = -(-(out // groups) // 16) * 16
    taps = math.prod(rest[1:])
    assert weights.bits.numel() == groups * each * planes * taps * -(-rest[0] // 64)
    sums = weights.sums.reshape(taps + 1, groups, each)[:, :, : out // groups]
    sums = sums.reshape(taps + 1, out)
    by_tap = wanted.reshape(out, rest[0], taps).sum(1)
    assert torch.equal(sums, torch.cat([by_tap, by_tap.sum(1, keepdim=True)], 1).T)


@pytest.mark.parametrize(
    ("bits", "scale", "groups", "said"),
    [
        (torch.ones(4, 1, 5), torch.ones(4, 1), 1, r"must be .* bool, got \[4, 1, 5\] torch.float"),
        (torch.ones(4, 5) > 0, torch.ones(4, 1), 1, r"must be .* bool, got \[4, 5\] torch.bool"),
        (torch.ones(4, 0, 5) > 0, torch.ones(4, 0), 1, "1 … 8 planes, got 0"),
        (torch.ones(4, 9, 5) > 0, torch.ones(4, 9), 1, "1 … 8 planes, got 9"),
        (torch.ones(4, 2, 5) > 0, torch.ones(4, 1), 1, r"scale must be \[4, 2\], got \[4, 1\]"),
        (torch.ones(4, 2, 5) > 0, torch.ones(4, 2), 3, "4 outputs do not fall into 3 groups"),
        (torch.ones(4, 2, 5) > 0, torch.ones(4, 2), 0, "4 outputs do not fall into 0 groups"),
    ],
)
def test_weights_that_are_none_are_refused(bits, scale, groups: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BitWeights.pack(bits, scale, groups)


# Bits times bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_it_is_the_definition(variant: tuple[str, ...], planes: int, kind: str) -> None:
    for out, channels, batch in (
        (1, 1, 1), (15, 63, 2), (16, 64, 3), (17, 65, 5), (33, 127, 6), (48, 129, 7), (31, 200, 13),
    ):  # fmt: skip
        levels = levels_of(kind, channels)
        weights = packed(out, channels, planes=planes)
        assert_linear(activations(levels, batch, channels), weights, levels)


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 513])
def test_every_width(variant: tuple[str, ...], channels: int) -> None:
    for kind in ("sign", "signs", "learned3", "int8"):
        levels = levels_of(kind, channels)
        assert_linear(activations(levels, 3, channels), packed(18, channels, planes=2), levels)


def test_every_batch_and_height(variant: tuple[str, ...]) -> None:
    for batch in range(1, 15):
        for out in (1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65):
            levels = levels_of("learned2", 70)
            assert_linear(activations(levels, batch, 70), packed(out, 70, planes=2), levels)
    for batch in (63, 64, 65, 129):  # samples are packed in pieces of 64
        for kind in ("sign", "int8"):
            levels = levels_of(kind, 70)
            assert_linear(activations(levels, batch, 70), packed(17, 70), levels)


def test_eight_planes_of_each(variant: tuple[str, ...]) -> None:
    weights = BitWeights.pack(torch.rand(20, 8, 70) < 0.5, 2.0 ** torch.arange(8).expand(20, 8))
    levels = Levels.int8()
    assert_linear(activations(levels, 9, 70), weights, levels)
    levels = Levels(
        thresholds=torch.arange(-7.0, 8.0)[:, None] / 4,
        pattern=torch.randint(0, 256, (16,), dtype=torch.uint8),
        scale=torch.tensor([1.0, 2, 3, 4, 5, 6, 7, -8]),
        offset=-2.0,
    )
    assert_linear(activations(levels, 9, 70), weights, levels)


def test_levels_may_share_bits_or_be_one(variant: tuple[str, ...]) -> None:
    for pattern in ([1, 1], [1, 0], [1, 0, 0, 1, 1]):
        count = len(pattern)
        levels = Levels(
            thresholds=torch.linspace(-1, 1, count - 1)[:, None],
            pattern=torch.tensor(pattern, dtype=torch.uint8),
            scale=torch.ones(1),
        )
        assert_linear(activations(levels, 5, 70), packed(17, 70), levels)
    one = Levels(
        thresholds=torch.zeros(0, 1), pattern=torch.ones(1, dtype=torch.uint8), scale=torch.ones(1)
    )
    assert_linear(activations(one, 5, 70), packed(17, 70), one)


def test_scales_that_round(variant: tuple[str, ...]) -> None:
    for planes in (1, 2, 3):
        weights = random_weights(33, planes, 300)
        levels = Levels(
            thresholds=torch.randn(7, 300).sort(0).values,
            pattern=torch.randperm(8).to(torch.uint8),
            scale=torch.rand(3) + 0.5,
            offset=0.123,
        )
        x = torch.randn(11, 300)
        decoded, dense = levels.decoded(x).double(), weights.dense().double()
        y = bitplane_matmul(x, weights, levels)
        most = (decoded.abs() @ dense.abs().T).max()
        assert (y - decoded @ dense.T).abs().max() <= 1e-6 * most


@pytest.mark.parametrize("kind", ["sign", "signs", "learned3"])
def test_what_is_no_number_reaches_no_threshold(variant: tuple[str, ...], kind: str) -> None:
    x = torch.randn(9, 130)
    x[torch.rand(9, 130) < 0.2] = NAN
    x[torch.rand(9, 130) < 0.2] = INF
    x[torch.rand(9, 130) < 0.2] = -INF
    levels = levels_of(kind, 130)
    assert_linear(x, packed(20, 130, planes=2), levels)
    nothing = torch.full((1, 130), NAN)
    assert torch.equal(levels.decoded(nothing), levels.decoded(torch.full((1, 130), -INF)))


def test_sums_of_many_products_are_exact(variant: tuple[str, ...]) -> None:
    channels = 70_001
    bits = torch.rand(17, 1, channels) < 0.5
    bits[0], bits[1] = True, False
    x = torch.randn(2, channels)
    x[1] = 1
    weights = BitWeights.pack(bits, torch.ones(17, 1))
    assert_linear(x, weights, Levels.sign())
    y = bitplane_matmul(x, weights, Levels.sign())
    assert y[1, :2].tolist() == [channels, -channels]


@pytest.mark.parametrize("kind", ["sign", "learned3", "int8"])
def test_threads_change_nothing(kind: str) -> None:
    before = torch.get_num_threads()
    weights = random_weights(200, 2, 300)
    levels = levels_of(kind, 300)
    x = activations(levels, 150, 300)
    try:
        torch.set_num_threads(1)
        alone = bitplane_matmul(x, weights, levels)
        torch.set_num_threads(2)
        for _ in range(3):
            assert torch.equal(bitplane_matmul(x, weights, levels), alone)
    finally:
        torch.set_num_threads(before)


def test_variants_agree_to_the_last_bit(variant: tuple[str, ...]) -> None:
    weights = random_weights(33, 3, 200)
    levels = Levels.uniform(3, 0.37, -0.9)
    x = torch.randn(7, 200)
    y = bitplane_matmul(x, weights, levels)
    with native.restricted(()):
        assert torch.equal(bitplane_matmul(x, weights, levels), y)


@pytest.mark.parametrize("kind", ["sign", "signs", "uniform2", "int8", None])
@pytest.mark.parametrize(("out", "channels", "batch"), [(0, 5, 2), (4, 0, 2), (4, 5, 0), (0, 0, 0)])
def test_nothing_in_gives_nothing_out(
    variant: tuple[str, ...], kind: str | None, out: int, channels: int, batch: int
) -> None:
    levels = levels_of(kind, channels) if kind else None
    x = activations(levels, batch, channels) if levels else torch.randn(batch, channels)
    y = bitplane_matmul(x, packed(out, channels, planes=2), levels)
    assert torch.equal(y, torch.zeros(batch, out))


def test_inputs_may_be_strided_unaligned_or_narrow(variant: tuple[str, ...]) -> None:
    weights, levels = packed(9, 130, planes=2), levels_of("learned2", 130)
    wide = torch.randn(3, 5, 261)
    views = (wide[..., 1:131], wide[..., ::2][..., :130], wide.transpose(0, 1)[..., :130])
    for x in (*views, wide[0, 0, :130], wide[:1, :1, :130].expand(4, 2, 130)):
        defined = reference.bitplane_matmul(
            levels.decoded(x.reshape(-1, 130)), weights.dense()
        ).reshape(*x.shape[:-1], 9)
        assert torch.equal(bitplane_matmul(x, weights, levels), defined)
        torch.testing.assert_close(
            bitplane_matmul(x, weights), reference.bitplane_matmul(x, weights.dense()),
            rtol=1e-5, atol=1e-4,
        )  # fmt: skip
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = wide[0, :, :130].to(dtype)
        y = bitplane_matmul(x, weights, levels)
        assert y.dtype is dtype
        assert torch.equal(y, bitplane_matmul(x.float(), weights, levels).to(dtype))
        real = bitplane_matmul(x, weights)
        assert real.dtype is dtype
        torch.testing.assert_close(real, (x.double() @ weights.dense().double().T).to(dtype))


# Floats times bits


@pytest.mark.parametrize("planes", [1, 2, 3, 4, 8])
def test_floats_meet_bit_weights(variant: tuple[str, ...], planes: int) -> None:
    for out, channels, batch in (
        (1, 1, 1), (15, 63, 2), (16, 64, 3), (17, 65, 4), (33, 127, 5), (31, 129, 13), (32, 600, 6),
    ):  # fmt: skip
        weights = random_weights(out, planes, channels)
        x = torch.randn(batch, channels)
        # In float32 a weight of several planes is itself a rounded sum: a few planes may add to it.
        times = 2.0 if planes == 1 else 2.0 + planes
        assert_as_exact_as_torch(bitplane_matmul(x, weights), x, weights.dense(), times=times)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_ternary_weights_are_two_equal_planes(variant: tuple[str, ...], batch: int) -> None:
    ternary = torch.randint(-1, 2, (35, 200)).float()
    scale = torch.rand(35, 1) + 0.5
    bits = torch.stack([ternary > 0, ternary >= 0], 1)
    weights = BitWeights.pack(bits, (scale / 2).expand(35, 2))
    assert torch.equal(weights.dense(), ternary * scale)
    x = torch.randn(batch, 200)
    assert_as_exact_as_torch(bitplane_matmul(x, weights), x, ternary * scale)


@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("planes", [1, 2])
def test_what_is_no_number_passes_through_floats(
    variant: tuple[str, ...], batch: int, planes: int
) -> None:
    weights = packed(20, 130, planes=planes)
    x = torch.randn(batch, 130)
    x[0, 129] = INF
    y, wanted = bitplane_matmul(x, weights), reference.bitplane_matmul(x, weights.dense())
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4, equal_nan=True)
    x[0, 3] = NAN
    y = bitplane_matmul(x, weights)
    assert bool(y[0].isnan().all())
    assert bool(y[1:].isfinite().all())


def test_floats_and_threads(threads: int) -> None:
    weights = random_weights(300, 2, 500)
    for batch in (1, 40):
        x = torch.randn(batch, 500)
        assert_as_exact_as_torch(bitplane_matmul(x, weights), x, weights.dense(), times=4.0)
