"""What a search may try: recipes by a small grammar, strengths as techniques' options give them.

    recipe   = [reshape > [recover >]] recode [> [recover >] recode] > recover
    strength = the first bounded number among a technique's options that its predicted bytes follow

A number with lowest and highest value a, b and default d is searched where it makes a difference:

    whole numbers            a ... b
    a > 0, b/a > 100         evenly in log x
    else, u = (x-a)/(b-a)    evenly in log(u/(1-u)), up to 3 around the default's

so that sparsities crowd near 1 and shares near 0. A technique without such a number is searched by
its first choice of words; one whose forms tell what they take in the file, by the `aim` that steers
it. No technique is known here by name: one that registers itself is searched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_type_hints

import torch

from taut.aim import Aim
from taut.errors import TautError
from taut.plan import check
from taut.recipe import Recipe
from taut.recoding import Form, Recoding
from taut.recover import Recover
from taut.reshaping import Reshaping
from taut.technique import Setting, Step, Technique, matches, techniques
from taut.trace import Trace
from taut.types import Site

Scale = Literal["whole", "log", "logit", "words"]
NOTHING = "nothing"
_MOST_WORDS = 8  # choices among more than these are no strength but a catalogue
_AROUND = 3.0  # logits on either side of the default
_TRIED = 24  # places in a knob's range where it is asked what goes
_EDGE = 0.005  # how near to the end of a range a share may come
_AIMS = (0.002, 0.4)  # the file's bytes, as shares of the original's


class Suggests(Protocol):
    """What chooses values: an Optuna trial, or a fixed assignment."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One option that a search turns. low, high: of what is sampled, in the scale's own terms.

    start, width: where logits stand for x = start + width / (1 + exp(-logit)).
    """

    step: str
    option: str
    scale: Scale
    low: float = 0.0
    high: float = 0.0
    start: float = 0.0
    width: float = 1.0
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the study calls it, like `prune_weights.sparsity (logit)`."""
        return f"{self.step}.{self.option}" + (" (logit)" if self.scale == "logit" else "")

    def suggest(self, trial: Suggests) -> Any:
        """A value for the option."""
        if self.scale == "words":
            return trial.suggest_categorical(self.name, self.words)
        if self.scale == "whole":
            many = self.low > 0 and self.high / self.low > 100
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=many)
        return self.value(
            trial.suggest_float(self.name, self.low, self.high, log=self.scale == "log")
        )

    def value(self, sampled: float) -> float:
        """What the option gets for a sample, rounded to what a recipe can be read by.

        >>> Knob(step="", option="", scale="logit", low=-1, high=5).value(2.2)
        0.9002
        """
        if self.scale != "logit":
            return sampled if isinstance(sampled, int) else _rounded(sampled)
        share = 1 / (1 + math.exp(-sampled))
        near = self.width * min(share, 1 - share)  # to the nearest end, of which three digits count
        return round(self.start + self.width * share, 2 - math.floor(math.log10(near)))

    def sample(self, value: float) -> Any:
        """What has to be sampled for a value, or for the end that is nearest to it.

        >>> Knob(step="", option="", scale="log", low=1, high=100).sample(1000)
        100
        """
        if self.scale == "logit":
            share = min(max((value - self.start) / self.width, 1e-9), 1 - 1e-9)
            value = math.log(share / (1 - share))
        return min(max(value, self.low), self.high)

    def at(self, share: float) -> Any:
        """The sample that lies so far between the ends, from 0 to 1.

        >>> Knob(step="", option="", scale="log", low=1, high=100).at(1.0)
        100
        """
        if self.scale == "words":
            return self.words[round(share * (len(self.words) - 1))]
        low, high = (math.log(v) if self._log else v for v in (self.low, self.high))
        found = low + share * (high - low)
        found = min(max(math.exp(found), self.low), self.high) if self._log else found
        return round(found) if self.scale == "whole" else found

    def share(self, sample: Any) -> float:
        """How far between the ends a sample lies: what `at` gives back.

        >>> Knob(step="", option="", scale="log", low=1, high=100).share(10)
        0.5
        """
        if self.scale == "words":
            return self.words.index(sample) / max(len(self.words) - 1, 1)
        ends = (self.low, self.high, sample)
        low, high, found = (math.log(v) if self._log else v for v in ends)
        return (found - low) / (high - low) if high > low else 1.0

    def spread(self, count: int) -> list[Any]:
        """Samples from end to end, `count` at most."""
        if self.scale == "words":
            return list(self.words[:count])
        shares = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
        return list(dict.fromkeys(self.at(share) for share in shares))

    def narrowed(self, fine: Callable[[Any], bool]) -> Knob:
        """The knob between the first and the last of a few values that are fine, if any is.

        fine: whether the option may have a value. Where both ends may, nothing else is asked.
        """
        if self.scale == "words":
            return replace(self, words=tuple(filter(fine, self.words)) or self.words)
        if all(fine(self.value(self.at(end))) for end in (0, 1)):
            return self
        shares = [i / _TRIED for i in range(_TRIED + 1)]
        good = [s for s in shares if fine(self.value(self.at(s)))]
        return replace(self, low=self.at(good[0]), high=self.at(good[-1])) if good else self

    @property
    def _log(self) -> bool:
        return self.scale == "log" or (
            self.scale == "whole" and self.low > 0 and self.high / self.low > 100
        )


