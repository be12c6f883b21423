"""Distillation: what the network shall have from its teachers, beside the task's own loss.

    loss = (1 - d) · task loss + d · distance(outputs) + feature_weight · distance(features)

d is recover's `distill`. The distances are those of distances.py, with recover's temperature;
each is the mean over the teachers, that of the features the mean over the layers too. For
sequences they count step by step.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn import functional as F

from taut import distances
from taut.errors import RecipeError, did_you_mean
from taut.modules import device_of, to_device
from taut.task import Batch, Task
from taut.teacher_cache import TeacherCache
from taut.technique import Setting, option, register_step
from taut.watched import BARRED, Attention, Watched, plain_attention

Seen = Tensor | Attention
Autocast = Callable[[], AbstractContextManager[Any]]


@register_step
@dataclass(frozen=True, kw_only=True)
class Distillation(Setting):
    """Choose what the recoveries that follow match of the teacher, and how.

    features: layers by name, as `block1, block2:encoder.3` where the teacher's goes by another
    name; patterns like `blocks.*` for those of one name; `auto` where the network is its teacher
    compressed: every block that holds weights, which is the outermost element of an nn.Sequential
    or nn.ModuleList around them, or else the layer itself.
    feature_loss: hint where widths differ goes through a projection that is trained along
    (FitNets), and the teacher's maps are averaged to the network's size. attention (Zagoruyko) and
    relations (MiniLM) of an nn.MultiheadAttention are those of its scores (squared distance, as
    TinyBERT has it) and of its attention and values; relations of any other layer are those of its
    outputs with themselves (MiniLMv2). relational is RKD.
    Steps whose target is `ignore`, that an argument `attention_mask` marks 0, or that attention
    takes for padding do not count.
    """

    loss: str = option(
        "auto", choices=("auto", *distances.LOGITS),
        help="distance of the outputs; auto: kl for cross-entropy, else mse",
    )  # fmt: skip
    features: str = option("", help="layers to match: names, patterns, `student:teacher`, or auto")
    feature_loss: str = option("hint", choices=distances.FEATURES, help="distance of the features")
    feature_weight: float = option(1.0, low=0, help="their price, in units of the loss")
    relation_heads: int = option(1, low=1, high=1024, help="into which relations of layers split")
    ignore: int = option(-100, help="target of steps that do not count")
    cache: str = option(
        "", help="folder for the teacher's outputs, under the run's own; nothing is kept without"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache and self.features:
            raise RecipeError(
                "distillation: cache keeps the teacher's outputs, but features need its layers, "
                f"got cache={self.cache!r} and features={self.features!r}; give one"
            )


class Teachers(nn.Module):
    """Networks to learn from: their outputs, the layers that are matched, and the projections.

    Trained with the student: its parameters are those of the projections. The teachers stand aside.
    """

    def __init__(
        self, student: nn.Module, teachers: Sequence[nn.Module], task: Task, options: Distillation,
        *, share: float, temperature: float, autocast: Autocast, precision: torch.dtype,
        folder: Path | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.task, self.options, self.autocast = task, options, autocast
        self.share, self.temperature = share, temperature
        self.networks = tuple(t.to(device_of(student)).eval() for t in teachers)
        self.caches = [
            TeacherCache((folder or Path()) / options.cache, t, precision)
            for t in (self.networks if options.cache else ())
        ]
        pairs = [_pairs(options, student, t) for t in self.networks]
        self.pairs = pairs
        attentions = options.feature_loss in ("attention", "relations")
        self.own = Watched(student, {a for p in pairs for a, _ in p}, attentions)
        self.theirs = [
            Watched(t, {b for _, b in p}, attentions)
            for t, p in zip(self.networks, pairs, strict=True)
        ]
        self.projections = nn.ModuleDict()
        try:
            self._fit(student)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop watching the networks' layers."""
        for watched in (self.own, *self.theirs):
            watched.close()

    def end_epoch(self) -> None:
        """Keep on disk what the teachers said."""
        for cache in self.caches:
            cache.end_epoch()

    def forward(self, loss: Tensor, output: Any, batch: Batch) -> Tensor:
        """The whole loss of a batch, given the task's and the network's outputs."""
        total: Tensor | float = 0.0
        for i in range(len(self.networks)):
            if self.caches:
                wanted = self.caches[i].outputs(batch, partial(self._logits_of, i))
            else:
                wanted = self._run(i, batch)
            if self.share:
                total = total + self.share * self._between(output, _logits(wanted), batch)
            total = total + self._features(i, batch)
        return (1 - self.share) * loss + total / len(self.networks)

    def _run(self, i: int, batch: Batch) -> Any:
        with torch.no_grad(), plain_attention(), self.autocast():
            return convert_to_fp32(self.networks[i](*batch.args, **batch.kwargs))

    def _logits_of(self, i: int, batch: Batch) -> Tensor:
        return _logits(self._run(i, batch))

    def _between(self, output: Any, theirs: Tensor, batch: Batch) -> Tensor:
        own = _logits(output)
        kind = self.options.loss
        if kind == "auto":
            kind = "kl" if self.task.is_classification else "mse"
        axis = 1 if self.task.is_classification and own.dim() > 1 else -1
        places = own.shape[:axis] + own.shape[axis:][1:]
        ignored = getattr(self.task.loss, "ignore_index", self.options.ignore)
        keep = _counted(batch.target, places, ignored)
        return distances.between_outputs(kind, own, theirs, axis, self.temperature, keep)

    def _features(self, i: int, batch: Batch) -> Tensor | float:
        if not self.pairs[i]:
            return 0.0
        found = []
        for a, b in self.pairs[i]:
            own, theirs = self.own.seen[a], self.theirs[i].seen[b]
            found.append(self._distance(_key(i, a, b), own, theirs, batch))
        return self.options.feature_weight * sum(found[1:], found[0]) / len(found)

    def _distance(self, key: str, own: Seen, theirs: Seen, batch: Batch) -> Tensor:
        kind = self.options.feature_loss
        if isinstance(own, Attention) and isinstance(theirs, Attention):
            return _attentions(kind, own, theirs)
        assert isinstance(own, Tensor)
        assert isinstance(theirs, Tensor)
        x, y = own.float(), theirs.float()
        steps = x.shape[:2]
        keep = _counted(batch.target, steps, self.options.ignore) if x.dim() == 3 else None
        marks = batch.kwargs.get("attention_mask")
        if x.dim() == 3 and isinstance(marks, Tensor) and marks.shape == steps:
            keep = marks.bool() if keep is None else keep & marks.bool()
        if kind == "relations":
            heads = self.options.relation_heads
            a, b = distances.relation(x, x, heads), distances.relation(y, y, heads)
            return distances.relations(a, b, keep)
        if key in self.projections:
            axis = _channels(x)
            x = self.projections[key](x.movedim(axis, -1)).movedim(-1, axis)
        if kind in ("hint", "attention") and x.dim() == 4 and x.shape[2:] != y.shape[2:]:
            y = F.adaptive_avg_pool2d(y, (x.shape[2], x.shape[3]))
        return getattr(distances, kind)(x, y, keep)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _fit(self, student: nn.Module) -> None:
        """Run all on the task's example: check every shape, drop and project what must be."""
        args, kwargs = (to_device(v, device_of(student)) for v in self.task.example())
        modes = {m: m.training for m in student.modules()}
        try:
            with plain_attention():
                output = student.eval()(*args, **kwargs)
                wanted = [t(*args, **kwargs) for t in self.networks]
        finally:
            for module, mode in modes.items():
                module.training = mode
        for i, theirs in enumerate(wanted):
            if self.share:
                _same_outputs(_logits(output), _logits(theirs))
            if self.options.features.strip() == "auto":
                self.pairs[i] = self._automatic(i, output)
            for a, b in self.pairs[i]:
                seen = self.own.look(a, "the network"), self.theirs[i].look(b, "the teacher")
                reason = _misfit(self.options, *seen)
                if reason:
                    raise RecipeError(
                        f"distillation: {self.options.feature_loss} cannot match layer {a!r} with "
                        f"the teacher's {b!r}: {reason}"
                    )
                self._project(_key(i, a, b), *seen)

    def _automatic(self, i: int, output: Any) -> list[tuple[str, str]]:
        """Of the pairs of one name, those that fit and are not the output itself."""
        found = []
        for a, b in self.pairs[i]:
            if a in self.own.seen and b in self.theirs[i].seen:
                own, theirs = self.own.seen[a], self.theirs[i].seen[b]
                if own is not output and not _misfit(self.options, own, theirs):
                    found.append((a, b))
        if not found:
            raise RecipeError(
                f"distillation: features='auto' finds no layer that {self.options.feature_loss} "
                "could match under one name in the network and its teacher; name the layers, as "
                "in features='block1:encoder.1'"
            )
        return found

    def _project(self, key: str, own: Seen, theirs: Seen) -> None:
        if self.options.feature_loss == "hint":
            assert isinstance(own, Tensor)
            assert isinstance(theirs, Tensor)
            width, wanted = (x.shape[_channels(x)] for x in (own, theirs))
            if width != wanted:
                self.projections[key] = nn.Linear(width, wanted, device=own.device)


