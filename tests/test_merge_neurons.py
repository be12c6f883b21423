"""Merging of units: exact where units are copies, best by its definition, folded wherever read."""

import logging

import pytest
import torch
from nets import Net
from structures import STRUCTURES, conv, example, pooled
from torch import nn
from torch.nn import functional as F

import taut
from taut import edits
from taut.errors import RecipeError, TaskError
from taut.groups import Groups, readers
from taut.joining import Reading, least_squares, pairs
from taut.modules import clone, tensor_at
from taut.statistics import Statistics
from taut.techniques import MergeNeurons
from taut.trace import trace


def merged(net, x, **options):
    """The network after merging, with one batch as its data."""
    net = net.eval()
    statistics = Statistics(net, lambda m: float(m(x).float().square().mean()))
    return MergeNeurons(**options).reshape(net, trace(net, ((x[:2],), {})), statistics)


def many(shape):
    return example(shape) if shape == (2, 7) else torch.randn(24, *shape[1:])


@torch.no_grad()
def copy_units(net, group, factor=1.0):
    """Make the last quarter of a group's units copies of its first ones, in all that makes them.

    factor: on what a Linear or convolution makes; norms and gates get none.
    """
    read = {(r.name, r.dim) for r in readers_of(net, group)}
    count = group.units // 4
    for member in group.members:
        if (member.name, member.dim) in read:
            continue
        rows = tensor_at(net, member.name).data.movedim(member.dim, 0)
        first, last = (torch.from_numpy(member.places[s]) for s in (slice(count), slice(-count, None)))
        rows[last] = factor * rows[first]
    return count


def readers_of(net, group):
    groups = Groups(net, net.given)
    return readers(groups, groups[group.name])[0]


# ---- copies cost nothing --------------------------------------------------------------------

FOLDED = ["plain", "residual", "depthwise", "grouped", "shuffled halves", "dense", "excited",
          "up and down", "mlp", "attention", "joint attention", "encoder", "lstm", "bilstm", "gru",
          "rnn", "cells", "projected lstm"]  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_exact_copies_are_joined_without_a_trace(name):
    make, shape = STRUCTURES[name]
    net, x = make().eval(), many(shape)
    groups = Groups(net, ((x[:2],), {}))
    net.given = ((x[:2],), {})
    able = [g for g in groups.groups if not readers(groups, g)[1] and g.units >= 4]
    assert able
    before = sum(p.numel() for p in net.parameters())
    for group in able:
        copied = clone(net)
        copied.given = net.given
        count = copy_units(copied, group)
        with torch.no_grad():
            wanted = copied(x)
        for fit in ("pairs", "least_squares"):
            own = clone(copied)
            made = merged(own, x, ratio=count / group.units, fit=fit, only=only(groups, group))
            assert sum(p.numel() for p in made.parameters()) < before
            with torch.no_grad():
                torch.testing.assert_close(made(x), wanted, atol=2e-4, rtol=2e-3)


def only(groups, group):
    """A pattern for one group: nothing that other groups' rows go through."""
    makers = [m.name for m in group.members if m.trained and m.dim == 0]
    return ", ".join(makers) or group.members[0].name
