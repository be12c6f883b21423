"""Which weights read what a layer norm makes, read off the exported graph.

    y[c] = weight[c] · x̂[c] + bias[c],    W · y

Where weights alone read y, its scales may move between the norm and them: no answer changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from torch import Tensor, fx

_NORMS = {"layer_norm", "rms_norm"}
_SAME = {"dropout", "clone", "contiguous", "alias", "detach", "to"}
"""What gives its input's numbers in eval mode, channels last."""


def norm_readers(
    nodes: Iterable[fx.Node], parameter: Mapping[fx.Node, str]
) -> dict[str, tuple[str, ...]]:
    """By the name of a norm's weight: the weights that read it, where nothing else does.

    parameter: the names of the nodes that are parameters. Norms over the last dimension alone
    count, each run once; and Linear weights, each multiplied by once.
    """
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        if node.op != "call_function" or _op(node) not in _NORMS or len(node.args) < 3:
            continue
        weight = node.args[2]
        if not _once(weight, parameter) or _dims(weight) != 1:
            continue
        if readers := _readers(node, parameter):
            found[parameter[weight]] = tuple(dict.fromkeys(readers))
    return found


def _readers(node: fx.Node, parameter: Mapping[fx.Node, str]) -> list[str] | None:
    """The weights that alone read a node's channels; None where something else does."""
    found: list[str] = []
    for user in node.users:
        weight = user.args[1] if len(user.args) > 1 else None
        if _op(user) == "linear" and user.args[0] is node:
            if not _once(weight, parameter):
                return None
            found.append(parameter[weight])
        elif _op(user) in _SAME or _keeps_last(user):
            more = _readers(user, parameter)
            if more is None:
                return None
            found += more
        else:
            return None
    return found


def _once(node: Any, parameter: Mapping[fx.Node, str]) -> TypeGuard[fx.Node]:
    """Whether it is a parameter that a single operation reads."""
    return isinstance(node, fx.Node) and node in parameter and len(node.users) == 1


def _keeps_last(node: fx.Node) -> bool:
    swapped: Any = node.args[1:3]
    dims = _dims(node)
    return _op(node) == "transpose" and dims - 1 not in {d % dims for d in swapped}


def _op(node: fx.Node) -> str:
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _dims(node: Any) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0
