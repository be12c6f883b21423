"""Shortcuts around layers: where they fit, what they compute, stored and read back."""

import pytest
import torch
from torch import nn

import taut
from taut import edits
from taut.container import encode
from taut.errors import FormatError, RecipeError
from taut.modules import clone
from taut.pack import load, pack
from taut.packed import Plain


def net():
    """Two convolutions that keep their shape, the second without a norm, and one that does not."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Hardtanh(),
        nn.Conv2d(4, 4, 3, padding=1), nn.Hardtanh(),
        nn.Conv2d(4, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 3),
    ).eval()  # fmt: skip


X = torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(1))
TASK = taut.Task(train=[(X, torch.arange(6) % 3)], test=[(X, torch.arange(6) % 3)])


def test_what_is_read_is_added_behind_the_norm():
    plain, model = net(), taut.apply(net(), "add_shortcuts()", TASK)
    assert [(e.layer, e.end) for e in edits.of(model)] == [("0", "1"), ("3", "3")]
    y = plain[2](plain[1](plain[0](X)) + X)
    y = plain[5:](plain[4](plain[3](y) + y))
    torch.testing.assert_close(model(X), y)


def test_only_some():
    model = taut.apply(net(), "add_shortcuts(only='3')", TASK)
    assert [e.layer for e in edits.of(model)] == ["3"]


def test_it_is_stored_and_replayed_and_copied(tmp_path):
    recipe = "add_shortcuts() > binarize(activations='pair', ends=True) > recover(epochs=1)"
    result = taut.compress(net(), TASK, recipe, folder=tmp_path / "run")
    loaded = load(result.folder / "net.taut", net())
    torch.testing.assert_close(loaded(X), result.model(X))
    pack(loaded, tmp_path / "again.taut")
    assert (tmp_path / "again.taut").read_bytes() == (result.folder / "net.taut").read_bytes()
    copied = clone(loaded)
    assert torch.equal(copied(X), loaded(X))


def test_without_a_layer_that_fits_it_is_refused():
    told = r"add_shortcuts: no layer of only='7' gives the shape that it reads; .*: 0, 3"
    with pytest.raises(RecipeError, match=told):
        taut.apply(net(), "add_shortcuts(only='7')", TASK)


def test_a_hostile_shortcut_is_refused(tmp_path):
    state = {(n,): Plain.of(t) for n, t in net().state_dict().items()}
    path = tmp_path / "bad.taut"
    path.write_bytes(encode(state, [["shortcut", {"layer": "0", "end": "2"}]]))
    with pytest.raises(FormatError, match="shortcut: '2' is no Linear, Conv or norm layer"):
        load(path, net())
