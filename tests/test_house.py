"""The house rules of docs and DESIGN: who imports whom, how long a file is, what is public."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import taut
from taut import techniques
from taut.technique import techniques as registered

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "taut"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted(
    p
    for folder in ("src", "tests", "benchmarks", "examples", "tools")
    for p in (ROOT / folder).rglob("*.py")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FLOORS = (
    {"errors", "types", "machine", "attention", "quiet"},
    {"caches"},
    {
        "files",
        "coding",
        "kernels",
        "modules",
        "full_lengths",
        "norm_readers",
        "processes",
        "zoo",
        "distances",
        "watched",
        "products",
        "pattern",
        "clusters",
        "ranges",
        "joining",
        "matching",
    },
    {"data", "trace", "second_order", "packed", "edits"},
    {"statistics", "timing", "texts"},
    {"importance", "activations", "container", "groups", "ranks"},
    {"technique", "unit_scores", "decompositions"},
    {"conv_swaps"},
    {"recoding", "reshaping", "keep_search", "conv_fits", "rank_budget"},
    {
        "layers",
        "row_parts",
        "sparse_weight",
        "indexed_weight",
        "bit_weight",
        "pattern_weights",
        "structured_weight",
        "hashed_weight",
        "tied_weight",
    },
    {"mask", "selection", "dead_units", "shared_weight", "affine_weight", "unit_cuts"},
    {"fake_quantization", "norms", "engine_ops"},
    {"techniques"},
    {"task", "goal", "recipe", "tune", "regularise", "rounded_gradients", "aim", "dreams", "watch"},
    {"schedules", "training", "teacher_cache"},
    {"distillation"},
    {"objective"},
    {"recover", "measure", "pack", "frontier"},
    {"growth", "export"},
    {"plan", "testing", "angles", "fastest", "answers"},
    {"trial"},
    {"compress"},
    {"search", "frontier_data"},
    {"report_data", "doctor", "sensitivity", "fallback"},
    {"report", "terminal"},
    {"comparison", "engine_commands"},
    {"cli_search"},
    {"cli"},
)
"""From the ground up. A module imports from the floors below its own, and from nowhere else."""


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """The module, or the folder, that a file belongs to: `goal`, `techniques`."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted names that are imported anywhere in a tree, relative ones with their dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            deeper = base in {"taut", "."}
            yield from (f"{base}.{a.name}" if deeper else base for a in node.names)


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=short)


# Who imports whom


def test_every_module_has_its_floor() -> None:
    rooms = [r for floor in FLOORS for r in floor]
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == {room(p) for p in SOURCES} - {"__init__"}


@each(SOURCES)
def test_imports_go_down(path: Path) -> None:
    here = room(path)
    height = {r: i for i, floor in enumerate(FLOORS) for r in floor} | {"__init__": len(FLOORS)}
    for name in imports(parsed(path)):
        assert not name.startswith("."), f"{short(path)} imports {name}; write it out from taut"
        if name.split(".")[0] != "taut":
            continue
        assert name != "taut", f"{short(path)} imports the front door"
        other = name.split(".")[1]
        assert other in height, f"{short(path)} imports {name}, which has no floor"
        inside = other == here and path.parent != PACKAGE
        assert inside or height[other] < height[here], f"{short(path)} imports {other} upward"


@each(sorted((PACKAGE / "techniques").glob("[!_]*.py")))
def test_no_technique_imports_another(path: Path) -> None:
    assert not [n for n in imports(parsed(path)) if n.startswith("taut.techniques")]


OPTIONAL = {
    line.split(">")[0].split("[")[0].strip()
    for extra, lines in PROJECT.get("optional-dependencies", {}).items()
    if extra != "dev"
    for line in lines
}


@each(SOURCES)
def test_no_import_hides_in_a_function(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            hidden = {name.split(".")[0] for name in imports(node)}
            assert hidden <= OPTIONAL, f"{short(path)}:{node.lineno} imports {sorted(hidden)}"


@each(SOURCES)
def test_what_is_imported_is_a_dependency(path: Path) -> None:
    declared = {line.split(">")[0].strip() for line in PROJECT["dependencies"]}
    allowed = declared | OPTIONAL | {"taut"} | set(sys.stdlib_module_names)
    if room(path) == "testing":
        allowed |= {"pytest"}
    found = {name.split(".")[0] for name in imports(parsed(path))}
    assert found <= allowed, f"{short(path)} imports {sorted(found - allowed)}"


# How files read


@each(EVERYTHING)
def test_no_file_is_longer_than_500_lines(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 500, f"{short(path)} has {lines}"


@each(EVERYTHING)
def test_every_module_says_what_it_is(path: Path) -> None:
    said = ast.get_docstring(parsed(path)) or ""
    assert said.split("\n")[0].rstrip().endswith((".", "?", "!", ":")), short(path)


@each(SOURCES)
def test_everything_public_says_what_it_does(path: Path) -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in parsed(path).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{short(path)}:{node.lineno} {node.name}"


# The front door


def test_the_public_names_are_true_sorted_and_few() -> None:
    names = list(taut.__all__)
    assert names == sorted(set(names))
    assert len(names) <= 25
    assert all(hasattr(taut, n) for n in names)
    imported = {
        alias.asname or alias.name
        for node in parsed(PACKAGE / "__init__.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(names)


def test_the_techniques_are_those_that_are_registered() -> None:
    exported = {getattr(techniques, n) for n in techniques.__all__}
    ours = {c for c in registered().values() if c.__module__.startswith("taut.")}
    assert exported == ours
    assert techniques.__all__ == sorted(techniques.__all__)
    files = {p.stem for p in (PACKAGE / "techniques").glob("[!_]*.py")}
    assert {c.__module__ for c in ours} == {f"taut.techniques.{f}" for f in files}
    assert {c.name for c in ours} == files


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