def _pairs(options: Distillation, student: nn.Module, teacher: nn.Module) -> list[tuple[str, str]]:
    """The layers to match, by name: the student's and the teacher's."""
    own, theirs = (dict(m.named_modules()) for m in (student, teacher))
    if options.features.strip() == "auto":
        return [(b, b) for b in _blocks(teacher) if b in own]
    pairs = []
    for word in filter(None, (w.strip() for w in options.features.split(","))):
        a, colon, b = (part.strip() for part in word.partition(":"))
        if "*" in word and not colon:
            both = [n for n in own if n in theirs and fnmatch.fnmatchcase(n, word)]
            if not both:
                raise RecipeError(
                    f"distillation: features={word!r} matches no layer that the network and the "
                    f"teacher share; known: {', '.join(filter(None, own))}"
                )
            pairs += [(n, n) for n in both]
            continue
        b = b or a
        for name, known, whose in ((a, own, "the network"), (b, theirs, "the teacher")):
            if name not in known or not name:
                near = did_you_mean(name, filter(None, known))
                raise RecipeError(f"distillation: {whose} has no layer {name!r}{near}")
        pairs.append((a, b))
    return pairs


def _blocks(model: nn.Module) -> list[str]:
    """The paths of the blocks that hold weights, in order: the outermost numbered ones."""
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            path = name.split(".parametrizations.")[0].split(".")
            path = path if ".parametrizations." in name else path[:-1]
            numbers = [i for i, part in enumerate(path) if part.isdecimal()]
            found[".".join(path[: numbers[0] + 1] if numbers else path)] = None
    return [name for name in found if name]


