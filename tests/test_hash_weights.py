"""Hashed weights: the definition, gradients, first buckets, frequencies, one vector for all."""

import itertools
import math

import pytest
import torch
import xxhash
from torch import nn
from torch.nn import functional as F

import taut
from taut.container import encode
from taut.errors import RecipeError
from taut.hashed_weight import Drawing, HashedWeight, bands_of, cosines_of, shares_of
from taut.kernels import hashed_rows, reference
from taut.layers import packed_layers, run_dense
from taut.modules import clone, plain_copy, tensor_at, weights_in_use
from taut.pack import packed_state
from taut.packed import Plain
from taut.plan import check
from taut.recipe import Recipe
from taut.recoding import chain, core
from taut.statistics import Statistics
from taut.techniques import CodeLength, HashWeights, PruneWeights, Quantize, ShareValues
from taut.trace import trace


def traced(net, *shape):
    return trace(net, ((torch.zeros(2, *shape),), {}))


def linear(out=12, columns=40):
    net = nn.Sequential(nn.Linear(columns, out))
    return net, traced(net, columns).sites[0]


def hashed(technique, net, *shape):
    """The net with the technique on all that it chooses, and its trace."""
    found = traced(net, *shape)
    sites = technique.sites(found)
    local = technique.localise(net, sites, Statistics(net))
    for site in sites:
        local[site.name].apply(net, site)
    return net, found


def matrix(drawing):
    """S, [weights, buckets], by the definition of the hash."""
    columns = math.prod(drawing.shape[1:])
    index, minus = reference.hash_map(
        (drawing.shape[0], columns), sum(drawing.bands), drawing.seed, drawing.run
    )
    signs = torch.where(minus.flatten(), -1.0, 1.0)
    return F.one_hot(index.flatten(), sum(drawing.bands)) * signs[:, None]


# ---- the definition --------------------------------------------------------------------------


@pytest.mark.parametrize("run", [1, 4, 16, 64])
def test_each_weight_is_its_bucket_up_to_the_sign(run):
    net, site = linear()
    HashWeights(ratio=0.2, run=run, seed=3).apply(net, site)
    drawing, buckets = chain(net, site).forms[0].drawing(), core(net, site).detach()
    assert drawing.seed == xxhash.xxh32_intdigest(b"0.weight", 3)
    assert buckets.shape == (96,)
    wanted = (matrix(drawing) @ buckets).reshape(site.shape)
    assert torch.equal(tensor_at(net, site.name), wanted)


