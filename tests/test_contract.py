"""Every registered recoding technique keeps the contract of taut.testing."""

import pytest

from taut.recoding import Recoding
from taut.technique import techniques
from taut.techniques import CodeLength, PruneWeights, ShareValues
from taut.testing import RecodingContract


class TestPruneWeights(RecodingContract):
    under_test = (
        PruneWeights(sparsity=0.9),
        PruneWeights(sparsity=0.8, scope="global"),
        PruneWeights(quality=1.0),
        PruneWeights(sparsity=0.8, scope="layer", criterion="obs"),
        PruneWeights(criterion="obs", pattern="2:4"),
    )


class TestShareValues(RecodingContract):
    under_test = (
        ShareValues(),
        ShareValues(bits=8),
        ShareValues(bits=3, init="random"),
    )


class TestCodeLength(RecodingContract):
    under_test = (CodeLength(), CodeLength(resolution=0.2, vectors=False))


@pytest.mark.parametrize("name", sorted(techniques()))
def test_every_technique_is_under_contract(name):
    cls = techniques()[name]
    tested = [t for suite in RecodingContract.__subclasses__() for t in suite.under_test]
    assert not issubclass(cls, Recoding) or any(type(t) is cls for t in tested)
