"""Units that cannot be seen: what nothing reads, and what reads nothing, leaves the network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.modules import owner, tensor_at
from taut.recoding import chain, core
from taut.trace import Feed, Trace


@torch.no_grad()
def drop_dead_units(model: nn.Module, trace: Trace) -> list[str]:
    """Unlink units that nothing reads, and fold away those that read nothing; says what it did.

    The answers stay the same: an output that meets only zeros cannot be seen, and one without
    inputs is a constant, which the reader's bias takes over (or which is zero). Weights whose forms
    cannot hold a zero stay as they are.
    """
    lines, found = [], [""]
    while found:  # a unit may be all that another one was read by
        found = [line for feed in trace.feeds for line in _drop_dead(model, trace, feed)]
        lines += found
    return lines


def _drop_dead(model: nn.Module, trace: Trace, feed: Feed) -> list[str]:
    before = tensor_at(model, feed.source) != 0
    after = tensor_at(model, feed.target) != 0
    rows = before.flatten(1)
    columns = after.transpose(0, 1).reshape(rows.shape[0], -1)
    lines = []
    unread = ~columns.any(1) & rows.any(1)
    if feed.only_reader and bool(unread.any()):
        where = torch.zeros_like(before)
        where[unread] = True
        if _clear(model, trace, feed.source, where):
            bias = feed.source.removesuffix("weight") + "bias"
            if any(v.name == bias for v in trace.vectors):
                _clear(model, trace, bias, unread)
            lines.append(f"{feed.source}: {int(unread.sum())} neurons that nothing reads dropped")
    mute = ~(tensor_at(model, feed.source) != 0).flatten(1).any(1) & columns.any(1)
    if bool(mute.any()):
        folded = _fold_constants(model, trace, feed, mute)
        if folded:
            lines.append(f"{feed.source}: {folded} neurons that read nothing folded away")
    return lines


def _fold_constants(model: nn.Module, trace: Trace, feed: Feed, mute: Tensor) -> int:
    """Fold the constants of the mute neurons into the reader's bias; returns how many went."""
    target, _ = owner(model, feed.target)
    inputs = _inputs_of(model, target, trace)  # [examples, channels, ...]
    if inputs is None or inputs.shape[1] != mute.numel() * feed.width:
        return 0
    held = tensor_at(model, feed.target).detach()
    constant = inputs.transpose(0, 1).reshape(inputs.shape[1], -1)
    steady = (constant == constant[:, :1]).all(1)
    value = constant[:, 0] * mute.repeat_interleave(feed.width)
    bias = getattr(target, "bias", None)
    linear = held.dim() == 2 and isinstance(bias, nn.Parameter)
    goes = (steady & ((value == 0) | linear)).reshape(-1, feed.width).all(1) & mute
    wide = goes.repeat_interleave(feed.width)
    where = torch.zeros_like(held, dtype=torch.bool)
    where[:, wide] = True
    if not bool(goes.any()) or not _clear(model, trace, feed.target, where):
        return 0
    if linear and isinstance(bias, nn.Parameter):
        bias.add_(held @ (value * wide).to(held.dtype))
    return int(goes.sum())


def _clear(model: nn.Module, trace: Trace, name: str, where: Tensor) -> bool:
    """Make entries of a weight zero, where its forms can hold that."""
    site = trace.site(name)
    links, trained = chain(model, site), core(model, site)
    if links is not None:
        return links.clear(trained, where)
    if trained.dim() < 2:  # a bias; what no technique was put on stays whole
        trained[where] = 0.0
    return trained.dim() < 2


def _inputs_of(model: nn.Module, module: nn.Module, trace: Trace) -> Tensor | None:
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    was_training = model.training
    try:
        args, kwargs = trace.example_on(model)
        model.eval()(*args, **kwargs)
    finally:
        hook.remove()
        model.train(was_training)
    return seen[0] if len(seen) == 1 and isinstance(seen[0], Tensor) else None
