"""taut export, run and bench: what they print and write, what they refuse."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import taut
from taut.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


RECIPE = "share_values(only='3.weight', bits=4) > quantize(activations=8)"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run of a task's file, by a recipe without training."""
    import conftest

    folder = tmp_path_factory.mktemp("engines")
    torch.manual_seed(0)
    net = conftest.small_net()
    net.load_state_dict(conftest._trained_state())
    torch.save(net.state_dict(), folder / "weights.pt")
    text = conftest.textwrap.dedent(conftest.TASK)
    tests = str(conftest.Path(__file__).parent)
    file = folder / "task.py"
    text = text.format(tests=tests, weights=str(folder / "weights.pt"))
    file.write_text(f"{text}\nabout = {{'labels': list('0123456789')}}\n")
    done = run("compress", file, "--recipe", RECIPE, "--run-folder", folder / "run")
    assert done.exit_code == 0, done.output
    return folder / "run"


def test_export_run_and_what_the_file_tells(run_folder, tmp_path, task):
    done = run("export", run_folder / "net.taut", "--to", "onnx", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["file"] == str(run_folder / "net.onnx")
    assert abs(told["score"] - told["packed_score"]) <= 0.01
    assert told["agreement"]["samples"] == 397

    from taut.export.onnx_file import about

    found = about(run_folder / "net.onnx")
    assert json.loads(found["labels"])[3] == "3"
    assert found["recipe"] == RECIPE
    record = json.loads((run_folder / "run.json").read_text())
    assert (
        json.loads(found["measurement"])["score"] == record["candidates"][0]["measurement"]["score"]
    )

    x = task.example(3)[0][0]
    np.save(tmp_path / "x.npy", x.numpy())
    answers = []
    for file in ("net.taut", "net.onnx"):
        done = run("run", run_folder / file, tmp_path / "x.npy", "-o", tmp_path / "y.npy")
        assert done.exit_code == 0, done.output
        answers.append(np.load(tmp_path / "y.npy"))
    assert answers[0].shape == (3, 10)
    assert np.abs(answers[0] - answers[1]).max() < 0.05 * np.abs(answers[0]).max()
    printed = run("run", run_folder / "net.taut", tmp_path / "x.npy").output
    told = json.loads(run("run", run_folder / "net.taut", tmp_path / "x.npy", "--json").stdout)
    assert told["shapes"] == [list(np.load(tmp_path / "y.npy").shape)]
    assert np.array_equal(np.float32(told["outputs"][0]), answers[0])
    named = run("run", run_folder / "net.taut", tmp_path / "x.npy", "-o", tmp_path / "z.npy",
                "--json")  # fmt: skip
    assert json.loads(named.stdout) == {
        "shapes": told["shapes"], "file": str(tmp_path / "z.npy"),
    }  # fmt: skip
    assert printed.count("[") == 4


def exported(run_folder, to, keep, *more):
    return run("export", run_folder / "net.taut", "-o", to, "--keep", keep, *more)


def test_export_keeps_layers_compressed_or_decodes_them(run_folder, library, tmp_path):
    found = {}
    for keep in ("none", "all"):
        done = exported(run_folder, tmp_path / f"{keep}.xml", keep, "--json")
        assert done.exit_code == 0, done.output
        found[keep] = json.loads(done.stdout)
        assert abs(found[keep]["score"] - found[keep]["packed_score"]) <= 0.01
    none, kept = found["none"], found["all"]
    assert (none["kept"], none["library"], none["decoded"]) == ({}, None, "keep='none'")
    assert kept["kept"] == {"3": "LookupMatmul"}  # the others are int8, which the engine has
    assert (kept["library"], kept["decoded"]) == (str(tmp_path / "all.taut.so"), "")
    assert (tmp_path / "all.taut.so").read_bytes() == library.read_bytes()
    assert not (tmp_path / "none.taut.so").exists()
    told = exported(run_folder, tmp_path / "all.xml", "all").output
    assert "kept    1 layer compressed, by the library's operations" in told
    told = exported(run_folder, tmp_path / "none.xml", "none").output
    assert "layers that could stay compressed are decoded: keep='none'" in told


def test_export_refuses_to_keep_what_it_cannot(run_folder, tmp_path):
    done = exported(run_folder, tmp_path / "net.xml", "al")
    assert "keep must be auto, all, none, got 'al'; did you mean 'all'" in str(done.exception)
    done = exported(run_folder, tmp_path / "net.onnx", "all")
    assert "onnx takes none of Taut's operations" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_bench_tells_every_engine(run_folder):
    done = run(
        "bench",
        run_folder / "net.taut",
        "--engines",
        "eager,packed",
        "--seconds",
        "0.02",
        "--threads",
        "1",
    )
    assert done.exit_code == 0, done.output
    assert "eager" in done.output
    assert "packed" in done.output


def test_a_file_outside_a_run_needs_its_task(run_folder, tmp_path):
    (tmp_path / "net.taut").write_bytes((run_folder / "net.taut").read_bytes())
    for command in (["export", "--to", "onnx"], ["bench"]):
        done = run(command[0], tmp_path / "net.taut", *command[1:])
        assert isinstance(done.exception, taut.TautError)
        assert "must be named: --task task.py" in str(done.exception)


def test_a_damaged_taut_file(run_folder, tmp_path):
    damaged = bytearray((run_folder / "net.taut").read_bytes())
    damaged[-20] ^= 1
    (run_folder / "damaged.taut").write_bytes(damaged)
    done = run("export", run_folder / "damaged.taut", "--to", "onnx")
    assert "the checksum does not match" in str(done.exception)
    assert not (run_folder / "damaged.onnx").exists()


def test_inputs_that_cannot_be_read(run_folder, tmp_path):
    for name, content in (("x.npy", b"no numbers"), ("missing.npy", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        done = run("run", run_folder / "net.taut", tmp_path / name)
        assert "give an .npy file of numbers" in str(done.exception)
    np.save(tmp_path / "wide.npy", np.zeros((2, 65), np.float32))
    done = run("run", run_folder / "net.taut", tmp_path / "wide.npy")
    assert "does not run on the example: RuntimeError" in str(done.exception)
    assert run("export", run_folder / "net.taut").exit_code == 2  # neither --to nor --output


def test_a_network_that_is_not_there(tmp_path):
    np.save(tmp_path / "in.npy", np.zeros((1, 4), np.float32))
    for name in ("net.onnx", "net.taut"):
        done = run("run", tmp_path / name, tmp_path / "in.npy")
        assert f"there is no file {tmp_path / name}" in str(done.exception)


def test_compress_falls_back_and_passes_the_engine_on(run_folder, monkeypatch):
    seen = {}
    cli = importlib.import_module("taut.cli")

    def fallen(model, task, recipe, bound):
        seen["bound"] = (recipe, bound)
        return SimpleNamespace(recipe="quantize(only='*, !last')")

    def stop(model, task, wanted, **options):
        raise taut.TautError(f"{wanted} {options['engine']}")

    monkeypatch.setattr(cli, "fall_back", fallen)
    monkeypatch.setattr(cli, "compress", stop)
    task_file = run_folder.parent / "task.py"
    options = ["--recipe", "quantize()", "--fall-back", "score>=-1%", "--engine", "auto"]
    done = run("compress", task_file, *options)
    assert str(done.exception) == "quantize(only='*, !last') auto"
    assert seen["bound"] == ("quantize()", "score>=-1%")
