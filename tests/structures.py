"""Networks of every structure in miniature: what is cut together in them differs."""

from collections.abc import Callable

import torch
from nets import Net, weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

IMAGE, VECTOR, SEQUENCE, WORDS = (2, 3, 8, 8), (2, 6), (2, 5, 6), (2, 7)


def conv(ins: int, outs: int, size: int = 3, **how: int) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, size, padding=size // 2, **how)


def pooled(net: Net, x: Tensor) -> Tensor:
    return net.out(x.mean((2, 3)))


def plain() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 12), nn.BatchNorm2d(12),
        nn.PReLU(12), nn.Flatten(), nn.Linear(12 * 16, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip


def residual() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.norm(net.stem(x)))
        x = F.relu(x + net.b(F.relu(net.a(x))))
        x = F.relu(net.side(x) + net.d(F.relu(net.c(x))))
        return pooled(net, x)

    return Net(
        run, stem=conv(3, 8), norm=nn.BatchNorm2d(8), a=conv(8, 6), b=conv(6, 8), c=conv(8, 10),
        d=conv(10, 12), side=conv(8, 12, 1), out=nn.Linear(12, 4),
    )  # fmt: skip


def padded_shortcut() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + net.a(x))
        return pooled(net, x)

    return Net(run, stem=conv(3, 8), a=conv(8, 12, stride=2), out=nn.Linear(12, 4))


def depthwise() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu6(net.stem(x))
        x = F.relu6(net.norm(net.deep(x)))
        return pooled(net, F.relu6(net.point(net.twice(x))))

    return Net(
        run, stem=conv(3, 8), deep=conv(8, 8, groups=8), norm=nn.BatchNorm2d(8),
        twice=conv(8, 16, groups=8), point=conv(16, 12, 1), out=nn.Linear(12, 4),
    )  # fmt: skip


def grouped() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(F.relu(net.stem(x))))
        return pooled(net, net.norm(net.b(x)))

    return Net(
        run, stem=conv(3, 8), a=conv(8, 12, groups=2), b=conv(12, 16, groups=4),
        norm=nn.InstanceNorm2d(16, affine=True), out=nn.Linear(16, 4),
    )  # fmt: skip


def group_norm() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        return pooled(net, net.b(F.silu(net.norm(net.a(x)))))

    return Net(run, a=conv(3, 8), norm=nn.GroupNorm(4, 8), b=conv(8, 8), out=nn.Linear(8, 4))


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def shuffled_groups() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = shuffle(F.relu(net.a(F.relu(net.stem(x)))), 2)
        return pooled(net, net.b(net.deep(x)))

    return Net(
        run, stem=conv(3, 16), a=conv(16, 16, 1, groups=2), deep=conv(16, 16, groups=16),
        b=conv(16, 16, 1, groups=2), out=nn.Linear(16, 4),
    )  # fmt: skip


def shuffled_halves() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        left, right = net.stem(x).chunk(2, dim=1)
        right = F.relu(net.b(F.relu(net.a(right))))
        return pooled(net, net.c(shuffle(torch.cat((left, right), 1), 2)))

    return Net(
        run, stem=conv(3, 16), a=conv(8, 6), b=conv(6, 8), c=conv(16, 8), out=nn.Linear(8, 4)
    )


def dense() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        for part in (net.a, net.b, net.c):
            x = torch.cat([x, part(x)], 1)
        return pooled(net, net.last(x))

    def part(ins: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(ins), nn.ReLU(), conv(ins, 4))

    return Net(run, a=part(3), b=part(7), c=part(11), last=nn.BatchNorm2d(15), out=nn.Linear(15, 4))


