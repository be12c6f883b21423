"""Filters held as one: which, how near, stored and run once, trained, and what is refused."""

import logging

import pytest
import torch
from nets import traced
from structures import conv
from torch import nn
from torch.nn import functional as F

import taut
from taut.clusters import far_rows, k_lines
from taut.container import encode
from taut.errors import RecipeError
from taut.modules import clone, tensor_at
from taut.pack import load, pack, packed_state
from taut.packed import Plain
from taut.recoding import chain
from taut.techniques import TieFilters
from taut.tied_weight import TiedWeight


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def task_of(x):
    y = torch.arange(len(x)) % 4
    return taut.Task(train=[(x, y)], test=[(x, y)])


X, IMAGES = normal(40, 12, seed=1), normal(16, 3, 8, 8, seed=2)


def families(count=3, each=5, width=12):
    """Rows that are multiples of a few, of either sign."""
    return torch.cat([normal(count, width) * f for f in (1.0, -0.5, 2.0, 0.75, -1.5)[:each]])


def mlp():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 15), nn.ReLU(), nn.Linear(15, 4)).eval()
    with torch.no_grad():
        net[0].weight.copy_(families())
    return net


def tied(net, x, **options):
    return taut.apply(net.eval(), TieFilters(**options), task_of(x))


# ---- which ----------------------------------------------------------------------------------


def test_multiples_of_each_other_become_one_filter_at_no_loss():
    net = mlp()
    made = tied(clone(net), X, kept=3, only="0")
    torch.testing.assert_close(made[0].weight, net[0].weight, atol=0.01, rtol=0.01)
    form = chain(made, traced(net, X).site("0.weight")).forms[0]
    clusters = {tuple((form.index == n).nonzero()[:, 0].tolist()) for n in range(3)}
    assert clusters == {(i, i + 3, i + 6, i + 9, i + 12) for i in range(3)}
    with torch.no_grad():
        torch.testing.assert_close(made(X), net(X), atol=0.03, rtol=0)


def test_without_scales_only_equals_are_tied():
    rows = normal(3, 12).repeat(4, 1)
    index, scale, book = k_lines(rows, torch.ones(12), 3, False, 40)
    assert torch.equal(scale, torch.ones_like(scale))
    torch.testing.assert_close(book[index].float(), rows)
    index, scale, book = k_lines(-rows[:1].repeat(4, 1) * torch.arange(1.0, 5)[:, None],
                                 torch.ones(4), 1, False, 40)  # fmt: skip
    torch.testing.assert_close(book[0].float(), -2.5 * rows[0])


def test_each_turn_is_at_a_least_point():
    """One line for all rows is their leading singular vector, by the definition."""
    rows, weights = normal(20, 6), torch.rand(20, generator=torch.Generator().manual_seed(5)) + 0.1
    index, scale, book = k_lines(rows, weights, 1, True, 500)
    assert int(index.max()) == 0
    error = weights * (rows - scale[:, None] * book[index]).square().sum(1)
    least = torch.linalg.svdvals(rows.double() * weights.double().sqrt()[:, None])[1:]
    assert float(error.sum()) == pytest.approx(float(least.square().sum()), rel=1e-6)


def test_more_lines_never_lose_more_and_no_line_is_idle():
    rows, errors = normal(30, 8), []
    for count in (1, 4, 10, 29, 30):
        index, scale, book = k_lines(rows, torch.ones(30), count, True, 60)
        assert int((torch.bincount(index, minlength=count) == 0).sum()) == 0
        errors.append(float((rows - scale[:, None] * book[index]).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_distance_says_how_many_are_left(caplog):
    caplog.set_level(logging.INFO, "taut")
    net, site = mlp(), traced(mlp(), X).site("0.weight")
    made = tied(clone(net), X, most_distance=0.05, only="0")
    assert [t.kept for t in chain(made, site).recipe] == [3]
    both = tied(clone(net), X, most_distance=0.05)
    assert chain(both, traced(net, X).site("2.weight")) is None
    assert "2.weight stays as it is: no two filters are within most_distance=0.05" in caplog.text
    with pytest.raises(RecipeError, match=r"no two filters of '2.weight' or of any other site"):
        tied(clone(net), X, most_distance=0.05, only="2")
    rows = families().double()
    assert len(far_rows(rows, torch.ones(15), True, True, 15, 1e-6)) == 3
    assert len(far_rows(rows, torch.ones(15), False, True, 15, 1e-6)) == 15


def test_the_data_say_which_filters_are_near():
    """Inputs 6 to 11 are next to nothing: rows that differ there alone give the same."""
    net, x = mlp(), X * torch.cat([torch.ones(6), torch.full((6,), 0.01)])
    rows = normal(5, 12, seed=7).repeat(3, 1)
    rows[:, 6:] = 3 * normal(15, 6, seed=8)
    with torch.no_grad():
        net[0].weight.copy_(rows)
    off = {}
    for weighted in (True, False):
        made = tied(clone(net), x, kept=5, weighted=weighted, only="0")
        with torch.no_grad():
            off[weighted] = float((made[0](x) - net[0](x)).square().mean())
    assert off[True] < 0.05 * off[False]


def test_from_scratch_each_filter_keeps_its_length():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 4))
    lengths = net[0].weight.detach().norm(dim=1)

    def made(**options):
        net_of = tied(clone(net), X, ratio=0.1, only="0", **options)
        return net_of[0].weight.detach().norm(dim=1)

    torch.testing.assert_close(made(start="scratch"), lengths, rtol=0.01, atol=0)
    assert float(made().mean()) < 0.8 * float(lengths.mean())
    equal = made(start="scratch", scale=False)
    assert float(equal.norm()) == pytest.approx(float(lengths.norm()), rel=1e-4)


