"""Entropy coding of integer streams, with models that are learned as the stream goes by.

Each method of `Coder` states one model, once: it runs the same arithmetic while it encodes and
while it decodes, so that the two cannot disagree. Encoding passes the values; decoding passes None
and gets them back. The range coder underneath is constriction's (Bamler 2022).

    coder = Encoder()                      coder = Decoder(data)
    coder.symbols("index", index, 32, n)   index = coder.symbols("index", None, 32, n)
    data = coder.finish()                  coder.finish()

Probabilities come from integer counts by single IEEE operations, never from a library's exp or
from the sum of floats, so every machine decodes what any other wrote.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from taut.errors import FormatError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_model = constriction.stream.model
_FIRST_BLOCK = 8
_PRIORS = (1 / 64, 0.25, 2.0, 64.0)  # the count of a symbol before any is seen
_LEAST = 2.0**-20  # no bit is ever thought less likely than this
_MOST_CUT = 7  # bytes of zeros that are left out at the end of a stream
_GUESSES = 48  # classes of guesses at a bit, half an octave wide
_MOST_LAG = 64
_TRUSTS = (4.0, 64.0, 2.0**20)  # rows after which a column's own count weighs as much as N / M
_MOST_LINES = 1 << 14


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """What one part of the file takes: how many numbers, their coded bits, plain Huffman's bits."""

    count: int
    bits: float
    huffman_bits: float


