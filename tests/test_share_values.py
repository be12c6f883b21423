"""Weight sharing: k-means as defined, summed gradients, masks, small layers."""

import itertools

import pytest
import torch
from torch import nn

import taut
from taut.clusters import k_means, vector_k_means
from taut.errors import RecipeError
from taut.modules import clone, tensor_at
from taut.pack import packed_state
from taut.recoding import chain, core
from taut.statistics import Statistics
from taut.techniques import CodeLength, PruneWeights, ShareValues
from taut.trace import trace


def linear(values):
    net = nn.Sequential(nn.Linear(values.shape[1], values.shape[0], bias=False))
    with torch.no_grad():
        net[0].weight.copy_(values)
    return net, trace(net, ((torch.zeros(2, values.shape[1]),), {})).sites[0]


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_each_weight_takes_its_nearest_centroid_and_each_centroid_its_mean(init):
    torch.manual_seed(0)
    values = torch.randn(40, 50)
    net, site = linear(values)
    ShareValues(bits=3, init=init).apply(net, site)
    table, shared = core(net, site).detach(), tensor_at(net, site.name).detach()
    nearest = (values.flatten()[:, None] - table[None]).abs().argmin(1)
    assert torch.equal(table[nearest].reshape(values.shape), shared)
    for k in range(8):
        mine = values.flatten()[nearest == k]
        assert len(mine)
        torch.testing.assert_close(table[k], mine.mean(), rtol=1e-5, atol=1e-6)


def test_linear_start_covers_the_range_evenly():
    values = torch.cat([torch.tensor([-1.0, 1.0]), 0.01 * torch.randn(1000)])
    table = k_means(values, 4, "linear", 0)
    torch.testing.assert_close(table, torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]))


def test_the_hole_that_pruning_leaves_wastes_no_centroid():
    values = torch.cat([torch.linspace(1.0, 1.5, 500), torch.linspace(-1.5, -1.0, 500)])
    table = k_means(values, 16, "linear", 50)
    nearest = (values[:, None] - table[None]).abs().argmin(1)
    assert len(nearest.unique()) == 16
    assert float((values - table[nearest]).abs().max()) < 0.06


def test_a_weight_set_of_few_values_is_kept_exactly():
    values = torch.tensor([[0.5, -0.25, 0.5], [0.0, -0.25, 0.5]])
    net, site = linear(values)
    ShareValues(bits=4).apply(net, site)
    assert torch.equal(tensor_at(net, site.name), values)


def test_gradients_of_a_centroid_are_summed_over_its_weights():
    torch.manual_seed(0)
    net, site = linear(torch.randn(6, 9))
    ShareValues(bits=2).apply(net, site)
    x = torch.randn(5, 9)
    net(x).square().sum().backward()
    plain, _ = linear(tensor_at(net, site.name).detach())
    plain(x).square().sum().backward()
    index = chain(net, site).forms[0].index
    wanted = torch.stack([plain[0].weight.grad[index == k].sum() for k in range(4)])
    torch.testing.assert_close(core(net, site).grad, wanted, rtol=1e-4, atol=1e-5)


def test_under_a_mask_zeros_stay_zero_and_do_not_count(trained, task):
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.8, scope="layer"), task)
    mask = tensor_at(net, "0.weight") != 0
    kept = tensor_at(net, "0.weight")[mask].detach()
    taut.apply(net, ShareValues(bits=4), task, taut.trace(trained, task.example()))
    shared = tensor_at(net, "0.weight").detach()
    assert torch.equal(shared != 0, mask)
    alone = k_means(kept, 16, "linear", 50)
    assert torch.equal(shared[mask].unique(), alone[torch.isin(alone, shared[mask])].unique())


def test_entries_that_no_weight_uses_are_not_stored(tmp_path, trained, task):
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.98, scope="layer"), task)
    ShareValues(bits=8).apply(net, taut.trace(trained, task.example()).site("5.weight"))
    taut.pack(net, tmp_path / "net.taut")
    last = next(t for t in taut.inspect(tmp_path / "net.taut").tensors if t.names == ("5.weight",))
    assert last.parts["values.table.values"].count <= 2 * last.parts["values.index"].count


