"""The hash of hashed_matmul: that it stays what it is, and that it is a good one."""

import pytest
import torch
from torch import Tensor

from taut.kernels.hashed import HASH, RUNS
from taut.kernels.reference import hash_map, mix32

SHAPES = (((300, 784), 3675), ((10, 100), 125), ((300, 784), 4096), ((1024, 1000), 16001))


def mixed(v: int, between: int = 0) -> int:
    """mix32 of one number, in plain Python."""
    v = (v ^ v >> 16) * 0x7FEB352D % 2**32
    v = ((v ^ v >> 15) + between) % 2**32
    v = v * 0x846CA68B % 2**32
    return v ^ v >> 16


def drawn(o: int, i: int, buckets: int, seed: int, run: int) -> tuple[int, bool]:
    """The bucket of one weight and whether its sign is flipped, in plain Python."""

    def hashed(c: int) -> int:
        first = mixed((o + mixed(seed)) % 2**32)
        return mixed((c + first) % 2**32, mixed(o ^ mixed(seed ^ 0x9E3779B9)))

    span = 16 if run == 1 else run
    own = hashed(2**31 + i // 128 * 16 + i % 16) >> i % 128 // 16 * 4
    place = i % 16 + 16 * (own >> 1 & 3) if run == 1 else i % run
    return ((hashed(i // span) * buckets >> 32) + place) % buckets, bool(own >> 3 & 1)


def test_it_never_changes() -> None:
    assert HASH == "mix32.v1"
    numbers = torch.tensor([0, 1, 2, 0xFFFFFFFF, 0x12345678])
    assert mix32(numbers).tolist() == [0, 1753845952, 3507691905, 1734902346, 4125564054]
    golden = {
        1: ([749, 734, 764, 307, 936, 229, 36, 24], 8187670),
        4: ([701, 702, 795, 888, 344, 838, 565, 988], 10030495),
        16: ([701, 702, 716, 307, 888, 197, 988, 992], 8918182),
        64: ([701, 702, 716, 717, 307, 370, 269, 273], 5921575),
    }
    for run in RUNS:
        index, minus = hash_map((2, 133), 1000, 7, run)
        some = index[1, [0, 1, 15, 16, 64, 127, 128, 132]].tolist()
        assert (some, int((index * torch.arange(1, 134)).sum())) == golden[run]
        assert "".join(str(int(m)) for m in minus[1, :24]) == "011101111111100101110000"
        assert int(minus.sum()) == 140
    index, minus = hash_map((3, 5), 2**31 - 1, 2**32 - 1)
    assert index[2].tolist() == [1755904797, 1755904782, 1755904751, 1755904784, 1755904769]
    assert minus[2].tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("run", RUNS)
def test_it_is_what_plain_integers_give(run: int) -> None:
    for buckets, seed in ((1000, 0), (7, 2**32 - 1), (2**31 - 1, 12345)):
        index, minus = hash_map((5, 260), buckets, seed, run)
        for o in range(5):
            for i in range(0, 260, 7):
                assert (int(index[o, i]), bool(minus[o, i])) == drawn(o, i, buckets, seed, run)


def deviation(hits: Tensor, chance: float) -> float:
    """By how many standard deviations a share of independent hits is off its chance."""
    expected = hits.numel() * chance
    return abs(float(hits.sum()) - expected) / (expected * (1 - chance)) ** 0.5


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two rows of numbers, in standard deviations of what independent ones would show."""
    pair = torch.stack((a.flatten().double(), b.flatten().double()))
    return float(torch.corrcoef(pair)[0, 1].abs()) * a.numel() ** 0.5


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("shape", "buckets"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_all_buckets_are_drawn_alike(
    shape: tuple[int, int], buckets: int, run: int, seed: int
) -> None:
    index, _ = hash_map(shape, buckets, seed, run)
    span = 16 if run == 1 else run
    for each, neighbours in ((index[:, ::span], 1), (index, 32 if run == 1 else run)):
        load = torch.bincount(each.flatten(), minlength=buckets).double()
        expected = each.numel() / buckets
        chi_square = float(((load - expected) ** 2).sum() / expected)
        # Weights of one start are drawn together, so that neighbours' loads go together.
        spread = (2 * neighbours / (buckets - 1)) ** 0.5
        assert abs(chi_square / (buckets - 1) - 1) < 5 * spread + neighbours / buckets


@pytest.mark.parametrize(("shape", "buckets"), SHAPES)
def test_signs_are_balanced_and_know_nothing(shape: tuple[int, int], buckets: int) -> None:
    index, minus = hash_map(shape, buckets, 3)
    assert deviation(minus, 0.5) < 5
    assert correlation(minus, index) < 5
    for by in (1, 2, 16):
        assert deviation(minus[:, by:] ^ minus[:, :-by], 0.5) < 5
        if by < len(minus):
            assert deviation(minus[by:] ^ minus[:-by], 0.5) < 5
    for bit in range((buckets - 1).bit_length()):
        assert correlation(minus, index >> bit & 1) < 5
    # Those of one bucket cancel: the sum of the squared sums is the number of weights.
    sign = 1 - 2 * minus.double().flatten()
    sums = torch.zeros(buckets, dtype=torch.float64).index_add_(0, index.flatten(), sign)
    assert abs(float(sums.square().sum()) / minus.numel() - 1) < 5 * (2 / buckets) ** 0.5


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("shape", "buckets"), SHAPES)
def test_neighbours_know_nothing_of_each_other(
    shape: tuple[int, int], buckets: int, run: int
) -> None:
    index, _ = hash_map(shape, buckets, 4, run)
    start = index[:, :: 16 if run == 1 else run]
    assert correlation(start[1:], start[:-1]) < 5
    if start.shape[1] > 2:
        assert correlation(start[:, 1:], start[:, :-1]) < 5
    if run == 1:  # the choice between four places
        choice = (index[:, 1:] - index[:, :-1] - 1) % buckets
        choice = choice[:, torch.arange(1, shape[1]) % 16 > 0]  # of the same start
        chances = {0: 4 / 16, 16: 3 / 16, 32: 2 / 16, 48: 1 / 16}
        for step, chance in chances.items():
            assert deviation(choice == step, chance) < 6
            assert deviation(choice == (-step) % buckets, chance) < 6


@pytest.mark.parametrize(("shape", "buckets"), SHAPES[1:])
def test_weights_of_a_row_meet_no_more_often_than_anywhere(
    shape: tuple[int, int], buckets: int
) -> None:
    index, _ = hash_map(shape, buckets, 5)
    load = torch.zeros(shape[0], buckets).scatter_add_(1, index, torch.ones(shape))
    pairs = float((load * (load - 1) / 2).sum())
    expected = shape[0] * shape[1] * (shape[1] - 16) / 2 / buckets  # none of one start
    assert pairs < 1.05 * expected + 5 * expected**0.5


@pytest.mark.parametrize("run", RUNS)
def test_seeds_give_other_maps(run: int) -> None:
    shape, buckets = (300, 784), 3675
    span, found = 16 if run == 1 else run, []
    for seed in (0, 1, 2, 2**31, 2**32 - 1):
        index, minus = hash_map(shape, buckets, seed, run)
        start = index[:, ::span]
        for other, others in found:
            assert deviation(minus ^ others, 0.5) < 5
            assert deviation(start == other, 1 / buckets) < 8  # about one does
            for by in (1, 2):  # nor is one the other, moved by some rows
                assert deviation(start[by:] == other[:-by], 1 / buckets) < 8
                assert deviation(start[:-by] == other[by:], 1 / buckets) < 8
        found.append((start, minus))


def test_a_large_layer_is_covered_evenly() -> None:
    index, minus = hash_map((4096, 4096), 2**18, 6)
    load = torch.bincount(index.flatten(), minlength=2**18).double()
    assert abs(float((load - 64).square().mean()) / 64 - 1) < 0.05
    assert deviation(minus, 0.5) < 5
