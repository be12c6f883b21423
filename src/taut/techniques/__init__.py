"""The techniques, one file each. Importing this package registers them all."""

from taut.techniques.code_length import CodeLength
from taut.techniques.prune_weights import PruneWeights
from taut.techniques.share_values import ShareValues

__all__ = ["CodeLength", "PruneWeights", "ShareValues"]
