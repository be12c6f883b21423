"""One job of a search: a recipe to try, on whatever process or machine, and what it came to.

A job's outcome lies in its folder, so that a job that was done is never done again; one that was
killed goes on from the checkpoint there.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cloudpickle

from taut.errors import SearchError, TautError
from taut.files import read_json, write_atomically
from taut.recipe import Recipe
from taut.statistics import Curve
from taut.trial import Ground, Trial
from taut.types import Candidate
from taut.watch import Watch

_log = logging.getLogger("taut")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe to try. folder: of its files. number: of its trial.

    curves: sensitivities that are known by now, which no process need scan again.
    """

    number: int
    recipe: str
    folder: str
    curves: Mapping[str, Curve] = field(default_factory=dict)

    def done(self) -> Outcome | None:
        """The outcome, where the folder holds it already."""
        known = self.outcomes().get(self.recipe)
        whole = known is not None and (Path(self.folder) / "net.taut").is_file()
        return Outcome.from_json(known) if known is not None and whole else None

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """What is known of this trial, by recipe: in a tournament its recipe has grown."""
        path = Path(self.folder) / "trial.json"
        return dict(read_json(path)["outcomes"]) if path.is_file() else {}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        """What `asdict` and JSON made of one."""
        curves = {
            name: Curve(
                sparsities=tuple(curve["sparsities"]), losses=tuple(curve["losses"]),
                baseline=curve["baseline"],
            )
            for name, curve in data["curves"].items()
        }  # fmt: skip
        return cls(**{**data, "curves": curves})


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job came to: a candidate with the epochs of its training, or an error in words.

    lost: whether the process that had it is gone, so that it may be tried again.
    """

    candidate: Candidate | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    error: str = ""
    lost: bool = False

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {**data, "candidate": self.candidate.to_json() if self.candidate else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        found = data["candidate"]
        candidate = Candidate.from_json(found) if found else None
        return cls(**{**data, "candidate": candidate, "history": tuple(data["history"])})


def run_job(ground: Ground, job: Job) -> Outcome:
    """Do a job, or find it done. What goes wrong in it is its outcome, and not an error."""
    try:
        if (found := job.done()) is not None:
            return found
        ground.curves.update(job.curves)
        trial = Trial(ground, Recipe.parse(job.recipe), Path(job.folder))
        candidate = trial.go()
    except Exception as error:  # whatever a network makes of a recipe; the search goes on
        _log.warning("trial %d: %s: %s", job.number, type(error).__name__, error, exc_info=True)
        said = (str(error).strip().splitlines() or [""])[0]
        known = isinstance(error, TautError)  # whose message says it all
        return Outcome(error=said if known else f"{type(error).__name__}: {said}")
    outcome = Outcome(candidate=candidate, history=tuple(vars(r) for r in trial.history))
    data = {"outcomes": {**job.outcomes(), job.recipe: outcome.to_json()}}
    write_atomically(Path(job.folder) / "trial.json", json.dumps(data, indent=1).encode())
    return outcome


def shipment(ground: Ground) -> bytes:
    """The ground as bytes for another process: its network, its task and where imports look.

    What a task's file defines travels by value. Raises SearchError for what cannot travel.
    """
    named = [m for n, m in sys.modules.items() if n.startswith("taut_task_")]
    quiet = replace(ground, watch=Watch())
    for module in named:
        cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps((list(sys.path), cloudpickle.dumps(quiet))))
    except Exception as error:  # whatever an object makes of being pickled
        raise SearchError(
            f"search: the network or its task cannot be sent to other processes "
            f"({type(error).__name__}: {error}); make its data and functions picklable, or search "
            "with workers=1"
        ) from error
    finally:
        for module in named:
            cloudpickle.unregister_pickle_by_value(module)


def unpacked(content: bytes, folder: Path | None = None) -> Ground:
    """A ground that was shipped; folder: where it is now."""
    paths, inner = cloudpickle.loads(content)
    sys.path += [p for p in paths if p not in sys.path]  # before anything is looked up there
    ground = cloudpickle.loads(inner)
    assert isinstance(ground, Ground)
    return ground if folder is None else replace(ground, folder=folder)
