"""The study of a search: an Optuna study that knows whose it is, and survives who writes it.

By default a journal file in the run's folder; by URL whatever Optuna's databases are (SQLite,
PostgreSQL, MySQL). Several processes may search one study: each takes trials of its own, and those
of a process that died, which the lock file shows that it held while it lived.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from taut.errors import RunError
from taut.files import check_asked
from taut.goal import Goal
from taut.types import Candidate, Direction, Measurement

try:
    import fcntl
except ImportError:  # Windows: who died cannot be told from who lives
    fcntl = None  # type: ignore[assignment]

_ASKED, _OWNER, _RECIPE = "taut: asked", "taut: owner", "taut: recipe"
_CANDIDATE, _HISTORY, _WHY, _BRACKET = (
    "taut: candidate", "taut: history", "taut: why", "taut: bracket",
)  # fmt: skip


class Study:
    """An Optuna study of recipes. Raises RunError where it is another's, or does not answer."""

    def __init__(
        self, folder: Path, name: str, asked: Mapping[str, Any], axes: Sequence[str],
        better: Direction, url: str | None = None, fresh: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.name, self.axes = folder, name, tuple(axes)
        self.url = url
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        up = [a == "score" and better == "higher" for a in axes]
        ways = [StudyDirection.MAXIMIZE if u else StudyDirection.MINIMIZE for u in up]
        self.optuna = self._opened(ways, asked if fresh else None)
        self._claim(asked)
        self.token = f"{socket.gethostname()} {folder.resolve()} {uuid.uuid4().hex}"
        self._held = self._own()
        self._locks = [self._held]

    # ---- opening ----------------------------------------------------------------------------

    def _opened(
        self, directions: list[StudyDirection], forget: Mapping[str, Any] | None
    ) -> optuna.Study:
        where = self.url or str(self.folder / "study.journal")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                storage = _database(self.url) if self.url else self._journal()
                if forget is not None:
                    with contextlib.suppress(KeyError):  # there is none yet
                        self._forget(optuna.load_study(study_name=self.name, storage=storage),
                                     forget)  # fmt: skip
                study = optuna.create_study(
                    storage=storage, study_name=self.name, load_if_exists=True,
                    directions=directions,
                )  # fmt: skip
        except RunError:
            raise
        except Exception as error:  # whatever a database's driver makes of itself
            raise RunError(
                f"the study at {_without_password(where)} does not answer: "
                f"{type(error).__name__}: {_without_password(_first_line(error))}; check "
                "--storage, like sqlite:///study.db or postgresql://user@host/name, and that its "
                "driver is installed"
            ) from error
        return study

    def _forget(self, old: optuna.Study, asked: Mapping[str, Any]) -> None:
        """Delete an earlier study of this task; another's stays, for a database may be shared."""
        whose = old.user_attrs.get(_ASKED, {}).get("task")
        if whose != asked.get("task") and old.get_trials(deepcopy=False):
            raise RunError(
                f"the study {self.name!r} is not of task {asked.get('task')!r} but of {whose!r}, "
                "so it is not deleted; choose another --study"
            )
        optuna.delete_study(study_name=self.name, storage=old._storage)

    def _journal(self) -> JournalStorage:
        path = self.folder / "study.journal"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileOpenLock(str(path), grace_period=15)
        lock.acquire()  # nobody is in the middle of a line then
        try:
            _mend(path)
        finally:
            lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))

    def _claim(self, asked: Mapping[str, Any]) -> None:
        """Note what is searched, or check that it is what the study was begun for."""
        found = self.optuna.user_attrs.get(_ASKED)
        if found is None:
            if self.optuna.get_trials(deepcopy=False):
                raise RunError(
                    f"the study {self.name!r} was not begun by taut search; choose another --study"
                )
            self.optuna.set_user_attr(_ASKED, dict(asked))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.optuna.set_metric_names(list(self.axes))
            return
        check_asked(f"the study {self.name!r}", found, asked, "search", "another folder or --study")

    def _own(self) -> IO[bytes]:
        folder = self.folder / "owners"
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / self.token.split()[-1]).open("wb")
        if fcntl is not None:
            fcntl.flock(held, fcntl.LOCK_EX)
        return held

    def close(self) -> None:
        """Let go of what this process held."""
        for held in self._locks:
            held.close()
        (self.folder / "owners" / self.token.split()[-1]).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time, of those that share the folder."""
        with (self.folder / f".{name}").open("wb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # ---- trials -----------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Those that were or are being tried, in order; not what was ruled out unseen."""
        return [t for t in self.optuna.get_trials(deepcopy=False) if _RECIPE in t.user_attrs]

    def ask(self, sampler: optuna.samplers.BaseSampler) -> Trial:
        """A new trial, as yet without values."""
        self.optuna.sampler = sampler
        trial = self.optuna.ask()
        trial.set_user_attr(_OWNER, self.token)
        return trial

    def accept(self, trial: Trial, recipe: str, bracket: Sequence[int] = ()) -> None:
        """Note what a trial will try."""
        if bracket:
            trial.set_user_attr(_BRACKET, list(bracket))
        trial.set_user_attr(_RECIPE, recipe)

    def rule_out(self, trial: Trial, why: str, excess: Mapping[str, float]) -> None:
        """End a trial that is not worth a training; samplers learn that it breaks the bounds."""
        trial.set_user_attr(_WHY, why)
        _constrain(trial, excess)
        self.optuna.tell(trial, state=TrialState.PRUNED)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Only one of the processes that share the folder counts and asks at a time."""
        with self._locked("study.asking"):
            yield

    def adopt(self) -> list[Trial]:
        """The trials of processes that died, which are this one's from now on, in order."""
        found = []
        with self.asking():  # a trial without an owner is asked for by nobody of this folder now
            for frozen in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                owner = str(frozen.user_attrs.get(_OWNER, ""))
                if not (self._died(owner) if owner else self.url is None):
                    continue
                trial = Trial(self.optuna, frozen._trial_id)
                trial.set_user_attr(_OWNER, self.token)
                if _RECIPE in frozen.user_attrs:
                    found.append(trial)
                else:  # it was being asked for
                    self.optuna.tell(trial, state=TrialState.FAIL)
        return found

    def _died(self, owner: str) -> bool:
        """Whether who wrote this is gone. Elsewhere than in this folder it cannot be told."""
        if owner == self.token:
            return False
        host_and_folder, _, name = owner.rpartition(" ")
        if host_and_folder != self.token.rpartition(" ")[0]:
            return False
        path = self.folder / "owners" / name
        if not path.is_file() or fcntl is None:
            return True
        held = path.open("wb")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            held.close()
            return False
        self._locks.append(held)
        path.unlink(missing_ok=True)
        return True

    def tell(
        self, trial: Trial, candidate: Candidate, history: Sequence[Mapping[str, Any]],
        values: Sequence[float], goal: Goal, original: Measurement,
    ) -> None:  # fmt: skip
        """End a trial by what it came to."""
        trial.set_user_attr(_CANDIDATE, json.dumps(candidate.to_json()))
        trial.set_user_attr(_HISTORY, json.dumps(list(history)))
        measured = candidate.measurement
        _constrain(trial, {b.axis: b.excess(measured, original) for b in goal.bounds})
        self.optuna.tell(trial, values=list(values))

    def fail(self, trial: Trial, why: str) -> None:
        """End a trial that came to nothing."""
        trial.set_user_attr(_WHY, why)
        self.optuna.tell(trial, state=TrialState.FAIL)


