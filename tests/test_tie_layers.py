"""Layers that become one: which, how near, stored once, trained as one, and what is refused."""

import itertools
import logging

import pytest
import torch
from nets import Net
from structures import conv, pooled
from torch import nn

import taut
from taut import edits
from taut.container import encode
from taut.errors import FormatError, RecipeError
from taut.matching import assignment
from taut.modules import clone
from taut.pack import load, pack
from taut.packed import Plain
from taut.techniques import TieLayers
from taut.techniques.tie_layers import Tie


def task_of(x):
    y = torch.arange(len(x)) % 4
    return taut.Task(train=[(x, y)], test=[(x, y)])


def tied(net, x, **options):
    return taut.apply(net.eval(), TieLayers(**options), task_of(x))


def mlp(depth=3):
    inner = [m for _ in range(depth) for m in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), *inner, nn.Linear(16, 4)).eval()


X = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def near(net, x, wanted, tolerance=1e-5):
    with torch.no_grad():
        torch.testing.assert_close(net(x), wanted, atol=tolerance, rtol=1e-4)


# ---- stored and held once -------------------------------------------------------------------


def test_the_file_is_smaller_by_the_very_tensor(tmp_path):
    net = mlp()
    made = tied(clone(net), X, names="2.weight=6.weight", start="first", scale=False)
    assert made[2].weight is made[6].weight
    assert (
        sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in net.parameters()) - 256
    )
    for name, model in (("whole", net), ("tied", made)):
        pack(model, tmp_path / name, "float32")
    whole, small = (taut.inspect(tmp_path / n) for n in ("whole", "tied"))
    parts = {t.names: t.size_bytes for t in small.tensors}
    before = {t.names[0]: t.size_bytes for t in whole.tensors}
    assert parts.pop(("2.weight", "6.weight")) == before.pop("2.weight")
    assert parts == {(n,): size for n, size in before.items() if n != "6.weight"}
    saved = whole.size_bytes - small.size_bytes
    edit = len('{"edits":[["tie",{"names":["2.weight","6.weight"]}]]}')
    assert before["6.weight"] - edit <= saved <= before["6.weight"] + 40
    loaded = load(tmp_path / "tied", clone(net))
    assert loaded[2].weight is loaded[6].weight
    with torch.no_grad():
        assert torch.equal(loaded(X), made(X))


def test_it_trains_as_one_before_and_after_a_file(tmp_path):
    net = mlp()
    made = tied(clone(net), X, names="2=4=6")
    pack(made, tmp_path / "net.taut")
    for model in (made, load(tmp_path / "net.taut", clone(net))):
        before = model[2].weight.detach().clone()
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        model(X).square().sum().backward()
        optimizer.step()
        assert model[2].weight is model[4].weight is model[6].weight
        assert model[2].bias is model[6].bias
        assert not torch.equal(model[2].weight, before)


def test_a_run_ties_recovers_and_recodes_the_one_weight(trained, tmp_path):
    net = mlp()
    task = taut.Task(train=[(X, torch.arange(12) % 4)], test=[(X, torch.arange(12) % 4)])
    recipe = "tie_layers(count=2) > recover(epochs=1) > share_values(bits=3) > recover(epochs=1)"
    result = taut.compress(net, task, recipe, folder=tmp_path / "run")
    found = taut.inspect(result.folder / "net.taut")
    assert found.edits == ("tie",)
    (one,) = [t for t in found.tensors if len(t.names) > 1]
    assert one.names == ("2.weight", "4.weight", "6.weight")
    assert one.format == "shared_values.v1"
    loaded = load(result.folder / "net.taut", clone(net))
    near(loaded, X, result.model(X).detach())


