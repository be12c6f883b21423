"""One recipe, step by step: applied, trained, packed, measured; resumable from its checkpoint."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from taut import edits, processes
from taut.activations import input_forms, place_input
from taut.errors import RecipeError
from taut.fastest import latencies
from taut.files import unreadable, write_atomically
from taut.growth import apply_where_smaller
from taut.measure import BATCHES, measure
from taut.modules import clone
from taut.pack import load, pack
from taut.processes import is_main, once
from taut.recipe import Recipe
from taut.recoding import Chain, Recoding, chains, core
from taut.recover import Recover, recover
from taut.reshaping import Reshaping, check_order
from taut.statistics import Curve, Statistics
from taut.task import CalibrationLoss, Task
from taut.technique import Setting, Technique
from taut.trace import Trace, trace
from taut.types import Candidate, EpochRecord, LeftAlone, Measurement
from taut.watch import Watch

_log = logging.getLogger("taut")


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the trials of one run stand on. model: the original network; trace: of it.

    curves: its sensitivities, scanned once by whichever trial first asks for them.
    """

    model: nn.Module
    task: Task
    trace: Trace
    folder: Path
    seed: int
    precision: str
    watch: Watch
    engine: str | None = None
    curves: dict[str, Curve] = field(default_factory=dict, compare=False)

    @cached_property
    def calibration(self) -> CalibrationLoss:
        """The loss on the same few examples in every trial, however the data are shuffled."""
        return self._calibration(self.task.calibration)

    @cached_property
    def glance(self) -> CalibrationLoss:
        """The loss on very few examples: enough to predict what a reshaped network will take."""
        return self._calibration(128)

    def _calibration(self, examples: int) -> CalibrationLoss:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.task.calibration_loss(examples)

    def sensitivity(self) -> dict[str, Any]:
        """The curves that were scanned, as JSON, in which infinity is None."""
        return {
            name: {
                "baseline": curve.baseline, "sparsities": list(curve.sparsities),
                "losses": [v if math.isfinite(v) else None for v in curve.losses],
            }
            for name, curve in self.curves.items()
        }  # fmt: skip

    def timed(self, net: nn.Module, found: Measurement) -> Measurement:
        """The measurement, with latencies of the engine that was asked for."""
        if self.engine is None:
            return found
        return replace(found, latencies=latencies(net, self.task, self.engine, BATCHES))

    def say(self, text: str) -> None:
        """Tell the log and whoever watches."""
        _log.info(text)
        self.watch.say(text)


def apply_step(
    model: nn.Module, technique: str | Technique, task: Task, traced: Trace | None,
    statistics: Statistics | None = None,
) -> tuple[nn.Module, list[LeftAlone]]:  # fmt: skip
    """What `apply` does. Returns the sites that were left alone, too.

    statistics: of this model, where its sensitivities are known already.
    """
    step = Recipe.parse(technique).steps[0] if isinstance(technique, str) else technique
    if not isinstance(step, Technique):
        raise RecipeError(f"apply takes a technique, got {step}; train with taut.recover")
    if traced is None and any(isinstance(m, Chain) for m in model.modules()):
        raise RecipeError(
            f"apply: the network carries forms already, so {step.name} needs the trace of the "
            "original: traced = taut.trace(original, task.example()), taken before the first apply"
        )
    check_order(step, model)
    traced = traced or trace(model, task.example())
    statistics = statistics or Statistics(model, task.calibration_loss(), traced)
    if isinstance(step, Reshaping):
        return step.reshape(model, traced, statistics), []
    return model, apply_where_smaller(model, step, step.sites(traced), statistics)