def _constrain(trial: Trial, excess: Mapping[str, float]) -> None:
    told = trial.constraints  # by a process that was killed as it told; Optuna lets them stand
    for axis, over in excess.items():
        if axis not in told:
            trial.set_constraint(axis, over)


def recipe_of(trial: FrozenTrial | Trial) -> str:
    """What a trial tries."""
    return str(trial.user_attrs[_RECIPE])


def bracket_of(trial: FrozenTrial | Trial) -> list[int]:
    """The bracket that a trial belongs to; empty where there are none."""
    return list(trial.user_attrs.get(_BRACKET, []))


def why_of(trial: FrozenTrial) -> str:
    """Why a trial came to nothing."""
    return str(trial.user_attrs.get(_WHY, ""))


def candidate_of(trial: FrozenTrial) -> Candidate | None:
    """What a trial came to, if to anything."""
    text = trial.user_attrs.get(_CANDIDATE)
    return None if text is None else Candidate.from_json(json.loads(text))


def history_of(trial: FrozenTrial) -> list[dict[str, Any]]:
    """The epochs of a trial's recoveries."""
    return list(json.loads(trial.user_attrs.get(_HISTORY, "[]")))


def _database(url: str) -> optuna.storages.BaseStorage:
    if url.startswith(("postgresql", "mysql")):
        waits = {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
        return optuna.storages.RDBStorage(url, engine_kwargs=waits)
    return optuna.storages.get_storage(url)


def _mend(path: Path) -> None:
    """Cut off a last line that a killed process did not finish."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**20))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _without_password(text: str) -> str:
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)
