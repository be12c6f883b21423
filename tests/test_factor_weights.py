"""Weights that are products of two factors, in layers that stay as they are."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taut
from taut.errors import RecipeError
from taut.modules import clone
from taut.pack import load, packed_state
from taut.packed import Plain
from taut.recoding import chain
from taut.techniques import FactorWeights
from taut.techniques.factor_weights import FactoredWeight, Factors


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Words(nn.Module):
    """Recurrence and attention between a table and a head that share their weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(24, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 24)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x).mT


TOKENS = torch.randint(0, 24, (16, 6), generator=torch.Generator().manual_seed(0))
TASK = taut.Task(train=[(TOKENS, TOKENS)], test=[(TOKENS, TOKENS)])


def words():
    torch.manual_seed(0)
    return Words().eval()


def test_gates_projections_and_tied_weights_are_factored_and_four_bits_each(tmp_path):
    recipe = "factor_weights() > recover(epochs=1) > share_values(bits=4) > recover(epochs=1)"
    result = taut.compress(words(), TASK, recipe, folder=tmp_path / "run")
    loaded = load(result.folder / "net.taut", words())
    torch.testing.assert_close(loaded(TOKENS), result.model(TOKENS))
    assert loaded.head.weight is loaded.embedding.weight or torch.equal(
        loaded.head.weight, loaded.embedding.weight
    )
    stored = {t.names[0]: t.format for t in taut.inspect(result.folder / "net.taut").tensors}
    for name in (
        "embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attention.in_proj_weight",
        "attention.out_proj.weight",
    ):  # fmt: skip
        assert stored[name] == "low_rank.v1"
    packed = packed_state(loaded)[("lstm.weight_hh_l0",)]
    assert packed.factors.format == "shared_values.v1"
    assert packed.factors.shape == (6, 64 + 16)
    assert torch.linalg.matrix_rank(packed.dense()) == 6


def test_the_product_is_the_best_for_the_data():
    net, traced = words(), taut.trace(words(), TASK.example())
    weight = net.lstm.weight_ih_l0.detach().clone()
    x = net.embedding(TOKENS).detach().flatten(0, 1).double()
    errors = {}
    for weighted in (True, False):
        made = clone(net)
        step = FactorWeights(kept=5, weighted=weighted, only="lstm.weight_ih_l0")
        taut.apply(made, step, TASK, traced)
        found = made.lstm.weight_ih_l0.detach()
        assert torch.linalg.matrix_rank(found) == 5
        errors[weighted] = float((x @ (weight - found).double().T).square().sum())
    moments = x.T @ x
    moments += 1e-3 * moments.diagonal().mean() * torch.eye(16)
    seen = weight.double() @ torch.linalg.cholesky(moments)
    least = float(torch.linalg.svdvals(seen)[5:].square().sum())
    assert errors[True] <= least < errors[False]
    assert errors[True] == pytest.approx(least, rel=0.1)


@pytest.mark.parametrize(("rule", "wanted"), [("vbmf", 3), ("energy", 3), ("ratio", 11)])
def test_the_rank_follows_a_rule(rule, wanted):
    net = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 5))
    with torch.no_grad():
        net[0].weight.copy_(normal(60, 3) @ normal(3, 40, seed=1) + 0.1 * normal(60, 40, seed=2))
    x = normal(8, 40, seed=4)
    task = taut.Task(train=[(x, torch.arange(8) % 5)], test=[(x, torch.arange(8) % 5)])
    step = FactorWeights(rank=rule, energy=0.99, ratio=0.46, weighted=False, only="0")
    traced = taut.trace(net, task.example())
    taut.apply(net, step, task, traced)
    links = chain(net, traced.site("0.weight"))
    assert [t.kept for t in links.recipe] == [wanted]


def test_a_site_that_would_not_get_smaller_stays(caplog):
    caplog.set_level(logging.INFO, "taut")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    with torch.no_grad():
        net[0].weight.copy_(normal(30, 2) @ normal(2, 30, seed=1))
        net[1].weight.copy_(torch.eye(30))
    x = normal(60, 30)
    task = taut.Task(train=[(x, torch.arange(60) % 30)], test=[(x, torch.arange(60) % 30)])
    step = FactorWeights(rank="energy", energy=0.95, weighted=False)
    made, traced = clone(net), taut.trace(net, task.example())
    taut.apply(made, step, task, traced)
    assert chain(made, traced.site("0.weight")).recipe[0].kept == 2
    assert chain(made, traced.site("1.weight")) is None
    assert "factor_weights: 1.weight stays as it is: a rank that would do takes" in caplog.text
    told = r"no site of only='1' gets smaller by .*, '1.weight' neither; keep less"
    with pytest.raises(RecipeError, match=told):
        taut.apply(clone(net), FactorWeights(rank="energy", weighted=False, only="1"), task)


def test_a_grouped_convolution_runs_packed():
    dense, x = normal(8, 3, 3, 3), normal(2, 6, 7, 7)
    core = normal(2, 8 + 27)
    packed = FactoredWeight((8, 3, 3, 3), Plain.of(core, "float32"))
    torch.testing.assert_close(
        packed.conv2d(x, (1, 2), (1, 0), (1, 1), 2),
        F.conv2d(x, packed.dense(), None, (1, 2), (1, 0), (1, 1), 2),
    )
    y = packed.conv2d(x[:, :3], (2, 1), (1, 0), (1, 2))
    torch.testing.assert_close(
        y, F.conv2d(x[:, :3], packed.dense(), None, (2, 1), (1, 0), (1, 2)), atol=1e-4, rtol=1e-4
    )
    assert packed.dense().shape == dense.shape


def test_put_on_again_it_starts_from_what_it_gave():
    net, traced = words(), taut.trace(words(), TASK.example())
    for kept in (6, 2):
        step = FactorWeights(kept=kept, only="lstm.weight_hh_l0")
        taut.apply(net, step, TASK, traced)
        assert torch.linalg.matrix_rank(net.lstm.weight_hh_l0.detach()) == kept
    assert len(chain(net, traced.site("lstm.weight_hh_l0")).recipe) == 1


def test_what_it_cannot_follow_is_refused(tmp_path):
    net, traced = words(), taut.trace(words(), TASK.example())
    site = traced.site("lstm.weight_hh_l0")
    pruned = taut.apply(clone(net), "prune_weights(sparsity=0.5, scope='layer')", TASK)
    told = r"factor_weights: site '.*' is pruned already.* leave it out by only='!"
    with pytest.raises(RecipeError, match=told):
        taut.apply(pruned, FactorWeights(kept=3), TASK, traced)
    told = r"factor_weights: site '.*' is recoded already, and its core \[32\] is no matrix"
    with pytest.raises(RecipeError, match=told):
        taut.compress(net, TASK, "share_values() > factor_weights()", folder=tmp_path / "run")
    with pytest.raises(RecipeError, match=r"has no use for a rank of 40; .* \[1, 16\]"):
        FactorWeights(kept=40, weighted=False).apply(net, site)
    with pytest.raises(RecipeError, match=r"kept must lie in \[0, inf\), got -1"):
        FactorWeights(kept=-1)


def test_some_entries_of_a_product_are_packed_plainly():
    form, keep = Factors((64, 16)), normal(64, 16) < 0
    core = normal(6, 80, seed=1)
    some = form.pack(core, keep, lambda _: Plain.of(core))
    torch.testing.assert_close(some.dense(), form(core)[keep], atol=1e-2, rtol=1e-2)
