"""Processes that time one file each, by turns: who gives the turns (worker.py takes them)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from taut.errors import ExportError


class Worker:
    """A process that answers each number of seconds by the milliseconds of its runs in them.

    Its first line, before any turn, says that it is ready. log: the file of what it complains of.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name, self.log = name, log
        with log.open("w") as said:
            self.process = subprocess.Popen(
                [*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip

    def line(self) -> str | None:
        """Its next line; None where it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip() or None

    def go(self, seconds: float) -> list[float]:
        """The milliseconds of its runs in a turn. Raises ExportError where it has ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: so says the line that is missing
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        if (line := self.line()) is None:
            raise ExportError(f"{self.name} ended as it was timed: {self.complaint()}")
        times: list[float] = json.loads(line)
        return times

    def complaint(self) -> str:
        """The last that it said before it ended."""
        self.process.wait()
        return (self.log.read_text().strip().splitlines() or ["no word"])[-1][:300]

    def stop(self) -> None:
        """Let it end."""
        self.process.communicate()
