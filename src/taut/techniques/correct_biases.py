"""Bias correction: what a recoded weight adds to the mean of its outputs is taken off the bias.

    b' = b − (W' − W) · E[x]

W': the weight as it is used; W: the one that trains behind it; E[x]: the mean of what it meets on
the calibration data, in the network as it is. Where there is no bias, the mean of the batch norm
that follows takes it. A weight that second-order rounding has put on its grid has nothing behind it
and stays.

Nagel, van Baalen, Blankevoort, Welling: Data-free quantization through weight equalization and bias
correction (ICCV 2019), section 4.2. Where we differ: E[x] is measured, not derived from batch
norms.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from taut.modules import tensor_at
from taut.norms import bias_of, norm_of, traced
from taut.recoding import chain, core
from taut.statistics import Statistics
from taut.technique import Technique, register_step
from taut.types import Cost, Site

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class CorrectBiases(Technique):
    """Take off the biases what quantization, or pruning, added to the mean outputs. After those."""

    def predict(self, site: Site) -> Cost:
        return Cost(size_bytes=2.0 * site.numel, macs=site.macs)

    @torch.no_grad()
    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        trace = traced(self.name, statistics)
        assert statistics is not None
        bias, norm = bias_of(self.name, model, site), norm_of(self.name, model, trace, site)
        held = core(model, site).detach()
        recoded = chain(model, site) is not None and held.shape == site.shape
        if not recoded or (bias is None and norm is None):
            _log.info("correct_biases: %s has nothing to correct, or no bias", site.name)
            return
        error = (tensor_at(model, site.name) - held).flatten().cpu().double()
        added = torch.zeros(site.shape[0], dtype=torch.float64)
        for product in statistics.products(site, diagonal=True):
            index = product.index.cpu()
            row = index[:, 0] // (site.numel // site.shape[0])
            if not bool((index // (site.numel // site.shape[0]) == row[:, None]).all()):
                return  # of a transposed convolution, whose outputs are no rows
            added.index_add_(0, row, error[index] @ (product.sums.cpu() / product.rows))
        if bias is not None:
            bias.sub_(added.to(bias))
        elif norm is not None:
            mean = cast(Tensor, norm.running_mean)
            mean.add_(added.to(mean))
