"""Students: another network in the original's place, trained, stored, reloaded, or refused."""

import os
from pathlib import Path

import pytest
import torch
from conftest import digits_task
from torch import nn
from torch.nn import functional as F

import taut
from taut import edits
from taut.container import encode
from taut.data import Batches
from taut.errors import FormatError, RecipeError
from taut.modules import clone
from taut.packed import Plain
from taut.techniques import Student
from taut.techniques.student import FromZoo
from taut.zoo import LstmLanguageModel


def images_task():
    """The digits as images of 8 × 8."""

    def square(data):
        x = data.inputs.unflatten(1, (1, 8, 8))
        return Batches(x, data.targets, data.batch_size, data.shuffle)

    return digits_task(**{n: square(d) for n, d in digits_task()._data.items()})


def teacher():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, 10),
    ).eval()  # fmt: skip


@pytest.fixture
def task():
    return images_task()


VGG = "student(net='vgg_small', width=0.05)"


def placed(net, task, step):
    return taut.apply(net, step, task)


def test_a_whole_run_trains_a_student_then_recodes_it(task, tmp_path):
    original = teacher()
    taut.recover(original, task, taut.Recover(epochs=4, learning_rate=3e-3))
    before = {n: t.clone() for n, t in original.state_dict().items()}
    recipe = f"{VGG} > recover(epochs=6, learning_rate=0.01) > share_values(bits=5) > recover"
    result = taut.compress(original, task, recipe, folder=tmp_path / "run")
    assert all(torch.equal(t, before[n]) for n, t in original.state_dict().items())
    assert result.measurement.score > 0.85
    assert result.measurement.parameters < 15_000 < result.original.parameters
    assert result.measurement.size_bytes < 15_000
    loaded = taut.load(tmp_path / "run" / "net.taut", teacher())
    x = next(task.batches("test")).args[0]
    assert torch.equal(loaded(x), result.model(x))
    assert taut.inspect(tmp_path / "run" / "net.taut").edits == ("from_zoo",)
    taut.pack(loaded, tmp_path / "again.taut")
    again, first = (tmp_path / n for n in ("again.taut", "run/net.taut"))
    assert again.read_bytes() == first.read_bytes()


def test_killed_a_run_goes_on_with_its_student(task, tmp_path):
    recipe = f"{VGG} > recover(epochs=2)"
    whole = taut.compress(teacher_of_numbers(), task, recipe, folder=tmp_path / "whole")

    class Killer(taut.Watch):
        def on_batch(self, epoch, of, batch, batches):
            if epoch == 2:
                raise KeyboardInterrupt

    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        taut.compress(teacher_of_numbers(), task, recipe, folder=folder, watch=Killer())
    again = taut.compress(teacher_of_numbers(), task, recipe, folder=folder)
    assert again.measurement.score == whole.measurement.score
    a, b = (tmp_path / n / "net.taut" for n in ("killed", "whole"))
    assert a.read_bytes() == b.read_bytes()


def teacher_of_numbers():
    torch.manual_seed(3)
    return teacher()


