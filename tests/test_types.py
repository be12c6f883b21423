"""Facts go to JSON and back; the frontier keeps what nothing beats."""

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taut.types import Candidate, Choice, EpochRecord, Latency, Measurement, Site, frontier


def latency(ms: float, batch: int = 1) -> Latency:
    return Latency(batch=batch, threads=2, engine="pytorch", median_ms=ms, iqr_ms=0.1, runs=9)


def choice(ms: float) -> Choice:
    return Choice(layer="fc", batch=1, threads=2, packed_ms=ms, dense_ms=0.5)


def candidate(
    size: int, score: float, ms: float | None = 1.0, recipe: str = "prune_weights()"
) -> Candidate:
    measurement = Measurement(
        score=score, size_bytes=size, parameters=100, nonzero_parameters=10, macs=200,
        effective_macs=20, latencies=() if ms is None else (latency(ms), latency(9 * ms, 64)),
        peak_memory_bytes=7, choices=() if ms is None else (choice(ms),),
    )  # fmt: skip
    return Candidate(recipe=recipe, measurement=measurement, path="net.taut", epochs=3.0)


def sizes(candidates: list[Candidate]) -> list[int]:
    return [c.measurement.size_bytes for c in candidates]


# Facts


def test_a_site_knows_its_names_and_its_weights() -> None:
    site = Site(name="out.weight", kind="linear", shape=(3, 4, 5), macs=1, aliases=("in.weight",))
    assert site.names == ("out.weight", "in.weight")
    assert site.numel == 60
    assert Site(name="w", kind="conv", shape=(0, 4), macs=0).numel == 0


def test_facts_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        candidate(1, 1.0).recipe = "share_values()"  # type: ignore[misc]


def test_latency_is_the_one_at_the_batch() -> None:
    slow, fast = latency(3.0, batch=64), latency(1.0, batch=1)
    measured = replace(candidate(1, 1.0).measurement, latencies=(slow, fast))
    assert measured.latency() is fast
    assert measured.latency(64) is slow
    assert measured.latency(2) is None
    assert replace(measured, latencies=()).latency() is None


@pytest.mark.parametrize("ms", [None, 0.25])
def test_json_keeps_everything(ms: float | None) -> None:
    before = candidate(1234, 0.987654321, ms, "prune_weights(sparsity=0.5) > recover(epochs=2)")
    after = Candidate.from_json(json.loads(json.dumps(before.to_json())))
    assert after == before
    assert isinstance(after.measurement.latencies, tuple)
    measured = before.measurement
    assert Measurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_a_record_from_before_layers_were_tuned_is_read() -> None:
    before = candidate(1, 1.0)
    data = json.loads(json.dumps(before.to_json()))
    assert len(data["measurement"].pop("choices")) == 1
    read = Candidate.from_json(data)
    assert read == replace(before, measurement=replace(before.measurement, choices=()))


def test_epochs_are_equal_whatever_time_they_took() -> None:
    record = EpochRecord(step=1, epoch=2, loss=0.3, score=0.9, learning_rate=1e-3, seconds=4.0)
    assert record == replace(record, seconds=5.0)
    assert record != replace(record, loss=0.4)


# The frontier


def test_frontier_is_smallest_first_and_drops_what_is_beaten() -> None:
    big, small, beaten = candidate(300, 0.99), candidate(100, 0.95), candidate(200, 0.94)
    assert frontier([big, beaten, small], "higher") == [small, big]


def test_frontier_where_lower_is_better() -> None:
    big, small, beaten = candidate(300, 0.10), candidate(100, 0.50), candidate(200, 0.60)
    assert frontier([big, beaten, small], "lower") == [small, big]
    assert beaten in frontier([big, beaten, small], "higher")


def test_equals_stay_together() -> None:
    twins = [candidate(100, 0.9, recipe="a()"), candidate(100, 0.9, recipe="b()")]
    assert frontier(twins, "higher") == twins
    assert frontier([], "higher") == []


@pytest.mark.parametrize("worse", [candidate(101, 0.9), candidate(100, 0.899)])
def test_one_axis_decides_where_the_others_tie(worse: Candidate) -> None:
    assert frontier([worse, candidate(100, 0.9)], "higher") == [candidate(100, 0.9)]


@pytest.mark.parametrize(("ms", "kept"), [(0.91, [100]), (0.90, [100, 101])])
def test_latencies_within_a_tenth_are_equal(ms: float, kept: list[int]) -> None:
    pair = [candidate(100, 0.9, ms=1.0), candidate(101, 0.9, ms=ms)]
    assert sizes(frontier(pair, "higher")) == kept


def test_a_clearly_faster_one_stays_though_it_is_larger_and_worse() -> None:
    quick = candidate(300, 0.8, ms=0.5)
    assert quick in frontier([candidate(100, 0.9, ms=1.0), quick], "higher")


def test_what_was_not_measured_beats_nothing() -> None:
    measured, unmeasured = candidate(100, 0.9), candidate(100, 0.9, ms=None)
    assert frontier([unmeasured, measured], "higher") == [measured]
    no_number = candidate(100, math.nan)
    for better in ("higher", "lower"):
        assert frontier([no_number, measured], better) == [measured]


CANDIDATES = st.lists(
    st.builds(
        candidate,
        st.integers(1, 4),
        st.sampled_from([0.1, 0.2, 0.3]),
        st.sampled_from([1.0, 1.05, 1.12, 2.0, None]),
    ),
    min_size=1,
    max_size=8,
)


@given(CANDIDATES, st.sampled_from(["higher", "lower"]))
def test_the_frontier_is_never_empty_and_its_own_frontier(
    candidates: list[Candidate], better: str
) -> None:
    kept = frontier(candidates, better)  # type: ignore[arg-type]
    assert kept
    assert frontier(kept, better) == kept  # type: ignore[arg-type]
    best = min if better == "lower" else max
    wanted = best(c.measurement.score for c in candidates)
    smallest = min(sizes([c for c in candidates if c.measurement.score == wanted]))
    assert any((c.measurement.score, *sizes([c])) == (wanted, smallest) for c in kept)
    assert min(sizes(candidates)) == sizes(kept)[0]
