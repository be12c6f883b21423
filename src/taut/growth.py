"""What a step makes of each site's bytes: a site that it would make larger is left as it is."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from torch import nn

from taut.recoding import Recoding, chain
from taut.statistics import Statistics
from taut.technique import Technique
from taut.types import LeftAlone, Site

_log = logging.getLogger("taut")


def predict_chain(links: Sequence[Recoding], site: Site) -> float:
    """Bytes of a site under a chain of techniques, each recoding the core of the one before."""

    def at(depth: int, count: int) -> float:
        if depth == len(links):
            return 2.0 * count
        return links[depth].predict_bytes(site, count, lambda n: at(depth + 1, n))

    return at(0, site.numel)


def growth(step: Recoding, links: Sequence[Recoding], site: Site) -> LeftAlone | None:
    """What a step is predicted to add to a site with this chain; None where it adds nothing.

    A number that no technique recodes takes two bytes. A step of the same name as the last one
    would take its place.
    """
    links = links[:-1] if links and links[-1].name == step.name else links
    before, after = (predict_chain(c, site) for c in (links, [*links, step]))
    if after <= before:
        return None
    return LeftAlone(
        step=step.name, site=site.name, before_bytes=math.ceil(before), after_bytes=math.ceil(after)
    )


def apply_where_smaller(
    model: nn.Module, step: Technique, sites: tuple[Site, ...], statistics: Statistics
) -> list[LeftAlone]:
    """Put a technique on sites of a model, but for those that it would make larger: these."""
    local = step.localise(model, sites, statistics)
    grown: dict[str, LeftAlone | None] = {}
    for site in sites:  # what cannot be predicted is refused before any is changed
        its, links = local[site.name], chain(model, site)
        if isinstance(its, Recoding):
            grown[site.name] = growth(its, [] if links is None else links.recipe, site)
    for site in sites:
        if left := grown.get(site.name):
            _log.info("%s", left)
        else:
            _log.info("%s: %s", site.name, local[site.name])
            local[site.name].apply(model, site, statistics)
    return [left for left in grown.values() if left is not None]
