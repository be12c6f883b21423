"""Attention step by step: what it does not do is refused, never done wrongly."""

import pytest
import torch
from torch import nn

from taut.caches import attend


@pytest.mark.parametrize(
    "options", [{"batch_first": False}, {"add_zero_attn": True}, {"add_bias_kv": True}]
)
def test_other_attention_is_refused(options):
    layer = nn.MultiheadAttention(8, 2, **{"batch_first": True, **options})
    with pytest.raises(ValueError, match=r"attend takes an attention with batch_first=True.*got"):
        attend(layer, torch.randn(1, 3, 8))
