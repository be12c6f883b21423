"""Schedules: how masks come to their sparsity while the network trains, on the optimizer's steps.

    kept(k) = first · (last / first) ** (k / n)              iterative
    kept(k) = last + (first - last) · (1 - k / n) ** 3       cubic
    kept(k) = last                                           one_shot

n: steps, the cuts between begin and end; first, last: entries of the weight before and after. What
stays at a cut is chosen by

    magnitude   |w|, among those still there
    movement    -Σ gradient · w over the training so far, among all
    rigl        |w|, and a share of the smallest makes room for those absent ones whose gradient is
                largest; they start at zero. The share is fraction / 2 · (1 + cos(π · k / n))
    surgery     |w|, where absent ones train on unseen and come back at 1 + fraction times the
                magnitude below which present ones go

Under a pattern blocks go by the sum of these, and N:M comes down group by group, to as few of
every M as the count allows, N in the end; there rigl is refused, as the least that it can swap is
one weight of every group.

Han et al.: Learning both Weights and Connections (NIPS 2015), iterative; Zhu, Gupta: To prune, or
not to prune (2017), cubic; Sanh, Wolf, Rush: Movement Pruning (NeurIPS 2020); Evci et al.: Rigging
the Lottery (ICML 2020), rigl; Guo, Yao, Chen: Dynamic Network Surgery (NIPS 2016); Frankle et al.:
Stabilizing the Lottery Ticket Hypothesis (2019), rewinding, of the learning rate alone by Renda,
Frankle, Carbin (ICLR 2020). Where we differ: every site keeps the share that the technique gave it;
movement scores have no learning rate of their own; RigL's network begins with its largest weights
instead of random ones (the paper's end is 0.75); surgery takes its lower threshold from the count
to keep, instead of from mean and deviation, and looks at each cut instead of at random steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from taut.errors import RecipeError
from taut.mask import Mask
from taut.recipe import Recipe
from taut.recoding import Chain, chains_of
from taut.technique import Setting, option, register_step

State = dict[str, Any]


@register_step
@dataclass(frozen=True, kw_only=True)
class Schedule(Setting):
    """Let the masks of prune_weights open again and close in steps as the network trains.

    A mask follows one schedule, once, in the first recovery under it; without any it is cut when
    the technique is applied. The time between begin and end has a share for each cut: cubic cuts
    and those by movement come at the end of theirs, the others at its start, so that the last one
    has its share to recover in. Rewinding sets the parameters back after each cut to what they
    were at rewind_to, and forgets the optimizer's moments; the learning rate starts over too.
    """

    kind: str = option("iterative", choices=("one_shot", "iterative", "cubic"), help="of descent")
    steps: int = option(4, low=1, high=100_000, help="cuts between begin and end")
    begin: float = option(0.0, low=0, below=1, unit="share of the training")
    end: float = option(0.5, low=0, high=1, unit="share of the training")
    by: str = option(
        "magnitude", choices=("magnitude", "movement", "rigl", "surgery"), help="what stays"
    )
    fraction: float = option(
        0.3, low=0, high=1,
        help="rigl: share of the weights that are replaced, at first; surgery: how far above the "
        "lower threshold the upper one lies",
    )  # fmt: skip
    rewind: str = option(
        "none", choices=("none", "weights", "rate"),
        help="after each cut: weights and learning rate, or the rate alone",
    )  # fmt: skip
    rewind_to: float = option(0.0, low=0, below=1, unit="share of the training")

    def __post_init__(self) -> None:
        if type(self.end) in (int, float) and self.end > 1:
            raise RecipeError(
                f"schedule: end is a share of the training and at most 1, got {self.end}: it would "
                "end after training does; for optimizer steps give step / total_steps"
            )
        super().__post_init__()
        if self.begin >= self.end:
            raise RecipeError(
                f"schedule: begin must lie before end, got begin={self.begin} and end={self.end}"
            )
        if self.rewind_to > self.begin:
            raise RecipeError(
                "schedule: what a cut goes back to must lie before the first one, got "
                f"rewind_to={self.rewind_to} and begin={self.begin}; raise begin"
            )

    def check(self, pattern: str, site: str) -> None:
        """Raise RecipeError where a mask of this pattern, on this site, cannot follow."""
        if self.by == "rigl" and ":" in pattern:
            raise RecipeError(
                f"schedule: by='rigl' swaps a share of the weights, got pattern={pattern!r} on "
                f"site {site!r}, of which the least share is one weight of every group; choose "
                "by='magnitude', 'movement' or 'surgery', or blocks"
            )

    @property
    def _early(self) -> int:
        """1 where cuts come at the start of their share of the time."""
        return int(self.kind != "cubic" and self.by != "movement")

    def stage(self, progress: float) -> int:
        """How many cuts are due at this share of the training."""
        share = (progress - self.begin) / (self.end - self.begin)
        return 0 if share < 0 else min(self.steps, int(self.steps * share + 1e-9) + self._early)

    def kept(self, first: int, last: int, stage: int) -> int:
        """How many entries are there after so many cuts, of `first` at the start."""
        if stage == 0 or first <= last:
            return first
        if self.kind == "one_shot":
            return last
        part = stage / self.steps
        if self.kind == "cubic":
            return round(last + (first - last) * (1 - part) ** 3)
        return round(first * math.pow(last / first, part))

    def replaced(self, stage: int) -> float:
        """RigL's share of the present entries that make room at this cut."""
        return self.fraction / 2 * (1 + math.cos(math.pi * (stage - self._early) / self.steps))

    def phase(self, progress: float) -> float:
        """What a learning rate goes by: the share of the training, or of it since the last cut.

        For the scheduler of your own loop; recover goes by it already.
        """
        if self.rewind == "none":
            return progress
        stage = self.stage(progress)
        since, until = (self._time(s) for s in (stage, stage + 1))
        return (progress - since) / (until - since) if until > since else 1.0

    def _time(self, stage: int) -> float:
        """The share of the training at which a cut is due; 0 before the first, 1 after the last."""
        if stage == 0 or stage > self.steps:
            return float(stage > 0)
        return self.begin + (stage - self._early) / self.steps * (self.end - self.begin)


