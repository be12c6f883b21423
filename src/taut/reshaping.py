"""The contract of the reshaping techniques: they change the structure and leave smaller layers.

What they leave is an ordinary network. Its layers are new sites for the recoding techniques, so in
a recipe reshaping comes first; its changes are noted as `edits`, which a file replays on a freshly
built network.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import nn

from taut import edits
from taut.edits import Edit
from taut.errors import RecipeError
from taut.modules import clone, parametrized_names
from taut.statistics import Statistics
from taut.technique import Technique
from taut.trace import Trace
from taut.types import Cost, Site


@dataclass(frozen=True, kw_only=True)
class Reshaping(Technique):
    """A technique that changes the structure of a network."""

    @abstractmethod
    def reshape(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        """Change the network, keep of its numbers what goes on, note the edits, and return it.

        model: whose trace and statistics these are; it may be changed in place. Every change is
        noted by `edits.note` on the network that is returned. Raises RecipeError, with nothing
        changed, where no site can be reshaped so.
        """

    def outline(self, model: nn.Module, trace: Trace, statistics: Statistics) -> nn.Module:
        """The same structure, of numbers that are only as good as a prediction of bytes needs.

        Called where many recipes are looked at and few are run; by default it is `reshape`. A
        technique that fits its numbers at length leaves that out here.
        """
        return self.reshape(model, trace, statistics)

    def predict(self, site: Site) -> Cost:
        """Bytes at two a number, and MACs, before any work; a technique that knows better says."""
        return Cost(size_bytes=2.0 * site.numel, macs=site.macs)

    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> NoReturn:
        """Refused: structure goes beyond one site."""
        raise RecipeError(f"{self.name} changes a whole network, not site {site.name!r} alone")


def check_order(technique: Technique, model: nn.Module) -> None:
    """Raise RecipeError where a network to be reshaped was recoded already."""
    carried = parametrized_names(model)
    if isinstance(technique, Reshaping) and carried:
        raise RecipeError(
            f"{technique.name}: the weight of site {carried[0]!r} is recoded already; put "
            f"{technique.name} first in the recipe"
        )


@torch.no_grad()
def check_runs(name: str, model: nn.Module, changes: Mapping[str, Edit], trace: Trace) -> None:
    """Raise RecipeError, naming the layers, where a network cannot run on its example so.

    changes: of the technique `name`, by the path of the layer that each replaces.
    """
    example = trace.example_on(model)

    def told(some: list[Edit]) -> str:
        probe = edits.replay(clone(model), some).eval()
        try:
            probe(*example[0], **example[1])
        except Exception as error:  # whatever the network's own code makes of it
            return str(error)
        return ""

    if reason := told([*changes.values()]):
        bad = [path for path, change in changes.items() if told([change])] or [*changes]
        barred = ", ".join(f"!{path}" for path in bad)
        raise RecipeError(
            f"{name}: the network's own code needs layer {', '.join(map(repr, bad))} whole "
            f"({reason}); leave it out by only={barred!r}"
        )
