"""How recoveries train: averages, accumulation, clipping, precision, stopping, smoothing."""

import copy
import math

import pytest
import torch
from conftest import digits_task, small_net
from torch import nn
from torch.nn import functional as F

from taut.errors import RecipeError, TrainingError
from taut.modules import clone
from taut.recover import Recover, find_learning_rate, recover
from taut.task import Task
from taut.training import Average, Training, measure_batch_norms


def plain_net():
    """64-16-10, with nothing random in its training."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def fixed_task(size=100, count=600, **changes):
    """Digits in a fixed order, in batches of `size`."""
    data = digits_task()._data["train"]
    x, y = data.inputs, data.targets
    pairs = list(zip(x[:count].split(size), y[:count].split(size), strict=True))
    test = digits_task()._data["test"]
    return Task(**{"train": pairs, "test": test, **changes})


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return fixed_task()


def train(net, task, epochs=1, options=None, settings=None, **given):
    """Plain SGD without distillation, so that every step can be done by hand."""
    options = {"optimizer": "sgd", "schedule": "constant", "learning_rate": 0.1, **(options or {})}
    records = recover(
        net, task, Recover(epochs=epochs, distill=0.0, **options),
        settings=[Training(**(settings or {}))], **given,
    )  # fmt: skip
    return net, records


def by_hand(task, epochs=1, rate=0.1, clip=math.inf, after_step=lambda net: None):
    """SGD with momentum 0.9, written out; yields the network after each epoch."""
    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    for _ in range(epochs):
        for batch in task.batches("train"):
            optimizer.zero_grad()
            F.cross_entropy(net(*batch.args), batch.target).backward()
            norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
            for p in net.parameters():
                p.grad *= min(1.0, clip / float(norm))
            optimizer.step()
            after_step(net)
        yield copy.deepcopy(net)


def same(net, wanted, tolerance=1e-6):
    for (name, a), b in zip(net.state_dict().items(), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5, msg=name)


def test_left_alone_it_changes_nothing(data):
    net, _ = train(plain_net(), data)
    (wanted,) = by_hand(data)
    same(net, wanted.state_dict().values())


def test_ema_is_the_average_it_says(data):
    averages = [p.clone() for p in plain_net().state_dict().values()]

    def after_step(net):
        for i, p in enumerate(net.state_dict().values()):
            averages[i] = 0.8 * averages[i] + 0.2 * p

    scores = []
    for _ in by_hand(data, after_step=after_step):
        averaged = plain_net()
        averaged.load_state_dict(dict(zip(averaged.state_dict(), averages, strict=True)))
        scores.append(data.evaluate(averaged))
    net, records = train(plain_net(), data, settings={"ema": 0.8})
    same(net, averages)
    assert [r.score for r in records] == scores


def test_the_plain_average_is_of_the_last_epochs(data):
    nets = list(by_hand(data, epochs=4))
    scores, means = [], []
    for k in (1, 2):
        states = [n.state_dict() for n in nets[2 : 2 + k]]
        means.append({n: sum(s[n] for s in states) / k for n in states[0]})
        averaged = plain_net()
        averaged.load_state_dict(means[-1])
        scores.append(data.evaluate(averaged))
    net, records = train(plain_net(), data, epochs=4, settings={"average": 2})
    assert [r.score for r in records[2:]] == scores
    same(net, means[scores.index(max(scores))].values())
    last, _ = train(plain_net(), data, epochs=4, settings={"average": 1})
    same(last, nets[-1].state_dict().values())


def test_batch_norms_measure_the_averaged_network(data):
    def normed():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    net, _ = train(normed(), data, epochs=2, settings={"average": 2})
    inputs = [net[0](*b.args).detach() for b in data.batches("train")]
    mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
    var = torch.stack([x.var(0) for x in inputs]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net[1].running_var, var, atol=1e-5, rtol=1e-4)
    assert net[1].momentum == 0.1
    plain = plain_net()
    measure_batch_norms(plain, [])  # nothing to measure
    assert plain.training


def test_the_trained_weights_come_back_after_scoring():
    net, average = plain_net(), Average(plain_net())
    with torch.no_grad():
        net[0].weight.add_(1.0)
    before = net[0].weight.clone()
    with average.standing_in(net):
        assert torch.equal(net[0].weight, plain_net()[0].weight)
    assert torch.equal(net[0].weight, before)


def test_batches_that_accumulate_are_one_large_batch(data):
    small, records = train(plain_net(), fixed_task(20), settings={"accumulate": 5})
    large, wanted = train(plain_net(), fixed_task(100))
    same(small, large.state_dict().values(), 1e-5)
    assert records[0].loss == pytest.approx(wanted[0].loss, rel=1e-5)
    uneven, _ = train(plain_net(), fixed_task(90, 270), settings={"accumulate": 2})
    two = Task(train=_joined(fixed_task(90, 270)), test=data._data["test"])
    same(uneven, train(plain_net(), two)[0].state_dict().values(), 1e-5)


def _joined(task):
    (a, b), (c, d), (e, f) = task._data["train"]
    return [(torch.cat([a, c]), torch.cat([b, d])), (e, f)]


def test_gradients_are_clipped_to_a_norm(data):
    (wanted,) = by_hand(data, clip=0.05)
    net, _ = train(plain_net(), data, settings={"clip": 0.05})
    same(net, wanted.state_dict().values())
    (free,) = by_hand(data)
    assert not torch.allclose(net[0].weight, free[0].weight, atol=1e-3)


@pytest.mark.parametrize(("precision", "apart"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_trains_float32_weights_nearly_alike(data, precision, apart):
    (exact,) = by_hand(data)
    net, _ = train(plain_net(), data, settings={"precision": precision})
    assert net[0].weight.dtype == torch.float32
    assert not torch.equal(net[0].weight, exact[0].weight)
    same(net, exact.state_dict().values(), apart)


def test_products_run_in_the_chosen_precision(data):
    seen = set()

    def run(settings):
        net = plain_net()
        net[2].register_forward_hook(lambda module, args, output: seen.add(output.dtype))
        train(net, fixed_task(100, 100, test=[(torch.zeros(1, 64), torch.zeros(1).long())]),
              settings=settings)  # fmt: skip

    run({"precision": "bfloat16"})
    assert torch.bfloat16 in seen
    assert Training().dtype("bf16") is torch.bfloat16
    assert Training().dtype("no") is torch.float32
    assert Training(precision="float32").dtype("fp16") is torch.float32


def test_gradients_that_overflow_half_precision_are_left_out(data):
    calls = iter(range(1000))

    def loss(output, target):
        huge = 1e30 if next(calls) == 0 else 1.0
        return F.cross_entropy(output, target) * huge

    states = []
    train(plain_net(), fixed_task(loss=loss), settings={"precision": "float16"},
          on_epoch=lambda record, state: states.append(state))  # fmt: skip
    assert states[0]["scaler"]["scale"] == 2.0**15
    assert all(bool(v.isfinite().all()) for v in states[0]["model"].values())


def test_it_stops_when_the_score_no_longer_rises(data):
    net, records = train(plain_net(), data, 50, {"learning_rate": 0.0}, {"patience": 3})
    assert len(records) == 4
    assert torch.equal(net[0].weight, plain_net()[0].weight)
    states = []
    train(plain_net(), data, 50, {"learning_rate": 0.0}, {"patience": 3},
          on_epoch=lambda record, state: states.append(copy.deepcopy(state)))  # fmt: skip
    for state in states[1:]:
        _, again = train(
            plain_net(), data, 50, {"learning_rate": 0.0}, {"patience": 3}, resume=state
        )
        assert len(again) == 4


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(weight=torch.arange(10.0))])
def test_labels_are_smoothed_as_torch_does(loss):
    task, net = fixed_task(loss=loss), plain_net()
    output, target = net(next(task.batches("test")).args[0]), next(task.batches("test")).target
    weight = getattr(loss, "weight", None)
    wanted = F.cross_entropy(output, target, weight, label_smoothing=0.2)
    got = Training(label_smoothing=0.2).loss_of(task, output, target)
    assert torch.equal(got, wanted)
    assert torch.equal(Training().loss_of(task, output, target), loss(output, target))
    assert getattr(loss, "label_smoothing", 0.0) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 0.9, "average": 2}, "two averages of one network, got ema=0.9 and average=2"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\), got 1.0"),
        ({"accumulate": 0}, r"accumulate must lie in \[1, 100000\], got 0"),
        ({"precision": "float8"}, "precision has no choice 'float8'"),
        ({"communication": "fp16"}, "communication has no choice 'fp16'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Training(**options)


def test_labels_of_another_loss_are_not_smoothed():
    task = fixed_task(loss=lambda output, target: output.sum())
    with pytest.raises(RecipeError, match=r"label_smoothing needs a task whose loss is cross-ent"):
        train(plain_net(), task, settings={"label_smoothing": 0.1})


@pytest.mark.parametrize(
    "settings",
    [{"ema": 0.9}, {"average": 3}, {"accumulate": 4, "clip": 0.1}, {"precision": "float16"}],
)
def test_a_killed_training_goes_on_exactly(settings):
    task, states = digits_task(), []

    def run(resume=None):
        torch.manual_seed(5)
        net = small_net()
        train(net, task, 4, {"optimizer": "adam", "learning_rate": 1e-2}, settings, resume=resume,
              on_epoch=lambda record, state: states.append(copy.deepcopy(state)))  # fmt: skip
        return net.state_dict()

    whole = run()
    for state in states[:3]:
        again = run(state)
        assert all(torch.equal(again[k], v) for k, v in whole.items())


class _Spoiled(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_a_gradient_that_is_not_finite_stops_it_and_names_the_layer():
    class Between(nn.Module):
        def forward(self, x):
            return _Spoiled.apply(x)

    net = nn.Sequential(
        nn.Linear(64, 16), nn.Linear(16, 16), Between(), nn.Linear(16, 10), nn.Dropout(0.0)
    )
    before = copy.deepcopy(net.state_dict())
    message = r"the gradient of '1.bias' is not finite in epoch 1, batch 1, at learning rate 0.1;"
    with pytest.raises(TrainingError, match=message):
        train(net, fixed_task())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_learning_rate_finder_suggests_one_that_learns():
    task, net = digits_task(), small_net()
    before = clone(net)
    curve = find_learning_rate(net, task, steps=60)
    pairs = zip(net.parameters(), before.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert curve.rates[0] == pytest.approx(1e-6)
    steps = [b / a for a, b in zip(curve.rates, curve.rates[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    assert curve.suggested in curve.rates
    assert 1e-4 < curve.suggested < 0.5
    recover(net, task, Recover(epochs=3, learning_rate=curve.suggested))
    assert task.evaluate(net) > 0.7


def test_the_finder_refuses_what_cannot_be_found():
    with pytest.raises(RecipeError, match="rates must rise from above 0 in at least 10 steps"):
        find_learning_rate(plain_net(), fixed_task(), lowest=1.0, highest=0.1)
    task = fixed_task(loss=lambda output, target: output.sum() * 0.0 + 1.0)
    with pytest.raises(TrainingError, match="the loss never falls between rates of 1e-06 and 1;"):
        find_learning_rate(plain_net(), task, steps=10)
