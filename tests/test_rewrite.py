"""A network as its exported graph: cut where its own code cannot follow, stored, replayed."""

import pytest
import torch
from nets import Net
from structures import STRUCTURES, example
from torch import nn
from torch.nn import functional

import taut
from taut import edits
from taut.container import encode
from taut.errors import FormatError, RecipeError
from taut.groups import AsGraph, Groups, cut, cut_graph
from taut.groups.rewrite import as_graph
from taut.layers import packed_layers
from taut.modules import clone, tensor_at
from taut.pack import load, pack
from taut.packed import Plain


def build(name):
    make, shape = STRUCTURES[name]
    return make().eval(), example(shape)


def halves(groups):
    return {g.name: range(0, g.units, 2)[: g.units // 2] for g in groups.groups}


@pytest.mark.parametrize(
    "name", ["residual", "grouped", "shuffled halves", "dense", "attention", "bilstm", "encoder"]
)
def test_it_is_the_network_that_the_cut_leaves(name, tmp_path):
    net, x = build(name)
    groups = Groups(net, ((x,), {}))
    small = clone(net)
    cut(small, groups, halves(groups))
    graph = cut_graph(net, groups, halves(groups))
    torch.testing.assert_close(graph(x), small(x))
    more = torch.cat([x, x[:1]])
    torch.testing.assert_close(graph(more), small(more))
    pack(graph, tmp_path / "net.taut", "float32")
    loaded = load(tmp_path / "net.taut", clone(net))
    assert torch.equal(loaded(x), graph(x))
    again = clone(graph)
    assert edits.of(again) == edits.of(graph)
    assert torch.equal(again(x), graph(x))
    assert {n for n, _ in graph.named_parameters()} <= {n for n, _ in net.named_parameters()}


@torch.no_grad()
def test_heads_of_pytorchs_attention_go_alone():
    net, x = build("encoder")
    groups = Groups(net, ((x,), {}))
    heads = groups["layer.self_attn.in_proj_weight"]
    for member in heads.members:
        places = torch.from_numpy(member.places[[0, 2]].ravel())
        tensor_at(net, member.name).index_fill_(member.dim, places, 0)
    wanted = net(x)
    with pytest.raises(RecipeError, match="does not run"):
        cut(net, groups, {heads.name: [1, 3]})
    torch.testing.assert_close(cut_graph(net, groups, {heads.name: [1, 3]})(x), wanted)
    assert net.layer.self_attn.in_proj_weight.shape == (48, 16)


def test_linear_layers_stay_layers_and_run_packed(tmp_path):
    net, x = build("encoder")
    groups = Groups(net, ((x,), {}))
    graph = cut_graph(net, groups, halves(groups))
    found = {n: m for n, m in graph.named_modules() if isinstance(m, nn.Linear)}
    assert set(found) == {n for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    task = taut.Task(train=[(x, x)], test=[(x, x)], loss=lambda output, _: output.mean())
    rounded = taut.apply(clone(graph), "quantize(activations=8)", task)
    pack(rounded, tmp_path / "net.taut")
    loaded = load(tmp_path / "net.taut", clone(net))
    replayed = edits.replay(clone(net), edits.of(graph))
    for made in (graph, clone(graph), replayed, loaded):
        for name in found:
            layer = made.get_submodule(name)
            assert (layer.out_features, layer.in_features) == tuple(found[name].weight.shape)
    packed = packed_layers(loaded)
    assert all(packed[name].input_code is not None for name in found)
    torch.testing.assert_close(loaded(x), rounded.eval()(x), rtol=1e-4, atol=1e-4)


def test_weights_that_others_read_stay_where_they_are():
    def run(net, x):
        return net.b(net.a(net.a(x))) @ net.b.weight + functional.linear(x, net.c.weight)[..., None]

    line = nn.Module()
    line.weight = nn.Parameter(torch.randn(8))
    net = Net(run, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=line)
    x = torch.randn(3, 8)
    graph = as_graph(net, ((x,), {}))
    assert not [m for m in graph.modules() if isinstance(m, nn.Linear)]
    torch.testing.assert_close(graph(x), net(x))


def test_constants_of_the_code_are_made_again_and_not_stored(tmp_path):
    def run(net, x):  # two heads as wide as the input allows, under a mask made piece by piece
        batch, steps, width = x.shape
        mask = x.new_zeros(steps, steps)
        mask[0], mask[1:] = 1, 2
        q, k, v = net.a(x).reshape(batch, steps, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1) + mask).softmax(-1) @ v
        return net.b(mixed.transpose(1, 2).reshape(batch, steps, width))

    net, x = Net(run, a=nn.Linear(8, 24), b=nn.Linear(8, 8)), torch.randn(2, 5, 8)
    groups = Groups(net, ((x,), {}))
    keep = {g.name: range(g.units // 2) for g in groups.groups}
    with pytest.raises(RecipeError, match="does not run"):
        cut(net, groups, keep)
    graph = cut_graph(net, groups, keep)
    assert graph.state_dict().keys() == net.state_dict().keys()
    assert sum(b.numel() for b in graph.buffers()) == 2
    for number, each in enumerate((graph, clone(graph))):
        pack(each, tmp_path / f"{number}.taut", "float32")
        assert torch.equal(load(tmp_path / f"{number}.taut", clone(net))(x), graph(x))


def test_buffers_that_no_file_of_the_network_holds_are_in_that_of_its_graph(tmp_path):
    net, x = build("encoder")
    net.register_buffer("table", torch.randn(x.shape[-1]), persistent=False)
    net.forward = lambda x, run=net.forward: run(x + net.table)
    assert "table" not in net.state_dict()
    graph = as_graph(net, ((x,), {}))
    assert "table" in graph.state_dict()
    torch.testing.assert_close(graph(x), net(x))


def test_it_trains_and_its_norms_follow_the_mode():
    net, x = build("residual")
    groups = Groups(net, ((x,), {}))
    graph = cut_graph(net.train(), groups, halves(groups))
    assert graph.training
    before = graph.norm.running_mean.clone()
    graph(x).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())
    assert not torch.equal(graph.norm.running_mean, before)
    wanted = graph.eval()(x)
    assert torch.equal(graph(x), wanted)


def test_a_number_of_the_batch_is_refused():
    def run(net, x):
        hidden = x.new_zeros(len(x), 8)
        return net.b((net.a(x) + hidden).relu())

    net = Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    groups = Groups(net, ((torch.randn(3, 4),), {}))
    with pytest.raises(RecipeError, match=r"batches of 3 only.* as len\(x\) does; write x\.shape"):
        cut_graph(net, groups, halves(groups))


def test_an_example_of_more_than_tensors_is_refused():
    net = Net(lambda net, x, scale: net.b(net.a(x) * scale), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    groups = Groups(net, ((torch.randn(3, 4), 2.0), {}))
    with pytest.raises(RecipeError, match="its example is more than tensors"):
        cut_graph(net, groups, halves(groups))


GOOD = {"shapes": [[2, 4]], "dtypes": ["float32"], "names": [], "numbers": {}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtypes": ["complex64"]}, "as_graph: inputs are of float32"),
        ({"dtypes": []}, "each input has a shape and a dtype"),
        ({"shapes": [[1 << 40]]}, "hold less than"),
        ({"shapes": [[-2, 4]]}, "as_graph: "),
        ({"shapes": [[2, 5]]}, "as_graph: .*cannot be traced"),
        ({"names": ["a", "b"]}, "each input has a shape and a dtype"),
        ({"numbers": {"9": [1, 0, 2]}}, "has 2 steps .* for step '9'"),
        ({"numbers": {"x": [1, 0, 2]}}, "for step 'x'"),
        ({"numbers": {"0": [1, 0]}}, "three numbers for each place"),
        ({"numbers": {"0": [1, 0, 2]}}, "has no number at argument 1, place 0"),
        ({"numbers": {"1": [1, 0, 64]}}, "that can become 64"),
        ({"numbers": {"1": [1, 1, 0]}}, "that can become 0"),
    ],
)
def test_hostile_edits_are_refused_and_the_model_is_untouched(changes, told, tmp_path):
    net = Net(lambda net, x: net.a(x).view(-1, 3), a=nn.Linear(4, 6))
    state = {(n,): Plain.of(t) for n, t in net.state_dict().items()}
    raw = edits.to_json([AsGraph(**{**GOOD, **changes})])
    (tmp_path / "bad.taut").write_bytes(encode(state, raw))
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(FormatError, match=told):
        load(tmp_path / "bad.taut", net)
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert not edits.of(net)
