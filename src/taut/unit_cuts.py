"""What techniques that remove units have in common: which groups, how many, and the cut itself.

A cut that does not run is tried as a graph, then by halves; a network never comes back broken.
"""

from __future__ import annotations

import logging
import math

from torch import nn

from taut.errors import RecipeError
from taut.groups import Cuts, Group, Groups, cut, cut_graph
from taut.layers import Packed
from taut.modules import clone
from taut.technique import matches

_log = logging.getLogger("taut")

Keep = dict[str, list[int]]
"""The units that stay, of every group that loses any."""


def refuse_packed(name: str, model: nn.Module) -> None:
    """Raise RecipeError for a network that was loaded from a file."""
    if any(isinstance(m, Packed) for m in model.modules()):
        raise RecipeError(
            f"{name}: the network is packed already; give the network as it was before "
            "taut.pack, or the one that was trained"
        )


def chosen_groups(name: str, only: str, groups: Groups) -> list[Group]:
    """The groups that an option `only` chooses. Raises RecipeError where there is none."""
    barred = ",".join(p for p in only.split(",") if p.strip().startswith("!"))
    found = []
    for group in groups.groups:
        makers = [m for m in group.members if m.trained and m.dim == 0]
        wanted = all(matches(only, m.names) for m in makers or group.members[:1])
        spared = barred and any(not matches(barred, m.names) for m in group.members if m.trained)
        if wanted and not spared:
            found.append(group)
    if not found:
        known = ", ".join(g.name for g in groups.groups)
        why = "; ".join(f"{w.name}: {w.reason}" for w in groups.whole[:3])
        raise RecipeError(
            f"{name}: only={only!r} leaves no group that can be cut; known: "
            f"{known or f'none ({why})'}"
        )
    return found


def rounded(group: Group, count: int, floor: float, round_to: int) -> int:
    """Units to keep: up to the floor, a fraction, and to a width that is a multiple."""
    count = max(count, 1, math.ceil(floor * group.units))
    width = min(m.places.shape[1] for m in group.members if m.trained)
    step = round_to // math.gcd(round_to, width)
    return min(math.ceil(count / step) * step, group.units)


def cut_units(
    name: str, model: nn.Module, groups: Groups, keep: Keep, as_graph: bool, quiet: bool = False
) -> tuple[nn.Module, Keep]:
    """Keep these units; returns the network that it became and the cuts that it runs with.

    as_graph: whether its graph may take its place. quiet: the log is told nothing. Raises
    RecipeError, with the network as it was, where it runs with none of them.
    """
    told: list[str] = []
    try:
        cut(model, groups, keep)
    except RecipeError as error:
        graph = _graph(model, groups, keep, told) if as_graph else None
        keep = _running(name, model, groups, keep, str(error), told) if graph is None else keep
        if graph is None:
            cut(model, groups, keep)
        model = graph or model
    if quiet:
        return model, keep
    for line in told:
        _log.warning("%s: %s", name, line)
    for each, kept in keep.items():
        _log.info("%s: %s: %d of %d units", name, each, len(kept), groups[each].units)
    _log.info(
        "%s: %.1f %% of the MACs and %.1f %% of the parameters are left", name,
        100 * groups.macs(keep) / max(groups.macs({}), 1),
        100 * groups.parameters(keep) / groups.parameters({}),
    )  # fmt: skip
    return model, keep


def _graph(model: nn.Module, groups: Groups, keep: Keep, told: list[str]) -> nn.Module | None:
    try:
        graph = cut_graph(model, groups, keep)
    except RecipeError as error:
        told.append(str(error))
        return None
    told.append(
        f"sizes stand in the code of {type(model).__name__} as plain numbers, so its exported "
        "graph takes its place: it trains, without dropout; as_graph=False leaves groups whole"
    )
    return graph


def _running(
    name: str, model: nn.Module, groups: Groups, keep: Keep, reason: str, told: list[str]
) -> Keep:
    """The cuts that the network runs with, where it does not with all of them.

    They are tried by halves, on copies. Raises RecipeError where none is left.
    """
    reasons: dict[str, str] = {}

    def fails(some: Cuts) -> str:
        try:
            cut(clone(model), groups, some)
        except RecipeError as error:
            return str(error)
        return ""

    def good(some: Keep, reason: str) -> Keep:
        if not reason:
            return some
        names = list(some)
        if len(names) == 1:
            reasons[names[0]] = reason
            return {}
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        parts = [{n: some[n] for n in half} for half in halves]
        first, second = (good(part, fails(part)) for part in parts)
        both = first | second
        return both if not both or not fails(both) else max(first, second, key=len)

    found = good(keep, reason)
    if not found:
        raise RecipeError(f"{name}: nothing can be cut: {reason}")
    for each in keep.keys() - found.keys():
        why = reasons.get(each, "the network does not run with it and the others cut")
        told.append(f"{each} stays whole: {why}")
    return found
