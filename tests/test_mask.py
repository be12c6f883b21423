"""The mask: what it lets through, which gradients it watches, and what it leaves in a file."""

import pytest
import torch
from torch import nn

from taut.mask import Mask
from taut.modules import clone
from taut.packed import Plain
from taut.pattern import largest
from taut.sparse_weight import SparseWeight


@pytest.fixture
def mask():
    return Mask(torch.tensor([[True, False, True], [False, True, True]]))


def test_it_lets_through_what_is_there(mask):
    core = torch.arange(6.0).reshape(2, 3) + 1
    assert mask(core).tolist() == [[1, 0, 3], [0, 5, 6]]
    assert mask.matters(core, None) is mask.mask
    outer = torch.tensor([[True, True, False], [True, True, True]])
    assert mask.matters(core, outer).tolist() == [[True, False, False], [False, True, True]]


def test_gradients_stop_at_what_is_not_there(mask):
    core = torch.ones(2, 3, requires_grad=True)
    (mask(core) * 2).sum().backward()
    assert core.grad.tolist() == [[2, 0, 2], [0, 2, 2]]
    assert mask.gathered is None


def test_straight_through_they_reach_it_and_the_weight_is_the_same(mask):
    core = torch.tensor([[1e8, 3.0, -0.1], [1e-8, 5.0, 7.0]], requires_grad=True)
    plain = mask(core)
    mask.straight_through = True
    through = mask(core)
    assert torch.equal(through, plain)
    (through * 2).sum().backward()
    assert core.grad.tolist() == [[2, 2, 2], [2, 2, 2]]


def test_the_dense_gradient_is_gathered_and_the_cores_stays_masked(mask):
    torch.manual_seed(0)
    core, x = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    mask.gathers = "gradient"
    for _ in range(2):  # as over two micro-batches
        (x @ mask(core).T).square().sum().backward()
    weight = mask(core).detach().requires_grad_()
    (x @ weight.T).square().sum().backward()
    torch.testing.assert_close(mask.gathered, 2 * weight.grad)
    torch.testing.assert_close(core.grad, 2 * weight.grad * mask.mask)
    assert bool((mask.gathered[~mask.mask] != 0).all())


def test_movement_is_minus_gradient_times_weight_even_where_absent(mask):
    core = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    mask.gathers = "movement"
    (mask(core) * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    assert mask.gathered.tolist() == [[-1, 4, -9], [-4, 10, -18]]


def test_a_gradient_that_is_no_number_is_not_gathered(mask):
    core = torch.ones(2, 3, requires_grad=True)
    mask.gathers = "gradient"
    (mask(core) * torch.tensor([float("nan"), float("inf"), 2.0])).sum().backward()
    assert mask.gathered.tolist() == [[0, 0, 2], [0, 0, 2]]


def test_without_gradients_nothing_is_watched(mask):
    mask.gathers = "gradient"
    with torch.no_grad():
        mask(torch.ones(2, 3, requires_grad=True))
    assert mask.gathered is None


def test_settled_means_that_no_more_are_there_than_should_be(mask):
    assert mask.settled()
    mask.mask.fill_(True)
    assert not mask.settled()
    mask.mask.fill_(False)
    assert mask.settled()


def test_the_state_is_all_there_is(mask):
    mask.followed.fill_(True)
    fresh = Mask(torch.ones(2, 3, dtype=torch.bool))
    fresh.load_state_dict(mask.state_dict())
    assert torch.equal(fresh.mask, mask.mask)
    assert int(fresh.kept) == 4
    assert bool(fresh.followed)
    mask.gathers = "gradient"
    core = torch.ones(2, 3, requires_grad=True)
    mask(core).sum().backward()
    assert clone(nn.Sequential(mask))[0].state_dict().keys() == fresh.state_dict().keys()


def test_it_packs_as_a_sparse_weight(mask):
    core = torch.arange(6.0).reshape(2, 3) + 1
    packed = mask.pack(core, None, lambda keep: Plain.of(core[keep]))
    assert isinstance(packed, SparseWeight)
    assert torch.equal(packed.dense(), mask(core))
    keep = torch.tensor([[True, True, False], [False, True, False]])
    packed = mask.pack(core, keep, lambda kept: Plain.of(core[kept]))
    assert packed.dense().tolist() == [1, 0, 5]


def test_largest_of_all_and_among_some():
    scores = torch.tensor([[3.0, -1.0, 2.0], [5.0, 4.0, -7.0]])
    assert largest(scores, 2).tolist() == [[False, False, False], [True, True, False]]
    among = torch.tensor([[True, True, True], [False, False, True]])
    assert largest(scores, 2, among).tolist() == [[True, False, True], [False, False, False]]
    assert torch.equal(largest(scores, 99, among), among)
    assert not largest(scores, 0).any()
