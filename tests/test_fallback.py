"""Falling back to floats: the most damaging layers first, until the bound holds."""

import pytest
import torch

import taut
from taut.errors import GoalError, RecipeError
from taut.fallback import fall_back


@pytest.fixture
def spoilt(trained):
    """The small network with a second layer of which 2 bits leave nothing: one weight is huge."""
    with torch.no_grad():
        trained[3].weight[:, 0] *= 1000
        trained[0].weight[0] /= 1000
        trained[0].bias[0] /= 1000
    return trained


def test_the_most_damaging_layer_goes_back_first(spoilt, task):
    found = fall_back(spoilt, task, "quantize(bits=3, per='tensor', ranges='minmax')", "score>=-3%")
    assert found.left[0] == "3.weight" == max(found.damages, key=found.damages.get)
    assert set(found.damages) == {"0.weight", "3.weight", "5.weight"}
    assert found.scores[0] < 0.97 * found.original <= found.scores[-1]
    assert len(found.scores) == len(found.left) + 1
    assert str(found.recipe).count("!") == len(found.left)
    net = taut.apply(spoilt, found.recipe.steps[0], task)
    assert task.evaluate(net, "validation") == found.scores[-1]


def test_what_holds_at_once_is_left_as_it_is(trained, task):
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    found = fall_back(trained, task, "quantize()", "score>=-2%")
    assert (found.left, found.damages, str(found.recipe)) == ((), {}, "quantize()")
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_what_no_fallback_mends_is_refused(spoilt, task):
    with pytest.raises(RecipeError, match=r"does not hold even with .* alone recoded"):
        fall_back(spoilt, task, "quantize(bits=2, per='tensor', ranges='minmax')", "score>=2")


@pytest.mark.parametrize("recipe", ["quantize() > recover(epochs=1)", "fold_norms()"])
def test_recipes_that_train_or_recode_nothing(trained, task, recipe):
    with pytest.raises(RecipeError, match="must recode weights and not train, got"):
        fall_back(trained, task, recipe)


def test_bounds_of_something_else(trained, task):
    with pytest.raises(GoalError, match="must be one of the score, got 'bytes<=5%'"):
        fall_back(trained, task, "quantize()", "bytes<=5%")
