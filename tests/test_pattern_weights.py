"""Blocks and N of M as packed weights: their kernels, layers and files against the dense weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taut
from taut import pattern_weights
from taut.layers import pack_layer, packed_layers, run_dense
from taut.modules import clone
from taut.pack import packed_state
from taut.packed import PackedWeight, Plain
from taut.pattern import Pattern, largest
from taut.pattern_weights import BlockWeight, NOfMWeight, pattern_weight
from taut.sparse_weight import SparseWeight
from taut.techniques import PruneWeights, ShareValues
from taut.techniques.share_values import SharedValues

TEXTS = ("4x1", "16x1", "2:4", "4:8")
SHAPES = ((16, 8), (33, 17), (18, 130), (20, 3, 3, 3), (17, 4, 5))


def shared(values: Tensor) -> PackedWeight:
    table = torch.linspace(-1.5, 1.5, 13)
    return SharedValues(torch.bucketize(values, (table[1:] + table[:-1]) / 2), Plain.of(table))


def with_holes(values: Tensor) -> PackedWeight:
    there = values > -0.5
    return SparseWeight(there, Plain.of(values[there], "float32"))


VALUES: dict[str, Callable[[Tensor], PackedWeight]] = {
    "float32": lambda v: Plain.of(v, "float32"),
    "float16": lambda v: Plain.of(v, "float16"),
    "bfloat16": lambda v: Plain.of(v, "bfloat16"),
    "shared": shared,
    "holes": with_holes,
}


def made(text: str, shape: tuple[int, ...], values: str = "float32") -> tuple[Any, Tensor]:
    """A packed weight of random numbers, and its mask."""
    weight, pattern = torch.randn(shape), Pattern.parse(text)
    mask = largest(weight.square(), round(0.4 * weight.numel()), pattern=pattern)
    return pattern_weight(pattern, mask, VALUES[values](weight[mask])), mask


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called, and with which type of values."""
    seen: list[str] = []

    def watched(name: str) -> Callable[..., Tensor]:
        kernel = getattr(pattern_weights, name)

        def call(x: Tensor, one: Tensor, two: Tensor, values: Tensor, *more: int) -> Tensor:
            seen.append(f"{name} {values.dtype}".replace("torch.", ""))
            out: Tensor = kernel(x, one, two, values, *more)
            return out

        return call

    for name in ("block_matmul", "bitmap_matmul"):
        monkeypatch.setattr(pattern_weights, name, watched(name))
    return seen


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", TEXTS)
def test_the_kernel_runs_and_agrees_with_the_dense_weight(
    text: str, shape: tuple[int, ...], values: str, calls: list[str]
) -> None:
    packed, mask = made(text, shape, values)
    dense = packed.dense()
    assert dense.shape == shape
    assert bool((dense[~mask] == 0).all())
    assert torch.equal(packed.mask(), mask)
    assert packed.count_nonzero() == int(dense.count_nonzero()) > 0
    for batch in ((), (5,), (2, 33)):
        x = torch.randn(*batch, dense.flatten(1).shape[1])
        wanted = x.double() @ dense.flatten(1).double().T
        torch.testing.assert_close(packed.matmul(x).double(), wanted, rtol=1e-5, atol=2e-5)
    kernel = "block_matmul" if "x" in text else "bitmap_matmul"
    width = "float16" if values in ("float16", "shared") else "float32"
    assert values == "bfloat16" or calls == [f"{kernel} {width}"] * 3


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_those_of_their_places(text: str) -> None:
    weight, pattern = torch.arange(1.0, 18 * 9 + 1).reshape(18, 9), Pattern.parse(text)
    mask = largest(torch.rand(18, 9), 80, pattern=pattern)
    packed = pattern_weight(pattern, mask, Plain.of(weight[mask], "float32"))
    assert torch.equal(packed.dense(), weight * mask)
    assert torch.equal(packed.matmul(torch.eye(9)), (weight * mask).T)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 1)}, {"groups": 2}],
    ids=str,
)
def test_convolutions_run_by_it(text: str, options: dict[str, Any], calls: list[str]) -> None:
    layer = nn.Conv2d(8, 20, 3, **options).eval()
    packed, _ = made(text, tuple(layer.weight.shape), "float16")
    x = torch.randn(2, 8, 9, 7)
    plain = {k: v for k, v in options.items() if k != "kernel_size"}
    wanted = F.conv2d(x, packed.dense(), layer.bias, **plain)
    pack_layer(layer, {"weight": packed})
    run_dense(layer, False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    assert bool(calls) == ("groups" not in options)  # those run dense


def test_convolutions_in_one_dimension_run_by_it(calls: list[str]) -> None:
    layer = nn.Conv1d(6, 16, 5, stride=2, padding=1).eval()
    packed, _ = made("4x1", (16, 6, 5))
    x = torch.randn(3, 6, 21)
    wanted = F.conv1d(x, packed.dense(), layer.bias, stride=2, padding=1)
    pack_layer(layer, {"weight": packed})
    run_dense(layer, False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_rows_wider_than_the_kernel_run_dense(calls: list[str]) -> None:
    mask = torch.zeros(4, 2**16 + 1, dtype=torch.bool)
    mask[:, [5, 2**16]] = True
    packed = BlockWeight(mask, Plain.of(torch.arange(1.0, 9.0)), 4)
    x = torch.zeros(1, 2**16 + 1)
    x[0, 2**16] = 2.0
    assert packed.matmul(x).tolist() == [[4, 8, 12, 16]]
    assert not calls


def test_decoded_values_are_kept_until_the_weight_changes() -> None:
    packed, _ = made("16x1", (32, 9), "shared")
    first = packed.floats()
    assert packed.floats() is first
    layer = nn.Linear(9, 32)
    pack_layer(layer, {"weight": packed})  # which forgets what was decoded
    assert packed.floats() is not first
    assert first.dtype is torch.float16
    odd = SharedValues(torch.zeros(32, dtype=torch.uint8), Plain.of(torch.tensor([0.1]), "float32"))
    mask = torch.zeros(32, 9, dtype=torch.bool)
    mask[:, 2] = True
    assert BlockWeight(mask, odd, 16).floats().dtype is torch.float32  # 0.1 is no float16


def test_numbers_too_large_for_a_half_stay_exact() -> None:
    mask = torch.tensor([[True, True, False, False]])
    packed = NOfMWeight(mask, Plain.of(torch.tensor([1e30, 1.0]), "float32"), 2, 4)
    assert packed.matmul(torch.ones(1, 4)).tolist() == [[float(torch.tensor(1e30) + 1)]]


# In a network


KINDS = {"16x1": BlockWeight, "2:4": NOfMWeight}


@pytest.mark.parametrize("text", KINDS)
def test_shared_values_stack_inside_and_run_by_the_kernel(
    trained: nn.Module, task: taut.Task, text: str, tmp_path: Path, calls: list[str]
) -> None:
    prune = PruneWeights(pattern=text, sparsity=0.7, scope="layer", only="!5.weight")
    net = taut.apply(clone(trained), prune, task)
    traced = taut.trace(trained, task.example())
    net = taut.apply(net, ShareValues(bits=4, only="!5.weight"), task, traced)
    size = taut.pack(net, tmp_path / "net.taut")
    assert size == (tmp_path / "net.taut").stat().st_size
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    for name in ("0", "3"):
        weight = packed_layers(loaded)[name].packed["weight"]
        assert type(weight) is KINDS[text]
        assert isinstance(weight.values, SharedValues)
        assert len(weight.dense()[weight.dense() != 0].unique()) <= 16
    run_dense(loaded, False)
    x = next(task.batches("test")).args[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net.eval()(x), rtol=1e-3, atol=5e-3)
    assert len(calls) == 2


def test_the_file_spends_no_bits_on_what_the_pattern_says(
    trained: nn.Module, task: taut.Task, tmp_path: Path
) -> None:
    def positions(pattern: str, part: str) -> float:
        net = taut.apply(clone(trained), PruneWeights(pattern=pattern, scope="layer"), task)
        taut.pack(net, tmp_path / "net.taut")
        stored = {t.names[0]: t for t in taut.inspect(tmp_path / "net.taut").tensors}
        return stored["0.weight"].parts[part].bits

    assert positions("2:4", "positions") <= 48 * 16 * 2.585 * 1.01
    assert positions("4:8", "positions") <= 48 * 8 * 6.13 * 1.01
    assert positions("4x1", "blocks") < 12 * 64 * 0.47 * 1.25  # H(0.1), and what learning takes


def test_a_mask_on_its_way_is_written_as_it_is(trained: nn.Module, task: taut.Task) -> None:
    net = taut.apply(clone(trained), PruneWeights(pattern="2:4"), task)
    with torch.no_grad():
        net[0].parametrizations.weight[0].forms[0].mask[0, :3] = True  # type: ignore
    state = {k[0]: v for k, v in packed_state(net).items()}
    assert state["0.weight"].format == "sparse.v1"
    assert state["3.weight"].format == "n_of_m.v1"
