"""Entropy coding: what is read is what was written, at the size that was accounted for."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from taut.coding import (
    _FIRST_BLOCK,
    _PRIORS,
    Coder,
    Decoder,
    Encoder,
    Estimator,
    Ints,
    PartSize,
    huffman_bits,
)
from taut.errors import FormatError


def block_ends() -> Iterator[int]:
    """Where the blocks of `symbols` end."""
    end = _FIRST_BLOCK
    while True:
        yield end
        end += max(_FIRST_BLOCK, end // 8)


COUNTS = sorted({0, 1, 2, *(e + d for e in islice(block_ends(), 14) for d in (-1, 0, 1)), 1000})
INT64 = np.iinfo(np.int64)
EDGES = (0, 1, -1, 2, 2**31, 2**62 - 1, 2**62, -(2**62), -(2**62) - 1, INT64.max, INT64.min)

Code = Callable[[Coder, bool], Any]
"""Codes something into or out of a coder: pass the values, or None where the bool is False."""


def there_and_back(code: Code) -> tuple[Any, dict[str, PartSize], bytes]:
    """What comes back, what its parts took, and the bytes; all accounts must agree exactly."""
    encoder, estimator = Encoder(), Estimator()
    code(encoder, True)
    code(estimator, True)
    data = encoder.finish()
    decoder = Decoder(data)
    out = code(decoder, False)
    decoder.finish()
    assert encoder.parts == decoder.parts
    assert encoder.parts == estimator.parts
    accounted = sum(p.bits for p in encoder.parts.values()) / 8
    assert abs(len(data) - accounted) <= 0.01 * accounted + 8
    return out, encoder.parts, data


def symbols_of(values: Ints, size: int) -> Code:
    return lambda c, has: c.symbols("s", values if has else None, size, len(values))


def bitmap_of(mask: Ints) -> Code:
    return lambda c, has: c.bitmap("m", mask if has else None, *mask.shape)


def integers_of(values: Ints) -> Code:
    return lambda c, has: c.integers("i", values if has else None, len(values))


def plain_of(data: np.ndarray, width: int) -> Code:
    count = data.size // width
    return lambda c, has: c.plain("p", data if has else None, width, count)


def ints(elements: st.SearchStrategy[int], most: int) -> st.SearchStrategy[Ints]:
    return arrays.arrays(np.int64, st.integers(0, most), elements=elements)


def bits_of(code: Code) -> float:
    estimator = Estimator()
    code(estimator, True)
    return sum(p.bits for p in estimator.parts.values())


# ---- symbols --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", [1, 2, 3, 31, 255, 256])
def test_symbols_come_back(count: int, size: int) -> None:
    values = np.random.default_rng(count).integers(0, size, count)
    out, parts, _ = there_and_back(symbols_of(values, size))
    assert out.tolist() == values.tolist()
    assert parts["s"].count == count
    if size == 1:
        assert parts["s"].bits == 0


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_symbols_come_back(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 256))
    values = data.draw(
        arrays.arrays(np.int64, st.integers(0, 300), elements=st.integers(0, size - 1))
    )
    out, _, _ = there_and_back(symbols_of(values, size))
    assert out.tolist() == values.tolist()


def test_symbols_cost_what_their_model_says() -> None:
    """The definition, one symbol at a time: a block is coded by the counts of all before it."""
    size, values = 7, np.random.default_rng(0).binomial(6, 0.2, 700)
    costs = []
    for prior in _PRIORS:
        ends, bits = block_ends(), 0.0
        seen, known, end = [prior] * size, [prior] * size, next(ends)
        for position, value in enumerate(values.tolist()):
            if position == end:
                known, end = list(seen), next(ends)
            bits -= np.log2(known[value] / sum(known))
            seen[value] += 1
        costs.append(bits)
    assert max(costs) > 1.01 * min(costs)
    cheapest = np.log2(len(_PRIORS)) + min(costs)
    assert bits_of(symbols_of(values, size)) == pytest.approx(cheapest, rel=1e-12)


def test_skewed_symbols_come_near_their_entropy_and_beat_huffman() -> None:
    values = (np.random.default_rng(0).random(20_000) < 0.02).astype(np.int64)
    _, parts, data = there_and_back(symbols_of(values, 2))
    p = values.mean()
    entropy = -len(values) * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert entropy < parts["s"].bits < 1.02 * entropy
    assert parts["s"].huffman_bits == len(values)
    assert len(data) < len(values) / 8 / 6


# ---- bitmaps --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(0, 0), (0, 1), (1, 0), (0, 9), (9, 0), (1, 1), (1, 40), (40, 1), (2, 2), (15, 17), (16, 16),
     (17, 15), (33, 129), (130, 31)],
)  # fmt: skip
@pytest.mark.parametrize("fill", ["zero", "one", "sparse", "even"])
def test_bitmaps_come_back(shape: tuple[int, int], fill: str) -> None:
    density = {"zero": 0.0, "one": 1.0, "sparse": 0.05, "even": 0.5}[fill]
    mask = (np.random.default_rng(7).random(shape) < density).astype(np.int64)
    out, parts, _ = there_and_back(bitmap_of(mask))
    assert out.shape == shape
    assert out.tolist() == mask.tolist()
    assert parts["m"].count == mask.size


@given(
    arrays.arrays(np.int64, arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
                  elements=st.integers(0, 1), fill=st.just(0))
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_bitmap_comes_back(mask: Ints) -> None:
    out, _, _ = there_and_back(bitmap_of(mask))
    assert out.tolist() == mask.tolist()


@pytest.mark.parametrize("value", [0, 1])
def test_an_even_bitmap_costs_next_to_nothing(value: int) -> None:
    assert bits_of(bitmap_of(np.full((300, 300), value))) < 200


def n_of_m_of(mask: Ints, keep: int, of: int) -> Code:
    rows, columns = mask.shape
    return lambda c, has: c.n_of_m("b", mask if has else None, rows, columns, keep, of)


def grouped(rows: int, columns: int, keep: int, of: int, weights: Ints | None = None) -> Ints:
    """`keep` ones in every `of` columns, at random, or more often where weights are large."""
    noise = np.random.default_rng(3).random((rows, columns))
    scores = noise if weights is None else weights + noise
    mask = np.zeros((rows, columns), dtype=np.int64)
    for start in range(0, columns, of):
        part = scores[:, start : start + of]
        best = np.argsort(-part, axis=1)[:, :keep]
        np.put_along_axis(mask[:, start : start + of], best, 1, axis=1)
    return mask


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 2), (3, 7), (50, 128), (127, 128)])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (1, 9), (40, 2), (17, 130), (300, 16)])
def test_groups_come_back(shape: tuple[int, int], keep: int, of: int) -> None:
    mask = grouped(*shape, keep, of)
    out, _, _ = there_and_back(n_of_m_of(mask, keep, of))
    np.testing.assert_array_equal(out, mask)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (16, 32)])
def test_groups_without_structure_cost_their_number_of_choices(keep: int, of: int) -> None:
    mask = grouped(64, 256, keep, of)
    _, parts, _ = there_and_back(n_of_m_of(mask, keep, of))
    assert parts["b"].bits == pytest.approx(64 * 256 // of * math.log2(math.comb(of, keep)))


def test_groups_in_which_columns_differ_cost_less() -> None:
    weights = np.tile([0.0, 0.9, 0.1, 0.8], 64)
    mask = grouped(200, 256, 2, 4, weights)
    _, parts, _ = there_and_back(n_of_m_of(mask, 2, 4))
    assert parts["b"].bits < 0.5 * 200 * 64 * math.log2(6)


@pytest.mark.parametrize("turn", [False, True], ids=["columns", "rows"])
def test_dead_columns_and_rows_are_nearly_free(turn: bool) -> None:
    random = np.random.default_rng(3)
    alive = random.random(200) < 0.1
    structured = ((random.random((200, 200)) < 0.5) & alive).astype(np.int64)
    scattered = random.permutation(structured.ravel()).reshape(200, 200)
    if turn:
        structured = structured.T
    needed = 200 * alive.sum()  # one bit for each weight of a column that lives
    assert needed < bits_of(bitmap_of(structured)) < 1.1 * needed + 400
    p = structured.mean()
    entropy = -structured.size * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert 0.98 * entropy < bits_of(bitmap_of(scattered)) < 1.03 * entropy


# ---- integers and bytes ---------------------------------------------------------------------


@pytest.mark.parametrize("value", EDGES)
@pytest.mark.parametrize("count", [1, 17])
def test_edge_integers_come_back(value: int, count: int) -> None:
    out, parts, _ = there_and_back(integers_of(np.full(count, value, dtype=np.int64)))
    assert out.dtype == np.int64
    assert out.tolist() == [value] * count
    assert parts["i"].count == count


@given(
    arrays.arrays(
        np.int64,
        st.integers(0, 60),
        elements=st.sampled_from(EDGES) | st.integers(INT64.min, INT64.max),
    )
)
@settings(max_examples=100, deadline=None)
def test_any_integers_come_back(values: Ints) -> None:
    out, _, _ = there_and_back(integers_of(values))
    assert out.tolist() == values.tolist()


def test_small_integers_are_cheap() -> None:
    values = np.random.default_rng(0).integers(-4, 4, 2000)
    assert bits_of(integers_of(values)) < 3.05 * 2000 + 300


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 16, 17, 200])
def test_bytes_come_back(width: int, count: int) -> None:
    data = np.random.default_rng(width).integers(0, 256, width * count).astype(np.uint8)
    out, parts, _ = there_and_back(plain_of(data, width))
    assert out == data.tobytes()
    assert parts.get("p", PartSize(count=0, bits=0, huffman_bits=0)).count == count


@given(st.sampled_from([1, 2, 4]), st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_come_back(width: int, raw: bytes) -> None:
    data = np.frombuffer(raw[: len(raw) // width * width], np.uint8)
    out, _, _ = there_and_back(plain_of(data, width))
    assert out == data.tobytes()


def test_each_byte_of_an_item_has_its_own_model() -> None:
    """Floats of one scale share their exponent: their high bytes cost little."""
    floats = np.random.default_rng(0).uniform(1.0, 2.0, 4000).astype("<f4")
    bits = bits_of(plain_of(floats.view(np.uint8), 4))
    assert bits < (23 + 0.2) * floats.size + 3 * 256 * 8


# ---- parts ----------------------------------------------------------------------------------


def test_parts_are_named_by_their_path_and_add_up() -> None:
    values = np.arange(40) % 5

    def code(coder: Coder, has: bool) -> Ints:
        with coder.inside("outer"):
            first = coder.symbols("s", values if has else None, 5, 40)
            with coder.inside("inner"):
                coder.integers("s", values if has else None, 40)
            again = coder.symbols("s", values if has else None, 5, 40)
        return np.concatenate([first, again])

    out, parts, _ = there_and_back(code)
    assert out.tolist() == [*values, *values]
    assert list(parts) == ["outer.s", "outer.inner.s"]
    once = bits_of(symbols_of(values, 5))
    expected = PartSize(count=80, bits=2 * once, huffman_bits=2 * huffman_bits(np.bincount(values)))
    assert parts["outer.s"] == expected


# ---- Huffman --------------------------------------------------------------------------------


def naive_huffman(counts: list[int]) -> int:
    """Build the tree of Huffman's paper and add up count · depth over its leaves."""
    trees: list[tuple[int, Any]] = [(c, None) for c in counts if c]
    while len(trees) > 1:
        trees.sort(key=lambda t: t[0], reverse=True)
        right, left = trees.pop(), trees.pop()
        trees.append((left[0] + right[0], (left, right)))

    def cost(tree: tuple[int, Any], depth: int) -> int:
        count, branches = tree
        if branches is None:
            return count * max(depth, 1)
        return sum(cost(branch, depth + 1) for branch in branches)

    return cost(trees[0], 0) if trees else 0


