"""Measuring: every figure against one computed another way."""

import functools
import sys

import pytest
import torch
from conftest import small_net
from nets import Net
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import taut
from taut.layers import run_dense
from taut.measure import measure, peak_memory, tensor_bytes
from taut.modules import clone, tensor_at
from taut.techniques import PruneWeights
from taut.timing import latency
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


def test_a_network_takes_the_time_of_a_forward(monkeypatch):
    """By a clock that only the network moves: 2 ms, and 5 ms for every other batch."""
    now = 0.0

    def forward(_, x):
        nonlocal now
        now += 2e-3 if len(x) == 1 else 5e-3
        return x

    invented = functools.partial(Timer, timer=lambda: now)
    monkeypatch.setattr(sys.modules[latency.__module__], "Timer", invented)
    one, many = (latency(Net(forward), ((torch.zeros(n, 4),), {}), n) for n in (1, 64))
    assert (one.median_ms, many.median_ms) == (pytest.approx(2), pytest.approx(5))
    assert (one.iqr_ms, many.iqr_ms) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert (one.batch, many.batch) == (1, 64)
    assert one.threads == torch.get_num_threads()
    assert one.runs > 1


def test_measuring_changes_nothing(trained, task):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    measure(trained, task, taut.trace(trained, task.example()), batches=(1,))
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
