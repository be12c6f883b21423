"""How far a network is from its teacher: in its outputs, and in what its layers see.

Each function takes the network's tensor first and the teacher's second and returns a scalar, zero
where the network does as the teacher does. Features are [n, channels, ...] as convolutions give
them, or [n, steps, channels] for sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOGITS = ("kl", "js", "mse", "cosine")
FEATURES = ("hint", "attention", "relational", "relations")
_MOST_TRIPLES = 64


def between_outputs(
    kind: str, output: Tensor, wanted: Tensor, axis: int, temperature: float, keep: Tensor | None
) -> Tensor:
    """The distance between two outputs, a mean over examples and steps.

        kl      T² · Σ p · (log p - log q)              Hinton, Vinyals, Dean (2015)
        js      T² · (KL(p ‖ m) + KL(q ‖ m)) / 2,  m = (p + q) / 2
        mse     mean of (z - w)²
        cosine  1 - z · w / (‖z‖ ‖w‖)

    p = softmax(w / T) of the teacher's outputs w, q = softmax(z / T) of the network's z, along
    `axis`. keep: bool, of the outputs' shape without that axis; the others do not count. None
    for all.
    """
    if kind == "mse":
        each = (output - wanted).square().mean(axis)
    elif kind == "cosine":
        each = 1 - F.cosine_similarity(output, wanted, axis)
    else:
        log_q = F.log_softmax(output / temperature, axis)
        log_p = F.log_softmax(wanted / temperature, axis)
        if kind == "kl":
            each = _kl(log_p, log_q).sum(axis)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            each = (_kl(log_p, log_m) + _kl(log_q, log_m)).sum(axis) / 2
        each = each * temperature**2
    return _mean(each, keep)


def hint(features: Tensor, wanted: Tensor, keep: Tensor | None = None) -> Tensor:
    """mean of (features - wanted)², both of one shape.

    Romero et al.: FitNets (ICLR 2015); for hidden states of sequences Jiao et al.: TinyBERT (2020).
    keep: bool, of the first dimensions; the rest does not count.
    """
    return _mean((features - wanted).square(), keep)


def attention(features: Tensor, wanted: Tensor, keep: Tensor | None = None) -> Tensor:
    """Σ over places of (a - b)², a mean over examples: a, b are where each network looks.

        a = s / ‖s‖,  s[place] = Σ over channels of features²

    features: [n, channels, places...] or [n, steps, channels]; the numbers of channels may differ.
    Zagoruyko, Komodakis: Paying More Attention to Attention (ICLR 2017), equation 2 with p = 2,
    squared as in the authors' code. keep: [n, steps], bool.
    """

    def looks(x: Tensor) -> Tensor:
        energy = x.square().sum(2 if x.dim() == 3 else 1).flatten(1)
        return F.normalize(energy if keep is None else energy * keep)

    return (looks(features) - looks(wanted)).square().sum(1).mean()


def relational(features: Tensor, wanted: Tensor, keep: Tensor | None = None) -> Tensor:
    """RKD: how examples lie to each other, by distances of pairs and angles of triples.

        huber(d[i, j] - d'[i, j]) + 2 · huber(cos[i, j, k] - cos'[i, j, k]), each a mean

    d: distances divided by their mean; cos[i, j, k]: of the angle at j. [n, ...]; all but n may
    differ. Of more than 64 examples the first 64 count, since triples grow with the cube. Park,
    Kim, Lu, Cho: Relational Knowledge Distillation (CVPR 2019), with the paper's ratio of the two.
    """

    def relations_of(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)[:_MOST_TRIPLES]
        pairs = torch.pdist(x)
        rays = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)  # [j, i]: from j to i
        return pairs / pairs.mean().clamp(min=1e-12), rays @ rays.transpose(1, 2)

    (d, cos), (d_wanted, cos_wanted) = relations_of(features), relations_of(wanted)
    return F.smooth_l1_loss(d, d_wanted) + 2 * F.smooth_l1_loss(cos, cos_wanted)


def relation(x: Tensor, y: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """log softmax(x · yᵀ / sqrt(size of a head)): how the steps of a sequence relate, by heads.

    x, y: [n, steps, heads · size] → [n, heads, steps, steps]. mask: added to the scores; what it
    bars has a large negative number there, but no -inf.
    """
    scores = scaled_scores(x, y, heads)
    return F.log_softmax(scores if mask is None else scores + mask, -1)


def scaled_scores(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """x · yᵀ / sqrt(size of a head), [n, heads, steps, steps]."""
    x, y = (z.view(*z.shape[:2], heads, -1).transpose(1, 2) for z in (x, y))
    return x @ y.transpose(2, 3) / math.sqrt(x.shape[-1])


def relations(log_a: Tensor, log_b: Tensor, keep: Tensor | None = None) -> Tensor:
    """KL(b ‖ a) of two relations, a mean over examples, heads and steps.

    log_a of the network, log_b of the teacher: [n, heads, steps, steps]. Wang et al.: MiniLM
    (NeurIPS 2020) for attention and values, MiniLMv2 (2021) for any layers. keep: [n, steps], bool.
    """
    each = _kl(log_b, log_a).sum(-1).mean(1)
    return _mean(each, keep)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p · (log p - log q) of each entry."""
    return F.kl_div(log_q, log_p.exp(), reduction="none")


def _mean(each: Tensor, keep: Tensor | None) -> Tensor:
    """The mean of the entries, or of those at places of `keep`; zero where it keeps none."""
    if keep is None:
        return each.mean()
    kept = each[keep]
    return kept.sum() / max(kept.numel(), 1)
