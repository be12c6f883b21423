"""What must be cut together, what cannot be cut and why, and what a cut would leave."""

import numpy as np
import pytest
import torch
from nets import Net, weight
from structures import STRUCTURES, conv, example
from torch import nn
from torch.nn import functional as F

from taut.groups import Groups
from taut.groups.movement import blocks
from taut.groups.symbols import Symbols
from taut.zoo import LeNet5


def found(net, *args):
    return Groups(net.eval(), (args, {}))


def structure(name):
    make, shape = STRUCTURES[name]
    return found(make(), example(shape))


def parts(group):
    """Members by name and dimension, with the places of each unit."""
    return {(m.name, m.dim): m.places.shape[1] for m in group.members}


# Symbols


def test_places_that_meet_are_one():
    symbols = Symbols()
    a, b, c = (symbols.fresh(3) for _ in range(3))
    symbols.unite(a, b)
    symbols.unite(b[:2], c[1:])
    assert symbols.kinds(np.concatenate([a, b, c])) == 4
    assert symbols.find(a).tolist() == symbols.find(b).tolist()
    assert symbols.find(a)[0] == symbols.find(c)[1]
    symbols.unite(a, a[:1])
    assert symbols.kinds(np.concatenate([a, b])) == 1


def test_a_reason_reaches_all_that_meet():
    symbols = Symbols()
    a, b, c, d = (symbols.fresh(4) for _ in range(4))
    symbols.hold(d[:1], "an output")
    symbols.unite(c, d)
    symbols.unite(b, c)
    symbols.unite(a, b)
    assert symbols.held(a).tolist() == [True, False, False, False]
    assert symbols.reason(int(a[0])) == "an output"
    symbols.context = "met in add"
    symbols.unite(np.zeros(4, np.int64), a)
    assert symbols.held(b).all()
    assert symbols.reason(int(a[0])) == "an output"
    assert symbols.reason(int(a[1])) == "met in add"


def test_chains_in_one_call_keep_their_reasons():
    symbols = Symbols()
    a = symbols.fresh(2000)
    symbols.hold(a[-1:], "the last")
    symbols.unite(a[1:], a[:-1])
    assert symbols.kinds(a) == 1
    assert symbols.reason(int(a[0])) == "the last"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ((4, 6), (4, 2, 3), [((0,), (0,)), ((1,), (1, 2))]),
        ((2, 3, 4), (6, 4), [((0, 1), (0,)), ((2,), (1,))]),
        ((5, 2, 16), (5, 8, 4), [((0,), (0,)), ((1, 2), (1, 2))]),
        ((1, 6, 1), (6,), [((1,), (0,))]),
        ((4, 9), (6, 6), [((0, 1), (0, 1))]),
    ],
)
def test_views_fall_into_blocks(before, after, told):
    assert blocks(before, after) == told


# What goes together


def test_heads_of_joint_projections():
    heads = structure("joint attention")["attention.joint.weight"]
    assert heads.units == 4
    assert parts(heads) == {
        ("attention.joint.weight", 0): 12, ("attention.joint.bias", 0): 12,
        ("attention.out.weight", 1): 4,
    }  # fmt: skip
    assert heads.members[0].places[1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39]
    assert heads.granularity == 12


def test_gates_layers_and_directions_of_an_lstm():
    groups = structure("bilstm")
    units = groups["layer.weight_ih_l0"]
    assert units.units == 8
    assert len(units.members) == 4 * 4 + 1 + 2 + 4  # rows; out; inputs of layer 1; weight_hh
    assert parts(units)["layer.weight_ih_l1", 1] == parts(units)["out.weight", 1] == 2
    assert units.members[0].places[3].tolist() == [3, 11, 19, 27]


def test_flattened_channels_are_runs():
    groups = structure("plain")
    last = next(g for g in groups.groups if ("8.weight", 1) in parts(g))
    member = next(m for m in last.members if (m.name, m.dim) == ("8.weight", 1))
    assert member.places[2].tolist() == list(range(32, 48))


def test_branches_joined_end_to_end_stay_apart():
    groups = structure("dense")
    assert [g.units for g in groups.groups] == [4, 4, 4]
    assert parts(groups["a.2.weight"]).keys() >= {("b.2.weight", 1), ("c.0.running_var", 0)}


def test_a_tied_weight_is_one_member():
    (units,) = structure("tied words").groups  # the LSTM's output meets the table it came from
    assert parts(units)["words.weight", 1] == 1
    assert parts(units)["layer.weight_hh_l0", 1] == 1
    assert parts(units)["layer.weight_hh_l0", 0] == 4
    assert units.units == 8
    assert units.parameters == 20 + 2 * (32 * 8 - 28 * 7) + 2 * 4


