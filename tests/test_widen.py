"""Wider layers that compute the same, in file and memory, and what cannot be widened."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taut
from taut import edits
from taut.errors import RecipeError
from taut.modules import clone
from taut.zoo import LeNet5, ResNet


def widened(model, x, text="widen(ratio=1.5, noise=0)"):
    torch.manual_seed(0)
    batch = (x, torch.randint(0, 4, x.shape[:1]))
    task = taut.Task(train=[batch], test=[batch])
    return taut.apply(clone(model.eval()), text, task).eval()


def small():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 25, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    for _ in range(3):
        model(torch.randn(16, 2, 5, 5))
    return model


def test_a_wider_network_computes_the_same():
    model, x = small(), torch.randn(3, 2, 5, 5)
    wide = widened(model, x)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), model.eval()(x), atol=1e-5, rtol=0)
    assert [tuple(p.shape) for n, p in wide.named_parameters() if n.endswith("weight")] == [
        (12, 2, 3, 3), (12,), (12, 1, 3, 3), (18, 300), (4, 18)
    ]  # fmt: skip
    assert wide[3].groups == 12
    assert wide[1].running_mean.shape == (12,)


def test_copies_are_told_apart_by_noise_alone():
    model, x = small(), torch.randn(3, 2, 5, 5)
    exact, noisy = (widened(model, x, f"widen(only='6, !0', noise={n})") for n in (0, 0.1))
    same = (exact[6].weight == noisy[6].weight).all(1)
    assert int(same.sum()) == 12  # the units that there were
    assert len(exact[6].weight.unique(dim=0)) == 12
    assert len(noisy[6].weight.unique(dim=0)) == 18
    moved = (exact[6].weight - noisy[6].weight)[~same].detach()
    assert float(moved.std() / exact[6].weight.detach().std()) == pytest.approx(0.1, rel=0.2)
    torch.testing.assert_close(exact[8].weight, noisy[8].weight)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_units_are_copied(kind, gates):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 7, 5)
    wide = widened(model, x, "widen(ratio=2, noise=0)")
    assert wide.rnn.weight_hh_l1.shape == (12 * gates, 12)
    assert wide.rnn.hidden_size == 12
    with torch.no_grad():
        torch.testing.assert_close(wide(x), model(x), atol=1e-5, rtol=0)


def test_it_is_stored_replayed_and_binarized(tmp_path):
    torch.manual_seed(0)
    model, x = LeNet5(), torch.rand(8, 1, 28, 28)
    wide = widened(model, x, "widen(round_to=16)")
    assert (wide.conv1.out_channels, wide.conv2.out_channels, wide.fc1.out_features) == (
        32,
        80,
        752,
    )
    path = tmp_path / "wide.taut"
    taut.pack(wide, path, "float32")
    loaded = taut.load(path, LeNet5())
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), wide(x))
    batch = (x, torch.arange(8))
    taut.apply(wide, "binarize()", taut.Task(train=[batch], test=[batch]))
    bits = taut.pack(wide, tmp_path / "bits.taut")
    assert bits < 4 * sum(p.numel() for p in model.parameters()) / 8
    with torch.no_grad():
        torch.testing.assert_close(
            taut.load(tmp_path / "bits.taut", LeNet5())(x), wide.eval()(x), atol=1e-2, rtol=1e-2
        )


def test_residual_widths_grow_together():
    torch.manual_seed(0)
    model, x = ResNet(8, in_channels=1), torch.randn(2, 1, 16, 16)
    model.train()(torch.randn(8, 1, 16, 16))
    wide = widened(model, x, "widen(ratio=1.5, noise=0, only='!fc')")
    with torch.no_grad():
        torch.testing.assert_close(wide(x), model.eval()(x), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in wide.parameters()) > 1.3 * sum(
        p.numel() for p in model.parameters()
    )


class Normed(nn.Module):
    """A layer norm over units, which counts copies."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)
        self.inner, self.last = nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(F.relu(self.inner(self.norm(self.first(x)))))


def test_what_would_change_the_function_stays_as_it_was(caplog):
    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(5, 6)
    with caplog.at_level(logging.WARNING, "taut"):
        wide = widened(model, x)
    assert "first.weight stays as it was: outputs would move by" in caplog.text
    assert (wide.first.out_features, wide.inner.out_features) == (10, 12)
    with pytest.raises(RecipeError, match=r"widen: no width of this network can change by 1\.5"):
        widened(model, x, "widen(only='first, norm')")


def test_a_network_is_widened_once():
    model, x = small(), torch.randn(3, 2, 5, 5)
    wide = widened(model, x)
    with pytest.raises(RecipeError, match="widened once"):
        widened(wide, x)
    assert len(edits.of(wide)) == 1


def test_bad_options():
    with pytest.raises(RecipeError, match="ratio"):
        taut.Recipe.parse("widen(ratio=2.5)")
    with pytest.raises(RecipeError, match="ratio"):
        taut.Recipe.parse("widen(ratio=0.9)")
