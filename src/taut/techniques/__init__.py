"""The techniques, one file each. Importing this package registers them all."""

from taut.techniques.add_shortcuts import AddShortcuts
from taut.techniques.binarize import Binarize
from taut.techniques.code_length import CodeLength
from taut.techniques.factor_weights import FactorWeights
from taut.techniques.l0_gates import L0Gates
from taut.techniques.learned_levels import LearnedLevels
from taut.techniques.low_rank import LowRank
from taut.techniques.prune_weights import PruneWeights
from taut.techniques.share_values import ShareValues
from taut.techniques.variational_dropout import VariationalDropout

__all__ = [
    "AddShortcuts",
    "Binarize",
    "CodeLength",
    "FactorWeights",
    "L0Gates",
    "LearnedLevels",
    "LowRank",
    "PruneWeights",
    "ShareValues",
    "VariationalDropout",
]
