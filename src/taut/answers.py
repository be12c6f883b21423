"""Which answers changed: the test data's classes before and after, and the examples behind them.

    matrix[t, a] = how many examples of class t were answered by class a

for the original and for the compressed network; their difference is what compression did.
"""

from __future__ import annotations

import base64
import logging
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.modules import device_of
from taut.task import Batch, Task

_log = logging.getLogger("taut")
MOST_CLASSES = 64  # of a matrix that is drawn
MOST_SHOWN = 24  # examples, of which half were right before
_SIDE = 64  # pixels of a picture at most
_LETTERS = 280
_LEAST = 5  # pixels on a side of what may be a picture


@dataclass(frozen=True, kw_only=True)
class Changed:
    """An example whose answer changed. picture: a PNG as a data URI; text: instead of one."""

    number: int
    target: str
    before: str
    after: str
    was_right: bool
    is_right: bool
    picture: str = ""
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How many examples of a class were given an answer, before and after."""

    target: str
    answer: str
    before: int
    after: int
    right: bool


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of a classifier, on all of the test data.

    before, after: [classes, classes], by target and answer; empty where there are too many classes.
    lost: right before and wrong after; won: the other way round; changed: all whose answer did.
    moved: the cells that changed most. shown: some of the examples, those that were lost first.
    """

    classes: tuple[str, ...]
    examples: int
    changed: int
    lost: int
    won: int
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    moved: tuple[Moved, ...]
    shown: tuple[Changed, ...]


@torch.no_grad()
def answers(original: nn.Module, compressed: nn.Module, task: Task) -> Answers | None:
    """Compare two networks' answers on the test data; None where they are no single classes.

    A task's `show` gives each example's picture or text; else a tensor that may be a picture is
    shown. `about["labels"]` names the classes.
    """
    if not task.is_classification:
        return None
    seen: list[Tensor] = []  # [3, n] of each batch: target, before, after
    kept: dict[bool, list[tuple[int, list[int], Batch, int]]] = {True: [], False: []}
    at, most = 0, 0
    was = original.training, compressed.training
    try:
        for batch in task.batches("test", device_of(original)):
            old = original.eval()(*batch.args, **batch.kwargs)
            there = batch.to(device_of(compressed))
            new = compressed.eval()(*there.args, **there.kwargs)
            if not _classes(old, new, batch.target):
                return None
            most = max(most, old.shape[1])
            found = torch.stack([x.cpu() for x in (batch.target, old.argmax(1), new.argmax(1))])
            told = (found[0] >= 0) & (found[0] < old.shape[1])  # others the loss ignores
            for i in ((found[1] != found[2]) & told).nonzero().flatten().tolist():
                mine = kept[bool(found[1, i] == found[0, i])]
                if len(mine) < MOST_SHOWN:
                    mine.append((at + i, found[:, i].tolist(), batch, i))
            seen.append(found[:, told])
            at += found.shape[1]
    finally:
        original.train(was[0])
        compressed.train(was[1])
    every = torch.cat(seen, 1)
    if not every.shape[1]:
        return None
    names = _names(task, most)
    target, before, after = every
    lost = kept[True][: max(MOST_SHOWN // 2, MOST_SHOWN - len(kept[False]))]
    some = [*lost, *kept[False][: MOST_SHOWN - len(lost)]]
    matrices = [torch.zeros(0, 0)] * 2
    if most <= MOST_CLASSES:
        matrices = [_matrix(target, answer, most) for answer in (before, after)]
    return Answers(
        classes=names if most <= MOST_CLASSES else (), examples=every.shape[1],
        changed=int((before != after).sum()),
        lost=int(((before == target) & (after != target)).sum()),
        won=int(((before != target) & (after == target)).sum()),
        before=_rows(matrices[0]), after=_rows(matrices[1]),
        moved=_moved(every, names),
        shown=tuple(_shown(task, names, mine, n, b, i) for n, mine, b, i in some),
    )  # fmt: skip


def _classes(old: Any, new: Any, target: Any) -> bool:
    """Whether these are scores of classes, [n, classes], and classes, [n]."""
    if not all(isinstance(x, Tensor) for x in (old, new, target)):
        return False
    whole = not target.is_floating_point() and target.dim() == 1
    return bool(whole and old.dim() == 2 and old.shape == new.shape and len(old) == len(target))


def _names(task: Task, count: int) -> tuple[str, ...]:
    labels = task.about.get("labels")
    if isinstance(labels, list | tuple) and len(labels) == count:
        return tuple(map(str, labels))
    return tuple(map(str, range(count)))


def _matrix(target: Tensor, answer: Tensor, count: int) -> Tensor:
    return torch.bincount(target * count + answer, minlength=count**2).view(count, count)


def _rows(matrix: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(v) for v in row) for row in matrix.tolist())


def _moved(every: Tensor, names: tuple[str, ...], most: int = 12) -> tuple[Moved, ...]:
    old, new = (Counter(zip(*every[[0, k]].tolist(), strict=True)) for k in (1, 2))
    cells = sorted({*old, *new}, key=lambda c: (-abs(new[c] - old[c]), c))
    return tuple(
        Moved(target=names[t], answer=names[a], before=old[t, a], after=new[t, a], right=t == a)
        for t, a in cells[:most] if new[t, a] != old[t, a]
    )  # fmt: skip


def _shown(
    task: Task, names: tuple[str, ...], seen: list[int], number: int, batch: Batch, place: int
) -> Changed:
    target, before, after = seen
    picture, text = "", ""
    one = list(batch.examples())[place] if task.show else None
    if task.show and one is not None:
        try:
            given = task.show(*one.args, **one.kwargs)
        except Exception as error:  # of the user's own; what was trained is not lost to it
            _log.warning("show() failed on example %d: %s", number + 1, error)
            given = ""
        picture, text = (_png(given), "") if isinstance(given, Tensor) else ("", str(given))
    else:
        first = batch.args[0] if batch.args else next(iter(batch.kwargs.values()), None)
        if isinstance(first, Tensor) and first.dim() and len(first) == batch.size:
            picture = _png(first[place])
    if len(text) > _LETTERS:
        text = f"{text[: _LETTERS - 1]}…"
    return Changed(
        number=number + 1, target=names[target], before=names[before], after=names[after],
        was_right=before == target, is_right=after == target, picture=picture, text=text,
    )  # fmt: skip


def _png(image: Tensor) -> str:
    """An image [channels, height, width] or [height, width] as a data URI; empty for another thing.

    Its numbers are stretched from the least to the greatest; a large one is shrunk.
    """
    image = image.detach().cpu().float()
    image = image.unsqueeze(0) if image.dim() == 2 else image
    if image.dim() != 3 or image.shape[0] not in (1, 3) or min(image.shape[1:]) < _LEAST:
        return ""
    longest = max(image.shape[1:])
    if longest > _SIDE:
        height, width = (max(1, side * _SIDE // longest) for side in image.shape[1:])
        image = F.adaptive_avg_pool2d(image, (height, width))
    image = image.nan_to_num()
    low, high = image.min(), image.max()
    pixels = ((image - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    colours, height, width = pixels.shape
    lines = pixels.permute(1, 2, 0).reshape(height, width * colours).numpy()
    body = b"".join(b"\0" + line.tobytes() for line in lines)
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if colours == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(body, 9)), (b"IEND", b""))
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
