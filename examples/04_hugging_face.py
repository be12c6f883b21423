"""Hugging Face's Trainer trains what Taut compresses: a small BERT that reads digits as text.

Nothing is downloaded: the BERT is built from its configuration and learns from scratch.
"""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from sklearn.datasets import load_digits

import taut
from taut.data import Batches

torch.manual_seed(0)
data = load_digits()
x = torch.tensor(data.images).unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)).round().long()
x = x.flatten(1)  # 16 tokens, the patches of an image: each one of 17 grey levels
y = torch.tensor(data.target)
examples = [{"input_ids": i, "labels": t} for i, t in zip(x[:1400], y[:1400], strict=True)]


class Reader(transformers.BertForSequenceClassification):
    """Where no labels are given it answers with its logits alone, as Taut's tasks take them."""

    def forward(self, input_ids, labels=None):
        output = super().forward(input_ids, labels=labels)
        return output.logits if labels is None else output


def network():
    config = transformers.BertConfig(
        vocab_size=17, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, num_labels=10,
        initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Reader(config)


task = taut.Task(
    train=Batches(x[:1400], y[:1400], batch_size=100),
    test=Batches(x[1400:], y[1400:], batch_size=400),
)


class Prune(transformers.TrainerCallback):
    """Attaches a schedule when the training begins."""

    def __init__(self, schedule):
        self.schedule = schedule

    def on_train_begin(self, args, state, control, *, model, optimizer, **_):
        taut.attach_schedules(model, optimizer, state.max_steps, self.schedule)


def fit(net, epochs, *callbacks):
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=5e-3,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = transformers.Trainer(net, options, train_dataset=examples)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()


net = network()
fit(net, 16)
before = task.evaluate(net)

taut.apply(net, "prune_weights(sparsity=0.8)", task)
fit(net, 12, Prune("schedule(kind='cubic', steps=50, end=0.7)"))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "net.taut"
    size = taut.pack(net, path)
    fresh = taut.load(path, model=network())

raw = 4 * sum(p.numel() for p in network().parameters())
print(f"{raw:,} → {size:,} bytes, score {before:.4f} → {task.evaluate(fresh):.4f}")
