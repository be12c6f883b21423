"""The site's page of each technique: its docstrings, its options, and what was measured of it.

mkdocs calls `on_config` and `on_files`; nothing is written into docs/. `pages` is all there is to
test: what stands on a page comes from the code and from the records in benchmarks/results/.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.recoding import Recoding
from taut.technique import Technique, interval, techniques

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FAMILIES = {
    True: "They change how a weight is written; the network keeps its shape. They stack.",
    False: "They change the structure, and leave ordinary, smaller layers; first in a recipe.",
}


def pages() -> dict[str, str]:
    """The text of every page, by its path below docs/."""
    found = {f"techniques/{name}.md": page(cls) for name, cls in sorted(techniques().items())}
    return {"techniques/index.md": overview(), **found}


def page(cls: type[Technique]) -> str:
    """What it does, how it is computed, its options, its figures."""
    parts = [
        f"# {cls.name}",
        inspect.getdoc(cls) or "",
        "## How it works",
        inspect.getdoc(importlib.import_module(cls.__module__)) or "",
        "## Options",
        options(cls),
    ]
    rows = figures(cls.name)
    if rows:
        head = "| figure | beside | Taut | how |\n|---|---|---|---|"
        parts += ["## Measured", "\n".join([head, *rows]), "All of them: [results](../results.md)."]
    return "\n\n".join(parts) + "\n"


def options(cls: type[Technique]) -> str:
    """A table of them, as `taut techniques` prints it."""
    lines = ["| option | default | range | meaning |", "|---|---|---|---|"]
    for f in cls.options():
        rule = f.metadata
        limited = any(rule[k] is not None for k in ("low", "high", "below"))
        span = ", ".join(rule["choices"]) or (interval(rule) if limited else "")
        unit = f" {rule['unit']}" if rule["unit"] else ""
        cells = (f"`{f.name}`", f"`{f.default!r}`", f"{span}{unit}", rule["help"])
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def figures(name: str) -> list[str]:
    """The rows of all records whose recipe has this technique."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        for f in json.loads(path.read_text(encoding="utf-8"))["figures"]:
            if f"{name}(" in f["command"]:
                short = "" if f["holds"] else " (falls short)"
                ours = f"**{f['ours']:.4g}{f['unit']}**{short}"
                rows.append(f"| {f['name']} | {f['paper']} | {ours} | `{f['command']}` |")
    return rows


def overview() -> str:
    """All techniques in two tables, with their first sentences."""
    parts = ["# Techniques"]
    for recodes, said in FAMILIES.items():
        parts += [f"## {'Recoding' if recodes else 'Reshaping, and what prepares'}", said]
        lines = ["| technique | |", "|---|---|"]
        for name, cls in sorted(techniques().items()):
            if issubclass(cls, Recoding) == recodes:
                first = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
                lines.append(f"| [{name}]({name}.md) | {first} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages below "Techniques"."""
    nav: list[dict[str, Any]] = config.nav or []
    for entry in nav:
        if "Techniques" in entry:
            entry["Techniques"] = list(pages())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