@given(st.lists(st.integers(0, 1000), max_size=40))
def test_huffman_bits_are_those_of_the_tree(counts: list[int]) -> None:
    assert huffman_bits(np.array(counts, dtype=np.int64)) == naive_huffman(counts)


@pytest.mark.parametrize(
    ("counts", "bits"), [([], 0), ([0, 0], 0), ([5], 5), ([0, 5], 5), ([1, 1], 2), ([1] * 8, 24)]
)
def test_huffman_bits_of_small_alphabets(counts: list[int], bits: int) -> None:
    assert huffman_bits(np.array(counts, dtype=np.int64)) == bits


# ---- damage ---------------------------------------------------------------------------------


def everything(coder: Coder, has: bool) -> list[Any]:
    """A little of each model, the values a function of nothing."""
    s, m = np.arange(90) ** 2 % 11, (np.arange(120) % 7 == 0).astype(np.int64).reshape(10, 12)
    i, p = np.arange(-20, 20) ** 3, (np.arange(64) * 37 % 256).astype(np.uint8)
    return [
        coder.symbols("s", s if has else None, 11, 90).tolist(),
        coder.bitmap("m", m if has else None, 10, 12).tolist(),
        coder.integers("i", i if has else None, 40).tolist(),
        bytes(coder.plain("p", p if has else None, 4, 16)),
    ]


