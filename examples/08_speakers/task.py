"""Nine speakers by two vowels (JapaneseVowels): series of 7 to 29 steps, read both ways."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import taut
from taut.data import data_folder, japanese_vowels
from taut.texts import padded

EPOCHS = int(os.environ.get("TAUT_EPOCHS", "60"))
LONGEST = 29

data = japanese_vowels()
chosen = torch.arange(len(data.train)) % 6 == 0  # a sixth of the training series choose the epoch
learning_rate = 5e-3


def batches(series, labels, size=32, shuffle=False):
    order = torch.randperm(len(series)) if shuffle else torch.arange(len(series))
    return [
        (padded([series[i] for i in part], longest=LONGEST), labels[part])
        for part in order.split(size)
    ]


def picked(rows):
    rows = rows.nonzero().flatten()
    return [data.train[i] for i in rows], data.train_labels[rows]


def train():
    return batches(*picked(~chosen), shuffle=True)


def validation():
    return batches(*picked(chosen))


def test():
    return batches(data.test, data.test_labels)


class Listener(nn.Module):
    def __init__(self, hidden=64):
        super().__init__()
        self.rnn = nn.GRU(12, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(2 * hidden, 9)

    def forward(self, series, lengths):
        heard = pack_padded_sequence(series, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, last = self.rnn(heard)
        return self.head(self.drop(torch.cat([last[-2], last[-1]], 1)))


def model():
    net = Listener()
    kept = Path(os.environ.get("TAUT_WEIGHTS", data_folder() / f"speakers-{EPOCHS}.pt"))
    if not kept.is_file():
        torch.manual_seed(0)
        options = taut.Recover(epochs=EPOCHS, learning_rate=learning_rate, distill=0.0)
        taut.recover(net, taut.Task(train=train, test=test, validation=validation), options)
        torch.save(net.state_dict(), kept)
    net.load_state_dict(torch.load(kept, weights_only=True))
    return net
