"""The race of the engines: who takes part, who is refused, what comes back."""

import importlib

import pytest
import torch
from torch import nn

import taut
from taut.errors import ExportError
from taut.fastest import ENGINES, Race, fastest, race
from taut.layers import pack_layer
from taut.modules import clone
from taut.packed import Plain
from taut.shared_weight import SharedValues
from taut.types import Latency

MODULE = importlib.import_module("taut.fastest")  # taut.fastest itself is the function


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def test_the_fastest_answers_like_the_network(net, capsys):
    engines = ("eager", "onnx", "packed")
    found = fastest(net, X[:1], batch=3, threads=1, engines=engines, seconds=0.02)
    first, second = found.race.latencies
    assert first.engine == found.engine
    assert first.median_ms <= second.median_ms
    assert {(t.batch, t.threads) for t in found.race.latencies} == {(3, 1)}
    assert min(t.runs for t in found.race.latencies) >= 15  # three in each of five turns
    assert {t.engine for t in found.race.latencies} == {"eager", "onnx"}
    assert found.race.refused == {"packed": "the network has no packed layers"}
    torch.testing.assert_close(found(X), net(X), rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert "onnx" in printed
    assert "no packed layers" in printed


def test_layers_that_stay_compressed_race_in_openvino(net, library):
    packed = clone(net)
    for name in ("0", "2"):
        layer = packed.get_submodule(name)
        values = Plain.of(torch.randn(16) / 4, "float32")
        pack_layer(
            layer, {"weight": SharedValues(torch.randint(0, 16, layer.weight.shape), values)}
        )
    engines = ("openvino", "openvino+taut")
    found = race(packed, X, engines=engines, threads=1, seconds=0.02)
    assert found.refused == {}
    assert {t.engine for t in found.latencies} == set(engines)
    assert min(t.median_ms for t in found.latencies) > 0
    alone = fastest(packed, X, engines=engines[1:], threads=1, seconds=0.01, show=False)
    assert alone.engine == "openvino+taut"
    for x in (X, X[:1]):  # as was timed, and anew
        torch.testing.assert_close(alone(x), packed(x), rtol=0.02, atol=0.02)
    refused = race(net, X, engines=engines[1:], threads=1).refused
    assert refused == {"openvino+taut": "no layer is one of Taut's operations"}


def test_other_batches_than_were_timed_run_too(net):
    found = fastest(net, X, engines=("onnx",), threads=1, seconds=0.01, show=False)
    for x in (X, X[:1], X.repeat(2, 1)):
        torch.testing.assert_close(found(x), net(x), rtol=1e-4, atol=1e-5)


def test_whole_numbers_between_layers_where_the_task_is_given(net, task, monkeypatch):
    asked = []

    def refuse(packed, path, given, *, task, dynamic_batch, keep):
        asked.append((task, dynamic_batch))
        raise ExportError("not today")

    monkeypatch.setattr(MODULE, "export", refuse)
    race(net, X, engines=("onnx",), task=task)
    assert asked == [(task, False)]


def test_answers_that_are_off_take_no_part(net, monkeypatch):
    monkeypatch.setattr(MODULE, "difference", lambda found, wanted: (9.0, 0.7))
    with pytest.raises(ExportError, match=r"no engine runs .*eager: its answers are off by 70.0%"):
        fastest(net, X, engines=("eager",), show=False)


def test_an_engine_that_cannot_be_written_for_is_told_of(net, monkeypatch):
    def refuse(*arguments, **options):
        raise ExportError("not today")

    monkeypatch.setattr(MODULE, "export", refuse)
    assert race(net, X, engines=("onnx",)).refused == {"onnx": "not today"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engines": ("onyx",)}, "no engine 'onyx'; did you mean 'onnx'"),
        ({"engines": ()}, "at least one engine, one example and one thread"),
        ({"batch": 0}, "got .* batch=0"),
        ({"threads": 0}, "threads=0"),
        ({"example": None}, "the example must be the input of one forward"),
    ],
)
def test_wrong_options(net, options, message):
    example = options.pop("example", X)
    with pytest.raises(ExportError, match=message):
        fastest(net, example, **options)


def test_the_table_has_a_row_for_each_engine():
    times = [
        Latency(batch=1, threads=2, engine=e, median_ms=i + 1.0, iqr_ms=0.1, runs=5)
        for i, e in enumerate(ENGINES)
    ]
    assert Race(latencies=tuple(times), refused={"x": "y"}).table().row_count == len(ENGINES) + 1
    assert taut.fastest is fastest


def test_compress_takes_the_latency_of_the_engine_it_is_told(trained, task, tmp_path, monkeypatch):
    asked = []

    def told(net, task, engine, batches):
        asked.append((type(net[0]).__name__, engine, tuple(batches)))
        each = {"batch": 1, "threads": 1, "engine": engine, "iqr_ms": 0.1, "runs": 5}
        return (Latency(median_ms=float(len(asked)), **each),)

    monkeypatch.setattr(importlib.import_module("taut.trial"), "latencies", told)
    result = taut.compress(trained, task, "quantize()", folder=tmp_path, engine="onnx")
    assert asked == [("Linear", "onnx", (1, 64)), ("PackedLinear", "onnx", (1, 64))]
    assert [t.median_ms for t in result.original.latencies] == [1.0]
    assert [t.median_ms for t in result.measurement.latencies] == [2.0]


def test_latencies_of_one_engine_and_of_the_fastest(net, task, monkeypatch):
    def told(net, example, *, batch, engines, threads, task):
        times = {"eager": 2.0, "onnx": 1.0}
        each = {"batch": batch, "threads": 1, "iqr_ms": 0.1, "runs": 5}
        found = [Latency(engine=e, median_ms=times[e], **each) for e in engines if e in times]
        order = tuple(sorted(found, key=lambda t: t.median_ms))
        return Race(latencies=order, refused={"openvino": "it is not installed"})

    monkeypatch.setattr(MODULE, "race", told)
    found = {e: MODULE.latencies(net, task, e, (1, 4)) for e in ("auto", "eager", "packed")}
    assert [(t.engine, t.batch) for t in found["auto"]] == [
        ("onnx", 1), ("eager", 1), ("onnx", 4), ("eager", 4),
    ]  # fmt: skip
    assert {t.engine for t in found["eager"] + found["packed"]} == {"eager"}
    with pytest.raises(ExportError, match="openvino does not run the network: it is not installed"):
        MODULE.latencies(net, task, "openvino", (1,))
