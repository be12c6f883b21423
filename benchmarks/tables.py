"""Writes the tables of README.md and docs/results.md from the records in benchmarks/results/.

    python benchmarks/papers/deep_compression.py --json benchmarks/results/deep_compression.json
    python benchmarks/tables.py

No figure in them is typed by hand; a test holds documents and records together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HEADLINES = ("records", "deep_compression", "kernels")
DOCUMENTS = {ROOT / "README.md": True, ROOT / "docs" / "results.md": False}
"""Which documents have tables, and whether only the headlines."""
MARKS = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.DOTALL)


def rows(record: dict[str, Any]) -> list[str]:
    """The rows of one record: figure, the paper's, what is asked, ours."""
    lines = []
    for f in record["figures"]:
        asked = f"{'≤' if f['at_most'] else '≥'} {_number(f['asked'])}{f['unit']}"
        ours = f"**{_number(f['ours'])}{f['unit']}**{'' if f['holds'] else ' (falls short)'}"
        lines.append(f"| {f['name']} | {f['paper']} | {asked} | {ours} |")
    return lines


def table(records: dict[str, dict[str, Any]]) -> str:
    """The section for some records, by the name of their file."""
    parts = []
    for record in records.values():
        machine, versions = record["machine"], record["versions"]
        parts += [
            f"{record['title']}; `python {record['script']}` (seed {record['seed']}, "
            f"{machine['processor']}, {machine['threads']} threads, PyTorch {versions['torch']}).",
            *(["Bytes are those of the written file."] if record["beside"] == "paper" else []),
            "",
            f"| figure | {record['beside']} | asked | Taut |",
            "|---|---|---|---|",
            *rows(record),
            "",
        ]
    return "\n".join(parts)


def write(document: str, headlines: bool = False) -> str:
    """A document's text with its tables made anew: of all records, or of the headlines alone."""
    found = sorted(RESULTS.glob("*.json"))
    names = HEADLINES if headlines else [p.stem for p in found]
    records = {n: json.loads((RESULTS / f"{n}.json").read_text(encoding="utf-8")) for n in names}
    return MARKS.sub(lambda m: f"{m[1]}\n{table(records)}\n{m[2]}", document)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    for path, headlines in DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        path.write_text(write(text, headlines), encoding="utf-8")