def _misfit(options: Distillation, own: Seen, theirs: Seen) -> str:
    """Why two features cannot be compared, with their shapes; empty where they can."""
    kind = options.feature_loss
    if isinstance(own, Attention) and isinstance(theirs, Attention):
        return _attentions_misfit(kind, own, theirs)
    if not (isinstance(own, Tensor) and isinstance(theirs, Tensor)):
        return "one is an nn.MultiheadAttention and the other is not"
    x, y = own.shape, theirs.shape
    shapes = f"they give {list(x)} and {list(y)}"
    if len(x) < 2 or len(y) < 2 or x[0] != y[0]:
        return shapes
    if kind == "relations":
        if len(x) != 3 or x[:2] != y[:2]:
            return f"{shapes}; relations need [n, steps, channels] of the same steps"
        odd = [w for w in (x[2], y[2]) if w % options.relation_heads]
        return f"width {odd[0]} does not split into {options.relation_heads} heads" if odd else ""
    if kind == "attention" and (len(x) < 3 or len(y) < 3):
        return f"{shapes}; attention needs places, as in [n, channels, height, width]"
    if kind == "relational" or len(x) == len(y) == 4:  # maps are averaged to one size
        return ""
    places = [z[1:2] if len(z) == 3 else z[2:] for z in (x, y)]
    return "" if len(x) == len(y) and places[0] == places[1] else shapes


def _attentions_misfit(kind: str, own: Attention, theirs: Attention) -> str:
    x, y = own.query.shape, theirs.query.shape
    if x[:2] != y[:2]:
        return f"their queries are {list(x)} and {list(y)}"
    if kind == "attention" and own.heads != theirs.heads:
        return f"they have {own.heads} and {theirs.heads} heads"
    return f"width {x[2]} does not split into {theirs.heads} heads" if x[2] % theirs.heads else ""


def _same_outputs(own: Tensor, theirs: Tensor) -> None:
    if own.shape != theirs.shape:
        raise RecipeError(
            f"distillation: the network gives outputs of shape {list(own.shape)} for the task's "
            f"example, the teacher {list(theirs.shape)}; distil from a network of the same "
            "outputs, or match features alone with recover(distill=0)"
        )


def _attentions(kind: str, own: Attention, theirs: Attention) -> Tensor:
    """The distance of two attention layers, split into the heads of the teacher."""
    keep, heads, mask = theirs.keep, theirs.heads, theirs.mask
    if kind == "attention":
        scores = distances.scaled_scores(own.query, own.key, heads)
        wanted = distances.scaled_scores(theirs.query, theirs.key, heads)
        counted = torch.ones_like(wanted, dtype=torch.bool)
        if mask is not None:
            counted = counted & (mask > BARRED / 10)
        if keep is not None:
            counted = counted & keep[:, None, :, None]
        return distances.hint(scores, wanted, counted)

    def both(of: Callable[[Attention], tuple[Tensor, Tensor]]) -> Tensor:
        a, b = (distances.relation(*of(x), heads, mask) for x in (own, theirs))
        return distances.relations(a, b, keep)

    return both(lambda x: (x.query, x.key)) + both(lambda x: (x.value, x.value))


def _counted(target: Any, places: Sequence[int], ignored: int) -> Tensor | None:
    """Which steps count, where there is a target for each that tells."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    return target != ignored if target.shape == tuple(places) else None


def _logits(output: Any) -> Tensor:
    """The tensor of a network's outputs that is distilled."""
    output = getattr(output, "logits", output)
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise RecipeError(
            "distillation: the outputs must be a tensor, a tuple that starts with one, or have "
            f"`logits`, got {type(output).__name__}; distil features alone with recover(distill=0)"
        )
    return first


def _channels(x: Tensor) -> int:
    """Where the channels are: last in sequences, else after the examples."""
    return 2 if x.dim() == 3 else 1


def _key(i: int, a: str, b: str) -> str:
    """The name of a projection; modules cannot have dots in theirs."""
    return f"{i}:{a}:{b}".replace(".", "/")
