"""A whole run: recipe or goal, its folder, killing it, reading its file back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import digits_task, small_net

import taut
from taut.errors import (
    FormatError,
    GoalError,
    RecipeError,
    RunError,
    TaskError,
    TraceError,
)
from taut.files import write_atomically
from taut.types import Candidate

RECIPE = (
    "prune_weights(sparsity=0.8) > schedule(steps=2) > recover(epochs=10) > "
    "share_values(bits=4) > recover(epochs=5)"
)


def test_what_does_not_go_on_the_reshaped_network_is_refused(trained, task, tmp_path):
    with pytest.raises(RecipeError, match="block must be at most the inputs of a weight, got 8"):
        taut.compress(
            trained, task, "low_rank(rank='ratio', ratio=0.05) > structured_matrix(block=8)",
            folder=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run" / "net.taut").exists()


def test_what_would_grow_on_the_reshaped_network_is_left_alone(trained, task, tmp_path):
    recipe = "low_rank(energy=0.4) > share_values(bits=8) > hash_weights(ratio=0.3)"
    result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
    assert any(left.step == "share_values" for left in result.candidate.left)


def test_a_recipe_from_start_to_finish(trained, task, tmp_path):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    result = taut.compress(trained, task, RECIPE, folder=tmp_path / "run")
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    file = tmp_path / "run" / "net.taut"
    assert result.measurement.size_bytes == file.stat().st_size
    assert result.ratio == 4 * sum(p.numel() for p in trained.parameters()) / file.stat().st_size
    assert result.ratio > 15
    assert result.measurement.score > result.original.score - 0.03
    fresh = taut.load(file, small_net())
    assert task.evaluate(fresh) == result.measurement.score
    assert task.evaluate(result.model) == result.measurement.score
    kept = sum(int((taut.modules.tensor_at(fresh, n) != 0).sum()) for n in
               ("0.weight", "3.weight", "5.weight"))  # fmt: skip
    assert result.measurement.nonzero_parameters == kept + 48 + 32 + 10
    assert [r.epoch for r in result.history] == [*range(1, 11), *range(1, 6)]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done"
    assert record["versions"]["torch"] == torch.__version__
    assert "epoch 3" in (tmp_path / "run" / "log.txt").read_text()
    saved = result.save(tmp_path / "copy.taut")
    assert saved.read_bytes() == file.read_bytes()


def test_the_same_call_again_returns_at_once(trained, task, tmp_path):
    first = taut.compress(trained, task, RECIPE, folder=tmp_path)

    class Quiet(taut.Watch):
        def on_epoch(self, record):
            pytest.fail("trained again")

    again = taut.compress(trained, task, RECIPE, folder=tmp_path, watch=Quiet())
    assert again.measurement == first.measurement
    assert again.candidate.recipe == first.candidate.recipe


def test_the_same_seed_writes_the_same_bytes(trained, task, tmp_path):
    files = []
    for name in ("a", "b"):
        result = taut.compress(trained, task, RECIPE, folder=tmp_path / name, seed=3)
        files.append((result.folder / "net.taut").read_bytes())
    other = taut.compress(trained, task, RECIPE, folder=tmp_path / "c", seed=4)
    assert files[0] == files[1]
    assert (other.folder / "net.taut").read_bytes() != files[0]


def test_another_run_in_the_folder_is_refused_and_fresh_replaces_it(trained, task, tmp_path):
    taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)
    with pytest.raises(RunError, match=r"belongs to another run .its asked is 'share_values"):
        taut.compress(trained, task, "share_values(bits=3)", folder=tmp_path)
    result = taut.compress(trained, task, "share_values(bits=3)", folder=tmp_path, fresh=True)
    assert "bits=3" in result.candidate.recipe


def test_fresh_removes_nothing_but_what_a_run_writes(trained, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text("mine")
    for bits in (4, 3):
        recipe = f"share_values(bits={bits})"
        result = taut.compress(trained, task, recipe, folder=".", fresh=True)
    assert "bits=3" in result.candidate.recipe
    assert Path("task.py").read_text() == "mine"


@pytest.mark.parametrize("lost", ["net.taut", "trials/1/net.taut"])
def test_a_file_that_was_lost_is_written_again(trained, task, tmp_path, lost):
    taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)
    before = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)
    assert (tmp_path / lost).read_bytes() == before


def test_a_copy_that_was_damaged_is_written_again(trained, task, tmp_path):
    result = taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)
    (tmp_path / "net.taut").write_bytes(b"TAUT")
    taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)
    assert (tmp_path / "net.taut").read_bytes() == Path(result.candidate.path).read_bytes()


def test_names_follow_from_what_is_asked(trained, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = taut.compress(trained, task, "share_values(bits=4)")
    two = taut.compress(trained, task, "share_values(bits=3)")
    assert one.folder != two.folder
    assert one.folder.parent == Path("runs")


def test_a_goal_is_met_and_says_so(trained, task, tmp_path):
    result = taut.compress(
        trained, task, "bytes<=10%, score>=-3%", folder=tmp_path, epochs=6, trials=4
    )
    assert result.met
    assert result.measurement.size_bytes <= 0.1 * result.original.size_bytes
    assert [v.holds for v in result.verdicts] == [True, True]
    assert all(v.reached == r for v, r in zip(
        result.verdicts, (result.measurement.size_bytes, result.measurement.score), strict=True
    ))  # fmt: skip


def test_a_goal_out_of_reach_gives_the_nearest_and_never_claims_it(trained, task, tmp_path):
    result = taut.compress(
        trained, task, "bytes<=1%, score>=+4%", folder=tmp_path, epochs=2, trials=3
    )
    assert not result.met
    assert not all(v.holds for v in result.verdicts)
    distance = result.goal.distance
    tried = [
        Candidate.from_json(c)
        for c in json.loads((tmp_path / "run.json").read_text())["candidates"]
    ]
    assert distance(result.measurement, result.original) == min(
        distance(c.measurement, result.original) for c in tried
    )


def test_without_a_bound_on_bytes_the_file_gets_as_small_as_the_score_allows(
    trained, task, tmp_path
):
    result = taut.compress(trained, task, "score>=-4%", folder=tmp_path, epochs=15, trials=4)
    assert result.met
    record = json.loads((tmp_path / "run.json").read_text())
    tried = [Candidate.from_json(c) for c in record["candidates"]]
    kept = [c for c in tried if result.goal.met(c.measurement, result.original)]
    assert result.measurement.size_bytes == min(c.measurement.size_bytes for c in kept)
    assert result.ratio > 8


KILLED_IN_EPOCH_6 = """
import os, signal
from pathlib import Path
def train():
    log, once = Path({log!r}), Path(__file__).with_suffix(".killed")
    for i, batch in enumerate(task._data["train"]):
        if i == 9 and log.is_file() and "epoch 5:" in log.read_text() and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
