"""Schedules as a training goes on: rewinding, restarts that are exact, and other loops."""

import copy

import pytest
import torch
from loops import adam, core_of, counts, dense_gradient, mask_of, pruned, train, two_halves

import taut
from taut.modules import tensor_at
from taut.recover import Recover, recover
from taut.schedules import Schedule, attach_schedules, settled

# ---- rewinding ------------------------------------------------------------------------------


def test_rewinding_puts_every_parameter_back_exactly(trained, task):
    net = pruned(trained, task)
    optimizer = adam(net)
    schedule = Schedule(steps=2, begin=0.4, end=0.8, rewind="weights", rewind_to=0.2)
    attach_schedules(net, optimizer, 10, schedule)
    train(net, task, optimizer, 2)
    wanted = {n: p.detach().clone() for n, p in net.named_parameters()}
    for steps in (2, 2):  # to the cuts at 4 and 6
        train(net, task, optimizer, steps)
        assert all(torch.equal(p, wanted[n]) for n, p in net.named_parameters())
        assert not optimizer.state
    train(net, task, optimizer, 1)
    assert not any(torch.equal(p, wanted[n]) for n, p in net.named_parameters())
    assert settled(net)


def test_survivors_go_back_and_the_cut_stands(trained, task):
    net = pruned(trained, task)
    counts(net, task, 6, Schedule(steps=3, end=1.0, rewind="weights"), steps=4)
    weight, mask = tensor_at(net, "0.weight").detach(), mask_of(net).mask
    assert torch.equal(weight, trained[0].weight.detach() * mask)
    assert int(mask.sum()) == round(0.1 * mask.numel())


@pytest.mark.parametrize("rewind", ["weights", "rate"])
def test_the_learning_rate_starts_over_with_each_cut(trained, task, rewind):
    schedule = Schedule(steps=3, end=0.75, rewind=rewind)
    records = recover(
        pruned(trained, task), task, Recover(epochs=8, learning_rate=1e-3), settings=[schedule]
    )
    rates = [r.learning_rate for r in records]  # of the last batch of each epoch
    assert rates[2:4] == pytest.approx(rates[0:2])
    assert rates[0] > 4e-4
    assert rates[1] < 3e-5
    assert rates[4] > rates[5] > rates[6] > rates[7]
    assert rates[4] > 8e-4
    assert rates[7] < 2e-5


def test_rewinding_the_rate_alone_leaves_the_weights(trained, task):
    def after(rewind):
        torch.manual_seed(3)
        net = pruned(trained, task)
        counts(net, task, 8, Schedule(steps=2, end=1.0, rewind=rewind))
        return tensor_at(net, "0.weight")

    assert torch.equal(after("rate"), after("none"))


@pytest.mark.parametrize("begin", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["iterative", "cubic"])
def test_a_phase_runs_from_cut_to_cut(kind, begin):
    schedule = Schedule(kind=kind, steps=3, begin=begin, end=0.7, rewind="rate")
    points = [i / 1000 for i in range(1001)]
    phases = [schedule.phase(p) for p in points]
    falls = [p for p, a, b in zip(points[1:], phases, phases[1:], strict=False) if b < a]
    cuts = [p for p, q in zip(points[1:], points, strict=False)
            if schedule.stage(p) > schedule.stage(q)]  # fmt: skip
    assert falls == cuts
    assert len(cuts) == (2 if kind == "iterative" and begin == 0 else 3)
    assert min(phases) == 0
    assert max(phases) == phases[-1] == 1
    assert Schedule(kind=kind).phase(0.3) == 0.3


# ---- restarts -------------------------------------------------------------------------------

SCHEDULES = (
    Schedule(steps=3),
    Schedule(kind="cubic", steps=15, begin=0.1, end=0.9),
    Schedule(by="movement", steps=4, end=0.8),
    Schedule(kind="cubic", by="rigl", steps=15, end=0.9),
    Schedule(kind="one_shot", by="surgery", steps=30, end=0.9),
    Schedule(steps=3, begin=0.3, end=0.8, rewind="weights", rewind_to=0.1),
)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_recovery_killed_after_any_epoch_ends_the_same(trained, task, schedule):
    states = []

    def run(net, resume=None):
        torch.manual_seed(7)
        recover(
            net, task, Recover(epochs=4), settings=[schedule], teacher=trained, resume=resume,
            trace=taut.trace(trained, task.example()),
            on_epoch=lambda record, state: states.append(copy.deepcopy(state)),
        )  # fmt: skip
        return net.state_dict()

    whole = run(pruned(trained, task))
    for state in states[:3]:
        again = run(pruned(trained, task), resume=state)
        assert all(torch.equal(again[k], v) for k, v in whole.items())


