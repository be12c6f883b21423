"""What a search is asked for: its options, checked when they are given."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from typing import Any

from taut.errors import SearchError, did_you_mean
from taut.frontier import check_axis
from taut.pack import check_precision
from taut.recipe import Recipe
from taut.search.halving import KINDS
from taut.search.samplers import check_sampler
from taut.search.timing import engine_named
from taut.technique import Setting


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a search goes about it; see `taut.search`. Raises a TautError for what there is not."""

    minimize: str = "bytes"
    trials: int = 60
    epochs: int = 5
    sampler: str = "tpe"
    halving: str = "none"
    techniques: str = "*"
    settings: str = ""
    batch: int = 0
    workers: int = 1
    ray: str | None = None
    storage: str | None = None
    study: str = ""
    seed: int = 0
    precision: str = "auto"
    engine: str = "pytorch"
    threads: int = 0

    def __post_init__(self) -> None:
        check_axis(self.minimize)
        check_sampler(self.sampler)
        check_precision(self.precision)
        object.__setattr__(self, "engine", engine_named(self.engine))
        if self.halving not in KINDS:
            near = did_you_mean(self.halving, KINDS)
            raise SearchError(f"search: no tournament is named {self.halving!r}{near}")
        for name, low in (("trials", 1), ("epochs", 1), ("workers", 1), ("batch", 0),
                          ("threads", 0)):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise SearchError(f"search: {name} must be at least {low}, got {value!r}")
        if self.ray is not None and self.workers > 1:
            raise SearchError(
                f"search: workers={self.workers} are processes of this machine and ray="
                f"{self.ray!r} brings its own; give one of the two"
            )
        self.before()

    def before(self) -> tuple[Setting, ...]:
        """The settings that every recipe starts by."""
        return settings_of(self.settings)

    def asked(self) -> dict[str, Any]:
        """What makes two searches the same one; the others may change when it goes on."""
        kept = ("minimize", "epochs", "halving", "techniques", "settings", "seed", "precision")
        return {name: getattr(self, name) for name in kept}

    def in_flight(self) -> int:
        """How many trials are under way at most: each is proposed without these others' results."""
        return self.batch or (1 if self.workers == 1 and self.ray is None else 2 * self.workers)

    def command(self, source: str, goal: str) -> str:
        """The command line that asks for the same."""
        words = ["taut", "search", source, "--goal", goal]
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                words += [f"--{f.name}", str(value)]
        return " ".join(map(shlex.quote, words))


def settings_of(text: str) -> tuple[Setting, ...]:
    """The settings that a text names, in a recipe's form. Raises SearchError for other steps."""
    steps = Recipe.parse(text).steps if text else ()
    found = tuple(s for s in steps if isinstance(s, Setting))
    if len(found) < len(steps):
        raise SearchError(
            "search: settings are steps that change how recoveries train, like "
            f"training(precision='bfloat16'), got {text!r}"
        )
    return found
