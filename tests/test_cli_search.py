"""The commands that try many: what they print, their exit codes, their live view."""

import json
from pathlib import Path

import pytest
from test_cli import run
from test_frontier import candidate

import taut.cli
from taut.cli_search import Dashboard
from taut.terminal import EXIT_NOT_MET

FEW = ("--epochs", "1", "--techniques", "share_values, prune_weights")


def test_search_shows_the_result_and_why(task_file, tmp_path, monkeypatch):
    monkeypatch.setattr(taut.cli.out, "width", 120)
    arguments = ["search", task_file, "--goal", "bytes<=20%, score>=-20%", "--trials", "2", *FEW,
                 "--run-folder", tmp_path / "run"]  # fmt: skip
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    for text in ("candidates", "keep the goal", "bytes<=20%: kept", "recipe  ", "report  "):
        assert text in done.output
    assert (tmp_path / "run" / "report.html").is_file()
    found = json.loads(run(*arguments, "--json").stdout)  # at once: it is done
    assert found["met"] is True
    assert found["trials"] == 2
    assert Path(found["frontier"][0]["path"]).is_file()
    assert found["explanation"].startswith("Of 2 candidates")


def test_a_goal_that_is_not_met_exits_so(task_file, tmp_path):
    done = run("search", task_file, "--goal", "bytes<=4%, score>=+5%", "--trials", "1", *FEW,
               "--run-folder", tmp_path / "run", "--json")  # fmt: skip
    assert done.exit_code == EXIT_NOT_MET
    assert "score>=+5%: binds" in json.loads(done.stdout)["explanation"]


def test_ctrl_c_says_that_nothing_is_lost(task_file, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("taut.cli_search.search", stop)
    done = run("search", task_file, "--goal", "bytes<=5%")
    assert done.exit_code == 130
    assert "the same command goes on from here" in done.output


def test_compare_prints_a_table_and_names_its_picture(task_file, tmp_path, monkeypatch):
    monkeypatch.setattr(taut.cli.out, "width", 120)
    arguments = ["compare", task_file, "--epochs", "1", "--strengths", "1", "--techniques",
                 "quantize, fold_norms", "--run-folder", tmp_path / "c"]  # fmt: skip
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "quantize(bits=" in done.output
    assert str(tmp_path / "c" / "compare.html") in done.output.replace("\n", "")
    found = json.loads(run(*arguments, "--json").stdout)
    assert {r["technique"] for r in found["rows"]} == {"quantize", "fold_norms"}
    assert Path(found["picture"]).is_file()


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_sketch_puts_the_best_on_top(better):
    board = Dashboard(10, better)
    assert board.sketch() == ""
    for size, score in ((100, 0.2), (1000, 0.9), (500, 0.5)):
        board.on_trial(candidate(size, score), 1, 10)
    lines = board.sketch().splitlines()
    best = "0.9000" if better == "higher" else "0.2000"
    assert lines[0].startswith(f"{best} │")
    assert lines[0].count("●") == 1
    column = lines[0].index("●") - lines[0].index("│")
    assert column == (board.width if better == "higher" else 1)
    assert sum(line.count("·") for line in lines) == 2
    assert "100 … 1,000 bytes" in lines[-1]


def test_the_dashboard_tells_how_far_it_is():
    board = Dashboard(4, "higher")
    board.say("trial 1")
    board.on_trial(None, 1, 4)
    board.on_trial(candidate(10, 0.5), 2, 4)
    with taut.cli.out.capture() as shown:
        taut.cli.out.print(board)
    assert "trial 2/4" in shown.get()
    assert "1 lost" in shown.get()
    assert "min" in shown.get()
