"""The techniques, one file each. Importing this package registers them all."""

from taut.techniques.add_shortcuts import AddShortcuts
from taut.techniques.binarize import Binarize
from taut.techniques.code_length import CodeLength
from taut.techniques.correct_biases import CorrectBiases
from taut.techniques.drop_blocks import DropBlocks
from taut.techniques.equalise import Equalise
from taut.techniques.factor_weights import FactorWeights
from taut.techniques.fold_norms import FoldNorms
from taut.techniques.hash_weights import HashWeights
from taut.techniques.l0_gates import L0Gates
from taut.techniques.learned_levels import LearnedLevels
from taut.techniques.low_rank import LowRank
from taut.techniques.merge_neurons import MergeNeurons
from taut.techniques.prune_channels import PruneChannels
from taut.techniques.prune_weights import PruneWeights
from taut.techniques.quantize import Quantize
from taut.techniques.share_values import ShareValues
from taut.techniques.structured_matrix import StructuredMatrix
from taut.techniques.student import Student
from taut.techniques.swap_convs import SwapConvs
from taut.techniques.tie_filters import TieFilters
from taut.techniques.tie_layers import TieLayers
from taut.techniques.variational_dropout import VariationalDropout
from taut.techniques.widen import Widen

__all__ = [
    "AddShortcuts",
    "Binarize",
    "CodeLength",
    "CorrectBiases",
    "DropBlocks",
    "Equalise",
    "FactorWeights",
    "FoldNorms",
    "HashWeights",
    "L0Gates",
    "LearnedLevels",
    "LowRank",
    "MergeNeurons",
    "PruneChannels",
    "PruneWeights",
    "Quantize",
    "ShareValues",
    "StructuredMatrix",
    "Student",
    "SwapConvs",
    "TieFilters",
    "TieLayers",
    "VariationalDropout",
    "Widen",
]
