"""Tracing: which channels of one site are the inputs of another, and who else reads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Forward, Net, traced, weight
from torch import Tensor, nn
from torch.nn import functional as F

from taut.zoo import LeNet5, LeNet300


def feeds(model: nn.Module, *args: Any) -> list[tuple[str, str, int, bool]]:
    return [(f.source, f.target, f.width, f.only_reader) for f in traced(model, *args).feeds]


def pair(run: Forward, **parts: nn.Module) -> Net:
    """Two convolutions with something between them."""
    return Net(run, a=nn.Conv2d(2, 4, 3), b=nn.Conv2d(4, 3, 1), **parts)


IMAGE = (2, 2, 8, 8)
JOINED = ("a.weight", "b.weight", 1, True)
CHANNELWISE: dict[str, Forward] = {
    "nothing": lambda n, x: n.b(n.a(x)),
    "relu": lambda n, x: n.b(n.a(x).relu()),
    "relu in place": lambda n, x: n.b(F.relu_(n.a(x))),
    "gelu, dropout": lambda n, x: n.b(F.dropout(F.gelu(n.a(x)), 0.5, n.training)),
    "pooling": lambda n, x: n.b(F.avg_pool2d(F.max_pool2d(n.a(x), 2), 2)),
    "adaptive pooling": lambda n, x: n.b(F.adaptive_avg_pool2d(n.a(x), 2)),
    "batch norm": lambda n, x: n.b(n.norm(n.a(x)).tanh()),
}


@pytest.mark.parametrize("name", CHANNELWISE)
def test_channels_pass_through_what_treats_them_one_by_one(name: str) -> None:
    assert feeds(pair(CHANNELWISE[name], norm=nn.BatchNorm2d(4)), torch.randn(IMAGE)) == [JOINED]


MIXING: dict[str, Forward] = {
    "softmax": lambda n, x: n.b(n.a(x).softmax(1)),
    "layer norm": lambda n, x: n.b(F.layer_norm(n.a(x), (4, 6, 6))),
    "group norm": lambda n, x: n.b(F.group_norm(n.a(x), 2)),
    "residual": lambda n, x: n.b(n.a(x) + x.sum()),
    "gate": lambda n, x: n.b(n.a(x) * n.a(x).sigmoid()),
    "shuffled": lambda n, x: n.b(n.a(x).flip(1)),
    "turned": lambda n, x: n.b(n.a(x).permute(0, 2, 1, 3)[:, :4]),
    "half of them": lambda n, x: n.b(torch.cat([n.a(x)[:, :2], n.a(x)[:, 2:]], 1)),
    "in place": lambda n, x: n.b(n.a(x).add_(x.sum())),
    "scan": lambda n, x: n.b(n.a(x).cumsum(1)),
}


@pytest.mark.parametrize("name", MIXING)
def test_channels_end_where_they_are_mixed(name: str) -> None:
    assert feeds(pair(MIXING[name]), torch.randn(IMAGE)) == []


def test_a_grouped_reader_takes_only_some_channels() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 1, 1))
    assert feeds(net, torch.randn(IMAGE)) == [("1.weight", "2.weight", 1, True)]


def two(a: Tensor, b: Tensor) -> Tensor:
    return a.sum() + b.sum()


OTHER_READERS: dict[str, Forward] = {
    "residual": lambda n, x: two(n.b(n.mid(x)), n.mid(x) + 1),
    "second operand": lambda n, x: two(n.b(y := n.mid(x)), torch.ones(1) + y),
    "second source": lambda n, x: two(n.b(y := n.mid(x)), n.c(x) + y),
    "the output": lambda n, x: (n.b(y := n.mid(x)), y),
    "another site": lambda n, x: two(n.b(y := n.mid(x)), n.d(y)),
    "a sequence": lambda n, x: two(n.b(y := n.mid(x)), n.d(y.unsqueeze(1))),
    "a product": lambda n, x: two(n.b(y := n.mid(x)), y @ y.T),
    "a bias": lambda n, x: two(n.b(y := n.mid(x)), torch.addmm(y, x, n.c.weight.T)),
    "after relu": lambda n, x: two(n.b(y := n.mid(x).relu()), y.softmax(1)),
}


@pytest.mark.parametrize("name", OTHER_READERS)
def test_another_reader_is_told(name: str) -> None:
    parts = {"mid": nn.Linear(6, 4), "b": nn.Linear(4, 3), "c": nn.Linear(6, 4)}
    found = feeds(Net(OTHER_READERS[name], **parts, d=nn.Linear(4, 2)), torch.randn(2, 6))
    assert ("mid.weight", "b.weight", 1, False) in found
    assert all(not only for source, _, _, only in found if source == "mid.weight")


def test_a_tied_source_is_read_wherever_it_stands() -> None:
    net = Net(lambda n, x: (n.b(n.a(x)), n.c(x).softmax(1)), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    net.c = nn.Linear(4, 4)
    net.c.weight = net.a.weight
    assert feeds(net, torch.randn(2, 4)) == [("a.weight", "b.weight", 1, False)]


@pytest.mark.parametrize("join", [lambda x: x.flatten(1), lambda x: x.reshape(2, 4 * 36)])
def test_flattening_widens_a_channel(join: Callable[[Tensor], Tensor]) -> None:
    net = Net(lambda n, x: n.b(join(n.a(x))), a=nn.Conv2d(2, 4, 3), b=nn.Linear(144, 3))
    assert feeds(net, torch.randn(IMAGE)) == [("a.weight", "b.weight", 36, True)]


def test_a_feed_holds_what_it_says() -> None:
    """Change one channel of the source: the target's inputs change there and nowhere else."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(36, 3)
    )
    x = torch.randn(IMAGE)
    (feed,) = traced(net, x).feeds
    seen: list[Tensor] = []
    net[5].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    net.eval()(x)
    with torch.no_grad():
        net[0].weight[2] += 1.0
    net(x)
    changed = (seen[0] != seen[1]).any(0).nonzero().flatten().tolist()
    assert changed
    assert set(changed) <= set(range(2 * feed.width, 3 * feed.width))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (2, 3, 4)),
        (Net(lambda n, x: n.b(n.a(x).T), a=nn.Linear(4, 2), b=nn.Linear(2, 4)), (2, 4)),
        (Net(lambda n, x: n.b(F.max_pool1d(n.a(x), 2)), a=nn.Linear(4, 8), b=nn.Linear(4, 4)),
         (2, 4)),
        (Net(lambda n, x: F.linear(x @ n.w, n.v), w=weight(4, 4), v=weight(4, 4)), (2, 4)),
        (Net(lambda n, x: n.b(F.linear(x, n.w.T)), w=weight(4, 4), b=nn.Linear(4, 3)), (2, 4)),
    ],
)  # fmt: skip
def test_no_feed_where_rows_are_no_channels(net: Net, shape: tuple[int, ...]) -> None:
    assert feeds(net, torch.randn(shape)) == []


def test_feeds_of_the_lenets() -> None:
    x = torch.randn(2, 1, 28, 28)
    assert feeds(LeNet5(), x) == [
        ("conv1.weight", "conv2.weight", 1, True),
        ("conv2.weight", "fc1.weight", 16, True),
        ("fc1.weight", "fc2.weight", 1, True),
    ]
    assert [f[:2] for f in feeds(LeNet300(), x)] == [
        ("fc1.weight", "fc2.weight"),
        ("fc2.weight", "fc3.weight"),
    ]