class Coder(ABC):
    """The models. `parts` tells afterwards what each named part took."""

    def __init__(self) -> None:
        self.parts: dict[str, PartSize] = {}
        self._path: list[str] = []

    @abstractmethod
    def _categorical(self, values: Ints | None, weights: Floats, count: int) -> Ints:
        """`count` symbols of one categorical distribution, given by unnormalised weights."""

    @abstractmethod
    def _bernoulli(self, bits: Ints | None, ones: Floats) -> Ints:
        """Bits, each with its own probability of being one."""

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Parts coded within are named `name.part`."""
        self._path.append(name)
        try:
            yield
        finally:
            self._path.pop()

    def _account(self, name: str, count: int, bits: float, huffman: float) -> None:
        key = ".".join((*self._path, name))
        old = self.parts.get(key, PartSize(count=0, bits=0.0, huffman_bits=0.0))
        self.parts[key] = PartSize(
            count=old.count + count, bits=old.bits + bits, huffman_bits=old.huffman_bits + huffman
        )

    def symbols(self, name: str, values: Ints | None, size: int, count: int) -> Ints:
        """`count` integers in [0, size): frequencies are learned in blocks that grow.

        A block costs one call whatever its length; it is coded by the counts of all before it.
        """
        out, bits, huffman = self._learned(values, size, count)
        self._account(name, count, bits, huffman)
        return out

    def _learned(self, values: Ints | None, size: int, count: int) -> tuple[Ints, float, float]:
        """The symbols, the bits that they take, and plain Huffman's.

        How much a symbol counts before it was seen is chosen by trying: noise wants a heavy prior,
        a few values out of many possible ones a light one.
        """
        if size < 2 or not count:
            return self._blocks(values, size, count, 1.0)
        choice = None
        if values is not None:
            trials = [Estimator()._blocks(values, size, count, prior)[1] for prior in _PRIORS]
            choice = np.array([int(np.argmin(trials))])
        chosen = int(self._categorical(choice, np.ones(len(_PRIORS)), 1)[0])
        out, bits, huffman = self._blocks(values, size, count, _PRIORS[chosen])
        return out, bits + math.log2(len(_PRIORS)), huffman

    def _blocks(
        self, values: Ints | None, size: int, count: int, prior: float
    ) -> tuple[Ints, float, float]:
        seen = np.zeros(size, dtype=np.int64)
        out = np.empty(count, dtype=np.int64)
        bits, start = 0.0, 0
        while start < count:
            stop = min(count, start + max(_FIRST_BLOCK, start // 8))
            weights: Floats = np.add(seen, prior, dtype=np.float64)
            block = None if values is None else values[start:stop]
            out[start:stop] = self._categorical(block, weights, stop - start)
            new = np.bincount(out[start:stop], minlength=size)
            used = new.nonzero()[0]
            bits -= float(new[used] @ np.log2(weights[used] / weights.sum()))
            seen += new
            start = stop
        return out, bits, huffman_bits(seen)

    def bitmap(self, name: str, mask: Ints | None, rows: int, columns: int) -> Ints:
        """A [rows, columns] matrix of zeros and ones, coded along its cheaper direction.

        See `_lines` for the model. The direction and the model's lag are chosen by trying.
        """
        ways = _directions(rows, columns)
        best: tuple[float, bool, int] = (math.inf, ways[0], 1)
        for turned in ways:
            if mask is None:
                break
            lines = mask.T if turned else mask
            lag, estimate = _best_lag(lines), Estimator()
            estimate._lines(name, lines, lines.shape[0], lines.shape[1], lag)
            best = min(best, (estimate.parts[name].bits, turned, lag))
        given = None if mask is None else (np.array([ways.index(best[1])]), np.array([best[2] - 1]))
        way = self._categorical(given[0] if given else None, np.ones(len(ways)), 1)
        turned = ways[int(way[0])]
        lag = 1 + int(self._categorical(given[1] if given else None, np.ones(_MOST_LAG), 1)[0])
        shape = (columns, rows) if turned else (rows, columns)
        held = mask.T if mask is not None and turned else mask
        lines = self._lines(name, held, shape[0], shape[1], lag)
        return np.ascontiguousarray(lines.T) if turned else lines

    def _lines(self, name: str, mask: Ints | None, rows: int, columns: int, lag: int) -> Ints:
        """The bits line by line, each by what stands around it.

        A first guess is how dense the bit's column has been, times how full its row is so far.
        The guess and four neighbours make the bit's context, whose counts correct the guess: the
        bit above, the bit `lag` lines above (one image row up, where a line is a pixel), and
        whether one of that one's two neighbours is set.
        """
        out = np.zeros((lag + 1 + rows, columns), dtype=np.int64)  # nothing stands above
        in_column = np.zeros(columns, dtype=np.int64)
        seen, ones = (np.zeros(8 * _GUESSES, dtype=np.int64) for _ in range(2))
        total, information = 0, 0.0
        step = max(16, columns // 8, rows * columns >> 16)
        for row in range(rows):
            here = out[lag + 1 + row]
            above, far = out[lag + row], out[row + 1]
            beside = out[row] | (out[row + 2] if lag > 1 else far)
            around = 4 * above + 2 * far + beside
            overall = (total + 0.5) / (row * columns + 1.0)
            density = (in_column + 2.0 * overall) / (row + 2.0)
            expected, found = 0, 0  # of this row so far; expected in units of 2**-16
            for start in range(0, columns, step):
                part = slice(start, start + step)
                fullness = (found + 1.0) / (expected / 65536.0 + 1.0)
                guess = np.clip(density[part] * fullness, _LEAST, 1.0 - _LEAST)
                context = 8 * _half_octave(guess) + around[part]
                chance = (ones[context] + 4.0 * guess) / (seen[context] + 4.0)
                chance = np.clip(chance, _LEAST, 1.0 - _LEAST)
                bits = self._bernoulli(None if mask is None else mask[row, part], chance)
                here[part] = bits
                information -= float(np.log2(np.where(bits, chance, 1.0 - chance)).sum())
                seen += np.bincount(context, minlength=seen.size)
                ones += np.bincount(context[bits != 0], minlength=ones.size)
                found += int(bits.sum())
                expected += int((density[part] * 65536.0).astype(np.int64).sum())
            in_column += here
            total = int(in_column.sum())
        lines = out[lag + 1 :]
        gaps = np.diff(lines.ravel().nonzero()[0], prepend=-1)
        huffman = huffman_bits(np.bincount(gaps)) if gaps.size else 0.0
        self._account(name, rows * columns, information, huffman)
        return lines

    def n_of_m(
        self, name: str, mask: Ints | None, rows: int, columns: int, keep: int, of: int
    ) -> Ints:
        """A [rows, columns] matrix with `keep` ones in every `of` neighbours of a row.

        What a row ends with, where its length is no multiple, has as many, or ones only. A bit is
        one by the share that its column's density has in those of its group that are still to
        come, times the ones still to come; what follows from the count is not coded. How much the
        densities count is chosen by trying: not at all gives log2(of choose keep) bits a group.
        """
        choice = None
        if mask is not None:
            trials = [Estimator() for _ in _TRUSTS]
            for trial, trust in zip(trials, _TRUSTS, strict=True):
                trial._grouped(name, mask, rows, columns, keep, of, trust)
            choice = np.array([int(np.argmin([t.parts[name].bits for t in trials]))])
        chosen = int(self._categorical(choice, np.ones(len(_TRUSTS)), 1)[0])
        return self._grouped(name, mask, rows, columns, keep, of, _TRUSTS[chosen])

    def _grouped(
        self, name: str, mask: Ints | None, rows: int, columns: int, keep: int, of: int,
        trust: float,
    ) -> Ints:  # fmt: skip
        """The bits, a few rows at a time, by the counts of all rows before them."""
        groups, places = -(-columns // of), min(of, columns)
        width = np.minimum(of, columns - of * np.arange(groups))  # places of each group
        given, out = None, np.zeros((rows, groups, places), dtype=np.int64)
        if mask is not None:
            given = np.pad(mask, ((0, 0), (0, groups * places - columns))).reshape(out.shape)
        in_column = np.zeros((groups, places), dtype=np.int64)
        start, information = 0, 0.0
        while start < rows:
            stop = min(rows, start + max(1, start // 8))
            density = (in_column + trust * (keep / of)) / (start + trust)
            density *= np.arange(places) < width[:, None]
            to_come = np.zeros((groups, places + 1))
            for place in reversed(range(places)):
                to_come[:, place] = to_come[:, place + 1] + density[:, place]
            left = np.tile(np.minimum(keep, width), (stop - start, 1))
            for place in range(places):
                open_ = (left > 0) & (left < width - place)
                bits = (left > 0).astype(np.int64)
                if open_.any():
                    share = left * density[:, place] / np.maximum(to_come[:, place], _LEAST)
                    chance = np.clip(share, 2.0**-10, 1.0 - 2.0**-10)[open_]
                    told = None if given is None else given[start:stop, :, place][open_]
                    got = bits[open_] = self._bernoulli(told, chance)
                    information -= float(np.log2(np.where(got, chance, 1.0 - chance)).sum())
                out[start:stop, :, place] = bits
                left -= bits
            in_column += out[start:stop].sum(0)
            start = stop
        lines = out.reshape(rows, groups * places)[:, :columns]
        gaps = np.diff(lines.ravel().nonzero()[0], prepend=-1)
        huffman = huffman_bits(np.bincount(gaps)) if gaps.size else 0.0
        self._account(name, rows * columns, information, huffman)
        return np.ascontiguousarray(lines)

    def integers(self, name: str, values: Ints | None, count: int) -> Ints:
        """Any 64-bit signed integers: the length of each is learned, then each binary place.

        The sign is folded into the lowest place: 0, -1, 1, -2, … become 0, 1, 2, 3, ….
        """
        lengths = folded = None
        if values is not None:
            folded = ((values << 1) ^ (values >> 63)).view(np.uint64)
            lengths = np.array([int(v).bit_length() for v in folded], dtype=np.int64)
        length, bits, huffman = self._learned(lengths, 65, count)
        out = np.zeros(count, dtype=np.uint64)
        for place in range(63):
            open_ = np.flatnonzero(length > place + 1)  # the top digit is known to be one
            if not open_.size:
                break
            shift = np.uint64(place)
            digits = None
            if folded is not None:
                digits = (folded[open_] >> shift & np.uint64(1)).astype(np.int64)
            got, more, more_huffman = self._learned(digits, 2, open_.size)
            out[open_] |= got.astype(np.uint64) << shift
            bits, huffman = bits + more, huffman + more_huffman
        top = length > 0
        out[top] |= np.uint64(1) << (length[top] - 1).astype(np.uint64)
        self._account(name, count, bits, huffman)
        half = (out >> np.uint64(1)).view(np.int64)
        return np.where(out & np.uint64(1), ~half, half)

    def plain(self, name: str, data: NDArray[np.uint8] | None, width: int, count: int) -> bytes:
        """`count` items of `width` bytes each; each byte of the item has a model of its own."""
        table = None if data is None else data.reshape(count, width)
        out = np.empty((count, width), dtype=np.uint8)
        bits = huffman = 0.0
        for column in reversed(range(width)):
            given = None if table is None else table[:, column].astype(np.int64)
            got, more, more_huffman = self._learned(given, 256, count)
            out[:, column] = got
            bits, huffman = bits + more, huffman + more_huffman
        self._account(name, count, bits, huffman)
        return out.tobytes()


class Encoder(Coder):
    """Writes: pass values, take `finish()`."""

    def __init__(self) -> None:
        super().__init__()
        self._coder = constriction.stream.queue.RangeEncoder()

    def _categorical(self, values: Ints | None, weights: Floats, count: int) -> Ints:
        assert values is not None
        assert len(values) == count
        if len(weights) > 1 and count:
            symbols = np.ascontiguousarray(values, dtype=np.int32)
            self._coder.encode(symbols, _model.Categorical(weights, perfect=False))
        return values

    def _bernoulli(self, bits: Ints | None, ones: Floats) -> Ints:
        assert bits is not None
        symbols = np.ascontiguousarray(bits, dtype=np.int32)
        self._coder.encode(symbols, _model.Bernoulli(perfect=False), ones)
        return bits

    def finish(self) -> bytes:
        """The coded bytes, up to seven zeros at the end left out: the decoder reads them as given.

        No more than seven, so that a stream's length bounds what may be read from it.
        """
        words: NDArray[np.uint32] = self._coder.get_compressed()
        data = words.astype("<u4").tobytes()
        return data[:-_MOST_CUT] + data[-_MOST_CUT:].rstrip(b"\0")

    @property
    def words(self) -> int:
        """How many 32-bit words the stream takes so far."""
        return int(self._coder.num_words())


class Decoder(Coder):
    """Reads what `Encoder` wrote, by the same calls in the same order.

    All that is read is encoded again, so that each sequence of numbers has one stream and no other
    is accepted, and that a stream that runs dry is noticed before its zeros are taken for data.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__()
        padded = data + b"\0" * (-len(data) % 4)
        words = np.frombuffer(padded, dtype="<u4").astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)
        self._again = Encoder()
        self._data = data

    def _categorical(self, values: Ints | None, weights: Floats, count: int) -> Ints:
        if len(weights) == 1 or not count:
            return np.zeros(count, dtype=np.int64)
        model = _model.Categorical(weights, perfect=False)
        got = self._decode(lambda: self._coder.decode(model, count))
        self._again._categorical(got, weights, count)
        return got

    def _bernoulli(self, bits: Ints | None, ones: Floats) -> Ints:
        got = self._decode(lambda: self._coder.decode(_model.Bernoulli(perfect=False), ones))
        self._again._bernoulli(got, ones)
        return got

    def _decode(self, read: Callable[[], Any]) -> Ints:
        if self._again.words > len(self._data) // 4 + _MOST_CUT:
            raise FormatError("the coded stream is cut short; the file is damaged")
        try:
            return np.asarray(read(), dtype=np.int64)
        except (AssertionError, ValueError) as error:
            raise FormatError(f"the coded stream is damaged: {error}") from error

    def finish(self) -> None:
        """Refuse a stream that is not what these numbers encode to, as one that goes on."""
        if self._again.finish() != self._data:
            raise FormatError("the coded stream does not end where its numbers do; it is damaged")


