"""Layers that become several: exact at full rank, best below, stored, replayed and trained on."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taut
from taut import edits
from taut.container import encode
from taut.decompositions import KINDS, composed, count, decomposed, limits, parts
from taut.errors import FormatError, RecipeError
from taut.modules import clone
from taut.pack import load
from taut.packed import Plain
from taut.statistics import Statistics
from taut.techniques import LowRank, low_rank
from taut.techniques.low_rank import Factor


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def full(kind, shape):
    """Ranks at which nothing is lost."""
    return [shape[0] * 9] if kind == "cp" else list(limits(kind, shape))


def task_of(x, y):
    return taut.Task(train=[(x, y)], test=[(x, y)])


# ---- the decompositions ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_data", [False, True])
def test_at_full_rank_a_convolution_is_what_it_was(kind, by_data):
    weight = normal(4, 3, 3, 3).double()
    root = torch.linalg.cholesky(torch.cov(normal(27, 90).double())) if by_data else None
    ranks, x = full(kind, (4, 3, 3, 3)), normal(2, 3, 7, 8).double()
    made, y = decomposed(kind, weight, ranks, root), x
    for part, wanted in zip(made, parts(kind, (4, 3, 3, 3), limits(kind, (4, 3, 3, 3))),
                            strict=True):  # fmt: skip
        y = F.conv2d(y, part, groups=wanted.groups)
        assert part.shape == wanted.shape((3, 3))
    torch.testing.assert_close(y, F.conv2d(x, weight), atol=1e-4, rtol=0)
    total = sum(p.numel() for p in made)
    assert total == count(kind, (4, 3, 3, 3), limits(kind, (4, 3, 3, 3)))


def kernel_of(kind, made):
    """The one kernel that parts in a row amount to, by the formula of each kind."""
    if kind == "channel":
        return torch.einsum("or,rixy->oixy", made[1][:, :, 0, 0], made[0])
    if kind == "spatial":
        return torch.einsum("ory,rix->oixy", made[1][:, :, 0], made[0][..., 0])
    if kind == "tucker":
        first, core, last = made[0][:, :, 0, 0], made[1], made[2][:, :, 0, 0]
        return torch.einsum("or,rsxy,si->oixy", last, core, first)
    first, down, across, last = (m.squeeze() for m in made)
    return torch.einsum("or,ri,rx,ry->oixy", last, first, down, across)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_definition_and_finds_what_is_there(kind):
    ranks = [3, 4] if kind == "tucker" else [3]
    shapes = [p.shape((3, 5)) for p in parts(kind, (7, 6, 3, 5), ranks)]
    true = [normal(*s, seed=i).double() for i, s in enumerate(shapes)]
    weight = kernel_of(kind, true)
    groups = [p.groups for p in parts(kind, (7, 6, 3, 5), ranks)]
    x = normal(2, 6, 9, 9).double()
    y = x
    for part, g in zip(true, groups, strict=True):
        y = F.conv2d(y, part, groups=g)
    torch.testing.assert_close(y, F.conv2d(x, weight))
    root = torch.linalg.cholesky(torch.cov(normal(90, 300, seed=9).double()))
    for seen_by in (None, root):
        found = decomposed(kind, weight, ranks, seen_by)
        assert [tuple(f.shape) for f in found] == shapes
        error = (kernel_of(kind, found) - weight).norm() / weight.norm()
        assert error < (0.02 if kind == "cp" else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_data_the_outputs_lose_less(kind):
    weight, ranks = normal(8, 6, 3, 3).double(), [3, 4] if kind == "tucker" else [5]
    mix = (normal(6, 2, seed=3) @ normal(2, 6, seed=4)).double()
    x = torch.einsum("ij,njxy->nixy", mix, normal(20, 6, 8, 8, seed=5).double())
    x = x + 0.1 * normal(20, 6, 8, 8, seed=6).double()
    windows = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    root = torch.linalg.cholesky(windows.T @ windows)
    wanted = F.conv2d(x, weight)
    plain, weighted = (
        float((F.conv2d(x, kernel_of(kind, decomposed(kind, weight, ranks, r))) - wanted).norm())
        for r in (None, root)
    )
    assert weighted < 0.8 * plain


# ---- the technique --------------------------------------------------------------------------


X = normal(12, 3, 9, 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"stride": (2, 1), "padding": (2, 1), "kernel_size": (3, 5)},
        {"dilation": (1, 2), "padding": "same", "bias": False},
        {"padding": (1, 2), "padding_mode": "reflect", "stride": 2},
        {"padding_mode": "circular"},
    ],
)
def test_stride_padding_and_dilation_go_where_they_belong(kind, changes):
    options = {"kernel_size": 3, "padding": 1, **changes}
    layer = nn.Conv2d(3, 40, **options)
    net = nn.Sequential(layer)
    shape = tuple(layer.weight.shape)
    ranks = [2, 2] if kind == "tucker" else [2]
    with torch.no_grad():
        layer.weight.copy_(kernel_of(kind, decomposed(kind, layer.weight, ranks)))
    wanted = net(X)
    Factor(layer="0", how=kind, ranks=ranks).replay(net)
    for part, weight in zip(net[0], decomposed(kind, layer.weight, ranks), strict=True):
        part.weight.data.copy_(weight)
    torch.testing.assert_close(net(X), wanted, atol=1e-4, rtol=1e-4)
    assert net[0][-1].bias is layer.bias
    assert sum(p.weight.numel() for p in net[0]) == count(kind, shape, ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_one_dimension(kind):
    net = nn.Sequential(nn.Conv1d(6, 12, 5, 2, padding=3), nn.Flatten(), nn.LazyLinear(4))
    x = normal(8, 6, 20)
    net(x)
    task = task_of(x, torch.arange(8) % 4)
    made = taut.apply(clone(net), LowRank(only="0", conv=kind, rank="ratio", ratio=0.6), task)
    assert made(x).shape == net(x).shape
    ranks = edits.of(made)[0].ranks
    assert count(kind, (12, 6, 5), ranks) <= 0.6 * 360
    assert [type(p) for p in made[0]] == [nn.Conv1d] * len(parts(kind, (12, 6, 5), ranks))


def test_a_linear_layer_becomes_two(trained, task):
    net = taut.apply(clone(trained), "low_rank(rank='ratio', ratio=0.5, weighted=False)", task)
    assert [(e.layer, e.ranks) for e in edits.of(net)] == [("0", [13]), ("3", [9]), ("5", [3])]
    first = net[0]
    assert [tuple(p.weight.shape) for p in first] == [(13, 64), (48, 13)]
    assert first[0].bias is None
    assert torch.equal(first.bias, trained[0].bias)
    u, s, vh = torch.linalg.svd(trained[0].weight.double())
    best = (u[:, :13] * s[:13]) @ vh[:13]
    torch.testing.assert_close(first.weight, best.float())
    assert trained[0].weight.shape == (48, 64)


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_by_the_data_a_layer_gives_what_it_gave(trained, task, ratio):
    x = torch.cat([x for x, _ in task._data["train"]])
    errors, losses = [], []
    for weighted in (True, False):
        step = LowRank(rank="ratio", ratio=ratio, weighted=weighted, only="0")
        made = taut.apply(clone(trained), step, task).eval()
        errors.append(float((made[0](x) - trained[0](x)).detach().norm()))
        losses.append(task.calibration_loss()(made))
    assert errors[0] < 0.7 * errors[1]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("options", [{}, {"rank": "macs"}, {"rank": "vbmf"}, {"weighted": False}])
def test_an_outline_has_the_ranks_and_fits_nothing(trained, task, options, monkeypatch):
    traced = taut.trace(trained, task.example())
    statistics = Statistics(trained, task.calibration_loss(), traced)
    step = LowRank(**options)
    whole = step.reshape(clone(trained), traced, statistics)
    monkeypatch.setattr(low_rank, "_Seen", lambda *_: 1 / 0)
    outline = step.outline(clone(trained), traced, statistics)
    assert edits.of(outline) == edits.of(whole)
    assert task.evaluate(outline.eval()) > 0.5


def test_energy_says_what_is_kept(trained, task):
    step = LowRank(energy=0.7, weighted=False, only="0")
    net = taut.apply(clone(trained), step, task)
    squares = torch.linalg.svdvals(trained[0].weight.double()).square()
    kept = edits.of(net)[0].ranks[0]
    assert squares[:kept].sum() >= 0.7 * squares.sum() > squares[: kept - 1].sum()


def test_variational_bayes_finds_the_planted_rank(task):
    net = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 10))
    with torch.no_grad():
        net[0].weight.copy_(normal(80, 5) @ normal(5, 64, seed=1) + 0.3 * normal(80, 64, seed=2))
    net = taut.apply(net, "low_rank(rank='vbmf', only='0')", task)
    assert edits.of(net)[0].ranks == [5]


def test_a_layer_of_noise_alone_stays_whole(task, caplog):
    """Variational Bayes finds nothing in a random start, which does not mean that it can go."""
    caplog.set_level("INFO", "taut")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 48), nn.Linear(48, 10))
    with torch.no_grad():
        net[0].weight.copy_(normal(60, 64))
        net[2].weight.copy_(normal(48, 3) @ normal(3, 60, seed=1) + 0.1 * normal(48, 60, seed=2))
    made = taut.apply(clone(net), LowRank(rank="vbmf", only="0, 2"), task)
    assert type(made[0]) is nn.Linear
    assert made[2][0].out_features == 3
    assert "0 stays as it is: no rank stands out of the noise, or it takes no fewer" in caplog.text


def test_an_embedding_becomes_a_narrow_one_and_a_layer():
    table = nn.Embedding(30, 8, padding_idx=0)
    net = nn.Sequential(table, nn.Flatten(), nn.Linear(32, 3))
    often = torch.randint(0, 4, (40, 4))
    task = task_of(often, torch.arange(40) % 3)
    made = taut.apply(clone(net), LowRank(only="0", rank="ratio", ratio=0.45), task)
    small, wide = made[0]
    assert (small.weight.shape, wide.weight.shape) == ((30, 2), (8, 2))
    assert small.padding_idx == 0
    plain = taut.apply(
        clone(net), LowRank(only="0", rank="ratio", ratio=0.45, weighted=False), task
    )
    wanted = table(often)
    by_data, alone = ((m[0](often) - wanted).detach().norm() for m in (made, plain))
    assert by_data < alone
    assert not made[0](torch.zeros(1, dtype=torch.int64)).any()


class Mixed(nn.Module):
    """What cannot become two layers, beside one that can."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.lstm = nn.LSTM(12, 12, batch_first=True)
        self.grouped = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.wide = nn.Linear(12, 40)
        self.narrow = nn.Linear(40, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.lstm(x)[0]
        x = x + self.grouped(x.mT).mT
        return self.head(self.narrow(F.relu(self.wide(x)))).mT


TOKENS = torch.randint(0, 20, (6, 7), generator=torch.Generator().manual_seed(0))


def test_what_cannot_become_two_layers_stays_and_is_named(caplog):
    caplog.set_level("INFO", "taut")
    net = Mixed().eval()
    made = taut.apply(clone(net), "low_rank(rank='ratio')", task_of(TOKENS, TOKENS))
    assert [e.layer for e in edits.of(made)] == ["wide", "narrow"]
    assert made.head.weight is made.embedding.weight
    for told in (
        "embedding stays as it is: its weight is head.weight too; use factor_weights",
        "attention.out_proj stays as it is: attention reads its weight itself",
        "lstm stays as it is: a LSTM cannot be several in a row; use factor_weights",
        "grouped stays as it is: its channels come in groups",
        "wide becomes 2 layers of rank 4 (channel), 208 numbers of 480",
    ):
        assert f"low_rank: {told}" in caplog.text


def test_a_rank_that_costs_more_is_refused_for_that_layer(trained, task, caplog):
    caplog.set_level("INFO", "taut")
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    told = r"low_rank: no layer of only='\*' gets smaller by low_rank\(energy=1.0\); keep less"
    with pytest.raises(RecipeError, match=told):
        taut.apply(trained, LowRank(energy=1), task)
    assert "3 stays as it is: a rank that would do takes no fewer numbers" in caplog.text
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    made = taut.apply(clone(trained), LowRank(energy=0.7), task)
    assert 0 < len(edits.of(made)) <= 3


def test_a_transformer_layer_runs_fused_and_not():
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    x = normal(3, 5, 16)
    task = taut.Task(train=[(x, x)], test=[(x, x)], loss=F.mse_loss, score=F.mse_loss)
    made = taut.apply(layer, "low_rank(rank='ratio')", task).eval()
    assert [e.layer for e in edits.of(made)] == ["linear1", "linear2"]
    with torch.no_grad():
        fused = made(x)
    torch.testing.assert_close(fused, made(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conv", KINDS)
def test_a_whole_run_is_stored_and_replayed(conv, tmp_path):
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(48, 10),
    )  # fmt: skip
    x, y = normal(64, 1, 8, 8), torch.arange(64) % 10
    task = task_of(x, y)
    recipe = (
        f"low_rank(rank='ratio', ratio=0.5, conv={conv!r}) > recover(epochs=1) > "
        "share_values(bits=4) > recover(epochs=1)"
    )
    result = taut.compress(net, task, recipe, folder=tmp_path / "run")
    loaded = load(result.folder / "net.taut", clone(net))
    torch.testing.assert_close(loaded(x), result.model(x))
    assert taut.inspect(result.folder / "net.taut").edits[:1] == ("factor",)
    assert len(loaded[2]) == len(parts(conv, (12, 12, 3, 3), [2, 2]))
    assert result.measurement.parameters < 0.65 * sum(p.numel() for p in net.parameters())


class ByHand(nn.Module):
    """Its head multiplies by the table's weight, which no name tells."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.wide = nn.Linear(12, 12)

    def forward(self, tokens):
        return F.linear(self.wide(self.embedding(tokens)), self.embedding.weight).mT


def test_a_layer_that_the_network_needs_whole_is_named_and_nothing_changed():
    net, task = ByHand(), task_of(TOKENS, TOKENS)
    told = r"needs layer 'embedding' whole \(.*no attribute 'weight'\); .* only='!embedding'"
    with pytest.raises(RecipeError, match=told):
        taut.apply(net, LowRank(rank="ratio"), task)
    assert isinstance(net.embedding, nn.Embedding)
    made = taut.apply(net, LowRank(rank="ratio", only="!embedding"), task)
    assert [e.layer for e in edits.of(made)] == ["wide"]


def test_a_network_that_is_one_layer():
    net, x = nn.Linear(12, 12), normal(9, 12)
    made = taut.apply(net, "low_rank(rank='ratio')", task_of(x, torch.arange(9)))
    assert [tuple(p.weight.shape) for p in made] == [(3, 12), (12, 3)]
    assert edits.of(made) == (Factor(layer="", how="channel", ranks=[3]),)


def test_hooks_stay_on_the_whole():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.LazyLinear(3))
    x = normal(6, 8, 4, 4)
    net(x)
    task = task_of(x, torch.arange(6) % 3)
    both = taut.apply(clone(net), "add_shortcuts()", task)
    made = taut.apply(both, LowRank(only="0", rank="ratio"), task)
    torch.testing.assert_close(made[0](x), made[0][1](made[0][0](x)) + x)


def test_options():
    with pytest.raises(RecipeError, match="conv='cp' has no rank by vbmf; choose rank='energy'"):
        LowRank(conv="cp", rank="vbmf")
    with pytest.raises(RecipeError, match=r"ratio must lie in \[0.001, 1\), got 1"):
        LowRank(ratio=1)
    with pytest.raises(RecipeError, match="conv has no choice 'tuker'; did you mean 'tucker'"):
        LowRank(conv="tuker")


def test_weights_that_are_no_numbers_are_refused(trained, task):
    with torch.no_grad():
        trained[3].weight[0, 0] = float("nan")
    with pytest.raises(RecipeError, match=r"site '3.weight' holds NaN or infinite weights"):
        taut.apply(trained, LowRank(weighted=False), task)
    assert not edits.of(trained)


def test_without_data_it_says_what_to_do(trained, task):
    traced = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match=r"low_rank: .* needs a task .*weighted=False"):
        LowRank().reshape(trained, traced, taut.statistics.Statistics(trained))


# ---- hostile edits --------------------------------------------------------------------------


def plain_net():
    return nn.Sequential(
        nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.LayerNorm(8),
        nn.Embedding(8, 8, max_norm=1.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layer": "9"}, "has no attribute .9.; build the model"),
        ({"layer": "3"}, "'3' is no plain Linear, .*: it is a LayerNorm"),
        ({"layer": ""}, "'' is no plain Linear, .*: it is a Sequential"),
        ({"layer": "2"}, "'2' is no plain .*: its channels come in groups"),
        ({"layer": "4"}, r"'4' is no plain .*: its rows are rescaled .*max_norm"),
        ({"how": "tucker"}, r"'0' of shape \[8, 8\] has no 'tucker'"),
        ({"how": "magic"}, r"'0' of shape \[8, 8\] has no 'magic'"),
        ({"ranks": [0]}, r"ranks of '0' must be 1 in all, from 1 to 8, got \[0\]"),
        ({"ranks": [10**12]}, r"from 1 to 8, got \[1000000000000\]"),
        ({"ranks": []}, r"must be 1 in all, from 1 to 8, got \[\]"),
        ({"ranks": [4]}, "of ranks .4. takes 64 numbers, which must be fewer than its 64"),
        ({"ranks": [1.0]}, "ranks is of another type"),
        ({"layer": "1", "how": "tucker", "ranks": [2]}, r"must be 2 in all, from 1 to 8, 8, got"),
        ({"layer": "1", "how": "cp", "ranks": [10**9]}, "from 1 to 72, got"),
    ],
)
def test_hostile_edits_are_refused_and_the_model_is_untouched(options, told, tmp_path):
    raw = [["factor", {"layer": "0", "how": "channel", "ranks": [1], **options}]]
    model = plain_net()
    state = {(n,): Plain.of(t) for n, t in model.state_dict().items()}
    path = tmp_path / "bad.taut"
    path.write_bytes(encode(state, raw))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(FormatError, match=told):
        load(path, model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not edits.of(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 3, 2), (3, 4, 2, 3, 2)])
def test_the_parts_amount_to_one_weight(kind, shape):
    if kind == "spatial" and len(shape) == 2:
        pytest.skip("a Linear layer has no kernel to split")
    weight = normal(*shape).double()
    made = decomposed(kind, weight, [min(3, n) for n in limits(kind, shape)])
    whole = composed(kind, made)
    assert whole.shape == shape
    if len(shape) > 2:
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3]
        x = y = normal(2, shape[1], *[6] * (len(shape) - 2)).double()
        ranks = [min(3, n) for n in limits(kind, shape)]
        for part, weight in zip(parts(kind, shape, ranks), made, strict=True):
            y = conv(y, weight, groups=part.groups)
        torch.testing.assert_close(y, conv(x, whole))


def test_later_layers_make_good_what_earlier_ones_lost(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(512, 6) @ torch.randn(6, 24) + 0.1 * torch.randn(512, 24)
    sizes = [24, 32, 32, 32, 32, 4]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*itertools.chain(*((la, nn.Tanh()) for la in layers)))[:-1]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 2  # so that errors do not die out
        y = model(x)
    task = taut.Task(train=[(x, y)], test=[(x, y)], loss=F.mse_loss, score=F.mse_loss,
                     better="lower")  # fmt: skip
    lost = []
    for _ in range(2):
        made = taut.apply(clone(model), "low_rank(rank='ratio', ratio=0.2, only='!8')", task)
        lost.append(float(F.mse_loss(made(x), y).detach()))
        monkeypatch.setattr(low_rank, "realigned", lambda rows, *_: rows)
    assert lost[0] < 0.9 * lost[1]
