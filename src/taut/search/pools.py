"""Where the jobs of a search are done: in this process, or in several on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import torch

from taut.errors import RunError, SearchError
from taut.files import write_atomically
from taut.search.jobs import Job, Outcome, run_job, shipment
from taut.search.timing import Timed, from_json, timed_in_turn
from taut.trial import Ground

_TRIES = 2  # of a job whose process dies


class Pool(ABC):
    """Does jobs, as many at once as it has workers. A context: leaving it lets the workers go."""

    workers = 1

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Let a job be done."""

    @abstractmethod
    def next(self) -> tuple[Job, Outcome]:
        """The next job to be done, whichever it is."""

    def close(self) -> None:  # noqa: B027 - there may be no workers
        """Let the workers go."""

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """While this lasts the workers of this machine stand still, so that others can be timed."""
        yield

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Here(Pool):
    """In this process, one after the other."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.queue: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self.queue.append(job)

    def next(self) -> tuple[Job, Outcome]:
        job = self.queue.popleft()
        return job, run_job(self.ground, job)


class Processes(Pool):
    """In several processes of this machine, which share its threads. One that dies is replaced.

    Its job is tried once more, and is lost where that ends the same way.
    """

    def __init__(self, ground: Ground, workers: int) -> None:
        self.workers = workers
        self.folder = ground.folder
        self.shipped = ground.folder / ".shipment"
        write_atomically(self.shipped, shipment(ground))
        threads = max(1, torch.get_num_threads() // workers)
        self.servers = [Server(self.shipped, ground.folder, threads) for _ in range(workers)]
        self.queue: deque[Job] = deque()
        self.tries: dict[int, int] = {}
        self.busy: dict[Server, Job] = {}

    def submit(self, job: Job) -> None:
        self.queue.append(job)
        self.tries[job.number] = 0
        self._feed()

    def _feed(self) -> None:
        idle = [s for s in self.servers if s not in self.busy]
        while idle and self.queue:
            server, job = idle.pop(), self.queue.popleft()
            self.busy[server] = job
            self.tries[job.number] += 1
            server.ask({"job": asdict(job)})

    def next(self) -> tuple[Job, Outcome]:
        while True:
            with DefaultSelector() as ready:
                for server in self.busy:
                    ready.register(server.replies, EVENT_READ, server)
                server = ready.select()[0][0].data
            job = self.busy.pop(server)
            reply = server.reply()
            if reply is None:
                code = server.close(patience=30.0)
                self.servers[self.servers.index(server)] = server.again()
                if self.tries[job.number] < _TRIES:
                    self.queue.appendleft(job)
                    self._feed()
                    continue
                outcome = Outcome(error=f"its process ended {_TRIES} times: {_ending(code)}")
            else:
                outcome = Outcome.from_json(reply)
            self._feed()
            return job, outcome

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        for server in self.servers:
            server.halt(True)
        try:
            yield
        finally:
            for server in self.servers:
                server.halt(False)

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self.shipped.unlink(missing_ok=True)


class Server:
    """A process that answers what it is asked, one thing at a time."""

    def __init__(self, shipped: Path, folder: Path, threads: int) -> None:
        self.options = shipped, folder, threads
        with (folder / "workers.txt").open("a") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "taut.search.serve", *map(str, self.options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, bufsize=1,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None,
                start_new_session=True,  # Ctrl-C is the search's to handle
            )  # fmt: skip
        assert self.process.stdout is not None
        self.replies = self.process.stdout

    def again(self) -> Server:
        """Another one like it."""
        return Server(*self.options)

    def ask(self, what: dict[str, Any]) -> None:
        """Ask; the reply comes when it is ready."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died; its reply will say so
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def reply(self) -> Any:
        """What it answers; None where it died."""
        line = self.replies.readline()
        return json.loads(line) if line.endswith("\n") else None

    def halt(self, still: bool) -> None:
        """Let it stand still, with what it has started, or go on. Windows knows no such signal."""
        if hasattr(signal, "SIGSTOP"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGSTOP if still else signal.SIGCONT)

    def close(self, patience: float = 0.5) -> int:
        """End it, by force after so many seconds; returns its exit code, negative for a signal."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.replies.close()
        return code


class Clock:
    """A process that does nothing but take latencies; see `timed_in_turn`. A context.

    Where the network and its task cannot be sent to one, they are taken in this process.
    """

    def __init__(self, ground: Ground, *, threads: int = 0, engine: str = "pytorch") -> None:
        self.ground = ground
        self.options: dict[str, Any] = {"threads": threads, "engine": engine}
        self.server: Server | None = None
        self.shipped = ground.folder / f".timed.{os.getpid()}"
        try:
            write_atomically(self.shipped, shipment(ground))
        except SearchError:
            return
        self.server = Server(self.shipped, ground.folder, threads)

    def timed(self, files: Sequence[str], **more: Any) -> list[Timed]:
        """Latencies of the original and of these files. more: `rounds`, `batches`."""
        if self.server is None:
            return timed_in_turn(self.ground, files, **self.options, **more)
        self.server.ask({"time": {"files": list(files), **self.options, **more}})
        reply = self.server.reply()
        if reply is None:
            code = self.server.close(patience=30.0)
            raise RunError(
                f"the process that times the networks ended: {_ending(code)}; see "
                f"{self.ground.folder / 'workers.txt'}"
            )
        return from_json(reply)

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.close(patience=30.0)
        self.shipped.unlink(missing_ok=True)


def timed(
    ground: Ground, files: Sequence[str], *, threads: int = 0, engine: str = "pytorch",
    rounds: int = 5,
) -> list[Timed]:  # fmt: skip
    """Latencies in turn, in a process that does nothing else."""
    with Clock(ground, threads=threads, engine=engine) as clock:
        return clock.timed(files, rounds=rounds)


def _ending(code: int) -> str:
    """An exit code in words.

    >>> _ending(1), _ending(-9)
    ('exit code 1', 'signal 9, as when memory runs out')
    """
    if code == -9:
        return "signal 9, as when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
