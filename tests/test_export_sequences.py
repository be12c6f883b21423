"""Text in other engines: tied tables once, and any length."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import taut
from taut.pack import packed_copy
from taut.zoo import GruLanguageModel, TransformerLanguageModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

NETS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: GruLanguageModel(40, 8, 12, layers=2),
    "tied": lambda: TransformerLanguageModel(40, 16, 2, 1, context=12, tied=True),
}
TOKENS = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(1))


def compressed(net: nn.Module, recipe: str) -> nn.Module:
    task = taut.Task(train=[(TOKENS, TOKENS)], test=[(TOKENS, TOKENS)])
    return packed_copy(taut.apply(net, recipe, task) if recipe else net)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "suffix"), [("gru", "onnx"), ("tied", "xml")])
def test_a_language_model_reads_any_length(kind: str, suffix: str, tmp_path: Path) -> None:
    if suffix == "xml":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    net = compressed(NETS[kind](), "quantize(bits=4)")
    found = taut.export(net, tmp_path / f"net.{suffix}", TOKENS, dynamic_length=True)
    assert found.network is not None
    for batch, steps in ((1, 1), (1, 12), (3, 7)):
        tokens = torch.randint(0, 40, (batch, steps))
        wanted = net(tokens)
        assert (found.network(tokens) - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "hash_weights(ratio=0.25, only='embedding')",
        "share_values(bits=4, vector=4, only='embedding')",
    ],
)
def test_a_tied_table_is_exported_once(recipe: str, tmp_path: Path) -> None:
    net = compressed(NETS["tied"](), recipe)
    found = taut.export(net, tmp_path / "net.onnx", TOKENS, dynamic_length=True)
    stored = [i for i in onnx.load(found.path).graph.initializer if sorted(i.dims) == [16, 40]]
    assert len(stored) == 1
    assert found.network is not None
    longer = torch.randint(0, 40, (3, 12))
    close(found.network(longer), net(longer))


class Step(nn.Module):
    """A step after others: a token [n, 1] and what is kept → scores, and what is kept now."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, token: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        state = tuple(zip(kept[::2], kept[1::2], strict=True))
        scores, state = self.net.step(token, state)
        return (scores, *[t for pair in state for t in pair])


@pytest.mark.parametrize("suffix", ["onnx", "xml"])
def test_a_generation_loop_runs_in_another_engine(suffix: str, tmp_path: Path) -> None:
    if suffix == "xml":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    net = compressed(TransformerLanguageModel(40, 16, 2, 2, context=16), "quantize(bits=4)")
    scores, state = net.step(TOKENS[:1])
    token = scores[:, :, -1].argmax(1, keepdim=True)
    kept = [t for pair in state for t in pair]
    found = taut.export(Step(net), tmp_path / f"step.{suffix}", (token, *kept), dynamic_length=True)
    for _ in range(6):
        scores, state = net.step(token, state)
        theirs, *kept = found.network(token, *kept)
        assert (theirs - scores).abs().max() < 0.03 * scores.abs().max()
        assert kept[0].shape == state[0][0].shape
        token = scores[:, :, -1].argmax(1, keepdim=True)
