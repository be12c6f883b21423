"""Equalisation: channels share their range between what makes them and the weights that read them.

    W1'[c] = W1[c] / s[c],    W2'[:, c] = s[c] · W2[:, c],    s = sqrt(r1 · r2) / r2

r1[c], r2[c]: the largest magnitudes of row c of the first weight and of column c of the second.
Every channel then has the same range in both, so that one step suits a whole tensor. Biases, and a
batch norm in between, follow. It needs an activation with f(s · x) = s · f(x), like ReLU: whether
the second layer still gives what it gave is looked at on the example, and where it does not, the
pair is left as it was. Nagel, van Baalen, Blankevoort, Welling: Data-free quantization through
weight equalization and bias correction (ICCV 2019), section 4.1. Where we differ: the activation is
tested, not looked up, and one pass is made; `equalise() > equalise()` makes another.

Where a layer norm makes the channels and only Linear weights read them, as in Transformers whose
norms come first, the norm's scale and shift stand for W1 and s is the square root of r1 / r2 all
the same, with r1[c] the largest |y[c]| on the calibration data and r2[c] over all those weights: a
few channels that are far larger than the others, which one step for all inputs would have to
cover, become weights. Xiao et al.: SmoothQuant (ICML 2023), with alpha = 1/2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.modules import owner
from taut.norms import (
    bias_of,
    follow_scale,
    norm_of,
    plain_weight,
    refuse_recoded,
    scale_rows,
    traced,
)
from taut.statistics import Statistics
from taut.technique import Technique, register_step
from taut.trace import Feed, Trace
from taut.types import Cost, Site

_log = logging.getLogger("taut")


@register_step
@dataclass(frozen=True, kw_only=True)
class Equalise(Technique):
    """Share the ranges of channels between layers that follow each other. No answer changes."""

    def sites(self, trace: Trace) -> tuple[Site, ...]:
        """Weights that another alone reads, and the first of those that read a layer norm."""
        sources = {f.source for f in trace.feeds if _pairs(trace, f)}
        sources |= {readers[0] for readers in trace.readers.values()}
        found = tuple(s for s in trace.sites if s.name in sources)
        if not found:
            raise RecipeError(
                "equalise: in this network no layer alone reads what another makes, nor do weights "
                "alone read a layer norm; leave it out"
            )
        return self._chosen(found)

    def predict(self, site: Site) -> Cost:
        return Cost(size_bytes=2.0 * site.numel, macs=site.macs)

    @torch.no_grad()
    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        trace = traced(self.name, statistics)
        norm = next((n for n, readers in trace.readers.items() if readers[0] == site.name), None)
        if norm is not None and statistics is not None:
            self._move_from_norm(model, trace, norm, statistics)
        feed = next((f for f in trace.feeds if f.source == site.name and _pairs(trace, f)), None)
        if feed is not None:
            self._share(model, trace, site, feed)

    def _move_from_norm(
        self, model: nn.Module, trace: Trace, norm: str, statistics: Statistics
    ) -> None:
        """Share the ranges of a layer norm's channels with the columns of all that read it."""
        module, _ = owner(model, norm)
        refuse_recoded(self.name, module, trace.readers[norm][0])
        sites = [trace.site(n) for n in trace.readers[norm]]
        weights = [plain_weight(self.name, model, s) for s in sites]
        seen = statistics.inputs(sites[0]).flatten(0, -2).abs().amax(0).to(weights[0].device)
        reads = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
        scale = (seen / reads).sqrt().where((seen > 0) & (reads > 0), 1.0)
        for parameter in module.parameters(recurse=False):
            parameter.div_(scale)
        for weight in weights:
            weight.mul_(scale)

    def _share(self, model: nn.Module, trace: Trace, site: Site, feed: Feed) -> None:
        target = trace.site(feed.target)
        first, second = (plain_weight(self.name, model, s) for s in (site, target))
        columns = second.reshape(len(second), len(first), -1)
        rows, reads = first.flatten(1).abs().amax(1), columns.abs().amax((0, 2))
        scale = ((rows * reads).sqrt() / reads).where((rows > 0) & (reads > 0), 1.0)
        before = _answer(model, trace, feed)
        self._scale(model, trace, site, second, 1 / scale)
        after = _answer(model, trace, feed)
        if bool(((after - before).abs() > 1e-3 * before.abs().max()).any()):
            self._scale(model, trace, site, second, scale)
            _log.info(
                "equalise: %s and %s stay: what is between them does not keep scales",
                site.name, target.name,
            )  # fmt: skip

    def _scale(
        self, model: nn.Module, trace: Trace, site: Site, second: Tensor, scale: Tensor
    ) -> None:
        """Multiply what passes between the weights by `scale`, [channels]."""
        first, norm = plain_weight(self.name, model, site), norm_of(self.name, model, trace, site)
        scale_rows(first, bias_of(self.name, model, site), scale)
        second.view(len(second), len(first), -1).div_(scale[:, None])
        if norm is not None:
            var = cast(Tensor, norm.running_var)
            follow_scale(norm, scale, (var + norm.eps) * scale.square())
            norm.weight.data.mul_(scale)
            norm.bias.data.mul_(scale)


def _pairs(trace: Trace, feed: Feed) -> bool:
    """Whether the two weights belong to each other alone."""
    tied = trace.site(feed.source).aliases + trace.site(feed.target).aliases
    return feed.only_reader and feed.source != feed.target and not tied


def _answer(model: nn.Module, trace: Trace, feed: Feed) -> Tensor:
    """What the second layer gives on the example, in eval mode."""
    seen: list[Tensor] = []
    module, training = owner(model, feed.target)[0], model.training
    hook = module.register_forward_hook(lambda m, given, out: seen.append(out))
    args, kwargs = trace.example_on(model)
    try:
        model.eval()(*args, **kwargs)
    finally:
        hook.remove()
        model.train(training)
    return seen[0].clone()
