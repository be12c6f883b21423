"""Recipes: steps in order, as text and as objects.

As text they read

    prune_weights(sparsity=0.92) > recover(epochs=8) > share_values(bits=5) > recover(epochs=4)
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taut.errors import RecipeError, did_you_mean
from taut.technique import STEPS, Setting, Step, interval


@dataclass(frozen=True)
class Recipe:
    """Steps in the order in which they are taken. `str()` gives text that `parse` reads back."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " > ".join(str(s) for s in self.steps)

    def settings(self, step: int) -> tuple[Setting, ...]:
        """Those in force at a step: the last one of each name before it."""
        return tuple({s.name: s for s in self.steps[:step] if isinstance(s, Setting)}.values())

    @classmethod
    def parse(cls, text: str | Recipe | Sequence[Step]) -> Recipe:
        """Read a recipe's text; recipes and sequences of steps are taken as they are.

        Raises RecipeError for what is no recipe, an unknown step or option (with the nearest
        known one), and a value out of range.
        """
        if isinstance(text, Recipe):
            return text
        if not isinstance(text, str):
            return cls(_steps(text))
        text = text.strip()
        try:
            tree = ast.parse(text.replace("\n", " "), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise RecipeError(
                f"a recipe is steps joined by '>', like 'prune_weights(sparsity=0.9) > "
                f"recover(epochs=3)', got {text!r} ({error})"
            ) from error
        nodes = [tree]
        if isinstance(tree, ast.Compare) and all(isinstance(o, ast.Gt) for o in tree.ops):
            nodes = [tree.left, *tree.comparators]
        return cls(tuple(_step(node, text) for node in nodes))


def _steps(given: Any) -> tuple[Step, ...]:
    steps = tuple(given) if isinstance(given, Sequence) else (given,)
    if not steps or not all(isinstance(s, Step) for s in steps):
        raise RecipeError(f"a recipe is text or a sequence of one or more steps, got {given!r}")
    return steps


def _step(node: ast.expr, text: str) -> Step:
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise RecipeError(
            f"a step is a name with named options, like share_values(bits=5), got "
            f"{ast.get_source_segment(text, node)!r} in {text!r}"
        )
    name = node.func.id
    if name not in STEPS:
        raise RecipeError(f"no technique is named {name!r}{did_you_mean(name, STEPS)}")
    cls = STEPS[name]
    known = [f.name for f in cls.options()]
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg not in known:
            near = did_you_mean(str(keyword.arg), known)
            raise RecipeError(f"{name} has no option {keyword.arg!r}{near}")
        if keyword.arg in options:
            raise RecipeError(f"{name}: {keyword.arg} is given twice in {text!r}")
        try:
            options[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError) as error:
            raise RecipeError(
                f"{name}: {keyword.arg} must be a plain value, got "
                f"{ast.get_source_segment(text, keyword.value)!r}"
            ) from error
    return cls(**options)


def describe_range(rule: Any) -> str:
    """An option's range in words, for tables: `[0, 1)`, `linear | density`, or nothing."""
    if rule["choices"]:
        return " | ".join(rule["choices"])
    return "" if all(rule[k] is None for k in ("low", "high", "below")) else interval(rule)
