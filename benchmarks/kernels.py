"""The native kernels beside PyTorch's dense fp32 product of the same shape, batch and threads.

Ratios are of medians taken by turns in one run, after a warm-up; packing of activations is
included. Beside each stands its bound, and how much of it was reached: the time the processor would
take for nothing but the operation's own instructions (per 512-bit vector and cycle: 4/3 words
compared and counted, 2 multiply-adds, 1 table lookup), at the clock that is measured here. It is
right for processors with four 512-bit units, and a yardstick elsewhere. On virtual machines, bind
the threads (OMP_PROC_BIND=true): two that share a core wait for each other.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Figure, run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from taut.kernels import (
    BitWeights,
    Levels,
    bitplane_conv2d,
    bitplane_matmul,
    hashed_matmul,
    lookup_matmul,
    sparse_matmul,
    wrap_buckets,
)
from taut.kernels.lookup import pack_indices
from taut.kernels.sparse import pack_rows
from taut.layers import pack_layer, run_dense
from taut.packed import PackedWeight, Plain
from taut.sparse_weight import SparseWeight
from taut.techniques.share_values import SharedValues
from taut.tune import tune

Run = Callable[[], object]


@dataclass
class Bench:
    """Times by turns, at PyTorch's present number of threads."""

    quick: bool
    seconds: float = 0.4
    rounds: int = 5

    def __post_init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.clock = torch.ops.taut.clock_ghz() * 1e9

    def medians(self, *each: Run) -> list[float]:
        """Seconds of each, the median of medians over rounds in which they take turns."""
        rounds, seconds = (1, 0.001) if self.quick else (self.rounds, self.seconds / self.rounds)
        times: list[list[float]] = [[] for _ in each]
        for _ in range(rounds):
            for found, f in zip(times, each, strict=True):
                timer = Timer("f()", globals={"f": f}, num_threads=self.threads)
                timer.timeit(1)
                found.append(timer.blocked_autorange(min_run_time=seconds).median)
        return [statistics.median(t) for t in times]

    def cycles(self, vectors: float, per_cycle: float) -> float:
        """Seconds for so many 512-bit vectors of work, shared by the threads."""
        return vectors / per_cycle / self.clock / self.threads

    def figure(self, name: str, asked: float, ours: Run, dense: Run, bound: float) -> Figure:
        """The ratio of a kernel, and how near it comes to its bound."""
        took, beside = self.medians(ours, dense)
        note = f"{1e3 * took:.3g} of {1e3 * beside:.3g} ms; {bound / took:.0%} of its bound"
        return Figure(
            name=name, paper=note, ours=beside / took, asked=asked, at_most=False, unit="×"
        )


SIDE = 4096
WORDS = 4 / 3  # 512-bit words xor-ed, counted and added a cycle
FMAS, LOOKUPS = 2, 1


def bitplanes(b: Bench) -> list[Figure]:
    side, w = _dense(b)
    found = []
    for planes, batches in ((1, ((256, 30), (16, 25), (1, 25))), (2, ((256, 8),))):
        weights = BitWeights.pack(torch.rand(side, planes, side) > 0.5, torch.rand(side, planes))
        levels = Levels.sign() if planes == 1 else Levels.uniform(planes, 0.5)
        for batch, asked in batches:
            x = torch.randn(batch, side)
            found.append(
                b.figure(
                    f"bitplane W{planes}A{planes}, batch {batch}",
                    asked,
                    lambda x=x, p=weights, s=levels: bitplane_matmul(x, p, s),
                    lambda x=x: F.linear(x, w),
                    b.cycles(side * side * batch * planes**2 / 512, WORDS),
                )
            )
    found.append(_inner_loop(b))
    return found


