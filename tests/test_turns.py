"""Workers that are given turns."""

import sys

import pytest

from taut.errors import ExportError
from taut.export.turns import Worker


def worker(tmp_path, code: str) -> Worker:
    return Worker("it", [sys.executable, "-c", code], tmp_path / "log", {"TURNS": "7"})


def test_a_worker_answers_turns_and_finds_the_environment(tmp_path):
    code = """
import os, sys
print(os.environ["TURNS"], flush=True)
for line in sys.stdin:
    print([1.5 * float(line)], flush=True)
"""
    given = worker(tmp_path, code)
    assert given.line() == "7"
    assert given.go(2) == [3.0]
    given.stop()


@pytest.mark.parametrize("before", ["", "input(); "])
def test_a_worker_that_ends_says_its_last_words(tmp_path, before):
    dies = worker(tmp_path, f"print('ready', flush=True); {before}raise SystemExit('no more')")
    assert dies.line() == "ready"
    if not before:
        dies.process.wait()  # it cannot even be written to
    with pytest.raises(ExportError, match="it ended as it was timed: no more"):
        dies.go(0.1)
    dies.stop()
