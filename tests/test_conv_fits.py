"""Numbers of swapped convolutions: what is there is found, least squares is least, steps help."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from taut import conv_fits
from taut.conv_fits import fit, leading, least_squares, lost, met, rows_of, separated, train
from taut.conv_swaps import BETWEEN, KINDS, Conv, Swap, stages

WIDTHS = {"separable": 1, "grouped": 2, "fire": 2, "stacked": 4, "asymmetric": 4, "parallel": 1}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n=16, channels=6, size=(9, 8), seed=0):
    """Images whose neighbours and channels are alike, as those of a network are."""
    x = normal(n, channels, *(s + 2 for s in size), seed=seed)
    for d in range(len(size)):
        x = x.unfold(2 + d, 3, 1).mean(-1)
    mix = normal(channels, channels, seed=seed + 1)
    return F.relu(torch.einsum("ij,nj...->ni...", mix, x))


def blank(to, layer, between="nothing"):
    swap = Swap(layer="", to=to, width=WIDTHS[to], between=between)
    return swap.made(layer).eval(), stages(to, Conv.of(layer), WIDTHS[to])


def fitted(to, layer, x, between="nothing"):
    made, row = blank(to, layer, between)
    weight, target = layer.weight.detach().double(), layer(x).detach()
    fit(made, row, Conv.of(layer), weight, x, target)
    return made, target


def planted(to, layer):
    """The layer, its weight one that such a swap gives exactly."""
    made, _ = blank(to, layer)
    for i, p in enumerate(made.parameters()):
        nn.init.zeros_(p) if p.dim() == 1 else p.data.copy_(normal(*p.shape, seed=9 + i))
    reach = [2 * k - 1 for k in layer.kernel_size]
    with torch.no_grad():
        for c in range(layer.in_channels):  # a single pixel shows the kernel, turned round
            pixel = torch.zeros(1, layer.in_channels, *reach)
            pixel[(0, c, *(k - 1 for k in layer.kernel_size))] = 1
            seen = made(pixel)[0]
            for d, (p, k) in enumerate(zip(layer.padding, layer.kernel_size, strict=True)):
                seen = seen.narrow(1 + d, p, k)
            layer.weight[:, c] = seen.flip(*range(1, seen.dim()))
    return layer


@pytest.mark.parametrize("to", [k for k in KINDS if k != "stacked"])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_swap_that_is_there_is_found(to, mode):
    layer = planted(to, nn.Conv2d(6, 8, 3, padding=1, padding_mode=mode))
    x = correlated()
    made, target = fitted(to, layer, x)
    assert lost(made, x, target) < 1e-6
    assert lost(made, correlated(seed=5), layer(correlated(seed=5)).detach()) < 1e-5


@pytest.mark.parametrize("to", [k for k in KINDS if k != "stacked"])
def test_in_one_and_three_dimensions_and_with_strides(to):
    if to not in ("asymmetric", "parallel"):
        line = planted(to, nn.Conv1d(6, 8, 5, padding=2))
        line.stride = (2,)
        x = correlated(size=(40,))
        assert lost(*_pair(to, line, x)) < 1e-6
    if to != "asymmetric":  # whose middle part sees what is left of the first alone
        solid = planted(to, nn.Conv3d(6, 8, 3, padding=1))
        solid.stride = (1, 2, 1)
        x = correlated(size=(5, 6, 7))
        assert lost(*_pair(to, solid, x)) < 1e-6


def _pair(to, layer, x):
    made, target = fitted(to, layer, x)
    return made, x, target


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("to", KINDS)
def test_nothing_in_the_last_part_would_do_better(to, between):
    layer = nn.Conv2d(6, 8, 5, padding=2)
    nn.init.normal_(layer.bias, 3.0)
    x = correlated()
    made, target = fitted(to, layer, x, between)
    last = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    last = last[-2:] if to in ("fire", "parallel") else last[-1:]
    loss = (made(x) - target).square().mean()
    slopes = torch.autograd.grad(loss, [p for m in last for p in m.parameters()])
    before = torch.autograd.grad((target - made(x)[..., :1]).square().mean(), last[0].weight)
    assert max(float(s.abs().max()) for s in slopes) < 1e-3 * float(before[0].abs().max())
    assert 0 < loss.item() < target.var().item()
    assert last[0].bias is not None


def test_with_a_bias_it_is_torchs_least_squares():
    part, x = Conv.of(nn.Conv2d(3, 5, 3, 2, padding=1)), normal(8, 3, 9, 9)
    target = normal(8, 5, 5, 5, seed=1)
    weight, bias = least_squares(part, x, target, True)
    rows = F.unfold(x, 3, stride=2, padding=1).mT.flatten(0, 1)
    ones = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
    wanted = torch.linalg.lstsq(ones, target.flatten(2).mT.flatten(0, 1).double()).solution.T
    torch.testing.assert_close(weight.flatten(1), wanted[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bias, wanted[:, -1], atol=1e-4, rtol=1e-4)


def test_rows_are_the_windows_at_the_places_asked_for():
    part = Conv.of(nn.Conv2d(3, 5, (3, 5), (2, 1), padding=(1, 4), dilation=(1, 2)))
    x = normal(4, 3, 9, 8)
    every = F.unfold(x, (3, 5), (1, 2), (1, 4), (2, 1)).mT.flatten(0, 1)
    places = torch.tensor([0, 7, len(every) - 1, 3])
    assert torch.equal(rows_of(part, x, places).flatten(1), every[places])


def moments_of(x, size):
    rows = F.unfold(x, size).mT.flatten(0, 1)
    return (rows.T @ rows).double() / len(rows)


def test_leading_filters_span_what_the_weight_uses():
    part = Conv.of(nn.Conv2d(6, 3, (1, 3)))
    true = normal(3, 6, 1, 3).double()
    rest = normal(8, 3, 3, 1, seed=1).double()
    weight = torch.einsum("orx,riy->oixy", rest[..., 0], true[:, :, 0])
    found = leading(weight, moments_of(correlated(), (1, 3)), part)
    joined = torch.cat([found.flatten(1), true.flatten(1)])
    assert torch.linalg.matrix_rank(joined, rtol=1e-6) == 3
    moments = moments_of(correlated(), (1, 3))
    seen = found.flatten(1) @ moments @ found.flatten(1).T
    torch.testing.assert_close(seen, torch.eye(3).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("times", [1, 2])
def test_by_turns_the_filters_of_channels_get_better(times):
    weight, moments = normal(16, 6, 3, 3).double(), moments_of(correlated(), 3)
    part = Conv.of(nn.Conv2d(6, 6 * times, 3, groups=6))
    errors = []
    for rounds in (0, 1, 2, 10):
        filters = separated(weight, moments, part, rounds)
        basis = torch.zeros(6 * times, 6, 9).double()
        for j in range(6 * times):
            basis[j, j // times] = filters[j].flatten()
        basis, matrix = basis.flatten(1), weight.flatten(1)
        gram = basis @ moments @ basis.T
        mix = torch.linalg.solve(gram, basis @ moments @ matrix.T).T
        missed = matrix - mix @ basis
        errors.append(float((missed @ moments * missed).sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]


def test_training_on_the_pairs_misses_less_and_is_always_the_same():
    layer, x = nn.Conv2d(6, 8, 5, padding=2), correlated(64)
    states = []
    for _ in range(2):
        made, target = fitted("stacked", layer, x, "norm")
        before = lost(made, x, target)
        torch.rand(3)  # what others draw does not matter
        train(made, x, target, 60)
        assert lost(made, x, target) < 0.9 * before
        states.append(made.state_dict())
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    norm = made[1]
    seen = made[0](x)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)), atol=1e-2, rtol=1e-2)
    assert norm.momentum == 0.1
    assert not made.training


def test_where_there_are_too_many_windows_some_are_looked_at(monkeypatch):
    layer, x = nn.Conv2d(6, 8, 3, padding=1), correlated(40)
    whole, target = fitted("grouped", layer, x)
    monkeypatch.setattr(conv_fits, "_MOST", 54 * 1000)
    some, _ = fitted("grouped", layer, x)
    assert not torch.equal(whole[0].weight, some[0].weight)
    assert lost(whole, x, target) < lost(some, x, target) < 1.2 * lost(whole, x, target)


def test_inputs_that_are_always_zero_do_no_harm():
    layer, x = nn.Conv2d(6, 8, 3, padding=1), correlated()
    x[:, 2:4] = 0
    for to in KINDS:
        if to != "stacked":
            made, target = fitted(to, layer, x, "norm")
            assert all(p.isfinite().all() for p in made.parameters())
            assert lost(made, x, target) < 1


def test_what_a_layer_meets():
    layer = nn.Conv2d(6, 8, 3)
    layer.register_forward_hook(lambda m, given, out: out + 100)
    x = correlated(12)

    def run():
        for part in x.split(4):
            layer(part)

    read, gave = met(run, layer)
    assert torch.equal(read, x)
    torch.testing.assert_close(gave, F.conv2d(x, layer.weight, layer.bias))
    assert len(met(run, layer, most=10)[0]) == 4
    assert len(layer._forward_hooks) == 1

    def odd():
        layer(x)
        layer(x[..., 1:])

    assert not met(odd, layer)[0].numel()
    assert not met(lambda: None, layer)[0].numel()


def test_a_share_of_the_variance():
    x = normal(200, 3, 4, 4)
    assert lost(nn.Identity(), x, x) == 0
    assert lost(nn.Identity(), x, x + 1) == pytest.approx(1, abs=0.05)
    nothing = nn.Conv2d(3, 3, 1)
    nn.init.zeros_(nothing.weight)
    nn.init.constant_(nothing.bias, 7)
    assert lost(nothing, x, x + 7) == pytest.approx(1, abs=0.01)
