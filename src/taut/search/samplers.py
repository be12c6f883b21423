"""Who proposes the next recipe: Optuna's samplers, one freshly seeded for every trial.

A sampler's choice then follows from the seed, the trial's number and what the study holds, and from
nothing else: a search that was killed and goes on chooses as if it had never stopped.
"""

from __future__ import annotations

import importlib.util
import warnings

import optuna
from optuna.samplers import BaseSampler

from taut.errors import SearchError, did_you_mean

SAMPLERS = ("tpe", "gp", "nsga2", "nsga3", "random", "grid")
BAYESIAN = ("tpe", "gp")
"""Those that model what recipes come to."""
FLAT = ("gp", "nsga2", "nsga3")
"""Those that learn only from strengths that every trial has."""


def check_sampler(name: str) -> None:
    """Raise SearchError for a sampler that there is not, or whose library is missing."""
    if name not in SAMPLERS:
        raise SearchError(f"search: no sampler is named {name!r}{did_you_mean(name, SAMPLERS)}")
    if name == "gp" and importlib.util.find_spec("scipy") is None:
        raise SearchError("search: sampler gp needs scipy: pip install 'taut[scipy]'; or take tpe")


def sampler(name: str, seed: int, number: int, population: int = 16) -> BaseSampler:
    """The sampler that proposes trial `number`.

    tpe: tree-structured Parzen estimators, several objectives (Ozaki et al., GECCO 2020). gp:
    Gaussian processes with expected hypervolume improvement. nsga2, nsga3: Deb et al. (2002; Deb
    and Jain 2014), of populations of 16. random; and grid, whose trials wait in the study already.
    All but random and grid keep the goal's bounds as constraints.
    """
    own = (1_000_003 * seed + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=own, multivariate=True, group=True)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=own, warn_independent_sampling=False)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=own, population_size=population)
        if name == "nsga3":
            return optuna.samplers.NSGAIIISampler(seed=own, population_size=population)
        return optuna.samplers.RandomSampler(seed=own)
