"""The report's numbers against independent ones."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import RECIPE, Run
from torch import nn

import taut
from taut import report_data
from taut.errors import RunError
from taut.frontier_data import candidate_rows
from taut.layers import packed_layers
from taut.packed import Plain
from taut.report import write_report
from taut.report_data import LayerRow, ReportData
from taut.techniques.share_values import SharedValues
from taut.types import Choice, Latency, Measurement


@pytest.fixture(scope="module")
def result(recipe_run: Run) -> taut.Result:
    return recipe_run[0]


@pytest.fixture(scope="module")
def model(recipe_run: Run) -> nn.Module:
    return recipe_run[1]


@pytest.fixture(scope="module")
def data(recipe_run: Run) -> ReportData:
    return report_data.report_data(*recipe_run)


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


def test_angles_are_those_between_original_and_file(
    data: ReportData, result: taut.Result, model: nn.Module
) -> None:
    assert [a.name for a in data.angles] == ["0.weight", "2.weight"]
    for told in data.angles:
        path, _, leaf = told.name.rpartition(".")
        before = model.get_parameter(told.name).detach()
        after = getattr(result.model.get_submodule(path), leaf).detach()
        there = (after != 0).any(1)
        cosines = nn.functional.cosine_similarity(before[there], after[there])
        assert told.left_out == int((~there).sum())
        assert told.angle == pytest.approx(float(cosines.acos().rad2deg().mean()), rel=1e-3)
        lengths = after[there].norm(dim=1) / before[there].norm(dim=1)
        assert told.length_spread == pytest.approx(float(lengths.std(correction=0)), rel=1e-3)


def test_equal_centroids_share_their_count_but_do_not_double_it() -> None:
    shared = SharedValues(torch.tensor([0, 1, 1, 2]), Plain.of(torch.tensor([0.5, 0.5, -1.0])))
    site = report_data._site_weights("w", np.zeros(4), shared.dense().double().numpy(), shared)
    assert site.centroids == (-1.0, 0.5, 0.5)
    assert site.centroid_counts == (1, 3, 0)


def test_weights_that_are_not_finite_do_not_break_the_histogram() -> None:
    weights = np.array([1.0, math.nan, -math.inf, 0.0])
    site = report_data._site_weights("w", weights, weights, None)
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


def choice(layer: str, packed_ms: float, dense_ms: float, batch: int = 1) -> Choice:
    return Choice(layer=layer, batch=batch, threads=2, packed_ms=packed_ms, dense_ms=dense_ms)


def test_how_each_layer_runs_comes_batch_by_batch() -> None:
    found = report_data._layers(
        [choice("b", 4, 1, 64), choice("", 2, 2, 64), choice("b", 1, 3), choice("a", 5, 4)], "Net"
    )
    assert [(at.batch, at.threads, at.packed) for at in found] == [(1, 2, 1), (64, 2, 1)]
    assert found[0].layers == (
        LayerRow(name="b", packed_ms=1, dense_ms=3, runs_packed=True, gain=3.0),
        LayerRow(name="a", packed_ms=5, dense_ms=4, runs_packed=False, gain=1.25),
    )
    assert [(r.name, r.gain) for r in found[1].layers] == [("b", 4.0), ("Net", 1.0)]
    assert report_data._layers((), "Net") == ()


def test_the_layers_are_those_that_were_measured(data: ReportData, result: taut.Result) -> None:
    assert [at.batch for at in data.layers] == [1, 64]
    for at in data.layers:
        chosen = [c for c in result.measurement.choices if c.batch == at.batch]
        assert [r.name for r in at.layers] == [c.layer for c in chosen] == ["0", "2"]
        for row, c in zip(at.layers, chosen, strict=True):
            assert (row.packed_ms, row.dense_ms) == (c.packed_ms, c.dense_ms)
            assert row.runs_packed == c.runs_packed
    kept = [row.runs_packed for row in data.layers[0].layers]
    assert [not m.runs_dense for m in packed_layers(result.model).values()] == kept


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
    assert report_data._command(asked, "goal") == (
        "taut compress task.py --goal 'bytes<=5%' --seed 7 --precision float16"
    )


def test_without_a_goal_there_are_no_verdicts(data: ReportData) -> None:
    assert (data.goal, data.bounds, data.met) == (None, (), True)
    (only,) = data.candidates
    assert (only.meets_goal, only.chosen, only.on_frontier) == (None, True, True)


def test_all_candidates_are_there_and_the_frontier_is_flagged(
    goal_run: Run,
) -> None:
    result, model = goal_run
    data = report_data.report_data(result, model)
    record = json.loads((result.folder / "run.json").read_text())
    assert (data.better, data.score_is_fraction) == ("lower", False)
    assert len(data.candidates) == len(record["candidates"]) == 2
    kept = {c.recipe for c in result.frontier}
    assert {c.recipe for c in data.candidates if c.on_frontier} == kept
    assert [c.recipe for c in data.candidates if c.chosen] == [result.candidate.recipe]


def test_each_bound_comes_with_what_was_asked_and_reached(
    goal_run: Run,
) -> None:
    result, model = goal_run
    data = report_data.report_data(result, model)
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
        good,
        recipe="share_values(bits=1)",
        measurement=replace(good.measurement, size_bytes=10**6, score=0.0),
    )
    both = replace(result, candidates=(worse, good))
    rows = candidate_rows(
        both.candidates, both.frontier, both.original, both.better, chosen=both.candidate
    )
    assert [(r.number, r.on_frontier, r.chosen) for r in rows] == [
        (1, False, False),
        (2, True, True),
    ]


def test_a_run_without_its_record_is_refused(
    result: taut.Result, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="a report needs the run's record"):
        report_data.report_data(replace(result, folder=tmp_path), model)
    record = json.loads((result.folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with pytest.raises(RunError, match=r"not finished; run compress again"):
        report_data.report_data(replace(result, folder=tmp_path), model)


def test_another_file_than_the_measured_one_is_refused(
    result: taut.Result, model: nn.Module, tmp_path: Path
) -> None:
    shutil.copy(result.folder / "run.json", tmp_path)
    taut.pack(model, tmp_path / "net.taut")
    with pytest.raises(RunError, match=r"that were measured; it was replaced since"):
        report_data.report_data(replace(result, folder=tmp_path), model)


def test_what_the_original_did_not_have_is_told_too(trained, task, tmp_path):
    recipe = "low_rank(rank='ratio', ratio=0.4, only='0') > quantize(bits=4, activations=8)"
    result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
    data = report_data.report_data(result, trained)
    told = {t.names[0]: t for t in data.tensors}
    assert told["3:input"].before_bytes == told["0.0.weight"].before_bytes == 0
    assert told["3.weight"].before_bytes == 4 * 48 * 32
    assert [w.name for w in data.weights] == ["3.weight", "5.weight"]
    assert [a.name for a in data.angles] == ["0.weight", "3.weight", "5.weight"]
    write_report(result, trained)
    assert "3:input" in (tmp_path / "run" / "report.html").read_text()


def test_engines_are_told_where_there_are_several() -> None:
    def taken(**ms: float) -> Measurement:
        each = [
            Latency(batch=batch, threads=2, engine=engine, median_ms=batch * ms[engine],
                    iqr_ms=0.1, runs=5)
            for batch in (1, 4) for engine in ms
        ]  # fmt: skip
        return Measurement(
            score=0.5, size_bytes=1, parameters=1, nonzero_parameters=1, macs=1, effective_macs=1,
            latencies=tuple(each),
        )  # fmt: skip

    rows = report_data._engines(taken(onnx=2.0, compile=3.0), taken(openvino=1.0, onnx=1.5))
    assert [(r.batch, r.engine, r.before_ms, r.after_ms) for r in rows] == [
        (1, "openvino", None, 1.0), (1, "onnx", 2.0, 1.5), (1, "compile", 3.0, None),
        (4, "openvino", None, 4.0), (4, "onnx", 8.0, 6.0), (4, "compile", 12.0, None),
    ]  # fmt: skip
    assert report_data._engines(taken(onnx=2.0), taken(onnx=1.0)) == ()


def test_sensitivities_come_from_the_record() -> None:
    curve = {"baseline": 0.5, "sparsities": [0.5, 0.9], "losses": [0.75, None]}
    (row,) = report_data._sensitivities({"sensitivity": {"fc.weight": curve}})
    assert (row.name, row.baseline, row.losses) == ("fc.weight", 0.5, (0.75, None))
    assert report_data._sensitivities({}) == ()
