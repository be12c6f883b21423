"""Recipes read back what they print, and refuse everything else without running it."""

import sys
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from taut.errors import RecipeError
from taut.recipe import Recipe, describe_range
from taut.recover import Recover
from taut.technique import STEPS, Step, option
from taut.techniques import PruneWeights, ShareValues

# What reads


def test_the_example_of_the_documents() -> None:
    text = (
        "prune_weights(sparsity=0.92) > recover(epochs=8) > "
        "share_values(bits=4) > recover(epochs=4)"
    )
    recipe = Recipe.parse(text)
    assert recipe.steps == (
        PruneWeights(sparsity=0.92),
        Recover(epochs=8),
        ShareValues(bits=4),
        Recover(epochs=4),
    )
    assert str(recipe) == text


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("share_values", (ShareValues(),)),
        ("share_values()", (ShareValues(),)),
        ("  share_values ( bits = 3 )\n", (ShareValues(bits=3),)),
        ("(share_values)", (ShareValues(),)),
        ("prune_weights > recover", (PruneWeights(), Recover())),
        ("prune_weights(\n  sparsity=0.5,\n) > recover", (PruneWeights(sparsity=0.5), Recover())),
        ("prune_weights(sparsity=0)", (PruneWeights(sparsity=0.0),)),
        ("prune_weights(threshold=None)", (PruneWeights(),)),
        ("prune_weights(threshold=+1e-3)", (PruneWeights(threshold=0.001),)),
        ("prune_weights(only='fc*, !fc3')", (PruneWeights(only="fc*, !fc3"),)),
        ('prune_weights(only="a > b")', (PruneWeights(only="a > b"),)),
        ("share_values(bits=0b11)", (ShareValues(bits=3),)),
    ],
)
def test_what_reads(text: str, steps: tuple[Step, ...]) -> None:
    assert Recipe.parse(text).steps == steps


def test_recipes_and_steps_are_taken_as_they_are() -> None:
    recipe = Recipe.parse("share_values")
    assert Recipe.parse(recipe) is recipe
    assert Recipe.parse([PruneWeights(), Recover()]).steps == (PruneWeights(), Recover())
    assert Recipe.parse(recipe.steps) == recipe


def options_of(cls: type[Step]) -> st.SearchStrategy[dict[str, Any]]:
    """Any allowed options of a step, read off its ranges."""
    each: dict[str, st.SearchStrategy[Any]] = {}
    for field in cls.options():
        rule, kind = field.metadata, type(field.default)
        low, high, below = rule["low"], rule["high"], rule["below"]
        if rule["choices"]:
            each[field.name] = st.sampled_from(rule["choices"])
        elif kind is str:
            each[field.name] = st.text()
        elif kind is int:
            each[field.name] = st.integers(low, high)
        else:
            top = high if high is not None else below
            each[field.name] = st.floats(
                low, top, exclude_max=below is not None, allow_nan=False, allow_infinity=False
            )
            if field.default is None:
                each[field.name] |= st.none()
    return st.fixed_dictionaries({}, optional=each)


@st.composite
def any_step(draw: st.DrawFn) -> Step:
    cls = STEPS[draw(st.sampled_from(sorted(STEPS)))]
    try:
        return cls(**draw(options_of(cls)))
    except RecipeError:  # options that are allowed alone, and not together
        reject()


@given(st.lists(any_step(), min_size=1, max_size=4))
def test_what_is_printed_reads_back(steps: list[Step]) -> None:
    recipe = Recipe(tuple(steps))
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)


