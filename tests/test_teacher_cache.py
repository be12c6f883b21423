"""A teacher's outputs on disk: the same bits, only for the same data and teacher."""

import logging

import pytest
import torch
from conftest import digits_task, small_net
from torch import nn

from taut.distillation import Distillation
from taut.errors import RunError
from taut.recover import Recover, recover
from taut.task import Batch, Task
from taut.teacher_cache import TeacherCache


def batch_of(*args, **kwargs):
    return Batch(args=args, kwargs=kwargs, target=torch.zeros(len((*args, *kwargs.values())[0])))


class Counted:
    """A teacher's forward that counts its calls."""

    def __init__(self, teacher):
        self.teacher, self.calls = teacher.eval(), 0

    @torch.no_grad()
    def __call__(self, batch):
        self.calls += 1
        return self.teacher(*batch.args, **batch.kwargs)


@pytest.fixture
def teacher():
    return small_net().eval()


@pytest.fixture
def x():
    return torch.rand(12, 64)


def cache_in(folder, teacher, precision=torch.float32):
    return TeacherCache(folder, teacher, precision)


def test_what_is_read_back_has_the_same_bits(tmp_path, teacher, x):
    run, cache = Counted(teacher), cache_in(tmp_path, teacher)
    first = cache.outputs(batch_of(x), run)
    calls = run.calls
    assert torch.equal(cache.outputs(batch_of(x), run), first)
    cache.end_epoch()
    again = cache_in(tmp_path, teacher)
    shuffled = torch.randperm(12)
    assert torch.equal(again.outputs(batch_of(x[shuffled]), run), first[shuffled])
    assert torch.equal(again.outputs(batch_of(x[:5]), run), first[:5])
    assert run.calls == calls
    assert all(
        set(torch.load(p, weights_only=True)) == {"keys", "outputs"} for p in tmp_path.rglob("*.pt")
    )


def test_other_data_other_teachers_and_other_precisions_are_computed(tmp_path, teacher, x):
    run, cache = Counted(teacher), cache_in(tmp_path, teacher)
    cache.outputs(batch_of(x), run)
    cache.end_epoch()
    calls = run.calls
    other = x.clone()
    other[3, 7] += 1e-6
    assert torch.equal(cache.outputs(batch_of(other), run), run(batch_of(other)))
    assert run.calls == calls + 2
    with torch.no_grad():
        teacher[0].bias[0] += 1e-6
    assert not cache_in(tmp_path, teacher).known
    with torch.no_grad():
        teacher[0].bias[0] -= 1e-6
    assert not cache_in(tmp_path, teacher, torch.bfloat16).known
    assert not cache_in(tmp_path, nn.Sequential(*teacher, nn.ReLU())).known


def test_arguments_of_every_kind_are_told_apart(tmp_path):
    class Scaled(nn.Module):
        def forward(self, x, by=1.0, parts=()):
            return x * by + sum(parts)

    run = Counted(Scaled())
    cache = cache_in(tmp_path, run.teacher)
    x = torch.rand(4, 3)
    for _ in range(2):
        for given in ({"by": 2.0}, {"by": 3.0}, {"parts": [x]}, {"parts": [x + 1]}):
            batch = batch_of(x, **given)
            assert torch.equal(cache.outputs(batch, run), run(batch))


def test_batches_whose_examples_depend_on_each_other_are_kept_whole(tmp_path, x):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    run = Counted(Centred())
    cache = cache_in(tmp_path, run.teacher)
    for part in (x, x[:6], x[torch.arange(11, -1, -1)]):
        assert torch.equal(cache.outputs(batch_of(part), run), run(batch_of(part)))
    calls = run.calls
    assert torch.equal(cache.outputs(batch_of(x), run), x - x.mean(0))
    assert run.calls == calls


def test_data_that_change_at_random_are_noticed(tmp_path, teacher, x, caplog):
    run, cache = Counted(teacher), cache_in(tmp_path, teacher)
    caplog.set_level(logging.WARNING)
    cache.outputs(batch_of(x), run)
    cache.end_epoch()
    assert list(tmp_path.rglob("*.pt"))
    moved = x.clone()
    moved[:7] += torch.rand(7, 64)
    assert torch.equal(cache.outputs(batch_of(moved), run), run(batch_of(moved)))
    assert "of 12 examples of epoch 2 the cache holds 5: the data are changed" in caplog.text
    assert not list(tmp_path.rglob("*.pt"))
    calls = run.calls
    cache.outputs(batch_of(moved), run)
    cache.end_epoch()
    assert run.calls == calls + 1
    assert not list(tmp_path.rglob("*.pt"))


def test_sequences_of_several_lengths_have_their_files(tmp_path):
    teacher = nn.Embedding(20, 5).eval()
    run, cache = Counted(teacher), cache_in(tmp_path, teacher)
    words = [torch.randint(20, (4, steps)) for steps in (3, 6)]
    outputs = [cache.outputs(batch_of(w), run) for w in words]
    cache.end_epoch()
    again, calls = cache_in(tmp_path, teacher), run.calls
    for w, wanted in zip(words, outputs, strict=True):
        assert torch.equal(again.outputs(batch_of(w), run), wanted)
    assert run.calls == calls


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_file_is_named(tmp_path, teacher, x, content):
    cache = cache_in(tmp_path, teacher)
    cache.outputs(batch_of(x), Counted(teacher))
    cache.end_epoch()
    (file,) = tmp_path.rglob("*.pt")
    if content is None:
        torch.save({"keys": torch.zeros(3, 16, dtype=torch.uint8), "outputs": torch.zeros(4)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(RunError, match=r"cannot read the cached outputs in .*\); remove that file"):
        cache_in(tmp_path, teacher)


def test_training_with_the_cache_is_training_without(tmp_path, trained):
    """Also when it is shuffled, killed and resumed."""

    def run(settings, resume=None, states=None):
        torch.manual_seed(0)
        net, task = small_net(), digits_task()
        recover(
            net, task, Recover(epochs=3, learning_rate=1e-2), teacher=trained, settings=settings,
            resume=resume, folder=tmp_path,
            on_epoch=lambda record, state: states is None or states.append(state),
        )  # fmt: skip
        return net.state_dict()

    cached = [Distillation(cache="teacher")]
    plain, first, second = run([]), run(cached), run(cached)
    assert (tmp_path / "teacher").is_dir()
    for name, value in plain.items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(second[name], first[name])


def test_augmented_tasks_are_distilled_without_the_cache(tmp_path, trained, caplog):
    caplog.set_level(logging.WARNING)

    class Noisy:
        def __iter__(self):
            for x, y in digits_task()._data["train"]:
                yield x + 0.1 * torch.randn_like(x), y

    task = Task(train=Noisy(), test=digits_task()._data["test"])
    settings = [Distillation(cache=str(tmp_path / "kept"))]
    recover(small_net(), task, Recover(epochs=3), teacher=trained, settings=settings)
    assert caplog.text.count("the data are changed at random") == 1
