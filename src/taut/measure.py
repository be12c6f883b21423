"""Measuring a network: score, bytes, parameters, work, latency, memory."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taut.layers import packed_layers, run_dense
from taut.modules import device_of, tensor_at, to_device
from taut.task import Task
from taut.timing import latency
from taut.trace import Example, Trace
from taut.tune import tune
from taut.types import Choice, Latency, Measurement

BATCHES = (1, 64)


def measure(
    model: nn.Module,
    task: Task,
    trace: Trace,
    *,
    size_bytes: int | None = None,
    batches: Sequence[int] = BATCHES,
    seconds: float = 0.25,
    score: float | None = None,
) -> Measurement:
    """Measure a network as it stands, in eval mode.

    trace: of the original network, whose sites the model still has. size_bytes: of the written
    file; without one, the bytes of the model's tensors, each stored once. batches: the batch sizes
    at which latency is taken; seconds: how long each is timed at least. The score is taken with
    every packed layer running dense, each latency with the faster way chosen for its batch; the
    model is left as tuned for the first batch.
    """
    model.eval()
    run_dense(model, True)
    score = task.evaluate(model) if score is None else score
    nonzero = {s.name: int(tensor_at(model, s.name).count_nonzero()) for s in trace.sites}
    sites = sum(s.numel for s in trace.sites)
    rest = trace.parameters - sites
    site_macs = sum(s.macs for s in trace.sites)
    used = sum(s.macs * nonzero[s.name] / max(s.numel, 1) for s in trace.sites)
    latencies: list[Latency] = []
    choices: list[Choice] = []
    for batch in reversed(batches):
        example = task.example(batch)
        choices = [replace(c, batch=batch) for c in tune(model, example)] + choices
        latencies = [latency(model, example, batch, seconds), *latencies]
    return Measurement(
        score=score,
        size_bytes=tensor_bytes(model) if size_bytes is None else size_bytes,
        parameters=trace.parameters,
        nonzero_parameters=rest + sum(nonzero.values()),
        macs=trace.macs,
        effective_macs=round(trace.macs - site_macs + used),
        latencies=tuple(latencies),
        peak_memory_bytes=peak_memory(model, task.example(1)),
        choices=tuple(choices),
    )


def tensor_bytes(model: nn.Module) -> int:
    """The bytes of a network's parameters and buffers, tied ones once."""
    held = {v.data_ptr(): v for v in model.state_dict(keep_vars=True).values() if v.numel()}
    return sum(v.numel() * v.element_size() for v in held.values())


@torch.no_grad()
def peak_memory(model: nn.Module, example: Example) -> int:
    """What the network holds, decoded copies of packed weights too, plus the most that one forward
    allocates on top, in bytes.
    """
    device = device_of(model)
    args = tuple(to_device(a, device) for a in example[0])
    kwargs = {k: to_device(v, device) for k, v in example[1].items()}
    model(*args, **kwargs)  # a packed layer that runs dense decodes its weights here
    resting = tensor_bytes(model) + sum(p.decoded_bytes() for p in packed_layers(model).values())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(*args, **kwargs)
        return resting + torch.cuda.max_memory_allocated(device) - before
    held = _Held()
    with held:
        model(*args, **kwargs)
    return resting + held.peak


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch leaves it untyped
    """Adds up the storages that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)}  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        at, size = storage.data_ptr(), storage.nbytes()
        if at in given or at in self._alive:
            return
        self._alive.add(at)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, at, size)

    def _drop(self, at: int, size: int) -> None:
        self._alive.discard(at)
        self.now -= size
