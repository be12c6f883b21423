"""Draws the picture at the top of README.md from benchmarks/combined/, for light pages and dark.

    python benchmarks/combined.py --json benchmarks/results/combined.json
    python benchmarks/picture.py

A panel a network: score against the file's bytes. A thin curve is one technique at several
strengths, a square is another library's file, a diamond a paper's figure; the thick line is the
best of everything that Taut has. Curves end where the panel does: what lost more is not shown.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = HERE / "combined"
DOCS, README = HERE.parent / "docs", HERE.parent / "README.md"
MARKS = re.compile(r"(<!-- picture -->\n).*?(<!-- /picture -->)", re.DOTALL)
PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark)" srcset="docs/combined-dark.svg">
  <img alt="Score against bytes of the file, of three networks" src="docs/combined-light.svg">
</picture>

Every technique alone, all of them together, and others, after equally few steps of recovery
(`python benchmarks/combined.py`): {said}."""
NAMES = ("lenet-5", "lstm", "transformer")
FAMILIES = {
    "fewer weights": ("prune_weights", "l0_gates", "variational_dropout"),
    "fewer values": ("share_values", "hash_weights", "structured_matrix", "factor_weights",
                     "code_length"),
    "fewer bits": ("quantize", "learned_levels", "binarize"),
    "fewer units": ("prune_channels", "merge_neurons", "drop_blocks", "tie_layers"),
    "another structure": ("low_rank", "swap_convs", "student"),
}  # fmt: skip
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1b2025", "soft": "#59616a", "grid": "#ebe8e0",
              "line": "#c9c5ba", "after": "#0c6a73",
              "hues": ("#dc9132", "#7161ad", "#bd5571", "#71902f", "#4682bd")},
    "dark": {"paper": "#0d1117", "ink": "#e9e7e2", "soft": "#a0a8b0", "grid": "#242a30",
             "line": "#454d55", "after": "#57c1c6",
             "hues": ("#e7a955", "#a596e3", "#e58aa3", "#a5c45f", "#7db4ec")},
}  # fmt: skip
SIZE, TOP, LOW = (1240, 520), 58, 436
PANEL, GAP, LEFT = 350, 58, 52
SIGNS = {"peer": "M-5-5h10v10h-10z", "published": "M-6 0l6-6 6 6-6 6z"}
Spot = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One network's points and where they fall.

    most: what may be lost of the score, in points or in per cent of perplexity. worst: the lowest
    score that is shown.
    """

    name: str
    points: list[dict[str, Any]]
    higher: bool
    most: float
    left: float
    original: dict[str, Any] = field(init=False)
    best: float = field(init=False)
    worst: float = field(init=False)
    bytes: Spot = field(init=False)

    def __post_init__(self) -> None:
        (original,) = [p for p in self.points if p["kind"] == "original"]
        score = original["score"]
        worst = score - 0.04 if self.higher else 1.5 * score
        shown = [p for p in self.points if p["size_bytes"] and self.loss(p["score"], worst) <= 0]
        found = [p["score"] for p in shown]
        best = max(found) if self.higher else min(found)
        sizes = [p["size_bytes"] for p in shown]
        ends = min(sizes) / 1.25, max(sizes) * 1.25
        for name, value in (("original", original), ("best", best + 0.06 * (best - worst)),
                            ("worst", worst), ("bytes", ends)):  # fmt: skip
            object.__setattr__(self, name, value)

    def loss(self, score: float | None, than: float) -> float:
        """How much worse a score is; infinite where there is none."""
        if score is None or not math.isfinite(score):
            return math.inf
        return than - score if self.higher else score - than

    def shown(self, *kinds: str) -> list[dict[str, Any]]:
        """The points of some kinds that lie in the panel."""
        return [
            p for p in self.points
            if p["kind"] in kinds and p["size_bytes"] and self.loss(p["score"], self.worst) <= 0
        ]  # fmt: skip

    def spot(self, point: dict[str, Any]) -> Spot:
        """Where a point is drawn."""
        return self.x(point["size_bytes"]), self.y(point["score"])

    def x(self, size: float) -> float:
        low, high = map(math.log, self.bytes)
        return self.left + PANEL * (math.log(size) - low) / (high - low)

    def y(self, score: float) -> float:
        return TOP + (LOW - TOP) * (self.best - score) / (self.best - self.worst)

    def said(self) -> str:
        """How small a file is good enough."""
        score, share = self.original["score"], self.most / 100
        bound = score - share if self.higher else score * (1 + share)
        kept = [p for p in self.shown("single", "combined") if self.loss(p["score"], bound) <= 0]
        least = min((p["size_bytes"] for p in kept), default=self.original["size_bytes"])
        lost = "points of accuracy" if self.higher else "% of perplexity"
        ratio = self.original["size_bytes"] / least
        return f"{self.name} {ratio:.3g} times smaller within {self.most:g} {lost}"

    def unbeaten(self, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """From small to large those that no smaller one beats."""
        found: list[dict[str, Any]] = []
        for point in sorted(points, key=lambda p: (p["size_bytes"], self.loss(p["score"], 0))):
            if not found or self.loss(point["score"], found[-1]["score"]) < 0:
                found.append(point)
        return found


class Drawing:
    """Lines of SVG in one theme, and which places have writing already."""

    def __init__(self, theme: dict[str, Any]) -> None:
        self.theme = theme
        self.lines: list[str] = []
        self.taken: list[tuple[float, float, float, float]] = []

    def add(self, shape: str, told: str = "", **attributes: object) -> None:
        given = " ".join(f'{k.replace("_", "-")}="{_short(v)}"' for k, v in attributes.items())
        end = f">{escape(told)}</{shape}>" if told else "/>"
        self.lines.append(f"<{shape} {given}{end}")

    def text(
        self, at: Spot, told: str, size: float = 13, colour: str = "soft", **more: str
    ) -> None:
        fill = self.theme.get(colour, colour)
        self.add("text", told, x=at[0], y=at[1], fill=fill, font_size=size, **more)

    def path(self, spots: Sequence[Spot], **more: object) -> None:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        self.add("polyline", points=points, fill="none", **more)

    def keep_clear(self, spots: Sequence[Spot]) -> None:
        """No writing on this line."""
        for (x0, y0), (x1, y1) in itertools.pairwise(spots):
            parts = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
            for i in range(parts + 1):
                at = i / parts
                self._take((x0 + at * (x1 - x0), y0 + at * (y1 - y0)), 2)

    def dot(self, at: Spot, radius: float, fill: str, **more: object) -> None:
        self.add("circle", cx=at[0], cy=at[1], r=radius, fill=fill, **more)
        self._take(at, radius)

    def sign(self, at: Spot, kind: str) -> None:
        """The mark of what is not Taut's."""
        self.add("path", d=SIGNS[kind], transform=f"translate({at[0]:.1f} {at[1]:.1f})",
                 fill=self.theme["paper"], stroke=self.theme["ink"], stroke_width=1.6)  # fmt: skip
        self._take(at, 6)

    def _take(self, at: Spot, radius: float) -> None:
        self.taken.append((at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius))

    def label(self, at: Spot, told: str, within: Spot, colour: str, weight: str = "400") -> None:
        """Write beside a point where there is room, or nowhere."""
        wide = 6.4 * len(told) * (1.06 if weight != "400" else 1)
        right, left, middle = 10.0, -9 - wide, -wide / 2
        for dx, dy in ((right, 4), (right - 2, -8), (right - 2, 16), (left, 4), (left + 2, -8),
                       (left + 2, 16), (middle, -10), (middle, 20), (right + 6, -8)):  # fmt: skip
            x, y = at[0] + dx, at[1] + dy
            box = x - 2, y - 10, x + wide + 2, y + 2
            inside = within[0] <= x and x + wide <= within[1] and box[1] >= TOP and y < LOW - 2
            if inside and not any(_meet(box, other) for other in self.taken):
                self.taken.append(box)
                self.text((x, y), told, 11.5, colour, font_weight=weight)
                return

    def __str__(self) -> str:
        wide, high = SIZE
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
        )
        return "\n".join([head, *self.lines, "</svg>\n"])


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else escape(str(value))


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def panels(kept: Path = KEPT) -> list[Panel]:
    """What the records say, in order."""
    found = []
    for number, name in enumerate(n for n in NAMES if (kept / f"{n}.json").is_file()):
        told = json.loads((kept / f"{name}.json").read_text(encoding="utf-8"))
        left = LEFT + number * (PANEL + GAP)
        higher = told["better"] == "higher"
        found.append(Panel(told["name"], told["points"], higher, told["most"], left))
    return found


