"""Jobs in other processes: their outcomes, workers that die, what cannot be sent, timing."""

import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import digits_task, small_net
from test_search import trained_net

import taut
from taut.errors import ExportError, RunError, SearchError
from taut.modules import tensor_at
from taut.search import loop, search
from taut.search.jobs import Job, Outcome, run_job, shipment, unpacked
from taut.search.pools import Clock, Here, Processes, Server, timed
from taut.search.timing import timed_in_turn
from taut.statistics import Curve
from taut.trial import Ground
from taut.types import Latency
from taut.watch import Watch


def ground(folder, task=None):
    net, task = trained_net(), task or digits_task()
    return Ground(
        model=net, task=task, trace=taut.trace(net, task.example()), folder=folder, seed=0,
        precision="auto", watch=Watch(),
    )  # fmt: skip


def job(folder, number, recipe="share_values(bits=4) > recover(epochs=1)"):
    return Job(number=number, recipe=recipe, folder=str(folder / "trials" / str(number)))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two workers, and the folder that they work in."""
    folder = tmp_path_factory.mktemp("workers")
    with Processes(ground(folder), 2) as pool:
        yield pool, folder


def test_workers_find_what_this_process_finds(two, tmp_path):
    pool, folder = two
    here = Here(ground(tmp_path))
    for number in range(3):
        recipe = f"share_values(bits={2 + number}) > recover(epochs=1)"
        pool.submit(job(folder, number, recipe))
        here.submit(job(tmp_path, number, recipe))
    theirs = {j.number: o for j, o in (pool.next() for _ in range(3))}
    for _ in range(3):
        mine, outcome = here.next()
        assert (
            outcome.candidate.measurement.score == theirs[mine.number].candidate.measurement.score
        )
        file = f"trials/{mine.number}/net.taut"
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_a_job_brings_the_sensitivities_that_are_known(two, tmp_path):
    """A worker that scanned for itself would prune the second layer, too."""
    pool, folder = two
    names = [site.name for site in ground(folder).trace.sites]
    free, dear = (0.0, 0.0), (50.0, math.inf)
    curves = {
        name: Curve(sparsities=(0.5, 0.9), losses=dear if i == 1 else free, baseline=0.0)
        for i, name in enumerate(names)
    }
    asked = replace(job(folder, 20, "prune_weights(sparsity=0.3)"), curves=curves)
    assert Job.from_json(json.loads(json.dumps(asdict(asked)))) == asked
    pool.submit(asked)
    pool.next()
    run_job(ground(tmp_path), job(tmp_path, 20, asked.recipe))
    told, alone = (
        float((tensor_at(taut.load(f, trained_net()), names[1]) == 0).float().mean())
        for f in (place / "trials/20/net.taut" for place in (folder, tmp_path))
    )
    assert told < 0.05 < 0.2 < alone


def test_a_job_that_is_done_is_not_done_again(two):
    pool, folder = two
    pool.submit(job(folder, 7))
    _, first = pool.next()
    stamp = (folder / "trials/7/net.taut").stat().st_mtime_ns
    assert run_job(pool.__dict__.get("ground") or ground(folder), job(folder, 7)) == first
    assert (folder / "trials/7/net.taut").stat().st_mtime_ns == stamp


def test_a_worker_that_dies_is_replaced_and_its_job_done(two):
    pool, folder = two
    victim = next(s for s in pool.servers if s not in pool.busy)
    pool.submit(job(folder, 8))
    victim = next(iter(pool.busy))
    victim.process.send_signal(signal.SIGKILL)
    done, outcome = pool.next()
    assert done.number == 8
    assert outcome.candidate is not None
    assert victim not in pool.servers
    assert len(pool.servers) == 2


def test_a_job_that_kills_its_worker_twice_is_lost(two):
    pool, folder = two
    pool.submit(job(folder, 9))
    stop = threading.Event()

    def kill():
        while not stop.wait(0.05):
            for server in list(pool.busy):
                server.process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        _, outcome = pool.next()
    finally:
        stop.set()
        killer.join()
    assert outcome.candidate is None
    assert outcome.error == "its process ended 2 times: signal 9, as when memory runs out"


def test_what_goes_wrong_in_a_job_is_its_outcome(two):
    pool, folder = two
    pool.submit(job(folder, 10, "low_rank(only='nowhere') > recover(epochs=1)"))
    _, outcome = pool.next()
    assert outcome.error.startswith("low_rank: only='nowhere' matches no site")
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_a_task_from_a_file_travels_by_value(task_file, tmp_path):
    task = taut.load_task(task_file)
    sent = shipment(ground(tmp_path, task))
    task_file.unlink()
    module = next(n for n in sys.modules if n.startswith("taut_task_"))
    sys.modules.pop(module)
    got = unpacked(sent, tmp_path / "elsewhere")
    assert got.folder == tmp_path / "elsewhere"
    assert got.task.evaluate(got.model) == digits_task().evaluate(trained_net())


def test_what_cannot_travel_is_refused(tmp_path):
    task = digits_task(train=lambda: threading.Lock())
    task._data["train"] = threading.Lock()
    with pytest.raises(SearchError, match=r"cannot be sent to other processes .*workers=1"):
        shipment(ground(tmp_path, task))


def test_latencies_are_taken_in_turn(tmp_path):
    file = tmp_path / "net.taut"
    net = trained_net()
    taut.apply(net, "prune_weights(sparsity=0.9, scope='layer')", digits_task())
    taut.pack(net, file)
    there = timed(ground(tmp_path), [str(file)], rounds=2, threads=1)
    here = timed_in_turn(ground(tmp_path), [str(file)], rounds=2, threads=1)
    for (original, none), (packed, choices) in (there, here):
        assert none == ()
        assert {c.batch for c in choices} == {1, 64}
        for times in (original, packed):
            assert [(t.batch, t.threads, t.engine) for t in times] == [
                (1, 1, "pytorch"), (64, 1, "pytorch"),
            ]  # fmt: skip
            assert all(t.runs >= 2 and t.median_ms > 0 for t in times)
    with pytest.raises(
        SearchError, match="no engine is named 'gpu'; known: auto, compile, eager, onnx"
    ):
        timed_in_turn(ground(tmp_path), [], engine="gpu")


def test_a_timing_process_that_dies_is_told(tmp_path, monkeypatch):
    real = Server.ask

    def dying(self, what):
        real(self, what)
        self.process.kill()

    monkeypatch.setattr(Server, "ask", dying)
    with pytest.raises(RunError, match=r"the process that times the networks ended: signal 9"):
        timed(ground(tmp_path), [])


def test_the_same_seed_finds_the_same_with_two_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "timed", lambda ground, files, **_: [((), ())] * (len(files) + 1))
    options = {"trials": 4, "epochs": 1, "batch": 2, "techniques": "share_values, quantize"}
    goal = "bytes<=30%, score>=-50%"
    alone = search(trained_net(), digits_task(), goal, folder=tmp_path / "a", **options)
    both = search(trained_net(), digits_task(), goal, folder=tmp_path / "b", workers=2, **options)
    assert [c.recipe for c in alone.candidates] == [c.recipe for c in both.candidates]
    assert [c.measurement.size_bytes for c in alone.frontier] == [
        c.measurement.size_bytes for c in both.frontier
    ]
    assert small_net() is not None
    assert os.path.isfile(tmp_path / "b" / "workers.txt")


def test_a_trial_knows_its_outcome_at_every_rung(tmp_path):
    """A tournament that goes on ranks survivors by the rung that they were ranked at."""
    short = "share_values(bits=4) > recover(epochs=1)"
    grown = f"{short} > recover(epochs=2)"
    place = Here(ground(tmp_path))
    found = {}
    for recipe in (short, grown):
        place.submit(job(tmp_path, 0, recipe))
        _, found[recipe] = place.next()
    assert job(tmp_path, 0, short).done() == found[short]
    assert job(tmp_path, 0, grown).done() == found[grown]
    assert [r["epoch"] for r in found[grown].history] == [1, 1, 2]
    assert job(tmp_path, 0, "share_values(bits=3)").done() is None


def test_another_engine_is_timed_at_the_threads_that_were_named(tmp_path, monkeypatch):
    asked = []

    def told(net, task, engine, batches, threads):
        asked.append((engine, tuple(batches), threads))
        if len(asked) == 3:
            raise ExportError("onnx does not run the network: it lacks an operation")
        return (
            Latency(batch=1, threads=threads, engine=engine, median_ms=1.0, iqr_ms=0.0, runs=9),
        )

    monkeypatch.setattr(importlib.import_module("taut.search.timing"), "latencies", told)
    here, file = ground(tmp_path), tmp_path / "net.taut"
    taut.pack(trained_net(), file)
    found = timed_in_turn(here, [str(file)] * 2, engine="onnxruntime", threads=3, batches=(1,))
    assert asked == [("onnx", (1,), 3)] * 3
    assert [len(times) for times, _ in found] == [1, 1, 0]


def test_one_process_takes_latencies_time_after_time(tmp_path):
    here, file = ground(tmp_path), tmp_path / "net.taut"
    taut.pack(trained_net(), file)
    with Clock(here, threads=1) as clock:
        assert clock.server is not None
        process = clock.server.process.pid
        for count in (1, 2):
            found = clock.timed([str(file)] * count, rounds=1, batches=(2,))
            assert [[(t.batch, t.threads) for t in ts] for ts, _ in found] == [
                [(2, 1)] for _ in range(count + 1)
            ]
        assert clock.server.process.pid == process
        os.kill(process, signal.SIGKILL)
        with pytest.raises(RunError, match="the process that times the networks ended: signal 9"):
            clock.timed([str(file)])
    assert not list(tmp_path.glob(".timed*"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's process table")
def test_while_another_is_timed_the_workers_stand_still(two):
    pool, folder = two

    def states():
        stats = [Path(f"/proc/{s.process.pid}/stat").read_text() for s in pool.servers]
        return {s.rpartition(") ")[2][0] for s in stats}

    with pool.quiet():
        deadline = time.monotonic() + 60
        while states() != {"T"} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert states() == {"T"}
    pool.submit(job(folder, 90))
    assert pool.next()[1].candidate is not None


def test_where_latency_decides_each_candidate_is_timed_apart(tmp_path, monkeypatch):
    asked = []

    class NoClock:
        def __init__(self, ground, **options):
            asked.append(options)

        def timed(self, files, **more):
            asked.append((len(files), more))
            at = {"batch": 1, "threads": 1, "engine": "onnx", "iqr_ms": 0.0, "runs": 3}
            slow, fast = (Latency(median_ms=ms, **at) for ms in (4.0, 1.0))
            return [((slow,), ()), *[((fast,), ())] * len(files)]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(loop, "Clock", NoClock)
    monkeypatch.setattr(loop, "timed", lambda ground, files, **_: NoClock(ground).timed(files))
    options = {"trials": 2, "epochs": 1, "techniques": "share_values", "engine": "onnxruntime"}
    result = search(
        trained_net(), digits_task(), "latency<=30%, score>=-50%", folder=tmp_path, threads=1,
        **options,
    )  # fmt: skip
    assert asked[:3] == [
        {"threads": 1, "engine": "onnx"}, *[(1, {"rounds": 3, "batches": (1,)})] * 2
    ]  # fmt: skip
    assert result.met
    assert (result.original.latency().median_ms, result.measurement.latency().median_ms) == (4, 1)