class Estimator(Coder):
    """Counts the bits that coding would take and writes nothing."""

    def _categorical(self, values: Ints | None, weights: Floats, count: int) -> Ints:
        assert values is not None
        return values

    def _bernoulli(self, bits: Ints | None, ones: Floats) -> Ints:
        assert bits is not None
        return bits


def _half_octave(chance: Floats) -> Ints:
    """0 for a chance in (0.707, 1), 1 for (0.5, 0.707], 2 for (0.354, 0.5], …"""
    mantissa, exponent = np.frexp(chance)
    return np.minimum(-2 * exponent.astype(np.int64) + (mantissa <= 0.70703125), _GUESSES - 1)


def _directions(rows: int, columns: int) -> tuple[bool, ...]:
    """Along rows (False), along columns (True), or both: each line costs a little time, so a thin
    matrix of very many lines goes the other way."""
    if max(rows, columns) <= _MOST_LINES:
        return (False, True)
    return (rows > columns,)


def _best_lag(lines: Ints) -> int:
    """The distance, above one line, at which ones most often stand above ones."""
    few = lines[:, :512]
    most = min(_MOST_LAG, len(few) - 1) if few.size else 0
    meets = [float((few[d:] & few[:-d]).mean()) for d in range(2, most + 1)]
    return 2 + int(np.argmax(meets)) if meets else 1


def huffman_bits(counts: Ints) -> float:
    """Bits that a plain Huffman code takes for symbols of these counts, without its code table.

    >>> huffman_bits(np.array([4, 2, 1, 1]))
    14.0
    """
    heap = [int(c) for c in counts if c]
    if len(heap) == 1:
        return float(heap[0])
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return float(bits)
