"""Two processes that train together: as one would with batches twice as large."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import together
import torch

from taut import processes

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def together_run(*command):
    """Run it in two processes; returns what they printed."""
    done = subprocess.run(
        [sys.executable, "-m", *TORCHRUN, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def launched(folder, what):
    """What two processes of together.py found."""
    together_run(Path(__file__).parent / "together.py", folder, what)
    return torch.load(folder / f"{what}.pt", weights_only=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("train"), "train")


def close(got, wanted, tolerance):
    for name, value in wanted.items():
        apart = float((got[name].double() - value.double()).abs().max())
        assert apart <= tolerance, f"{name} is {apart} apart"


def test_two_processes_learn_what_one_does_with_batches_twice_as_large(found):
    weights, losses = found["whole"]
    alone, its_losses = together.trained(80)
    close(weights, alone, 1e-4)
    assert losses == pytest.approx(its_losses, rel=1e-4)
    assert found["alike"]


def test_batches_that_accumulate_are_one_batch_there_too(found):
    close(found["accumulated"][0], found["whole"][0], 1e-4)


@pytest.mark.parametrize(("way", "apart"), [("float16", 2e-2), ("powersgd", 0.5)])
def test_gradients_may_travel_in_fewer_bytes(found, way, apart):
    weights, losses = found[way]
    exact, its_losses = found["whole"]
    assert any(not torch.equal(weights[k], v) for k, v in exact.items())
    close(weights, exact, apart)
    assert losses == pytest.approx(its_losses, rel=0.1)


def test_what_gloo_cannot_send_is_refused(found):
    told = r"communication='bfloat16' does not work between these processes \(BF16.*use float16"
    assert all(re.search(told, message) for message in found["bfloat16"])


def test_a_killed_training_of_two_goes_on_exactly(found):
    assert found["resumed"] == [True, True]  # gradients whole, and by PowerSGD with its memory


def test_all_stop_where_one_meets_a_loss_that_is_nan(found):
    first, second = found["stopped"]
    assert "a gradient" in first or "the gradient of" in first
    assert "the loss became nan in epoch 1, batch 1" in second


def test_what_the_main_process_meets_is_known_to_all(found):
    assert found["refused"] == ["only here", "only here"]


def test_shares_come_out_even(found):
    assert found["shares"] == [[0, 2, 4, 6], [1, 3, 5, 0]]
    assert list(processes.share(range(3))) == [0, 1, 2]
    assert list(processes.share([])) == []


def test_a_whole_run_leaves_one_folder(tmp_path):
    found = launched(tmp_path, "compress")
    folder = tmp_path / "run"
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    size = (folder / "net.taut").stat().st_size
    assert found["sizes"] == [size, size]
    assert torch.equal(*found["answers"])
    assert found["history"] == 2
    assert sorted(p.name for p in folder.iterdir()) == [
        "log.txt", "net.taut", "run.json", "teacher", "trials",
    ]  # fmt: skip
    assert not list(folder.rglob("*.pt")) or list((folder / "teacher").rglob("*.pt"))
    log = (folder / "log.txt").read_text()
    assert log.count("trial 1:") == 1
    assert log.count("measuring the original") == 1


def test_the_command_line_speaks_once(tmp_path, task_file):
    recipe = "prune_weights(sparsity=0.8, scope='layer') > recover(epochs=1)"
    folder = tmp_path / "run"
    options = ["--recipe", recipe, "--run-folder", folder, "--json"]
    printed = together_run("-m", "taut.cli", "compress", task_file, *options)
    found = json.loads(printed)
    assert found["measurement"]["size_bytes"] == (folder / "net.taut").stat().st_size
    assert (folder / "report.html").is_file()