# What is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prune_weight()", "no technique is named 'prune_weight'; did you mean 'prune_weights'?"),
        ("zip()", f"no technique is named 'zip'; known: {', '.join(sorted(STEPS))}"),
        ("share_values(bit=5)", "share_values has no option 'bit'; did you mean 'bits'?"),
        (
            "share_values(x=5)",
            "share_values has no option 'x'; known: bits, init, only, portion, "
            "scope, symmetric, vector, weigh",
        ),
        ("share_values(bits=9)", "share_values: bits must lie in [1, 8], got 9"),
        ("share_values(bits=-1)", "share_values: bits must lie in [1, 8], got -1"),
        ("share_values(bits=5.0)", "share_values: bits must be int, got 5.0"),
        ("share_values(bits=True)", "share_values: bits must be int, got True"),
        ("share_values(bits='5')", "share_values: bits must be int, got '5'"),
        ("share_values(init='linaer')", "init has no choice 'linaer'; did you mean 'linear'?"),
        ("share_values(bits=4, bits=5)", "share_values: bits is given twice"),
        ("prune_weights(sparsity=1e999)", "prune_weights: sparsity must lie in [0, 1), got inf"),
        ("prune_weights(sparsity=92%)", "a recipe is steps joined by '>'"),
        ("prune_weights(threshold=0.1, quality=1)", "threshold and quality are two rules"),
        ("recover() > share_values(bits=0)", "share_values: bits must lie in [1, 8], got 0"),
    ],
)
def test_wrong_names_and_values(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "segment"),
    [
        ("share_values(5)", "share_values(5)"),
        ("share_values(*[5])", "share_values(*[5])"),
        ("share_values > 5", "5"),
        ("share_values() > 'recover()'", "'recover()'"),
        ("techniques.share_values()", "techniques.share_values()"),
        ("share_values()()", "share_values()()"),
        ("share_values() >= recover()", "share_values() >= recover()"),
        ("share_values() > recover() < recover()", "share_values() > recover() < recover()"),
        ("(share_values() > recover()) > recover()", "share_values() > recover()"),
        ("share_values() >> recover()", "share_values() >> recover()"),
        ("share_values(), recover()", "share_values(), recover()"),
        ("[share_values()]", "[share_values()]"),
        ("0.97", "0.97"),
        ("lambda: share_values()", "lambda: share_values()"),
        ("a" + ".b" * 900, "a" + ".b" * 900),
    ],
)
def test_what_is_no_step(text: str, segment: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert str(caught.value) == (
        "a step is a name with named options, like share_values(bits=5), "
        f"got {segment!r} in {text!r}"
    )


@pytest.mark.parametrize(
    "text",
    ["", "   ", ">", "> recover()", "recover() >", "share_values(", "share_values(bits=)",
     "share_values(bits=5", "a b", "x = 1", "import os", "\0", "\ud800",
     "share_values() -> recover()", "(" * 5000, "-" * 100_000 + "1", "a" + ".b" * 50_000,
     "share_values(bits=1\u0660)"],
)  # fmt: skip
def test_junk(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^a recipe is steps joined by '>', like 'prune_weights"):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "value",
    ["4 + 1", "2 ** 2", "int('5')", "bits", "f'{5}'", "[5][0]", "(lambda: 5)()", "5 if 1 else 4",
     "not 0", "5 > 4", "[i for i in 'a']", "(x := 5)", "{[]: 5}", "-" * 600 + "5", "'a' * 9",
     "__import__('os').getpid()"],
)  # fmt: skip
def test_expressions_are_no_values(value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(f"share_values(bits={value})")
    assert str(caught.value).startswith("share_values: bits must be a plain value, got ")
    assert value.strip("()") in str(caught.value)


@pytest.mark.parametrize("given", [[], (), [ShareValues(), "recover()"], 5, None, {}, object()])
def test_other_objects(given: Any) -> None:
    with pytest.raises(RecipeError, match="is text or a sequence of one or more steps, got"):
        Recipe.parse(given)


BAIT = "__import__('sys').modules.update(taut_was_here=True)"
"""An expression whose run would show."""


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "eval({!r})",
        "share_values(bits={})",
        "prune_weights(only={})",
        "share_values(**{})",
        "prune_weights() > {}",
        "{} > prune_weights()",
        "(lambda: {})()",
        "share_values(bits=[{} for _ in '1'][0])",
        "share_values(bits=f'{{{}}}')",
        "share_values() if {} else recover()",
        "@{}",
    ],
)
def test_code_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.parse(text.format(BAIT))
    assert "taut_was_here" not in sys.modules


@given(st.text(max_size=30) | st.from_regex(r"[a-z_]{1,14}\([a-z]{0,9}=?.{0,9}\)( > .{0,9})?"))
def test_any_text_is_a_recipe_or_an_error_of_ours(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except RecipeError:
        return
    assert Recipe.parse(str(recipe)) == recipe


# Ranges in words


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, ""),
        ({"low": 0, "below": 1}, "[0, 1)"),
        ({"low": 1, "high": 8}, "[1, 8]"),
        ({"low": 0}, "[0, inf)"),
        ({"high": 5}, "(-inf, 5]"),
        ({"choices": ("linear", "density")}, "linear | density"),
    ],
)
def test_ranges_in_words(limits: dict[str, Any], said: str) -> None:
    assert describe_range(option(None, **limits).metadata) == said


def test_a_recipe_may_be_broken_over_lines():
    assert str(Recipe.parse("recover(epochs=1)\n  > share_values(bits=3)")) == (
        "recover(epochs=1) > share_values(bits=3)"
    )
