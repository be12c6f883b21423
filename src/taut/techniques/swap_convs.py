"""Convolutions swapped for cheaper ones: separable, grouped, fire, stacked, asymmetric, parallel.

    y = conv(x)  →  y' = cheaper(x),    least ‖y' − y‖ over the calibration data

conv_swaps.py has the six and their papers. Site after site, the new parts start from the old weight
by least squares on what the layer reads (in the network as it is swapped so far) and gave (in the
original), and are then trained on these pairs alone for `block_steps`. Distil the whole network by
a `recover` behind it. A site that would not get smaller, in numbers and in MACs, and one whose
outputs would miss more than `tolerance` of their variance stay as they are. A first convolution,
which reads a few colours, gains little: leave it out by `only`.

Howard, Sandler, Chu, Chen, Chen, Tan, Wang, Zhu, Vasudevan, Adam: MobileNets (2017), train such
layers from random numbers; here the old network is taught to them.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut import edits
from taut.conv_fits import fit, lost, met, train
from taut.conv_swaps import (
    BETWEEN,
    KINDS,
    LAYERS,
    Conv,
    Shape,
    Swap,
    Swapped,
    macs,
    numbers,
    odd,
    stages,
    why_not,
)
from taut.errors import RecipeError
from taut.modules import clone, device_of, owner, tensor_at
from taut.reshaping import Reshaping, check_runs
from taut.statistics import Statistics
from taut.technique import option, register_step
from taut.trace import Trace
from taut.types import Cost, Site

_log = logging.getLogger("taut")
_UNTRAINED = 1.2  # times as much of a block's outputs is missed, about, as after its training


@register_step
@dataclass(frozen=True, kw_only=True)
class SwapConvs(Reshaping):
    """Let each convolution be a few cheaper ones that give nearly the same."""

    to: str = option("separable", choices=KINDS, help="what a convolution becomes")
    between: str = option(
        "norm", choices=BETWEEN, help="between parts in a row: norm and ReLU, ReLU, or nothing"
    )
    multiplier: int = option(1, low=1, high=64, help="separable: filters for each input channel")
    groups: int = option(2, low=2, high=1024, help="grouped: groups of channels")
    width: float | None = option(
        None, low=0.001, high=4,
        help="fire: squeezed channels to outputs, by default 0.125; stacked, asymmetric: channels "
        "between, to the geometric mean of both ends, by default 1",
    )  # fmt: skip
    block_steps: int = option(
        200, low=0, high=100_000, unit="step", help="of training each block by itself"
    )
    tolerance: float = option(
        0.5, low=0, high=10, help="share of the outputs' variance that a block may miss"
    )

    def predict(self, site: Site) -> Cost:
        """Bytes at two a number; MACs as they would be if the image kept its size."""
        taken = site.numel
        if site.kind == "conv" and len(site.shape) > 2:
            conv = Conv.plain(site.shape)
            width = self._width(conv)
            if not why_not(self.to, conv, width):
                taken = min(taken, numbers(self.to, conv, width, self.between, False))
        return Cost(size_bytes=2.0 * taken, macs=site.macs * taken / max(site.numel, 1))

    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        return self._swapped(model, trace, statistics, self.block_steps, self.tolerance)

    def outline(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        """By least squares alone; what training makes good is allowed for."""
        tolerance = self.tolerance * (_UNTRAINED if self.block_steps else 1)
        return self._swapped(model, trace, statistics, 0, tolerance)

    def _swapped(
        self, model: nn.Module, trace: Trace, statistics: Statistics, steps: int, tolerance: float
    ) -> nn.Module:
        """steps: of training each block. tolerance: what it may miss thereafter."""
        planned, whys = self._planned(model, trace)
        if planned:
            check_runs(self.name, model, planned, trace)
        original, work = clone(model), clone(model)
        done = list[Swap]()
        for path, swap in planned.items():
            made = self._fitted(original, work, swap, statistics, steps, tolerance)
            if isinstance(made, str):
                whys[path] = made
            else:
                work = swap.replay(work)
                work.get_submodule(path).load_state_dict(made.state_dict())
                done.append(swap)
        for path, why in whys.items():
            _log.info("swap_convs: %s stays as it is: %s", path or "the layer", why)
        if not done:
            first = next((f"{p or 'the layer'}: {w}" for p, w in whys.items()), "there is none")
            raise RecipeError(
                f"swap_convs: no convolution of only={self.only!r} gets smaller by {self} "
                f"({first}; the log says why for each): raise tolerance or multiplier, or choose "
                "another kind by `to`"
            )
        for swap in done:
            model = swap.replay(model)
            edits.note(model, swap)
            state = work.get_submodule(swap.layer).state_dict()
            model.get_submodule(swap.layer).load_state_dict(state)
        return model

    def _width(self, conv: Conv) -> int:
        """The whole number that an edit holds."""
        if self.to == "separable":
            return self.multiplier
        if self.to == "grouped":
            return self.groups
        if self.to == "fire":
            squeezed = 0.125 if self.width is None else self.width
            return min(max(1, round(squeezed * conv.outputs)), conv.inputs)
        if self.to == "parallel":
            return 1
        width = 1.0 if self.width is None else self.width
        mean = max(1, round(width * math.sqrt(conv.inputs * conv.outputs)))
        window = 3 ** len(conv.kernel) if self.to == "stacked" else conv.kernel[-1]
        return min(mean, conv.inputs * window)  # more filters than that repeat each other

    def _planned(self, model: nn.Module, trace: Trace) -> tuple[dict[str, Swap], dict[str, str]]:
        """The swaps that make their layers smaller, by path, in the order of execution.

        And why the other convolutions stay as they are.
        """
        sites, found, whys = self.sites(trace), dict[str, Swap](), dict[str, str]()
        sizes = _sizes(model, trace)
        for site in sites:
            path, _, leaf = site.name.rpartition(".")
            layer = owner(model, site.name)[0]
            if leaf != "weight" or type(layer) not in LAYERS:
                if site.kind == "conv":
                    whys[path] = odd(layer) or f"its {leaf} is no convolution's"
                continue
            why = odd(layer)
            if len(site.names) > 1:
                why = f"its weight is {site.aliases[0]} too"
            if not bool(tensor_at(layer, "weight").isfinite().all()):
                raise RecipeError(f"swap_convs: site {site.name!r} holds NaN or infinite weights")
            conv = Conv.of(layer)
            width = self._width(conv)
            why = why or why_not(self.to, conv, width) or self._growth(
                conv, width, layer.bias is not None, sizes.get(path)
            )  # fmt: skip
            if why:
                whys[path] = why
            else:
                found[path] = Swap(layer=path, to=self.to, width=width, between=self.between)
        return found, whys

    def _growth(self, conv: Conv, width: int, bias: bool, size: Shape | None) -> str:
        """Why the swap would make nothing smaller; "" where it does."""
        if size is None or len(size) != len(conv.kernel):
            return "it reads no batch of images in the example"
        had = conv.numel + conv.outputs * bias
        takes = numbers(self.to, conv, width, self.between, bias)
        if takes >= had:
            return f"it would take {takes:,} numbers, and has {had:,}"
        work, before = macs(self.to, conv, width, size), conv.numel * math.prod(conv.spots(size))
        return f"it would take {work:,} MACs, and takes {before:,}" if work >= before else ""

    def _fitted(
        self, original: nn.Module, work: nn.Module, swap: Swap, statistics: Statistics, steps: int,
        tolerance: float,
    ) -> Swapped | str:  # fmt: skip
        """The layers with their numbers, as far as they were trained; or why there are none."""
        old, path = original.get_submodule(swap.layer), swap.layer
        target = met(lambda: statistics.loss(original), old)[1]
        x = met(lambda: statistics.loss(work), work.get_submodule(path))[0]
        if not len(x) or len(x) != len(target):
            return "the calibration data do not reach it, or come in several shapes"
        if not bool(x.isfinite().all() and target.isfinite().all()):
            raise RecipeError(
                f"swap_convs: what layer {path!r} reads or gives is not finite on the calibration "
                f"data; look for NaN in the training data, or leave it out by only='!{path}'"
            )
        conv, weight = Conv.of(old), tensor_at(old, "weight").detach().cpu().double()
        row = stages(swap.to, conv, swap.width)
        made = swap.made(old).float().cpu().eval()
        fit(made, row, conv, weight, x, target)
        made = made.to(device_of(old))
        start = end = lost(made, x, target)
        if steps:
            before: dict[str, Any] = {k: v.clone() for k, v in made.state_dict().items()}
            train(made, x, target, steps)
            end = lost(made, x, target)
            if not end < start:
                made.load_state_dict(before)
                end = start
        if not end <= tolerance:
            told = f"(tolerance={self.tolerance})"
            return f"it would miss {end:.1%} of its outputs' variance {told}"
        _log.info(
            "swap_convs: %s becomes %s: %d numbers of %d, missing %.1f %% of its outputs' variance "
            "(%.1f %% before training)", path or "the layer", swap.to,
            sum(p.numel() for p in made.parameters()), sum(p.numel() for p in old.parameters()),
            100 * end, 100 * start,
        )  # fmt: skip
        return made


@torch.no_grad()
def _sizes(model: nn.Module, trace: Trace) -> dict[str, Shape]:
    """The sizes of the images that convolutions read in the example, by path."""
    found: dict[str, Shape] = {}
    probe = clone(model).eval()
    for path, module in probe.named_modules():
        if type(module) in LAYERS:

            def look(_: nn.Module, given: tuple[Tensor, ...], path: str = path) -> None:
                found.setdefault(path, tuple(given[0].shape[2:]))

            module.register_forward_pre_hook(look)
    args, kwargs = trace.example_on(probe)
    probe(*args, **kwargs)
    return found