def strength(cls: type[Step], site: Site | None = None) -> Knob | None:
    """The option that says how strongly a technique works; None where it has none.

    site: of the network, on which the prediction is asked. See the module.
    """
    hints = get_type_hints(cls)
    numbers = [
        f for f in cls.options()
        if hints[f.name] in (int, float) and f.metadata["low"] is not None
        and (f.metadata["high"] is not None or f.metadata["below"] is not None)
    ]  # fmt: skip
    moving = [f for f in numbers if site is not None and _moves(cls, f.name, site)]
    for f in moving or numbers:
        knob = _number(cls.name, f.name, f.metadata, f.default, whole=hints[f.name] is int)
        return _taken(cls, knob) if knob.scale == "whole" else knob
    for f in cls.options():
        if 1 < len(f.metadata["choices"]) <= _MOST_WORDS:
            return Knob(step=cls.name, option=f.name, scale="words", words=f.metadata["choices"])
    return None


def _number(step: str, option: str, rule: Mapping[str, Any], default: Any, whole: bool) -> Knob:
    low = rule["low"]
    high = rule["high"] if rule["high"] is not None else rule["below"]
    if whole:
        high = high if rule["high"] is not None else high - 1
        return Knob(step=step, option=option, scale="whole", low=low, high=high)
    if low > 0 and high / low > 100:
        high = high if rule["high"] is not None else high - _EDGE * (high - low)
        return Knob(step=step, option=option, scale="log", low=low, high=high)
    share = min(max((default - low) / (high - low), _EDGE), 1 - _EDGE)
    edge, middle = math.log((1 - _EDGE) / _EDGE), math.log(share / (1 - share))
    return Knob(
        step=step, option=option, scale="logit", low=max(middle - _AROUND, -edge),
        high=min(middle + _AROUND, edge), start=low, width=high - low,
    )  # fmt: skip


def _taken(cls: type[Step], knob: Knob) -> Knob:
    """The whole numbers that the technique takes while its other options are the defaults."""

    def fine(value: int) -> bool:
        try:
            cls(**{knob.option: value})
        except TautError:
            return False
        return True

    taken = [
        v for v in range(int(knob.low), min(int(knob.high), int(knob.low) + 64) + 1) if fine(v)
    ]
    if not taken or knob.high - knob.low > 64:
        return knob
    return replace(knob, low=taken[0], high=taken[-1])


def _moves(cls: type[Step], option: str, site: Site) -> bool:
    """Whether the predicted bytes of a site follow an option."""
    rule = next(f for f in cls.options() if f.name == option)
    knob = _number("", "", rule.metadata, rule.default, whole=type(rule.default) is int)
    found = set()
    for sample in knob.spread(5):
        try:
            made = cls(**{option: knob.value(sample)})
            if isinstance(made, Recoding):
                made.check(site, site.shape, masked=False)
            if isinstance(made, Technique):
                found.add(made.predict(site).size_bytes)
        except TautError:  # not every number of a range goes with the other options
            continue
    return len(found) > 1


