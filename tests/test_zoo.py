"""The zoo: the counts of the papers, what the nets compute, and that they trace, train and pack."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import taut
from taut.data import Batches
from taut.modules import clone
from taut.zoo import LstmLanguageModel, ResNet, TransformerLanguageModel


def parameters(net):
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_resnets_have_the_papers_parameters(depth, count):
    assert parameters(ResNet(depth)) == count


def test_resnet_takes_other_channels_classes_and_strides():
    net = ResNet(8, in_channels=1, classes=7, stride=2).eval()
    assert parameters(net) == parameters(ResNet(8)) - 2 * 9 * 16 - 3 * 65
    for size, inner in ((28, 14), (32, 16)):
        assert net.conv(torch.rand(1, 1, size, size)).shape[2:] == (inner, inner)
        assert net(torch.rand(3, 1, size, size)).shape == (3, 7)


def test_resnet_work_is_the_papers_41_million_macs():
    full = taut.trace(ResNet(20), ((torch.zeros(2, 3, 32, 32),), {}))
    assert (
        full.macs
        == 40_551_040
        == 9
        * (
            32**2 * (3 * 16 + 6 * 16**2)
            + 16**2 * (16 * 32 + 5 * 32**2)
            + 8**2 * (32 * 64 + 5 * 64**2)
        )
        + 64 * 10
    )
    assert len(full.sites) == 20
    small = taut.trace(ResNet(20, 1, stride=2), ((torch.zeros(2, 1, 28, 28),), {}))
    assert small.macs < full.macs / 4


def test_a_growing_block_adds_zeros_and_skips_pixels():
    block = ResNet(8).eval().blocks[1]
    nn.init.zeros_(block.conv2.weight)  # what is left is the shortcut
    x = torch.rand(2, 16, 6, 6)
    got = block(x)
    assert torch.equal(got[:, 8:24], x[:, :, ::2, ::2])
    assert not got[:, :8].any()
    assert not got[:, 24:].any()


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_resnet_refuses_other_depths(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2, .* got {depth}"):
        ResNet(depth)


def lstm():
    return LstmLanguageModel(30, embedding=16, hidden=24, layers=2, dropout=0.1)


def transformer(tied=False):
    return TransformerLanguageModel(30, width=16, heads=2, layers=2, context=12, tied=tied)


def tied_transformer():
    return transformer(tied=True)


LANGUAGE = [lstm, transformer, tied_transformer]


def test_language_models_have_these_parameters():
    assert parameters(LstmLanguageModel(64)) == 350_272
    assert parameters(lstm()) == 30 * 41 + 4 * 24 * (16 + 24 + 2) + 4 * 24 * (24 + 24 + 2)
    blocks = 2 * (12 * 16**2 + 13 * 16) + 2 * 16 + 12 * 16
    assert parameters(transformer()) == 2 * 30 * 16 + 30 + blocks
    assert parameters(tied_transformer()) == 30 * 16 + blocks


@pytest.mark.parametrize("build", LANGUAGE)
def test_language_models_give_cross_entropy_its_classes(build):
    net, tokens = build(), torch.randint(30, (3, 12))
    output = net(tokens)
    assert output.shape == (3, 30, 12)
    assert F.cross_entropy(output, tokens).shape == ()


@pytest.mark.parametrize("build", LANGUAGE)
def test_no_step_sees_a_later_one(build):
    net, tokens = build().eval(), torch.randint(30, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 30
    before, after = net(tokens), net(changed)
    torch.testing.assert_close(before[:, :, :7], after[:, :, :7])
    assert not torch.allclose(before[:, :, 7:], after[:, :, 7:])
    assert not torch.allclose(net(tokens[:, :1])[:, :, 0], net(changed[:, 8:9])[:, :, 0])


def test_an_lstm_model_is_its_parts():
    net, tokens = lstm().eval(), torch.randint(30, (2, 5))
    states, _ = net.lstm(net.embedding.weight[tokens])
    wanted = states @ net.head.weight.T + net.head.bias
    torch.testing.assert_close(net(tokens), wanted.permute(0, 2, 1))


def test_a_transformer_block_is_its_formula():
    """Attention written out, one head after another."""
    block = transformer().eval().blocks[0]
    x = torch.randn(2, 5, 16)
    h = F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias)
    q, k, v = (h @ block.attention.in_proj_weight.T + block.attention.in_proj_bias).split(16, 2)
    heads = []
    for one in (slice(0, 8), slice(8, 16)):
        logits = q[..., one] @ k[..., one].transpose(1, 2) / 8**0.5
        logits[:, ~torch.ones(5, 5, dtype=torch.bool).tril()] = -torch.inf
        heads.append(logits.softmax(2) @ v[..., one])
    y = x + block.attention.out_proj(torch.cat(heads, 2))
    h = F.layer_norm(y, (16,), block.norm2.weight, block.norm2.bias)
    torch.testing.assert_close(block(x), y + block.fc2(F.gelu(block.fc1(h))))


def test_transformers_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="got width=16 and heads=3"):
        TransformerLanguageModel(30, width=16, heads=3)
    with pytest.raises(ValueError, match="at most 12 steps, got 13"):
        transformer()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize(
    ("build", "sites"),
    [(lstm, 6), (transformer, 2 + 2 * 4), (tied_transformer, 1 + 2 * 4)],
)
def test_language_models_train_and_compress(build, sites, tmp_path):
    tokens = (torch.arange(12) * 7 + torch.arange(40)[:, None]) % 30  # each token tells the next
    data = Batches(tokens[:, :-1], tokens[:, 1:], 8, shuffle=True)
    task = taut.Task(train=data, test=data, learning_rate=1e-2)
    net = build()
    assert len(taut.trace(net, task.example()).sites) == sites
    taut.recover(net, task, taut.Recover(epochs=20, learning_rate=1e-2))
    assert task.evaluate(net) > 0.9
    taut.apply(net, "prune_weights(sparsity=0.3, scope='layer') > recover", task)
    taut.recover(net, task, taut.Recover(epochs=2))
    size = taut.pack(net, tmp_path / "net.taut")
    assert size < 4 * parameters(net) * 0.7
    loaded = taut.load(tmp_path / "net.taut", build())
    assert task.evaluate(loaded) == pytest.approx(task.evaluate(clone(net)), abs=0.02)
