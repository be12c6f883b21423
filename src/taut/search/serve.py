"""A process that does jobs for a search: `python -m taut.search.serve SHIPMENT FOLDER THREADS`.

It reads one JSON object a line from its standard input, does what it says, and writes one line
back; whatever the jobs print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from taut.search.jobs import Job, run_job, unpacked
from taut.search.timing import timed_in_turn, to_json
from taut.trial import Ground
from taut.watch import logged


def answer(ground: Ground, asked: dict[str, Any]) -> Any:
    """What is written back for what was asked: a job, or files to time."""
    if "job" in asked:
        return run_job(ground, Job.from_json(asked["job"])).to_json()
    return to_json(timed_in_turn(ground, **asked["time"]))


def serve(shipment: Path, folder: Path, threads: int) -> None:
    """Answer until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if threads:
        torch.set_num_threads(threads)
    ground = unpacked(shipment.read_bytes(), folder)
    with logged(folder, ground.watch):
        for line in sys.stdin:
            replies.write(json.dumps(answer(ground, json.loads(line))) + "\n")
            replies.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