"""


def test_killed_in_the_midst_it_goes_on_and_ends_the_same(task_file, tmp_path):
    recipe = "prune_weights(sparsity=0.8) > recover(epochs=12) > share_values(bits=4)"

    def run(folder):
        command = [
            sys.executable, "-m", "taut.cli", "compress", str(task_file), "--recipe", recipe,
            "--run-folder", str(folder), "--json",
        ]  # fmt: skip
        return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode

    log = tmp_path / "killed" / "log.txt"
    with task_file.open("a") as file:
        file.write(KILLED_IN_EPOCH_6.format(log=str(log)))
    assert run(log.parent) == -signal.SIGKILL
    before = log.read_text()
    assert "epoch 5:" in before
    assert "epoch 6:" not in before
    assert not (log.parent / "net.taut").exists()
    assert (run(log.parent), run(tmp_path / "whole")) == (0, 0)
    again = [line for line in log.read_text()[len(before) :].splitlines() if "epoch " in line]
    assert len(again) <= 12 - 5 + 1  # at most the epoch before is trained twice
    bytes_of = [(f / "net.taut").read_bytes() for f in (log.parent, tmp_path / "whole")]
    assert bytes_of[0] == bytes_of[1]


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ("prune_weight(sparsity=0.9)", RecipeError, "did you mean 'prune_weights'"),
        ("prune_weights(sparsty=0.9)", RecipeError, "did you mean 'sparsity'"),
        ("prune_weights(sparsity=1.0)", RecipeError, r"must lie in \[0, 1\), got 1.0"),
        ("prune_weights(only='conv*')", RecipeError, "matches no site; known: 0.weight, 3.weight"),
        ("recover(epochs=90000) > share_values(only='fc')", RecipeError, "matches no site"),
        ("bytes<=0%", GoalError, "must stay above 0"),
        ("bites<=5%", GoalError, "did you mean 'bytes'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    trained, task, tmp_path, wanted, error, message
):
    with pytest.raises(error, match=message):
        taut.compress(trained, task, wanted, folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trials": 0}, GoalError, "trials and epochs must be at least 1, got 0 and 12"),
        ({"epochs": -3}, GoalError, "trials and epochs must be at least 1, got 5 and -3"),
        ({"precision": "int8"}, FormatError, "no precision 'int8'; known: auto"),
    ],
)
def test_options_are_checked_before_any_work(trained, task, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        taut.compress(trained, task, "bytes<=50%", folder=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_network_that_cannot_be_traced_is_refused_with_the_reason(task, tmp_path):
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x[:, :10]

    with pytest.raises(TraceError, match=r"Branching cannot be traced by torch.export: .+ branch"):
        taut.compress(Branching(), task, RECIPE, folder=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(trained, task, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*run.json: .*--run-folder"):
        taut.compress(trained, task, RECIPE, folder=blocker / "run")


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    target = tmp_path / "net.taut"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("text", ["{half", "[]"])
def test_a_record_that_is_damaged_is_named(trained, task, tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"cannot read .*run.json.*--fresh"):
        taut.compress(trained, task, RECIPE, folder=tmp_path)


@pytest.mark.parametrize("name", ["trial.json", "checkpoint.pt"])
def test_a_trial_that_is_damaged_is_named(trained, task, tmp_path, name):
    taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)
    (tmp_path / "trials/1/trial.json").unlink()
    (tmp_path / "trials/1" / name).write_text("junk")
    with pytest.raises(RunError, match=rf"cannot read .*{name}.*start over with --fresh"):
        taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)


def test_apply_takes_techniques_only(trained, task):
    with pytest.raises(RecipeError, match="apply takes a technique"):
        taut.apply(trained, "recover(epochs=1)", task)


def test_apply_on_forms_needs_the_trace_of_the_original(trained, task):
    taut.apply(trained, "prune_weights(sparsity=0.5)", task)
    with pytest.raises(RecipeError, match=r"share_values needs the trace of the original"):
        taut.apply(trained, "share_values(bits=4)", task)


def test_packing_before_the_last_stage_warns(trained, task, tmp_path, caplog):
    taut.apply(trained, "prune_weights(sparsity=0.5, scope='layer')", task)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    taut.attach_schedules(trained, optimizer, total_steps=2, schedule="schedule(steps=2)")
    taut.pack(trained, tmp_path / "early.taut")
    assert "0.weight, 3.weight, 5.weight are not at full strength yet" in caplog.text
    caplog.clear()
    optimizer.step()
    taut.pack(trained, tmp_path / "net.taut")
    assert "full strength" not in caplog.text


def test_lower_is_better_reaches_goals_too(trained, tmp_path):
    def loss_of(output, target):
        return float(torch.nn.functional.cross_entropy(output, target))

    task = digits_task(score=loss_of, better="lower")
    result = taut.compress(
        trained, task, "bytes<=15%, score<=+60%", folder=tmp_path, epochs=4, trials=2
    )
    assert result.goal.bounds[1].limit(result.original) > result.original.score
    assert result.met == all(v.holds for v in result.verdicts)


def test_a_score_that_is_nan_is_refused(trained, tmp_path):
    task = digits_task(score=lambda output, target: float("nan"))
    with pytest.raises(TaskError, match="score is NaN; look for NaN in the network's outputs"):
        taut.compress(trained, task, "share_values(bits=4)", folder=tmp_path)


def test_bounds_without_bytes_or_score_take_the_mildest_recipe(trained, task, tmp_path):
    result = taut.compress(trained, task, "parameters<=50%", folder=tmp_path, epochs=2, trials=2)
    assert result.met
    assert result.measurement.nonzero_parameters > 0.45 * result.original.parameters


def test_an_edited_task_file_is_another_run(task_file, tmp_path):
    loaded = taut.load_task(task_file)
    taut.compress(loaded.model(), loaded, "share_values(bits=4)", folder=tmp_path / "run")
    task_file.write_text(task_file.read_text() + "# edited\n")
    loaded = taut.load_task(task_file)
    with pytest.raises(RunError, match=r"belongs to another run .its task file is"):
        taut.compress(loaded.model(), loaded, "share_values(bits=4)", folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("recover(epochs=1) > share_values(bits=3) > prune_weights()", "in 8 numbers already"),
        ("recover(epochs=1) > prune_weights(only='conv9')", "matches no site"),
    ],
)
def test_a_step_that_cannot_follow_is_refused_before_training(
    trained, task, tmp_path, recipe, message
):
    class Quiet(taut.Watch):
        def on_batch(self, *_):
            pytest.fail("trained before it refused")

    with pytest.raises(RecipeError, match=message):
        taut.compress(trained, task, recipe, folder=tmp_path, watch=Quiet())


def test_a_step_may_come_again(trained, task, tmp_path):
    recipe = "prune_weights(sparsity=0.5) > share_values(bits=5) > share_values(bits=3)"
    assert taut.compress(trained, task, recipe, folder=tmp_path).ratio > 5
