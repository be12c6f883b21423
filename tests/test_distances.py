"""Every distance against its formula, written out by hand."""

import math

import pytest
import torch
from torch import nn

from taut import distances


def softmax(row, temperature):
    powers = [math.exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


Z = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
W = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 0.0, 4.0]])


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_outputs_follow_the_formulas(t):
    rows = list(zip(Z.tolist(), W.tolist(), strict=True))
    q, p = ([softmax(r[i], t) for r in rows] for i in (0, 1))
    m = [[(a + b) / 2 for a, b in zip(x, y, strict=True)] for x, y in zip(p, q, strict=True)]
    by_hand = {
        "kl": t * t * sum(kl(p[i], q[i]) for i in (0, 1)) / 2,
        "js": t * t * sum((kl(p[i], m[i]) + kl(q[i], m[i])) / 2 for i in (0, 1)) / 2,
        "mse": sum((a - b) ** 2 for x, y in rows for a, b in zip(x, y, strict=True)) / 6,
        "cosine": 1
        - sum(
            sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))
            for x, y in rows
        )
        / 2,
    }
    assert set(by_hand) == set(distances.LOGITS)
    for kind, value in by_hand.items():
        got = distances.between_outputs(kind, Z, W, 1, t, None)
        assert float(got) == pytest.approx(value, rel=1e-5), kind
        assert float(distances.between_outputs(kind, W, W, 1, t, None)) == pytest.approx(
            0, abs=1e-6
        )


@pytest.mark.parametrize("kind", distances.LOGITS)
def test_steps_that_do_not_count_do_not_count(kind):
    z, w = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    keep = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    got = distances.between_outputs(kind, z, w, -1, 2.0, keep)
    wanted = distances.between_outputs(kind, z[keep], w[keep], -1, 2.0, None)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    classes_first = distances.between_outputs(kind, z.mT, w.mT, 1, 2.0, keep)
    assert float(classes_first) == pytest.approx(float(wanted), rel=1e-5)
    nothing = distances.between_outputs(kind, z, w, -1, 2.0, torch.zeros_like(keep))
    assert float(nothing) == 0


def test_a_hint_is_the_mean_square():
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert float(distances.hint(x, y)) == pytest.approx(float(nn.functional.mse_loss(x, y)))
    keep = torch.tensor([[True, False, False], [True, True, False]])
    wanted = nn.functional.mse_loss(x[keep], y[keep])
    assert float(distances.hint(x, y, keep)) == pytest.approx(float(wanted))


def test_attention_is_zagoruykos():
    x, y = torch.randn(3, 4, 2, 2), torch.randn(3, 6, 2, 2)
    total = 0.0
    for i in range(3):
        maps = []
        for z in (x, y):
            energy = [
                sum(float(z[i, c, h, w]) ** 2 for c in range(z.shape[1]))
                for h in range(2)
                for w in range(2)
            ]
            maps.append([e / math.hypot(*energy) for e in energy])
        total += sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
    assert float(distances.attention(x, y)) == pytest.approx(total / 3, rel=1e-5)
    assert float(distances.attention(x, 5 * x)) == pytest.approx(0, abs=1e-6)


def test_attention_of_sequences_looks_at_steps_that_count():
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 5)
    keep = torch.tensor([[True, True, True, False]] * 2)
    changed = x.clone()
    changed[:, 3] = 100.0
    assert torch.equal(distances.attention(x, y, keep), distances.attention(changed, y, keep))
    as_maps = distances.attention(x[:, :3].mT.unsqueeze(3), y[:, :3].mT.unsqueeze(3))
    assert float(distances.attention(x, y, keep)) == pytest.approx(float(as_maps), rel=1e-5)


def huber(a, b):
    d = abs(a - b)
    return d * d / 2 if d < 1 else d - 0.5


def test_relational_is_parks():
    x, y = torch.randn(4, 3), torch.randn(4, 2, 2)
    pairs = [(i, j) for i in range(4) for j in range(4) if i < j]

    def relations(z):
        z = z.flatten(1)
        d = [float((z[i] - z[j]).norm()) for i, j in pairs]
        d = [v * len(d) / sum(d) for v in d]
        cos = []
        for j in range(4):
            for i in range(4):
                for k in range(4):
                    a, b = z[i] - z[j], z[k] - z[j]
                    scale = float(a.norm() * b.norm())
                    cos.append(float(a @ b) / scale if scale else 0.0)
        return d, cos

    (d, cos), (dy, cosy) = relations(x), relations(y)
    wanted = sum(map(huber, d, dy)) / len(d) + 2 * sum(map(huber, cos, cosy)) / len(cos)
    assert float(distances.relational(x, y)) == pytest.approx(wanted, rel=1e-4)
    assert float(distances.relational(x, 3 * x + 1)) == pytest.approx(0, abs=1e-5)


def test_relations_are_minilms():
    heads, n, steps = 2, 2, 3
    q, k = torch.randn(n, steps, 4), torch.randn(n, steps, 4)
    q2, k2 = torch.randn(n, steps, 6), torch.randn(n, steps, 6)

    def attend(q, k, i, h):
        size = q.shape[2] // heads
        part = slice(h * size, (h + 1) * size)
        return [
            softmax(
                [float(q[i, s, part] @ k[i, t, part]) / math.sqrt(size) for t in range(steps)], 1
            )
            for s in range(steps)
        ]

    total = sum(
        kl(b, a)
        for i in range(n)
        for h in range(heads)
        for a, b in zip(attend(q, k, i, h), attend(q2, k2, i, h), strict=True)
    )
    own, theirs = distances.relation(q, k, heads), distances.relation(q2, k2, heads)
    assert own.shape == (n, heads, steps, steps)
    got = distances.relations(own, theirs)
    assert float(got) == pytest.approx(total / (n * heads * steps), rel=1e-4)


def test_gradients_are_finite_where_networks_agree_and_where_examples_repeat():
    x = torch.randn(4, 6).repeat(2, 1).requires_grad_()
    total = sum(distances.between_outputs(k, x, x.detach(), 1, 2.0, None) for k in distances.LOGITS)
    maps = x.view(8, 2, 3, 1)
    total = total + distances.relational(x, x.detach()) + distances.attention(maps, maps.detach())
    total.backward()
    assert bool(x.grad.isfinite().all())
