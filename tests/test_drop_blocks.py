"""Blocks left out: harmless ones first, measured again after each, replayed from a file."""

import itertools
import logging

import pytest
import torch
from nets import Net
from structures import STRUCTURES, conv, example, pooled
from torch import nn
from torch.nn import functional as F

import taut
from taut import edits
from taut.container import encode
from taut.errors import FormatError, RecipeError
from taut.modules import clone
from taut.pack import load, pack
from taut.packed import Plain
from taut.statistics import Statistics
from taut.techniques import DropBlocks
from taut.techniques.drop_blocks import Drop, DropRecurrent
from taut.trace import trace


def dropped(net, x, **options):
    """The network without blocks; its loss is how far it is from what it gave."""
    net = net.eval()
    with torch.no_grad():
        wanted = net(x)
    loss = Statistics(net, lambda m: 1 + float((m(x) - wanted).detach().square().mean()))
    return DropBlocks(**options).reshape(net, trace(net, ((x[:2],), {})), loss)


class Block(nn.Module):
    """relu(x + b(relu(a(x)))), whose branch is `size` times as loud."""

    def __init__(self, size):
        super().__init__()
        self.a, self.b = conv(6, 4), conv(4, 6)
        with torch.no_grad():
            self.b.weight.mul_(size)
            self.b.bias.mul_(size)

    def forward(self, x):
        return F.relu(x + self.b(F.relu(self.a(x))))


def through(net, x):
    return pooled(net, net.blocks(F.relu(net.stem(x))))


def residual(*sizes):
    return Net(
        through, stem=conv(3, 6), blocks=nn.Sequential(*map(Block, sizes)), out=nn.Linear(6, 4)
    ).eval()


IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_block_that_does_nothing_goes_without_a_trace(tmp_path):
    net = residual(1.0, 0.0, 1.0)
    with torch.no_grad():
        wanted = net(IMAGES)
    fresh = clone(net)
    made = dropped(net, IMAGES)
    assert edits.of(made) == (Drop(path="blocks.1", gives="input"),)
    with torch.no_grad():
        assert torch.equal(made(IMAGES), wanted)
    assert not list(made.blocks[1].parameters())
    pack(made, tmp_path / "net.taut", "float32")
    names = {n for t in taut.inspect(tmp_path / "net.taut").tensors for n in t.names}
    assert names == fresh.state_dict().keys() - {f"blocks.1.{n}" for n in Block(1).state_dict()}
    loaded = load(tmp_path / "net.taut", fresh)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), wanted)


def test_the_least_damage_goes_first_and_is_measured_again(caplog):
    net = residual(0.5, 0.1, 2.0, 0.3)
    with torch.no_grad():
        wanted = net(IMAGES)

    def damage(paths):
        probe = edits.replay(clone(net), [Drop(path=p, gives="input") for p in paths])
        with torch.no_grad():
            return float((probe(IMAGES) - wanted).square().mean())

    chosen = []
    for _ in range(3):
        rest = [f"blocks.{i}" for i in range(4) if f"blocks.{i}" not in chosen]
        chosen.append(min(rest, key=lambda p: damage([*chosen, p])))
    with caplog.at_level(logging.INFO, "taut"):
        made = dropped(clone(net), IMAGES, count=3)
    assert [e.path for e in edits.of(made)] == chosen
    assert f"drop_blocks: {chosen[0]} goes, 442 parameters: loss 1" in caplog.text
    assert [e.path for e in edits.of(dropped(clone(net), IMAGES, ratio=0.5))] == chosen[:2]


def test_the_loss_bounds_how_many_go(caplog):
    net = residual(1.0, 0.0, 0.0, 3.0)
    made = dropped(clone(net), IMAGES, most_loss=1e-9)
    assert sorted(e.path for e in edits.of(made)) == ["blocks.1", "blocks.2"]
    assert len(edits.of(dropped(clone(net), IMAGES, most_loss=100.0))) == 4
    assert len(edits.of(dropped(clone(net), IMAGES, count=3, most_loss=1e-9))) == 2
    with caplog.at_level(logging.WARNING, "taut"):
        made = dropped(residual(1.0, 1.0), IMAGES, most_loss=1e-9)
    assert not edits.of(made)
    assert "drop_blocks: 0 of 2 blocks went: the loss would be 1." in caplog.text


def test_only_chooses_by_all_weights_of_a_block():
    net = residual(0.0, 0.5, 0.6)
    made = dropped(clone(net), IMAGES, only="!blocks.0")
    assert [e.path for e in edits.of(made)] == ["blocks.1"]
    told = r"none of the blocks of only='blocks.0.a' gives .* do: blocks.0, blocks.1, blocks.2"
    with pytest.raises(RecipeError, match=told):
        dropped(net, IMAGES, only="blocks.0.a")


# ---- the shortcut stays ---------------------------------------------------------------------