def drawn(found: Sequence[Panel], theme: dict[str, Any]) -> str:
    """The picture in one theme."""
    drawing = Drawing(theme)
    drawing.add("title", "Score against bytes of the file: one technique a curve, and all together")
    drawing.add("rect", width=SIZE[0], height=SIZE[1], fill=theme["paper"])
    for panel in found:
        _axes(drawing, panel)
        _plotted(drawing, panel)
    _key(drawing)
    return str(drawing)


def _axes(drawing: Drawing, panel: Panel) -> None:
    theme, right = drawing.theme, panel.left + PANEL
    what = "test accuracy, %" if panel.higher else "perplexity, less is better"
    drawing.text((panel.left, TOP - 34), panel.name, size=18, colour="ink", font_weight=600)
    drawing.text((panel.left, TOP - 14), f"{what}, against bytes of the file")
    for value in _ticks(*sorted((panel.best, panel.worst))):
        y = panel.y(value)
        drawing.add("path", d=f"M{panel.left} {y:.1f}H{right}", stroke=theme["grid"])
        told = f"{100 * value:g}" if panel.higher else f"{value:g}"
        drawing.text((panel.left - 7, y + 4), told, size=12, text_anchor="end")
    for size in (s * 10**p for p in range(2, 9) for s in (1, 3)):
        if panel.bytes[0] <= size <= panel.bytes[1]:
            x = panel.x(size)
            drawing.add("path", d=f"M{x:.1f} {TOP}V{LOW}", stroke=theme["grid"])
            drawing.text((x, LOW + 18), _bytes(size), size=12, text_anchor="middle")
    drawing.add("path", d=f"M{panel.left} {LOW}H{right}", stroke=theme["line"])