def test_what_it_costs_is_what_goes():
    groups = found(LeNet5(), torch.randn(3, 1, 28, 28))
    first = groups["conv1.weight"]
    assert first.units == 20
    assert first.parameters == 25 + 1 + 50 * 25
    assert first.macs == 24 * 24 * 25 + 8 * 8 * 50 * 25
    keep = {"conv1.weight": range(10)}
    assert groups.shapes(keep)["conv2.weight"] == (50, 10, 5, 5)
    assert groups.parameters({}) - groups.parameters(keep) == 10 * first.parameters
    assert groups.macs({}) - groups.macs(keep) == 10 * first.macs
    assert groups.macs({}) == 2_293_000


def test_every_activation_is_known():
    kinds = [
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
        nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softshrink, nn.Tanhshrink,
        nn.LogSigmoid, nn.Sigmoid, nn.Tanh, nn.Softsign, nn.PReLU,
    ]  # fmt: skip
    net = nn.Sequential(nn.Linear(4, 6), *(k() for k in kinds), nn.Linear(6, 2))
    groups = found(net, torch.randn(2, 4))
    assert not groups.unknown
    assert [g.units for g in groups.groups] == [6]


# What stays whole


@pytest.mark.parametrize(
    ("net", "shape", "name", "dim", "why"),
    [
        (nn.Linear(4, 3), (2, 4), "weight", 0, "an output of the model"),
        (nn.Linear(4, 3), (2, 4), "weight", 1, "an input of the model"),
        (conv(3, 4), (2, 3, 8, 8), "weight", 2, "the window of a convolution"),
        (
            Net(lambda net, x: net.b(net.a(x).flip(1)), a=nn.Linear(4, 6), b=nn.Linear(6, 3)),
            (2, 4), None, 0, "",
        ),
        (
            Net(lambda net, x: net.b(net.a(x).sort(1)[0]), a=nn.Linear(4, 6), b=nn.Linear(6, 3)),
            (2, 4), "a.weight", 0, "fixed in sort of the model",
        ),
        (
            Net(
                lambda net, x: net.b(torch.linalg.inv(net.a(x))), a=nn.Linear(6, 6),
                b=nn.Linear(6, 3),
            ),
            (6, 6), "a.weight", 0, "read by linalg_inv, of which no rule is known",
        ),
        (
            Net(lambda net, x: net.b(net.a(x)[:, [0, 2, 4]]), a=nn.Linear(4, 6), b=nn.Linear(3, 3)),
            (2, 4), "a.weight", 0, "its places are chosen by number (index)",
        ),
        (
            Net(
                lambda net, x: net.b(net.a(x) + torch.ones(6).tolist()[0] * x.sum() + C),
                a=nn.Linear(4, 6), b=nn.Linear(6, 3),
            ),
            (2, 4), "a.weight", 0, "a constant of the code",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_says_why(net, shape, name, dim, why):
    groups = found(net, torch.randn(shape))
    reasons = {(w.name, w.dim): w.reason for w in groups.whole}
    if name is None:
        assert ("a.weight", 0) not in reasons
    else:
        assert reasons[name, dim] == why
        assert not any((name, dim) in parts(g) for g in groups.groups)


C = torch.randn(6)


def test_an_embedding_keeps_its_rows():
    reasons = {(w.name, w.dim): w.reason for w in structure("tied words").whole}
    assert reasons["words.weight", 0] == "its rows are chosen by number (embedding)"


def test_a_table_that_is_no_output_may_go_with_what_reads_it():
    net = Net(lambda net, x: x @ (net.a @ net.b), a=weight(4, 6), b=weight(6, 3))
    (group,) = found(net, torch.randn(2, 4)).groups
    assert parts(group) == {("b", 0): 1, ("a", 1): 1}


def test_what_the_example_does_not_reach_is_left_alone():
    net = Net(lambda net, x: net.b(F.relu(net.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3),
              c=nn.Linear(6, 6))  # fmt: skip
    groups = found(net, torch.randn(2, 4))
    assert "c.weight" not in groups.tensors
    assert groups.parameters({"a.weight": [0]}) == 4 + 1 + 3 + 3 + 42


def test_the_network_is_untouched():
    net = STRUCTURES["residual"][0]().train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    Groups(net, ((torch.randn(2, 3, 8, 8),), {}))
    assert net.training
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_under_no_grad_and_autocast_it_is_read_on():
    def run(net, x):
        x = net.a(x)
        with torch.no_grad():
            gate = x.mean(0, keepdim=True).sigmoid()
        return net.b(x * gate)

    (group,) = found(Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 3)), torch.randn(2, 4)).groups
    assert group.units == 6