@pytest.mark.parametrize(
    ("net", "options", "expected"),
    [
        ("mobilenet_v1", {"width": 0.1}, {"stem": "small", "in_channels": 1, "classes": 10}),
        ("vgg_small", {"width": 0.05}, {"size": 8, "in_channels": 1, "classes": 10}),
        ("lenet_300_100", {}, {"size": 8, "in_channels": 1, "classes": 10}),
        ("shufflenet_v1", {"width": 0.2, "groups": 2}, {"stem": "small", "groups": 2}),
    ],
)
def test_options_follow_from_the_example(net, options, expected, task):
    student = placed(teacher(), task, Student(net=net, **options))
    (edit,) = edits.of(student)
    assert edit.net == net
    assert expected.items() <= edit.options.items()
    assert options.items() <= edit.options.items()
    assert student(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_flat_inputs_and_tokens_have_students_too(tmp_path):
    wide = nn.Sequential(nn.Linear(64, 800), nn.ReLU(), nn.Linear(800, 10))
    student = placed(wide, digits_task(), Student(net="lenet_300_100"))
    assert student(torch.rand(2, 64)).shape == (2, 10)
    tokens = torch.randint(30, (8, 12))
    task = taut.Task(train=Batches(tokens, tokens, 4), test=Batches(tokens, tokens, 4))
    original = LstmLanguageModel(30, 64, 128)
    for step in (
        Student(net="gru_language_model", hidden=32, layers=2),
        Student(net="transformer_language_model", width=32, layers=1),
        Student(net="lstm_language_model", hidden=32),
    ):
        student = placed(clone(original), task, step)
        assert student(tokens).shape == (8, 30, 12)
        taut.pack(student, tmp_path / "net.taut")
        loaded = taut.load(tmp_path / "net.taut", clone(original))
        assert F.mse_loss(loaded(tokens), student.eval()(tokens)) < 1e-4


def test_a_student_takes_the_originals_type_and_mode(task):
    for training in (True, False):
        original = teacher().train(training)
        student = placed(original, task, Student(net="vgg_small", width=0.05))
        assert student.training is training
        assert edits.replay(original, edits.of(student)).training is training
    double = teacher().double()
    edit = FromZoo(net="lenet_300_100", options={"size": 8})
    assert {p.dtype for p in edit.replay(double).parameters()} == {torch.float64}


def test_untrained_it_is_drawn_by_the_seed(task):
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(placed(teacher(), task, Student(net="vgg_small", width=0.05)).state_dict())
    assert all(torch.equal(t, nets[1][n]) for n, t in nets[0].items())
    assert any(not torch.equal(t, nets[2][n]) for n, t in nets[0].items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("student(net='mobilenet')", "student: net has no choice 'mobilenet'; did you mean"),
        ("student(net='nin', groups=2)", "student: nin has no option 'groups'; known: classes"),
        ("student(width=9.0)", "student: mobilenet_v1: width must be from 0.05 to 8, got 9.0; 1"),
        ("student(width=0.01)", r"student: width must lie in \[0.05, inf\), got 0.01"),
        ("student(only='0.*')", r"student replaces the whole network, got only='0.\*'; leave it"),
        (
            "student(net='transformer_language_model', width=1.5)",
            "width must be int, got 1.5; it is a count",
        ),
    ],
)
def test_bad_options_are_refused_when_it_is_written(text, said):
    with pytest.raises(RecipeError, match=said):
        taut.Recipe.parse(text)


def test_what_does_not_fit_is_refused_and_the_original_untouched(task):
    net = teacher()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    held = sum(t.numel() for t in before.values())
    larger = rf"mobilenet_v1 would hold [\d,]+ numbers and the original holds {held:,}; a student"
    for step, said in (
        (Student(), f"student: mobilenet_v1 does not fit the task: {larger} is smaller, so take"),
        (Student(net="lenet_5"), "lenet_5 does not fit the task: from_zoo: lenet_5: size must be"),
        (
            Student(net="gru_language_model", hidden=8),
            "gru_language_model does not fit the task: a language model takes tokens",
        ),
    ):
        with pytest.raises(RecipeError, match=said):
            placed(net, task, step)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not edits.of(net)


class Odd(nn.Module):
    """What no network of the zoo stands for."""

    def __init__(self, run):
        super().__init__()
        self.layer, self.run = nn.Linear(64, 800), run

    def forward(self, *args):
        return self.run(self.layer, *args)


