"""What a search for what to keep is about: units that stay or go, their costs, a budget, a damage.

A unit is a filter (a row of a weight) or a single weight; all units of a site cost the same. A
candidate says for every unit whether it is kept. Whatever a search proposes is turned into the
candidate that spends the budget to within one unit, so that no search ever sees one that does not
fit, or needs a penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from taut.errors import RecipeError, did_you_mean
from taut.modules import plain_copy, tensor_at
from taut.types import Site

Masks = tuple[Tensor, ...]
"""For each site, which of its units are kept: bool [units]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A site as a search sees it.

    shape: of its weight. scores: [units], how important each unit is, comparable between sites.
    unit_cost: MACs or parameters of one unit.
    """

    name: str
    shape: tuple[int, ...]
    scores: Tensor
    unit_cost: float

    @property
    def units(self) -> int:
        return self.scores.numel()

    @property
    def cost(self) -> float:
        return self.units * self.unit_cost


class Problem:
    """Keep units of these layers for at most `kept` of their summed cost, at the least damage.

    damage: the number to be kept low (misclassification, loss) of a candidate; what is not finite
    counts as infinite. genes: what a genome describes, either how large a share of its units each
    site keeps, those of the best scores first (`sites`), or every unit by itself (`units`).

    Every site keeps one unit at least. Raises RecipeError where there is no site, where nothing
    costs anything, and for a budget below the least, one unit a site.
    """

    def __init__(
        self, layers: Sequence[Layer], damage: Callable[[Masks], float], *, kept: float,
        genes: Literal["sites", "units"] = "sites",
    ) -> None:  # fmt: skip
        _one_of("genes", genes, "sites", "units")
        self.layers, self.genes, self.kept = tuple(layers), genes, kept
        self._units = torch.tensor([x.units for x in layers], dtype=torch.float64)
        self._unit_cost = torch.tensor([x.unit_cost for x in layers], dtype=torch.float64)
        self.total = float(self._units @ self._unit_cost) if layers else 0.0
        if not self.total > 0:
            raise RecipeError(
                "keep_search: a search needs a site whose units cost something, got "
                f"{', '.join(x.name for x in layers) or 'no site'}; name other sites or count "
                "parameters instead of MACs"
            )
        least = float(self._unit_cost.sum()) / self.total
        if not least <= kept <= 1:
            raise RecipeError(
                f"keep_search: the budget must lie in [{least:.4g}, 1] of the whole, got {kept}; "
                f"the least keeps one unit of each of the {len(layers)} sites"
            )
        self.budget = kept * self.total * (1 + 1e-12)
        self._damage = damage
        self._known: dict[bytes, float] = {}
        self._sizes = [x.units for x in layers]
        self._orders = [x.scores.argsort(descending=True, stable=True) for x in layers]
        self._each_cost = self._unit_cost.repeat_interleave(self._units.long())
        self._standing = torch.cat([_standing(o) for o in self._orders])

    @classmethod
    def of(
        cls, model: nn.Module, sites: Sequence[Site], measure: Callable[[nn.Module], float], *,
        kept: float, cost: Literal["macs", "parameters"] = "macs",
        unit: Literal["filter", "weight"] = "filter", genes: Literal["sites", "units"] = "sites",
        scores: Mapping[str, Tensor] | None = None,
    ) -> Self:  # fmt: skip
        """The problem of a network, which is copied and never touched.

        measure: the damage of a network, without training it. kept: of the sites' MACs or
        parameters; the MACs of a filter are those of its row of the weight, inputs that later
        layers then read in vain are not counted off. scores: the importance of each weight,
        [*shape] by site, by default its magnitude; a filter's is the mean of its weights'. Raises
        RecipeError for scores that are missing, no numbers or of another shape.
        """
        _one_of("cost", cost, "macs", "parameters")
        _one_of("unit", unit, "filter", "weight")
        probe = plain_copy(model)
        whole = [tensor_at(probe, s.name).detach().clone() for s in sites]

        def layer(site: Site, weight: Tensor) -> Layer:
            each = weight.abs() if scores is None else scores.get(site.name)
            if each is None or each.shape != weight.shape or not bool(each.isfinite().all()):
                raise RecipeError(
                    f"keep_search: site {site.name!r} needs a finite score for each weight of "
                    f"{list(weight.shape)}, got {None if each is None else list(each.shape)}; "
                    "look for NaN in the scores or in the network"
                )
            each = each.detach().cpu().double()
            ranked = each.flatten(1).mean(1) if unit == "filter" else each.flatten()
            spent = site.macs if cost == "macs" else site.numel
            return Layer(
                name=site.name, shape=site.shape, scores=ranked, unit_cost=spent / len(ranked)
            )

        @torch.no_grad()
        def damage(masks: Masks) -> float:
            for site, weight, mask in zip(sites, whole, masks, strict=True):
                kept = spread(mask, site.shape).to(weight.device)
                tensor_at(probe, site.name).copy_(weight * kept)
            return measure(probe)

        layers = [layer(s, w) for s, w in zip(sites, whole, strict=True)]
        return cls(layers, damage, kept=kept, genes=genes)

    # ---- candidates -------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many numbers a genome has."""
        return len(self.layers) if self.genes == "sites" else sum(self._sizes)

    def candidate(self, genome: Tensor) -> Masks:
        """The candidate of a genome, float64 [size]; zeros keep the same share of every site.

        sites: site s keeps the share sigmoid(genome[s] + l) of its units, with the l that spends
        the budget. units: unit u goes by logit(its rank from below / units) + genome[u], and
        the highest of all sites stay. With equal genes inside each site the two are the same.
        """
        if self.genes == "units":
            return self._highest(self._standing + genome)
        return self.ranked(self._counts(genome))

    def ranked(self, counts: Sequence[int]) -> Masks:
        """The candidate that keeps so many units of each site, the best scores first.

        Where the counts leave some of the budget, more are kept. Raises RecipeError where they do
        not fit it, or leave a site without units.
        """
        masks = []
        for order, count in zip(self._orders, self._filled(counts), strict=True):
            mask = torch.zeros(len(order), dtype=torch.bool)
            mask[order[:count]] = True
            masks.append(mask)
        return tuple(masks)

    def by_score(self) -> Masks:
        """The units of the highest scores of all sites together: global pruning."""
        return self._highest(torch.cat([x.scores for x in self.layers]))

    def first(self, count: int, spread: float, generator: torch.Generator) -> Tensor:
        """The genomes [count, size] from which every search starts.

        The same share everywhere, the shares of `by_score`, then noise of this spread, in logits.
        """
        genomes = spread * self.noise(count, generator)
        genomes[0] = 0.0
        masks = self.by_score()
        shares = torch.tensor([float(m.double().mean()) for m in masks], dtype=torch.float64)
        by_score = torch.logit(shares, eps=1e-6)
        if self.genes == "units":
            by_score = by_score.repeat_interleave(self._units.long())
        genomes[1:2] = by_score
        return genomes

    def noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Normal noise for genomes, [rows, size] of variance one.

        A unit's is half its site's and half its own.
        """
        sites = torch.randn(rows, len(self.layers), generator=generator, dtype=torch.float64)
        if self.genes == "sites":
            return sites
        own = torch.randn(rows, self.size, generator=generator, dtype=torch.float64)
        return (sites.repeat_interleave(self._units.long(), 1) + own) / math.sqrt(2)

    def within(self, site: int, spent: float, share: float) -> int:
        """The units of a site that come nearest to this share of them, as the budget allows.

        spent: the cost of the sites before. The later ones must still be able to keep one unit
        each, and to spend the rest when they keep all.
        """
        layer, later = self.layers[site], self.layers[site + 1 :]
        if layer.unit_cost == 0:
            return layer.units
        left = self.budget - spent
        least = math.ceil((left - sum(x.cost for x in later)) / layer.unit_cost - 1e-9)
        most = math.floor((left - sum(x.unit_cost for x in later)) / layer.unit_cost)
        return max(1, min(layer.units, most, max(least, round(share * layer.units))))

    # ---- what it costs, and what it does ----------------------------------------------------

    def cost(self, masks: Masks) -> float:
        """MACs or parameters of what is kept."""
        kept = torch.stack([m.sum() for m in masks]).double()
        return float(kept @ self._unit_cost)

    def damage(self, masks: Masks) -> float:
        """The damage of a candidate; asked again, it is not measured again."""
        key = xxhash.xxh3_128_digest(np.packbits(torch.cat(masks).numpy()).tobytes())
        if key not in self._known:
            found = self._damage(masks)
            self._known[key] = found if math.isfinite(found) else math.inf
        return self._known[key]

    def fingerprint(self) -> str:
        """Tells problems apart, for a search that goes on where it was stopped."""
        digest = xxhash.xxh3_128(repr((self.budget, self.genes)).encode())
        for x in self.layers:
            digest.update(repr((x.name, x.shape, x.unit_cost)).encode())
            digest.update(x.scores.numpy().tobytes())
        return digest.hexdigest()

    # ---- spending the budget ----------------------------------------------------------------

    def _counts(self, genome: Tensor) -> list[int]:
        """Bisect for the l at which the sites' shares spend the budget."""

        def counts(level: float) -> Tensor:
            shares = torch.sigmoid(genome + level)
            return (self._units * shares).round().clamp(min=1).minimum(self._units)

        reach = 40 + float(genome.abs().max())
        low, high = -reach, reach
        for _ in range(60):
            middle = (low + high) / 2
            fits = float(counts(middle) @ self._unit_cost) <= self.budget
            low, high = (middle, high) if fits else (low, middle)
        return [int(n) for n in counts(low)]

    def _filled(self, counts: Sequence[int]) -> list[int]:
        """The counts with what they leave of the budget spent, on the dearest units first."""
        filled = list(counts)
        left = self.budget - float(torch.tensor(filled, dtype=torch.float64) @ self._unit_cost)
        if left < 0 or min(filled) < 1:
            raise RecipeError(
                f"keep_search: each site keeps 1 unit or more, all together at most "
                f"{self.budget:.6g} of {self.total:.6g} MACs or parameters, got {filled}"
            )
        for i in sorted(range(len(filled)), key=lambda i: -self.layers[i].unit_cost):
            price, room = self.layers[i].unit_cost, self._sizes[i] - filled[i]
            more = room if price == 0 else min(room, int(left // price))
            filled[i] += more
            left -= more * price
        return filled

    def _highest(self, priority: Tensor) -> Masks:
        """Each site's first unit, then of all units those of the highest priority that fit."""
        chosen = torch.zeros(len(priority), dtype=torch.bool)
        begin = 0
        for size in self._sizes:
            chosen[begin + int(priority[begin : begin + size].argmax())] = True
            begin += size
        order = priority.argsort(descending=True, stable=True)
        while True:
            left = self.budget - float(self._each_cost[chosen].sum())
            rest = order[~chosen[order] & (self._each_cost[order] <= left)]
            taken = rest[self._each_cost[rest].cumsum(0) <= left]
            if not len(taken):
                return tuple(torch.split(chosen, self._sizes))
            chosen[taken] = True


def spread(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask of a weight, bool [*shape], from that of its units (rows or single weights)."""
    if mask.numel() == math.prod(shape):
        return mask.reshape(shape)
    return mask.reshape(-1, *(1 for _ in shape[1:])).expand(shape).clone()


def _one_of(what: str, given: str, *choices: str) -> None:
    if given not in choices:
        near = did_you_mean(str(given), choices)
        raise RecipeError(f"keep_search: {what} has no choice {given!r}{near}")


def _standing(order: Tensor) -> Tensor:
    """How high each unit stands in its site: the logit of the share of units below it."""
    below = torch.empty(len(order), dtype=torch.float64)
    below[order] = torch.arange(len(order), dtype=torch.float64).flip(0)
    return torch.logit((below + 0.5) / len(order))
