"""Writes the README's table of results from the records in benchmarks/results/.

    python benchmarks/papers/deep_compression.py --json benchmarks/results/deep_compression.json
    python benchmarks/tables.py

No figure in the README is typed by hand; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
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
    """The README's section for all records, by the name of their file."""
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


def write(readme: str) -> str:
    """The README's text with the table made anew."""
    found = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    records = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in found}
    return MARKS.sub(lambda m: f"{m[1]}\n{table(records)}\n{m[2]}", readme)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(write(path.read_text(encoding="utf-8")), encoding="utf-8")
