"""The proof beside other libraries: the sections' quick passes, and peers that are not there."""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import digits_task
from torch import nn

from taut.data import fashion_mnist, mnist
from taut.errors import DataError

ROOT = Path(__file__).parent.parent
FOLDERS = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "papers")]
sys.path[:0] = FOLDERS
try:
    combined, files, pruning, searching, size, sparse = map(
        importlib.import_module,
        ("combined", "against.files", "against.pruning", "against.searching", "against.size",
         "against.sparse"),
    )  # fmt: skip
finally:
    del sys.path[:2]

QUICK = argparse.Namespace(quick=True, seed=0, only="")


def needed(load):
    try:
        load()
    except DataError as error:
        pytest.skip(f"the data are not to be had: {error}")


def missing(*_):
    raise ImportError("No module named 'theirs'")


def test_a_sparse_product_beside_pytorchs(monkeypatch):
    (figure,) = sparse.figures(QUICK)
    assert figure.ours > 0
    assert "CSR" in figure.paper
    monkeypatch.setattr(sparse, "sparse_matmul", lambda x, *_: x)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        sparse.figures(QUICK)


def test_searches_beside_random_and_grid():
    random, grid = searching.figures(QUICK)
    assert random.name.endswith("by random search")
    assert grid.name.endswith("by grid search")
    assert random.ours > 0 < grid.ours


def test_pruning_beside_torch_pruning():
    needed(fashion_mnist)
    seconds, *scores, halved = pruning.figures(QUICK)
    assert halved.ours == 3
    assert seconds.ours > 0
    for score, name in zip(scores, pruning.SCORED, strict=True):
        assert 0 <= score.ours <= 100
        assert score.name.startswith(f"pruning: {name}, Fashion-MNIST, accuracy at ")


def test_who_does_not_answer_in_time_has_failed():
    assert pruning.within(30, lambda: "done") == "done"
    assert pruning.within(0.2, lambda: str(time.sleep(60))) == "no answer in 0.2 s"
    assert pruning.within(30, lambda: os._exit(1)) == "its process died"


def test_a_pruner_that_is_not_installed_stands_in_the_rows(monkeypatch):
    monkeypatch.setattr(pruning, "library", missing)
    (halved,) = pruning._coverage(QUICK)
    assert halved.ours == 3
    assert "Torch-Pruning: 0; not LSTM: ImportError: No module named 'theirs'" in halved.paper
    (seconds,) = pruning._speed(QUICK)
    assert seconds.paper == "ImportError: No module named 'theirs'"


def test_a_network_that_is_not_cut_does_not_count():
    cases = dict(pruning.nets())
    net = cases["zoo: lenet_5"]
    assert pruning.survives(net, lambda net, model: model) == "100% of the parameters are left"

    def cuts_outputs(net, model):
        return nn.Sequential(model, nn.Linear(10, 1))

    assert "outputs of (2, 1)" in pruning.survives(net, cuts_outputs)


def test_sizes_beside_a_peer_that_fails(monkeypatch):
    needed(mnist)
    monkeypatch.setattr(
        size, "PEERS", {"NNCodec": missing, "other": lambda net, task: [(9000, 1.0), (5, -1.0)]}
    )
    plain, trained = size.figures(QUICK)
    for figure in (plain, trained):
        assert "NNCodec: ImportError: No module named 'theirs'; other: 9,000 bytes" in figure.paper
        assert f"NNCodec, {size.PUBLISHED}" in figure.paper
        assert figure.ours > 0


def test_nncodecs_streams_are_decoded_and_scored(trained, tmp_path, monkeypatch):
    package = tmp_path / "nncodec"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nn.py").write_text(
        "import numpy as np\n"
        "def encode(weights, args):\n"
        "    return repr((args['qp'], {k: v.tolist() for k, v in weights.items()})).encode()\n"
        "def decode(stream):\n"
        "    qp, weights = eval(stream.decode())\n"
        "    return {k: np.float32(v) * (qp < -30) for k, v in weights.items()}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TAUT_NNCODEC", sys.executable)
    task = digits_task()
    (fine, score), (coarse, lost) = files.nncodec(trained, task, (-38, -20))
    assert fine > coarse - 100 > 0
    assert score == task.evaluate(trained)
    assert lost < 0.3  # all weights 0