class Killed(taut.Watch):
    """A machine that stops after an epoch."""

    def __init__(self, after):
        self.after = after

    def on_epoch(self, record):
        if record.epoch == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("schedule", SCHEDULES[2:], ids=str)
def test_a_run_killed_and_restarted_writes_the_same_file(trained, task, tmp_path, schedule):
    recipe = f"prune_weights(sparsity=0.9, scope='layer') > {schedule} > recover(epochs=5) > "
    recipe += "share_values(bits=4) > recover(epochs=2)"
    for after in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            taut.compress(trained, task, recipe, folder=tmp_path / "a", watch=Killed(after))
    again = taut.compress(trained, task, recipe, folder=tmp_path / "a")
    whole = taut.compress(trained, task, recipe, folder=tmp_path / "b")
    assert (tmp_path / "a/net.taut").read_bytes() == (tmp_path / "b/net.taut").read_bytes()
    assert [r.loss for r in again.history] == [r.loss for r in whole.history]
    assert whole.measurement.nonzero_parameters <= 0.11 * 4928 + 90


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_an_own_loop_restarts_exactly_from_a_checkpoint(trained, task, tmp_path, schedule):
    def start(steps, checkpoint=None, keep=None):
        net = pruned(trained.eval(), task)
        if checkpoint:
            net.load_state_dict(checkpoint["net"])
        optimizer = adam(net)
        schedules = attach_schedules(net, optimizer, 19, schedule)
        if checkpoint:
            optimizer.load_state_dict(checkpoint["optimizer"])
            schedules.load_state_dict(checkpoint["schedules"])
        for batch in list(task.batches("train"))[schedules.taken : schedules.taken + steps]:
            optimizer.zero_grad()
            task.loss(net(*batch.args), batch.target).backward()
            optimizer.step()
        if keep:
            torch.save(
                {"net": net.state_dict(), "optimizer": optimizer.state_dict(),
                 "schedules": schedules.state_dict()}, keep,
            )  # fmt: skip
        return net.state_dict()

    def run(*pieces):
        path = None
        for piece in pieces:
            torch.manual_seed(0)
            checkpoint = torch.load(path, weights_only=True) if path else None
            path = tmp_path / "checkpoint.pt"
            state = start(piece, checkpoint, path)
        return state

    whole, again = run(19), run(7, 5, 7)
    assert all(torch.equal(again[k], v) for k, v in whole.items())


def test_detached_it_leaves_the_steps_alone(trained, task):
    net = pruned(trained, task)
    optimizer = adam(net)
    schedule = Schedule(kind="cubic", by="rigl", steps=10, end=1.0)
    with attach_schedules(net, optimizer, 10, schedule) as schedules:
        train(net, task, optimizer, 4)
        assert mask_of(net).gathers == "gradient"
    before = mask_of(net).mask.clone()
    train(net, task, optimizer, 6)
    assert torch.equal(mask_of(net).mask, before)
    assert (schedules.taken, schedules.stage) == (4, 4)
    assert mask_of(net).gathered is None


def test_micro_batches_count_as_one_step(trained, task):
    net = pruned(trained.eval(), task)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    attach_schedules(net, optimizer, 2, Schedule(by="movement", steps=1, end=1.0))
    core, scores = core_of(net).detach().clone(), 0
    for batch in list(task.batches("train"))[:3]:
        scores = scores - dense_gradient(net, task, batch) * core
        task.loss(net(*batch.args), batch.target).backward()
    torch.testing.assert_close(mask_of(net).gathered, scores)
    optimizer.step()
    assert bool(mask_of(net).mask.all())


def test_two_processes_keep_the_masks_of_one(tmp_path):
    schedule = Schedule(kind="cubic", by="movement", steps=4, end=1.0)
    two_halves(None, tmp_path, schedule)
    torch.multiprocessing.spawn(two_halves, (tmp_path, schedule), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{n}.pt") for n in (None, 0, 1))
    for masks in zip(one, first, second, strict=True):
        assert torch.equal(masks[1], masks[2])
        assert float((masks[0] == masks[1]).double().mean()) > 0.97  # sums in another order
