"""Weight sharing: k-means as defined, summed gradients, masks, small layers."""

import pytest
import torch
from torch import nn

import taut
from taut.clusters import k_means
from taut.errors import RecipeError
from taut.modules import clone, tensor_at
from taut.recoding import chain, core
from taut.techniques import PruneWeights, ShareValues
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
    ShareValues(bits=3, init=init, iterations=300).apply(net, site)
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
    taut.apply(net, ShareValues(bits=8), task, taut.trace(trained, task.example()))
    taut.pack(net, tmp_path / "net.taut")
    last = next(t for t in taut.inspect(tmp_path / "net.taut").tensors if t.names == ("5.weight",))
    assert last.parts["values.table.values"].count <= 2 * last.parts["values.index"].count


def test_shared_again_it_is_clustered_anew(trained, task):
    traced = taut.trace(trained, task.example())
    net = taut.apply(clone(trained), ShareValues(bits=5), task)
    taut.apply(net, ShareValues(bits=2), task, traced)
    assert len(tensor_at(net, "0.weight").unique()) == 4
    assert len(chain(net, traced.site("0.weight")).recipe) == 1


def test_bits_out_of_range_are_refused():
    with pytest.raises(RecipeError, match=r"share_values: bits must lie in \[1, 8\], got 9"):
        ShareValues(bits=9)
