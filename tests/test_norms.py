"""Folding norms, equalising layers, correcting biases: what changes and what must not."""

import copy

import pytest
import torch
from nets import Net, traced
from torch import Tensor, nn
from torch.nn import functional as F

import taut
from taut.data import Batches
from taut.errors import RecipeError
from taut.modules import clone
from taut.statistics import Statistics
from taut.techniques import CodeLength, CorrectBiases, Equalise, FoldNorms, Quantize


def run(n: Net, x: Tensor) -> Tensor:
    x = F.relu(n.first(n.conv(x)))
    x = F.avg_pool2d(F.relu(n.second(n.deep(x))), 2)
    return n.last(n.third(n.wide(x.flatten(1))).relu())


def net(act=run) -> Net:
    """Two convolutions, one without a bias, and two layers, with norms of every sign and size."""
    torch.manual_seed(0)
    built = Net(
        act, conv=nn.Conv2d(2, 6, 3, bias=False), first=nn.BatchNorm2d(6),
        deep=nn.Conv2d(6, 8, 3), second=nn.BatchNorm2d(8), wide=nn.Linear(32, 10),
        third=nn.BatchNorm1d(10), last=nn.Linear(10, 4),
    )  # fmt: skip
    for name in ("first", "second", "third"):
        norm = getattr(built, name)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.momentum = 1.0
    built.train()(X)  # which leaves what the norms see of X
    return built.eval()


X = 1 + torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def task(model: nn.Module) -> taut.Task:
    labels = model(X).argmax(1)
    return taut.Task(train=Batches(X, labels, 32), test=Batches(X, labels, 32))


@pytest.fixture
def model() -> Net:
    return net()


def test_the_trace_tells_which_norm_reads_which_site(model):
    assert traced(model, X).norms == {
        "conv.weight": "first", "deep.weight": "second", "wide.weight": "third"
    }  # fmt: skip

    def two_readers(n, x):
        y = n.conv(x)
        return n.first(y) + y

    def an_activation_before(n, x):
        return n.first(n.conv(x).relu())

    for other in (two_readers, an_activation_before):
        assert traced(net(other), X).norms == {}
    assert traced(net(lambda n, x: n.first(n.conv(x)) + n.conv(-x)), X).norms == {}


def test_a_folded_norm_only_shifts(model):
    folded = taut.apply(clone(model), FoldNorms(), task(model))
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)
    for name in ("first", "second", "third"):
        norm = getattr(folded, name)
        shift = F.batch_norm(
            torch.zeros(1, norm.num_features), norm.running_mean, norm.running_var, norm.weight,
            norm.bias, eps=norm.eps,
        )  # fmt: skip
        y = torch.randn(3, norm.num_features, *[5] * (name != "third"), *[5] * (name != "third"))
        wanted = y + shift.reshape(1, -1, *[1] * (y.dim() - 2))
        torch.testing.assert_close(norm(y), wanted, rtol=1e-4, atol=1e-4)


def test_a_folded_norm_trains_as_before(model):
    for norm in (model.first, model.second, model.third):
        norm.eps = 1e-12  # which is added to a variance that has another size now
    folded = taut.apply(clone(model), FoldNorms(), task(model))
    torch.testing.assert_close(folded.train()(X), model.train()(X), rtol=1e-3, atol=1e-3)


def test_a_channel_that_the_norm_silences_stays_as_it_is(model):
    with torch.no_grad():
        model.first.weight[2] = 0.0
    folded = taut.apply(clone(model), FoldNorms(), task(model))
    torch.testing.assert_close(folded.conv.weight[2], model.conv.weight[2])
    torch.testing.assert_close(folded(X), model(X), rtol=1e-4, atol=1e-5)


