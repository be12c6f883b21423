"""Whether a sentence of a film review is kind: a bag of words beside a GRU that reads in order."""

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import taut
from taut.data import data_folder, movie_lines
from taut.texts import Words, padded

EPOCHS = int(os.environ.get("TAUT_EPOCHS", "6"))
EXAMPLES = int(os.environ.get("TAUT_EXAMPLES", "10605"))
LONGEST = 48  # words of a sentence that are read

lines = movie_lines()
order = torch.randperm(len(lines.sentences), generator=torch.Generator().manual_seed(0))[:EXAMPLES]
held = EXAMPLES // 10  # as many to choose by, as many to test
splits = {"train": order[: -2 * held], "validation": order[-2 * held : -held],
          "test": order[-held:]}  # fmt: skip
words = Words.of(lines.sentences[i] for i in splits["train"])
learning_rate = 2e-3


def batches(split, shuffle=False):
    rows = splits[split]
    rows = rows[torch.randperm(len(rows))] if shuffle else rows
    return [
        (padded([words.encode(lines.sentences[i])[:LONGEST] for i in part]),
         (lines.ratings[part] > 0).long())
        for part in rows.split(64)
    ]  # fmt: skip


def train():
    return batches("train", shuffle=True)


def validation():
    return batches("validation")


def test():
    return batches("test")


class Reader(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.bag = nn.EmbeddingBag(len(words), width, mode="mean", padding_idx=0)
        self.words = nn.Embedding(len(words), width, padding_idx=0)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, tokens, lengths):
        read = pack_padded_sequence(
            self.words(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, last = self.rnn(read)
        return self.head(self.drop(torch.cat([self.bag(tokens), last[0]], 1)))


def model():
    net = Reader()
    name = f"movie-lines-{EPOCHS}-{EXAMPLES}.pt"
    kept = Path(os.environ.get("TAUT_WEIGHTS", data_folder() / name))
    if not kept.is_file():
        torch.manual_seed(0)
        options = taut.Recover(epochs=EPOCHS, learning_rate=learning_rate, distill=0.0)
        taut.recover(net, taut.Task(train=train, test=test, validation=validation), options)
        torch.save(net.state_dict(), kept)
    net.load_state_dict(torch.load(kept, weights_only=True))
    return net
