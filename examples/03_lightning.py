"""Lightning trains what Taut compresses: a callback lets the masks follow the Trainer's optimizer.

The callback goes into Lightning's checkpoints too, so that a training which was stopped goes on
where it was.
"""

import tempfile
from pathlib import Path

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn

import taut
from taut.data import Batches

torch.manual_seed(0)
data = load_digits()
x = torch.tensor(data.data, dtype=torch.float32) / 16
y = torch.tensor(data.target)
train = Batches(x[:1400], y[:1400], batch_size=64, shuffle=True)
task = taut.Task(train=train, test=Batches(x[1400:], y[1400:], batch_size=400))


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, index):
        inputs, targets = batch
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Prune(lightning.Callback):
    """Attaches a schedule when the training starts, and keeps its state in checkpoints."""

    def __init__(self, schedule):
        self.schedule, self.state = schedule, None

    def on_train_start(self, trainer, module):
        optimizer, steps = trainer.optimizers[0], trainer.estimated_stepping_batches
        self.schedules = taut.attach_schedules(module, optimizer, steps, self.schedule)
        if self.state:
            self.schedules.load_state_dict(self.state)

    def state_dict(self):
        return self.schedules.state_dict()

    def load_state_dict(self, state):
        self.state = state


def fit(module, epochs, *callbacks, checkpoint=None):
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, train, ckpt_path=checkpoint)
    return trainer


module = Classifier()
fit(module, epochs=15)
before = task.evaluate(module.net)

taut.apply(module.net, "prune_weights(sparsity=0.9)", task)
fit(module, 15, Prune("schedule(kind='cubic', by='rigl', steps=30, end=0.75)"))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.taut"
    size = taut.pack(module.net, path)
    fresh = taut.load(path, model=Classifier().net)

raw = 4 * sum(p.numel() for p in Classifier().parameters())
print(f"{raw:,} → {size:,} bytes, score {before:.4f} → {task.evaluate(fresh):.4f}")
