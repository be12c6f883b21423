"""Pruned networks, and training loops as their users write them, one of them in two processes."""

import torch
from conftest import small_net
from torch import distributed, nn

import taut
from taut import processes
from taut.modules import clone, tensor_at
from taut.schedules import attach_schedules
from taut.techniques import PruneWeights

NAMES = ("0.weight", "3.weight", "5.weight")


def pruned(trained, task, sparsity=0.9, **options):
    return taut.apply(
        clone(trained), PruneWeights(sparsity=sparsity, scope="layer", **options), task
    )


def mask_of(net, name="0.weight"):
    module = net.get_submodule(name.rpartition(".")[0])
    return module.parametrizations.weight[0].forms[0]


def core_of(net, name="0.weight"):
    return net.get_submodule(name.rpartition(".")[0]).parametrizations.weight.original


def adam(net):
    return torch.optim.Adam(net.parameters(), lr=2e-3)


def train(net, task, optimizer, steps, seen=lambda: None):
    """Somebody's own loop: so many steps on the training data, and a look after each."""
    batches = list(task.batches("train"))
    for step in range(steps):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        task.loss(net(*batch.args), batch.target).backward()
        optimizer.step()
        seen()


def counts(net, task, total, schedule, steps=None):
    """How many weights of the first layer are there after each step, and before the first."""
    optimizer = adam(net)
    attach_schedules(net, optimizer, total, schedule)
    found = [int(mask_of(net).mask.sum())]
    train(net, task, optimizer, steps or total, lambda: found.append(int(mask_of(net).mask.sum())))
    return found


def dense_gradient(net, task, batch):
    """Of the loss by the first layer's weight as it is used, without any mask in between."""
    plain = small_net().eval()
    with torch.no_grad():
        for name in NAMES:
            module = plain.get_submodule(name.rpartition(".")[0])
            module.weight.copy_(tensor_at(net, name))
            module.bias.copy_(net.get_submodule(name.rpartition(".")[0]).bias)
    task.loss(plain(*batch.args), batch.target).backward()
    return plain[0].weight.grad


def two_halves(rank, folder, schedule):
    """Trains on one half of each batch, or on both where rank is None; leaves the masks there."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 12), torch.randint(0, 4, (64,))
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    task = taut.Task(train=[(x, y)], test=[(x, y)])
    taut.apply(net, PruneWeights(sparsity=0.6, scope="layer"), task)
    trained = net
    if rank is not None:
        x, y = x[rank::2], y[rank::2]
        distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
        trained = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach_schedules(trained, optimizer, 12, schedule)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x), y).backward()
        optimizer.step()
    torch.save([mask_of(net, n).mask for n in ("0.weight", "2.weight")], f"{folder}/{rank}.pt")
    if rank is not None:
        del trained, optimizer  # they hold the group
        processes.part()