def test_layers_inside_a_recurrent_stack_and_before_training(tmp_path):
    net = Net(lambda n, x: n.out(n.rnn(x)[0][:, -1]), rnn=nn.LSTM(8, 8, 3, batch_first=True),
              out=nn.Linear(8, 4))  # fmt: skip
    x = torch.randn(6, 5, 8)
    names = ", ".join(f"rnn.{p}_l0=rnn.{p}_l1=rnn.{p}_l2" for p in ("weight_ih", "weight_hh"))
    made = tied(clone(net), x, names=names)
    assert made.rnn.weight_ih_l0 is made.rnn.weight_ih_l2
    assert edits.of(made)[1].names == ["rnn.weight_hh_l0", "rnn.weight_hh_l1", "rnn.weight_hh_l2"]
    pack(made, tmp_path / "net.taut", "float32")
    loaded = load(tmp_path / "net.taut", clone(net))
    near(loaded, x, made(x).detach())


def test_a_head_that_is_the_embedding():
    net = taut.zoo.create("transformer_language_model", vocabulary=12, width=8, heads=2, context=6)
    x = torch.randint(0, 12, (3, 6))
    task = taut.Task(train=[(x, x)], test=[(x, x)])
    made = taut.apply(clone(net), "tie_layers(names='embedding=head, blocks.0=blocks.1')", task)
    assert made.head.weight is made.embedding.weight
    assert all(
        a is b
        for a, b in zip(made.blocks[0].parameters(), made.blocks[1].parameters(), strict=True)
    )
    mean = (net.embedding.weight + net.head.weight) / 2
    torch.testing.assert_close(made.embedding.weight, mean)


# ---- which are near, and what brings them nearer --------------------------------------------


def test_the_nearest_are_tied_up_to_the_distance(caplog):
    net = mlp(4)
    with torch.no_grad():
        net[8].weight.copy_(net[4].weight + 0.01 * torch.randn(16, 16))
        net[6].weight.copy_(net[2].weight + 0.05 * torch.randn(16, 16))
    first = net[4].weight.detach().clone(), net[8].weight.detach().clone()
    made = tied(clone(net), X, scale=False)
    assert edits.of(made) == (Tie(names=["4.weight", "8.weight"]),)
    torch.testing.assert_close(made[4].weight, (first[0] + first[1]) / 2)
    made = tied(clone(net), X, most_distance=0.5)
    assert {tuple(e.names) for e in edits.of(made)} == {
        ("4.weight", "8.weight"), ("2.weight", "6.weight"),
    }  # fmt: skip
    assert len(edits.of(tied(clone(net), X, count=3))) == 1
    with caplog.at_level(logging.WARNING, "taut"):
        assert not edits.of(tied(clone(net), X, most_distance=1e-4))
    assert "tie_layers: nothing is tied: 4.weight and 8.weight are the nearest, 0.0" in caplog.text
    told = r"count=9 weights are to go, and 3 of only='\*' can; ask for fewer"
    with pytest.raises(RecipeError, match=told):
        tied(net, X, count=9)


def test_a_factor_goes_through_relu():
    net = mlp(2)
    with torch.no_grad():
        net[4].weight.copy_(3 * net[2].weight)
        wanted = net(X)
    with torch.no_grad():
        assert not torch.allclose(tied(clone(net), X, scale=False)(X), wanted, atol=1e-3)
    near(tied(net, X), X, wanted)


def behind_a_norm(net, x):
    x = torch.relu(net.a(torch.relu(net.stem(x))))
    return pooled(net, torch.sigmoid(net.norm(net.b(x))))


