"""Recovery: it learns, distils, resumes exactly, follows schedules and refuses NaN."""

import copy
import math

import pytest
import torch
from conftest import digits_task, small_net
from torch import nn

import taut
from taut.errors import RecipeError, TrainingError
from taut.modules import clone, tensor_at
from taut.recover import Recover, adjusted_dropout, recover
from taut.regularise import Regularise
from taut.techniques import PruneWeights, ShareValues


def pruned(trained, task, **options):
    net = clone(trained)
    return taut.apply(net, PruneWeights(**{"sparsity": 0.9, **options}), task)


def test_it_wins_back_what_pruning_lost(trained, task):
    net = pruned(trained, task)
    broken = task.evaluate(net)
    records = recover(net, task, Recover(epochs=6), teacher=trained)
    assert task.evaluate(net) > broken + 0.05
    assert [r.epoch for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1].loss < records[0].loss


def test_what_is_pruned_stays_pruned_and_what_is_kept_moves(trained, task):
    net = pruned(trained, task)
    before = tensor_at(net, "0.weight").detach().clone()
    recover(net, task, Recover(epochs=1), teacher=trained)
    after = tensor_at(net, "0.weight").detach()
    assert bool((after[before == 0] == 0).all())
    assert not torch.equal(after, before)


def test_shared_values_stay_shared(trained, task):
    net = taut.apply(clone(trained), ShareValues(bits=3), task)
    recover(net, task, Recover(epochs=1), teacher=trained)
    assert len(tensor_at(net, "0.weight").unique()) <= 8


def test_the_best_epoch_is_kept_by_the_validation_score(trained, task):
    net = pruned(trained, task)
    records = recover(net, task, Recover(epochs=5, learning_rate=3e-2), teacher=trained)
    assert task.evaluate(net, "validation") == max(r.score for r in records)


def test_lower_is_better_keeps_the_lowest(trained):
    def loss_of(output, target):
        return float(nn.functional.cross_entropy(output, target))

    task = digits_task(score=loss_of, better="lower")
    net = pruned(trained, task)
    records = recover(net, task, Recover(epochs=4, learning_rate=3e-2), teacher=trained)
    assert task.evaluate(net, "validation") == min(r.score for r in records)


def test_killed_after_any_epoch_it_ends_with_the_same_weights(trained, task):
    options, states = Recover(epochs=4), []

    def run(net, resume=None):
        torch.manual_seed(7)
        recover(
            net, task, options, teacher=trained, resume=resume,
            on_epoch=lambda record, state: states.append(copy.deepcopy(state)),
        )  # fmt: skip
        return net.state_dict()

    whole = run(pruned(trained, task))
    for state in states[:3]:
        again = run(pruned(trained, task), resume=state)
        assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_distillation_pulls_towards_the_original(trained, task):
    def distance(distill):
        net = pruned(trained, task, sparsity=0.8)
        torch.manual_seed(0)
        recover(net, task, Recover(epochs=4, distill=distill), teacher=trained)
        x = next(task.batches("test")).args[0]
        with torch.no_grad():
            return float((net.eval()(x).softmax(1) - trained(x).softmax(1)).abs().mean())

    assert distance(1.0) < distance(0.0)


def test_a_task_of_its_own_loss_distils_by_squared_distance(trained):
    def loss(output, target):
        return (output - nn.functional.one_hot(target, 10)).square().mean()

    task = digits_task(loss=loss)
    net = pruned(trained, task)
    records = recover(net, task, Recover(epochs=3, distill=1.0), teacher=trained)
    assert records[-1].loss < records[0].loss


def test_weight_decay_and_l1_shrink_weights(trained, task):
    def norm(settings=(), **options):
        net = clone(trained)
        torch.manual_seed(0)
        recover(net, task, Recover(epochs=2, distill=0.0, **options), settings=settings)
        return float(net[0].weight.detach().abs().sum())

    plain = norm()
    assert norm(weight_decay=1.0) < plain
    assert norm([Regularise(kind="l1", weight=1e-3)]) < plain


def test_the_learning_rate_is_a_tenth_of_the_tasks_and_falls(trained):
    task = digits_task(learning_rate=0.05)
    records = recover(clone(trained), task, Recover(epochs=3), teacher=trained)
    rates = [r.learning_rate for r in records]
    assert rates[0] < 0.005
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(5e-5, rel=0.1)
    flat = recover(clone(trained), task, Recover(epochs=2, schedule="constant"))
    assert {r.learning_rate for r in flat} == {0.005}


def test_dropout_shrinks_with_the_connections_and_comes_back(trained, task):
    net = pruned(trained, task, sparsity=0.75, scope="layer")
    traced = taut.trace(trained, task.example())
    with adjusted_dropout(net, traced):
        assert net[2].p == pytest.approx(0.2 * math.sqrt(0.25), rel=0.01)
    assert net[2].p == 0.2


def test_a_loss_that_is_nan_stops_and_names_the_step(trained):
    calls = iter(range(100))

    def loss(output, target):
        return output.sum() * (float("nan") if next(calls) == 21 else 1e-4)

    task = digits_task(loss=loss)
    net = clone(trained)
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 2, batch 3, at learn"):
        recover(net, task, Recover(epochs=3, distill=0.0))
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_nan_names_the_site_and_leaves_the_best_weights(trained, task):
    net = pruned(trained, task)
    traced = taut.trace(trained, task.example())
    kept = []

    class Poisoned:
        """The training data, with NaN in the third epoch."""

        passes = 0

        def __iter__(self):
            self.passes += 1
            for x, y in task._data["train"]:
                yield (x * float("nan") if self.passes == 3 else x), y

    poisoned = digits_task(train=Poisoned(), validation=task._data["validation"])
    options = Recover(epochs=3, distill=0.0)
    Poisoned.passes = -1  # one pass counts the batches
    message = r"nan in epoch 3, batch 1, .* not finite is that of '5.weight'"
    with pytest.raises(TrainingError, match=message):
        recover(
            net, poisoned, options, trace=traced,
            on_epoch=lambda record, state: kept.append(copy.deepcopy(state)),
        )  # fmt: skip
    assert len(kept) == 2
    best = kept[-1]["best"]
    assert all(torch.equal(v, best[k]) for k, v in net.state_dict().items())
    assert task.evaluate(net, "validation") == max(r["score"] for r in kept[-1]["history"])


def test_zero_epochs_change_nothing(trained, task):
    net = clone(trained)
    assert recover(net, task, Recover(epochs=0)) == []
    assert torch.equal(net[0].weight, trained[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, r"epochs must lie in \[0, 100000\], got -1"),
        ({"optimizer": "adamw"}, "no choice 'adamw'; did you mean 'adam'"),
        ({"temperature": 0}, r"temperature must lie in \[0.1, 100\], got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Recover(**options)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_both_optimizers_train_from_scratch(task, optimizer):
    torch.manual_seed(0)
    net = small_net()
    rate = 5e-3 if optimizer == "adam" else 5e-2
    recover(net, task, Recover(epochs=8, optimizer=optimizer, learning_rate=rate))
    assert task.evaluate(net) > 0.85