def test_nncodec_is_missed_with_its_error(trained, monkeypatch):
    monkeypatch.setenv("TAUT_NNCODEC", sys.executable)
    monkeypatch.setenv("PYTHONPATH", "")
    if importlib.util.find_spec("nncodec"):
        pytest.skip("it is installed")
    with pytest.raises(files.PeerError, match="No module named 'nncodec'"):
        files.nncodec(trained, digits_task(), (-32,))


def test_onnx_runtimes_file_is_scored(trained):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    task = digits_task()
    ((bytes_, score),) = files.onnx_runtime(trained, task)
    assert 5_000 < bytes_ < 4 * sum(p.numel() for p in trained.parameters())
    assert score == pytest.approx(task.evaluate(trained), abs=0.02)


# ---- everything together ------------------------------------------------------------------------


def subject(**changes):
    given = {
        "name": "net", "build": lambda: nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 10)),
        "task": lambda quick: digits_task(), "training": 1, "learning_rate": 5e-3, "strengths": 1,
        "most": 1.0, "recipes": ("prune_weights(sparsity=0.5) > {1} > quantize(bits=4) > {2}",),
        "published": (combined.Point(kind="published", name="paper", size_bytes=10, score=1.0),),
    }  # fmt: skip
    return combined.Subject(**{**given, **changes})


def test_all_is_tried_and_what_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(combined, "PEERS", {"theirs": missing})
    points, better = combined.tried(subject(), tmp_path, QUICK)
    assert better == "higher"
    kinds = [p.kind for p in points]
    assert kinds == ["original", "single", "single", "combined", "peer", "published"]
    assert [p.name for p in points[1:4]] == [
        "prune_weights",
        "quantize",
        "prune_weights > quantize",
    ]
    assert all(p.size_bytes < points[0].size_bytes for p in points[1:4])
    assert points[4].why == "ImportError: No module named 'theirs'"
    again, _ = combined.tried(subject(), tmp_path, QUICK)  # from what its folder holds
    assert [p.size_bytes for p in again] == [p.size_bytes for p in points]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_smallest_that_is_good_enough_counts(better):
    def point(kind, size_bytes, worse):
        score = 0.9 - worse if better == "higher" else 4 * (1 + worse)
        return combined.Point(kind=kind, name=kind, recipe=kind, size_bytes=size_bytes, score=score)

    points = [
        point("original", 1000, 0), point("single", 300, 0.009), point("single", 10, 0.2),
        point("combined", 100, 0.005), point("combined", 20, 0.02), point("peer", 400, 0),
        point("published", 1, 0), combined.Point(kind="single", name="refused", why="no"),
    ]  # fmt: skip
    several, other = combined.of(subject(), points, better)
    assert (several.ours, several.command) == (3.0, "combined")
    assert several.paper == "single: 300 bytes"
    assert (other.ours, other.paper) == (4.0, "peer: 400 bytes")
    none = combined.of(subject(), points[:1], better)
    assert [f.ours for f in none] == [1.0, 1.0]  # the original is what is left


def test_a_recipe_that_is_refused_says_why(tmp_path):
    task = digits_task()
    net = subject().build()
    point = combined.together(net, task, "swap_convs() > recover(epochs=1)", tmp_path / "r", 0)
    assert point.kind == "combined"
    assert point.size_bytes is None
    assert "swap_convs" in point.why


def test_every_recipe_of_every_network_parses_and_trains_as_long():
    for one in combined.SUBJECTS:
        for text in one.recipes:
            epochs = text.format("", "recover(epochs=1)", f"recover(epochs={combined.EPOCHS - 1})")
            steps = combined.taut.Recipe.parse(epochs).steps
            trained = [s.epochs for s in steps if isinstance(s, combined.taut.Recover)]
            assert sum(trained) == combined.EPOCHS


def test_images_are_drawn_and_moved():
    x = torch.arange(50.0).reshape(2, 1, 5, 5)
    drawn = combined.Drawn(x, torch.tensor([0, 1]), 3, 4)
    batches = list(drawn)
    assert len(batches) == len(drawn) == 3
    for images, labels in batches:
        assert images.shape == (4, 1, 5, 5)
        for image, label in zip(images, labels, strict=True):
            assert torch.equal(image.flatten().sort().values, x[label].flatten())
