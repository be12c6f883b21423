"""A process that runs one exported file and times it, as often as it is told to.

    python -m taut.export.worker <way> <file> <inputs.pt> <threads>

On standard input it takes a number of seconds a line; it answers each by one line, a JSON list of
the milliseconds that its runs took. The first line, before any, is the answers' file.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch

from taut.export.targets import TARGETS, Runner
from taut.timing import repeated

FEWEST = 3  # runs a turn
_WARM = 5


def runner(way: str, path: Path, threads: int) -> Runner:
    """What runs a file this way: an engine's name, or eager, compile, packed: PyTorch's file."""
    if way == "compile":
        return TARGETS["torch"].module().opened(path, threads, compiled=True)  # type: ignore[no-any-return]
    name = way.partition("+")[0] if way.startswith(("onnx", "openvino")) else "torch"
    return TARGETS[name].module().opened(path, threads, "auto")  # type: ignore[no-any-return]


def main() -> None:
    """Answer until standard input ends."""
    way, file, inputs, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tensors = torch.load(inputs, weights_only=True)
    run = runner(way, Path(file), int(threads))
    answers = Path(inputs).with_name(f"answers-{way}.pt")
    torch.save(run(tensors), answers)
    for _ in range(_WARM):
        run(tensors)
    sys.stdout.write(f"{answers}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        times = repeated(partial(run, tensors), float(line), FEWEST)
        sys.stdout.write(json.dumps(times) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
