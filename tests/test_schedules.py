"""Schedules: how many weights are there at each step, which ones, and what is refused."""

import math

import pytest
import torch
from loops import adam, core_of, counts, dense_gradient, mask_of, pruned, train
from torch import nn

import taut
from taut.errors import RecipeError
from taut.modules import clone, tensor_at
from taut.recover import Recover, recover
from taut.schedules import Schedule, Schedules, attach_schedules, settled
from taut.techniques import PruneWeights

# ---- how many -------------------------------------------------------------------------------


def test_the_cubic_descent_is_the_papers(trained, task):
    begin, delta, n, total = 10, 3, 10, 50  # optimizer steps
    schedule = Schedule(kind="cubic", steps=n, begin=begin / total, end=(begin + n * delta) / total)
    found = counts(pruned(trained, task, 0.8), task, total, schedule)
    size, final = trained[0].weight.numel(), 0.8
    for t, kept in enumerate(found):
        k = min(max(0, (t - begin) // delta), n)
        at = begin + k * delta
        s_t = final + (0 - final) * (1 - (at - begin) / (n * delta)) ** 3
        assert kept == pytest.approx((1 - s_t) * size, abs=1), t
    assert found[begin + delta - 1] == size
    assert found[begin + n * delta :] == [round(0.2 * size)] * (total - begin - n * delta + 1)


def test_the_iterative_descent_takes_the_same_share_each_time(trained, task):
    found = counts(pruned(trained, task), task, 40, Schedule(steps=4))
    n, last = 3072, 307
    stages = [round(n * (last / n) ** (k / 4)) for k in (1, 2, 3, 4)]
    assert found[:21] == [stages[0]] * 5 + [stages[1]] * 5 + [stages[2]] * 5 + [stages[3]] * 6
    assert set(found[21:]) == {stages[3]}


def test_one_shot_waits_for_its_time(trained, task):
    found = counts(pruned(trained, task), task, 20, "schedule(kind='one_shot', begin=0.25)")
    n = trained[0].weight.numel()
    assert found == [n] * 5 + [round(0.1 * n)] * 16


def test_without_a_schedule_everything_goes_at_once(trained, task):
    net = pruned(trained, task)
    assert settled(net)
    assert counts(net, task, 4, None) == [round(0.1 * trained[0].weight.numel())] * 5


def test_a_mask_follows_once_and_a_new_one_again(trained, task):
    net = pruned(trained, task, 0.5)
    first = counts(net, task, 8, "schedule(steps=2)")
    again = counts(net, task, 8, "schedule(steps=2)")
    assert len(set(first)) == 2
    assert set(again) == {first[-1]}
    traced = taut.trace(trained, task.example())
    taut.apply(net, PruneWeights(sparsity=0.9, scope="layer"), task, traced)
    third = counts(net, task, 8, "schedule(steps=2)")
    n = trained[0].weight.numel()
    assert [third[0], third[-1]] == [round(first[-1] * math.sqrt(0.2)), round(0.1 * n)]


def test_it_goes_on_where_a_training_stopped_early(trained, task):
    net = pruned(trained, task)
    counts(net, task, 40, Schedule(steps=4), steps=6)
    assert not settled(net)
    counts(net, task, 10, Schedule(steps=4))
    assert settled(net)


def test_recover_follows_it(trained, task):
    net = pruned(trained, task)
    seen = []
    recover(
        net, task, Recover(epochs=4), settings=[Schedule(kind="cubic", steps=40, end=0.75)],
        on_epoch=lambda record, state: seen.append(int(mask_of(net).mask.sum())),
    )  # fmt: skip
    n = trained[0].weight.numel()
    wanted = [0.1 + 0.9 * (1 - e / 3) ** 3 for e in (1, 2, 3)] + [0.1]
    assert [s / n for s in seen] == pytest.approx(wanted, abs=0.02)
    assert mask_of(net).gathers == ""


def test_recurrent_and_tied_weights_follow_too(task):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(17, 8), nn.LSTM(8, 8)
            self.head = nn.Linear(8, 17, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.rnn(self.embed((x * 16).long()))[0].mean(1))

    net = Tied()
    taut.apply(net, PruneWeights(sparsity=0.75, scope="layer"), task)
    optimizer = adam(net)
    attach_schedules(net, optimizer, 8, Schedule(kind="one_shot", by="rigl", steps=8, end=1.0))
    train(net, task, optimizer, 8)
    for module, name in ((net.rnn, "weight_hh_l0"), (net.head, "weight"), (net.embed, "weight")):
        weight = getattr(module, name)
        assert int(weight.count_nonzero()) <= round(0.25 * weight.numel())
    assert net.head.weight.equal(net.embed.weight)


# ---- which ones -----------------------------------------------------------------------------


def one_step(net, task, optimizer):
    """One step of plain SGD; the dense gradient that it saw and the weights after it."""
    batch = next(iter(task.batches("train")))
    gradient = dense_gradient(net, task, batch)
    optimizer.zero_grad()
    task.loss(net(*batch.args), batch.target).backward()
    before = core_of(net).detach().clone() - 0.01 * core_of(net).grad
    optimizer.step()
    return gradient, before


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest(trained, task):
    net = pruned(trained.eval(), task, 0.8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    attach_schedules(
        net, optimizer, 4, Schedule(kind="one_shot", by="rigl", steps=4, end=1.0, fraction=0.4)
    )
    old = mask_of(net).mask.clone()
    kept = int(old.sum())
    for k in range(1, 4):
        gradient, stepped = one_step(net, task, optimizer)
        share = 0.4 / 2 * (1 + math.cos(k * math.pi / 4))
        moved = round(share * kept)
        ranked = stepped.abs().masked_fill(~old, -1).flatten().argsort(descending=True)
        stay = torch.zeros(old.numel(), dtype=torch.bool)
        stay[ranked[: kept - moved]] = True
        grown = gradient.abs().flatten().masked_fill(stay, -1).topk(moved).indices
        wanted = stay.clone()
        wanted[grown] = True
        new = mask_of(net).mask.clone()
        assert torch.equal(new.flatten(), wanted)
        assert int(new.sum()) == kept
        assert moved > 0
        assert bool((new & ~old).any())
        assert bool((core_of(net)[new & ~old] == 0).all())
        old = new


def test_rigl_may_grow_while_the_cubic_descent_goes_on(trained, task):
    schedule = Schedule(kind="cubic", steps=10, end=1.0, by="rigl")
    found = counts(pruned(trained, task), task, 20, schedule)
    plain = counts(pruned(trained, task), task, 20, Schedule(kind="cubic", steps=10, end=1.0))
    assert found == plain


def test_surgery_keeps_by_two_thresholds_and_lets_weights_come_back(trained, task):
    net = pruned(trained.eval(), task, 0.8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    attach_schedules(
        net, optimizer, 30, Schedule(kind="one_shot", by="surgery", steps=30, end=1.0, fraction=0.2)
    )
    came_back = 0
    old = mask_of(net).mask.clone()
    for _ in range(29):
        one_step(net, task, optimizer)
        new, size = mask_of(net).mask.clone(), core_of(net).detach().abs()
        assert int(new.sum()) == int(old.sum())
        felt = torch.where(old, size, size / 1.2)  # the upper threshold is 1.2 times the lower
        assert felt[new].min() >= felt[~new].max()
        came_back += int((new & ~old).sum())
        old = new
    assert came_back > 5


def test_under_surgery_absent_weights_train_on_unseen(trained, task):
    net = pruned(trained.eval(), task, 0.8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    attach_schedules(net, optimizer, 9, Schedule(kind="one_shot", by="surgery", steps=2, end=1.0))
    absent, before = ~mask_of(net).mask, core_of(net).detach().clone()
    gradient, _ = one_step(net, task, optimizer)
    moved = core_of(net).detach() - before
    torch.testing.assert_close(moved[absent], -0.01 * gradient[absent])
    assert not tensor_at(net, "0.weight")[absent].any()
    train(net, task, optimizer, 8)
    assert not mask_of(net).straight_through  # nothing comes back after the last cut


def test_movement_keeps_what_grows_by_the_sum_of_its_scores(trained, task):
    net = pruned(trained.eval(), task, 0.6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    attach_schedules(net, optimizer, 6, Schedule(by="movement", steps=2, end=1.0))
    assert bool(mask_of(net).mask.all())  # there is nothing to go by yet
    scores = torch.zeros_like(core_of(net))
    kept = []
    for _ in range(6):
        core = core_of(net).detach().clone()
        gradient, _ = one_step(net, task, optimizer)
        scores -= gradient * core
        kept.append(int(mask_of(net).mask.sum()))
        if len(kept) in (3, 6):
            chosen = torch.zeros(scores.numel(), dtype=torch.bool)
            chosen[scores.flatten().topk(kept[-1]).indices] = True
            got = mask_of(net).mask.flatten()
            assert float((got == chosen).double().mean()) > 0.999
    n = scores.numel()
    assert kept == [n, n] + [round(n * math.sqrt(0.4))] * 3 + [round(0.4 * n)]


def test_what_was_removed_before_stays_removed_by_magnitude(trained, task):
    net = pruned(trained, task, 0.5)
    gone = ~mask_of(net).mask
    traced = taut.trace(trained, task.example())
    taut.apply(net, PruneWeights(sparsity=0.8, scope="layer"), task, traced)
    counts(net, task, 10, Schedule(steps=2))
    assert not bool((mask_of(net).mask & gone).any())


def test_moments_of_what_comes_and_goes_are_forgotten(trained, task):
    net = pruned(trained, task, 0.8)
    optimizer = adam(net)
    attach_schedules(net, optimizer, 8, Schedule(kind="one_shot", by="rigl", steps=2, end=1.0))
    train(net, task, optimizer, 3)
    old = mask_of(net).mask.clone()
    assert bool((optimizer.state[core_of(net)]["exp_avg_sq"][old] != 0).any())
    train(net, task, optimizer, 1)
    changed = mask_of(net).mask != old
    state = optimizer.state[core_of(net)]
    assert bool(changed.any())
    assert not state["exp_avg"][changed].any()
    assert not state["exp_avg_sq"][changed].any()
    assert bool((state["exp_avg_sq"][~changed] != 0).any())
    assert float(state["step"]) == 4


# ---- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end": 1.2}, r"end is a share of the training and at most 1, got 1.2: it would end after "
         r"training does; for optimizer steps give step / total_steps"),
        ({"end": 2000}, r"at most 1, got 2000"),
        ({"begin": 0.6}, r"begin must lie before end, got begin=0.6 and end=0.5"),
        ({"begin": 0.2, "rewind_to": 0.3}, r"must lie before the first one, got rewind_to=0.3 and "
         r"begin=0.2; raise begin"),
        ({"kind": "cubical"}, "kind has no choice 'cubical'; did you mean 'cubic'"),
        ({"by": "rigel"}, "by has no choice 'rigel'; did you mean 'rigl'"),
        ({"steps": 0}, r"steps must lie in \[1, 100000\], got 0"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Schedule(**options)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("prune_weights > schedule(steps=2)", r"schedule\(steps=2\) ends after training does: no "
         r"recover follows it .*; put prune_weights before and recover\(epochs=5\) after it"),
        ("prune_weights > schedule > recover(epochs=0)", "ends after training does"),
        ("schedule > recover > prune_weights", "put prune_weights before"),
        ("prune_weights > schedule(steps=2) > schedule(steps=3) > recover", r"\(steps=2\) ends"),
        ("prune_weights > schedule > share_values > recover", "the mask on site '0.weight' cannot "
         "open again, for share_values has recoded what it kept; put recover before share_values"),
    ],
)  # fmt: skip
def test_a_recipe_that_no_training_carries_out_is_refused(trained, task, tmp_path, recipe, message):
    with pytest.raises(RecipeError, match=message):
        taut.compress(trained, task, recipe, folder=tmp_path)


def test_a_schedule_may_stand_before_what_follows_it(trained, task, tmp_path):
    recipe = "schedule(steps=2) > prune_weights(sparsity=0.8) > recover(epochs=1) > share_values"
    result = taut.compress(trained, task, recipe, folder=tmp_path)
    assert result.measurement.nonzero_parameters < 0.25 * result.original.nonzero_parameters


def test_attaching_refuses_what_cannot_work(trained, task):
    net = clone(trained)
    with pytest.raises(RecipeError, match="has no mask to follow it; put prune_weights on the net"):
        attach_schedules(net, adam(net), 10, "schedule")
    net = pruned(trained, task)
    with pytest.raises(RecipeError, match="total_steps must be at least 1, got 0; it counts the"):
        attach_schedules(net, adam(net), 0, "schedule")
    with pytest.raises(RecipeError, match=r"takes a schedule, got recover\(\)"):
        attach_schedules(net, adam(net), 10, "recover")
    traced = taut.trace(trained, task.example())
    taut.apply(net, "share_values(bits=4)", task, traced)
    with pytest.raises(RecipeError, match=r"'0.weight' cannot open again, for share_values has"):
        attach_schedules(net, adam(net), 10, "schedule")


def test_accelerates_wrapper_is_looked_through(trained, task):
    from accelerate.optimizer import AcceleratedOptimizer

    net = pruned(trained, task)
    optimizer = AcceleratedOptimizer(adam(net))
    schedules = attach_schedules(net, optimizer, 4, Schedule(steps=2))
    assert isinstance(schedules, Schedules)
    train(net, task, optimizer, 3)
    assert settled(net)
