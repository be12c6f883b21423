"""Timing by turns: the slower network is told, and the least reduction that will do is found."""

import time

import pytest
import torch
from torch import nn

from taut import timing
from taut.timing import first_of, in_turn, latency, race, reduced_to, repeated, told
from taut.types import Latency


class Sleeper(nn.Module):
    """Sleeps, and notes the batches that it was given and its mode."""

    def __init__(self, seconds):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds, self.seen = seconds, []

    def forward(self, x):
        time.sleep(self.seconds)
        self.seen.append((len(x), self.training, torch.is_grad_enabled()))
        return x


def test_a_race_takes_turns_and_tells_the_times():
    slow, fast = Sleeper(0.004), Sleeper(0.0)
    first, second = race([slow, fast], ((torch.zeros(3, 2),), {}), seconds=0.0)
    assert first >= 4.0
    assert second < first
    assert len(slow.seen) == len(fast.seen) == 5 * 4
    assert set(slow.seen) == {(3, False, False)}


def test_what_outlasts_its_time_is_run_once_more_for_a_spread():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.02)
            return x

    found = latency(Slow(), ((torch.ones(1),), {}), batch=1, seconds=0.001)
    assert found.runs == 2
    assert found.median_ms >= 20


def test_latencies_in_turn_are_medians_of_rounds_with_their_spread(monkeypatch):
    clock = iter([1.0, 10.0, 2.0, 20.0, 6.0, 30.0])
    asked = []

    def taken(model, example, batch, seconds):
        asked.append(model)
        return Latency(
            batch=batch, threads=1, engine="pytorch", median_ms=next(clock), iqr_ms=0.5, runs=4
        )

    monkeypatch.setattr(timing, "latency", taken)
    one, other = in_turn([lambda: "a", lambda: "b"], ((), {}), 3, rounds=3)
    assert asked == ["a", "b"] * 3
    assert (one.median_ms, other.median_ms) == (2.0, 20.0)
    assert (one.iqr_ms, other.iqr_ms) == (2.5, 10.0)  # quartiles 1.5 and 4, 15 and 25
    assert (one.batch, one.runs) == (3, 12)


def test_times_come_to_a_median_and_what_lies_between_the_quartiles():
    found = told([4.0, 1.0, 2.0, 3.0, 100.0], batch=2, threads=4, engine="onnx")
    assert (found.median_ms, found.iqr_ms, found.runs) == (3.0, 2.0, 5)
    assert told([7.0], batch=1, threads=1, engine="onnx").iqr_ms == 0.0


def test_what_is_repeated_is_called_as_often_as_asked():
    calls = []
    assert len(repeated(lambda: calls.append(1), 0.0, 3)) == len(calls) == 3
    assert all(t >= 2.0 for t in repeated(lambda: time.sleep(0.002), 0.01))


def test_the_least_reduction_is_found_and_was_itself_timed(monkeypatch):
    timed = []

    def no_clock(models, example, seconds=0.1):
        timed.append(models[1])
        return [10.0, 10.0 - 8.0 * models[1]]

    monkeypatch.setattr(timing, "race", no_clock)
    found, share = reduced_to(nn.Identity(), lambda r: r, ((torch.zeros(2, 2),), {}), 0.5)
    assert found == 0.625  # 10 - 8 · 0.625 = 5
    assert share == 0.5
    assert found in timed
    assert len(timed) == 7


def test_where_nothing_will_do_the_least_share_is_told(monkeypatch):
    monkeypatch.setattr(timing, "race", lambda models, example: [10.0, 10.0 - 8.0 * models[1]])
    found = reduced_to(nn.Identity(), lambda r: r, ((torch.zeros(2, 2),), {}), 0.1)
    assert found == (1.0, pytest.approx(0.2))


def test_the_first_of_a_batch():
    x, table = torch.arange(6).reshape(3, 2), torch.zeros(4, 4)
    (one, same), named = first_of(((x, table), {"mask": torch.ones(3), "flag": True}))
    assert one.tolist() == [[0, 1]]
    assert same is table
    assert named["mask"].shape == (1,)
    assert named["flag"] is True
