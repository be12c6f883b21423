"""The jobs of a search as Ray tasks, on one machine or a cluster (extra taut[ray])."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from taut.errors import SearchError
from taut.files import write_atomically
from taut.search.jobs import Job, Outcome, run_job, shipment, unpacked
from taut.search.pools import Pool
from taut.trial import Ground

Files = dict[str, bytes]
_KEPT = ("net.taut", "trial.json", "checkpoint.pt")
_RETRIES = 3  # of a task whose worker or node is lost


class Cluster(Pool):
    """Jobs as Ray tasks; the network and its data are shipped once, through the object store.

    address: of a cluster, "auto" for the one that is there, or "" to start one on this machine.
    threads: cores of a task, by default one; a task takes a GPU where the cluster has any. Files
    come back as bytes, so the nodes need share no disk. Lost workers' tasks are tried again.
    """

    def __init__(self, ground: Ground, address: str, threads: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise SearchError(
                "search: ray is not installed: pip install 'taut[ray]'; or use --workers"
            ) from error
        self.ray: Any = ray
        self.started = not ray.is_initialized()
        if self.started:
            try:
                _reach(address)
                here = {"address": address} if address else {"include_dashboard": False}
                ray.init(**here, log_to_driver=False)
            except Exception as error:  # Ray raises bare ones too
                raise SearchError(
                    f"search: no Ray cluster answers at {address!r} ({error}); start one by "
                    "`ray start --head`, or give --ray '' for one on this machine"
                ) from error
        self.ground = ground
        content = np.frombuffer(shipment(ground), np.uint8)
        self.shipped = ray.put(content)
        cores = threads or 1
        gpus = 1 if self.ray.cluster_resources().get("GPU") else 0
        self.task = ray.remote(num_cpus=cores, num_gpus=gpus, max_retries=_RETRIES)(_done)
        self.cores = cores
        self.flying: dict[Any, Job] = {}

    def submit(self, job: Job) -> None:
        if (found := job.done()) is not None:
            self.flying[self.ray.put((found.to_json(), {}))] = job
            return
        files = {n: p.read_bytes() for n in _KEPT if (p := Path(job.folder) / n).is_file()}
        self.flying[self.task.remote(self.shipped, job, files, self.cores)] = job

    def next(self) -> tuple[Job, Outcome]:
        (ready,), _ = self.ray.wait(list(self.flying), num_returns=1)
        job = self.flying.pop(ready)
        try:
            data, files = self.ray.get(ready)
        except self.ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[0]
            return job, Outcome(error=f"its worker was lost {_RETRIES + 1} times: {said}")
        for name, content in sorted(files.items(), key=lambda item: item[0] == "trial.json"):
            write_atomically(Path(job.folder) / name, content)
        outcome = Outcome.from_json(data)
        if outcome.candidate is None:
            return job, outcome
        path = str(Path(job.folder) / "net.taut")
        return job, replace(outcome, candidate=replace(outcome.candidate, path=path))

    def close(self) -> None:
        for task in self.flying:
            with contextlib.suppress(Exception):  # it may be done, or never have been a task
                self.ray.cancel(task, force=True)
        if self.started:
            self.ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself would wait for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), 10).close()


def _done(
    shipped: NDArray[np.uint8], job: Job, files: Files, cores: int
) -> tuple[dict[str, Any], Files]:
    """Do a job in a folder of this worker's, and give back its outcome and its files."""
    torch.set_num_threads(cores)
    ground = _ground(xxhash.xxh3_64_hexdigest(shipped.data), shipped)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        outcome = run_job(replace(ground, folder=Path(folder)), replace(job, folder=folder))
        kept = {n: p.read_bytes() for n in _KEPT if (p := Path(folder) / n).is_file()}
    return outcome.to_json(), kept


_grounds: dict[str, Ground] = {}


def _ground(digest: str, shipped: NDArray[np.uint8]) -> Ground:
    """The ground, unpacked once in each worker."""
    if digest not in _grounds:
        _grounds[digest] = unpacked(shipped.tobytes())
    return _grounds[digest]
