"""What the kernels' tests share: every variant this machine can run, sizes around vector widths."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taut.kernels import native

EVERY_FEATURE = native.features()
SUBSETS = tuple(EVERY_FEATURE[:n] for n in range(len(EVERY_FEATURE) + 1))

AROUND_WIDTHS = (1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 513)
"""Powers of two up to four blocks of columns, one less and one more."""

needs_native = pytest.mark.skipif(not native.LOADED, reason="the native kernels are not built")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`variant` runs a test under each processor that this one can pretend to be."""
    if "variant" in metafunc.fixturenames:
        metafunc.parametrize("variant", SUBSETS, indirect=True, ids=lambda s: s[-1] if s else "any")


@pytest.fixture
def variant(request: pytest.FixtureRequest):
    """The features in force."""
    if not native.LOADED:
        pytest.skip("the native kernels are not built")
    with native.restricted(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    """One thread, then two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_as_exact_as_torch(
    got: Tensor,
    x: Tensor,
    weight: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
    times: float = 2.0,
) -> None:
    """Raise unless a float product errs at most twice as much as PyTorch's own.

    float64 is the truth, and both errors are the largest anywhere. PyTorch's own depends on the
    processor and may be lucky, so an error is allowed too that any order of summing may have: k
    roundings of random sign, each by a unit in the last place of a sum that does not cancel (the
    root of the summed squares), make sqrt(k) of them (Higham, Mary: A New Approach to Probabilistic
    Rounding Error Analysis, SIAM J. Sci. Comput. 2019). k: the products in a sum.
    """
    truth = product(x.double(), weight.double())
    assert got.shape == truth.shape
    if truth.numel() == 0:
        return
    ours = (got.double() - truth).abs().max()
    theirs = (product(x.float(), weight.float()).double() - truth).abs().max()
    uncancelled = product(x.double().square(), weight.double().square()).max().sqrt()
    roundings = max(2.0, math.sqrt(weight[0].numel()))
    least = roundings * torch.finfo(torch.float32).eps * uncancelled
    assert ours <= times * torch.maximum(theirs, least), (float(ours), float(theirs))
