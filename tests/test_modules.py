"""Parameters of live modules: found, copied with nothing shared, and written out plainly."""

from collections.abc import Callable

import pytest
import torch
from nets import Net
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from taut.modules import (
    clone,
    device_of,
    owner,
    parametrization,
    parametrized_names,
    plain_copy,
    tensor_at,
)


class Scale(nn.Module):
    """weight = factor · core."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, core: Tensor) -> Tensor:
        return core * self.factor


def first(net: Net, x: Tensor) -> Tensor:
    out = net.a(x, x, x) if isinstance(net.a, nn.MultiheadAttention) else net.a(x)
    return out[0] if isinstance(out, tuple) else out


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4), ["weight"]),
    "conv": (lambda: nn.Conv2d(2, 3, 2), (2, 2, 4, 4), ["weight"]),
    "lstm": (
        lambda: nn.LSTM(4, 3, bidirectional=True, batch_first=True), (2, 5, 4),
        ["weight_ih_l0", "weight_hh_l0", "weight_hh_l0_reverse"],
    ),
    "gru": (lambda: nn.GRU(4, 3), (5, 2, 4), ["weight_hh_l0"]),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True), (2, 5, 4), ["in_proj_weight"],
    ),
}  # fmt: skip


def scaled(kind: str) -> tuple[Net, Tensor, list[str]]:
    """A network whose weights are scaled by 0.5, an input, and the weights' names."""
    torch.manual_seed(0)
    build, shape, names = KINDS[kind]
    net = Net(first, a=build())
    for name in names:
        parametrize.register_parametrization(net.a, name, Scale(0.5))
    return net, torch.randn(shape), [f"a.{n}" for n in names]


def shared(one: nn.Module, other: nn.Module) -> set[int]:
    """The storages and the modules that two models share."""

    def held(model: nn.Module) -> set[int]:
        tensors = (*model.parameters(), *model.buffers())
        return {t.data_ptr() for t in tensors} | {id(m) for m in model.modules()}

    return held(one) & held(other)


# Finding