class Schedules:
    """The forms and masks of a model as they follow one training.

    Masks that wait for a schedule open when it is made. `state_dict` is what a restarted training
    needs beside the model's and the optimizer's.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule | None = None
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.stage = 0
        self.taken = 0
        self._first: dict[str, int] = {}  # how many entries each mask had at the start
        self._start: dict[str, Tensor] | None = None  # the parameters at the rewind point
        self._remove: Callable[[], None] = lambda: None
        if schedule is not None and self._open():
            self._follow(schedule, 0.0)

    @torch.no_grad()
    def _open(self) -> bool:
        """Take on the masks that follow; whether any of them has just begun."""
        began = False
        for name, links, mask, core in _masks(self.model):
            if self.schedule is not None:
                self.schedule.check(str(mask.pattern or ""), name)
            innermost = links.forms[-1] is mask
            if not mask.followed:
                if not innermost:
                    raise RecipeError(recoded_too_early(name, links.recipe[-1].name))
                mask.mask.copy_(core != 0)
                mask.followed.fill_(True)
                began = True
            elif mask.settled() or not innermost:
                continue
            self._first[name] = int(mask.mask.sum())
        return began

    def advance(self, progress: float) -> None:
        """After an optimizer step: tell the forms how far the training has come, from 0 to 1."""
        progress = min(progress, 1.0)
        advance(self.model, progress)
        if self.schedule is not None and self._first:
            self._follow(self.schedule, progress)

    @torch.no_grad()
    def _follow(self, schedule: Schedule, progress: float) -> None:
        rewinds = schedule.rewind == "weights"
        if rewinds and self._start is None and progress >= schedule.rewind_to:
            self._start = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        stage = schedule.stage(progress)
        for name, _, mask, core in _masks(self.model):
            if name in self._first:
                if stage > self.stage:
                    kept = schedule.kept(self._first[name], int(mask.kept), stage)
                    self._cut(schedule, mask, core, kept, schedule.replaced(stage))
                self._watch(schedule, mask, done=stage == schedule.steps)
        if rewinds and stage > self.stage:
            self._rewind()
        self.stage = stage

    def _cut(
        self, schedule: Schedule, mask: Mask, core: Tensor, kept: int, replaced: float
    ) -> None:
        before, size = mask.mask.clone(), core.abs()
        gathered = _over_processes(mask.gathered)
        if schedule.by == "movement" and gathered is not None:
            mask.mask.copy_(mask.choose(gathered, kept))
        elif schedule.by == "surgery":
            size = torch.where(before, (1 + schedule.fraction) * size, size)
            mask.mask.copy_(mask.choose(size, kept))
            return  # the moments of absent entries are true ones
        elif schedule.by == "rigl" and gathered is not None:
            moved = min(round(replaced * kept), core.numel() - kept)
            stay = mask.choose(size, kept - moved, before)
            moved = kept - int(stay.sum())  # blocks are whole
            mask.mask.copy_(stay | mask.choose(gathered.abs(), moved, ~stay))
            core[mask.mask & ~before] = 0.0
        else:
            mask.mask.copy_(mask.choose(size, kept, before))
        changed = mask.mask != before
        for moment in self.optimizer.state.get(core, {}).values():
            if isinstance(moment, Tensor) and moment.shape == core.shape:
                moment[changed] = 0.0

    def _watch(self, schedule: Schedule, mask: Mask, done: bool) -> None:
        """What the mask does in the steps to come."""
        gathers = {"movement": "movement", "rigl": "gradient"}.get(schedule.by, "")
        mask.gathers = "" if done else gathers
        mask.straight_through = schedule.by == "surgery" and not done
        if mask.gathers != "movement":
            mask.gathered = None

    def _rewind(self) -> None:
        for name, parameter in self.model.named_parameters():
            if self._start is not None:
                parameter.copy_(self._start[name])
            self.optimizer.state.pop(parameter, None)

    def state_dict(self) -> State:
        """What `load_state_dict` needs, in plain types and tensors."""
        masks = {n: m.gathered for n, _, m, _ in _masks(self.model) if n in self._first}
        return {
            "taken": self.taken, "stage": self.stage, "first": dict(self._first),
            "gathered": masks, "start": self._start,
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Go on where `state_dict` was taken; load the model's and the optimizer's own too."""
        self.taken, self.stage = state["taken"], state["stage"]
        self._first, self._start = dict(state["first"]), state["start"]
        for name, _, mask, _ in _masks(self.model):
            if self.schedule is not None and name in self._first:
                self._watch(self.schedule, mask, done=self.stage == self.schedule.steps)
                mask.gathered = state["gathered"][name]

    def __enter__(self) -> Schedules:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Leave the optimizer's steps alone from here on, and watch no gradients."""
        self._remove()
        for _, _, mask, _ in _masks(self.model):
            mask.gathers, mask.gathered, mask.straight_through = "", None, False