def test_other_inputs_and_outputs_are_refused():
    x, y = torch.rand(4, 64), torch.rand(4, 800)
    two = taut.Task(train=[((x, x), y)], test=[((x, x), y)], loss=F.mse_loss, score=F.mse_loss)
    with pytest.raises(RecipeError, match="networks of the zoo take one tensor, and the task's"):
        placed(Odd(lambda layer, a, b: layer(a) + b[:, :1]), two, Student(net="lenet_300_100"))

    def first(output, target):
        return F.mse_loss(output["y"], target)

    one = taut.Task(train=[(x, y)], test=[(x, y)], loss=first, score=first)
    with pytest.raises(RecipeError, match="the network must give one tensor, got dict; wrap it"):
        placed(Odd(lambda layer, a: {"y": layer(a)}), one, Student(net="lenet_300_100"))

    def sums(output, target):
        return output.square().mean()

    deep = taut.Task(train=[(x, y)], test=[(x, y)], loss=sums, score=sums)
    net = Odd(lambda layer, a: layer(a).unflatten(1, (20, 40)))
    with pytest.raises(RecipeError, match=r"gives outputs of \[2, 20\], and the original of \[2,"):
        placed(net, deep, Student(net="lenet_300_100"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"net": "zzz", "options": {}}, "from_zoo: the zoo has no network 'zzz'; known"),
        ({"net": "vgg_small", "options": {"depth": 3}}, "vgg_small has no option 'depth'"),
        ({"net": "vgg_small", "options": {"size": 10**9}}, "would hold .* numbers|from_zoo: "),
        ({"net": "lenet_5", "options": {"classes": 2**62}}, "from_zoo: "),
        ({"net": "lenet_5", "options": {"classes": 2**80}}, "from_zoo: "),
        ({"net": "lstm_language_model", "options": {"layers": 10**9}}, "layers must be from 1 to"),
        ({"net": "mobilenet_v1", "options": {}}, r"would hold 4,2\d\d,\d\d\d numbers and the orig"),
        ({"net": "mobilenet_v1", "options": {"width": [1]}}, "options is of another type"),
        ({"net": 3, "options": {}}, "net is of another type"),
    ],
)  # fmt: skip
def test_hostile_students_are_refused_without_their_memory(options, said, tmp_path):
    net = teacher()
    path, before = tmp_path / "bad.taut", {n: t.clone() for n, t in net.state_dict().items()}
    state = {(n,): Plain.of(t) for n, t in before.items()}
    path.write_bytes(encode(state, [["from_zoo", options]]))
    with pytest.raises(FormatError, match=said):
        taut.load(path, net)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_a_student_is_the_first_edit(task, tmp_path):
    student = placed(teacher(), task, Student(net="vgg_small", width=0.08))
    again = placed(student, task, Student(net="vgg_small", width=0.05))
    assert len(edits.of(again)) == 1  # nothing of the first is left
    path = tmp_path / "bad.taut"
    changes = edits.to_json([*edits.of(student), *edits.of(again)])
    state = {(n,): Plain.of(t) for n, t in again.state_dict().items()}
    path.write_bytes(encode(state, changes))
    with pytest.raises(FormatError, match="replaces a whole network; it must come first"):
        taut.load(path, teacher())
    taut.pack(again, path)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(taut.load(path, teacher())(x), again.eval()(x), atol=0.01, rtol=0.01)


def test_tensors_of_another_student_do_not_fit(task, tmp_path):
    student = placed(teacher(), task, Student(net="vgg_small", width=0.05))
    state = {(n,): Plain.of(t) for n, t in student.state_dict().items()}
    other = FromZoo(net="vgg_small", options={"width": 0.06, "size": 8, "in_channels": 1})
    path = tmp_path / "bad.taut"
    path.write_bytes(encode(state, edits.to_json([other])))
    with pytest.raises(FormatError, match=r"is \[6, 1, 3, 3\] in the file and \[8, 1, 3, 3\] in"):
        taut.load(path, teacher())


GOLDEN = Path(__file__).parent / "golden" / "zoo" / "student.taut"


def test_a_golden_file_gives_the_student_to_the_last_bit():
    """Written anew by `TAUT_WRITE_GOLDEN=1`, as in test_golden.py."""
    options = {"vocabulary": 4, "embedding": 3, "hidden": 2}
    edit = FromZoo(net="gru_language_model", options=options)
    shapes = {
        "embedding.weight": (4, 3), "gru.weight_ih_l0": (6, 3), "gru.weight_hh_l0": (6, 2),
        "gru.bias_ih_l0": (6,), "gru.bias_hh_l0": (6,), "head.weight": (4, 2), "head.bias": (4,),
    }  # fmt: skip
    state = {n: torch.arange(torch.Size(s).numel()).reshape(s) / 8 for n, s in shapes.items()}
    written = encode({(n,): Plain.of(t) for n, t in state.items()}, edits.to_json([edit]))
    if os.environ.get("TAUT_WRITE_GOLDEN"):
        GOLDEN.write_bytes(written)
    assert written == GOLDEN.read_bytes()
    loaded = taut.load(GOLDEN, LstmLanguageModel(4))
    assert edits.of(loaded) == (edit,)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
