"""What the documents say is run: the worked technique, the README's recipes, goals and code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_net

import taut
from taut.cli import app
from taut.goal import is_goal
from taut.technique import techniques

ROOT = Path(__file__).parent.parent


def blocks(document, language):
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_worked_technique_keeps_the_contract(tmp_path):
    technique, proof = blocks("docs/add_a_technique.md", "python")
    file = tmp_path / "test_keep_signs.py"
    file.write_text(f"{technique}\n\nfrom taut.testing import RecodingContract\n\n\n{proof}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


def test_the_readmes_commands_parse():
    (shell,) = blocks("README.md", "sh")
    commands = set(re.findall(r"^taut (\w+)", shell, flags=re.MULTILINE))
    assert commands == {c.name for c in app.registered_commands}
    quoted = re.findall(r'--(recipe|goal) "(.*?)"', shell)
    assert {kind for kind, _ in quoted} == {"recipe", "goal"}
    for kind, text in quoted:
        assert is_goal(text) == (kind == "goal")
        assert taut.Goal.parse(text) if kind == "goal" else taut.Recipe.parse(text)


def test_the_readmes_python_runs(tmp_path, monkeypatch, trained, task, capsys):
    monkeypatch.chdir(tmp_path)
    _, compress, own_loop, tune = blocks("README.md", "python")
    names = {
        "taut": taut,
        "net": trained,
        "train": task._data["train"],
        "test": task._data["test"],
        "MyNet": small_net,
        "task": task,
    }
    exec(compress.replace("bytes<=3%, score>=-0.2%", "share_values(bits=4)"), names)
    assert names["result"].ratio > 6
    assert torch.equal(names["net"][0].bias, names["result"].model[0].bias)
    exec(tune, {**names, "example": torch.zeros(1, 64)})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "3", "5"]
    names["net"] = small_net()
    names["optimizer"] = torch.optim.SGD(names["net"].parameters(), lr=0.1)
    exec(own_loop.replace("...", "for _ in range(1000): optimizer.step()"), names)
    assert (tmp_path / "net.taut").stat().st_size < 6000


def test_the_page_on_engines_runs(tmp_path, monkeypatch, trained, task):
    monkeypatch.chdir(tmp_path)
    taut.pack(taut.apply(trained, "quantize(activations=8)", task), "net.taut")
    code, _, loading = blocks("docs/engines.md", "python")
    compile(loading, "docs/engines.md", "exec")  # test_openvino.py loads a library like this
    names = {"taut": taut, "MyNet": small_net, "task": task, "example": task.example(4)[0][0]}
    exec(code, names)
    assert names["exported"].agreement.holds
    assert names["best"].engine in ("eager", "onnx")
    assert (names["answers"] - names["packed"](names["example"])).abs().max() < 1
    for shell in blocks("docs/engines.md", "sh"):
        for command in re.findall(r"^taut (\w+)", shell, flags=re.MULTILINE):
            assert command in {c.name for c in app.registered_commands}


def test_the_format_document_names_every_format_and_nothing_else():
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    from taut.packed import FORMATS

    named = set(re.findall(r"`([a-z_]+\.v\d+)`", text)) - {"sparse.v2"}
    shipped = {n for n, c in FORMATS.items() if c.__module__.startswith("taut.")}
    assert named == shipped


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "docs/add_a_technique.md", "docs/engines.md"]
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


def test_the_readmes_figures_are_those_of_the_records():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import tables
    finally:
        sys.path.pop(0)
    for path, headlines in tables.DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        assert tables.write(text, headlines) == text
        assert "LeNet-5, bytes" in text


def site():
    path = ROOT / "docs" / "technique_pages.py"
    spec = importlib.util.spec_from_file_location("technique_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_technique_has_a_page_with_all_its_options():
    pages = site().pages()
    for name, cls in techniques().items():
        page = pages[f"techniques/{name}.md"]
        assert all(f"| `{f.name}` |" in page for f in cls.options())
        assert f"]({name}.md)" in pages["techniques/index.md"]
    assert "LeNet-5, 4 bits" in pages["techniques/quantize.md"]


def test_the_recipes_that_the_choices_name_parse():
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").partition("<!--")[0]
    recipes = [r.replace("…", "2500") for r in re.findall(r"`(\w+\(.*?\))`", text)]
    assert len(recipes) >= 10
    assert all(taut.Recipe.parse(r).steps for r in recipes)


def test_the_quick_start_runs(tmp_path, monkeypatch, trained, task):
    monkeypatch.chdir(tmp_path)
    names = {"net": trained, "train": task._data["train"], "test": task._data["test"],
             "build": small_net}  # fmt: skip
    exec(blocks("docs/index.md", "python")[1], names)
    assert torch.equal(names["again"][0].bias, names["result"].model[0].bias)


def test_the_search_document_runs(tmp_path, monkeypatch, trained, task):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("docs/search.md", "python")
    names = {"net": trained, "task": task}
    exec(code, names)
    assert names["small"] in names["result"].frontier
    assert len(names["rows"]) == len(names["result"].frontier)
    commands = re.findall(r"^taut (\w+)", "".join(blocks("docs/search.md", "sh")), re.MULTILINE)
    assert commands == ["search", "compare"]


def test_the_code_about_sequences_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks("docs/sequences.md", "python"):
        exec(code, names)
    assert (tmp_path / "reader.taut").is_file()
    assert len(names["said"]) == 5


def test_the_recipes_about_sequences_parse():
    text = (ROOT / "docs" / "sequences.md").read_text(encoding="utf-8")
    recipes = re.findall(r"^\| `(\w+\(.*?\))`", text, flags=re.MULTILINE)
    assert len(recipes) == 5
    assert all(taut.Recipe.parse(r).steps for r in recipes)