def test_a_factor_of_any_sign_goes_into_a_norm():
    net = Net(
        behind_a_norm, stem=conv(3, 6), a=conv(6, 6), b=conv(6, 6), norm=nn.BatchNorm2d(6),
        out=nn.Linear(6, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
        net.b.weight.copy_(-0.25 * net.a.weight)
        wanted = net(IMAGES)
    near(tied(net, IMAGES), IMAGES, wanted)
    assert net.a.weight is net.b.weight


def test_a_factor_that_shows_is_undone(caplog):
    net = nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
        nn.Linear(16, 4),
    )  # fmt: skip
    with torch.no_grad():
        net[4].weight.copy_(3 * net[2].weight)
    head = net[6].weight.detach().clone()
    with caplog.at_level(logging.INFO, "taut"):
        tied(net, X)
    assert torch.equal(net[6].weight, head)
    assert "tie_layers: 4.weight keeps its size: what follows it keeps no factor" in caplog.text


def test_another_order_of_the_units_finds_what_is_the_same():
    net = mlp(3)
    order = torch.randperm(16)
    with torch.no_grad():
        net[6].weight.copy_(net[2].weight[order])
        wanted = net(X)
    made = tied(clone(net), X, permute=True)
    assert [e.names for e in edits.of(made)] == [["2.weight", "6.weight"]]
    near(made, X, wanted)
    with torch.no_grad():
        assert not torch.allclose(tied(net, X, names="2.weight=6.weight")(X), wanted, atol=1e-3)


def test_an_assignment_is_the_best_of_all():
    for n in range(1, 7):
        gain = torch.randn(n, n)
        found = assignment(gain).tolist()
        best = max(
            sum(float(gain[i, j]) for i, j in enumerate(p))
            for p in itertools.permutations(range(n))
        )
        assert sum(float(gain[i, j]) for i, j in enumerate(found)) == pytest.approx(best, abs=1e-5)


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"names": "2"}, r"names must be like 'a=b=c, d=e', got '2'; name two weights or modules"),
        ({"names": "2=,4=6"}, r"names must be like .*, got '2=,4=6'"),
        ({"names": "2=4, 4=6"}, r"got '2=4, 4=6'; name two .* at least, and each once"),
        ({"names": "2=4", "count": 1}, r"names says what is tied, got count=1 too; leave one out"),
        ({"count": 0}, r"count must lie in \[1, inf\), got 0"),
        ({"start": "last"}, "start has no choice 'last'"),
    ],
)
def test_options_are_checked(options, told):
    with pytest.raises(RecipeError, match=told):
        TieLayers(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"names": "2.weight=9.weight"}, r"has no weight or module '9\.weight'; did you mean"),
        (
            {"names": "0.weight=2.weight"},
            r"have one shape, got \(16, 8\) and \(16, 16\) for 0.weight and 2.weight",
        ),
        ({"names": "1=2"}, "1 and 2 have nothing of one name and shape that is not tied already"),
        ({"only": "0, 2"}, "no two weights of only='0, 2' have one shape; name others by names="),
    ],
)
def test_what_cannot_be_tied_is_refused_and_nothing_changed(options, told):
    net = mlp()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(RecipeError, match=told):
        tied(net, X, **options)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not edits.of(net)


def test_weights_that_are_no_numbers_are_refused():
    net = mlp()
    with torch.no_grad():
        net[4].weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"tie_layers: site '4.weight' holds NaN or infinite"):
        tied(net, X)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["0.weight"], r"tie: two names or more, each once, got \['0.weight'\]"),
        ([], r"tie: two names or more, each once, got \[\]"),
        (["0.weight", "0.weight"], "tie: two names or more, each once"),
        (
            ["0.weight", "2.weight"],
            r"0.weight is \[16, 8\] of torch.float32 and 2.weight is \[16, ",
        ),
        (["0.weight", "9.weight"], "has no attribute .9.; build the model that was compressed"),
        (["0.weight", "0.forward"], "the model has no parameter '0.forward'"),
        (["0.weight", 3], "names is of another type"),
        ("0.weight", "names is of another type"),
    ],
)
def test_hostile_edits_are_refused_and_the_model_is_untouched(names, told, tmp_path):
    model = mlp()
    state = {(n,): Plain.of(t) for n, t in model.state_dict().items()}
    path = tmp_path / "bad.taut"
    path.write_bytes(encode(state, [["tie", {"names": names}]]))
    before = dict(model.named_parameters(remove_duplicate=False))
    with pytest.raises(FormatError, match=told):
        load(path, model)
    assert all(p is before[n] for n, p in model.named_parameters(remove_duplicate=False))
    assert not edits.of(model)
