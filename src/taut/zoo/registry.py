"""The networks by name, and the options they take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from torch import nn

from taut.errors import ZooError, did_you_mean

P = ParamSpec("P")
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What an option may be: in [low, high], or one of some choices; and what to do otherwise."""

    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        if self.high is None:
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"

    def allows(self, value: Any) -> bool:
        """Whether the value keeps the rule; NaN keeps none."""
        if self.choices:
            return value in self.choices
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high)


OPTIONS: Mapping[str, Rule] = {
    "classes": Rule(low=1, remedy="it is the number of scores for each example"),
    "in_channels": Rule(low=1, remedy="it is 3 for colour and 1 for grey images"),
    "width": Rule(low=0.05, high=8, remedy="1 is the paper's, 0.5 halves every layer's channels"),
    "dropout": Rule(low=0, high=0.95, remedy="it is a probability, and 0 is none"),
    "stem": Rule(choices=("paper", "small"), remedy="'small' is for images of about 32 × 32"),
    "aux": Rule(choices=(False, True), remedy="True adds the heads that help in training"),
    "size": Rule(low=8, remedy="it is the height and width of the images, in pixels"),
    "stride": Rule(low=1, high=4, remedy="2 makes the work a quarter"),
    "layers": Rule(low=1, high=100, remedy="a network has some layers, and not hundreds"),
}
"""The options that several networks share."""

_NETS: dict[str, Callable[..., nn.Module]] = {}
_RULES: dict[str, Mapping[str, Rule]] = {}


def architecture(**rules: Rule) -> Callable[[Callable[P, N]], Callable[P, N]]:
    """Make a function of keyword options a network of the zoo, under the function's name.

    rules: those of options that it does not share with others, or that differ here. An option is
    of the type of its default. The function then raises ZooError for what its rules do not allow.
    """

    def register(build: Callable[P, N]) -> Callable[P, N]:
        name = build.__name__

        @functools.wraps(build)
        def checked(*args: P.args, **options: P.kwargs) -> N:
            check(name, options)
            return build(*args, **options)

        _NETS[name] = checked
        _RULES[name] = {n: rules.get(n) or OPTIONS[n] for n in defaults(name)}
        return checked

    return register


def defaults(name: str) -> dict[str, Any]:
    """The options of a network, with their defaults. Raises ZooError for an unknown name."""
    if name not in _NETS:
        raise ZooError(f"the zoo has no network {name!r}{did_you_mean(name, _NETS, count=3)}")
    return {n: p.default for n, p in inspect.signature(_NETS[name]).parameters.items()}


def check(name: str, options: Mapping[str, Any]) -> None:
    """Raise ZooError for an option that the network does not have, or a value out of range."""
    known = defaults(name)
    for option, value in options.items():
        if option not in known:
            raise ZooError(f"{name} has no option {option!r}{did_you_mean(option, known)}")
        kind, rule = type(known[option]), _RULES[name][option]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ZooError(
                f"{name}: {option} must be {kind.__name__}, got {value!r}; {rule.remedy}"
            )
        if not rule.allows(value):
            raise ZooError(f"{name}: {option} must be {rule}, got {value!r}; {rule.remedy}")


def names() -> tuple[str, ...]:
    """The names of all networks.

    >>> [n for n in names() if n.startswith("lenet")]
    ['lenet_300_100', 'lenet_5']
    """
    return tuple(sorted(_NETS))


def create(name: str, **options: Any) -> nn.Module:
    """The network of this name, untrained; `help(taut.zoo.<name>)` tells its options and figures.

    Raises ZooError for an unknown name (with the nearest ones), an unknown option, and a value out
    of range.

    >>> net = create("mobilenet_v1", width=0.5, classes=10, in_channels=1)
    >>> sum(p.numel() for p in net.parameters())
    823434
    """
    check(name, options)
    return _NETS[name](**options)
