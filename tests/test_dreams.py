"""Data out of a network: they fit its statistics and classes, and a student learns from them."""

import copy

import pytest
import torch
from conftest import digits_task
from torch import nn
from torch.nn import functional as F

from taut.distances import between_outputs
from taut.dreams import dream
from taut.errors import DataError, TaskError
from taut.recover import Recover, recover
from taut.task import Task


def normed_net():
    return nn.Sequential(
        nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = normed_net()
    recover(net, digits_task(), Recover(epochs=10, learning_rate=1e-2))
    assert digits_task().evaluate(net) > 0.9
    return net


def distance_to_statistics(network, x):
    seen = []

    def before(norm, args):
        mean, var = args[0].mean(0), args[0].var(0, correction=0)
        seen.append(float((mean - norm.running_mean).norm() + (var - norm.running_var).norm()))

    norms = [m for m in network if isinstance(m, nn.BatchNorm1d)]
    handles = [m.register_forward_pre_hook(before) for m in norms]
    with torch.no_grad():
        network.eval()(x)
    for handle in handles:
        handle.remove()
    return sum(seen)


def test_they_look_to_the_network_like_its_data(network):
    before = copy.deepcopy(network.state_dict())
    network.train()
    data = dream(network, torch.zeros(1, 64), examples=40, batch_size=40, steps=150)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_pre_hooks for m in network)
    far = distance_to_statistics(network, torch.randn(40, 64))
    assert distance_to_statistics(network, data.inputs) < 0.2 * far
    assert data.targets.bincount().tolist() == [4] * 10
    assert float((network(data.inputs).argmax(1) == data.targets).float().mean()) > 0.95


def test_the_same_seed_dreams_the_same(network):
    options = {"examples": 6, "steps": 3}
    torch.manual_seed(1)
    first = dream(network, torch.zeros(1, 64), **options)
    torch.manual_seed(2)
    assert torch.equal(dream(network, torch.zeros(1, 64), **options).inputs, first.inputs)
    other = dream(network, torch.zeros(1, 64), seed=1, **options)
    assert not torch.equal(other.inputs, first.inputs)


def test_a_student_learns_from_dreams_alone(network):
    data = dream(network, torch.zeros(1, 64), examples=600, batch_size=100, steps=100)
    real = digits_task()
    task = Task(train=data, validation=real._data["validation"], test=real._data["test"])
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    recover(student, task, Recover(epochs=20, learning_rate=1e-2, distill=0.9), teacher=network)
    assert task.evaluate(student) > 0.75


def test_a_student_to_compete_with_is_shown_what_it_does_not_know(network):
    torch.manual_seed(3)
    student = nn.Linear(64, 10).eval()

    def apart(compete):
        x = dream(
            network, torch.zeros(1, 64), examples=20, steps=60, compete=compete, student=student
        ).inputs
        with torch.no_grad():
            return float(between_outputs("js", student(x), network.eval()(x), 1, 1.0, None))

    assert apart(20.0) > apart(0.0)


def test_images_are_smoothed_and_rolled():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(*layers)

    def variation(**options):
        x = dream(net, torch.zeros(1, 1, 8, 8), examples=8, steps=40, **options).inputs
        return float(x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum())

    assert variation(smoothness=1.0) < 0.5 * variation(smoothness=0.0)
    assert variation(shift=2) != variation(shift=0)


def test_the_loss_has_its_gradient_from_every_term(network):
    """With all weights at zero but that of the classes, it is plain cross-entropy."""
    options = {"statistics": 0.0, "smoothness": 0.0, "size": 0.0}
    data = dream(network, torch.zeros(1, 64), examples=10, steps=100, **options)
    network.eval()
    with torch.no_grad():
        assert float(F.cross_entropy(network(data.inputs), data.targets)) < 0.01
    small = dream(network, torch.zeros(1, 64), examples=10, steps=100, size=10.0)
    assert float(small.inputs.norm()) < 0.1 * float(data.inputs.norm())


@pytest.mark.parametrize(
    ("net", "example", "message"),
    [
        (nn.Linear(64, 10), torch.zeros(1, 64), "Linear has no batch norm with running statistics"),
        (nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), torch.zeros(1, 4),
         "Sequential has no batch norm with running"),
        (nn.Embedding(4, 4), torch.zeros(1, 4).long(), r"must be of floats .* got torch.int64"),
        (nn.Sequential(nn.BatchNorm2d(1)), torch.zeros(1, 1, 4, 4),
         r"must be a classifier, .* got outputs \[1, 1, 4, 4\]"),
    ],
)  # fmt: skip
def test_networks_that_remember_nothing_are_refused(net, example, message):
    with pytest.raises(DataError, match=message):
        dream(net, example)


def test_an_empty_train_is_refused():
    task = Task(train=[], test=digits_task()._data["test"])
    with pytest.raises(TaskError, match=r"train\(\) yields no batch; Taut needs at least one"):
        recover(nn.Linear(64, 10), task, Recover(epochs=1))