def attach_schedules(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    schedule: Schedule | str | None = None,
) -> Schedules:
    """Let the model's forms follow the optimizer's steps, in any training loop.

    total_steps: optimizer steps of the whole training. schedule: for the masks that prune_weights
    has put on, as a Schedule or as text, `"schedule(kind='cubic', steps=20)"`. What it returns
    detaches them again, and has the state of a checkpoint. Raises RecipeError where there is no
    mask to follow, or no training.
    """
    if isinstance(schedule, str):
        step = Recipe.parse(schedule).steps[0]
        if not isinstance(step, Schedule):
            raise RecipeError(f"attach_schedules takes a schedule, got {step}")
        schedule = step
    if total_steps < 1:
        raise RecipeError(
            f"attach_schedules: total_steps must be at least 1, got {total_steps}; it counts the "
            "optimizer's steps of the whole training, epochs · batches"
        )
    if schedule is not None and not any(_masks(model)):
        raise RecipeError(
            f"attach_schedules: {schedule} has no mask to follow it; put prune_weights on the "
            "network first by taut.apply"
        )
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper runs no hooks
    attached = Schedules(model, inner, schedule)

    def after_step(*_: object) -> None:
        attached.taken += 1
        attached.advance(attached.taken / total_steps)

    attached._remove = inner.register_step_post_hook(after_step).remove
    return attached


@torch.no_grad()
def advance(model: nn.Module, progress: float) -> None:
    """Tell every form how far the training has come, from 0 to 1."""
    for _, links, its_core in chains_of(model):
        for form, core in links.stages(its_core):
            form.advance(core, progress)


def settled(model: nn.Module) -> bool:
    """Whether every form has reached its full strength."""
    return all(links.settled() for _, links, _ in chains_of(model))


def recoded_too_early(site: str, technique: str) -> str:
    """Why a mask cannot follow: what it kept is written in another way already."""
    return (
        f"schedule: the mask on site {site!r} cannot open again, for {technique} has recoded what "
        f"it kept; put recover before {technique}"
    )


def _masks(model: nn.Module) -> Iterator[tuple[str, Chain, Mask, Tensor]]:
    """The sites with a mask: name, chain, mask, and what is trained there."""
    for name, links, core in chains_of(model):
        for form in links.forms:
            if isinstance(form, Mask):
                yield name, links, form, core


def _over_processes(gathered: Tensor | None) -> Tensor | None:
    """The sum over all processes of a training, so that their masks stay the same."""
    if gathered is not None and distributed.is_available() and distributed.is_initialized():
        gathered = gathered.clone()
        distributed.all_reduce(gathered)
    return gathered
