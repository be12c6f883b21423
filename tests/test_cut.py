"""The cut: right by definition on networks of every structure, or undone."""

import pytest
import torch
from nets import Net
from structures import STRUCTURES, example
from torch import Tensor, nn

from taut import edits
from taut.errors import RecipeError, TraceError
from taut.groups import Groups, cut
from taut.modules import clone, tensor_at
from taut.pack import load, pack


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = STRUCTURES[name]
    net = make().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net, example(shape)


def halves(groups: Groups) -> dict[str, list[int]]:
    """A half of the units of every group, drawn at random."""
    return {g.name: sorted(torch.randperm(g.units)[: g.units // 2].tolist()) for g in groups.groups}


def numbers(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # from PyTorch, on CPUs
def test_half_of_every_group_goes(name, tmp_path):
    net, x = build(name)
    groups = Groups(net, ((x,), {}))
    assert not groups.unknown
    keep, small = halves(groups), clone(net)
    made = cut(small, groups, keep)
    assert edits.of(small) == (made,)
    assert numbers(small) == groups.parameters(keep) < 0.65 * numbers(net)
    wanted = small(x)
    assert wanted.shape == net(x).shape
    pack(small, tmp_path / "net.taut", "float32")
    assert torch.equal(load(tmp_path / "net.taut", clone(net))(x), wanted)
    small.train()(x).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.01).step()
    assert not torch.equal(small.eval()(x), wanted)
    traced = Groups(small, ((x,), {}))  # what is left can be cut again
    assert {g.name for g in traced.groups} <= set(keep)
    assert traced.macs({}) == groups.macs(keep)


@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_units_that_nothing_reads_can_go_unseen(name):
    """The definition of a right cut: zeros in every member's places are all that is lost."""
    net, x = build(name)
    groups = Groups(net, ((x,), {}))
    norms = {
        path
        for path, m in net.named_modules()
        if isinstance(m, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    }
    keep = {
        name: kept
        for name, kept in halves(groups).items()
        if not any(m.name.rpartition(".")[0] in norms for m in groups[name].members)
    }
    if name == "encoder":  # PyTorch's own attention gives its heads the width of its input
        del keep["layer.self_attn.in_proj_weight"]
    assert keep
    for group in map(groups.__getitem__, keep):
        gone = sorted(set(range(group.units)) - set(keep[group.name]))
        for member in group.members:
            if member.trained:
                places = torch.from_numpy(member.places[gone].ravel())
                if member.name == "a.parametrizations.weight.original1" and member.dim == 0:
                    continue  # a direction without a length
                tensor_at(net, member.name).index_fill_(member.dim, places, 0)
    wanted = net(x)
    cut(net, groups, keep)
    torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "attention", "joint attention", "bilstm", "dense"])
def test_each_group_can_be_cut_alone(name):
    net, x = build(name)
    groups = Groups(net, ((x,), {}))
    for group in groups.groups:
        small = clone(net)
        before = groups.macs({})
        cut(small, groups, {group.name: range(group.units - 1)})
        assert numbers(net) - numbers(small) == group.parameters
        assert before - Groups(small, groups.example).macs({}) == pytest.approx(group.macs, abs=1)


def test_attributes_follow():
    net, x = build("attention")
    groups = Groups(net, ((x,), {}))
    made = cut(net, groups, {"attention.query.weight": [0, 2, 3], "up.weight": range(10)})
    assert net.attention.num_heads == 3
    assert net.attention.head_dim == 4
    assert made.attributes == {
        "attention.num_heads": 3,
        "attention.query.out_features": 12,
        "attention.key.out_features": 12,
        "attention.value.out_features": 12,
        "attention.out.in_features": 12,
        "up.out_features": 10,
        "down.in_features": 10,
    }
    assert made.sizes["attention.out.weight"] == [16, 12]


def test_of_two_equal_numbers_the_one_that_must_follows():
    net, x = build("encoder")
    groups = Groups(net, ((x,), {}))
    cut(net, groups, {g.name: range(g.units // 2) for g in groups.groups})
    attention = net.layer.self_attn
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (8, 2, 4)
    wanted = net(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(net(x), wanted)  # PyTorch's fused path


def test_ties_stay_and_gradients_start_anew():
    net, x = build("tied words")
    groups = Groups(net, ((x,), {}))
    net(x).sum().backward()
    held = net.words.weight
    cut(net, groups, halves(groups))
    assert net.words.weight is held
    assert held.grad is None
    assert net.layer.input_size == net.layer.hidden_size == 4


def with_literal(net: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    heads = net.a(x).view(n, t, 4, 4).softmax(2)
    return net.b(heads.reshape(n, t, 16))


def test_a_cut_that_fails_is_undone():
    net = Net(with_literal, a=nn.Linear(6, 16), b=nn.Linear(16, 4))
    x = torch.randn(2, 5, 6)
    wanted, groups = net(x), Groups(net, ((x,), {}))
    with pytest.raises(RecipeError, match=r"does not run with a\.weight cut .*it is as it was"):
        cut(net, groups, {"a.weight": [0]})
    assert torch.equal(net(x), wanted)
    assert net.a.out_features == net.b.in_features == 16
    assert not edits.of(net)


def test_a_model_keeps_its_mode_and_hooks():
    net, x = build("plain")
    groups = Groups(net, ((x,), {}))
    net.train()
    net[1].eval()
    cut(net, groups, halves(groups))
    assert net.training
    assert not net[1].training
    assert not any(m._forward_hooks for m in net.modules())


def test_what_is_kept_must_be_units():
    net, x = build("mlp")
    groups = Groups(net, ((x,), {}))
    for kept in ([], [16], [-1]):
        with pytest.raises(RecipeError, match=r"0\.weight has the units 0 to 15"):
            cut(net, groups, {"0.weight": kept})
    with pytest.raises(RecipeError, match=r"no group '0\.wight'; did you mean '0\.weight'"):
        cut(net, groups, {"0.wight": [0]})


def test_groups_are_of_the_network_as_it_is():
    net, x = build("mlp")
    groups = Groups(net, ((x,), {}))
    cut(net, groups, {"0.weight": [0, 1]})
    told = r"0\.weight is \[2, 6\] in the model and \[16, 6\] in its groups"
    with pytest.raises(RecipeError, match=told):
        cut(net, groups, {"0.weight": [0]})


def test_two_parameters_in_one_memory_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = nn.Parameter(net[0].weight.data.t())
    with pytest.raises(TraceError, match=r"1\.weight and 0\.weight are two parameters in one mem"):
        Groups(net, ((torch.randn(2, 4),), {}))


def by_data(net: Net, x: Tensor) -> Tensor:
    return net.a(x) if x.sum() > 0 else x


def test_control_flow_by_data_is_refused():
    told = (
        r"cannot be traced by torch\.export: .* \(at test_cut\.py:\d+: return net\.a\(x\) if x\.sum"
    )
    with pytest.raises(TraceError, match=told):
        Groups(Net(by_data, a=nn.Linear(4, 4)), ((torch.randn(2, 4),), {}))


def test_a_kernel_as_large_as_a_width_stays():
    net = nn.Sequential(nn.Conv1d(3, 8, 8, padding=8), nn.Conv1d(8, 8, 8), nn.Conv1d(8, 2, 1))
    groups = Groups(net, ((torch.randn(2, 3, 16),), {}))
    cut(net, groups, {"0.weight": range(4), "1.weight": range(4)})
    assert [m.kernel_size for m in net] == [(8,), (8,), (1,)]
    assert net[0].padding == (8,)
    assert [m.in_channels for m in net] == [3, 4, 4]


class Loop(nn.Module):
    """As many turns as it has units: a number that is equal by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = 4
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 2)
        self.square = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.turns):
            x = self.square(x)
        return self.last(x)


def test_a_number_that_is_equal_by_chance_stays():
    net = Loop()
    groups = Groups(net, ((torch.randn(2, 6),), {}))
    (group,) = groups.groups
    cut(net, groups, {group.name: [0, 2]})
    assert net.square.in_features == 2
    assert net.turns == 4
