"""Measuring: every figure against one computed another way."""

import pytest
import torch
from conftest import small_net
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import taut
from taut.layers import run_dense
from taut.measure import latency, measure, peak_memory, tensor_bytes
from taut.modules import clone, tensor_at
from taut.techniques import PruneWeights
from taut.zoo import LeNet5, LeNet300


@pytest.mark.parametrize(
    ("net", "shape", "parameters", "macs"),
    [
        (LeNet5(), (2, 1, 28, 28), 431_080, 2_293_000),
        (LeNet300(), (2, 784), 266_610, 266_200),
    ],
)
def test_the_zoos_counts_are_the_papers(net, shape, parameters, macs):
    traced = taut.trace(net, ((torch.zeros(shape),), {}))
    assert (traced.parameters, traced.macs) == (parameters, macs)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(shape))
    assert counter.get_total_flops() == 2 * shape[0] * macs


def test_the_original_is_measured_as_it_stands(trained, task):
    found = measure(trained, task, taut.trace(trained, task.example()), batches=(1, 8))
    assert found.score == task.evaluate(trained)
    assert found.size_bytes == 4 * found.parameters
    assert found.nonzero_parameters == found.parameters == 64 * 48 + 48 * 32 + 32 * 10 + 90
    assert found.effective_macs == found.macs == 64 * 48 + 48 * 32 + 32 * 10
    assert [x.batch for x in found.latencies] == [1, 8]
    assert all(x.threads == torch.get_num_threads() for x in found.latencies)
    assert all(x.median_ms > 0 and x.iqr_ms >= 0 and x.runs > 1 for x in found.latencies)


def test_what_is_pruned_does_no_effective_work(trained, task):
    traced = taut.trace(trained, task.example())
    net = taut.apply(clone(trained), PruneWeights(sparsity=0.75, scope="layer"), task, traced)
    found = measure(net, task, traced, size_bytes=123, batches=(1,))
    assert found.size_bytes == 123
    assert found.macs == traced.macs
    assert found.effective_macs == pytest.approx(0.25 * traced.macs, rel=0.002)
    left = sum(int(tensor_at(net, s.name).count_nonzero()) for s in traced.sites)
    assert found.nonzero_parameters == left + 90


def test_tied_weights_are_counted_once():
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    assert tensor_bytes(net) == 4 * 64


def test_peak_memory_is_weights_plus_the_activations_alive_at_once():
    net = nn.Sequential(
        nn.Linear(100, 1000, bias=False), nn.ReLU(), nn.Linear(1000, 10, bias=False)
    )
    weights = 4 * (100 * 1000 + 1000 * 10)
    found = peak_memory(net, ((torch.zeros(16, 100),), {}))
    assert found == weights + 2 * 4 * 16 * 1000  # the hidden layer before and after the ReLU


def test_decoded_copies_count_where_layers_run_dense(tmp_path, trained, task):
    taut.pack(taut.apply(clone(trained), "share_values(bits=4)", task), tmp_path / "net.taut")
    net = taut.load(tmp_path / "net.taut", small_net())
    example = task.example(1)
    dense = peak_memory(net, example)
    assert dense > tensor_bytes(net) + 4 * (64 * 48 + 48 * 32 + 32 * 10)
    run_dense(net, False)
    assert net[0]._decoded == {}
    assert peak_memory(net, example) >= tensor_bytes(net)


def test_a_slower_network_takes_longer():
    small, large = nn.Linear(64, 64), nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    quick = latency(small, ((torch.zeros(1, 64),), {}), 1)
    slow = latency(large, ((torch.zeros(1, 512),), {}), 1)
    assert slow.median_ms > 3 * quick.median_ms


def test_measuring_changes_nothing(trained, task):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    measure(trained, task, taut.trace(trained, task.example()), batches=(1,))
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
