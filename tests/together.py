"""What every process of test_processes.py runs: `together.py FOLDER train|compress`."""

import copy
import sys
import weakref
from pathlib import Path

import torch
from conftest import _digits
from torch import nn

import taut
from taut import processes
from taut.distillation import Distillation
from taut.errors import TautError
from taut.recover import Recover, recover
from taut.schedules import Schedule
from taut.techniques import PruneWeights
from taut.training import Training

RECIPE = (
    "prune_weights(sparsity=0.8, scope='layer') > distillation(cache='teacher') > "
    "recover(epochs=2) > share_values(bits=4)"
)


def network(seed, width=24):
    """64-width-10, with nothing random in its training."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def task_of(batch_size, **changes):
    """960 digits to train on in a fixed order, 200 to test on."""
    x, y = _digits()
    train = list(zip(x[:960].split(batch_size), y[:960].split(batch_size), strict=True))
    data = {"train": train, "test": [(x[1400:1600], y[1400:1600])]}
    return taut.Task(**{**data, "name": "digits", **changes})


def trained(batch_size, **given):
    """A pruned network after three epochs, distilled in its outputs and a wider layer."""
    task, training = task_of(batch_size), Training(clip=1.0, **given.pop("training", {}))
    net = network(2)
    net = taut.apply(net, PruneWeights(sparsity=0.5, scope="layer"), task)
    records = recover(
        net, task, Recover(epochs=3, learning_rate=1e-2), teacher=network(1, 40),
        settings=[training, Schedule(steps=2), Distillation(features="0")], **given,
    )  # fmt: skip
    return net.state_dict(), [r.loss for r in records]


def resumed_alike(**training):
    """Whether a training that goes on after its first epoch ends as the whole one, everywhere."""
    states = []
    torch.manual_seed(7)
    whole, _ = trained(
        40, training=training, on_epoch=lambda record, state: states.append(copy.deepcopy(state))
    )
    again, _ = trained(40, training=training, resume=states[0])
    same = all(torch.equal(again[k], v) for k, v in whole.items())
    return all(processes.gathered(same))


def stopped_alike():
    """The messages of all processes where the loss turns NaN in the last of them only."""
    bad = processes.index() == processes.count() - 1

    def loss(output, target):
        return nn.functional.cross_entropy(output, target) * (float("nan") if bad else 1.0)

    return message(lambda: recover(network(0), task_of(40, loss=loss), Recover(epochs=1)))


def refused_alike():
    """What each process catches of an error that only the main one meets."""

    def fail():
        raise ValueError("only here")

    return message(lambda: processes.once(fail))


def message(run):
    """What each process was told when it was refused."""
    try:
        run()
    except (TautError, ValueError) as error:
        return processes.gathered(str(error))


def train():
    found = {
        "shares": processes.gathered(list(processes.share(range(7)))),
        "refused": refused_alike(),
        "whole": trained(40),
        "accumulated": trained(20, training={"accumulate": 2}),
    }
    for way in ("float16", "powersgd"):
        found[way] = trained(40, training={"communication": way})
    found["bfloat16"] = message(lambda: trained(40, training={"communication": "bfloat16"}))
    found["alike"] = all(
        torch.equal(a, b)
        for other in processes.gathered(found["whole"][0])
        for a, b in zip(other.values(), found["whole"][0].values(), strict=True)
    )
    found["resumed"] = [
        resumed_alike(**how) for how in ({"ema": 0.9}, {"communication": "powersgd"})
    ]
    found["stopped"] = stopped_alike()
    return found


def compress(folder):
    result = taut.compress(network(0), task_of(40), RECIPE, folder=folder / "run")
    sizes = processes.gathered(result.measurement.size_bytes)
    answers = processes.gathered(result.model(task_of(40)._data["test"][0][0]).detach())
    return {"sizes": sizes, "answers": answers, "history": len(result.history)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = train() if sys.argv[2] == "train" else compress(folder)
    if processes.is_main():
        torch.save(found, folder / f"{sys.argv[2]}.pt")
    group = weakref.ref(torch.distributed.group.WORLD)
    processes.part()
    assert group() is None, "something holds the group, whose threads outlive Python then"