def tells_its_bytes(technique: Technique, shape: tuple[int, ...]) -> bool:
    """Whether training can steer what the technique takes in the file."""
    if not isinstance(technique, Recoding):
        return False
    form, _ = technique.blank(torch.zeros(()).expand(shape))
    return type(form).rate is not Form.rate


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be tried. shapes: recipes by the names of their techniques, in two parts.

    reshape: one name or `nothing`; recode: one or two joined by ` > `, or `nothing`. knobs: by
    technique; aims: the techniques that an aim steers; settings: those that every recipe starts by.
    flat: whether every knob is always turned, as some samplers need it.
    """

    reshape: tuple[str, ...]
    recode: tuple[str, ...]
    knobs: Mapping[str, Knob]
    aims: frozenset[str]
    aim: Knob
    settings: tuple[Setting, ...] = ()
    flat: bool = False

    def suggest(self, trial: Suggests, epochs: int) -> Recipe:
        """The next recipe, of so many epochs in all. Raises TautError for a wrong mix."""
        reshape = trial.suggest_categorical("reshape", self.reshape)
        recode = trial.suggest_categorical("recode", self.recode)
        names = [n for n in (reshape, *recode.split(" > ")) if n != NOTHING]
        turned = list(self.knobs) if self.flat else names
        values = {n: self.knobs[n].suggest(trial) for n in turned if n in self.knobs}
        aimed = bool(self.aims.intersection(names))
        aim = int(self.aim.suggest(trial)) if aimed or (self.flat and self.aims) else 0
        return self.recipe(names, values, aim if aimed else 0, epochs)

    def text(self, given: Mapping[str, Any], epochs: int) -> str:
        """The recipe of a study's parameters; empty where these strengths do not go together."""
        try:
            return str(replace(self, flat=False).suggest(Fixed(given), epochs))
        except TautError:
            return ""

    def recipe(
        self, names: Sequence[str], values: Mapping[str, Any], aim: int, epochs: int
    ) -> Recipe:
        """The techniques in order, a third of the training before the last of several."""
        known = techniques()
        steps: list[Step] = list(self.settings)
        before = epochs // 3 if len(names) > 1 else 0
        for i, name in enumerate(names):
            if before and i == len(names) - 1:
                steps.append(Recover(epochs=before))
            knob = self.knobs.get(name)
            steps.append(known[name](**({knob.option: values[name]} if knob else {})))
        if aim:
            steps.append(Aim(size_bytes=aim))
        return Recipe((*steps, Recover(epochs=epochs - before)))

    def grid(self, count: int) -> Iterator[dict[str, Any]]:
        """Every mix with `count` values of each strength at most, as a study's parameters."""
        for reshape, recode in itertools.product(self.reshape, self.recode):
            names = [n for n in (reshape, *recode.split(" > ")) if n != NOTHING]
            knobs = [self.knobs[n] for n in names if n in self.knobs]
            if self.aims.intersection(names):
                knobs.append(self.aim)
            for values in itertools.product(*(k.spread(count) for k in knobs)):
                named = {k.name: v for k, v in zip(knobs, values, strict=True)}
                if names:
                    yield {"reshape": reshape, "recode": recode, **named}


class Fixed:
    """Suggests what it was given, for looking at a mix without a study."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        return self.values[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self.values[name])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self.values[name])


def chosen(only: str) -> dict[str, type[Technique]]:
    """The registered techniques that a text of patterns names, as in `*, !student`."""
    return {n: c for n, c in techniques().items() if matches(only, (n,))}


def fitting(cls: type[Technique], trace: Trace) -> Knob | None:
    """The strength of a technique, as far as it goes on every site of a network that it takes."""
    knob = strength(cls, max(trace.sites, key=lambda s: s.numel))

    def fine(value: Any) -> bool:
        try:
            check(Recipe((cls(**{knob.option: value}),)), trace)  # type: ignore[union-attr]
        except TautError:
            return False
        return True

    return None if knob is None else knob.narrowed(fine)


def knobs_of(
    named: Iterable[type[Technique]], trace: Trace
) -> tuple[dict[str, Knob], frozenset[str]]:
    """The strength of each technique that has one, and which of them an aim steers."""
    site = max(trace.sites, key=lambda s: s.numel)
    knobs: dict[str, Knob] = {}
    aims = set()
    for cls in named:
        try:
            steered = tells_its_bytes(cls(), site.shape)
        except TautError:
            steered = False
        if steered:
            aims.add(cls.name)
        elif (knob := fitting(cls, trace)) is not None and issubclass(cls, Recoding | Reshaping):
            knobs[cls.name] = knob
    return knobs, frozenset(aims)


def aim_knob(original_bytes: int, bound: float = math.inf) -> Knob:
    """What files may be aimed at: between shares of the original's bytes, and within a bound."""
    low, high = (max(1, round(share * original_bytes)) for share in _AIMS)
    high = max(2, min(high, math.floor(0.97 * bound) if math.isfinite(bound) else high))
    low = min(low, max(1, high // 4))
    return Knob(step="aim", option="size_bytes", scale="log", low=low, high=high)


def _rounded(value: float) -> float:
    """To three digits."""
    return float(f"{value:.3g}")