@pytest.mark.parametrize("run", [1, 16])
def test_each_bucket_starts_nearest_to_its_weights(run):
    """The means of the weights, signs undone, are the solution of least squares."""
    net, site = linear()
    weight = net[0].weight.detach().clone()
    HashWeights(ratio=0.2, run=run).apply(net, site)
    drawn = matrix(chain(net, site).forms[0].drawing()).double()
    solved = torch.linalg.lstsq(drawn, weight.double().reshape(-1, 1), driver="gelsd").solution
    torch.testing.assert_close(core(net, site).double(), solved[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["sum", "mean"])
def test_gradients_of_a_bucket_are_those_of_its_weights(gradient):
    net, site = linear()
    HashWeights(ratio=0.2, gradient=gradient).apply(net, site)
    plain, _ = linear()
    plain[0].load_state_dict({"weight": tensor_at(net, site.name), "bias": net[0].bias})
    x = torch.randn(5, 40)
    for model in (net, plain):
        model(x).square().sum().backward()
    drawn = matrix(chain(net, site).forms[0].drawing())
    wanted = drawn.T @ plain[0].weight.grad.flatten()
    if gradient == "mean":
        wanted = wanted / drawn.abs().sum(0).clamp(min=1)
    torch.testing.assert_close(core(net, site).grad, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(net[0].bias.grad, plain[0].bias.grad)


def test_a_layer_is_the_product_of_hashed_inputs_and_buckets():
    """The formula of the docstring, number by number."""
    net, site = linear(3, 20)
    HashWeights(buckets=7).apply(net, site)
    index, minus = reference.hash_map((3, 20), 7, chain(net, site).forms[0].drawing().seed)
    x, w = torch.randn(20), core(net, site).detach()
    phi = torch.zeros(3, 7)
    for i, j in itertools.product(range(3), range(20)):
        phi[i, index[i, j]] += -x[j] if minus[i, j] else x[j]
    torch.testing.assert_close(net(x) - net[0].bias, phi @ w)


def test_every_site_has_a_seed_of_its_own_that_the_file_keeps(tmp_path, trained, task):
    seeds = {}
    for seed in (0, 1):
        net = taut.apply(clone(trained), HashWeights(ratio=0.3, seed=seed), task)
        state = packed_state(net)
        seeds[seed] = [state[(n,)].drawing.seed for n in ("0.weight", "3.weight", "5.weight")]
    assert len({*seeds[0], *seeds[1]}) == 6
    taut.pack(net, tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    assert [p.packed["weight"].drawing.seed for p in packed_layers(loaded).values()] == seeds[1]


def test_buckets_that_start_at_random_are_as_spread_as_the_weights():
    net, site = linear(100, 100)
    spread = float(net[0].weight.detach().square().mean().sqrt())
    HashWeights(ratio=0.25, init="random").apply(net, site)
    for found in (core(net, site), tensor_at(net, site.name)):
        assert float(found.detach().std()) == pytest.approx(spread, rel=0.05)


def test_hashed_again_it_starts_from_what_was_trained():
    net, site = linear()
    for ratio in (0.5, 0.1):
        HashWeights(ratio=ratio).apply(net, site)
    assert core(net, site).shape == (48,)
    assert len(chain(net, site).recipe) == 1


# ---- frequencies -----------------------------------------------------------------------------


def conv(size=(3, 3)):
    net = nn.Sequential(nn.Conv2d(4, 6, size, padding=1))
    return net, traced(net, 4, 9, 9).sites[0]


def test_the_cosines_are_the_dct():
    cosines, sizes = cosines_of((3, 2))
    assert sizes == (1, 2, 2, 1)
    assert torch.allclose(cosines @ cosines.T, torch.eye(6), atol=1e-6)
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]  # by the sum, rows first
    for row, (k, m) in zip(cosines, order, strict=True):
        for p, q in itertools.product(range(3), range(2)):
            across = math.cos(math.pi * (2 * p + 1) * k / 6) * math.sqrt((2 if k else 1) / 3)
            along = math.cos(math.pi * (2 * q + 1) * m / 4) * math.sqrt((2 if m else 1) / 2)
            assert float(row[2 * p + q]) == pytest.approx(across * along, abs=1e-6)


def test_each_band_draws_from_buckets_of_its_own():
    net, site = conv()
    HashWeights(ratio=0.3, scope="band").apply(net, site)
    form, buckets = chain(net, site).forms[0], core(net, site)
    cosines, sizes = cosines_of((3, 3))
    bands = form.drawing().bands
    assert len(bands) == bands_of((3, 3)) == 5
    assert sum(bands) == round(0.3 * 216)
    each = [n / (24 * size) for n, size in zip(bands, sizes, strict=True)]
    assert each == sorted(each, reverse=True)
    for band, (n, before) in enumerate(zip(bands, itertools.accumulate((0, *bands)), strict=False)):
        with torch.no_grad():
            buckets.zero_()
            buckets[before : before + n] = torch.randn(n)
        found = tensor_at(net, site.name).detach().reshape(24, 9) @ cosines.T
        used = [bool((part.abs() > 1e-5).any()) for part in found.split(list(sizes), 1)]
        assert used == [b == band for b in range(5)]


def test_smooth_filters_keep_more_by_their_frequencies():
    net, site = conv((5, 5))
    with torch.no_grad():
        ramp = torch.linspace(-1, 1, 5)
        plane = torch.randn(6, 4, 1, 1) + torch.randn(6, 4, 1, 1) * ramp[:, None]
        net[0].weight.copy_(plane + torch.randn(6, 4, 1, 1) * ramp)
    errors = {}
    for scope in ("layer", "band"):
        copied = clone(net)
        HashWeights(ratio=0.25, scope=scope).apply(copied, site)
        errors[scope] = float(
            (tensor_at(copied, site.name) - net[0].weight).square().mean().detach()
        )
    assert errors["band"] < 0.7 * errors["layer"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 8)),
        (nn.Conv2d(4, 6, 3, groups=2), (4, 9, 8)),
        (nn.Conv1d(4, 6, 5, dilation=2), (4, 20)),
        (nn.Conv3d(3, 4, 2), (3, 4, 5, 6)),
        (nn.ConvTranspose2d(4, 6, 3), (4, 5, 5)),
        (nn.Conv2d(4, 6, 1), (4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_convolutions_run_packed_as_they_trained(tmp_path, layer, shape):
    technique = HashWeights(ratio=0.3, scope="band")
    blank = nn.Sequential(clone(layer))
    net, _ = hashed(technique, nn.Sequential(layer), *shape)
    taut.pack(net, tmp_path / "net.taut", "float32")
    loaded = taut.load(tmp_path / "net.taut", blank)
    x = torch.randn(2, *shape)
    for dense in (True, False):
        run_dense(loaded, dense)
        torch.testing.assert_close(loaded(x), net(x), rtol=1e-4, atol=1e-5)


def test_bands_share_out_all_buckets_and_no_band_gets_too_many():
    for sizes in ((10, 20, 30, 20, 10), (1, 1), (3, 500, 4)):
        for count in range(len(sizes), sum(sizes) + 1):
            found = shares_of(count, sizes)
            assert sum(found) == count
            assert all(1 <= share <= n for share, n in zip(found, sizes, strict=True))
    assert shares_of(150, (100, 100, 100, 100)) == (60, 45, 30, 15)


# ---- one vector for the network --------------------------------------------------------------


def test_all_sites_draw_from_one_vector(trained, task):
    weights = {n: tensor_at(trained, n).detach() for n in ("0.weight", "3.weight", "5.weight")}
    net = taut.apply(clone(trained), HashWeights(ratio=0.2, scope="network"), task)
    shared = net[0].parametrizations.weight.original
    assert shared.shape == (round(0.2 * (3072 + 1536 + 320)),)
    forms, sums, counts = [], 0, 0
    for n in (0, 3, 5):
        assert net[n].parametrizations.weight.original is shared
        form = net[n].parametrizations.weight[0].forms[0]
        weight = weights[f"{n}.weight"]
        assert float(form.scale) == float(weight.square().mean().sqrt().bfloat16())
        drawn = matrix(form.drawing())
        sums = sums + drawn.T @ (weight / form.scale).flatten()
        counts = counts + drawn.abs().sum(0)
        forms.append(form)
    torch.testing.assert_close(shared, sums / counts.clamp(min=1), rtol=1e-4, atol=1e-5)
    assert len([p for p in net.parameters() if p.dim() == 1]) == 3 + 1
    plain, x, wanted = plain_copy(net), torch.randn(3, 64), 0
    for model in (net, plain):
        model.eval()(x).square().sum().backward()
    for n, form in zip((0, 3, 5), forms, strict=True):
        wanted = wanted + form.scale * matrix(form.drawing()).T @ plain[n].weight.grad.flatten()
    torch.testing.assert_close(shared.grad, wanted, rtol=1e-4, atol=1e-5)


def test_shared_buckets_are_stored_once(tmp_path, trained, task):
    net = taut.apply(clone(trained), HashWeights(ratio=0.2, scope="network"), task)
    size = taut.pack(net, tmp_path / "net.taut")
    summary = taut.inspect(tmp_path / "net.taut")
    stored = {t.names[0]: sorted(t.parts) for t in summary.tensors}
    assert stored["0.weight"] == ["buckets.values", "seed"]
    assert stored["3.weight"] == stored["5.weight"] == ["seed"]
    single = taut.apply(clone(trained), HashWeights(ratio=0.2), task)
    assert size < taut.pack(single, tmp_path / "single.taut") + 20
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    parts = [p.packed["weight"].buckets for p in packed_layers(loaded).values()]
    assert parts[0] is parts[1] is parts[2]
    assert encode(packed_state(loaded)) == (tmp_path / "net.taut").read_bytes()
    copied = clone(loaded)
    assert encode(packed_state(copied)) == (tmp_path / "net.taut").read_bytes()


def test_copies_of_a_shared_vector_stay_shared_and_plain_ones_do_not(trained, task):
    net = taut.apply(clone(trained), HashWeights(ratio=0.2, scope="network"), task)
    copied = clone(net)
    cores = {id(copied[n].parametrizations.weight.original) for n in (0, 3, 5)}
    assert len(cores) == 1
    assert cores != {id(net[0].parametrizations.weight.original)}
    x = torch.randn(4, 64)
    torch.testing.assert_close(plain_copy(net)(x), net.eval()(x))
    used = {names: weight.shape for names, weight in weights_in_use(net)}
    assert used[("3.weight",)] == (32, 48)
    assert len(used) == 6


def test_what_is_shared_is_recoded_at_all_sites_or_none(trained, task):
    found = taut.trace(trained, task.example())
    message = r"share_values: site '0.weight' draws from what other sites draw from too"
    text = "hash_weights(ratio=0.2, scope='network') > share_values()"
    with pytest.raises(RecipeError, match=message):
        check(Recipe.parse(text), found)
    net = taut.apply(clone(trained), HashWeights(ratio=0.2, scope="network"), task)
    with pytest.raises(RecipeError, match=message):
        taut.apply(net, ShareValues(), task, found)
    weights = [tensor_at(net, s.name).detach().clone() for s in found.sites]
    taut.apply(net, HashWeights(ratio=0.2, scope="network"), task, found)  # the same once more
    for site, weight in zip(found.sites, weights, strict=True):
        assert torch.equal(tensor_at(net, site.name), weight)
    taut.apply(net, HashWeights(ratio=0.2), task, found)  # each its own again
    assert len({id(net[n].parametrizations.weight.original) for n in (0, 3, 5)}) == 3


def test_a_run_that_was_stopped_shares_its_buckets_again(tmp_path, trained, task):
    text = "hash_weights(ratio=0.2, scope='network') > recover(epochs=2)"
    whole = taut.compress(trained, task, text, folder=tmp_path / "whole")

    class Stop(taut.watch.Watch):
        def on_epoch(self, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taut.compress(trained, task, text, folder=tmp_path / "cut", watch=Stop())
    cut = taut.compress(trained, task, text, folder=tmp_path / "cut")
    assert (tmp_path / "cut/net.taut").read_bytes() == (tmp_path / "whole/net.taut").read_bytes()
    assert cut.measurement.score == whole.measurement.score


# ---- with others -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "second", [ShareValues(bits=6), ShareValues(bits=4), Quantize(bits=8), CodeLength()]
)
def test_buckets_are_written_in_few_bits(tmp_path, trained, task, second):
    found = taut.trace(trained, task.example())
    net = taut.apply(clone(trained), HashWeights(ratio=0.5), task)
    plain = taut.pack(net, tmp_path / "plain.taut")
    taut.apply(net, second, task, found)
    assert taut.pack(net, tmp_path / "net.taut") < 0.8 * plain
    state = packed_state(net)[("0.weight",)]
    assert state.format == "hashed.v1"
    assert state.buckets.format not in ("plain.v1", "hashed.v1")
    assert second.finish(net, found) == []
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    run_dense(loaded, False)
    x = torch.randn(5, 64)
    torch.testing.assert_close(loaded(x), net.eval()(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("first", [HashWeights(ratio=0.4), ShareValues(bits=3)])
def test_dead_inputs_of_what_is_drawn_from_a_table_stay(first):
    net = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 20))
    with torch.no_grad():
        net[0].weight[3], net[0].bias[3] = 0.0, 0.0
    found = traced(net, 9)
    for technique in (first, CodeLength()):
        technique.apply(net, found.site("2.weight"))
    before = tensor_at(net, "2.weight").detach().clone()
    assert CodeLength().finish(net, found) == []
    assert torch.equal(tensor_at(net, "2.weight"), before)


def test_training_makes_up_for_few_buckets(tmp_path, trained, task):
    text = "hash_weights(ratio=0.15) > recover(epochs=40, learning_rate=0.01)"
    before = taut.compress(trained, task, "hash_weights(ratio=0.15)", folder=tmp_path / "0")
    after = taut.compress(trained, task, text, folder=tmp_path / "1")
    assert before.measurement.score < 0.5
    assert after.measurement.score > after.original.score - 0.06
    assert after.ratio > 9


def test_a_packed_weight_is_never_made_whole(monkeypatch):
    drawing = Drawing((50, 30), (60,), 5, 1)
    packed = HashedWeight(drawing, Plain.of(torch.randn(60)))
    dense = packed.dense()
    filters = HashedWeight(Drawing((8, 4, 3, 3), (5, 4, 3, 2, 1), 5, 1), Plain.of(torch.randn(15)))
    kernels = filters.dense()
    x, pictures = torch.randn(3, 30), torch.randn(2, 4, 6, 6)
    monkeypatch.setattr(HashedWeight, "dense", None)
    assert sum(b.numel() for b in packed.buffers()) == 60
    torch.testing.assert_close(packed.matmul(x), x @ dense.T, rtol=1e-4, atol=1e-5)
    index = torch.tensor([[3, 3], [49, 0]])
    assert torch.equal(packed.rows(index), dense[index])
    y = filters.conv2d(pictures, (1, 1), (0, 0), (1, 1))
    torch.testing.assert_close(y, F.conv2d(pictures, kernels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [1, 4, 16, 64])
def test_rows_alone_are_those_of_the_whole(run):
    buckets, index = torch.randn(70), torch.tensor([[5, 0], [99, 5]])
    whole = reference.hashed_weight(buckets, (100, 33), 9, run)
    assert torch.equal(hashed_rows(buckets, index, 33, 9, run), whole[index])
    assert hashed_rows(buckets, torch.empty(0, dtype=torch.int64), 33, 9, run).shape == (0, 33)


# ---- bad input -------------------------------------------------------------------------------


def test_a_ratio_that_leaves_less_than_a_bucket_is_refused():
    net, site = linear()
    with pytest.raises(
        RecipeError,
        match=r"at least 1 bucket; ratio=0.001 leaves 0 for the 480 weights of site '0.weight'; "
        "use buckets=1",
    ):
        check(Recipe((HashWeights(ratio=0.001),)), traced(net, 40))
    with pytest.raises(RecipeError, match=r"hash_weights: ratio must lie in \[0, 1\), got 1.0"):
        HashWeights(ratio=1.0)
    with pytest.raises(
        RecipeError, match=r"sites of 480 weights need at least one bucket .* got 0"
    ):
        HashWeights(ratio=0.001, scope="network").sites(traced(net, 40))
    HashWeights(buckets=1).apply(net, site)
    assert len(tensor_at(net, site.name).abs().unique()) == 1


def test_fewer_buckets_than_bands_are_refused():
    net, site = conv()
    with pytest.raises(
        RecipeError, match=r"at least 5 buckets, one for each of its 5 bands .*; buckets=4 leaves 4"
    ):
        HashWeights(buckets=4, scope="band").apply(net, site)
    HashWeights(buckets=5, scope="band").apply(net, site)


def test_what_would_be_enlarged_is_left_and_said(tmp_path, trained, task):
    result = taut.compress(trained, task, "hash_weights(buckets=400)", folder=tmp_path / "run")
    said = "hash_weights: 5.weight would grow from 640 to 804 bytes; left as it is"
    assert [str(left) for left in result.candidate.left] == [said]
    assert said in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    formats = {t.names[0]: t.format for t in taut.inspect(result.candidate.path).tensors}
    assert (formats["3.weight"], formats["5.weight"]) == ("hashed.v1", "plain.v1")
    found = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match="fewer than weights, got 9999"):
        HashWeights(buckets=9999, scope="network").sites(found)


def test_runs_that_do_not_exist_are_refused():
    with pytest.raises(RecipeError, match="hash_weights: run must be 1, 4, 16 or 64, got 2"):
        HashWeights(run=2)


def test_masks_and_shared_values_come_after_or_not_at_all(trained, task):
    found = taut.trace(trained, task.example())
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.5), task)
    with pytest.raises(RecipeError, match=r"hash_weights: site '0.weight' carries a mask"):
        taut.apply(net, HashWeights(), task, found)
    net = taut.apply(clone(trained), ShareValues(), task)
    with pytest.raises(RecipeError, match=r"is written in 32 numbers already.*hash_weights first"):
        taut.apply(net, HashWeights(), task, found)
