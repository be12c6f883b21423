"""Training after a technique: fine-tuning, distilled from the original network.

    loss = (1 - d) · task loss + d · T² · KL(p ‖ q) + penalties + bytes_weight · bytes
    p = softmax(original / T), q = softmax(network / T)

d: distill, T: temperature; penalties: of the `regularise` before; bytes: what the forms that can
tell estimate to take in the file, at a price that rises over the first third of the training. Where
the task is no classification by cross-entropy, the second term is the mean squared distance between
the two outputs; a `distillation` before chooses another, and layers to match. Hinton, Vinyals,
Dean: Distilling the Knowledge in a Neural Network (2015). The learning rate is a tenth of the
task's and dropout shrinks with the connections that are left, D·sqrt(kept) (Han et al., NIPS 2015).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parametrize

from taut import processes
from taut.aim import scales_of
from taut.errors import RecipeError, TrainingError
from taut.modules import clone, tensor_at
from taut.objective import Objective, setting
from taut.recoding import chains_of
from taut.schedules import Schedule, Schedules, settled
from taut.task import Batch, Task
from taut.technique import Setting, Step, option, register_step
from taut.trace import Trace
from taut.training import Average, Training, measure_batch_norms
from taut.types import EpochRecord

State = dict[str, Any]
_SENT = ("iter", "error_dict", "p_memory_dict", "q_memory_dict")  # of PowerSGD


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
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    trace: Trace | None = None,
    step: int = 0,
    folder: Path | None = None,
    resume: State | None = None,
    on_epoch: Callable[[EpochRecord, State], None] = lambda record, state: None,
    on_batch: Callable[[int, int, int], None] = lambda epoch, batch, of: None,
) -> list[EpochRecord]:
    """Train in place and leave the best weights in the model; returns one record per epoch.

    settings: what else to train by, at most one of a kind. teacher: the original network, to distil
    from, or several networks. trace: of the original, to adjust its dropout. folder: of the run.
    resume: a state that on_epoch was given, to go on after that epoch. Raises TrainingError when
    the loss is no longer finite; the model keeps the best weights so far.

    Where several processes run it (accelerate launch, torchrun), each takes every n-th batch and
    the gradients are averaged: the same as one process with batches n times as large, if the data
    come in an order that follows torch's random numbers. The main one scores.
    """
    if options.epochs == 0:
        return []
    run = _Run(model, task, options, settings, _several(teacher), trace, folder)
    try:
        if resume is not None:
            run.load(resume)
        with run.schedules:
            while not run.done():
                began, epoch = time.perf_counter(), run.epoch
                with adjusted_dropout(model, trace):  # the masks may have tightened
                    loss = run.train_epoch(epoch, on_batch)
                score = run.score(epoch)
                record = EpochRecord(
                    step=step, epoch=epoch + 1, loss=loss, score=score,
                    learning_rate=run.rate(), seconds=time.perf_counter() - began,
                )  # fmt: skip
                run.history.append(record)
                run.epoch = epoch + 1
                on_epoch(record, run.state())
    finally:
        run.objective.close()
        run.restore_best()
    return run.history


@dataclass(frozen=True, kw_only=True)
class RateCurve:
    """Losses, smoothed, as the learning rate rises; suggested: where they fall the fastest."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float


