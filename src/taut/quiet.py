"""Silence, while something talks that nobody asked."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hushed(level: int = logging.CRITICAL) -> Iterator[None]:
    """Nothing of this level or below is logged in the meantime, by anyone."""
    before = logging.root.manager.disable
    logging.disable(max(level, before))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing is logged, warned of or printed in the meantime; an error has to say it all."""
    with hushed(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield
