"""A student: another, smaller network in the place of the given one, trained by distillation.

    student(net='mobilenet_v1', width=0.5) > recover(epochs=20, learning_rate=0.001)

The student is a network of the zoo, untrained, with the inputs and outputs of the original; the
`recover` that follows trains it, half by the task and half by what the original says. Buciluă,
Caruana, Niculescu-Mizil: Model compression (KDD 2006); Hinton, Vinyals, Dean: Distilling the
knowledge in a neural network (2015). Nothing of the original's weights is kept; the layers of both
are matched only where a `distillation` step asks for it. An untrained network learns at the rate
of the task, of which `recover` takes a tenth unless it is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut import edits
from taut.edits import Edit, register_edit
from taut.errors import FormatError, RecipeError, ZooError
from taut.modules import device_of
from taut.reshaping import Reshaping
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Trace
from taut.types import Site
from taut.zoo.registry import check, create, defaults, names

SMALL_IMAGES = 64  # pixels: below, the first convolution leaves all of them


@register_step
@dataclass(frozen=True, kw_only=True)
class Student(Reshaping):
    """Put a smaller network of the zoo in the place of the original, untrained.

    Its inputs and outputs are the original's: in_channels, classes, size, vocabulary and context
    follow from the example. Options that are None are the network's own; the stem is the small one
    for images of less than 64 pixels. Raises RecipeError for an option that the network lacks, and
    where it does not fit the example or is no smaller than the original.
    """

    net: str = option("mobilenet_v1", choices=names(), help="a network of the zoo")
    width: float | None = option(None, low=0.05, help="factor on the channels, or a width")
    resolution: float | None = option(None, low=0.1, high=1, help="factor on the images' size")
    groups: int | None = option(None, low=1, help="of 1 × 1 convolutions")
    hidden: int | None = option(None, low=1, help="units of a recurrent layer")
    layers: int | None = option(None, low=1, help="recurrent layers, or blocks")
    dropout: float | None = option(None, low=0, below=1, help="while it is trained")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check(self.net, self._given())
        except ZooError as error:
            raise RecipeError(f"student: {error}") from error
        if self.only != "*":
            raise RecipeError(
                f"student replaces the whole network, got only={self.only!r}; leave it out"
            )

    def _given(self) -> dict[str, Any]:
        """The options of the network that were asked for."""
        chosen = ("width", "resolution", "groups", "hidden", "layers", "dropout")
        given = {n: getattr(self, n) for n in chosen if getattr(self, n) is not None}
        whole = [n for n in given if type(defaults(self.net).get(n)) is int]
        return given | {n: int(given[n]) for n in whole if given[n] == int(given[n])}

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        """All of them, and there may be none: nothing of the original is kept."""
        return trace.sites

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        args, kwargs = trace.example_on(model)
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise RecipeError(
                "student: networks of the zoo take one tensor, and the task's input is another; "
                "give the network's code to a task of its own"
            )
        wanted = _output(model, args[0])
        edit = FromZoo(net=self.net, options=self._options(args[0], wanted))
        try:
            edit.blank(model)
            built = create(self.net, **edit.options)
            student = built.to(device_of(model), _dtype(model))
            got = _output(student, args[0])
        except (FormatError, RuntimeError, ZooError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(f"student: {self.net} does not fit the task: {reason}") from error
        if got.shape != wanted.shape:
            raise RecipeError(
                f"student: {self.net} gives outputs of {list(got.shape)}, and the original of "
                f"{list(wanted.shape)}; choose a network for such outputs"
            )
        edits.note(student, edit)  # alone: what was done to the original is gone with it
        return student.train(model.training)

    def _options(self, x: Tensor, output: Tensor) -> dict[str, Any]:
        """What was asked for, and what follows from the example's input and output."""
        channels = output.shape[1] if output.dim() > 1 else 1
        found: dict[str, Any] = {"classes": channels, "vocabulary": channels}
        if x.dim() == 4:
            small = min(x.shape[2:]) < SMALL_IMAGES
            found |= {"in_channels": x.shape[1], "size": x.shape[3]}
            found["stem"] = "small" if small else "paper"
        elif x.dim() == 2:
            found |= {"in_channels": x.shape[1], "size": 1, "context": x.shape[1]}
        known = defaults(self.net)
        return {n: v for n, v in (found | self._given()).items() if n in known}


def _output(model: nn.Module, x: Tensor) -> Tensor:
    training = model.training
    with torch.no_grad():
        output = model.eval()(x)
    model.train(training)
    if not isinstance(output, Tensor):
        raise RecipeError(
            f"student: the network must give one tensor, got {type(output).__name__}; "
            "wrap it so that it gives what the loss takes"
        )
    return output


def _dtype(model: nn.Module) -> torch.dtype:
    held = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(held, torch.float32)


@register_edit
@dataclass(frozen=True, kw_only=True)
class FromZoo(Edit):
    """Another network in the place of the whole: one of the zoo, with these options.

    It is the first edit of a file.
    """

    net: str
    options: dict[str, int | float | str | bool]

    def blank(self, model: nn.Module) -> nn.Module:
        """The network without numbers; refused where it would be larger than the model."""
        try:
            with torch.device("meta"):
                built = create(self.net, **self.options)
        except (OverflowError, RuntimeError, TypeError, ZooError) as error:
            raise FormatError(f"from_zoo: {str(error).splitlines()[0]}") from error
        held, makes = _numbers(model), _numbers(built)
        if makes > held:
            raise FormatError(
                f"{self.net} would hold {makes:,} numbers and the original holds {held:,}; "
                "a student is smaller, so take a smaller width or network"
            )
        return built

    def replay(self, model: nn.Module) -> nn.Module:
        if edits.of(model):  # what came before would be in vain, and thousands would take hours
            raise FormatError("from_zoo: a student replaces a whole network; it must come first")
        student = self.blank(model).to(_dtype(model)).to_empty(device=device_of(model))
        with torch.no_grad():
            for tensor in (*student.parameters(), *student.buffers()):
                tensor.zero_()
        return student.train(model.training)


def _numbers(model: nn.Module) -> int:
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))
