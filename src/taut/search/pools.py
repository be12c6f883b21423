"""Where the jobs of a search are done: in this process, or in several on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import asdict
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import torch

from taut.errors import RunError, SearchError
from taut.files import write_atomically
from taut.search.jobs import Job, Outcome, run_job, shipment
from taut.search.timing import from_json, timed_in_turn
from taut.trial import Ground
from taut.types import Choice, Latency

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


def timed(
    ground: Ground, files: list[str], *, threads: int = 0, engine: str = "torch", rounds: int = 5
) -> list[tuple[tuple[Latency, ...], tuple[Choice, ...]]]:
    """Latencies in turn, in a process that does nothing else (see `timed_in_turn`).

    Where the network and its task cannot be sent to one, they are taken in this process.
    """
    options: dict[str, Any] = {"threads": threads, "engine": engine, "rounds": rounds}
    shipped = ground.folder / ".timed"
    try:
        content = shipment(ground)
    except SearchError:
        return timed_in_turn(ground, files, **options)
    write_atomically(shipped, content)
    server = Server(shipped, ground.folder, threads)
    try:
        server.ask({"time": {"files": files, **options}})
        reply = server.reply()
    finally:
        code = server.close(patience=30.0)
        shipped.unlink(missing_ok=True)
    if reply is None:
        raise RunError(
            f"the process that times the networks ended: {_ending(code)}; see "
            f"{ground.folder / 'workers.txt'}"
        )
    return from_json(reply)


def _ending(code: int) -> str:
    """An exit code in words.

    >>> _ending(1), _ending(-9)
    ('exit code 1', 'signal 9, as when memory runs out')
    """
    if code == -9:
        return "signal 9, as when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