def test_shared_again_it_is_clustered_anew(trained, task):
    traced = taut.trace(trained, task.example())
    net = taut.apply(clone(trained), ShareValues(bits=5), task)
    taut.apply(net, ShareValues(bits=2), task, traced)
    assert len(tensor_at(net, "0.weight").unique()) == 4
    assert len(chain(net, traced.site("0.weight")).recipe) == 1


# ---- vectors


@pytest.mark.parametrize("init", ["linear", "random"])
@pytest.mark.parametrize("mirrored", [False, True])
def test_each_vector_takes_its_nearest_centroid_and_each_centroid_its_weighted_mean(init, mirrored):
    torch.manual_seed(0)
    x, w = torch.randn(300, 4), torch.rand(300, 4) + 0.1
    table = vector_k_means(x, w, 6, init, 500, mirrored)
    whole = torch.cat([table, -table]) if mirrored else table
    distance = (w[:, None] * (x[:, None] - whole[None]).square()).sum(-1)
    index = distance.argmin(1)
    signed = torch.where((index < 6)[:, None], x, -x)
    for k in range(6):
        mine = index % 6 == k
        assert mine.any()
        mean = (w * signed)[mine].sum(0) / w[mine].sum(0)
        torch.testing.assert_close(table[k], mean, rtol=1e-4, atol=1e-5)


def test_vectors_that_repeat_are_found_and_no_centroid_is_wasted():
    torch.manual_seed(0)
    book = torch.randn(7, 4)
    x = book[torch.arange(210) % 7]
    table = vector_k_means(x, torch.ones_like(x), 7, "linear", 50, False)
    assert float(torch.cdist(book, table).min(1).values.max()) < 1e-5


def test_a_coordinate_that_weighs_nothing_decides_nothing():
    torch.manual_seed(0)
    x, w = torch.randn(200, 2), torch.ones(200, 2)
    alone = vector_k_means(x[:, :1], w[:, :1], 4, "linear", 100, False)
    w[:, 1] = 0
    both = vector_k_means(torch.stack([x[:, 0], torch.zeros(200)], 1), w, 4, "linear", 100, False)
    torch.testing.assert_close(both[:, :1], alone)


@pytest.mark.parametrize("shape", [(6, 10), (5, 3, 3, 2)])
def test_the_runs_of_a_row_are_vectors_of_the_codebook(shape):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 6) if len(shape) == 2 else nn.Conv2d(3, 5, (3, 2)))
    example = torch.zeros(1, 10) if len(shape) == 2 else torch.zeros(1, 3, 4, 4)
    site = trace(net, ((example,), {})).sites[0]
    ShareValues(bits=3, vector=4).apply(net, site)
    rows = tensor_at(net, site.name).detach().flatten(1)
    table = core(net, site).detach().reshape(8, 4)
    for row, start in itertools.product(range(len(rows)), range(0, rows.shape[1], 4)):
        run = rows[row, start : start + 4]
        assert any(torch.equal(run, v[: len(run)]) for v in table)


