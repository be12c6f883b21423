"""A task: what a network is for. Its data, its loss, its score, an example input."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from taut.errors import TaskError
from taut.modules import device_of, to_device
from taut.trace import Example
from taut.types import Direction

Data = Iterable[Any] | Callable[[], Iterable[Any]]


def top1(output: Tensor, target: Tensor) -> float:
    """The fraction of targets whose largest output is theirs.

    output: [n, classes] for a target [n], or [n, classes, ...] for [n, ...], as for cross-entropy.
    """
    return int((output.argmax(1) == target).sum()) / target.numel()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch, on the model's device: the arguments of its forward, and the target."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any

    @property
    def size(self) -> int:
        """How many examples: the length of the target, or else of the first argument."""
        given = (self.target, *self.args, *self.kwargs.values())
        return next((len(t) for t in given if isinstance(t, Tensor) and t.dim()), 1)

    def to(self, device: torch.device | None) -> Batch:
        """The same batch on another device; None leaves it where it is."""
        return Batch(
            args=tuple(to_device(a, device) for a in self.args),
            kwargs={k: to_device(v, device) for k, v in self.kwargs.items()},
            target=to_device(self.target, device),
        )

    def examples(self) -> Iterator[Batch]:
        """Its examples, as batches of one.

        The first input's length is their number n. Tensors of n rows, or of a multiple of n in
        the target, are cut; everything else belongs to all. Raises TaskError for a target that
        does not divide so.
        """
        given = tree_leaves((self.args, self.kwargs))
        n = next((len(t) for t in given if isinstance(t, Tensor) and t.dim()), 1)
        targets = [t for t in tree_leaves(self.target) if isinstance(t, Tensor) and t.dim()]
        odd = [t for t in targets if len(t) % n]
        if odd:
            raise TaskError(
                f"gradients of single examples need a target of {n} rows, or a multiple, for an "
                f"input of {n}, got one of shape {list(odd[0].shape)}; put the batch first"
            )

        def part(value: Any, i: int, target: bool) -> Any:
            if not (isinstance(value, Tensor) and value.dim()):
                return value
            rows = len(value) // n if target else 1
            return value[i * rows : (i + 1) * rows] if target or len(value) == n else value

        for i in range(n):
            yield Batch(
                args=tree_map(lambda v: part(v, i, False), self.args),  # noqa: B023
                kwargs=tree_map(lambda v: part(v, i, False), self.kwargs),  # noqa: B023
                target=tree_map(lambda v: part(v, i, True), self.target),  # noqa: B023
            )


class Task:
    """What a network is for.

    train, test: iterables of (input, target), DataLoaders as a rule, or functions that return
        them. An input is a tensor, a tuple (positional arguments) or a dict (keyword arguments).
    validation: like test; which epoch was best is read from it. Where it is missing the test data
        choose, which flatters the score a little; the report says so.
    loss: (output, target) → scalar tensor. Default: cross-entropy.
    score: a torchmetrics metric, or a function of all outputs and targets, joined along the first
        dimension. Default: top-1 accuracy.
    better: `higher` or `lower`; read off a metric that knows.
    example: an input without its target, as a batch. Default: two examples of the test data.
    learning_rate: the rate the network was trained at; recover takes a tenth of it (Han 2015).
    model: a function that returns the trained network, where the task knows one.
    about: what exported files are to tell of the network, as JSON: labels, preprocessing.
    show: (the arguments of one example) → its text, or its image as a tensor, for reports.
    calibration: how many training examples are read, at least, to learn what weights meet and how
        often: what second-order rounding, weighted ranks and the like go by.
    name, source: what the run is called, and the file that the task came from.
    """

    def __init__(
        self,
        *,
        train: Data,
        test: Data,
        validation: Data | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        score: Any = None,
        better: Direction | None = None,
        example: Callable[[], Any] | None = None,
        learning_rate: float = 1e-2,
        model: Callable[[], nn.Module] | None = None,
        name: str = "task",
        source: Path | None = None,
        about: Mapping[str, Any] | None = None,
        show: Callable[..., str | Tensor] | None = None,
        calibration: int = 1024,
    ) -> None:
        self.name = name
        if type(calibration) is not int or calibration < 1:
            raise TaskError(f"calibration must be a number of examples, got {calibration!r}")
        self.calibration = calibration
        self.show = show
        self.about = dict(about or {})
        self.source = source
        self.model = model
        self.loss: Callable[[Any, Any], Tensor] = loss or F.cross_entropy
        self.is_classification = self.loss is F.cross_entropy or isinstance(
            self.loss, nn.CrossEntropyLoss
        )
        self.score: Any = top1 if score is None else score
        for what, given in (("loss", self.loss), ("score", self.score)):
            if not callable(given) and not hasattr(given, "compute"):
                raise TaskError(f"{what} must be a function of (output, target), got {given!r}")
        is_number = isinstance(learning_rate, int | float)
        if not is_number or not 0 < learning_rate < math.inf:
            raise TaskError(f"learning_rate must be a number above 0, got {learning_rate!r}")
        self.learning_rate = float(learning_rate)
        self._data = {"train": train, "test": test, "validation": validation}
        for split, data in self._data.items():
            if isinstance(data, Iterator) and type(data).__module__ in ("builtins", "itertools"):
                raise TaskError(
                    f"{split} must be read more than once, got {_word(data)}, which is used up "
                    "after one pass; give a list, a DataLoader or a function that returns it"
                )
        self._example = example
        knows = getattr(self.score, "higher_is_better", None)
        if better not in (None, "higher", "lower"):
            raise TaskError(f"better must be 'higher' or 'lower', got {better!r}")
        self.better: Direction = better or ("lower" if knows is False else "higher")

    @property
    def chooses_by(self) -> str:
        """The split by which the best epoch is chosen."""
        return "test" if self._data["validation"] is None else "validation"

    def batches(self, split: str, device: torch.device | None = None) -> Iterator[Batch]:
        """The batches of `train`, `test` or `validation`, each checked for its form."""
        source = self._data[split]
        data = source() if callable(source) else source
        if not isinstance(data, Iterable):
            raise TaskError(
                f"{split}() must return an iterable of (input, target) batches, got {_word(data)}"
            )
        empty = True
        for item in data:
            empty = False
            yield self._batch(item, split, device)
        if empty:
            spent = "; a generator is used up after one pass" if isinstance(data, Iterator) else ""
            raise TaskError(
                f"{split}() yields no batch; Taut needs at least one (input, target){spent}"
            )

    @staticmethod
    def _batch(item: Any, split: str, device: torch.device | None) -> Batch:
        if not isinstance(item, tuple | list) or len(item) != 2:
            form = _word(item)
            if isinstance(item, Sized) and not isinstance(item, Tensor):
                form += f" of {len(item)}"
            raise TaskError(f"{split}() must yield pairs (input, target), got {form}")
        given, target = item
        args, kwargs = _arguments(given, split)
        return Batch(args=args, kwargs=kwargs, target=target).to(device)

    def length(self, split: str) -> int | None:
        """The number of batches of a split, where its iterable tells."""
        source = self._data[split]
        data = source() if callable(source) else source
        try:
            return len(cast(Any, data))
        except TypeError:  # a stream, or a DataLoader of one
            return None

    def example(self, batch: int = 2) -> Example:
        """Arguments of one forward with `batch` examples."""
        if self._example is not None:
            args, kwargs = _arguments(self._example(), "example")
        else:
            first = next(self.batches("test"))
            args, kwargs = first.args, first.kwargs
        resize = _Resize(batch, args, kwargs)
        return tuple(resize(a) for a in args), {k: resize(v) for k, v in kwargs.items()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "test") -> float:
        """The network's score on a split, in eval mode; the mode is put back."""
        device, was_training = device_of(model), model.training
        metric = self.score if hasattr(self.score, "compute") else None
        if metric is not None:
            metric.reset()
            if hasattr(metric, "to"):
                metric.to(device)
        outputs, targets = [], []
        model.eval()
        try:
            for batch in self.batches(split, device):
                output = model(*batch.args, **batch.kwargs)
                if metric is not None:
                    metric.update(output, batch.target)
                else:
                    outputs.append(output)
                    targets.append(batch.target)
        finally:
            model.train(was_training)
        if metric is not None:
            return _number("score", metric.compute())
        found = self.score(_joined(outputs, "outputs"), _joined(targets, "targets"))
        return _number("score", found)

    def loss_of(self, output: Any, target: Any) -> Tensor:
        """The loss of one batch, a tensor of one number. Raises TaskError for anything else."""
        loss: Any = self.loss(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TaskError(f"loss must return a tensor of one number, got {_word(loss)}")
        return loss

    def calibration_loss(self, examples: int | None = None) -> CalibrationLoss:
        """The loss on the same few training batches.

        examples: how many are read at least, in whole batches; as many as the task says by default.
        """
        examples = self.calibration if examples is None else examples
        kept: list[Batch] = []
        for batch in self.batches("train"):
            kept.append(batch)
            if sum(b.size for b in kept) >= examples:
                break
        return CalibrationLoss(self, kept)


class CalibrationLoss:
    """A task's loss on the batches that it keeps, in eval mode; the network's mode is put back."""

    def __init__(self, task: Task, batches: Sequence[Batch]) -> None:
        self.task, self.batches = task, batches

    def __call__(self, model: nn.Module) -> float:
        """The mean over the examples."""
        total = 0.0
        with torch.no_grad(), _evaluating(model):
            for batch in self.batches:
                total += float(self._loss(model, batch)) * batch.size
        return total / sum(b.size for b in self.batches)

    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        """The loss of each example alone, to be differentiated."""
        with _evaluating(model):
            for batch in self.batches:
                for one in batch.examples():
                    yield self._loss(model, one)

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        batch = batch.to(device_of(model))
        return self.task.loss_of(model(*batch.args, **batch.kwargs), batch.target)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def load_task(path: str | Path) -> Task:
    """A task from a Python file with `model()`, `train()` and `test()`.

    The file may also define `validation()`, `loss`, `score`, `better`, `example()`,
    `learning_rate`, `about`, `show()` and `calibration`. Raises TaskError where it does not import,
    or lacks one of the three.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"no task file at {path}; name a Python file with model(), train(), test()")
    spec = importlib.util.spec_from_file_location(f"taut_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as for a script that Python runs: its neighbours can be imported
        sys.path.insert(0, folder)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise TaskError(f"{path} does not import: {type(error).__name__}: {error}") from error
    for name in ("model", "train", "test"):
        if not callable(getattr(module, name, None)):
            raise TaskError(
                f"{path} lacks a function {name}(); a task needs model(), train() and test()"
            )
    optional = (
        "validation", "loss", "score", "better", "example", "learning_rate", "about", "show",
        "calibration",
    )  # fmt: skip
    given = {n: getattr(module, n) for n in optional if hasattr(module, n)}
    return Task(
        train=module.train, test=module.test, model=_checked(module.model, path), **given,
        name=path.stem if path.stem != "task" else path.resolve().parent.name, source=path,
    )  # fmt: skip


def _checked(model: Callable[[], Any], path: Path) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        built = model()
        if not isinstance(built, nn.Module):
            raise TaskError(f"{path}: model() must return an nn.Module, got {_word(built)}")
        return built

    return build


def _arguments(given: Any, split: str) -> Example:
    if isinstance(given, dict):
        return (), given
    if isinstance(given, tuple | list):
        return tuple(given), {}
    if isinstance(given, Tensor):
        return (given,), {}
    raise TaskError(
        f"{split}(): an input must be a tensor, a tuple or a dict of tensors, got {_word(given)}"
    )


class _Resize:
    """Repeats or cuts the tensors that share the batch dimension to the wanted batch."""

    def __init__(self, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batch = batch
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()]
        self.now = tensors[0].shape[0] if tensors else 0

    def __call__(self, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dim() and value.shape[0] == self.now):
            return value
        times = -(-self.batch // max(self.now, 1))
        return value.repeat(times, *(1 for _ in value.shape[1:]))[: self.batch]


def _joined(parts: list[Any], what: str) -> Tensor:
    if not all(isinstance(p, Tensor) for p in parts):
        raise TaskError(
            f"score: a function gets all {what} as one tensor, got {_word(parts[0])} from a batch; "
            "use an object with update(output, target), compute() and reset() instead"
        )
    return torch.cat(parts)


def _number(what: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(f"{what} must return one number, got {_word(value)}") from error
    if math.isnan(number):
        raise TaskError(f"{what} is NaN; look for NaN in the network's outputs or the test data")
    return number


def _word(value: Any) -> str:
    name = type(value).__name__
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}{shape}"
