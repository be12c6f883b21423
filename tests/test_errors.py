"""The error tree is the one its docstring draws; a near word is suggested."""

import re

import pytest

import taut
from taut import errors
from taut.errors import TautError, did_you_mean

DRAWN = dict(re.findall(r"^    [├└]── (\w+)\s+(.+)$", errors.__doc__ or "", re.MULTILINE))


def every_subclass(cls: type) -> set[type]:
    below = set(cls.__subclasses__())
    return below.union(*(every_subclass(c) for c in below))


def test_the_tree_is_drawn_as_it_is() -> None:
    assert re.search(r"^    TautError$", errors.__doc__ or "", re.MULTILINE)
    ours = {c for c in every_subclass(TautError) if c.__module__.split(".")[0] == "taut"}
    assert sorted(DRAWN) == sorted(c.__name__ for c in ours)
    assert {c.__base__ for c in ours} == {TautError}
    assert {c.__module__ for c in ours} == {"taut.errors"}


@pytest.mark.parametrize("name", DRAWN)
def test_the_tree_says_what_the_class_says(name: str) -> None:
    said = (getattr(errors, name).__doc__ or "").rstrip(".")
    assert said[0].lower() + said[1:] == DRAWN[name]


@pytest.mark.parametrize("name", ["RecipeError", "GoalError", "FormatError", "ZooError"])
def test_wrong_values_are_value_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), ValueError)


def test_the_root_is_public() -> None:
    assert taut.TautError is TautError


@pytest.mark.parametrize(
    ("word", "choices", "said"),
    [
        ("prune_weight", ["share_values", "prune_weights"], "; did you mean 'prune_weights'?"),
        ("bit", ["bits", "init"], "; did you mean 'bits'?"),
        ("zzz", ["share_values", "prune_weights"], "; known: prune_weights, share_values"),
        ("", ["b", "a"], "; known: a, b"),
        ("a", {"a": 1}, "; did you mean 'a'?"),
    ],
)
def test_did_you_mean(word: str, choices: list[str], said: str) -> None:
    assert did_you_mean(word, choices) == said


def test_several_near_words_are_suggested_where_they_are_asked_for() -> None:
    words = ["net_v1", "net_v2", "other"]
    assert did_you_mean("net_v", words, count=3) == "; did you mean 'net_v2' or 'net_v1'?"