def build(name):
    make, shape = STRUCTURES[name]
    return make().eval(), example(shape)


def test_a_branch_of_a_sum_goes_with_what_it_alone_reads():
    net, x = build("residual")
    made = dropped(net, x, count=2)
    assert {e.path: e.gives for e in edits.of(made)} in (
        {"a": "input", "b": "zero", "c": "input", "d": "zero"},
        {"a": "input", "b": "zero", "side": "zero"},
    )
    net, x = build("residual")
    made = dropped(net, x, only="c, d")
    with torch.no_grad():
        h = F.relu(net.norm(net.stem(x)))
        h = F.relu(h + net.b(F.relu(net.a(h))))
        wanted = net.out(F.relu(net.side(h)).mean((2, 3)))
    torch.testing.assert_close(made(x), wanted)


def test_a_transformer_loses_branches_or_layers():
    net, words = build("attention")
    made = dropped(net, words, only="up, down")
    assert [(e.path, e.gives) for e in edits.of(made)] == [
        ("second", "input"), ("up", "input"), ("down", "zero"),
    ]  # fmt: skip
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Linear(6, 16), layer, clone(layer), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 5, 6)
    made = dropped(clone(net), x)
    (edit,) = edits.of(made)
    assert edit.path in ("1", "2")
    assert edit.gives == "input"
    with torch.no_grad():
        torch.testing.assert_close(made(x), net[3](net[1](net[0](x))), atol=1e-5, rtol=1e-4)


def test_attention_of_a_block_is_a_branch():
    net = taut.zoo.create("transformer_language_model", vocabulary=12, width=8, heads=2, context=6)
    x = torch.randint(0, 12, (3, 6))
    made = dropped(net, x, of="branches", count=1, only="blocks.0.attention")
    assert [(e.path, e.gives, e.outputs) for e in edits.of(made)] == [
        ("blocks.0.norm1", "input", 0), ("blocks.0.attention", "zero", 2),
    ]  # fmt: skip
    assert len(edits.of(dropped(made, x, only="blocks.1"))) == 3


# ---- layers ---------------------------------------------------------------------------------


def wide(*values):
    layers = [nn.Linear(6, 6) for _ in values]
    with torch.no_grad():
        for layer, value in zip(layers, values, strict=True):
            layer.weight.copy_(torch.eye(6) + value * torch.randn(6, 6))
            layer.bias.zero_()
    return nn.Sequential(*layers, nn.Linear(6, 4)).eval()


def test_single_layers():
    net, x = wide(1.0, 0.0, 1.0), torch.randn(20, 6)
    with torch.no_grad():
        wanted = net(x)
    told = r"none of the blocks of only='\*' .* none; try of='branches' or of='layers'"
    with pytest.raises(RecipeError, match=told):
        dropped(clone(net), x)
    made = dropped(net, x, of="layers")
    assert edits.of(made) == (Drop(path="1", gives="input"),)
    torch.testing.assert_close(made(x).detach(), wanted)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("both", [False, True])
def test_a_layer_of_a_stack_goes_as_if_it_had_not_been_there(kind, index, both):
    width = 8 if both else 4
    stack = kind(width, 4, 3, batch_first=True, bidirectional=both).eval()
    x = torch.randn(2, 5, width)
    made = edits.replay(clone(stack), [DropRecurrent(path="", layer=index)])
    assert made.num_layers == 2
    with torch.no_grad():
        h = x
        for i in range(3):
            if i != index:
                alone = kind(width, 4, 1, batch_first=True, bidirectional=both)
                for end in ("", "_reverse") if both else ("",):
                    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                        held = getattr(stack, f"{part}_l{i}{end}")
                        getattr(alone, f"{part}_l0{end}").copy_(held)
                h = alone(h)[0]
        torch.testing.assert_close(made(x)[0], h)


def test_a_stack_loses_its_most_useless_layers_in_a_run(tmp_path):
    net = Net(lambda n, x: n.out(n.stack(x)[0][:, -1]), stack=nn.LSTM(6, 6, 4, batch_first=True),
              out=nn.Linear(6, 3))  # fmt: skip
    x, y = torch.randn(32, 5, 6), torch.arange(32) % 3
    task = taut.Task(train=[(x, y)], test=[(x, y)])
    recipe = "drop_blocks(of='layers', count=2) > recover(epochs=1) > share_values(bits=5)"
    result = taut.compress(net, task, recipe, folder=tmp_path / "run")
    kinds = taut.inspect(result.folder / "net.taut").edits
    assert kinds == ("drop_recurrent", "drop_recurrent")
    loaded = load(result.folder / "net.taut", clone(net))
    assert loaded.stack.num_layers == 2
    torch.testing.assert_close(loaded(x), result.model(x))


# ---- what the network needs, and bad input --------------------------------------------------


def peeking(net, x):
    assert isinstance(net.a[0], nn.Conv2d)
    return pooled(net, net.b(net.a(x)))


