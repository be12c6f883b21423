"""What the tests share: real digits, a small trained network, and its task."""

import functools
import textwrap
from pathlib import Path

import hypothesis
import pytest
import runs
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.benchmark import Timer

import taut
from taut.data import Batches
from taut.errors import ExportError
from taut.kernels.openvino import extension

# One thread is fastest for nets this small, and leaves the other cores to whoever else runs.
torch.set_num_threads(1)

# Examples that take long on a busy machine are no failures.
hypothesis.settings.register_profile("taut", deadline=None)
hypothesis.settings.load_profile("taut")


def small_net():
    """64-48-32-10, for scikit-learn's 8 × 8 digits."""
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.2), nn.Linear(48, 32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


@functools.cache
def _digits():
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def digits_task(**changes):
    """1,200 digits to train on, 200 to choose by, 397 to test on."""
    x, y = _digits()
    options = {
        "train": Batches(x[:1200], y[:1200], 64, shuffle=True),
        "validation": Batches(x[1200:1400], y[1200:1400], 200),
        "test": Batches(x[1400:], y[1400:], 397),
        "name": "digits",
    }
    return taut.Task(**{**options, **changes})


@functools.cache
def _trained_state():
    torch.manual_seed(0)
    net = small_net()
    taut.recover(net, digits_task(), taut.Recover(epochs=12, learning_rate=5e-3, distill=0.0))
    return net.state_dict()


@pytest.fixture
def task():
    return digits_task()


@pytest.fixture
def trained():
    """A small network that knows its digits (about 95 %)."""
    net = small_net()
    net.load_state_dict(_trained_state())
    return net.eval()


@pytest.fixture(autouse=True)
def _the_same_random_numbers_in_every_test():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _latencies_are_brief():
    """No test asks how long something takes: a fiftieth of a second is timed, not a quarter."""
    whole = Timer.blocked_autorange

    def brief(timer, callback=None, min_run_time=0.2):
        return whole(timer, callback, min(min_run_time, 0.02))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Timer, "blocked_autorange", brief)
        yield


@pytest.fixture(scope="session")
def recipe_run(tmp_path_factory):
    """A finished run by a recipe and its original, for all who read what it left."""
    return runs.by_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def goal_run(tmp_path_factory):
    """The same, to a goal that is not met."""
    return runs.to_a_goal(tmp_path_factory.mktemp("goal"))


@pytest.fixture(scope="session")
def library():
    """The library of Taut's operations in OpenVINO, compiled once."""
    pytest.importorskip("openvino")
    try:
        return extension()
    except ExportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def core(library):
    """OpenVINO with Taut's operations."""
    found = pytest.importorskip("openvino").Core()
    found.add_extension(str(library))
    found.set_property("CPU", {"INFERENCE_NUM_THREADS": 1})
    return found


TASK = """
    import sys
    sys.path.insert(0, {tests!r})
    import conftest, torch
    task = conftest.digits_task()
    train, validation, test = (lambda s=s: task._data[s] for s in ("train", "validation", "test"))
    def model():
        net = conftest.small_net()
        net.load_state_dict(torch.load({weights!r}, weights_only=True))
        return net
"""


@pytest.fixture
def task_file(trained, tmp_path):
    """A task.py of the small network, as a user would write it."""
    weights = tmp_path / "weights.pt"
    torch.save(trained.state_dict(), weights)
    file = tmp_path / "task.py"
    tests = str(Path(__file__).parent)
    file.write_text(textwrap.dedent(TASK).format(tests=tests, weights=str(weights)))
    return file
