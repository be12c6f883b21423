"""The errors Taut raises. Each message gives the rule, the value received and the remedy.

Who catches TautError catches them all:

    TautError
    ├── TaskError        a task.py, its data or its loss is not of the form Taut needs
    ├── TraceError       the network cannot be traced
    ├── RecipeError      a recipe, a technique or an option is wrong, or refused for a site
    ├── GoalError        a goal does not parse or contradicts itself
    ├── TrainingError    the loss is no longer a number
    ├── FormatError      a .taut file is damaged, hostile or of another model
    ├── DataError        a data set is not to be had, or is not the one expected
    ├── RunError         a run folder cannot be written or belongs to another run
    ├── ExportError      an engine is missing, lacks an operation, or does not give the same answers
    └── ZooError         the zoo has no such network, or a network no such option or input
"""

import difflib
from collections.abc import Iterable


class TautError(Exception):
    """Every error that Taut raises on purpose."""


class TaskError(TautError):
    """A task.py, its data or its loss is not of the form Taut needs."""


class TraceError(TautError):
    """The network cannot be traced."""


class RecipeError(TautError, ValueError):
    """A recipe, a technique or an option is wrong, or refused for a site."""


class GoalError(TautError, ValueError):
    """A goal does not parse or contradicts itself."""


class TrainingError(TautError):
    """The loss is no longer a number."""


class FormatError(TautError, ValueError):
    """A .taut file is damaged, hostile or of another model."""


class DataError(TautError):
    """A data set is not to be had, or is not the one expected."""


class RunError(TautError):
    """A run folder cannot be written or belongs to another run."""


class ExportError(TautError):
    """An engine is missing, lacks an operation, or does not give the same answers."""


class ZooError(TautError, ValueError):
    """The zoo has no such network, or a network no such option or input."""


def did_you_mean(word: str, choices: Iterable[str], count: int = 1) -> str:
    """`; did you mean 'x'?` for the nearest choices, `count` at most; else the list of choices.

    >>> did_you_mean("prune_weight", ["prune_weights", "share_values"])
    "; did you mean 'prune_weights'?"
    """
    known = sorted(choices)
    near = difflib.get_close_matches(word, known, n=count)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; known: {', '.join(known)}"
