"""Tasks: what a task.py must hold, the forms a batch may have, and how a score is taken."""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from taut.errors import TaskError
from taut.task import Batch, Task, load_task, top1

X = torch.arange(24.0).reshape(6, 4) / 24
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def task(**changes: Any) -> Task:
    return Task(**{"train": BATCHES, "test": BATCHES, **changes})


class Constant(nn.Module):
    """Answers class 1 for every example; says whether it was in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 3.0, 1.0]))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.logits.expand(len(x), 3)


# Loading a file

GOOD = """
import torch
from torch import nn

def model():
    return nn.Linear(4, 3)

def train():
    return [(torch.zeros(2, 4), torch.tensor([0, 1]))]

def test():
    return train()
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a task file."""

    def write(source: str, name: str = "digits/task.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    return write


def test_a_good_file_loads(write: Callable[..., Path]) -> None:
    loaded = load_task(write(GOOD))
    assert loaded.name == "digits"
    assert (loaded.better, loaded.learning_rate, loaded.chooses_by) == ("higher", 0.01, "test")
    assert loaded.is_classification
    assert loaded.loss is F.cross_entropy
    assert loaded.model is not None
    assert loaded.evaluate(loaded.model()) in (0.0, 0.5, 1.0)
    assert load_task(str(write(GOOD, "images.py"))).name == "images"


def test_optional_names_are_used(write: Callable[..., Path]) -> None:
    more = """
    validation = train
    better = "lower"
    learning_rate = 1
    loss = nn.MSELoss()
    def score(output, target):
        return 0.25
    def example():
        return torch.ones(3, 4)
    """
    loaded = load_task(write(GOOD + textwrap.dedent(more)))
    assert loaded.chooses_by == "validation"
    assert loaded.better == "lower"
    assert loaded.learning_rate == 1.0
    assert not loaded.is_classification
    assert loaded.evaluate(nn.Linear(4, 3), "validation") == 0.25
    assert loaded.example(2)[0][0].tolist() == [[1.0] * 4] * 2


def test_a_file_may_import_its_neighbours_and_hold_dataclasses(write: Callable[..., Path]) -> None:
    write("WIDTH = 5", "digits/neighbour_of_the_task.py")
    head = """
    from __future__ import annotations
    from dataclasses import dataclass
    from neighbour_of_the_task import WIDTH

    @dataclass
    class Settings:
        width: int = WIDTH
    """
    path = write(textwrap.dedent(head) + GOOD.replace("nn.Linear(4, 3)", "nn.Linear(4, WIDTH)"))
    built = load_task(path).model
    assert built is not None
    assert built().out_features == 5


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "task.py", tmp_path):
        with pytest.raises(TaskError, match=r"no task file at .*; name a Python file with model\("):
            load_task(path)


def test_a_file_of_another_name(write: Callable[..., Path]) -> None:
    with pytest.raises(
        TaskError, match=r"task\.txt is not a Python file; its name must end in .py"
    ):
        load_task(write(GOOD, "task.txt"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def model(:", "SyntaxError: invalid syntax"),
        ("raise ValueError('where is my data?')", r"ValueError: where is my data\?"),
        ("import sys; sys.exit('usage: task.py DATA')", "SystemExit: usage: task.py DATA"),
    ],
)
def test_a_file_that_does_not_import(write: Callable[..., Path], source: str, reason: str) -> None:
    with pytest.raises(TaskError, match=rf"task\.py does not import: {reason}") as caught:
        load_task(write(source))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["model", "train", "test"])
@pytest.mark.parametrize("instead", ["", "{} = 5"])
def test_a_file_that_lacks_a_function(write: Callable[..., Path], name: str, instead: str) -> None:
    source = GOOD.replace(f"def {name}(", f"def other_{name}(") + instead.format(name)
    with pytest.raises(TaskError, match=rf"lacks a function {name}\(\); a task needs model\(\)"):
        load_task(write(source))


@pytest.mark.parametrize(
    ("made", "word"), [("5", "an int"), ("None", "a NoneType"), ("nn.Linear", "a type")]
)
def test_model_that_returns_no_module(write: Callable[..., Path], made: str, word: str) -> None:
    built = load_task(write(GOOD.replace("nn.Linear(4, 3)", made))).model
    assert built is not None
    with pytest.raises(TaskError, match=rf"model\(\) must return an nn\.Module, got {word}"):
        built()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("better = 'up'", "better must be 'higher' or 'lower', got 'up'"),
        ("loss = 'mse'", r"loss must be a function of \(output, target\), got 'mse'"),
        ("score = 5", r"score must be a function of \(output, target\), got 5"),
        ("learning_rate = 0", "learning_rate must be a number above 0, got 0"),
        ("learning_rate = 'fast'", "learning_rate must be a number above 0, got 'fast'"),
        ("learning_rate = float('nan')", "learning_rate must be a number above 0, got nan"),
        ("calibration = 0", "calibration must be a number of examples, got 0"),
    ],
)
def test_wrong_settings(write: Callable[..., Path], line: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        load_task(write(GOOD + line))


# Data


def test_a_generator_that_is_used_up_is_named() -> None:
    spent = (b for b in BATCHES[:0])
    with pytest.raises(TaskError, match=r"no batch; .* a generator is used up after one pass"):
        list(task(train=lambda: spent).batches("train"))


def batches_of(data: Any) -> list[Batch]:
    return list(task(train=data).batches("train"))


@pytest.mark.parametrize("data", [[], (), list, lambda: iter(())])
def test_no_data(data: Any) -> None:
    with pytest.raises(TaskError, match=r"train\(\) yields no batch; Taut needs at least one"):
        batches_of(data)


@pytest.mark.parametrize(
    ("data", "word"), [(5, "an int"), (None, "a NoneType"), (lambda: 5, "an int")]
)
def test_data_that_are_no_iterable(data: Any, word: str) -> None:
    with pytest.raises(TaskError, match=rf"must return an iterable of .*, got {word}"):
        batches_of(data)


@pytest.mark.parametrize("data", [(b for b in BATCHES), zip(X, Y, strict=True), iter(BATCHES)])
def test_data_that_are_used_up_after_one_pass(data: Any) -> None:
    with pytest.raises(TaskError, match=r"validation must be read more than once, got a .*; give"):
        task(validation=data)


@pytest.mark.parametrize(
    ("item", "form"),
    [
        (X, r"a Tensor of shape \[6, 4\]"),
        (torch.tensor(1.0), r"a Tensor of shape \[\]"),
        ((X,), "a tuple of 1"),
        ((X, Y, Y), "a tuple of 3"),
        ([X, Y, Y], "a list of 3"),
        ({"x": X, "y": Y}, "a dict of 2"),
        ("xy", "a str of 2"),
        (5, "an int"),
        (None, "a NoneType"),
    ],
)
def test_batches_that_are_no_pairs(item: Any, form: str) -> None:
    said = rf"train\(\) must yield pairs \(input, target\), got {form}$"
    with pytest.raises(TaskError, match=said):
        batches_of([item])


@pytest.mark.parametrize(
    ("given", "word"), [(5, "an int"), ("x", "a str"), (None, "a NoneType"), ({1}, "a set")]
)
def test_inputs_of_another_form(given: Any, word: str) -> None:
    said = rf"train\(\): an input must be a tensor, a tuple or a dict of tensors, got {word}"
    with pytest.raises(TaskError, match=said):
        batches_of([(given, Y)])


def test_a_wrong_batch_is_found_where_it_comes() -> None:
    given = task(train=[BATCHES[0], (X,)]).batches("train")
    assert next(given).size == 4
    with pytest.raises(TaskError, match="pairs"):
        next(given)


@pytest.mark.parametrize(
    ("given", "args", "names"),
    [
        (X, 1, []),
        ((X, X), 2, []),
        ([X, X, X], 3, []),
        ({"x": X, "mask": X}, 0, ["x", "mask"]),
    ],
)
def test_forms_of_an_input(given: Any, args: int, names: list[str]) -> None:
    (batch,) = batches_of([[given, Y]])
    assert len(batch.args) == args
    assert list(batch.kwargs) == names
    assert all(v is X for v in (*batch.args, *batch.kwargs.values()))
    assert batch.target is Y


@pytest.mark.parametrize(
    ("target", "size"),
    [(Y[:5], 5), (torch.tensor(1), 6), ({"label": 0}, 6), (None, 6), ([1, 2], 6)],
)
def test_size_of_a_batch(target: Any, size: int) -> None:
    (batch,) = batches_of([(X, target)])
    assert batch.size == size


def test_everything_in_a_batch_goes_to_the_device() -> None:
    item = ({"x": X, "deep": (X, [X])}, {"label": Y, "weights": [X]})
    (batch,) = task(train=[item]).batches("train", torch.device("meta"))
    x, (a, (b,)) = batch.kwargs["x"], batch.kwargs["deep"]
    moved = (x, a, b, batch.target["label"], batch.target["weights"][0])
    assert {v.device.type for v in moved} == {"meta"}


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Data without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (BATCHES, 2),
        (lambda: BATCHES, 2),
        (DataLoader(TensorDataset(X, Y), batch_size=4), 2),
        (DataLoader(Stream(), batch_size=4), None),
        (lambda: iter(BATCHES), None),
    ],
)
def test_length_where_the_data_tell(data: Any, length: int | None) -> None:
    made = task(train=data)
    assert made.length("train") == length
    for _ in range(2):
        assert [b.size for b in made.batches("train")] == [4, 2]


# Examples


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 64])
def test_the_example_has_the_wanted_batch(batch: int) -> None:
    (x,), kwargs = task().example(batch)
    assert kwargs == {}
    assert x.tolist() == [X[i % 4].tolist() for i in range(batch)]


def test_only_tensors_with_the_batch_are_resized() -> None:
    table, scalar = torch.zeros(3, 2), torch.tensor(5.0)
    made = task(example=lambda: {"x": X, "y": Y, "table": table, "scalar": scalar, "flag": True})
    args, kwargs = made.example(8)
    assert args == ()
    assert [len(kwargs["x"]), len(kwargs["y"])] == [8, 8]
    assert kwargs["table"] is table
    assert kwargs["scalar"] is scalar
    assert kwargs["flag"] is True


def test_an_example_of_another_form() -> None:
    with pytest.raises(TaskError, match=r"example\(\): an input must be a tensor"):
        task(example=lambda: 5).example()


# Scores


def test_top1() -> None:
    output = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert top1(output, torch.tensor([1, 1, 1])) == pytest.approx(2 / 3)


def test_by_default_the_score_is_top1_over_all_batches() -> None:
    assert task().evaluate(Constant()) == pytest.approx(2 / 6)
    uneven = [(X[:5], torch.tensor([1, 1, 1, 1, 1])), (X[5:], torch.tensor([0]))]
    assert task(test=uneven).evaluate(Constant()) == pytest.approx(5 / 6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_puts_the_mode_back(training: bool) -> None:
    model = Constant().train(training)
    task().evaluate(model)
    assert model.modes == [False, False]
    assert model.training is training

    def breaks(output: Tensor, target: Tensor) -> float:
        raise KeyError("score")

    with pytest.raises(KeyError):
        task(score=breaks).evaluate(model)
    with pytest.raises(TaskError):
        task(test=[BATCHES[0], X]).evaluate(model)
    assert model.training is training


def test_a_function_gets_everything_joined() -> None:
    seen: list[tuple[int, ...]] = []

    def score(output: Tensor, target: Tensor) -> Tensor:
        seen.append((*output.shape, *target.shape))
        assert not output.requires_grad
        return torch.tensor(0.75)

    value = task(score=score).evaluate(Constant())
    assert value == 0.75
    assert type(value) is float
    assert seen == [(6, 3, 6)]


@pytest.mark.parametrize("what", ["outputs", "targets"])
def test_a_function_cannot_get_what_does_not_join(what: str) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x, x) if what == "outputs" else x

    target: Any = Y if what == "outputs" else {"label": Y}
    said = rf"a function gets all {what} as one tensor, got a (tuple|dict) from a batch; use an"
    with pytest.raises(TaskError, match=said):
        task(test=[(X, target)]).evaluate(Two())


def test_a_metric_of_torchmetrics_is_updated_batch_by_batch() -> None:
    metric = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
    made = task(score=metric)
    assert made.better == "higher"
    for _ in range(2):  # it starts over each time
        assert made.evaluate(Constant()) == pytest.approx(2 / 6)


def test_a_metric_knows_that_lower_is_better() -> None:
    batches = [(X, X)]
    made = Task(train=batches, test=batches, score=torchmetrics.MeanSquaredError())
    assert made.better == "lower"
    assert made.evaluate(nn.Identity()) == 0.0
    assert task(score=torchmetrics.MeanSquaredError(), better="higher").better == "higher"
    assert task(score=lambda o, t: 0.0, better="lower").better == "lower"
    assert task(score=torchmetrics.MeanMetric()).better == "higher"


class Count:
    """A metric that is no nn.Module."""

    def reset(self) -> None:
        self.seen = 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.seen += len(target)

    def compute(self) -> int:
        return self.seen


def test_any_object_with_the_methods_of_a_metric_will_do() -> None:
    assert task(score=Count()).evaluate(Constant()) == 6.0


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(None, True), (F.cross_entropy, True), (nn.CrossEntropyLoss(), True), (F.mse_loss, False)],
)
def test_classification_is_cross_entropy_however_it_is_named(loss: Any, expected: bool) -> None:
    assert task(loss=loss).is_classification is expected


# Calibration


def test_calibration_loss_is_the_mean_over_examples() -> None:
    model = Constant().train()
    loss = task().calibration_loss()
    wanted = F.cross_entropy(model.logits.detach().expand(6, 3), Y)
    assert loss(model) == pytest.approx(float(wanted), rel=1e-6)
    assert model.modes == [False, False]
    assert model.training


def test_calibration_loss_is_the_same_each_time() -> None:
    data = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    loss = task(train=data).calibration_loss(examples=3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    first = loss(model)
    assert all(loss(model) == first for _ in range(5))


@pytest.mark.parametrize(("examples", "read"), [(1, 1), (4, 1), (5, 2), (2048, 3)])
def test_calibration_reads_no_more_than_it_needs(examples: int, read: int) -> None:
    taken: list[int] = []

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate([*BATCHES, BATCHES[0]]):
            taken.append(i)
            yield batch

    loss = task(train=data, calibration=examples).calibration_loss()
    assert len(taken) == read
    loss(Constant())
    assert len(taken) == read


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda o, t: 1.0, "a float"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"a Tensor of shape \[4\]"),
    ],
)
def test_a_loss_is_a_tensor_of_one_number(loss: Any, got: str) -> None:
    with pytest.raises(TaskError, match=f"loss must return a tensor of one number, got {got}"):
        task(loss=loss).calibration_loss()(Constant())


@pytest.mark.parametrize(
    ("score", "got"),
    [
        (lambda o, t: None, "a NoneType"),
        (lambda o, t: o.argmax(1) == t, r"a Tensor of shape \[6\]"),
    ],
)
def test_a_score_is_one_number(score: Any, got: str) -> None:
    with pytest.raises(TaskError, match=f"score must return one number, got {got}"):
        task(score=score).evaluate(Constant())


def test_calibration_puts_the_mode_back_when_the_loss_breaks() -> None:
    model = Constant().train()
    with pytest.raises(ValueError, match="batch_size"):
        task(loss=lambda o, t: F.nll_loss(o, t[:1])).calibration_loss()(model)
    assert model.training