def _inner_loop(b: Bench) -> Figure:
    """What twice as many outputs cost one thread, by which packing and all else fall away."""
    outputs, side, batch = (256, 1024, 48) if b.quick else (1024, 4096, 240)
    x, levels = torch.randn(batch, side), Levels.sign()
    half, whole = (
        BitWeights.pack(torch.rand(n, 1, side) > 0.5, torch.rand(n, 1))
        for n in (outputs, 2 * outputs)
    )
    torch.set_num_threads(1)
    alone = Bench(b.quick)
    one, two = alone.medians(
        lambda: bitplane_matmul(x, half, levels), lambda: bitplane_matmul(x, whole, levels)
    )
    torch.set_num_threads(b.threads)
    reached = alone.cycles(outputs * side * batch / 512, WORDS) / (two - one)
    return Figure(
        name="bitplane W1A1, inner loop, one thread",
        paper=f"{reached * WORDS:.2f} of 1.33 words a cycle",
        ours=100 * reached,
        asked=80,
        at_most=False,
        unit=" %",
    )


def convolutions(b: Bench) -> list[Figure]:
    ratios, bound, spent = [], 0.0, 0.0
    shapes = ((64, 8),) if b.quick else ((64, 56), (128, 28), (256, 14), (512, 7))
    for channels, size in shapes:
        x, w = torch.randn(1, channels, size, size), torch.randn(channels, channels, 3, 3)
        last = torch.channels_last
        near, far = (x.to(memory_format=last), w.to(memory_format=last)), (x, w)
        bits = BitWeights.pack(
            torch.rand(channels, 1, channels, 3, 3) > 0.5, torch.rand(channels, 1)
        )
        levels = Levels.sign()
        ours, *dense = b.medians(
            lambda x=near[0], p=bits, s=levels: bitplane_conv2d(x, p, s, (1, 1), (1, 1)),
            lambda a=near: F.conv2d(*a, padding=1),
            lambda a=far: F.conv2d(*a, padding=1),
        )
        ratios.append(min(dense) / ours)
        bound += b.cycles(channels * channels * 9 * size * size / 512, WORDS)
        spent += ours
    each = ", ".join(f"{r:.1f}×" for r in ratios)
    return [
        Figure(
            name="binary 3×3 conv of ResNet-18, batch 1, geometric mean",
            paper=f"{each}; {bound / spent:.0%} of its bound",
            ours=math.exp(statistics.fmean(map(math.log, ratios))),
            asked=12,
            at_most=False,
            unit="×",
        )
    ]


def lookups(b: Bench) -> list[Figure]:
    side, w = _dense(b)
    codes, table = pack_indices(torch.randint(0, 16, (side, side)), 4), torch.randn(1, 1, 16)
    found = []
    for batch, asked in ((1, 8.0), (16, 1.5)):
        x = torch.randn(batch, side)
        strips = side * side / 16
        bound = max(b.cycles(strips, LOOKUPS), b.cycles(strips * batch, FMAS))
        found.append(
            b.figure(
                f"lookup 4-bit, batch {batch}",
                asked,
                lambda x=x: lookup_matmul(x, codes, table, 4),
                lambda x=x: F.linear(x, w),
                bound,
            )
        )
    return found


def sparse(b: Bench) -> list[Figure]:
    side, w = _dense(b)
    found = []
    for zeros, batches in ((0.9, ((1, 5), (64, 8))), (0.95, ((1, 10), (64, 15)))):
        mask = torch.rand(side, side) >= zeros
        starts, columns = pack_rows(mask.flatten().nonzero().squeeze(1), (side, side))
        values = w[mask]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch calls its own layout a beta
            csr = (w * mask).to_sparse_csr()
        for batch, asked in batches:
            x = torch.randn(batch, side)
            bound = b.cycles(len(values) * max(batch, 1) / 16, FMAS)
            ours = functools.partial(sparse_matmul, x, starts, columns, values)
            name = f"sparse {zeros:.0%}, batch {batch}"
            found.append(b.figure(name, asked, ours, lambda x=x: F.linear(x, w), bound))
            if batch == 64:
                found.append(
                    b.figure(
                        f"{name}, beside PyTorch's CSR",
                        5,
                        ours,
                        lambda x=x, a=csr: F.linear(x, a),
                        bound,
                    )
                )
    return found


