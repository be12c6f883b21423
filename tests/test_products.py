"""Products: whatever the layer, its inputs are those that its own arithmetic meets."""

import math

import pytest
import torch
from nets import Net, weight
from torch import nn
from torch.nn import functional as F

from taut.modules import clone
from taut.products import products
from taut.testing import _First

X = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))


def seen(net, *args, of="a.weight", diagonal=False):
    return products(lambda: net(*args), net.get_parameter(of), diagonal)


def moments(rows):
    rows = rows.reshape(-1, rows.shape[-1]).double()
    return rows.T @ rows


def own_matrix(product, held):
    """The matrix that the product says the weight is multiplied as."""
    return held.detach().flatten()[product.index]


def test_a_linear_layer_is_one_product():
    net = Net(lambda n, x: n.a(x), a=nn.Linear(12, 5))
    (found,) = seen(net, X.reshape(7, 1, 12))
    assert torch.equal(own_matrix(found, net.a.weight), net.a.weight)
    torch.testing.assert_close(found.moments, moments(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sums, X.double().sum(0), rtol=1e-5, atol=1e-5)
    assert found.rows == 7


def test_several_batches_add_up():
    net = Net(lambda n, x: n.a(x), a=nn.Linear(12, 5))
    whole = seen(net, X)[0]
    parts = products(lambda: [net(x) for x in X.split(3)], net.a.weight)
    assert len(parts) == 1
    torch.testing.assert_close(parts[0].moments, whole.moments, rtol=1e-5, atol=1e-5)
    assert parts[0].rows == 7


@pytest.mark.parametrize(
    "run",
    [
        lambda w, x: x @ w,
        lambda w, x: (w.T @ x.T).T,
        lambda w, x: torch.einsum("bi,io->bo", x, w),
        lambda w, x: F.linear(x, w.T.contiguous()),
        lambda w, x: torch.stack([w.T @ row for row in x]),
        lambda w, x: x.double() @ w.double(),
        lambda w, x: torch.bmm(x[None].expand(3, -1, -1) / math.sqrt(3), w.expand(3, -1, -1)),
    ],
)
def test_layers_written_by_hand_are_seen(run):
    net = Net(lambda n, x: run(n.w, x), w=weight(12, 5))
    (found,) = seen(net, X, of="w")
    assert torch.equal(own_matrix(found, net.w), net.w.T)
    torch.testing.assert_close(found.moments, moments(X), rtol=1e-5, atol=1e-5)


def test_a_batch_of_matrices_is_a_product_each():
    net = Net(lambda n, x: torch.bmm(x, n.w), w=weight(3, 4, 2))
    x = torch.randn(3, 6, 4)
    found = seen(net, x, of="w")
    assert len(found) == 3
    for i, product in enumerate(found):
        assert torch.equal(own_matrix(product, net.w), net.w[i].T)
        torch.testing.assert_close(product.moments, moments(x[i]), rtol=1e-5, atol=1e-5)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 9, 8)),
    "3d": (nn.Conv3d(2, 4, 2, padding=1), (2, 2, 3, 4, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (3, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 5, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
                   (2, 4, 4, 5)),
    "transposed groups": (nn.ConvTranspose1d(4, 6, 3, stride=3, groups=2, dilation=2), (2, 4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_meets_its_windows(kind):
    layer, shape = CONVOLUTIONS[kind]
    x = torch.randn(shape)
    bare = type(layer)(**{**_options(layer), "bias": False})
    net = Net(lambda n, x: n.a(x), a=bare)
    found = seen(net, x)
    assert len(found) == layer.groups
    assert sum(p.index.numel() for p in found) == bare.weight.numel()
    total = net(x).detach().double().square().sum()  # Σ |W x|² = Σ over o of W[o] H W[o]ᵀ
    by_moments = sum(
        (own_matrix(p, bare.weight).double() @ p.moments * own_matrix(p, bare.weight)).sum()
        for p in found
    )
    torch.testing.assert_close(by_moments, total, rtol=1e-5, atol=0)


def _options(layer):
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    options = {n: getattr(layer, n) for n in names.split()}
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        options["output_padding"] = layer.output_padding
    return options


@pytest.mark.parametrize("layer", [nn.Embedding(9, 4), nn.EmbeddingBag(9, 4, mode="sum")])
def test_an_embedding_meets_tokens(layer):
    net = Net(lambda n, x: n.a(x), a=layer)
    (found,) = seen(net, torch.tensor([[1, 1, 3], [8, 1, 0]]))
    assert found.moments.tolist() == [1, 3, 0, 1, 0, 0, 0, 0, 1]
    assert torch.equal(own_matrix(found, layer.weight), layer.weight.T)
    assert found.rows == 6


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_recurrent_weight_meets_the_states_step_by_step(cls, batch_first):
    layer = cls(3, 4, num_layers=2, bidirectional=True, batch_first=batch_first)
    net = Net(lambda n, x: n.a(x), a=layer)
    x = torch.randn(2, 5, 3) if batch_first else torch.randn(5, 2, 3)
    (found,) = seen(net, x, of="a.weight_ih_l0")
    torch.testing.assert_close(found.moments, moments(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(own_matrix(found, layer.weight_ih_l0), layer.weight_ih_l0)
    states = layer(x)[0].detach()
    states = states if not batch_first else states.transpose(0, 1)
    (found,) = seen(net, x, of="a.weight_hh_l1")  # forwards: all states but the last, and zero
    torch.testing.assert_close(found.moments, moments(states[:-1, :, :4]), rtol=1e-4, atol=1e-5)
    (found,) = seen(net, x, of="a.weight_hh_l1_reverse")
    torch.testing.assert_close(found.moments, moments(states[1:, :, 4:]), rtol=1e-4, atol=1e-5)
    assert found.rows == 10


def test_attention_by_itself_is_one_product_and_across_is_three():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    net = Net(lambda n, q, k: n.a(q, k, k, need_weights=False)[0], a=layer)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 6, 8)
    (found,) = seen(_First(layer), x, of="layer.in_proj_weight")
    torch.testing.assert_close(found.moments, moments(x), rtol=1e-5, atol=1e-5)
    found = sorted(seen(net, x, y, of="a.in_proj_weight"), key=lambda p: int(p.index[0, 0]))
    met = (x, y) if len(found) == 2 else (x, y, y)  # keys and values may be projected as one
    assert torch.equal(torch.cat([p.index for p in found]), torch.arange(192).reshape(24, 8))
    for product, rows in zip(found, met, strict=True):
        torch.testing.assert_close(product.moments, moments(rows), rtol=1e-5, atol=1e-5)
    (found,) = seen(net, x, y, of="a.out_proj.weight")
    out = net(x, y).detach()
    product = own_matrix(found, layer.out_proj.weight).double()
    total = (out - layer.out_proj.bias).double().square().sum()
    torch.testing.assert_close((product @ found.moments * product).sum(), total, rtol=1e-4, atol=0)


def test_a_transformer_layer_hides_nothing():
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():  # PyTorch would run it as one operation
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear2.weight"):
            assert len(seen(net, x, of=name)) == 1
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_tied_weight_is_met_in_both_ways():
    net = Net(lambda n, x: n.b(n.a(x)), a=nn.Embedding(9, 4), b=nn.Linear(4, 9, bias=False))
    net.b.weight = net.a.weight
    rows, matrix = sorted(seen(net, torch.tensor([[1, 2]])), key=lambda p: p.moments.dim())
    assert rows.moments.tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0]
    met = net.a.weight[[1, 2]].detach()
    torch.testing.assert_close(matrix.moments, moments(met), rtol=1e-5, atol=1e-5)


def test_the_same_weight_twice_adds_up():
    net = Net(lambda n, x: n.a(n.a(x).relu()), a=nn.Linear(12, 12))
    (found,) = seen(net, X)
    wanted = moments(X) + moments(net.a(X).relu().detach())
    torch.testing.assert_close(found.moments, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_wide_is_cut_into_blocks(monkeypatch):
    monkeypatch.setattr("taut.products.WIDEST", 5)
    net = Net(lambda n, x: n.a(x), a=nn.Linear(12, 3))
    found = seen(net, X)
    assert [p.index.shape[1] for p in found] == [5, 5, 2]
    assert torch.equal(torch.cat([p.index for p in found], 1), torch.arange(36).reshape(3, 12))
    torch.testing.assert_close(found[1].moments, moments(X[:, 5:10]), rtol=1e-5, atol=1e-5)


def test_the_diagonal_alone():
    net = Net(lambda n, x: n.a(x), a=nn.Conv2d(2, 3, 3))
    x = torch.randn(2, 2, 5, 5)
    (whole,) = seen(net, x)
    (alone,) = seen(net, x, diagonal=True)
    torch.testing.assert_close(alone.moments, whole.moments.diagonal(), rtol=1e-5, atol=1e-5)
    assert torch.equal(alone.squares, alone.moments)


def test_weights_that_are_computed_with_first_are_not_seen():
    net = Net(lambda n, x: x @ (2 * n.w), w=weight(12, 5))
    assert seen(net, X, of="w") == []


def test_the_settings_come_back_after_an_error():
    def fail():
        raise ValueError("no forward")

    with pytest.raises(ValueError, match="no forward"):
        products(fail, weight(2, 2))
    assert torch.backends.mkldnn.enabled
    assert torch.backends.mha.get_fastpath_enabled()


def windows_of(x):
    return F.unfold(x, 3).transpose(1, 2)


@pytest.mark.parametrize(
    ("layer", "x", "rows"),
    [
        (nn.Linear(12, 5), X, lambda x: x),
        (nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 6), windows_of),
    ],
)
def test_how_far_inputs_drifted_from_those_of_the_network_as_it_was(layer, x, rows):
    torch.manual_seed(0)
    before, moved = x, x + 0.1 * torch.randn_like(x)
    after = clone(layer)

    def both():
        for was, now in zip(before.split(2), moved.split(2), strict=True):
            layer(was), after(now)

    (found,) = products(both, after.weight, before=layer.weight)
    old, new = (rows(v).reshape(-1, found.index.shape[1]).double() for v in (before, moved))
    torch.testing.assert_close(found.moments, new.T @ new, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.drift, (old - new).T @ new, rtol=1e-4, atol=1e-4)


def test_where_the_network_before_met_other_shapes_no_drift_is_told():
    first, second = nn.Linear(12, 5), nn.Linear(12, 5)
    (found,) = products(lambda: (first(X[:3]), second(X)), second.weight, before=first.weight)
    assert found.drift is None
    (alone,) = products(lambda: second(X), second.weight)
    assert alone.drift is None
