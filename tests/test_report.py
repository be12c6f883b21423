"""The page that shows a report's numbers."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import HOSTILE, Run
from torch import nn

import taut
from taut import report, report_data
from taut.angles import RowAngles
from taut.answers import Answers, Changed, Moved
from taut.errors import RunError
from taut.report import format_change, write_report
from taut.report_data import (
    EngineRow,
    LayerRow,
    LayersAt,
    ReportData,
    Row,
    SensitivityRow,
)
from taut.types import Candidate, Measurement

POINT = "\N{MINUS SIGN}1.00 points"


@pytest.fixture(scope="module")
def result(recipe_run: Run) -> taut.Result:
    return recipe_run[0]


@pytest.fixture(scope="module")
def model(recipe_run: Run) -> nn.Module:
    return recipe_run[1]


@pytest.fixture(scope="module")
def data(recipe_run: Run) -> ReportData:
    return report_data.report_data(*recipe_run)


# ---- words ----------------------------------------------------------------------------------


def test_a_timing_changes_only_by_more_than_its_spread() -> None:
    row = Row(label="", unit="ms", before=1.0, after=1.1, before_spread=0.2, after_spread=0.0)
    assert row.change == "same"
    assert format_change(row) == "the same within the spread"
    assert replace(row, before_spread=0.05).change == "worse"
    assert format_change(replace(row, before_spread=0.05)) == "1.10× slower"
    assert replace(row, after=None).change == "unknown"
    assert format_change(replace(row, after=None)) == ""


@pytest.mark.parametrize(
    ("row", "change", "words"),
    [
        (Row(label="", unit="bytes", before=400, after=100), "better", "4.00× smaller"),
        (Row(label="", unit="bytes", before=100, after=400), "worse", "4.00× larger"),
        (Row(label="", unit="count", before=9, after=9), "same", "the same"),
        (Row(label="", unit="count", before=9, after=0), "better", "fewer"),
        (Row(label="", unit="score", better="higher", before=0.99, after=0.98), "worse", POINT),
        (Row(label="", unit="score", better="lower", before=0.99, after=0.98), "better", None),
        (Row(label="", unit="score", before=1.0, after=math.nan), "unknown", ""),
    ],
)
def test_changes_in_words(row: Row, change: str, words: str | None) -> None:
    assert row.change == change
    assert words is None or format_change(row, percent=True) == words


# ---- the page -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(data: ReportData) -> str:
    return report.render(data)


def without_script(page: str) -> str:
    """The page without its scripts, to search what we wrote ourselves."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def numbers(page: str) -> Any:
    block = re.search(r'<script type="application/json" id="numbers-json">(.*?)</script>', page)
    assert block is not None
    return json.loads(block[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_page_loads_nothing_and_is_small(page: str) -> None:
    own = without_script(page)
    assert len(page.encode()) < 6_000_000
    assert not re.search(r"""(src|href|action|data)\s*=\s*["']?\s*(https?:)?//""", own)
    assert not re.search(r"url\(|@import", own)
    assert set(re.findall(r'href="([^"]*)"', own)) >= {"#main", "#numbers", "#file"}
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', own))
    (policy,) = re.findall(r'content="(default-src[^"]*)"', own)
    sources = {word for rule in policy.split(";") for word in rule.split()[1:]}
    assert sources == {"'none'", "'unsafe-inline'", "data:"}


def test_links_and_labels_lead_somewhere(page: str) -> None:
    own = without_script(page)
    ids = re.findall(r'id="([^"]*)"', own)
    assert len(ids) == len(set(ids))
    pointed = re.findall(r'(?:href="#|aria-labelledby=")([^"]*)"', own)
    assert set(pointed) <= set(ids)
    plots = re.findall(r'<div class="plot[^>]*>', own)
    assert len(plots) == 3 + 1 + 2 + 1 + 3  # candidates, parts, two sites, angles, training
    assert all('role="img"' in p and "aria-label=" in p for p in plots)
    assert own.count("<caption>") == own.count("<table>") == 5
    assert all("scope=" in th for th in re.findall(r"<th\b[^>]*>", own))


def test_the_page_holds_all_numbers_as_json(page: str, data: ReportData) -> None:
    found = numbers(page)
    assert found["after_bytes"] == data.after_bytes
    assert found["epochs"][2]["loss"] == data.epochs[2].loss
    assert found.keys() == set(data.__dataclass_fields__)


def test_what_is_not_finite_becomes_null(data: ReportData) -> None:
    epochs = (replace(data.epochs[0], loss=math.nan), replace(data.epochs[1], score=math.inf))
    page = report.render(replace(data, epochs=epochs, score_after=math.nan))
    found = numbers(page)
    assert found["epochs"][0]["loss"] is None
    assert "not a finite number" in page


def test_text_of_the_run_is_escaped_everywhere(page: str, data: ReportData) -> None:
    assert data.task == f"digits {HOSTILE}"
    assert HOSTILE not in page
    assert html.escape(HOSTILE) in without_script(page)
    assert numbers(page)["task"] == data.task
    hostile = replace(
        data,
        recipe=HOSTILE, command=HOSTILE, goal=HOSTILE,
        versions={"taut": HOSTILE}, machine={HOSTILE: HOSTILE},
        candidates=(replace(data.candidates[0], recipe=HOSTILE),),
        tensors=(replace(data.tensors[0], names=(f'"{HOSTILE}',)), *data.tensors[1:]),
        weights=(replace(data.weights[0], name=f'"{HOSTILE}'), *data.weights[1:]),
        phases=(replace(data.phases[0], techniques=HOSTILE),),
    )  # fmt: skip
    page = report.render(hostile)
    assert HOSTILE not in page
    assert "<b>bold" not in page
    assert 'of "<' not in page
    assert numbers(page)["machine"] == {HOSTILE: HOSTILE}


def test_the_headline_tells_size_and_score(data: ReportData) -> None:
    measured = replace(
        data, before_bytes=1724320, after_bytes=43980, score_before=0.9931, score_after=0.9928
    )
    page = without_script(report.render(measured)).replace("\N{NO-BREAK SPACE}", " ")
    assert "<strong>39.2× smaller</strong>" in page
    assert "1,724,320 → 43,980 bytes; score 99.31 % → 99.28 %" in page
    assert "<strong>2.00× larger</strong>" in report.render(
        replace(data, before_bytes=100, after_bytes=200)
    )


def test_it_says_when_the_test_data_chose(page: str, data: ReportData, goal_run: Run) -> None:
    assert data.chooses_by == "test"
    assert "chosen by the <b>test data</b>" in page
    assert "chosen by the <b>test data</b>" not in report.render(report_data.report_data(*goal_run))


def test_verdicts_are_words(goal_run: Run) -> None:
    page = report.render(data := report_data.report_data(*goal_run))
    assert page.count("✗ not met") == 1 + sum(not b.holds for b in data.bounds)
    assert page.count("✓ met") == sum(b.holds for b in data.bounds)
    assert html.escape("score<=+1%") in page
    assert "lower is better" in page


def test_each_layer_is_told_with_the_way_it_runs(data: ReportData) -> None:
    rows = (
        LayerRow(name=f"fc{HOSTILE}", packed_ms=0.0123, dense_ms=0.05, runs_packed=True, gain=4.07),
        LayerRow(name="out", packed_ms=2.0, dense_ms=1.25, runs_packed=False, gain=1.6),
        LayerRow(name="even", packed_ms=1.0, dense_ms=1.001, runs_packed=True, gain=1.001),
    )
    at = LayersAt(batch=64, threads=2, packed=2, layers=rows)
    page = without_script(report.render(replace(data, layers=(at,))))
    section = page[page.index('<section id="layers"') : page.index('<section id="weights"')]
    text = " ".join(re.sub(r"<[^>]*>", " ", section).split())
    assert "Batch 64, 2 threads 2 of 3 layers packed" in text
    assert f"fc{html.escape(HOSTILE)} 0.0123 0.0500 packed, 4.07× faster" in text
    assert "out 2.00 1.25 dense, 1.60× faster" in text
    assert "even 1.00 1.00 packed, equally fast" in text
    assert re.findall(r'<td class="after">([^<]*)', section) == ["0.0123", "1.25", "1.00"]
    assert "each packed layer running the faster way" in page


def test_without_packed_layers_the_section_is_left_out(data: ReportData) -> None:
    page = without_script(report.render(replace(data, layers=())))
    assert "How each layer runs" not in page
    assert 'href="#layers"' not in page
    assert "the two networks timed in turn</caption>" in page


def test_each_weight_is_told_with_its_angle(data: ReportData) -> None:
    one = RowAngles(
        name=f"fc{HOSTILE}", rows=1200, dimensions=64, left_out=3, angle=41.24, angle_spread=2.06,
        length=0.8312, length_spread=0.05, sign_angle=36.86,
    )  # fmt: skip
    gone = replace(one, name="gone", rows=3, angle=math.nan, length=math.nan)
    page = report.render(replace(data, angles=(one, gone)))
    own = without_script(page)
    section = own[own.index('<section id="angles"') : own.index('<section id="training"')]
    text = " ".join(re.sub(r"<[^>]*>", " ", section).split())
    assert f"fc{html.escape(HOSTILE)} 1,200 rows of 64 weights, 3 without an angle" in text
    assert "41.2° ± 2.1° 0.831 ± 0.050 36.9°" in text
    assert "gone 3 rows of 64 weights, 3 without an angle none none 36.9°" in text
    assert numbers(page)["angles"][1]["angle"] is None
    bare = without_script(report.render(replace(data, angles=())))
    assert 'id="angles"' not in bare
    assert 'href="#angles"' not in bare


ANSWERS = Answers(
    classes=("zero", f"one{HOSTILE}"), examples=1200, changed=3, lost=2, won=1,
    before=((600, 0), (1, 599)), after=((598, 2), (0, 600)),
    moved=(
        Moved(target="zero", answer="zero", before=600, after=598, right=True),
        Moved(target="zero", answer=f"one{HOSTILE}", before=0, after=2, right=False),
    ),
    shown=(
        Changed(number=7, target="zero", before="zero", after="one", was_right=True,
                is_right=False, picture="data:image/png;base64,AAAA"),
        Changed(number=9, target="one", before="zero", after="one", was_right=False,
                is_right=True, text=HOSTILE),
    ),
)  # fmt: skip
ENGINES = tuple(
    EngineRow(engine=engine, batch=batch, threads=2, before_ms=0.5, before_iqr_ms=0.01,
              after_ms=after, after_iqr_ms=None if after is None else 0.02)
    for batch in (1, 64) for engine, after in (("onnx", 0.25), ("compile", None))
)  # fmt: skip
CURVES = (
    SensitivityRow(name=f"fc{HOSTILE}", baseline=0.25, sparsities=(0.5, 0.9),
                   losses=(0.3125, None)),
)  # fmt: skip


def section_of(page: str, name: str) -> str:
    own = without_script(page)
    found = own[own.index(f'<section id="{name}"') :]
    return found[: found.index("</section>")]


def words_of(section: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", section).replace("&nbsp;", " ").split())


def test_answers_that_changed_are_told_and_shown(data: ReportData) -> None:
    page = report.render(replace(data, answers=ANSWERS))
    section = section_of(page, "answers")
    text = words_of(section)
    assert "Of 1,200 test examples, 3 got another answer: 2 that were right are wrong" in text
    assert "zero zero, right 600 598 −2" in text
    assert f"zero one{html.escape(HOSTILE)} 0 2 +2" in text
    assert "Nº 7, is zero answered zero → one lost" in text
    assert "answered zero → one won" in text
    assert "2 of 3 are shown." in text
    assert 'alt="Test example 7, of class zero"' in section
    assert f"<blockquote>{html.escape(HOSTILE)}</blockquote>" in section
    assert re.findall(r'class="(better|worse)">', section) == ["worse", "worse", "worse", "better"]
    same = report.render(replace(data, answers=replace(ANSWERS, changed=0, moved=(), shown=())))
    assert "Every example got the same answer as before." in section_of(same, "answers")
    assert 'id="answers"' not in report.render(data)


def test_engines_and_sensitivities_are_told_where_they_were_measured(data: ReportData) -> None:
    page = report.render(replace(data, engines=ENGINES, sensitivities=CURVES))
    assert "onnx 1 2 0.500 ± 0.010 0.250 ± 0.020" in words_of(section_of(page, "engines"))
    assert "compile 64 2 0.500 ± 0.010 not measured" in words_of(section_of(page, "engines"))
    told = words_of(section_of(page, "sensitivity"))
    assert "unpruned 0.2500 Weight 50 % 90 %" in told
    assert f"fc{html.escape(HOSTILE)} 0.3125 no number" in told
    for name in ("engines", "sensitivity"):
        assert f'href="#{name}"' in page
        assert f'id="{name}"' not in report.render(data)


def test_many_weights_fold_away(data: ReportData) -> None:
    many = tuple(replace(data.weights[0], name=f"layers.{i}.weight") for i in range(15))
    page = report.render(replace(data, weights=many))
    assert "The other 3 weights" in page


def test_a_run_without_training_or_latency(result: taut.Result, model: nn.Module) -> None:
    bare = Measurement(
        score=0.5, size_bytes=result.measurement.size_bytes, parameters=1, nonzero_parameters=1,
        macs=1, effective_macs=1,
    )  # fmt: skip
    candidate = Candidate(recipe="share_values()", measurement=bare, path="")
    data = report_data.report_data(
        replace(result, candidate=candidate, original=bare, history=()), model
    )
    assert data.phases == ()
    page = report.render(data)
    assert "Latency was not measured" in page
    assert 'id="training"' not in page


# ---- the written file -----------------------------------------------------------------------


def test_it_is_written_into_the_runs_folder(
    result: taut.Result, model: nn.Module, tmp_path: Path, page: str
) -> None:
    path = write_report(result, model)
    assert path == result.folder / "report.html"
    assert path.read_text("utf-8") == page
    elsewhere = tmp_path / "deep" / "own.html"
    assert write_report(result, model, str(elsewhere)).read_text("utf-8") == page
    assert [p.name for p in elsewhere.parent.iterdir()] == ["own.html"]


def test_a_failed_write_leaves_the_old_report(
    result: taut.Result, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(result, model, path)
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_no_path_of_this_machine_is_written(page: str, result: taut.Result) -> None:
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    for name in (str(result.folder), str(Path.home()), str(Path(taut.__file__).parent)):
        assert name not in own


# ---- in a browser ---------------------------------------------------------------------------


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium on this machine to open the report with")
    return [
        found, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=5000", "--enable-logging=stderr", "--v=0",
    ]  # fmt: skip


def opened(chromium: list[str], path: Path) -> str:
    """The document after its scripts ran; fails on anything the console says."""
    done = subprocess.run(
        [*chromium, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    said = [s for s in done.stderr.splitlines() if "CONSOLE" in s or "Uncaught" in s]
    assert not said, said
    return without_script(done.stdout)


def test_a_browser_draws_every_plot(
    chromium: list[str], data: ReportData, result: taut.Result, model: nn.Module, tmp_path: Path
) -> None:
    drawn = opened(chromium, write_report(result, model, tmp_path / "report.html"))
    plots = re.findall(r'<div class="plot[^"]*js-plotly-plot"', drawn)
    assert len(plots) == 3 + 1 + len(data.weights) + 1 + 3
    assert drawn.count('class="main-svg"') >= len(plots)
    assert "values.index" in drawn


def test_a_browser_draws_what_is_hostile_lower_or_missing(
    chromium: list[str], goal_run: Run, tmp_path: Path
) -> None:
    data = report_data.report_data(*goal_run)
    last = replace(data.candidates[-1], recipe=HOSTILE, score=math.nan, latency_ms=None)
    data = replace(data, task=HOSTILE, candidates=(*data.candidates[:-1], last))
    path = tmp_path / "report.html"
    path.write_text(report.render(data), encoding="utf-8")
    drawn = opened(chromium, path)
    assert "score (lower is better)</text>" in drawn
    assert "<b>bold" not in drawn


def test_a_browser_draws_what_was_measured_besides(
    chromium: list[str], data: ReportData, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    more = replace(data, answers=ANSWERS, engines=ENGINES, sensitivities=CURVES)
    path.write_text(report.render(more), encoding="utf-8")
    drawn = opened(chromium, path)
    for name in ("confusion", "engines-ms", "sensitivities"):
        assert re.search(rf'<div class="plot[^"]*js-plotly-plot" id="{name}"', drawn)
    assert "<b>bold" not in drawn


def test_the_console_is_heard(chromium: list[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text("<!doctype html><title>x</title><script>nothing.here()</script>")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        opened(chromium, path)
