"""Batch-norm folding: what a norm multiplies by goes into the weight before it, its shift stays.

    W'[o] = s[o] · W[o],    s = weight / sqrt(var + eps);    norm'(y') = y' + shift

A following quantization then rounds the weight that an engine multiplies by. The norm keeps its
place: its variance becomes weight² − eps, so that in training, where the batch's own variance takes
its place, it computes what it computed.

Jacob et al.: Quantization and training of neural networks for efficient integer-arithmetic-only
inference (CVPR 2018), section 3.2. Where we differ: there the norm is removed, and training
computes its statistics by a second convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from taut.errors import RecipeError
from taut.norms import bias_of, follow_scale, norm_of, plain_weight, scale_of, scale_rows, traced
from taut.statistics import Statistics
from taut.technique import Technique, register_step
from taut.trace import Trace
from taut.types import Cost, Site


@register_step
@dataclass(frozen=True, kw_only=True)
class FoldNorms(Technique):
    """Let weights hold the scales of the batch norms that follow them. No answer changes."""

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        found = tuple(s for s in trace.sites if any(n in trace.norms for n in s.names))
        if not found:
            raise RecipeError(
                "fold_norms: in this network no layer's output is read by a batch norm alone; "
                "leave it out"
            )
        return self._chosen(found)

    def predict(self, site: Site) -> Cost:
        return Cost(size_bytes=2.0 * site.numel, macs=site.macs)

    @torch.no_grad()
    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        norm = norm_of(self.name, model, traced(self.name, statistics), site)
        if norm is None:
            raise RecipeError(
                f"fold_norms: the norm after site {site.name!r} keeps no running statistics; leave "
                f"it out by only='!{site.name}'"
            )
        scale = scale_of(norm)
        scale_rows(plain_weight(self.name, model, site), bias_of(self.name, model, site), scale)
        follow_scale(norm, scale, norm.weight.data.square())
