"""The report: its numbers against independent ones, and the page that shows them."""

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

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import taut
from taut import report
from taut.errors import RunError
from taut.recoding import Plain
from taut.report import ReportData, Row, format_change, report_data, write_report
from taut.techniques.share_values import SharedValues
from taut.types import Candidate, Measurement

RECIPE = (
    "prune_weights(sparsity=0.8, scope='layer') > recover(epochs=2) > share_values(bits=4) > "
    "recover(epochs=1)"
)
HOSTILE = "</script><b>bold & brash</b>"
POINT = "\N{MINUS SIGN}1.00 points"
Batches = list[tuple[Tensor, Tensor]]


def digits() -> dict[str, Batches]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    pairs = list(zip(x.split(100), y.split(100), strict=True))
    return {"train": pairs[:12], "test": pairs[12:]}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def result(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> taut.Result:
    task = taut.Task(**digits(), name=f"digits {HOSTILE}")
    return taut.compress(model, task, RECIPE, folder=tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(result: taut.Result, model: nn.Module) -> ReportData:
    return report_data(result, model)


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> tuple[taut.Result, nn.Module]:
    """A goal on a score of which less is better, with several candidates."""
    data, loss = digits(), nn.functional.cross_entropy
    task = taut.Task(**data, validation=data["test"], score=loss, better="lower")
    model = network(1)
    folder = tmp_path_factory.mktemp("goal")
    goal = "bytes<=15%, score<=+1%, latency<=1%"
    return taut.compress(model, task, goal, folder=folder, epochs=2, trials=2), model


# ---- the numbers ----------------------------------------------------------------------------


def test_sizes_are_those_of_the_files(
    data: ReportData, result: taut.Result, model: nn.Module
) -> None:
    size = (result.folder / "net.taut").stat().st_size
    raw = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    assert (data.before_bytes, data.after_bytes, data.ratio) == (raw, size, raw / size)
    assert raw == sum(t.before_bytes for t in data.tensors)
    coded = sum(p.size_bytes for t in data.tensors for p in t.parts)
    assert math.ceil(coded) + data.overhead_bytes == size
    assert coded == pytest.approx(sum(t.after_bytes for t in data.tensors))
    for tensor in data.tensors:
        assert tensor.bits_per_weight == pytest.approx(8 * tensor.after_bytes / tensor.numel)


def test_parts_come_with_huffman_bytes_beside(data: ReportData, model: nn.Module) -> None:
    by_name = {t.names[0]: t for t in data.tensors}
    assert by_name.keys() == model.state_dict().keys()
    parts = {p.name: p for p in by_name["0.weight"].parts}
    assert {"positions", "values.index"} < parts.keys()
    assert all(name.split(".")[0] in ("positions", "values") for name in parts)
    kept = next(w for w in data.weights if w.name == "0.weight")
    assert 0 < parts["values.index"].huffman_bytes <= 4 * sum(kept.after) / 8
    assert by_name["0.weight"].huffman_bytes == sum(p.huffman_bytes for p in parts.values())


def test_every_weight_is_counted_once_before_and_once_after(
    data: ReportData, result: taut.Result, model: nn.Module
) -> None:
    assert [w.name for w in data.weights] == ["0.weight", "2.weight"]
    for site in data.weights:
        before = model.get_parameter(site.name).detach().numpy()
        path, _, leaf = site.name.rpartition(".")
        after = getattr(result.model.get_submodule(path), leaf).detach().numpy()
        assert site.numel == before.size == sum(site.before)
        assert sum(site.after) + site.zeros == after.size
        assert site.zeros == int((after == 0).sum()) >= round(0.8 * after.size)
        assert site.shape == before.shape
        edges = np.array(site.edges)
        assert len(edges) == len(site.before) + 1 == len(site.after) + 1
        for i in (0, 20, 40, len(site.before) - 2):
            inside = (before >= edges[i]) & (before < edges[i + 1])
            assert site.before[i] == int(inside.sum())


def test_centroids_are_the_tables_of_the_file(data: ReportData, result: taut.Result) -> None:
    for site in data.weights:
        layer = result.model.get_submodule(site.name.rpartition(".")[0])
        shared = layer.packed["weight"].values  # type: ignore[index, union-attr]
        assert list(site.centroids) == sorted(shared.table.dense().tolist())
        assert 0 < len(site.centroids) <= 16
        assert sum(site.centroid_counts) == shared.numel
        for value, count in zip(site.centroids, site.centroid_counts, strict=True):
            assert count == int((shared.dense().double() == value).sum())


def test_equal_centroids_share_their_count_but_do_not_double_it() -> None:
    shared = SharedValues(torch.tensor([0, 1, 1, 2]), Plain.of(torch.tensor([0.5, 0.5, -1.0])))
    site = report._site_weights("w", np.zeros(4), shared.dense().double().numpy(), shared)
    assert site.centroids == (-1.0, 0.5, 0.5)
    assert site.centroid_counts == (1, 3, 0)


def test_weights_that_are_not_finite_do_not_break_the_histogram() -> None:
    weights = np.array([1.0, math.nan, -math.inf, 0.0])
    site = report._site_weights("w", weights, weights, None)
    assert (sum(site.before), sum(site.after), site.zeros, site.numel) == (2, 1, 1, 4)
    assert site.centroids == ()


def test_the_table_holds_both_measurements(data: ReportData, result: taut.Result) -> None:
    rows = {r.label: r for r in data.rows}
    before, after = result.original, result.measurement
    named = {
        "Score": "score", "Bytes of the file": "size_bytes", "Parameters": "parameters",
        "Non-zero parameters": "nonzero_parameters", "MACs": "macs",
        "Effective MACs": "effective_macs", "Peak memory": "peak_memory_bytes",
    }  # fmt: skip
    for label, name in named.items():
        row = rows[label]
        assert (row.before, row.after) == (getattr(before, name), getattr(after, name))
    for batch in (1, 64):
        row = rows[f"Latency, batch {batch}"]
        old, new = (next(x for x in m.latencies if x.batch == batch) for m in (before, after))
        assert (row.before, row.before_spread) == (old.median_ms, old.iqr_ms)
        assert (row.after, row.after_spread) == (new.median_ms, new.iqr_ms)
        assert row.detail == f"{old.threads} thread{'s' * (old.threads > 1)}, pytorch"


def test_epochs_run_on_through_the_recoveries(data: ReportData, result: taut.Result) -> None:
    assert data.epochs == result.history
    assert [(p.first, p.last) for p in data.phases] == [(1, 2), (3, 3)]
    assert data.phases[0].techniques == "prune_weights(sparsity=0.8, scope='layer')"
    assert data.phases[1].techniques == "share_values(bits=4)"
    assert [p.recovery for p in data.phases] == ["recover(epochs=2)", "recover(epochs=1)"]


def test_what_it_takes_to_do_it_again(data: ReportData, result: taut.Result) -> None:
    record = json.loads((result.folder / "run.json").read_text())
    quoted = RECIPE.replace("'", "'\"'\"'")
    assert data.command == f"taut compress task.py --recipe '{quoted}'"
    assert taut.Recipe.parse(data.recipe) == taut.Recipe.parse(RECIPE)
    assert data.versions == record["versions"]
    assert data.machine["processor"] == record["machine"]["processor"]
    asked = {"asked": "bytes<=5%", "seed": 7, "precision": "float16"}
    assert report._command(asked, "goal") == (
        "taut compress task.py --goal 'bytes<=5%' --seed 7 --precision float16"
    )


def test_without_a_goal_there_are_no_verdicts(data: ReportData) -> None:
    assert (data.goal, data.bounds, data.met) == (None, (), True)
    (only,) = data.candidates
    assert (only.meets_goal, only.chosen, only.on_frontier) == (None, True, True)


def test_all_candidates_are_there_and_the_frontier_is_flagged(
    lower: tuple[taut.Result, nn.Module],
) -> None:
    result, model = lower
    data = report_data(result, model)
    record = json.loads((result.folder / "run.json").read_text())
    assert (data.better, data.score_is_fraction) == ("lower", False)
    assert len(data.candidates) == len(record["candidates"]) == 2
    kept = {c.recipe for c in result.frontier}
    assert {c.recipe for c in data.candidates if c.on_frontier} == kept
    assert [c.recipe for c in data.candidates if c.chosen] == [result.candidate.recipe]


def test_each_bound_comes_with_what_was_asked_and_reached(
    lower: tuple[taut.Result, nn.Module],
) -> None:
    result, model = lower
    data = report_data(result, model)
    bytes_, score, latency = data.bounds
    assert (bytes_.axis, score.axis, latency.axis) == ("bytes", "score", "latency")
    assert bytes_.limit == pytest.approx(0.15 * data.before_bytes)
    assert bytes_.reached == data.after_bytes
    assert bytes_.holds == (data.after_bytes <= bytes_.limit)
    assert score.limit == pytest.approx(1.01 * data.score_before)
    assert score.holds == (data.score_after <= score.limit)
    assert latency.reached > latency.limit
    assert (latency.holds, data.met) == (False, False)


def test_a_beaten_candidate_is_not_on_the_frontier(result: taut.Result) -> None:
    good = result.candidate
    worse = replace(
        good, recipe="worse", measurement=replace(good.measurement, size_bytes=10**6, score=0.0)
    )
    rows = report._candidates(replace(result, candidates=(worse, good)))
    assert [(r.number, r.on_frontier, r.chosen) for r in rows] == [
        (1, False, False),
        (2, True, True),
    ]


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


def test_a_run_without_its_record_is_refused(
    result: taut.Result, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="a report needs the run's record"):
        report_data(replace(result, folder=tmp_path), model)
    record = json.loads((result.folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with pytest.raises(RunError, match=r"not finished; run compress again"):
        report_data(replace(result, folder=tmp_path), model)


def test_another_file_than_the_measured_one_is_refused(
    result: taut.Result, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copy(result.folder / "run.json", tmp_path)
    taut.pack(model, tmp_path / "net.taut")
    with pytest.raises(RunError, match=r"that were measured; it was replaced since"):
        report_data(replace(result, folder=tmp_path), model)


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
    assert len(plots) == 2 + 1 + 2 + 3  # candidates, parts, two sites, training
    assert all('role="img"' in p and "aria-label=" in p for p in plots)
    assert own.count("<caption>") == own.count("<table>") == 3
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


def test_it_says_when_the_test_data_chose(
    page: str, data: ReportData, lower: tuple[taut.Result, nn.Module]
) -> None:
    assert data.chooses_by == "test"
    assert "chosen by the <b>test data</b>" in page
    assert "chosen by the <b>test data</b>" not in report.render(report_data(*lower))


def test_verdicts_are_words(lower: tuple[taut.Result, nn.Module]) -> None:
    page = report.render(data := report_data(*lower))
    assert page.count("✗ not met") == 1 + sum(not b.holds for b in data.bounds)
    assert page.count("✓ met") == sum(b.holds for b in data.bounds)
    assert html.escape("score<=+1%") in page
    assert "lower is better" in page


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
    data = report_data(replace(result, candidate=candidate, original=bare, history=()), model)
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
    assert len(plots) == 2 + 1 + len(data.weights) + 3
    assert drawn.count('class="main-svg"') >= len(plots)
    assert "values.index" in drawn


def test_a_browser_draws_what_is_hostile_lower_or_missing(
    chromium: list[str], lower: tuple[taut.Result, nn.Module], tmp_path: Path
) -> None:
    data = report_data(*lower)
    last = replace(data.candidates[-1], recipe=HOSTILE, score=math.nan, latency_ms=None)
    data = replace(data, task=HOSTILE, candidates=(*data.candidates[:-1], last))
    path = tmp_path / "report.html"
    path.write_text(report.render(data), encoding="utf-8")
    drawn = opened(chromium, path)
    assert "score (lower is better)</text>" in drawn
    assert "<b>bold" not in drawn


def test_the_console_is_heard(chromium: list[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.html"
    path.write_text("<!doctype html><title>x</title><script>nothing.here()</script>")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        opened(chromium, path)
