"""All that Taut has on one network a kind: a curve a technique, and what they reach together.

LeNet-5 on MNIST, an LSTM and a Transformer on the characters of the King James Bible. Each
technique is tried alone at several strengths, from end to end of what a search would try
(`taut compare`), and recipes of several techniques beside them; all recover for equally many steps,
which are few: the curves compare techniques, they are no records (see papers/records.py). Beside
them stand files of other libraries, made and scored here, and figures of papers, marked so.

    python benchmarks/combined.py --json benchmarks/results/combined.json
    python benchmarks/picture.py

Every point is kept in benchmarks/combined/, for the picture. A run that was killed goes on in
runs/combined where it was.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import taut
from taut.data import Batches, images, mnist
from taut.errors import TautError
from taut.frontier_data import family
from taut.search import compare
from taut.types import Direction
from taut.zoo import LeNet5, LstmLanguageModel, TransformerLanguageModel

sys.path.insert(0, str(Path(__file__).parent / "papers"))
sys.path.insert(0, str(Path(__file__).parent))
from against.files import PEERS
from harness import ROOT, Figure, run
from records import Excerpts, language_task, perplexity, vocabulary

KEPT = ROOT / "benchmarks" / "combined"
RUNS = ROOT / "runs" / "combined"
FAST = "training(precision='bfloat16')"
EPOCHS = 3  # of every recipe
HELPERS = "!add_shortcuts, !correct_biases, !equalise, !fold_norms, !widen"  # none is for bytes


@dataclass(frozen=True, kw_only=True)
class Point:
    """A file's bytes and score, or why there is none.

    kind: single (one technique), combined (several), peer (of another library), published (a
    paper's figure, on its own network of this architecture). name: the techniques, the library or
    the paper.
    """

    kind: str
    name: str
    recipe: str = ""
    size_bytes: int | None = None
    score: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One network, how it is trained, and what is tried on it.

    steps: of one epoch; training: epochs of the network itself. most: what may be lost of the
    score, in points or in per cent of perplexity. recipes: of several techniques; {1} and {2} stand
    for recoveries of so many epochs.
    """

    name: str
    build: Callable[[], nn.Module]
    task: Callable[[bool], taut.Task]
    training: int
    learning_rate: float
    strengths: int
    most: float
    recipes: Sequence[str]
    published: Sequence[Point] = ()


class Drawn:
    """So many random batches of images each time, moved by up to a pixel."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, steps: int, batch: int) -> None:
        self.x, self.y, self.steps, self.batch = x, y, steps, batch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.steps):
            chosen = torch.randint(len(self.x), (self.batch,))
            shift = torch.randint(-1, 2, (2,)).tolist()
            yield torch.roll(self.x[chosen], shift, (2, 3)), self.y[chosen]


def digits(quick: bool) -> taut.Task:
    """MNIST; the last epoch counts, nothing is chosen."""
    data, (used, tested, steps) = mnist(), (1000, 300, 4) if quick else (60_000, 10_000, 60)
    x = images(data.train_images[:used], mean=0.0, std=1.0)
    xt = images(data.test_images[:tested], mean=0.0, std=1.0)
    return taut.Task(
        train=Drawn(x, data.train_labels[:used], steps, 64),
        validation=Batches(x[:300], data.train_labels[:300], 300),
        test=Batches(xt, data.test_labels[:tested], 1000), name="lenet5",
    )  # fmt: skip


def verses(quick: bool) -> taut.Task:
    """Stretches of 64 characters; scored by the perplexity of the text's end."""
    task = language_task(argparse.Namespace(quick=quick))
    train = task._data["train"]
    assert isinstance(train, Excerpts)
    test = list(task._data["test"])[: 1 if quick else 4]
    return taut.Task(
        train=Excerpts(train.text, (4 if quick else 60) * 32, 32),
        validation=test, test=test, score=perplexity, better="lower", name="verses",
    )  # fmt: skip


PRUNED = "prune_weights(sparsity={}) > {{1}} > {} > {{2}}"
SUBJECTS = (
    Subject(
        name="LeNet-5", build=lambda: LeNet5(dropout=0.3), task=digits, training=50,
        learning_rate=2e-3, strengths=3, most=0.5,
        recipes=(
            *(PRUNED.format(s, f"share_values(bits={b})")
              for s, b in ((0.9, 5), (0.95, 4), (0.97, 4), (0.98, 3))),
            PRUNED.format(0.95, "quantize(bits=4)"),
            PRUNED.format(0.97, "quantize(bits=3)"),
            *(f"prune_channels(ratio={r}) > {{1}} > code_length() > aim(size_bytes={b}) > {{2}}"
              for r, b in ((0.5, 12_000), (0.5, 6000), (0.6, 3500))),
            "merge_neurons(ratio=0.7) > {1} > code_length() > aim(size_bytes=8000) > {2}",
            "low_rank(energy=0.9) > {1} > share_values(bits=4) > {2}",
            "low_rank(energy=0.9) > {1} > code_length() > aim(size_bytes=8000) > {2}",
            "prune_weights(sparsity=0.95) > {1} > code_length() > aim(size_bytes=5000) > {2}",
            *(f"low_rank(energy={e}) > {{1}} > share_values(bits=4) > {{2}}" for e in (0.95, 0.98)),
            "low_rank(energy=0.98) > {1} > learned_levels(bits=2) > {2}",
        ),
        published=tuple(
            Point(kind="published", name=name, size_bytes=size, score=score)
            for name, size, score in (
                ("Deep Compression", 44_000, 0.9926), ("EPR", 2840, 0.99),
                ("MIRACLE", 1520, 0.9904), ("MIRACLE", 3030, 0.9931),
            )
        ),
    ),
    Subject(
        name="LSTM", build=lambda: LstmLanguageModel(vocabulary(), 64, 128), task=verses,
        training=40, learning_rate=4e-3, strengths=3, most=3.0,
        recipes=(
            *(PRUNED.format(s, f"quantize(bits={b})") for s, b in ((0.7, 4), (0.9, 4))),
            PRUNED.format(0.85, "share_values(bits=4)"),
            *(f"prune_channels(ratio={r}) > {{1}} > code_length() > aim(size_bytes={b}) > {{2}}"
              for r, b in ((0.25, 80_000), (0.5, 40_000))),
            "prune_channels(ratio=0.25) > {1} > quantize(bits=4) > {2}",
            "low_rank(energy=0.9) > {1} > code_length() > aim(size_bytes=60000) > {2}",
            *(PRUNED.format(s, f"quantize(bits={b})") for s, b in ((0.3, 4), (0.4, 5))),
            "prune_channels(ratio=0.05) > {1} > code_length() > aim(size_bytes=150000) > {2}",
        ),
    ),
    Subject(
        name="Transformer", build=lambda: TransformerLanguageModel(vocabulary(), 64, 4, 2, 64),
        task=verses, training=40, learning_rate=3e-3, strengths=3, most=3.0,
        recipes=(
            *(PRUNED.format(s, f"quantize(bits={b})") for s, b in ((0.5, 4), (0.8, 4))),
            PRUNED.format(0.7, "share_values(bits=4)"),
            *(f"prune_channels(ratio={r}) > {{1}} > code_length() > aim(size_bytes={b}) > {{2}}"
              for r, b in ((0.15, 50_000), (0.3, 25_000))),
            "prune_channels(ratio=0.25) > {1} > quantize(bits=4) > {2}",
            "low_rank(energy=0.9) > {1} > code_length() > aim(size_bytes=40000) > {2}",
            *(PRUNED.format(s, f"quantize(bits={b})") for s, b in ((0.3, 4), (0.3, 5))),
            "prune_channels(ratio=0.05) > {1} > code_length() > aim(size_bytes=100000) > {2}",
        ),
    ),
)  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Two figures a network; its points are kept."""
    for subject in SUBJECTS:
        if options.only.lower() not in subject.name.lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) if options.quick else RUNS / subject.name
            # on a CPU the fused attention trains at half the speed
            with sdpa_kernel(SDPBackend.MATH):
                points, better = tried(subject, place, options)
        kept = KEPT if not options.quick else options.json.parent if options.json else None
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            told = {
                "name": subject.name, "better": better, "most": subject.most,
                "points": [asdict(p) for p in points],
            }  # fmt: skip
            (kept / f"{subject.name.lower()}.json").write_text(json.dumps(told, indent=1) + "\n")
        yield from of(subject, points, better)


def tried(
    subject: Subject, place: Path, options: argparse.Namespace
) -> tuple[list[Point], Direction]:
    """The original and all that was made of it."""
    quick = options.quick
    torch.manual_seed(options.seed)
    task, model = subject.task(quick), subject.build()
    weights = place / "weights.pt"
    if not weights.is_file():
        how = taut.Recover(
            epochs=1 if quick else subject.training, learning_rate=subject.learning_rate,
            distill=0.0, weight_decay=0.02,
        )  # fmt: skip
        taut.recover(model, task, how, settings=taut.Recipe.parse(f"{FAST} > {how}").settings(1))
        place.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    alone = compare(
        model, task, epochs=1 if quick else EPOCHS, settings=FAST, seed=options.seed,
        strengths=1 if quick else subject.strengths, folder=place / "alone",
        techniques="prune_weights, quantize" if quick else HELPERS,
    )  # fmt: skip
    size, score = alone.original.size_bytes, alone.original.score
    logging.info("%s: %d bytes, score %.4f", subject.name, size, score)
    points = [Point(kind="original", name=subject.name, size_bytes=size, score=score)]
    for row in alone.rows:
        got = row.candidate.measurement if row.candidate else None
        points.append(
            Point(kind="single", name=row.technique, recipe=row.recipe, why=row.why,
                  size_bytes=got and got.size_bytes, score=got and got.score)
        )  # fmt: skip
    for number, text in enumerate(subject.recipes[:1] if quick else subject.recipes):
        recipe = f"{FAST} > " + text.format("", *(f"recover(epochs={n})" for n in (1, EPOCHS - 1)))
        points.append(together(model, task, recipe, place / f"combined-{number}", options.seed))
        logging.info("%s", points[-1])
    for name, make in PEERS.items():
        points += peer(name, functools.partial(make, model, task))
    return [*points, *subject.published], task.better


def together(model: nn.Module, task: taut.Task, recipe: str, place: Path, seed: int) -> Point:
    """What a recipe of several techniques comes to."""
    told = {"kind": "combined", "name": family(recipe), "recipe": recipe}
    try:
        got = taut.compress(model, task, recipe, folder=place, seed=seed).measurement
    except TautError as error:
        return Point(**told, why=str(error))
    return Point(**told, size_bytes=got.size_bytes, score=got.score)


def peer(name: str, make: Callable[[], list[tuple[int, float]]]) -> list[Point]:
    """Another library's files, or its error."""
    try:
        return [Point(kind="peer", name=name, size_bytes=b, score=s) for b, s in make()]
    except Exception as error:  # whatever another library raises is its row's text
        return [Point(kind="peer", name=name, why=f"{type(error).__name__}: {error}"[:300])]


def of(subject: Subject, points: Sequence[Point], better: Direction) -> Iterator[Figure]:
    """The smallest file that is good enough: of one technique, of several, of other libraries."""
    original = points[0]
    allowed = (
        original.score - subject.most / 100 if better == "higher"
        else original.score * (1 + subject.most / 100)
    )  # fmt: skip

    def smallest(*kinds: str) -> Point:
        good = [
            p for p in points if p.kind in kinds and p.size_bytes and math.isfinite(p.score)
            and (p.score >= allowed if better == "higher" else p.score <= allowed)
        ]  # fmt: skip
        return min(good, key=lambda p: p.size_bytes or 0, default=original)

    unit = "points" if better == "higher" else "% of perplexity"
    one, several, other = smallest("single"), smallest("combined"), smallest("peer")
    best = smallest("single", "combined")
    at = f"{subject.name}, at most {subject.most:g} {unit} lost"
    ratio = one.size_bytes / several.size_bytes
    yield Figure(
        name=f"{at}: several techniques beside the best one", ours=ratio,
        paper=f"{one.name}: {one.size_bytes:,} bytes", asked=1, at_most=False, unit="×",
        command=several.recipe,
    )  # fmt: skip
    yield Figure(
        name=f"{at}: smaller than other libraries' files", command=best.recipe,
        ours=other.size_bytes / best.size_bytes, asked=1, at_most=False, unit="×",
        paper=f"{other.name}: {other.size_bytes:,} bytes",
    )  # fmt: skip


if __name__ == "__main__":
    run(
        "Everything together: one technique, several, and other libraries", measure, beside="others"
    )
