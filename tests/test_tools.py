"""What tries the wheel and the versions: what it looks for, leaves out and blames."""

import re
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
try:
    import versions
    import wheel
finally:
    sys.path.pop(0)

HERE = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture
def some_wheel(tmp_path):
    path = tmp_path / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(
            "some-1.dist-info/METADATA",
            "Name: some\nRequires-Dist: typer>=0.15\nRequires-Dist: pytest ; extra == 'dev'\n",
        )
    return path


def test_a_wheel_needs_what_it_asks_for_and_what_that_asks_for(some_wheel):
    found = wheel.needed(some_wheel)
    assert {"typer", "rich", "pygments"} <= found
    assert not {"pytest", "torch"} & found
    assert not wheel.has_kernels(some_wheel)


def test_an_environment_has_that_and_nothing_else(some_wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(wheel, "run", lambda *_, **__: None)  # what would install the wheel
    python = wheel.environment(tmp_path / "new", some_wheel)
    there = "import typer, rich; print(typer.__file__)"
    assert str(tmp_path / "new") in versions.call(python, "-I", "-c", there)
    with pytest.raises(versions.FailedError, match="No module named 'torch'"):
        versions.call(python, "-I", "-c", "import torch")


def test_what_fails_ends_it_with_its_output(capsys):
    wheel.run(sys.executable, "-c", "print('well')")
    assert capsys.readouterr().out == "well\n"
    with pytest.raises(SystemExit, match=r"failed:\n(?s:.*)ZeroDivisionError"):
        wheel.run(sys.executable, "-c", "1 / 0")


def test_a_wheel_without_kernels_is_refused_where_there_is_a_compiler(
    some_wheel, tmp_path, monkeypatch
):
    monkeypatch.setattr(wheel, "run", lambda *_, **__: None)
    some_wheel.rename(tmp_path / "taut-1-py3-none-any.whl")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert wheel.built(tmp_path).name == "taut-1-py3-none-any.whl"
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(SystemExit, match="has no kernels, though there is a compiler"):
        wheel.built(tmp_path)


def test_the_lowest_the_pinned_and_the_newest_pytorch(monkeypatch):
    monkeypatch.setattr(versions, "pip", lambda *_: "WARNING\ntorch (9.1.2)\nAvailable: 9.1.2\n")
    lowest, pinned, newest = versions.torches()
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={lowest.removesuffix(".0")}"' in project
    assert f"torch=={pinned}\n" in (ROOT / "constraints.txt").read_text()
    assert newest == "9.1.2"


def test_pythons_are_those_of_the_project():
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'requires-python = ">=(.*)"', project)[1] == versions.PYTHONS[0]


def test_a_python_is_found_by_its_version():
    path = versions.interpreter(HERE)
    assert versions.call(path, "-c", "import sys; print(sys.version_info[1])").strip() in HERE
    assert versions.interpreter("3.99") is None


@pytest.mark.parametrize(
    ("python", "size", "told", "failed"),
    [
        ("3.99", 1, "left out: no such Python is here", False),
        (HERE, 4128, "left out: resolved, but 4,128 MB to download", False),
        (HERE, None, "no matching distribution", True),
    ],
)
def test_what_cannot_be_tried_says_why(python, size, told, failed, monkeypatch):
    def megabytes(*_):
        if size is None:
            raise versions.FailedError("no matching distribution")
        return size

    monkeypatch.setattr(versions, "megabytes", megabytes)
    row = versions.tried(python, "2.10.0", Path("x.whl"), 400)
    assert (row.told, row.failed) == (told, failed)


def test_every_python_here_reads_all_sources():
    rows = [r for p in versions.PYTHONS for r in versions.reads(p)]
    assert HERE in {r.python for r in rows}
    assert not [r for r in rows if r.failed]


def test_the_tests_that_are_run_on_every_version_are_there():
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in versions.TESTS)
