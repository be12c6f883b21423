"""Two finished runs whose reports the tests read: by a recipe, and to a goal."""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import taut

RECIPE = (
    "prune_weights(sparsity=0.8, scope='layer') > recover(epochs=2) > share_values(bits=4) > "
    "recover(epochs=1)"
)
HOSTILE = "</script><b>bold & brash</b>"
Batches = list[tuple[Tensor, Tensor]]
Run = tuple[taut.Result, nn.Module]


def digits() -> dict[str, Batches]:
    """Scikit-learn's digits in batches."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32) / 16
    y = torch.tensor(labels)
    pairs = list(zip(x.split(100), y.split(100), strict=True))
    return {"train": pairs[:12], "test": pairs[12:]}


def network(seed: int = 0) -> nn.Module:
    """64-32-10, untrained."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def by_recipe(folder: Path) -> Run:
    """A recipe, with no validation data and a task of a hostile name."""
    task, model = taut.Task(**digits(), name=f"digits {HOSTILE}"), network()
    return taut.compress(model, task, RECIPE, folder=folder), model


def to_a_goal(folder: Path) -> Run:
    """A goal on a score of which less is better, with several candidates."""
    data, loss = digits(), nn.functional.cross_entropy
    task = taut.Task(**data, validation=data["test"], score=loss, better="lower")
    goal, model = "bytes<=15%, score<=+1%, latency<=1%", network(1)
    return taut.compress(model, task, goal, folder=folder, epochs=2, trials=2), model
