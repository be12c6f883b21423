"""Your own training loop: apply a technique, train as you always do, pack.

After `taut.apply` the model is an ordinary nn.Module. `taut.attach_schedules` lets its masks close
step by step, as the optimizer steps.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import taut
from taut.data import Batches

torch.manual_seed(0)
data = load_digits()
x = torch.tensor(data.data, dtype=torch.float32) / 16
y = torch.tensor(data.target)
task = taut.Task(
    train=Batches(x[:1400], y[:1400], batch_size=64, shuffle=True),
    test=Batches(x[1400:], y[1400:], batch_size=400),
)


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(net, epochs, schedule=None):
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    taut.attach_schedules(net, optimizer, total_steps=epochs * 22, schedule=schedule)
    for _ in range(epochs):
        for inputs, targets in Batches(x[:1400], y[:1400], batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
    return net


net = train(network(), epochs=20)
before = task.evaluate(net)

taut.apply(net, "prune_weights(sparsity=0.85)", task)
train(net, epochs=20, schedule="schedule(kind='cubic', steps=20)")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.taut"
    size = taut.pack(net, path)
    fresh = taut.load(path, model=network())

raw = 4 * sum(p.numel() for p in network().parameters())
print(f"{raw:,} → {size:,} bytes, score {before:.4f} → {task.evaluate(fresh):.4f}")
