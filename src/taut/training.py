"""How recoveries train: precision, large batches, averaged weights, when to stop, what to send."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from taut.errors import RecipeError
from taut.task import Batch, Task
from taut.technique import Setting, option, register_step

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LAUNCHED = {"bf16": "bfloat16", "fp16": "float16"}
_POWERSGD_START = 10


@register_step
@dataclass(frozen=True, kw_only=True)
class Training(Setting):
    """Change how the recoveries that follow train; left as it is, an option changes nothing.

    ema: after each step, average = ema · average + (1 - ema) · weights, from the weights at the
    start. average: the plain mean of the weights after each of the last so many epochs; batch norms
    then measure the training data anew (Izmailov et al.: Averaging Weights Leads to Wider Optima,
    UAI 2018; there the learning rate stays up, as by recover(schedule="constant")). With either,
    the averaged weights are scored and kept, not those that train.
    label_smoothing: as torch's cross-entropy does it, (1 - s) on the class and s / classes on all.
    communication: PyTorch's hooks for gradients between processes; powersgd sends them in rank 4
    (Vogels, Karimireddy, Jaggi, NeurIPS 2019), whole for the first ten steps.
    """

    precision: str = option(
        "launched", choices=("launched", *PRECISIONS),
        help="of products while it trains; by default what `accelerate launch` says, else float32",
    )  # fmt: skip
    accumulate: int = option(1, low=1, high=100_000, unit="batch", help="batches to a step")
    clip: float = option(0.0, low=0, help="largest norm of all gradients together; 0 for any")
    ema: float = option(0.0, low=0, below=1, help="decay of an exponential average of the weights")
    average: int = option(0, low=0, unit="epoch", help="last epochs whose weights are averaged")
    patience: int = option(
        0, low=0, unit="epoch", help="epochs without a better score before it stops; 0 never stops"
    )
    label_smoothing: float = option(0.0, low=0, below=1, help="share spread over all classes")
    communication: str = option(
        "float32", choices=("float32", "float16", "bfloat16", "powersgd"),
        help="of gradients between processes",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema and self.average:
            raise RecipeError(
                "training: ema and average are two averages of one network, got "
                f"ema={self.ema} and average={self.average}; give one"
            )

    def dtype(self, launched: str) -> torch.dtype:
        """Of products. launched: accelerate's name for what it was started with."""
        chosen = _LAUNCHED.get(launched, "float32")
        return PRECISIONS[chosen if self.precision == "launched" else self.precision]

    def loss_of(self, task: Task, output: Any, target: Any) -> Tensor:
        """The task's loss of one batch, its labels smoothed as asked."""
        if not self.label_smoothing:
            return task.loss_of(output, target)
        if not task.is_classification:
            raise RecipeError(
                "training: label_smoothing needs a task whose loss is cross-entropy (torch's "
                f"function or module), got {task.loss!r}; smooth the labels in that loss instead"
            )
        if isinstance(task.loss, nn.CrossEntropyLoss):
            smoothed = copy.copy(task.loss)
            smoothed.label_smoothing = self.label_smoothing
            return smoothed(output, target)  # type: ignore[no-any-return]
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing)

    def shared(
        self, objective: nn.Module
    ) -> tuple[DistributedDataParallel, powerSGD_hook.PowerSGDState | None]:
        """The objective with gradients that all processes share, sent as asked; PowerSGD's memory.

        PowerSGD talks from several threads, so all gradients go in one bucket, and nothing else
        may be sent meanwhile: every parameter must take part in every loss.
        """
        if self.communication == "powersgd":
            size_mb = 1 + sum(p.numel() * p.element_size() for p in objective.parameters()) / 2**20
            whole = DistributedDataParallel(objective, bucket_cap_mb=size_mb)
            remembered = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=4, start_powerSGD_iter=_POWERSGD_START
            )
            whole.register_comm_hook(remembered, powerSGD_hook.powerSGD_hook)
            return whole, remembered
        shared = DistributedDataParallel(objective, find_unused_parameters=True)
        hooks = {
            "float16": default_hooks.fp16_compress_hook,
            "bfloat16": default_hooks.bf16_compress_hook,
        }
        if self.communication in hooks:
            try:
                shared.register_comm_hook(None, hooks[self.communication])
            except TypeError as error:
                raise RecipeError(
                    f"training: communication={self.communication!r} does not work between these "
                    f"processes ({error}); use float16 or powersgd"
                ) from error
        return shared, None


class Average:
    """A running average of a network's parameters and float buffers."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {k: v.detach().clone() for k, v in _floats(model).items()}
        self.taken = 0

    @torch.no_grad()
    def add(self, model: nn.Module, weight: float | None = None) -> None:
        """average + weight · (now - average); without a weight all that were added count alike."""
        self.taken += 1
        for name, value in _floats(model).items():
            self.values[name].lerp_(value, 1 / self.taken if weight is None else weight)

    @contextmanager
    def standing_in(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in the network, for as long as the context lasts."""
        held = {k: v.detach().clone() for k, v in model.state_dict().items()}
        model.load_state_dict({**held, **self.values})
        try:
            yield
        finally:
            model.load_state_dict(held)

    def state(self) -> dict[str, Any]:
        return {"values": self.values, "taken": self.taken}

    def load(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]
        for name, value in state["values"].items():
            self.values[name].copy_(value)


@torch.no_grad()
def measure_batch_norms(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Let batch norms take their means and variances from these batches, each counting alike."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = {m: m.momentum for m in norms if m.track_running_stats}
    if not momenta:
        return
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    try:
        for batch in batches:
            model(*batch.args, **batch.kwargs)
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def _floats(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