def test_gradients_of_a_vector_are_summed_over_its_runs():
    torch.manual_seed(0)
    net, site = linear(torch.randn(6, 10))
    ShareValues(bits=2, vector=4, symmetric=True).apply(net, site)
    x = torch.randn(5, 10)
    net(x).square().sum().backward()
    plain, _ = linear(tensor_at(net, site.name).detach())
    plain(x).square().sum().backward()
    index = chain(net, site).forms[0].index
    grad = torch.nn.functional.pad(plain[0].weight.grad, (0, 2)).reshape(6, 3, 4)
    wanted = torch.stack([
        grad[index == k].sum(0) - grad[index == k + 2].sum(0) for k in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(core(net, site).grad.reshape(2, 4), wanted, rtol=1e-4, atol=1e-5)


def test_errors_weigh_by_the_inputs(trained, task):
    """The outputs of the layer err less, the weights more, than where all errors count alike."""
    traced = taut.trace(trained, task.example())
    layer, errors = traced.sites[0].name, {}
    (product,) = Statistics(trained, task.calibration_loss()).products(traced.site(layer))
    met = product.squares.float()
    before = tensor_at(trained, layer).detach()
    for weigh in ("equal", "inputs"):
        step = ShareValues(bits=6, vector=8, weigh=weigh, only=layer)
        net = taut.apply(clone(trained), step, task)
        off = tensor_at(net, layer).detach() - before
        errors[weigh] = float((met * off.square()).sum()), float(off.square().mean())
    assert errors["inputs"][0] < 0.95 * errors["equal"][0]
    assert errors["inputs"][1] > errors["equal"][1]


def test_pairs_of_opposite_values_store_half_of_them():
    torch.manual_seed(0)
    values = torch.randn(40, 50)
    net, site = linear(values)
    ShareValues(bits=4, symmetric=True).apply(net, site)
    shared, table = tensor_at(net, site.name).detach(), core(net, site).detach()
    assert table.shape == (8,)
    torch.testing.assert_close(table, k_means(values.abs().flatten(), 8, "linear", 200))
    assert torch.equal(shared.sign(), values.sign())
    packed = packed_state(net)[site.names]
    assert packed.meta() == {"entries": 16}
    assert packed.nested()["table"].format == "mirrored.v1"
    assert packed.nested()["table"].nested()["first"].numel == 8


def test_symmetric_values_stay_so_when_trained():
    torch.manual_seed(0)
    net, site = linear(torch.randn(6, 10))
    ShareValues(bits=3, symmetric=True).apply(net, site)
    with torch.no_grad():
        core(net, site).add_(0.25)
    values = set(tensor_at(net, site.name).detach().unique().tolist())
    assert values <= {s * v for v in core(net, site).tolist() for s in (1, -1)}


# ---- one table for a network


NETWORK = ShareValues(bits=4, scope="network")


def test_one_table_serves_all_sites_each_at_its_scale(trained, task):
    net = taut.apply(clone(trained), NETWORK, task)
    sites = taut.trace(trained, task.example()).sites
    assert len({id(core(net, s)) for s in sites}) == 1
    pooled = []
    for site in sites:
        before, form = tensor_at(trained, site.name).detach(), chain(net, site).forms[0]
        scale = before.square().mean().sqrt()
        torch.testing.assert_close(form.scale, scale, rtol=2**-8, atol=0)
        table = form.scale * core(net, site).detach()
        nearest = (before.flatten()[:, None] - table).abs().argmin(1)
        shared = tensor_at(net, site.name).detach()
        torch.testing.assert_close(table[nearest].reshape(before.shape), shared)
        pooled.append(before.flatten() / form.scale)
    wanted = k_means(torch.cat(pooled), 16, "linear", 300)
    torch.testing.assert_close(core(net, sites[0]).detach(), wanted)


def test_its_gradient_is_the_sum_over_all_sites(trained, task):
    net = taut.apply(clone(trained), NETWORK, task)
    sites = taut.trace(trained, task.example()).sites
    x = torch.randn(5, 64)
    net(x).square().sum().backward()
    plain = clone(trained)
    with torch.no_grad():
        for site in sites:
            tensor_at(plain, site.name).copy_(tensor_at(net, site.name))
    plain(x).square().sum().backward()
    wanted = torch.zeros(16)
    for site in sites:
        form, grad = chain(net, site).forms[0], tensor_at(plain, site.name).grad
        wanted.index_add_(0, form.index.flatten().int(), form.scale * grad.flatten())
    torch.testing.assert_close(core(net, sites[0]).grad, wanted, rtol=1e-3, atol=1e-4)


def test_the_file_holds_the_table_once(tmp_path, trained, task):
    sizes = {}
    for scope in ("layer", "network"):
        step = ShareValues(bits=7, vector=4, scope=scope)
        net = taut.apply(clone(trained), step, task)
        sizes[scope] = taut.pack(net, tmp_path / f"{scope}.taut")
    tables = [
        t.parts["table.first.values"].count
        for t in taut.inspect(tmp_path / "network.taut").tensors
        if "table.first.values" in t.parts
    ]
    assert tables == [128 * 4]
    assert sizes["network"] < sizes["layer"] - 128 * 4
    loaded = taut.load(tmp_path / "network.taut", clone(trained))
    x = torch.randn(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net.eval()(x), rtol=1e-2, atol=1e-2)
    taut.pack(loaded, tmp_path / "again.taut")
    assert (tmp_path / "again.taut").read_bytes() == (tmp_path / "network.taut").read_bytes()


def test_a_table_of_the_network_lets_small_sites_share(trained, task):
    """A codebook of its own would be larger than the last layer."""
    apart, joined = (
        taut.apply(clone(trained), ShareValues(bits=8, vector=2, scope=scope), task)
        for scope in ("layer", "network")
    )
    last = taut.trace(trained, task.example()).site("5.weight")
    assert chain(apart, last) is None
    assert chain(joined, last) is not None


def test_what_shares_a_table_is_not_recoded_alone(trained, task):
    net = taut.apply(clone(trained), NETWORK, task)
    traced = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match=r"code_length: site '0.weight' draws from what other"):
        taut.apply(net, CodeLength(vectors=False), task, traced)


def test_two_tables_of_two_parts_of_a_network_stay_apart(trained, task):
    net, traced = clone(trained), taut.trace(trained, task.example())
    for only in ("0.weight, 3.weight", "5.weight"):
        taut.apply(net, ShareValues(bits=3, scope="network", only=only), task, traced)
    first, second, last = (core(net, s) for s in traced.sites)
    assert first is second
    assert first is not last


def test_a_run_that_was_killed_goes_on_with_one_table(tmp_path, trained, task):
    class Killing(taut.Watch):
        def on_epoch(self, record):
            raise KeyboardInterrupt

    recipe = "share_values(bits=4, scope='network') > recover(epochs=1)"
    with pytest.raises(KeyboardInterrupt):
        taut.compress(trained, task, recipe, folder=tmp_path / "killed", watch=Killing())
    killed = taut.compress(trained, task, recipe, folder=tmp_path / "killed")
    whole = taut.compress(trained, task, recipe, folder=tmp_path / "whole")
    files = [(tmp_path / name / "net.taut").read_bytes() for name in ("killed", "whole")]
    assert files[0] == files[1]
    assert killed.measurement.score == whole.measurement.score


def test_vectors_of_fewer_inputs_are_refused():
    net, site = linear(torch.randn(6, 5))
    with pytest.raises(RecipeError, match=r"vector must be at most the inputs .* 8 for the 5 of"):
        ShareValues(vector=8).apply(net, site)


def test_vectors_of_odd_lengths_are_refused():
    with pytest.raises(RecipeError, match=r"share_values: vector must be 1, 2, 4 or 8, got 3"):
        ShareValues(vector=3)


def test_vectors_under_a_mask_are_refused():
    net, site = linear(torch.randn(20, 16))
    PruneWeights(scope="layer", sparsity=0.5).apply(net, site)
    with pytest.raises(RecipeError, match=r"share_values: site '0.weight' is masked, and .*vector"):
        ShareValues(vector=2).apply(net, site)


def test_weighing_without_data_is_refused():
    net, site = linear(torch.randn(20, 16))
    with pytest.raises(RecipeError, match=r"weigh='inputs' needs calibration data .*'0.weight'"):
        ShareValues(weigh="inputs").apply(net, site)


def test_bits_out_of_range_are_refused():
    with pytest.raises(RecipeError, match=r"share_values: bits must lie in \[1, 8\], got 9"):
        ShareValues(bits=9)
