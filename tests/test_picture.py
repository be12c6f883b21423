"""The picture at the top of the README: what it shows of the records, and that it is theirs."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import picture
finally:
    sys.path.pop(0)

SVG = "{http://www.w3.org/2000/svg}"


def point(kind, name, size_bytes, score, **more):
    return {"kind": kind, "name": name, "size_bytes": size_bytes, "score": score, **more}


POINTS = [
    point("original", "LeNet-5", 1_000_000, 0.99),
    point("single", "quantize", 250_000, 0.99),
    point("single", "quantize", 120_000, 0.985),
    point("single", "quantize", 130_000, 0.97),  # larger and worse: beaten
    point("single", "quantize", 60_000, 0.5),  # off the picture
    point("single", "student", None, None, why="refused"),
    point("combined", "prune_weights > quantize", 50_000, 0.988),
    point("peer", "NNCodec", 200_000, 0.989),
    point("published", "EPR", 30_000, 0.985),
]


@pytest.fixture
def kept(tmp_path):
    told = {"name": "LeNet-5", "better": "higher", "most": 0.5, "points": POINTS}
    (tmp_path / "lenet-5.json").write_text(json.dumps(told))
    rising = [{**p, "score": p["score"] and 3 / p["score"]} for p in POINTS]
    told = {"name": "LSTM", "better": "lower", "most": 3, "points": rising}
    (tmp_path / "lstm.json").write_text(json.dumps(told))
    return tmp_path


def test_a_panel_shows_what_is_good_enough(kept):
    panel, _ = picture.panels(kept)
    assert {p["name"] for p in panel.shown("single")} == {"quantize"}
    assert len(panel.shown("single")) == 3
    best = panel.unbeaten(panel.shown("single", "combined", "original"))
    assert [p["size_bytes"] for p in best] == [50_000, 250_000]


def test_better_is_higher_and_smaller_is_left(kept):
    for panel in picture.panels(kept):
        (small,), (original,) = panel.shown("combined"), panel.shown("original")
        assert panel.x(small["size_bytes"]) < panel.x(original["size_bytes"])
        assert panel.y(small["score"]) > panel.y(original["score"])  # it is worse, thus lower
        for p in panel.points:
            if p["size_bytes"] and p["score"] and p["size_bytes"] > 60_000:
                x, y = panel.spot(p)
                assert panel.left <= x <= panel.left + picture.PANEL
                assert picture.TOP <= y <= picture.LOW


@pytest.mark.parametrize("theme", picture.THEMES)
def test_what_is_drawn(theme, kept):
    root = ElementTree.fromstring(picture.drawn(picture.panels(kept), picture.THEMES[theme]))
    written = [t.text for t in root.iter(f"{SVG}text")]
    for told in ("LeNet-5", "LSTM", "original", "quantize", "prune_weights > quantize", "NNCodec",
                 "EPR, published", "best of all, combined", *picture.FAMILIES):  # fmt: skip
        assert told in written
    assert "student" not in written
    thick = [p for p in root.iter(f"{SVG}polyline") if p.get("stroke-width") == "3.2"]
    assert len(thick) == 3  # of two panels, and in the key
    assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "foreignObject"))]


def test_writing_overlaps_nothing(kept):
    drawing = picture.Drawing(picture.THEMES["light"])
    for _ in range(8):
        drawing.label((100.0, 200.0), "one place", (0.0, 400.0), "ink")
    boxes = drawing.taken
    assert 2 <= len(boxes) < 8
    assert not any(picture._meet(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_every_technique_has_its_hue():
    from taut.technique import techniques

    hued = [n for names in picture.FAMILIES.values() for n in names]
    helpers = {"add_shortcuts", "correct_biases", "equalise", "fold_norms", "widen"}
    assert len(hued) == len(set(hued))
    assert set(hued) <= set(techniques())
    assert helpers.isdisjoint(hued)


def test_what_is_said_of_it(kept):
    lenet, lstm = picture.panels(kept)
    assert lenet.said() == "LeNet-5 20 times smaller within 0.5 points of accuracy"
    assert lstm.said() == "LSTM 20 times smaller within 3 % of perplexity"
    before = "a\n<!-- picture -->\nold\n<!-- /picture -->\nb"
    told = picture.written(before, [lenet, lstm])
    assert "old" not in told
    assert f"{lenet.said()}, {lstm.said()}.\n<!-- /picture -->\nb" in told
    assert picture.written(told, []) == before.replace("old\n", "")


def test_the_readmes_picture_is_that_of_the_records():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- picture -->") == 1
    assert picture.written(readme, picture.panels()) == readme
    for name, theme in picture.THEMES.items() if picture.panels() else ():
        kept = (ROOT / "docs" / f"combined-{name}.svg").read_text(encoding="utf-8")
        assert picture.drawn(picture.panels(), theme) == kept