def test_finding_a_parameter_by_its_name() -> None:
    net = Net(first, a=nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    assert owner(net, "a.0.weight") == (net.a[0], "weight")
    assert tensor_at(net, "a.0.weight") is net.a[0].weight
    linear = nn.Linear(4, 3)
    assert owner(linear, "weight") == (linear, "weight")
    assert parametrization(linear, "weight") is None
    assert parametrized_names(linear) == []


@pytest.mark.parametrize("kind", KINDS)
def test_finding_what_computes_a_parameter(kind: str) -> None:
    net, _, names = scaled(kind)
    assert sorted(parametrized_names(net)) == sorted(names)
    for name in names:
        found = parametrization(net, name)
        assert found is not None
        assert torch.equal(tensor_at(net, name), found.original * 0.5)
    assert parametrization(net, names[0].replace("weight", "bias")) is None


def test_device_of() -> None:
    assert device_of(nn.Linear(2, 2).to("meta")).type == "meta"
    assert device_of(nn.BatchNorm1d(2, affine=False).to("meta")).type == "meta"
    assert device_of(nn.ReLU()).type == "cpu"


# Copies


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", [False, True])
def test_a_clone_answers_alike_and_shares_nothing(kind: str, used: bool) -> None:
    net, x, names = scaled(kind)
    if used:  # recurrent layers keep what they computed, with its graph
        net(x).sum().backward()
    copied = clone(net)
    before = net(x)
    assert torch.equal(copied(x), before)
    assert shared(net, copied) == set()
    assert sorted(parametrized_names(copied)) == sorted(names)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(net(x), before)
    assert not torch.equal(copied(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_done_to_a_clone_leaves_the_original(kind: str) -> None:
    net, x, names = scaled(kind)
    before = net(x)
    copied = clone(net)
    module, name = owner(copied, names[0])
    parametrize.remove_parametrizations(module, name)
    assert names[0] in parametrized_names(net)
    assert torch.equal(net(x), before)
    again = clone(net)
    module, _ = owner(again, names[0])
    other = names[0].replace("weight", "bias").removeprefix("a.")
    parametrize.register_parametrization(module, other, Scale(3.0))
    parametrize.register_parametrization(module, name, Scale(0.0))
    assert parametrized_names(net) == [n for n in parametrized_names(net) if n in names]
    assert torch.equal(net(x), before)
    assert not tensor_at(again, names[0]).any()


def test_the_original_may_be_parametrized_after_it_was_cloned() -> None:
    net, x, _ = scaled("lstm")
    copied = clone(net)
    before = copied(x)
    parametrize.register_parametrization(net.a, "weight_ih_l0_reverse", Scale(0.0))
    assert torch.equal(copied(x), before)
    assert "a.weight_ih_l0_reverse" not in parametrized_names(copied)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_both_can_be_trained_after_cloning(kind: str) -> None:
    net, x, names = scaled(kind)
    net(x).sum().backward()
    copied = clone(net)
    for model in (net, copied):
        model.zero_grad()
        model(x).square().sum().backward()
        core = parametrization(model, names[0])
        assert core is not None
        assert core.original.grad.any()
    net.zero_grad()
    copied(x).sum().backward()
    assert all(p.grad is None for p in net.parameters())


def test_a_clone_keeps_classes_modes_and_ties() -> None:
    net, _, _ = scaled("lstm")
    net.b = nn.Linear(3, 3).requires_grad_(False)
    net.c = nn.Linear(3, 3)
    net.c.weight = net.b.weight
    net.b.eval()
    copied = clone(net)
    assert isinstance(copied.a, nn.LSTM)
    assert type(copied.a) is not type(net.a)
    assert copied.c.weight is copied.b.weight
    assert [m.training for m in copied.modules()] == [m.training for m in net.modules()]
    flags = [(n, p.requires_grad) for n, p in net.named_parameters()]
    assert [(n, p.requires_grad) for n, p in copied.named_parameters()] == flags
    assert copied.state_dict().keys() == net.state_dict().keys()


# Plain copies


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_copy_has_the_values_as_ordinary_parameters(kind: str) -> None:
    net, x, names = scaled(kind)
    wanted = net(x)
    plain = plain_copy(net)
    assert parametrized_names(plain) == []
    assert [n for n, _ in plain.named_parameters()] != [n for n, _ in net.named_parameters()]
    assert {n for n, _ in plain.named_parameters()} == {
        n for n, _ in Net(first, a=KINDS[kind][0]()).named_parameters()
    }
    assert type(plain.a) is type(KINDS[kind][0]())
    for name in names:
        assert isinstance(tensor_at(plain, name), nn.Parameter)
        assert torch.equal(tensor_at(plain, name), tensor_at(net, name))
    torch.testing.assert_close(plain(x), wanted)
    assert shared(net, plain) == set()
    with torch.no_grad():
        tensor_at(plain, names[0]).zero_()
    assert not torch.equal(plain(x), wanted)
    assert torch.equal(net(x), wanted)


def test_a_plain_copy_of_a_plain_model_is_a_clone() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    plain = plain_copy(net)
    assert shared(net, plain) == set()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in plain.state_dict().items())


def test_a_plain_copy_keeps_ties() -> None:
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    scale = Scale(0.5)
    for layer in (net.a, net.b, net.c):
        parametrize.register_parametrization(layer, "weight", scale, unsafe=True)
    net.b.parametrizations.weight.original = net.a.parametrizations.weight.original
    plain = plain_copy(net)
    assert plain.a.weight is plain.b.weight
    assert plain.c.weight is not plain.a.weight
    x = torch.randn(2, 4)
    torch.testing.assert_close(plain(x), net(x))


def test_a_plain_copy_takes_parametrizations_of_several_tensors() -> None:
    net = Net(lambda n, x: n.b(n.a(x)), a=weight_norm(nn.Linear(4, 3)), b=nn.Linear(3, 2))
    plain = plain_copy(net)
    assert parametrized_names(plain) == []
    x = torch.randn(2, 4)
    torch.testing.assert_close(plain(x), net(x))
