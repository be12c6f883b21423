"""What a run tells while it goes on: to whoever watches, and to the log in its folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taut.processes import is_main
from taut.types import Candidate, EpochRecord

_log = logging.getLogger("taut")


class Watch:
    """What a run tells while it goes on. Override what you want to show.

    Of several processes the main one tells.
    """

    def say(self, text: str) -> None:
        """One line about what happens next."""

    def on_batch(self, epoch: int, epochs: int, batch: int, batches: int) -> None:
        """A batch of a recovery is done."""

    def on_epoch(self, record: EpochRecord) -> None:
        """An epoch of a recovery is done."""

    def on_trial(self, candidate: Candidate | None, done: int, trials: int) -> None:
        """A trial of a search is done; None where it came to nothing."""


class _Shown(logging.Handler):
    """Passes warnings on to whoever watches."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(logging.WARNING)
        self.watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        self.watch.say(record.getMessage())


@contextmanager
def logged(folder: Path, watch: Watch) -> Iterator[None]:
    """Everything logged under `taut` goes to log.txt of the run folder too, warnings to the watch.

    Of several processes the main one writes.
    """
    if not is_main():
        yield
        return
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    shown, level = _Shown(watch), _log.level
    _log.addHandler(handler)
    _log.addHandler(shown)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.removeHandler(shown)
        _log.setLevel(level)
        handler.close()
