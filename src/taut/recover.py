"""Training after a technique: fine-tuning, distilled from the original network.

    loss = (1 - d) · task loss + d · T² · KL(p ‖ q) + penalties + bytes_weight · bytes
    p = softmax(original / T), q = softmax(network / T)

d: distill, T: temperature; penalties: of the `regularise` before; bytes: what the forms that can
tell estimate to take in the file, at a price that rises over the first third of the training. Where
the task is no classification by cross-entropy, the second term is the mean squared distance between
the two outputs. Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015). The
learning rate is a tenth of the task's and dropout shrinks with the connections that are left,
D·sqrt(kept) (Han et al., NIPS 2015).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from taut.aim import Price
from taut.errors import TrainingError
from taut.modules import tensor_at
from taut.recoding import chains_of
from taut.regularise import Regularise
from taut.schedules import Schedule, Schedules, settled
from taut.task import Batch, Task
from taut.technique import Setting, Step, option, register_step
from taut.trace import Trace
from taut.types import EpochRecord

State = dict[str, Any]


@register_step
@dataclass(frozen=True, kw_only=True)
class Recover(Step):
    """Train the network in its compressed form and keep the best epoch."""

    epochs: int = option(5, low=0, high=100_000, unit="epoch")
    learning_rate: float | None = option(
        None, low=0, help="at the start; by default a tenth of the task's"
    )
    optimizer: str = option("adam", choices=("adam", "sgd"), help="sgd has momentum 0.9")
    schedule: str = option("cosine", choices=("cosine", "constant"), help="of the learning rate")
    weight_decay: float = option(0.0, low=0, high=1, help="L2, decoupled, on weights alone")
    distill: float = option(0.5, low=0, high=1, help="share of the loss that the original gives")
    temperature: float = option(4.0, low=0.1, high=100, help="of the distilled outputs")
    bytes_weight: float = option(
        0.0, low=0, help="price of a byte of the file, in units of the loss"
    )


def recover(
    model: nn.Module,
    task: Task,
    options: Recover,
    *,
    settings: Sequence[Setting] = (),
    teacher: nn.Module | None = None,
    trace: Trace | None = None,
    step: int = 0,
    resume: State | None = None,
    on_epoch: Callable[[EpochRecord, State], None] = lambda record, state: None,
    on_batch: Callable[[int, int, int], None] = lambda epoch, batch, of: None,
) -> list[EpochRecord]:
    """Train in place and leave the best weights in the model; returns one record per epoch.

    settings: what else to train by, at most one of a kind. teacher: the original network, to distil
    from. trace: of the original, to adjust its dropout.
    resume: a state that on_epoch was given, to go on after that epoch. Raises TrainingError when
    the loss is no longer finite; the model keeps the best weights so far.
    """
    if options.epochs == 0:
        return []
    accelerator = Accelerator()
    run = _Run(accelerator.prepare_model(model), task, options, accelerator, teacher, settings)
    if resume is not None:
        run.load(resume)
    with run.schedules:
        for epoch in range(run.epoch, options.epochs):
            began = time.perf_counter()
            with adjusted_dropout(model, teacher, trace):  # the masks may have tightened
                loss = run.train_epoch(epoch, on_batch)
            score = task.evaluate(model, task.chooses_by)
            run.keep_best(score, last=epoch + 1 == options.epochs)
            record = EpochRecord(
                step=step, epoch=epoch + 1, loss=loss, score=score,
                learning_rate=run.rate(), seconds=time.perf_counter() - began,
            )  # fmt: skip
            run.history.append(record)
            run.epoch = epoch + 1
            on_epoch(record, run.state())
    run.restore_best()
    return run.history


@contextmanager
def adjusted_dropout(
    model: nn.Module, original: nn.Module | None, trace: Trace | None
) -> Iterator[None]:
    """Dropout lowered to D·sqrt(kept): kept is the fraction of connections left in the next site.

    The rates that the original has are put back afterwards.
    """
    before: dict[nn.Module, float] = {}
    was_training = model.training
    model.eval()  # the weights as they will be used, without noise
    for path, site in trace.dropouts.items() if trace is not None else ():
        module = model.get_submodule(path)
        rate = getattr(original.get_submodule(path), "p", None) if original is not None else None
        if isinstance(rate, float) and hasattr(module, "p"):
            weight = tensor_at(model, site)
            kept = int(weight.count_nonzero()) / weight.numel()
            before[module] = rate
            setattr(module, "p", rate * math.sqrt(kept))  # noqa: B010 - nn.Module types it a tensor
    model.train(was_training)
    try:
        yield
    finally:
        for module, rate in before.items():
            setattr(module, "p", rate)  # noqa: B010


class _Run:
    """One recovery: the optimizer, the best weights, and all that a restart needs."""

    def __init__(
        self, model: nn.Module, task: Task, options: Recover, accelerator: Accelerator,
        teacher: nn.Module | None, settings: Sequence[Setting],
    ) -> None:  # fmt: skip
        self.model, self.task, self.options, self.settings = model, task, options, settings
        self.accelerator = accelerator
        distils = options.distill > 0 and teacher is not None
        self.teacher = teacher.to(accelerator.device).eval() if distils and teacher else None
        self.start_rate = (
            task.learning_rate / 10 if options.learning_rate is None else options.learning_rate
        )
        self.optimizer: Any = accelerator.prepare(self._optimizer())
        self.batches = task.length("train") or sum(1 for _ in task.batches("train"))
        self.schedule = next((s for s in settings if isinstance(s, Schedule)), None)
        self.schedules = Schedules(model, self.optimizer, self.schedule)
        self.epoch = 0
        self.price = Price(model, options.bytes_weight, settings)
        self.best: State | None = None
        self.best_score = -math.inf
        self.history: list[EpochRecord] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        of_forms = {p for _, links, _ in chains_of(self.model) for p in links.parameters()}
        weights = [p for p in trained if p.dim() >= 2 and p not in of_forms]
        others = [p for p in trained if p.dim() < 2 or p in of_forms]
        groups = [
            {"params": weights, "weight_decay": self.options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        if self.options.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.start_rate, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.start_rate)

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def train_epoch(self, epoch: int, on_batch: Callable[[int, int, int], None]) -> float:
        """One pass over the training data; returns the mean loss."""
        self.model.train()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for index, batch in enumerate(self.task.batches("train", self.accelerator.device)):
            done = (epoch + index / self.batches) / self.options.epochs
            self._set_rate(done)
            self.optimizer.zero_grad()
            with parametrize.cached():
                loss = self._loss(batch) + self.price.cost(self.model, done)
                self.accelerator.backward(loss)
            value = loss.detach().double().cpu()
            if not bool(value.isfinite()):
                self.restore_best()
                raise TrainingError(
                    f"recover: the loss became {float(value)} in epoch {epoch + 1}, batch "
                    f"{index + 1}, at learning rate {self.rate():.3g}; lower learning_rate, or "
                    "look for NaN in the training data or the task's loss"
                )
            self.optimizer.step()
            self.schedules.advance((epoch + (index + 1) / self.batches) / self.options.epochs)
            total += value * batch.size
            count += batch.size
            on_batch(epoch + 1, index + 1, self.batches)
        return float(total) / count

    def _set_rate(self, progress: float) -> None:
        progress = progress if self.schedule is None else self.schedule.phase(progress)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        factor = 0.01 + 0.99 * cosine if self.options.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.start_rate * factor

    def _loss(self, batch: Batch) -> Tensor:
        output = self.model(*batch.args, **batch.kwargs)
        loss = self.task.loss_of(output, batch.target)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(*batch.args, **batch.kwargs)
            share = self.options.distill
            loss = (1 - share) * loss + share * self._distance(output, wanted)
        for setting in self.settings:
            if isinstance(setting, Regularise):
                loss = loss + setting.penalty(self.model)
        return loss

    def _distance(self, output: Tensor, wanted: Tensor) -> Tensor:
        if not self.task.is_classification:
            return F.mse_loss(output, wanted)
        t = self.options.temperature
        axis = 1 if output.dim() > 1 else 0
        log_p = F.log_softmax(output / t, axis)
        q = F.softmax(wanted / t, axis)
        return F.kl_div(log_p, q, reduction="batchmean") * t * t

    def keep_best(self, score: float, last: bool) -> None:
        """Remember the weights if no earlier epoch at full strength scored better."""
        merit = score if self.task.better == "higher" else -score
        if (settled(self.model) and merit > self.best_score) or (last and self.best is None):
            self.best_score = merit
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def restore_best(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best)

    def state(self) -> State:
        """All that `load` needs to go on after this epoch, in plain types and tensors."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedules": self.schedules.state_dict(),
            "price": self.price.state_dict(),
            "best": self.best,
            "best_score": self.best_score,
            "random": torch.get_rng_state(),
            "history": [vars(r) for r in self.history],
        }

    def load(self, state: State) -> None:
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedules.load_state_dict(state["schedules"])
        self.price.load_state_dict(state["price"])
        self.best, self.best_score = state["best"], state["best_score"]
        torch.set_rng_state(state["random"])
        self.history = [EpochRecord(**r) for r in state["history"]]
