"""Options are checked when a step is made; patterns choose the sites; names are registered once."""

import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from taut.errors import RecipeError
from taut.recover import Recover
from taut.statistics import Statistics
from taut.technique import STEPS, Step, Technique, interval, option, register_step, techniques
from taut.techniques import PruneWeights, ShareValues
from taut.trace import Trace
from taut.types import Cost, Site


@dataclass(frozen=True, kw_only=True)
class Sample(Step):
    """One option of each kind."""

    name = "sample"
    count: int = option(2, low=1, high=8)
    fraction: float = option(0.5, low=0, below=1)
    depth: float = option(-1.0, below=0)
    rate: float | None = option(None, low=0)
    shift: float = option(0.0)
    way: str = option("linear", choices=("linear", "density"))
    deep: bool = option(False)
    word: str = option("any")


@dataclass(frozen=True, kw_only=True)
class Nothing(Technique):
    """Leaves every site as it is."""

    name = "nothing"

    def predict(self, site: Site) -> Cost:
        return Cost(size_bytes=0.0, macs=0.0)

    def apply(self, model: nn.Module, site: Site, statistics: Statistics | None = None) -> None:
        return None


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 9}, "sample: count must lie in [1, 8], got 9"),
        ({"count": 0}, "sample: count must lie in [1, 8], got 0"),
        ({"count": 10**400}, "sample: count must lie in [1, 8], got 1000"),
        ({"fraction": 1.0}, "sample: fraction must lie in [0, 1), got 1.0"),
        ({"fraction": -1e-9}, "sample: fraction must lie in [0, 1), got -1e-09"),
        ({"fraction": 1}, "sample: fraction must lie in [0, 1), got 1.0"),
        ({"fraction": math.nan}, "sample: fraction must lie in [0, 1), got nan"),
        ({"depth": 0.0}, "sample: depth must lie in (-inf, 0), got 0.0"),
        ({"rate": -1.0}, "sample: rate must lie in [0, inf), got -1.0"),
        ({"rate": math.inf}, "sample: rate must lie in [0, inf), got inf"),
        ({"shift": -math.inf}, "sample: shift must lie in (-inf, inf), got -inf"),
        ({"way": "linaer"}, "sample: way has no choice 'linaer'; did you mean 'linear'?"),
        ({"way": "x"}, "sample: way has no choice 'x'; known: density, linear"),
    ],
)
def test_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Sample(**options)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("count", 2.0, "int"),
        ("count", True, "int"),
        ("count", "2", "int"),
        ("count", None, "int"),
        ("count", [2], "int"),
        ("count", 2j, "int"),
        ("count", b"2", "int"),
        ("count", ..., "int"),
        ("fraction", True, "float"),
        ("fraction", "0.5", "float"),
        ("fraction", (0.5,), "float"),
        ("fraction", None, "float"),
        ("fraction", {}, "float"),
        ("fraction", 10**400, "float"),
        ("rate", "none", "float or None"),
        ("rate", False, "float or None"),
        ("way", 1, "str"),
        ("way", None, "str"),
        ("deep", 1, "bool"),
        ("deep", "yes", "bool"),
        ("word", b"any", "str"),
    ],
)
def test_wrong_type(name: str, value: Any, kind: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Sample(**{name: value})
    assert str(caught.value) == f"sample: {name} must be {kind}, got {value!r}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", 1), ("count", 8), ("fraction", 0.0), ("fraction", 0.999), ("rate", None),
     ("rate", 0.0), ("rate", 1e300), ("depth", -5.0), ("way", "density"), ("deep", True)],
)  # fmt: skip
def test_edges_are_inside(name: str, value: Any) -> None:
    assert getattr(Sample(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [("fraction", 0), ("rate", 3), ("shift", -(2**100))])
def test_whole_numbers_become_floats(name: str, value: int) -> None:
    made = getattr(Sample(**{name: value}), name)
    assert type(made) is float
    assert made == value


def test_options_are_frozen_and_named() -> None:
    with pytest.raises(FrozenInstanceError):
        Sample().count = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Sample(3)  # type: ignore[misc]
    with pytest.raises(TypeError, match="colour"):
        Sample(colour=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Sample(), "sample()"),
        (Sample(count=2, fraction=0.25), "sample(fraction=0.25)"),
        (Sample(rate=0, way="density", deep=True), "sample(rate=0.0, way='density', deep=True)"),
        (PruneWeights(threshold=1e-5), "prune_weights(threshold=1e-05)"),
    ],
)
def test_text_names_what_differs_from_the_defaults(step: Step, text: str) -> None:
    assert str(step) == text


def test_two_rules_for_one_thing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"threshold=0\.1 and quality=1\.0; give one"):
        PruneWeights(threshold=0.1, quality=1)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_default_is_allowed_and_every_option_explained(name: str) -> None:
    cls = STEPS[name]
    assert str(cls()) == f"{name}()"
    assert 0 < len(cls.options()) <= 8
    for field in cls.options():
        limits = [field.metadata[k] for k in ("low", "high", "below")]
        said = field.metadata["help"] or field.metadata["unit"] or limits != [None] * 3
        assert said, f"{name}.{field.name} has no help"