def hashes(b: Bench) -> list[Figure]:
    side, w = _dense(b)
    buckets = wrap_buckets(torch.randn(side * side // 64))
    found = []
    for run_length, batches in ((1, ((1, 0.6), (64, 2.0))), (16, ((1, 4.0), (64, 2.0)))):
        for batch, asked in batches:
            x = torch.randn(batch, side)
            alone = "each weight alone" if run_length == 1 else f"runs of {run_length}"
            found.append(
                b.figure(
                    f"hashed 1/64, {alone}, batch {batch}",
                    asked,
                    lambda x=x, r=run_length: hashed_matmul(x, buckets, side, 1, r, wrapped=True),
                    lambda x=x: F.linear(x, w),
                    b.cycles(side * side * batch / 16, FMAS),
                )
            )
    return found


def recurrent(b: Bench) -> list[Figure]:
    size, steps = (64, 5) if b.quick else (1024, 100)
    dense = nn.LSTM(size, size).eval()
    packed = copy.deepcopy(dense)
    names = [n for n, _ in dense.named_parameters() if "weight" in n]
    pack_layer(packed, {n: _shared(getattr(dense, n)) for n in names})
    run_dense(packed, False)
    x = torch.randn(steps, 1, size)
    strips = 4 * size * size / 16 * steps
    return [
        b.figure(
            f"LSTM, hidden {size}, 4-bit shared values, {steps} steps",
            4,
            lambda: packed(x),
            lambda: dense(x),
            b.cycles(strips, LOOKUPS) + b.cycles(strips, FMAS),
        )
    ]


def tuned(b: Bench) -> list[Figure]:
    """The worst of a grid: layers tuned for their batch, against the plain layer."""
    sides, batches = ((64,), (1,)) if b.quick else ((64, 256, 1024, 4096), (1, 16, 256))
    worst, where = math.inf, ""
    for threads in dict.fromkeys((1, b.threads)):
        torch.set_num_threads(threads)
        timing = Bench(b.quick, seconds=0.25)
        for side in sides:
            plain = nn.Linear(side, side)
            mask = torch.rand(side, side) > 0.9
            weights = {
                "shared": _shared(plain.weight),
                "sparse": SparseWeight(mask, Plain.of(plain.weight.detach()[mask])),
            }
            for name, weight in weights.items():
                layer = copy.deepcopy(plain)
                pack_layer(layer, {"weight": weight})
                for batch in batches:
                    x = torch.randn(batch, side)
                    tune(layer, x)
                    ours, dense = timing.medians(*(lambda f=f, x=x: f(x) for f in (layer, plain)))
                    if dense / ours < worst:
                        worst = dense / ours
                        where = f"{name}, {side} × {side}, batch {batch}, threads {threads}"
    torch.set_num_threads(b.threads)
    return [
        Figure(
            name="tuned layers, the worst of a grid",
            paper=where,
            ours=worst,
            asked=0.95,
            at_most=False,
            unit="×",
        )
    ]


def _shared(weight: Tensor) -> PackedWeight:
    table = torch.linspace(float(weight.detach().min()), float(weight.detach().max()), 16)
    index = torch.bucketize(weight.detach(), (table[1:] + table[:-1]) / 2)
    return SharedValues(index, Plain.of(table, "float32"))


def _dense(b: Bench) -> tuple[int, Tensor]:
    side = 256 if b.quick else SIDE
    return side, torch.randn(side, side)


PARTS = (bitplanes, convolutions, lookups, sparse, hashes, recurrent, tuned)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> list[Figure]:
    torch.manual_seed(options.seed)
    bench = Bench(options.quick)
    parts = [p for p in PARTS if options.only in p.__name__]
    return [figure for part in parts for figure in part(bench)]


if __name__ == "__main__":
    run(f"Kernels beside PyTorch's dense fp32, {SIDE} × {SIDE}", measure, beside="time and bound")
