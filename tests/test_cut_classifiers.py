"""The cut on what image classifiers are made of: windows, scales of layers, gates, branches."""

import pytest
import torch
from nets import Net
from structures import conv, pooled
from test_cut import halves, numbers
from torch import Tensor, nn
from torch.nn import functional as F

from taut.groups import Groups, cut
from taut.modules import clone
from taut.pack import load, pack

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Windows(nn.Module):
    """Attention within windows of 4 × 4, with a learned bias for each head and relative place."""

    def __init__(self, width: int, heads: int, side: int = 4, shift: int = 0) -> None:
        super().__init__()
        self.width, self.heads, self.side, self.shift = width, heads, side, shift
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        apart = (at[:, None] - at[None]) + side - 1
        self.register_buffer("apart", apart[..., 0] * (2 * side - 1) + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:  # [n, height, width, channels]
        n, h, w, _ = x.shape
        s = self.side
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.view(n, h // s, s, w // s, s, self.width).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, s * s, self.width)
        q, k, v = (
            t.reshape(len(x), s * s, self.heads, -1).transpose(1, 2)
            for t in self.joint(x).chunk(3, -1)
        )
        bias = self.bias[self.apart.view(-1)].view(s * s, s * s, self.heads).permute(2, 0, 1)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(len(x), s * s, -1))
        y = y.view(n, h // s, w // s, s, s, self.width).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(n, h, w, self.width)
        return torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y


def windows() -> nn.Module:
    """Two blocks, the second one shifted, and patches that are merged in fours."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x).permute(0, 2, 3, 1)
        x = x + net.a(net.norm1(x))
        x = x + net.b(net.norm2(x))
        x = x + net.fc2(F.gelu(net.fc1(net.norm3(x))))
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return net.out(net.less(x).mean((1, 2)))

    norms = {f"norm{i}": nn.LayerNorm(16) for i in (1, 2, 3)}
    return Net(
        run, stem=conv(3, 16), a=Windows(16, 4), b=Windows(16, 4, shift=2), **norms,
        fc1=nn.Linear(16, 24), fc2=nn.Linear(24, 16), less=nn.Linear(64, 20, bias=False),
        out=nn.Linear(20, 4),
    )  # fmt: skip


def scaled_layers() -> nn.Module:
    """A depthwise 7 × 7, a norm over channels that stand last, and a scale for each channel."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.norm(net.deep(x).permute(0, 2, 3, 1))
        y = net.fc2(F.gelu(net.fc1(y))).permute(0, 3, 1, 2)
        return pooled(net, x + net.scale * y)

    return Net(
        run, stem=conv(3, 12), deep=conv(12, 12, 7, groups=12), norm=nn.LayerNorm(12),
        fc1=nn.Linear(12, 48), fc2=nn.Linear(48, 12), out=nn.Linear(12, 4),
        scale=nn.Parameter(torch.full((12, 1, 1), 0.5)),
    )  # fmt: skip


def inverted() -> nn.Module:
    """Wide inside, narrow between: expand, depthwise, squeeze and excite, project, add."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = F.silu(net.norm2(net.deep(F.silu(net.norm1(net.wide(x))))))
        gate = net.more(F.silu(net.less(y.mean((2, 3), keepdim=True)))).sigmoid()
        return pooled(net, x + net.drop(net.norm3(net.project(y * gate))))

    return Net(
        run, stem=conv(3, 8), wide=conv(8, 32, 1), norm1=nn.BatchNorm2d(32),
        deep=conv(32, 32, 5, groups=32), norm2=nn.BatchNorm2d(32), less=conv(32, 4, 1),
        more=conv(4, 32, 1), project=conv(32, 8, 1), norm3=nn.BatchNorm2d(8),
        drop=nn.Dropout2d(0.1), out=nn.Linear(8, 4),
    )  # fmt: skip


def grouped_and_gated() -> nn.Module:
    """A bottleneck whose 3 × 3 comes in groups of four channels, with a gate and a new shortcut."""

    def run(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.stem(x))
        y = F.relu(net.norm(net.b(F.relu(net.a(x)))))
        y = y * net.more(F.relu(net.less(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return pooled(net, F.relu(net.c(y) + net.shortcut(x)))

    return Net(
        run, stem=conv(3, 8), a=conv(8, 16, 1), b=conv(16, 16, stride=2, groups=4),
        norm=nn.BatchNorm2d(16), less=conv(16, 4, 1), more=conv(4, 16, 1), c=conv(16, 12, 1),
        shortcut=conv(8, 12, 1, stride=2), out=nn.Linear(12, 4),
    )  # fmt: skip


def branches() -> nn.Module:
    """Four branches side by side, and a second head that reads the first of two such blocks."""

    def block(net: Net, x: Tensor, which: str) -> Tensor:
        one, three, five, pool = (net.get_submodule(f"{which}{i}") for i in range(4))
        parts = [one(x), three(F.relu(x)), five(x), pool(F.max_pool2d(x, 3, 1, 1))]
        return F.relu(torch.cat(parts, 1))

    def run(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        x = block(net, F.relu(net.stem(x)), "a")
        aid = net.aid2(F.relu(net.aid1(F.adaptive_avg_pool2d(x, 2).flatten(1))))
        return pooled(net, block(net, x, "b")), aid

    parts = {
        f"{name}{i}": nn.Sequential(conv(ins, 6, 1), nn.ReLU(), conv(6, outs, size))
        for name, ins in (("a", 8), ("b", 22))
        for i, (outs, size) in enumerate(((4, 1), (8, 3), (6, 5), (4, 1)))
    }
    return Net(
        run, stem=conv(3, 8), **parts, aid1=nn.Linear(88, 12), aid2=nn.Linear(12, 4),
        out=nn.Linear(22, 4),
    )  # fmt: skip


NETS = (windows, scaled_layers, inverted, grouped_and_gated, branches)


def joined(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat(outputs, 1) if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("make", NETS, ids=lambda make: make.__name__)
def test_half_of_every_group_goes(make, tmp_path):
    net = make().eval()
    groups = Groups(net, ((IMAGES,), {}))
    assert not groups.unknown
    keep, small = halves(groups), clone(net)
    cut(small, groups, keep)
    assert numbers(small) == groups.parameters(keep) < 0.65 * numbers(net)
    wanted = joined(small(IMAGES))
    assert wanted.shape == joined(net(IMAGES)).shape
    pack(small, tmp_path / "net.taut", "float32")
    assert torch.equal(joined(load(tmp_path / "net.taut", make())(IMAGES)), wanted)
    joined(small.train()(IMAGES)).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.01).step()
    assert not torch.equal(joined(small.eval()(IMAGES)), wanted)
    again = Groups(small, ((IMAGES,), {}))
    assert again.macs({}) == groups.macs(keep)