def find_learning_rate(
    model: nn.Module,
    task: Task,
    options: Recover | None = None,
    *,
    settings: Sequence[Setting] = (),
    teacher: nn.Module | Sequence[nn.Module] | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> RateCurve:
    """Train a copy for some steps while the rate rises evenly in its logarithm.

    It ends early where the loss, averaged with a decay of 0.9, is four times its least. Smith:
    Cyclical Learning Rates for Training Neural Networks (WACV 2017). Raises TrainingError where
    the loss never falls.
    """
    if not 0 < lowest < highest or steps < 10:
        raise RecipeError(
            "find_learning_rate: rates must rise from above 0 in at least 10 steps, got "
            f"lowest={lowest}, highest={highest}, steps={steps}"
        )
    run = _Run(clone(model), task, options or Recover(), settings, _several(teacher), None, None)
    run.model.train()
    batches = chain.from_iterable(run.read() for _ in count())
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    try:
        for i in range(steps):
            rate = lowest * (highest / lowest) ** (i / (steps - 1))
            for part in run.optimizer.param_groups:
                part["lr"] = rate
            group = list(islice(batches, run.training.accumulate))
            average = 0.9 * average + 0.1 * run.step(group, 1.0, f"step {i}")
            rates.append(rate)
            losses.append(average / (1 - 0.9 ** (i + 1)))
            if losses[-1] > 4 * min(losses) > 0:
                break
    except TrainingError:  # the rate is too high by far
        pass
    finally:
        run.objective.close()
    falls = [b - a for a, b in pairwise(losses)]
    if not falls or losses[0] - min(losses) <= 1e-3 * abs(losses[0]):
        raise TrainingError(
            f"find_learning_rate: the loss never falls between rates of {lowest:.3g} and "
            f"{highest:.3g}; try lower ones, or look at the data and the loss"
        )
    best = rates[falls.index(min(falls)) + 1]
    return RateCurve(rates=tuple(rates), losses=tuple(losses), suggested=best)


@contextmanager
def adjusted_dropout(model: nn.Module, trace: Trace | None) -> Iterator[None]:
    """Dropout lowered to D·sqrt(kept): kept is the fraction of connections left in the next site.

    The rates are put back afterwards.
    """
    before: dict[nn.Module, float] = {}
    was_training = model.training
    model.eval()  # the weights as they will be used, without noise
    for path, site in trace.dropouts.items() if trace is not None else ():
        module = model.get_submodule(path)
        rate = getattr(module, "p", None)
        if isinstance(rate, float):
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


def _several(teacher: nn.Module | Sequence[nn.Module] | None) -> Sequence[nn.Module]:
    if teacher is None:
        return ()
    return (teacher,) if isinstance(teacher, nn.Module) else tuple(teacher)


class _Run:
    """One recovery: the optimizer, the best weights, and all that a restart needs."""

    def __init__(
        self, model: nn.Module, task: Task, options: Recover, settings: Sequence[Setting],
        teachers: Sequence[nn.Module], trace: Trace | None, folder: Path | None,
    ) -> None:  # fmt: skip
        self.device = processes.state().device
        self.model, self.task, self.options = model.to(self.device), task, options
        self.trace = trace
        self.training = setting(settings, Training)
        self.start_rate = (
            task.learning_rate / 10 if options.learning_rate is None else options.learning_rate
        )
        read = task.length("train") or sum(1 for _ in task.batches("train"))
        self.batches = -(-read // processes.count())
        self.objective = Objective(
            self.model, task, settings, teachers, share=options.distill,
            temperature=options.temperature, bytes_weight=options.bytes_weight,
            launched=Accelerator().mixed_precision, folder=folder,
        )  # fmt: skip
        self.shared: DistributedDataParallel | None = None
        self.sent: PowerSGDState | None = None
        if processes.count() > 1:
            processes.align(self.objective)
            self.shared, self.sent = self.training.shared(self.objective)
        self.optimizer = self._optimizer()
        self.schedule = next((s for s in settings if isinstance(s, Schedule)), None)
        self.schedules = Schedules(self.model, self.optimizer, self.schedule)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.objective.dtype == torch.float16
        )
        averages = self.training.ema or self.training.average
        self.average = Average(self.model) if averages else None
        self.epoch = self.stale = 0
        self.best: State | None = None
        self.best_score = -math.inf
        self.history: list[EpochRecord] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.objective.parameters() if p.requires_grad]
        of_forms = {p for _, links, _ in chains_of(self.model) for p in links.parameters()}
        weights = [p for p in trained if p.dim() >= 2 and p not in of_forms]
        plain = self.options.optimizer == "sgd"
        steps = self.batches * self.options.epochs // self.training.accumulate
        haste = self.objective.price.haste(self.start_rate, steps)
        quick = set(scales_of(self.model)) if haste > 1 and not plain else set()
        others = [p for p in trained if (p.dim() < 2 or p in of_forms) and p not in quick]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": self.options.weight_decay},
            {"params": others, "weight_decay": 0.0},
            {"params": [p for p in trained if p in quick], "weight_decay": 0.0, "haste": haste},
        ]
        groups = [g for g in groups if g["params"]]
        if plain:
            return torch.optim.SGD(groups, lr=self.start_rate, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.start_rate, fused=True)  # a third of the time

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def done(self) -> bool:
        patience = self.training.patience
        return self.epoch >= self.options.epochs or 0 < patience <= self.stale

    def read(self) -> Iterator[Batch]:
        """This process's part of one pass over the training data."""
        processes.align_random()
        for batch in processes.share(self.task.batches("train")):
            yield self.lay_out(batch.to(self.device))

    def lay_out(self, batch: Batch) -> Batch:
        """Images with their channels last: convolutions on a CPU train about twice as fast."""
        if not any(isinstance(m, nn.Conv2d) for m in self.model.modules()):
            return batch
        args = (a.to(memory_format=torch.channels_last) if _is_image(a) else a for a in batch.args)
        return replace(batch, args=tuple(args))

    def train_epoch(self, epoch: int, on_batch: Callable[[int, int, int], None]) -> float:
        """One pass over the training data; returns the mean loss."""
        self.model.train()
        total, count, taken = 0.0, 0, 0
        batches = self.read()
        while group := list(islice(batches, self.training.accumulate)):
            progress = (epoch + taken / self.batches) / self.options.epochs
            self._set_rate(progress)
            loss = self.step(group, progress, f"epoch {epoch + 1}, batch {taken + 1}")
            for _ in group:
                taken += 1
                on_batch(epoch + 1, taken, self.batches)
            self.schedules.advance((epoch + taken / self.batches) / self.options.epochs)
            if self.average is not None and self.training.ema:
                self.average.add(self.model, 1 - self.training.ema)
            size = sum(b.size for b in group)
            total, count = total + loss * size, count + size
        self.objective.end_epoch()
        losses, sizes = zip(*processes.gathered((total, count)), strict=True)
        return float(sum(losses) / sum(sizes))

    def step(self, group: Sequence[Batch], progress: float, where: str) -> float:
        """One step of the optimizer by the mean loss of some batches, which is returned.

        Raises TrainingError where the loss or a gradient is not finite; no weight has changed then.
        """
        self.optimizer.zero_grad()
        loss, size = 0.0, sum(b.size for b in group)
        for i, batch in enumerate(group):
            waits = self.shared is not None and i + 1 < len(group)
            quiet = self.shared.no_sync() if self.shared and waits else nullcontext()
            with quiet, parametrize.cached():
                part = (self.shared or self.objective)(batch, progress) * (batch.size / size)
                self.scaler.scale(part).backward()
            loss += float(part.detach().double())
        self.scaler.unscale_(self.optimizer)
        trained = [p for g in self.optimizer.param_groups for p in g["params"]]
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        overflows = self.scaler.is_enabled()  # it leaves such a step out and scales less
        fine = math.isfinite(loss) and (overflows or bool(norm.isfinite()))
        if not processes.all_agree(fine, self.device):
            raise TrainingError(self._diagnosis(loss, where))
        if self.training.clip:
            clip_grads_with_norm_(trained, self.training.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def _diagnosis(self, loss: float, where: str) -> str:
        first = _first_bad_gradient(self.model, self.trace)
        gradient = f"the gradient of {first!r} " if first else "a gradient "
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"{gradient}is not finite"
        told = f"; the first gradient that is not finite is that of {first!r}" if first else ""
        return (
            f"recover: {what} in {where}, at learning rate {self.rate():.3g}"
            f"{told if not math.isfinite(loss) else ''}; lower learning_rate, clip gradients by "
            "training(clip=1), or look for NaN in the training data or the task's loss"
        )

    def _set_rate(self, progress: float) -> None:
        progress = progress if self.schedule is None else self.schedule.phase(progress)
        cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
        factor = 0.01 + 0.99 * cosine if self.options.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.start_rate * factor * group.get("haste", 1.0)

    def score(self, epoch: int) -> float:
        """The score after an epoch, of the averaged weights where they are asked for."""
        swa = self.training.average
        if self.average is not None and swa and epoch >= self.options.epochs - swa:
            self.average.add(self.model)
        ready = self.average is None or self.average.taken > 0
        averaged = self.average is not None and ready
        with self.average.standing_in(self.model) if self.average and averaged else nullcontext():
            if swa and averaged:
                measure_batch_norms(self.model, self.read())
            processes.align(self.model)
            score = processes.once(lambda: self.task.evaluate(self.model, self.task.chooses_by))
            if ready:
                self.keep_best(score, last=epoch + 1 == self.options.epochs)
        return score

    def keep_best(self, score: float, last: bool) -> None:
        """Remember the weights if no earlier epoch at full strength scored better."""
        merit = score if self.task.better == "higher" else -score
        if (settled(self.model) and merit > self.best_score) or (last and self.best is None):
            self.best_score, self.stale = merit, 0
            self.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        elif self.best is not None:
            self.stale += 1

    def restore_best(self) -> None:
        if self.best is not None:
            self.model.load_state_dict(self.best)

    def state(self) -> State:
        """All that `load` needs to go on after this epoch, in plain types and tensors."""
        teachers = self.objective.teachers
        mine = {
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "sent": {name: getattr(self.sent, name) for name in _SENT} if self.sent else {},
        }
        return {
            "epoch": self.epoch,
            "stale": self.stale,
            "model": self.model.state_dict(),
            "projections": teachers.projections.state_dict() if teachers else {},
            "optimizer": self.optimizer.state_dict(),
            "schedules": self.schedules.state_dict(),
            "price": self.objective.price.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.state() if self.average else None,
            "best": self.best,
            "best_score": self.best_score,
            "processes": processes.gathered(mine),
            "history": [vars(r) for r in self.history],
        }

    def load(self, state: State) -> None:
        if self.shared and self.sent:  # its memory is laid out as gradients arrive: let them once
            self.shared(next(self.read()), 0.0).backward()
            self.optimizer.zero_grad()
        self.epoch, self.stale = state["epoch"], state["stale"]
        self.model.load_state_dict(state["model"])
        if self.objective.teachers:
            self.objective.teachers.projections.load_state_dict(state["projections"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedules.load_state_dict(state["schedules"])
        self.objective.price.load_state_dict(state["price"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.load(state["average"])
        self.best, self.best_score = state["best"], state["best_score"]
        mine = state["processes"][processes.index() % len(state["processes"])]
        torch.set_rng_state(mine["random"].cpu())
        if self.device.type == "cuda" and mine["cuda"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in mine["cuda"]])
        for name, value in mine["sent"].items() if self.sent else ():
            setattr(self.sent, name, value)
        self.history = [EpochRecord(**r) for r in state["history"]]


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()


def _first_bad_gradient(model: nn.Module, trace: Trace | None) -> str | None:
    """The parameter whose gradient ceased to be finite first, from the loss backwards."""
    bad: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            bad[re.sub(r"parametrizations\.(\w+)\..*", r"\1", name)] = None
    order = [s.name for s in trace.sites] if trace is not None else []
    sites = [n for n in order if n in bad]
    return next(reversed(sites or list(bad)), None)