def excited() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        gate = net.more(F.relu(net.less(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return pooled(net, x * gate)

    return Net(run, a=conv(3, 8), less=conv(8, 4, 1), more=conv(4, 8, 1), out=nn.Linear(8, 4))


def up_and_down() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        top = F.relu(net.a(x))
        low = F.relu(net.b(top))
        up = F.pixel_shuffle(net.c(torch.cat([top, net.up(low)], 1)), 2)
        return net.out(up)

    return Net(
        run, a=conv(3, 6), b=conv(6, 8, stride=2), up=nn.ConvTranspose2d(8, 6, 2, 2),
        c=conv(12, 16), out=conv(4, 3),
    )  # fmt: skip


def normed() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.b(F.glu(net.a(x), 1).mean(2))

    return Net(run, a=parametrizations.weight_norm(nn.Conv1d(5, 16, 3)), b=nn.Linear(8, 4))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)
    )


class Attention(nn.Module):
    """Written by hand: its heads are numbers that it holds."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            part(x).view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = torch.softmax(q @ k.transpose(-2, -1) / self.head_dim**0.5, -1) @ v
        mixed = mixed.transpose(1, 2).reshape(n, t, self.num_heads * self.head_dim)
        return self.out(mixed)


class JointAttention(nn.Module):
    """One matrix for queries, keys and values; a rotation, an einsum and one width for all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.head_dim = width, width // heads
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (
            part.view(n, t, -1, self.head_dim) for part in self.joint(x).split(self.width, dim=-1)
        )
        mixed = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", mixed, v).reshape(n, t, self.width))


def transformer(attention: Callable[[int, int], nn.Module]) -> nn.Module:
    def run(net: Net, words: Tensor) -> Tensor:
        x = net.embedding(words) + net.place
        x = x + net.attention(net.first(x))
        x = x + net.down(F.gelu(net.up(net.second(x))))
        return F.linear(net.last(x), net.embedding.weight)

    return Net(
        run, embedding=nn.Embedding(20, 16), place=weight(7, 16), attention=attention(16, 4),
        first=nn.LayerNorm(16), second=nn.LayerNorm(16), last=nn.RMSNorm(16), up=nn.Linear(16, 24),
        down=nn.Linear(24, 16),
    )  # fmt: skip


def encoder() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.out(net.layer(net.into(x))[:, 0])

    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return Net(run, into=nn.Linear(6, 16), layer=layer, out=nn.Linear(16, 4))


def recurrent(layer: nn.RNNBase, width: int) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        return net.out(net.layer(net.into(x))[0])

    return Net(run, into=nn.Linear(6, 8), layer=layer, out=nn.Linear(width, 4))


def speaker() -> nn.Module:
    def run(net: Net, words: Tensor) -> Tensor:
        return F.linear(net.layer(net.words(words))[0], net.words.weight)

    return Net(run, words=nn.Embedding(20, 8), layer=nn.LSTM(8, 8, batch_first=True))


def stepped() -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), net.hidden)
        for step in x.unbind(1):
            hidden = net.cell(step, hidden)
        return net.out(hidden)

    net = Net(run, cell=nn.GRUCell(6, 8), out=nn.Linear(8, 4))
    net.hidden = 8
    return net


BATCH_FIRST = {"batch_first": True}
STRUCTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (plain, IMAGE),
    "residual": (residual, IMAGE),
    "padded shortcut": (padded_shortcut, IMAGE),
    "depthwise": (depthwise, IMAGE),
    "grouped": (grouped, IMAGE),
    "group norm": (group_norm, IMAGE),
    "shuffled groups": (shuffled_groups, IMAGE),
    "shuffled halves": (shuffled_halves, IMAGE),
    "dense": (dense, IMAGE),
    "excited": (excited, IMAGE),
    "up and down": (up_and_down, IMAGE),
    "weight norm": (normed, (2, 5, 9)),
    "mlp": (mlp, VECTOR),
    "attention": (lambda: transformer(Attention), WORDS),
    "joint attention": (lambda: transformer(JointAttention), WORDS),
    "encoder": (encoder, SEQUENCE),
    "lstm": (lambda: recurrent(nn.LSTM(8, 8, 2, **BATCH_FIRST), 8), SEQUENCE),
    "bilstm": (
        lambda: recurrent(nn.LSTM(8, 8, 2, bidirectional=True, **BATCH_FIRST), 16),
        SEQUENCE,
    ),
    "projected lstm": (
        lambda: recurrent(nn.LSTM(8, 8, 2, proj_size=6, **BATCH_FIRST), 6),
        SEQUENCE,
    ),
    "gru": (lambda: recurrent(nn.GRU(8, 8, 2, **BATCH_FIRST), 8), SEQUENCE),
    "rnn": (lambda: recurrent(nn.RNN(8, 8, 2, **BATCH_FIRST), 8), SEQUENCE),
    "cells": (stepped, SEQUENCE),
    "tied words": (speaker, WORDS),
}


def example(shape: tuple[int, ...]) -> Tensor:
    """An input: words where it is for an embedding, else normal numbers."""
    return torch.randint(0, 20, shape) if shape == WORDS else torch.randn(shape)
