"""The records of benchmarks: rows of several runs, each with what it was measured with."""

import argparse
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import harness
    import tables
finally:
    sys.path.pop(0)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run a benchmark of two rows as its script would, and read its record."""
    path = tmp_path / "record.json"

    def figures(options: argparse.Namespace) -> list[harness.Figure]:
        return [
            harness.Figure(name=name, paper="1", ours=value + options.seed, asked=5, at_most=True)
            for name, value in (("first", 1.0), ("second", 2.0))
            if options.only in name
        ]

    def run(*arguments, processor="Old", threads=1):
        machine = {"system": "Linux", "processor": processor, "threads": threads, "cuda": None}
        monkeypatch.setattr(harness, "machine", lambda: machine)
        script = str(ROOT / "benchmarks" / "papers" / "records.py")
        monkeypatch.setattr(sys, "argv", [script, "--json", str(path), *arguments])
        harness.run("A benchmark", figures)
        return json.loads(path.read_text())

    return run


def by_name(record):
    return {
        f["name"]: (f["ours"], f["measured"]["machine"]["processor"]) for f in record["figures"]
    }


def test_a_run_that_is_killed_keeps_its_rows_among_the_older_ones(bench, tmp_path, monkeypatch):
    bench("--seed", "0")

    def killed(options):
        yield harness.Figure(name="first", paper="", ours=4.0, asked=5, at_most=True)
        raise KeyboardInterrupt

    path = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "x.py"), "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        harness.run("x", killed)
    assert [f["ours"] for f in json.loads(path.read_text())["figures"]] == [4.0, 2.0]


def test_a_row_tells_what_it_was_measured_with(bench):
    record = bench("--seed", "3", threads=2)
    for figure in record["figures"]:
        assert figure["measured"]["seed"] == 3
        assert figure["measured"]["machine"]["threads"] == 2
        assert figure["measured"]["versions"]["torch"]


def test_rows_from_another_machine_stay_until_they_are_measured_again(bench):
    bench()
    record = bench("--only", "second", "--seed", "1", processor="New")
    assert list(by_name(record).items()) == [("first", (1.0, "Old")), ("second", (3.0, "New"))]
    record = bench("--only", "first", processor="New")
    assert list(by_name(record).items()) == [("first", (1.0, "New")), ("second", (3.0, "New"))]


def test_a_whole_run_leaves_no_old_row(bench):
    bench()
    assert set(by_name(bench(processor="New")).values()) == {(1.0, "New"), (2.0, "New")}


def test_a_quick_pass_never_joins_rows_that_count(bench):
    bench()
    assert list(by_name(bench("--quick", "--only", "first"))) == ["first"]


def test_the_table_names_the_machine_of_rows_measured_elsewhere(bench):
    bench()
    text = tables.table({"x": bench("--only", "second", "--seed", "1", processor="New")})
    title, _, _, _, _, first, second = text.splitlines()
    assert title.startswith(
        "A benchmark; `python benchmarks/papers/records.py` (seed 0, Old, 1 thread,"
    )
    assert first == "| first | 1 | ≤ 5 | **1** |"
    assert second == "| second (seed 1, New) | 1 | ≤ 5 | **3** |"


def test_every_record_that_is_kept_tells_of_each_row():
    for path in tables.RESULTS.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert not record["quick"]
        assert all(set(f["measured"]) == {"seed", "versions", "machine"} for f in record["figures"])