def read(data: bytes) -> Any:
    """What a stream decodes to; None where it is refused, as any damage may be."""
    decoder = Decoder(data)
    try:
        out = everything(decoder, False)
        decoder.finish()
    except FormatError:
        return None
    return out


def test_no_shortened_or_lengthened_stream_passes_for_the_whole_one() -> None:
    encoder = Encoder()
    everything(encoder, True)
    data = encoder.finish()
    whole = read(data)
    assert whole is not None
    tails = (b"\0", b"\1", b"\0" * 4, b"\xff" * 4, b"\0\0\0\0\1", b"TAUT" * 9)
    for other in (*(data[:n] for n in range(len(data))), *(data + t for t in tails)):
        assert read(other) != whole


def test_a_flipped_bit_is_refused_or_read_as_something_else() -> None:
    encoder = Encoder()
    everything(encoder, True)
    data = encoder.finish()
    whole = read(data)
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert read(bytes(flipped)) != whole


@given(st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_garbage_is_refused_or_is_what_its_numbers_encode_to(data: bytes) -> None:
    decoder = Decoder(data)
    try:
        symbols = decoder.symbols("s", None, 9, 40)
        bitmap = decoder.bitmap("m", None, 8, 9)
        integers = decoder.integers("i", None, 12)
        decoder.finish()
    except FormatError:
        return
    encoder = Encoder()
    encoder.symbols("s", symbols, 9, 40)
    encoder.bitmap("m", bitmap, 8, 9)
    encoder.integers("i", integers, 12)
    assert encoder.parts == decoder.parts


def test_a_stream_cut_in_half_is_noticed_where_it_ends() -> None:
    values = np.random.default_rng(0).integers(0, 256, 20_000)
    encoder = Encoder()
    encoder.symbols("s", values, 256, 20_000)
    data = encoder.finish()
    with pytest.raises(FormatError, match="the coded stream is cut short"):
        Decoder(data[: len(data) // 2]).symbols("s", None, 256, 20_000)


@pytest.mark.timeout(5)
@pytest.mark.parametrize("data", [b"\xff" * 3, b"\x5a" * 64, bytes(range(64))])
def test_a_stream_that_runs_dry_is_noticed_before_its_end(data: bytes) -> None:
    """A million numbers are claimed; those that the stream cannot hold are never made up."""
    with pytest.raises(FormatError, match=r"cut short|damaged"):
        Decoder(data).integers("i", None, 1_000_000)
    with pytest.raises(FormatError, match=r"cut short|damaged"):
        Decoder(data).plain("p", None, 4, 1_000_000)


def test_zeros_at_the_end_are_left_out_and_come_back() -> None:
    values = np.zeros(100_000, dtype=np.int64)
    out, _, data = there_and_back(symbols_of(values, 256))
    assert not out.any()
    assert len(data) < 150
