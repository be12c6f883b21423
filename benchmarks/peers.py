"""Taut beside other libraries: engines and int8, pruning, file sizes, sparse layers, searches.

    pip install taut[peers]
    python benchmarks/peers.py --only int8 --json benchmarks/results/peers.json

Each section is a file in benchmarks/against/, with a NAME, which begins the names of its rows, and
`figures(options)`. All that is compared runs in one process tree on the same threads, by turns; a
peer that is not installed, or that fails on a case, stands in that row with its error.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))
from harness import Figure, run

SECTIONS = ("int8", "extension", "pruning", "size", "sparse", "searching")


def sections() -> list[ModuleType]:
    """The sections whose files are there, in order."""
    here = Path(__file__).parent / "against"
    found = [s for s in SECTIONS if (here / f"{s}.py").is_file()]
    return [importlib.import_module(f"against.{s}") for s in found]


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """The rows of all sections, or of those that --only names: by section, or by row."""
    named = [s for s in sections() if s.NAME in options.only] or sections()
    return (f for s in named for f in s.figures(options))


if __name__ == "__main__":
    run("Taut and other libraries", measure, beside="others")
