"""Goals: what reads, what is refused, and when a bound holds."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taut.errors import GoalError
from taut.goal import Bound, Goal, is_goal, value_of
from taut.types import Direction, Latency, Measurement


def measured(
    score: float = 0.9, size: int = 1000, ms: float | None = 2.0, macs: int = 500, count: int = 100
) -> Measurement:
    latencies = [(1, ms), (64, 50 * ms)] if ms is not None else []
    return Measurement(
        score=score, size_bytes=size, parameters=10**6, nonzero_parameters=count, macs=10**6,
        effective_macs=macs, peak_memory_bytes=4 * size,
        latencies=tuple(
            Latency(batch=b, threads=1, engine="pytorch", median_ms=t, iqr_ms=0.0, runs=3)
            for b, t in latencies
        ),
    )  # fmt: skip


ORIGINAL = measured()


def only(text: str, better: Direction = "higher") -> Bound:
    (bound,) = Goal.parse(text, better).bounds
    return bound


# What reads


@pytest.mark.parametrize(
    ("text", "axis", "limit"),
    [
        ("bytes<=5%", "bytes", 50.0),
        ("bytes<=5 %", "bytes", 50.0),
        ("  bytes <= 5% ", "bytes", 50.0),
        ("bytes<=0.5%", "bytes", 5.0),
        ("bytes<=.5%", "bytes", 5.0),
        ("bytes<=5.%", "bytes", 50.0),
        ("bytes<=1e2%", "bytes", 1000.0),
        ("bytes<=+5%", "bytes", 50.0),
        ("bytes<=40000", "bytes", 40e3),
        ("bytes<=40000B", "bytes", 40e3),
        ("bytes<=40kB", "bytes", 40e3),
        ("bytes<=1.5MB", "bytes", 1.5e6),
        ("bytes<=2GB", "bytes", 2e9),
        ("bytes<=40KiB", "bytes", 40960.0),
        ("bytes<=1MiB", "bytes", 1048576.0),
        ("memory<=50%", "memory", 2000.0),
        ("memory<=3MB", "memory", 3e6),
        ("latency<=2ms", "latency", 2.0),
        ("latency<=300us", "latency", 0.3),
        ("latency<=0.5s", "latency", 500.0),
        ("latency<=50%", "latency", 1.0),
        ("parameters<=5k", "parameters", 5e3),
        ("parameters<=10%", "parameters", 10.0),
        ("macs<=1.5M", "macs", 1.5e6),
        ("macs<=2G", "macs", 2e9),
        ("macs<=10%", "macs", 50.0),
        ("score>=0.97", "score", 0.97),
        ("score>=-3", "score", -3.0),
        ("score>=-0.5%", "score", 0.8955),
        ("score>=0%", "score", 0.9),
        ("score>=+10%", "score", 0.99),
    ],
)
def test_what_reads(text: str, axis: str, limit: float) -> None:
    bound = only(text)
    assert bound.axis == axis
    assert bound.limit(ORIGINAL) == pytest.approx(limit, rel=1e-12)
    assert bound.relative == ("%" in text)
    assert bound.text == text.strip()


@pytest.mark.parametrize(
    ("text", "score", "limit"),
    [
        ("score<=+10%", 2.0, 2.2),
        ("score<=-10%", 2.0, 1.8),
        ("score<=2.5", 2.0, 2.5),
        ("score<=+10%", -2.0, -1.8),
    ],
)
def test_lower_is_better(text: str, score: float, limit: float) -> None:
    bound, original = only(text, "lower"), measured(score=score)
    assert bound.limit(original) == pytest.approx(limit)
    assert bound.holds(measured(score=limit - 1e-9), original)
    assert not bound.holds(measured(score=limit + 1e-9), original)


def test_a_loss_of_a_negative_score_is_a_loss() -> None:
    assert only("score>=-10%").limit(measured(score=-2.0)) == pytest.approx(-2.2)


def test_bounds_keep_their_order_and_their_text() -> None:
    goal = Goal.parse(" bytes<=5%,score >= -0.5%, ")
    assert [b.axis for b in goal.bounds] == ["bytes", "score"]
    assert str(goal) == "bytes<=5%, score >= -0.5%"
    assert Goal.parse(str(goal)) == goal
    found = goal.bound("score")
    assert found is not None
    assert found.relation == ">="
    assert goal.bound("latency") is None


# What is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a goal needs at least one bound, like 'bytes<=5%, score>=-0.5%'"),
        (" , ", "a goal needs at least one bound"),
        ("bytes", "a bound is like 'bytes<=5%' or 'latency<=2ms', got 'bytes'"),
        ("bytes<=", "a bound is like .*, got 'bytes<='"),
        ("<=5%", "a bound is like .*, got '<=5%'"),
        ("bytes<=five", "a bound is like .*, got 'bytes<=five'"),
        ("bytes<=nan", "a bound is like"),
        ("bytes<=inf", "a bound is like"),
        ("bytes<=5% score>=0", "a bound is like"),
        ("bytes<=40,000", "a bound is like .*, got '000'"),
        ("byts<=5%", r"no axis is named 'byts'; did you mean 'bytes'\?"),
        ("Bytes<=5%", r"no axis is named 'Bytes'; did you mean 'bytes'\?"),
        ("speed<=5%", "no axis is named 'speed'; known: bytes, latency, macs, memory, parameters"),
        ("bytes<=5pc", "bytes has no unit 'pc'; known: B, kB, MB, GB, KiB, MiB, %"),
        ("bytes<=40KB", "bytes has no unit 'KB'; known: B, kB"),
        ("bytes<=1_000", "bytes has no unit '_000'"),
        ("bytes<=5%%", "bytes has no unit '%%'"),
        ("latency<=2", "latency has no unit ''; known: ms, us, s, %"),
        ("memory<=2", "memory has no unit ''; known: B, kB"),
        ("macs<=2m", "macs has no unit 'm'; known: k, M, G, %"),
        ("score>=0.9pts", "score has no unit 'pts'; known: %"),
        ("bytes>=5%", "bytes is bounded by <=, got 'bytes>=5%'"),
        ("bytes<5%", "bytes is bounded by <=, got 'bytes<5%'"),
        ("bytes=5%", "bytes is bounded by <=, got 'bytes=5%'"),
        ("bytes==5%", "bytes is bounded by <=, got 'bytes==5%'"),
        ("score<=0.9", r"score is bounded by >= \(higher is better\), got 'score<=0.9'"),
        ("score>0.9", r"score is bounded by >= \(higher is better\), got 'score>0.9'"),
        ("bytes<=5%, bytes<=4%", "a goal bounds each axis once, got 'bytes' twice in 'bytes<=5%,"),
        ("bytes<=5%, score>=0.9, score>=0.8", "each axis once, got 'score' twice"),
        ("bytes<=0", "bytes must stay above 0, got 'bytes<=0'; nothing can reach that"),
        ("bytes<=0%", "bytes must stay above 0, got 'bytes<=0%'"),
        ("latency<=-2ms", "latency must stay above 0, got 'latency<=-2ms'"),
        ("bytes<=1e-400", "bytes must stay above 0"),
        ("bytes<=1e400", "bytes must be bounded by a finite number, got 'bytes<=1e400'"),
        ("score>=1e400", "score must be bounded by a finite number"),
        ("score>=99%", "a percentage of the score is a change .* sign, like score>=-0.5%, got "),
        ("score>=0.5%", "got 'score>=0.5%'; bound the score itself without %"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(GoalError, match=said):
        Goal.parse(text)


def test_what_is_refused_where_lower_is_better() -> None:
    with pytest.raises(GoalError, match=r"score is bounded by <= \(lower is better\)"):
        Goal.parse("score>=0.9", "lower")
    with pytest.raises(GoalError, match=r"needs its sign, like score<=\+0.5%, got 'score<=5%'"):
        Goal.parse("score<=5%", "lower")


@given(st.text(max_size=20) | st.from_regex(r"[a-z]{4,7}[<>]=[0-9.e+-]{0,5}[kMB%ms]{0,2}"))
def test_any_text_is_a_goal_or_an_error_of_ours(text: str) -> None:
    try:
        goal = Goal.parse(text)
    except GoalError:
        return
    assert Goal.parse(str(goal)) == goal
    assert all(math.isfinite(b.value) for b in goal.bounds)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes<=5%", True),
        ("score>=0.9, bytes<=1kB", True),
        ("bytes<5%", True),
        ("bytes=5%", True),
        ("bytes>5%", True),
        ("score > -.5", True),
        ("prune_weights(sparsity=0.9)", False),
        ("prune_weights(only='a<=b') > recover()", False),
        ("prune_weights > recover", False),
        ("share_values", False),
    ],
)
def test_is_goal(text: str, expected: bool) -> None:
    assert is_goal(text) is expected


# When a bound holds


def test_axes_read_what_the_goal_means() -> None:
    axes = ("bytes", "memory", "latency", "parameters", "macs", "score")
    assert [value_of(a, ORIGINAL) for a in axes] == [1000.0, 4000.0, 2.0, 100.0, 500.0, 0.9]
    assert value_of("latency", measured(ms=None)) == math.inf


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("bytes<=5%", measured(size=50), measured(size=51)),
        ("latency<=1ms", measured(ms=1.0), measured(ms=1.001)),
        ("latency<=1ms", measured(ms=1.0), measured(ms=None)),
        ("macs<=100", measured(macs=100), measured(macs=101)),
        ("parameters<=10%", measured(count=10), measured(count=11)),
        ("memory<=2kB", measured(size=500), measured(size=501)),
        ("score>=0.5", measured(score=0.5), measured(score=0.499)),
        ("score>=0.5", measured(score=0.5), measured(score=math.nan)),
    ],
)
def test_the_edge_is_inside(text: str, inside: Measurement, outside: Measurement) -> None:
    goal = Goal.parse(text)
    assert goal.met(inside, ORIGINAL)
    assert goal.distance(inside, ORIGINAL) == 0.0
    assert not goal.met(outside, ORIGINAL)
    assert goal.distance(outside, ORIGINAL) > 0.0


@pytest.mark.parametrize(
    ("text", "reached", "excess"),
    [
        ("bytes<=5%", measured(size=100), 1.0),
        ("bytes<=5%", measured(size=75), 0.5),
        ("latency<=2ms", measured(ms=5.0), 1.5),
        ("score>=-1%", measured(score=0.9 * 0.98), 1.0),
        ("score>=0.9", measured(score=0.9 - 0.0045), 0.5),
        ("bytes<=5%", measured(size=50), 0.0),
        ("latency<=2ms", measured(ms=None), math.inf),
        ("score>=0.9", measured(score=math.nan), math.inf),
    ],
)
def test_excess(text: str, reached: Measurement, excess: float) -> None:
    assert only(text).excess(reached, ORIGINAL) == pytest.approx(excess)


def test_verdicts_say_what_was_asked_and_reached() -> None:
    goal = Goal.parse("bytes<=5%, score>=-1%, latency<=3ms")
    found = goal.verdicts(measured(size=60, score=0.895), ORIGINAL)
    assert [v.bound for v in found] == list(goal.bounds)
    assert [v.asked for v in found] == pytest.approx([50.0, 0.891, 3.0])
    assert [v.reached for v in found] == [60.0, 0.895, 2.0]
    assert [v.holds for v in found] == [False, True, True]


def test_distance_sums_the_excesses() -> None:
    goal = Goal.parse("bytes<=5%, score>=-1%")
    assert goal.distance(measured(size=100, score=0.9 * 0.98), ORIGINAL) == pytest.approx(2.0)
    assert goal.distance(measured(size=100), ORIGINAL) == pytest.approx(1.0)


FINITE = st.integers(-(10**9), 10**9).map(lambda n: n / 1000)
MEASURED = st.builds(
    measured,
    score=FINITE,
    size=st.integers(1, 10**9),
    ms=st.floats(1e-3, 1e6),
    macs=st.integers(0, 10**12),
    count=st.integers(0, 10**9),
)
TERMS = st.sampled_from(
    [["bytes<=5%"], ["bytes<=40kB", "macs<=3%"], ["latency<=2ms"], ["parameters<=1M", "memory<=9%"]]
)


@given(TERMS, st.sampled_from(["-1%", "+2%", "0.5", "-7"]), MEASURED, MEASURED, st.booleans())
def test_distance_is_zero_exactly_where_the_goal_is_met(
    terms: list[str], limit: str, reached: Measurement, original: Measurement, lower: bool
) -> None:
    better: Direction = "lower" if lower else "higher"
    goal = Goal.parse(", ".join([*terms, f"score{'<=' if lower else '>='}{limit}"]), better)
    distance = goal.distance(reached, original)
    assert distance >= 0
    assert (distance == 0) == goal.met(reached, original)
    assert goal.met(reached, original) == all(v.holds for v in goal.verdicts(reached, original))


@given(MEASURED, MEASURED, st.integers(1, 10**6))
def test_a_smaller_file_is_never_further_away(
    reached: Measurement, original: Measurement, less: int
) -> None:
    goal = Goal.parse("bytes<=5%, score>=-1%")
    smaller = replace(reached, size_bytes=max(1, reached.size_bytes - less))
    assert goal.distance(smaller, original) <= goal.distance(reached, original)


@given(MEASURED)
def test_the_original_keeps_what_asks_for_nothing(original: Measurement) -> None:
    goal = Goal.parse("bytes<=100%, latency<=100%, macs<=100%, parameters<=100%, score>=0%")
    assert goal.met(original, original)


def test_what_was_not_measured_keeps_no_bound() -> None:
    untimed = measured(ms=None)
    assert not only("latency<=50%").holds(untimed, untimed)
    assert not only("latency<=2ms").holds(untimed, ORIGINAL)