def ranges(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first.flatten(1).abs().amax(1), second.reshape(len(second), len(first), -1).abs().amax(
        (0, 2)
    )


def test_equalised_layers_share_their_ranges_and_answer_the_same(model):
    before = ranges(model.conv.weight, model.deep.weight)
    assert not torch.allclose(*before, rtol=0.2)
    found = taut.apply(clone(model), Equalise(), task(model))
    torch.testing.assert_close(found(X), model(X), rtol=1e-3, atol=1e-4)
    rows, columns = ranges(found.wide.weight, found.last.weight)
    torch.testing.assert_close(rows, columns)
    again = taut.apply(copy.deepcopy(found), Equalise(only="conv"), task(model))
    torch.testing.assert_close(*ranges(again.conv.weight, again.deep.weight))
    trained = found.train()(X)
    torch.testing.assert_close(trained, model.train()(X), rtol=1e-2, atol=1e-2)


def test_equalising_spares_what_one_step_for_a_tensor_loses():
    """A network that others than Taut have made hard to quantize: channels of very unlike sizes."""
    torch.manual_seed(0)
    hard = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
    with torch.no_grad():
        sizes = torch.logspace(-2, 2, 30)
        hard[0].weight *= sizes[:, None]
        hard[0].bias *= sizes
        hard[2].weight /= sizes
    x = torch.randn(100, 8)
    at = taut.Task(
        train=Batches(x, torch.arange(100) % 4, 50), test=Batches(x, torch.arange(100) % 4, 50)
    )
    step = Quantize(bits=6, per="tensor")

    def error(start):
        return float((taut.apply(start, step, at)(x) - hard(x)).detach().square().mean())

    assert error(taut.apply(clone(hard), Equalise(), at)) < error(clone(hard)) / 10


def test_an_activation_with_a_size_of_its_own_leaves_layers_alone(caplog):
    torch.manual_seed(0)
    curved = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    x = torch.randn(20, 2)
    at = taut.Task(
        train=Batches(x, torch.arange(20) % 4, 5), test=Batches(x, torch.arange(20) % 4, 5)
    )
    caplog.set_level("INFO", "taut")
    found = taut.apply(clone(curved), Equalise(), at)
    torch.testing.assert_close(found(x), curved(x))
    assert "0.weight and 2.weight stay: what is between them does not keep scales" in caplog.text


@pytest.mark.parametrize("layer", ["wide", "conv"])
def test_biases_take_what_rounding_adds_to_the_mean(model, layer):
    """`wide` has a bias of its own; `conv` has only the norm after it."""
    at, seen = task(model), {}
    step = Quantize(bits=2, only=layer)

    def mean(of):
        after = of.third if layer == "wide" else of.first
        hook = after.register_forward_hook(lambda m, given, out: seen.update(y=out))
        of(X)
        hook.remove()
        return seen["y"].detach().transpose(0, 1).flatten(1).mean(1)

    rounded = taut.apply(clone(model), step, at)
    held = copy.deepcopy(rounded.state_dict())
    corrected = taut.apply(rounded, CorrectBiases(only=layer), at, traced(model, X))
    off = (mean(taut.apply(clone(model), step, at)) - mean(model)).abs().max()
    assert off > 0.01
    torch.testing.assert_close(mean(corrected), mean(model), rtol=1e-3, atol=1e-3)
    changed = [k for k, v in corrected.state_dict().items() if not torch.equal(v, held[k])]
    assert changed == ["wide.bias" if layer == "wide" else "first.running_mean"]


def test_the_whole_way_without_training(model):
    at = task(model)
    trace = traced(model, X)
    found = clone(model)
    for step in taut.Recipe.parse(
        "fold_norms() > equalise() > quantize(activations=8, per='tensor') > correct_biases()"
    ).steps:
        taut.apply(found, step, at, trace)
    assert float((found(X) - model(X)).detach().square().mean() / model(X).detach().var()) < 0.01


@pytest.mark.parametrize("step", [FoldNorms(), Equalise()])
def test_what_is_recoded_already_is_refused(model, step):
    at, trace = task(model), traced(model, X)
    found = taut.apply(clone(model), Quantize(only="conv, deep"), at)
    message = f"{step.name}: site 'conv.weight' is written in another form already; put {step.name}"
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        taut.apply(found, step, at, trace)
    found = taut.apply(clone(model), CodeLength(only="first.weight"), at)
    message = r"the weight beside site 'conv\.weight' is written in another form already"
    with pytest.raises(RecipeError, match=message):
        taut.apply(found, step, at, trace)


def test_networks_without_such_layers_are_refused():
    alone = nn.Sequential(nn.Linear(2, 6), nn.Softmax(1))
    for step, message in (
        (
            FoldNorms(),
            "fold_norms: in this network no layer's output is read by a batch norm alone",
        ),
        (Equalise(), "equalise: in this network no layer alone reads what another makes"),
    ):
        with pytest.raises(RecipeError, match=message):
            step.sites(traced(alone, torch.randn(3, 2)))


def test_a_norm_without_statistics_is_refused():
    torch.manual_seed(0)
    loose = nn.Sequential(
        nn.Linear(2, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4)
    )
    x = torch.randn(20, 2)
    at = taut.Task(
        train=Batches(x, torch.arange(20) % 4, 5), test=Batches(x, torch.arange(20) % 4, 5)
    )
    with pytest.raises(RecipeError, match=r"the norm after site '0\.weight' keeps no running"):
        taut.apply(loose, FoldNorms(), at)


def test_they_need_the_trace(model):
    site = traced(model, X).site("conv.weight")
    with pytest.raises(RecipeError, match="fold_norms needs the trace of the network; apply it by"):
        FoldNorms().apply(model, site, Statistics(model))
