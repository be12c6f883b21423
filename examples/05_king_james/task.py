"""The next character of the King James text: an LSTM, a GRU or a Transformer, by perplexity."""

import math
import os
from pathlib import Path

import torch
from torch.nn import functional as F

import taut
from taut import zoo
from taut.data import Batches, data_folder, king_james, windows
from taut.texts import Alphabet

NETWORK = os.environ.get("TAUT_NETWORK", "lstm")  # or gru, transformer
EPOCHS = int(os.environ.get("TAUT_EPOCHS", "4"))
WIDTH = int(os.environ.get("TAUT_WIDTH", "512"))  # a Transformer's is half of it
EXAMPLES = int(os.environ.get("TAUT_EXAMPLES", "30000"))  # stretches of the text
STEPS = 128

text = king_james()
alphabet = Alphabet.of(text)
inputs, targets = windows(alphabet.encode(text[: EXAMPLES * STEPS + 1]), STEPS)
held = max(len(inputs) // 20, 2)  # of the end: as many to choose by, as many to test
better, learning_rate = "lower", 2e-3


def train():
    return Batches(inputs[: -2 * held], targets[: -2 * held], batch_size=64, shuffle=True)


def validation():
    return Batches(inputs[-2 * held : -held], targets[-2 * held : -held], batch_size=64)


def test():
    return Batches(inputs[-held:], targets[-held:], batch_size=64)


def score(output, target):
    return math.exp(F.cross_entropy(output, target))


def model():
    transformer = {"width": WIDTH // 2, "context": STEPS}
    width = transformer if NETWORK == "transformer" else {"hidden": WIDTH}
    net = zoo.create(f"{NETWORK}_language_model", vocabulary=len(alphabet), layers=2, **width)
    name = f"king-james-{NETWORK}-{WIDTH}-{EPOCHS}-{EXAMPLES}.pt"
    kept = Path(os.environ.get("TAUT_WEIGHTS", data_folder() / name))
    if not kept.is_file():
        fit(net)
        torch.save(net.state_dict(), kept)
    net.load_state_dict(torch.load(kept, weights_only=True))
    return net


def fit(net):
    print(f"training the {NETWORK} for {EPOCHS} epochs, once")
    torch.manual_seed(0)
    options = taut.Recover(epochs=EPOCHS, learning_rate=learning_rate, distill=0.0)
    task = taut.Task(train=train, test=test, validation=validation, score=score, better=better)
    for record in taut.recover(net, task, options):
        print(f"  epoch {record.epoch}: perplexity {record.score:.3f}")