@given(st.floats(allow_nan=True), st.integers())
def test_what_lies_in_the_interval_is_accepted(fraction: float, count: int) -> None:
    if 0 <= fraction < 1 and 1 <= count <= 8:
        assert Sample(fraction=fraction, count=count).fraction == fraction
    else:
        with pytest.raises(RecipeError, match="must lie in"):
            Sample(fraction=fraction, count=count)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, "(-inf, inf)"),
        ({"low": 0}, "[0, inf)"),
        ({"high": 1}, "(-inf, 1]"),
        ({"low": 0.1, "high": 100}, "[0.1, 100]"),
        ({"below": 0}, "(-inf, 0)"),
    ],
)
def test_interval(limits: dict[str, float], said: str) -> None:
    rule: Any = option(0, **limits)
    assert interval(rule.metadata) == said


# Sites


def site(name: str, *aliases: str) -> Site:
    return Site(name=name, kind="linear", shape=(2, 2), macs=4, aliases=aliases)


TRACE = Trace(
    sites=(
        site("conv1.weight"),
        site("encoder.0.weight"),
        site("encoder.embedding.weight", "head.weight"),
        site("rnn.weight_ih_l0"),
        site("rnn.weight_hh_l0"),
    ),
    parameters=20,
    macs=20,
    feeds=(),
    dropouts={},
    example=((), {}),
)


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("*", ["conv1", "encoder.0", "encoder.embedding", "rnn", "rnn"]),
        ("conv1", ["conv1"]),
        ("conv1.weight", ["conv1"]),
        ("encoder", ["encoder.0", "encoder.embedding"]),
        ("encoder.*, !*embedding*", ["encoder.0"]),
        ("!encoder", ["conv1", "rnn", "rnn"]),
        ("! encoder , !rnn", ["conv1"]),
        ("conv1,rnn.weight_hh*", ["conv1", "rnn"]),
        ("head", ["encoder.embedding"]),
        ("!head", ["conv1", "encoder.0", "rnn", "rnn"]),
        ("conv?", ["conv1"]),
        ("encoder.[0-9]*", ["encoder.0"]),
    ],
)
def test_only_chooses_sites(only: str, names: list[str]) -> None:
    chosen = Nothing(only=only).sites(TRACE)
    assert [s.name.rpartition(".")[0] for s in chosen] == names


@pytest.mark.parametrize("only", ["conv", "Conv1", "", "!*", "conv1, !conv1", "weight"])
def test_no_site_left(only: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Nothing(only=only).sites(TRACE)
    known = "conv1.weight, encoder.0.weight, encoder.embedding.weight, rnn.weight_ih_l0, "
    assert str(caught.value) == (
        f"nothing: only={only!r} matches no site; known: {known}rnn.weight_hh_l0"
    )


def test_by_default_every_site_gets_the_technique_itself() -> None:
    model = nn.Linear(2, 2)
    technique = Nothing()
    local = technique.localise(model, TRACE.sites, Statistics(model))
    assert list(local) == [s.name for s in TRACE.sites]
    assert all(t is technique for t in local.values())
    assert technique.finish(model, TRACE) == []


# Registration


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Step]]:
    """A copy of the registry, which a test may change."""
    copied = dict(STEPS)
    monkeypatch.setattr("taut.technique.STEPS", copied)
    return copied


def test_steps_are_registered_under_snake_case(registry: dict[str, type[Step]]) -> None:
    @register_step
    @dataclass(frozen=True, kw_only=True)
    class DropEveryThird(Nothing):
        """A name of three words."""

    assert registry["drop_every_third"] is DropEveryThird
    assert DropEveryThird.name == "drop_every_third"
    assert str(DropEveryThird(only="a")) == "drop_every_third(only='a')"
    assert techniques()["drop_every_third"] is DropEveryThird


def test_two_steps_of_one_name_are_refused(registry: dict[str, type[Step]]) -> None:
    with pytest.raises(RecipeError, match="two steps are named 'share_values'; rename one"):
        register_step(type("ShareValues", (Nothing,), {}))
    assert registry["share_values"] is ShareValues


def test_options_must_be_declared_as_such(registry: dict[str, type[Step]]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Plain(Nothing):
        """Its option has no range."""

        bits: int = 4

    with pytest.raises(RecipeError, match=r"plain: bits must be declared by option\(default"):
        register_step(Plain)
    assert "plain" not in registry


def test_recover_is_a_step_but_no_technique() -> None:
    assert STEPS["recover"] is Recover
    assert set(STEPS) - set(techniques()) == {"distillation", "recover", "regularise", "training"}
    assert not issubclass(Recover, Technique)
