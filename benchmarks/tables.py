"""Writes the tables of README.md and docs/results.md from the records in benchmarks/results/.

    python benchmarks/papers/deep_compression.py --json benchmarks/results/deep_compression.json
    python benchmarks/tables.py

No figure in them is typed by hand; a test holds documents and records together.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEADLINES = ("records", "deep_compression", "kernels")
DOCS = ROOT / "docs"
DOCUMENTS = {ROOT / "README.md": True, DOCS / "results.md": False, DOCS / "choosing.md": True}
"""Which documents have tables, and whether only the headlines."""
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)
CHOICES = re.compile(r"(<!-- choices -->\n).*?(<!-- /choices -->)", re.DOTALL)
STEP = re.compile(r"(\w+)\(")
TRAINING = {"recover", "training", "aim", "schedule", "regularise", "distillation"}


def rows(record: dict[str, Any]) -> list[str]:
    """The rows of one record: figure, the paper's, what is asked, ours.

    A row that was measured with something else than most of them says so after its name.
    """
    lines, usual = [], _usual(record)
    for f in record["figures"]:
        asked = f"{'≤' if f['at_most'] else '≥'} {_number(f['asked'])}{f['unit']}"
        ours = f"**{_number(f['ours'])}{f['unit']}**{'' if f['holds'] else ' (falls short)'}"
        other = [part for part in _with(f["measured"]) if part not in usual]
        name = f["name"] + (f" ({', '.join(other)})" if other else "")
        lines.append(f"| {name} | {f['paper']} | {asked} | {ours} |")
    return lines


def table(records: dict[str, dict[str, Any]]) -> str:
    """The section for some records, by the name of their file."""
    parts = []
    for record in records.values():
        parts += [
            f"{record['title']}; `python {record['script']}` ({', '.join(_usual(record))}).",
            *(["Bytes are those of the written file."] if record["beside"] == "paper" else []),
            "",
            f"| figure | {record['beside']} | asked | Taut |",
            "|---|---|---|---|",
            *rows(record),
            "",
        ]
    return "\n".join(parts)


def choices(records: dict[str, dict[str, Any]]) -> str:
    """For each chain of techniques that stands in the records, the figures it reached."""
    chains: dict[str, list[str]] = {}
    for record in records.values():
        for f in record["figures"]:
            names = [n for n in STEP.findall(f["command"]) if n not in TRAINING]
            if names and f["holds"]:
                ours = f"{f['name']}: **{_number(f['ours'])}{f['unit']}**"
                chains.setdefault(" > ".join(dict.fromkeys(names)), []).append(ours)
    lines = ["| techniques | measured |", "|---|---|"]
    lines += [f"| {chain} | {'; '.join(found[:4])} |" for chain, found in sorted(chains.items())]
    return "\n".join([*lines, ""])


def _with(measured: dict[str, Any]) -> tuple[str, ...]:
    """What a row was measured with."""
    machine, torch = measured["machine"], measured["versions"]["torch"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return f"seed {measured['seed']}", machine["processor"], threads, f"PyTorch {torch}"


def _usual(record: dict[str, Any]) -> tuple[str, ...]:
    """What most rows of a record were measured with."""
    return Counter(_with(f["measured"]) for f in record["figures"]).most_common(1)[0][0]


def write(document: str, headlines: bool = False) -> str:
    """A document's text with its tables made anew: of all records, or of the headlines alone."""
    found = sorted(RESULTS.glob("*.json"))
    names = HEADLINES if headlines else [p.stem for p in found]
    records = {n: json.loads((RESULTS / f"{n}.json").read_text(encoding="utf-8")) for n in names}
    every = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in found}
    document = CHOICES.sub(lambda m: f"{m[1]}\n{choices(every)}\n{m[2]}", document)
    return MARKS.sub(lambda m: f"{m[1]}\n{table(records)}\n{m[2]}", document)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    for path, headlines in DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        path.write_text(write(text, headlines), encoding="utf-8")
