"""The command line: what it prints, its exit codes, its refusals."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import taut.cli
from taut.cli import EXIT_NOT_MET, app, main


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def compressed(task_file, tmp_path):
    folder = tmp_path / "run"
    recipe = "prune_weights(sparsity=0.7) > recover(epochs=2) > share_values(bits=4)"
    done = run("compress", task_file, "--recipe", recipe, "--run-folder", folder)
    assert done.exit_code == 0, done.output
    return folder, done.output


def test_compress_shows_the_table_and_names_its_files(compressed):
    folder, output = compressed
    size = (folder / "net.taut").stat().st_size
    assert f"{size:,}" in output
    assert "latency, batch 1, 1 thread, pytorch [ms]" in output
    assert "peak memory of a forward [bytes]" in output
    assert (folder / "report.html").is_file()
    for name in ("net.taut", "report.html"):
        assert str(folder / name) in output.replace("\n", "")


def test_measure_reads_the_file_back_to_the_same_score(compressed, task_file):
    folder, _ = compressed
    done = run("measure", task_file, folder / "net.taut", "--json")
    found = json.loads(done.stdout)
    record = json.loads((folder / "run.json").read_text())
    promised = record["candidates"][record["chosen"]]["measurement"]
    assert found["net.taut"]["score"] == promised["score"]
    assert found["net.taut"]["size_bytes"] == (folder / "net.taut").stat().st_size
    assert found["original"]["score"] == record["original"]["score"]


def test_measure_tells_how_each_layer_runs(compressed, task_file, monkeypatch):
    monkeypatch.setattr(taut.cli.out, "width", 100)
    text = run("measure", task_file, compressed[0] / "net.taut").output
    table = text[text.index("How each packed layer runs") :]
    assert "packed [ms]" in table
    rows = [line.replace("│", " ").split() for line in table.splitlines() if line.startswith("│")]
    assert [row[:3] for row in rows] == [[n, b, "1"] for b in ("1", "64") for n in "035"]
    for _, _, _, packed, dense, runs in rows:
        assert runs in ("packed", "dense")
        assert packed == dense or (float(packed) < float(dense)) == (runs == "packed")


def test_measure_of_the_original_alone_has_no_layers_to_choose_for(task_file):
    assert "How each packed layer runs" not in run("measure", task_file).output
    found = json.loads(run("measure", task_file, "--json").stdout)
    assert found["original"]["choices"] == []


def test_inspect_accounts_for_every_byte(compressed):
    folder, _ = compressed
    found = json.loads(run("inspect", folder / "net.taut", "--json").stdout)
    coded = sum(t["size_bytes"] for t in found["tensors"])
    assert found["size_bytes"] == (folder / "net.taut").stat().st_size
    assert coded + found["overhead_bytes"] == pytest.approx(found["size_bytes"], abs=1)
    text = run("inspect", folder / "net.taut").output
    assert "values.index" in text
    assert "Huffman" in text


def test_inspect_shows_what_a_network_can_lose(task_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(taut.cli.out, "width", 100)
    torch.manual_seed(0)
    text = run("inspect", task_file, "--sensitivity").output
    assert [line.split()[1:4:2] for line in text.splitlines() if ".weight" in line] == [
        ["0.weight", "3,072"], ["3.weight", "1,536"], ["5.weight", "320"],
    ]  # fmt: skip
    assert "plot  sensitivity.html" in text
    page = Path("sensitivity.html").read_text("utf-8")
    assert "0.weight (3,072)" in page
    torch.manual_seed(0)
    found = json.loads(run("inspect", "--sensitivity", task_file, "--json").stdout)
    assert len(found["losses"]["3.weight"]) == len(found["sparsities"]) == 13
    assert found["losses"]["0.weight"][-1] > found["baseline"]
    assert f"{found['losses']['0.weight'][6]:.4g}" in text


def test_inspect_shows_how_far_rows_have_turned(compressed, task_file, monkeypatch):
    monkeypatch.setattr(taut.cli.out, "width", 100)
    file = compressed[0] / "net.taut"
    text = run("inspect", file, "--angles", "--task", task_file).output
    lines = [line.replace("│", " ").split() for line in text.splitlines() if ".weight" in line]
    assert [line[:3] for line in lines] == [
        ["0.weight", "48", "64"], ["3.weight", "32", "48"], ["5.weight", "10", "32"],
    ]  # fmt: skip
    done = run("inspect", file, "--angles", "--task", task_file, "--json")
    found = json.loads(done.stdout)
    for line, told in zip(lines, found, strict=True):
        assert told["name"] == line[0]
        assert line[3:7] == [
            f"{told['angle']:.2f}", "±", f"{told['angle_spread']:.2f}", f"{told['sign_angle']:.2f}",
        ]  # fmt: skip
        assert 5 < told["angle"] < 60
        assert line[-1] == str(told["left_out"])


def test_inspect_of_angles_needs_a_file_and_a_task(compressed, task_file):
    file = compressed[0] / "net.taut"
    for arguments in (
        [file, "--angles"],
        [file, "--task", task_file],
        [task_file, "--angles", "--task", task_file],
        [task_file, "--sensitivity", "--angles", "--task", task_file],
    ):
        done = run("inspect", *arguments)
        assert done.exit_code == 2
        said = " ".join(done.output.replace("│", " ").split())
        assert "taut inspect net.taut --angles --task task.py" in said


def test_inspect_tells_its_two_kinds_of_file_apart(task_file, tmp_path):
    for arguments, message in (
        ([task_file], "is no .taut file; what its network can lose is shown by --sensitivity"),
        ([tmp_path / "net.taut", "--sensitivity"], "--sensitivity takes a task's Python file, got"),
    ):
        done = run("inspect", *arguments)
        assert done.exit_code == 2
        assert message in " ".join(done.output.replace("│", " ").split())


def test_techniques_lists_every_option_with_its_range(monkeypatch):
    monkeypatch.setattr(taut.cli.out, "width", 200)
    text = run("techniques").output
    for word in ("prune_weights", "share_values", "recover", "[0, 1)", "[1, 8]", "distill"):
        assert word in text


def test_techniques_never_cuts_a_name_that_is_to_be_typed(monkeypatch):
    monkeypatch.setattr(taut.cli.out, "width", 80)
    text = run("techniques").output
    names = {f.name for cls in taut.technique.STEPS.values() for f in cls.options()}
    assert all(f" {name} " in text for name in names)


def test_ctrl_c_says_that_nothing_is_lost(task_file, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(taut.cli, "compress", stop)
    done = run("compress", task_file, "--recipe", "share_values()", "--run-folder", tmp_path / "r")
    assert done.exit_code == 130
    assert "the same command goes on from here" in done.output


def test_a_goal_that_is_not_met_exits_so(task_file, tmp_path):
    done = run(
        "compress", task_file, "--goal", "bytes<=1%, score>=+5%", "--epochs", "1", "--trials", "1",
        "--run-folder", tmp_path / "run", "--json",
    )  # fmt: skip
    assert done.exit_code == EXIT_NOT_MET
    found = json.loads(done.stdout)
    assert found["met"] is False
    assert [v["bound"] for v in found["verdicts"]] == ["bytes<=1%", "score>=+5%"]


def test_a_refusal_is_one_line_and_exit_code_two(task_file, capsys, monkeypatch):
    command = ["taut", "compress", str(task_file), "--recipe", "prune_weight(sparsity=0.9)"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "RecipeError: no technique is named 'prune_weight'; did you mean" in printed.err
    assert "Traceback" not in printed.err + printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --recipe or --goal"),
        (["--recipe", "share_values()", "--goal", "bytes<=5%"], "give either --recipe or --goal"),
        (["--recipe", "bytes<=5%"], "belongs to --goal"),
        (["--goal", "share_values(bits=4)"], "belongs to --recipe"),
        (["--goal", ""], "'' is no goal, like 'bytes<=5%, score>=-0.5%'"),
    ],
)
def test_recipe_and_goal_are_told_apart(task_file, arguments, message):
    done = run("compress", task_file, *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_the_techniques_are_listed_for_machines():
    found = json.loads(run("techniques", "--json").stdout)
    assert set(found) == set(taut.technique.STEPS)
    sparsity = found["prune_weights"]["options"]["sparsity"]
    assert (sparsity["default"], sparsity["low"], sparsity["below"]) == (0.9, 0, 1)
    assert found["prune_weights"]["technique"] is True
    assert found["recover"]["technique"] is False
