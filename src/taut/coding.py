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
_FIRST_BLOCK = 16
_PRIOR = 0.25  # the count that each symbol is given before any is seen
_LEAST = 2.0**-20  # no bit is ever thought less likely than this


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
        seen = np.zeros(size, dtype=np.int64)
        out = np.empty(count, dtype=np.int64)
        bits, start = 0.0, 0
        while start < count:
            stop = min(count, start + max(_FIRST_BLOCK, start // 8))
            weights = seen + _PRIOR
            block = None if values is None else values[start:stop]
            out[start:stop] = self._categorical(block, weights, stop - start)
            new = np.bincount(out[start:stop], minlength=size)
            used = new.nonzero()[0]
            bits -= float(new[used] @ np.log2(weights[used] / weights.sum()))
            seen += new
            start = stop
        self._account(name, count, bits, huffman_bits(seen))
        return out

    def bitmap(self, name: str, mask: Ints | None, rows: int, columns: int) -> Ints:
        """A [rows, columns] matrix of zeros and ones, coded along its cheaper direction.

        The chance of a one is its column's density so far times how full its row is so far, so
        dead rows and columns cost next to nothing.
        """
        if mask is None:
            turned = int(self._categorical(None, np.ones(2), 1)[0])
            lines = self._lines(name, None, *((columns, rows) if turned else (rows, columns)))
            return np.ascontiguousarray(lines.T) if turned else lines
        estimates = []
        for candidate in (mask, mask.T):
            estimate = Estimator()
            estimate._lines(name, candidate, *candidate.shape)
            estimates.append(estimate.parts[name].bits)
        turned = int(estimates[1] < estimates[0])
        self._categorical(np.array([turned]), np.ones(2), 1)
        lines = mask.T if turned else mask
        self._lines(name, lines, *lines.shape)
        return mask

    def _lines(self, name: str, mask: Ints | None, rows: int, columns: int) -> Ints:
        out = np.zeros((rows, columns), dtype=np.int64)
        in_column = np.zeros(columns, dtype=np.int64)
        total, information = 0, 0.0
        step = max(16, columns // 8)
        for row in range(rows):
            overall = (total + 0.5) / (row * columns + 1.0)
            density = (in_column + 2.0 * overall) / (row + 2.0)
            expected, found = 0, 0  # of this row so far; expected in units of 2**-16
            for start in range(0, columns, step):
                here = density[start : start + step]
                fullness = (found + 1.0) / (expected / 65536.0 + 1.0)
                ones = np.clip(here * fullness, _LEAST, 1.0 - _LEAST)
                given = None if mask is None else mask[row, start : start + step]
                bits = self._bernoulli(given, ones)
                out[row, start : start + step] = bits
                information -= float(np.log2(np.where(bits, ones, 1.0 - ones)).sum())
                found += int(bits.sum())
                expected += int((here * 65536.0).astype(np.int64).sum())
            in_column += out[row]
            total = int(in_column.sum())
        gaps = np.diff(out.ravel().nonzero()[0], prepend=-1)
        huffman = huffman_bits(np.bincount(gaps)) if gaps.size else 0.0
        self._account(name, rows * columns, information, huffman)
        return out

    def integers(self, name: str, values: Ints | None, count: int) -> Ints:
        """Any 63-bit signed integers: the length of each is learned, its digits are raw."""
        if values is None:
            length = self.symbols(name, None, 64, count)
        else:
            folded = np.where(values < 0, -2 * values - 1, 2 * values)
            length = self.symbols(name, np.array([int(v).bit_length() for v in folded]), 64, count)
        out = np.zeros(count, dtype=np.int64)
        for bit in range(63):  # the top digit of a number is known to be one
            open_ = np.flatnonzero(length > bit + 1)
            digits = None if values is None else folded[open_] >> bit & 1
            got = self.symbols(name, digits, 2, open_.size) if open_.size else np.zeros(0, int)
            out[open_] |= got << bit
        out[length > 0] |= np.int64(1) << (length[length > 0] - 1)
        return np.where(out & 1, -(out + 1) // 2, out // 2)

    def plain(self, name: str, data: NDArray[np.uint8] | None, width: int, count: int) -> bytes:
        """`count` items of `width` bytes each; each byte of the item has a model of its own."""
        table = None if data is None else data.reshape(count, width)
        out = np.empty((count, width), dtype=np.uint8)
        for column in reversed(range(width)):
            given = None if table is None else table[:, column].astype(np.int64)
            out[:, column] = self.symbols(name, given, 256, count)
        return out.tobytes()


class Encoder(Coder):
    """Writes: pass values, take `finish()`."""

    def __init__(self) -> None:
        super().__init__()
        self._coder = constriction.stream.queue.RangeEncoder()

    def _categorical(self, values: Ints | None, weights: Floats, count: int) -> Ints:
        assert values is not None and len(values) == count
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
        """The coded bytes. Zeros at the end are left out: the decoder reads them as given."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words.astype("<u4").tobytes().rstrip(b"\0")


class Decoder(Coder):
    """Reads what `Encoder` wrote, by the same calls in the same order."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        padded = data + b"\0" * (-len(data) % 4)
        words = np.frombuffer(padded, dtype="<u4").astype(np.uint32)
        self._coder = constriction.stream.queue.RangeDecoder(words)

    def _categorical(self, values: Ints | None, weights: Floats, count: int) -> Ints:
        if len(weights) == 1 or not count:
            return np.zeros(count, dtype=np.int64)
        model = _model.Categorical(weights, perfect=False)
        return self._decode(lambda: self._coder.decode(model, count))

    def _bernoulli(self, bits: Ints | None, ones: Floats) -> Ints:
        return self._decode(lambda: self._coder.decode(_model.Bernoulli(perfect=False), ones))

    @staticmethod
    def _decode(read: Callable[[], Any]) -> Ints:
        try:
            return np.asarray(read(), dtype=np.int64)
        except (AssertionError, ValueError) as error:
            raise FormatError(f"the coded stream is damaged: {error}") from error

    def finish(self) -> None:
        """Refuse a stream that goes on after its last part."""
        if not self._coder.maybe_exhausted():
            raise FormatError("the coded stream goes on after its last part; the file is damaged")


class Estimator(Coder):
    """Counts the bits that coding would take and writes nothing."""

    def _categorical(self, values: Ints | None, weights: Floats, count: int) -> Ints:
        assert values is not None
        return values

    def _bernoulli(self, bits: Ints | None, ones: Floats) -> Ints:
        assert bits is not None
        return bits


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