class Trial:
    """One recipe, step by step, with a checkpoint after each step and each epoch."""

    def __init__(self, run: Ground, recipe: Recipe, folder: Path) -> None:
        self.run, self.recipe, self.folder = run, recipe, folder
        self.trace, self.task = run.trace, run.task
        self.model = clone(run.model)
        self.device = processes.state().device
        self.model.to(self.device)
        self.history: list[EpochRecord] = []
        self.left: list[LeftAlone] = []
        self.step = 0
        self.recovering: dict[str, Any] | None = None
        self._resume()

    def go(self) -> Candidate:
        for index in range(self.step, len(self.recipe.steps)):
            step = self.recipe.steps[index]
            torch.manual_seed(self.run.seed + index)
            if isinstance(step, Recover):
                self._recover(step)
            elif isinstance(step, Technique):
                self.run.say(f"{step}")
                self.model, left = apply_step(
                    self.model, step, self.task, self.trace, self._statistics(index)
                )
                for grown in left:
                    self.run.watch.say(f"{grown}")
                self.left += left
                if isinstance(step, Reshaping):
                    self.trace = trace(self.model, self.task.example())
            self.step = index + 1
            self.recovering = None
            self.save()
        applied = {type(s): s for s in self.recipe.steps if isinstance(s, Technique)}
        for technique in applied.values():
            for line in technique.finish(self.model, self.trace):
                self.run.say(line)
        return once(self._measure)

    def _statistics(self, index: int) -> Statistics:
        """Of the model before a step. While it is the original, its curves are those of the run."""
        whole = all(isinstance(s, Setting) for s in self.recipe.steps[:index])
        return Statistics(
            self.model, self.run.calibration, self.trace, self.run.curves if whole else None
        )

    def _recover(self, step: Recover) -> None:
        self.run.say(f"{step}")

        def on_epoch(record: EpochRecord, state: dict[str, Any]) -> None:
            _log.info(
                "epoch %d: loss %.4f, score %.4f, %.1f s",
                record.epoch, record.loss, record.score, record.seconds,
            )  # fmt: skip
            self.run.watch.on_epoch(record)
            self.recovering = state
            self.save()

        def on_batch(epoch: int, batch: int, batches: int) -> None:
            self.run.watch.on_batch(epoch, step.epochs, batch, batches)

        self.history += recover(
            self.model, self.task, step, settings=self.recipe.settings(self.step),
            teacher=clone(self.run.model), trace=self.trace, step=self.step,
            resume=self.recovering, folder=self.run.folder, on_epoch=on_epoch, on_batch=on_batch,
        )  # fmt: skip

    def _measure(self) -> Candidate:
        """Pack, read the file back into a copy of the original, and measure that."""
        path = self.folder / "net.taut"
        size = pack(self.model, path, self.run.precision)
        packed = load(path, clone(self.run.model))
        measurement = measure(packed, self.task, self.trace, size_bytes=size)
        measurement = self.run.timed(packed, measurement)
        self.run.say(f"{size:,} bytes, score {measurement.score:.4f}")
        trained = sum(s.epochs for s in self.recipe.steps if isinstance(s, Recover))
        return Candidate(
            recipe=str(self.recipe), measurement=measurement, path=str(path), epochs=trained,
            left=tuple(self.left),
        )  # fmt: skip

    def save(self) -> None:
        """The checkpoint: which forms the sites carry, and every tensor."""
        if not is_main():
            return
        state = {
            "step": self.step,
            "edits": edits.to_json(edits.of(self.model)),
            "forms": {
                site.name: [str(t) for t in links.recipe]
                for site, links in chains(self.model, self.trace.places)
            },
            "inputs": {path: form.recipe for path, form in input_forms(self.model)},
            "model": self.model.state_dict(),
            "recover": self.recovering,
            "history": [vars(r) for r in self.history],
            "left": [vars(g) for g in self.left],
        }
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))

    def _saved(self) -> dict[str, Any] | None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # whatever a damaged pickle makes of itself
            raise unreadable(path, error) from error
        return state

    def _resume(self) -> None:
        state = once(self._saved)
        if state is None:
            return
        if state["edits"]:
            self.model = edits.replay(self.model, edits.from_json(state["edits"]))
            self.model.to(self.device)
            self.trace = trace(self.model, self.task.example())
        with torch.no_grad():
            for name, texts in state["forms"].items():
                site = self.trace.site(name)
                for text in texts:
                    technique = Recipe.parse(text).steps[0]
                    assert isinstance(technique, Recoding)
                    form, blank = technique.blank(core(self.model, site).detach())
                    technique.place(self.model, site, form, blank)
            for path, text in state["inputs"].items():
                technique = Recipe.parse(text).steps[0]
                assert isinstance(technique, Recoding)
                given = technique.blank_input(self.model, self.trace.site(f"{path}.weight"))
                assert given is not None
                place_input(self.model, path, given, text)
        self.model.load_state_dict(state["model"])
        self.step, self.recovering = state["step"], state["recover"]
        self.history = [EpochRecord(**r) for r in state["history"]]
        self.left = [LeftAlone(**g) for g in state.get("left", ())]
        self.run.say(f"going on after step {self.step} of {len(self.recipe.steps)}")


def fingerprint(model: nn.Module) -> str:
    """A digest of every tensor of a network, by name."""
    digest = xxhash.xxh3_64()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