def test_what_the_network_needs_stays_and_is_named(caplog):
    def block():
        return nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3))

    net = Net(peeking, a=block(), b=block(), out=nn.Linear(3, 2))
    with caplog.at_level(logging.INFO, "taut"):
        made = dropped(net, IMAGES, count=2)
    assert edits.of(made) == (Drop(path="b", gives="input"),)
    assert "drop_blocks: a stays: without it TypeError" in caplog.text
    assert "drop_blocks: 1 of 2 blocks went: the network needs the rest" in caplog.text


def test_options_are_checked():
    with pytest.raises(RecipeError, match=r"count and ratio both say .* count=2 and ratio=0.5"):
        DropBlocks(count=2, ratio=0.5)
    with pytest.raises(RecipeError, match=r"ratio must lie in \[0, 1\), got 1"):
        DropBlocks(ratio=1.0)
    with pytest.raises(RecipeError, match="of has no choice 'block'; did you mean 'blocks'"):
        DropBlocks(of="block")
    with pytest.raises(RecipeError, match=r"count=5 are to go and 2 of only='\*' may; ask for"):
        dropped(residual(1.0, 1.0), IMAGES, count=5)


def test_without_data_it_says_so():
    net = residual(1.0, 1.0)
    traced = trace(net, ((IMAGES[:2],), {}))
    with pytest.raises(RecipeError, match="drop_blocks: a search for what to keep needs a task"):
        DropBlocks().reshape(net, traced, Statistics(net))


def stacked():
    return nn.ModuleDict(
        {
            "rnn": nn.LSTM(4, 4, 2),
            "odd": nn.GRU(3, 4, 2),
            "one": nn.RNN(4, 4),
            "fc": nn.Linear(4, 4),
        }
    )


HOSTILE = [
    ("drop", {"path": "", "gives": "input"}, "a module inside the model gives .* got path=''"),
    ("drop", {"path": "fc", "gives": "all"}, "got path='fc', gives='all'"),
    ("drop", {"path": "fc", "gives": "zero", "outputs": 10**9}, "outputs=1000000000"),
    ("drop", {"path": "fc", "gives": "zero", "outputs": -1}, "outputs=-1"),
    ("drop", {"path": "fc", "gives": "zero", "outputs": True}, "outputs is of another type"),
    (
        "drop",
        {"path": "fc.weight", "gives": "zero"},
        "drop: .*; build the model that was compressed",
    ),
    ("drop", {"path": "no", "gives": "zero"}, "has no attribute .no.; build the model"),
    ("drop", {"gives": "zero"}, "drop: .*missing.*'path'"),
    ("drop_recurrent", {"path": "fc", "layer": 0}, "'fc' is no LSTM, GRU or RNN but a Linear"),
    ("drop_recurrent", {"path": "rnn", "layer": 2}, "it has 2 layers, one of which stays"),
    ("drop_recurrent", {"path": "rnn", "layer": -1}, "layer -1 of 'rnn': it has 2 layers"),
    ("drop_recurrent", {"path": "one", "layer": 0}, "it has 1 layers, one of which stays"),
    ("drop_recurrent", {"path": "odd", "layer": 0}, "first layer reads 3 numbers and gives 4"),
    ("drop_recurrent", {"path": "odd", "layer": "0"}, "layer is of another type"),
]


@pytest.mark.parametrize(("kind", "options", "told"), HOSTILE)
def test_hostile_edits_are_refused_and_the_model_is_untouched(kind, options, told, tmp_path):
    model = stacked()
    state = {(n,): Plain.of(t) for n, t in model.state_dict().items()}
    path = tmp_path / "bad.taut"
    path.write_bytes(encode(state, [[kind, options]]))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(FormatError, match=told):
        load(path, model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in after.items())
    assert not edits.of(model)


def test_a_loss_that_is_no_number_drops_nothing(caplog):
    net = residual(1.0, 1.0)
    gone = lambda m: len(list(m.parameters())) < len(list(net.parameters()))  # noqa: E731
    statistics = Statistics(net, lambda m: float("nan") if gone(m) else 1.0)
    with caplog.at_level(logging.WARNING, "taut"):
        made = DropBlocks().reshape(clone(net), trace(net, ((IMAGES[:2],), {})), statistics)
    assert not edits.of(made)
    assert "drop_blocks: 0 of 2 blocks went: the loss would be inf" in caplog.text


def test_copies_and_checkpoints_keep_the_place():
    net = dropped(residual(1.0, 0.0), IMAGES)
    copied = clone(net)
    assert edits.of(copied) == edits.of(net)
    fresh = residual(1.0, 1.0)
    again = edits.replay(fresh, edits.from_json(edits.to_json(edits.of(net))))
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        for one, other in itertools.pairwise((net, copied, again)):
            assert torch.equal(one(IMAGES), other(IMAGES))