def _ticks(low: float, high: float) -> Iterator[float]:
    step = next(
        s * 10.0**p for p in range(-4, 4) for s in (1, 2, 5) if (high - low) / (s * 10.0**p) <= 6
    )
    value = math.ceil(low / step) * step
    while value <= high:
        yield round(value, 9)
        value += step


def _bytes(size: float) -> str:
    return next(f"{size / u:g} {n}" for u, n in ((1e6, "MB"), (1e3, "kB"), (1, "B")) if size >= u)


def _plotted(drawing: Drawing, panel: Panel) -> None:
    """A curve a technique, what is not Taut's, the best of everything; then the writing."""
    theme, labels = drawing.theme, []
    for hue, names in zip(theme["hues"], FAMILIES.values(), strict=True):
        for name in names:
            its = panel.unbeaten([p for p in panel.shown("single") if p["name"] == name])
            spots = [panel.spot(p) for p in its]
            drawing.path(spots, stroke=hue, stroke_width=1.3, stroke_opacity=0.75)
            for spot in spots:
                drawing.dot(spot, 2.6, hue)
            labels += [(spot, name, hue, "400") for spot in spots[:1]]
    best = panel.unbeaten(panel.shown("single", "combined", "original"))
    line = [panel.spot(p) for p in best]
    drawing.path(line, stroke=theme["after"], stroke_width=3.2, stroke_linejoin="round")
    drawing.keep_clear(line)
    for point in panel.shown("combined"):
        drawing.dot(panel.spot(point), 2.6, theme["after"])
    for spot in line:
        drawing.dot(spot, 4.0, theme["after"])
    for kind in ("peer", "published"):
        for point in panel.shown(kind):
            drawing.sign(panel.spot(point), kind)
            told = f"{point['name']}, published" if kind == "published" else point["name"]
            labels.insert(0, (panel.spot(point), told, "ink", "400"))
    several = [(panel.spot(p), p["name"], "after", "600") for p in best if p["kind"] == "combined"]
    start = panel.spot(panel.original)
    drawing.dot(start, 5.0, theme["paper"], stroke=theme["after"], stroke_width=2)
    for spot, told, colour, weight in ((start, "original", "ink", "400"), *several, *labels):
        drawing.label(spot, told, (panel.left, panel.left + PANEL + GAP / 2), colour, weight)


def _key(drawing: Drawing) -> None:
    theme, x, y = drawing.theme, float(LEFT), SIZE[1] - 26.0
    drawing.path([(x, y - 4), (x + 22, y - 4)], stroke=theme["after"], stroke_width=3.2)
    drawing.text((x + 30, y), "best of all, combined", colour="ink")
    x += 184
    for hue, name in zip(theme["hues"], FAMILIES, strict=True):
        drawing.path([(x, y - 4), (x + 22, y - 4)], stroke=hue, stroke_width=1.6)
        drawing.dot((x + 11, y - 4), 2.6, hue)
        drawing.text((x + 29, y), name)
        x += 46 + 6.8 * len(name)
    for kind, name in (("peer", "another library's file"), ("published", "a paper's figure")):
        drawing.sign((x + 8, y - 4), kind)
        drawing.text((x + 20, y), name)
        x += 38 + 6.8 * len(name)


def written(readme: str, found: Sequence[Panel]) -> str:
    """The README with the picture, and what it says, between its marks; nothing without panels."""
    block = ""
    if found:
        block = PICTURE.format(said=", ".join(p.said() for p in found)) + "\n"
    return MARKS.sub(lambda m: f"{m[1]}{block}{m[2]}", readme)


if __name__ == "__main__":
    for name, theme in THEMES.items():
        (DOCS / f"combined-{name}.svg").write_text(drawn(panels(), theme), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    README.write_text(written(text, panels()), encoding="utf-8")