# ---- stored and run -------------------------------------------------------------------------


def test_a_layer_multiplies_by_the_book_alone(monkeypatch):
    seen = []
    matmul = Plain.matmul

    def watch(self, x):
        seen.append(self.shape)
        return matmul(self, x)

    monkeypatch.setattr(Plain, "matmul", watch)
    index = torch.tensor([0, 1, 0, 2, 1, 1])
    scale = Plain.of(torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0, -1.0]), "bfloat16")
    weight = TiedWeight(index, Plain.of(normal(3, 4, 3, 3), "float32"), scale)
    x = normal(2, 4, 7, 7, seed=3)
    how = ((2, 1), (1, 0), (1, 2))
    torch.testing.assert_close(weight.conv2d(x, *how), F.conv2d(x, weight.dense(), None, *how))
    assert seen == [(3, 4, 3, 3)]
    grouped = TiedWeight(index, Plain.of(normal(3, 2, 3, 3), "float32"), scale)
    wanted = F.conv2d(x, grouped.dense(), None, *how, 2)
    torch.testing.assert_close(grouped.conv2d(x, *how, 2), wanted)


def test_kernels_are_tied_over_filters_and_inputs(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.Flatten(), nn.Linear(512, 4)).eval()
    with torch.no_grad():
        net[2].weight.copy_(families(4, 5, 9)[torch.arange(64) % 20].reshape(8, 8, 3, 3))
    recipe = "tie_filters(of='kernels', kept=4, only='2')"
    result = taut.compress(clone(net), task_of(IMAGES), recipe, folder=tmp_path / "run")
    torch.testing.assert_close(result.model[2].weight, net[2].weight, atol=0.02, rtol=0.02)
    loaded = load(tmp_path / "run" / "net.taut", clone(net))
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES), result.model(IMAGES), atol=1e-4, rtol=1e-4)
    inside = {t.names[0]: t for t in taut.inspect(tmp_path / "run" / "net.taut").tensors}
    assert inside["2.weight"].format == "tied.v1"
    assert inside["2.weight"].size_bytes < 2 * 576 / 3  # 64 indices of two bits, 64 scales, a book
    packed = packed_state(loaded)[("2.weight",)]
    x, index = normal(2, 72), torch.tensor([1, 7])
    torch.testing.assert_close(packed.matmul(x), x @ packed.dense().flatten(1).T)
    assert torch.equal(packed.rows(index), packed.dense()[index])


def test_whole_numbers_and_bits_go_through_the_book(tmp_path):
    """Inputs of eight bits, a book of four: one chain, whose products are of whole numbers."""
    net = mlp()
    recipe = "tie_filters(kept=6, only='0') > quantize(bits=4, activations=8, only='0')"
    result = taut.compress(net, task_of(X), recipe, folder=tmp_path / "run")
    loaded = load(tmp_path / "run" / "net.taut", mlp())
    weight = packed_state(loaded)[("0.weight",)]
    assert weight.book.format == "affine.v1"
    x, step = torch.randint(-127, 128, (3, 12), dtype=torch.int8), torch.tensor(0.01)
    got = weight.matmul_int8(x, step)
    torch.testing.assert_close(got, x.float() * step @ weight.dense().T, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), result.model(X), atol=1e-4, rtol=1e-4)


def test_trained_digits_tied_by_half_and_trained_on_lose_little(trained, task, tmp_path):
    recipe = "tie_filters(ratio=0.5, only='!5') > recover(epochs=6)"
    result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
    assert task.evaluate(result.model) >= task.evaluate(trained) - 0.02
    pack(trained, tmp_path / "whole.taut")
    whole, small = ((tmp_path / n).stat().st_size for n in ("whole.taut", "run/net.taut"))
    assert small < 0.65 * whole
    weight = tensor_at(result.model, "0.weight").detach()
    lines = F.normalize(weight, dim=1) @ F.normalize(weight, dim=1).T
    assert int((lines.abs() > 1 - 1e-5).sum()) > 2 * len(weight)  # they are tied after training


def test_one_seed_one_file_and_no_distance_of_a_filter_that_is_zero():
    net = mlp()
    with torch.no_grad():
        net[0].weight[4] = 0
    files = [encode(packed_state(tied(clone(net), X, ratio=0.4))) for _ in range(2)]
    assert files[0] == files[1]
    assert bool(tied(clone(net), X, ratio=0.4)[0].weight[4].isfinite().all())


# ---- refused --------------------------------------------------------------------------------


def test_what_it_cannot_follow_is_refused(tmp_path):
    net = mlp()
    with pytest.raises(RecipeError, match=r"'0.weight' is masked, and tie_filters\(\) writes"):
        taut.compress(
            net, task_of(X), "prune_weights(sparsity=0.5, scope='layer') > tie_filters()",
            folder=tmp_path / "masked",
        )  # fmt: skip
    told = r"site '0.weight' is recoded already, and its core \[32\] has no filters; put"
    with pytest.raises(RecipeError, match=told):
        taut.compress(net, task_of(X), "share_values() > tie_filters()", folder=tmp_path / "run")
    with pytest.raises(RecipeError, match="of='kernels' ties windows of convolutions, and only="):
        tied(clone(net), X, of="kernels")
    with pytest.raises(RecipeError, match=r"kept must be at most the 15 filters of .* got 16"):
        TieFilters(kept=16).apply(clone(net), traced(net, X).site("0.weight"))
    one = nn.Sequential(nn.Linear(12, 1))
    with pytest.raises(RecipeError, match=r"of shape \[1, 12\] has no two filters to tie; leave"):
        TieFilters().apply(one, traced(one, X).site("0.weight"))
    with pytest.raises(RecipeError, match=r"most_distance must lie in \[0, 1\), got 1.5"):
        TieFilters(most_distance=1.5)
