"""Equalising what a layer norm makes with the weights that read it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taut
from taut.errors import RecipeError
from taut.modules import clone
from taut.techniques import CodeLength, Equalise, Quantize
from taut.zoo import TransformerLanguageModel


class Reads(nn.Module):
    """A norm whose output a function of the test reads."""

    def __init__(self, run: Any, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(6)
        self.a, self.b, self.run = nn.Linear(6, 4), nn.Linear(6, 4), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)  # type: ignore[no-any-return]


def readers(net: nn.Module, x: Tensor) -> dict[str, tuple[str, ...]]:
    return dict(taut.trace(net, ((x,), {})).readers)


def test_the_trace_tells_which_weights_alone_read_a_layer_norm() -> None:
    x = torch.randn(3, 5, 6)
    both = Reads(lambda m, x: m.a(m.norm(x)) * m.b(m.norm(x)))
    assert readers(both, x) == {}  # two norms of one weight: their readers are not the same
    shared = Reads(
        lambda m, x: (lambda y: m.a(y) * m.b(y.transpose(0, 1)).transpose(0, 1))(m.norm(x))
    )
    assert readers(shared, x) == {"norm.weight": ("a.weight", "b.weight")}
    assert readers(Reads(lambda m, x: m.a(m.norm(x)), nn.RMSNorm(6)), x) == {
        "norm.weight": ("a.weight",)
    }
    for run in (
        lambda m, x: m.a(m.norm(x)) + m.norm(x)[..., :4],  # a shortcut reads it, too
        lambda m, x: m.a(m.norm(x).relu()),
        lambda m, x: m.a(m.norm(x).transpose(1, 2).reshape(3, 5, 6)),
        lambda m, x: m.a(m.norm(x)) + m.a(x),  # the weight reads something else, too
        lambda m, x: m.norm(x),
    ):
        assert readers(Reads(run), x) == {}
    assert (
        readers(Reads(lambda m, x: m.a(m.norm(x)), nn.LayerNorm(6, elementwise_affine=False)), x)
        == {}
    )


def test_of_a_transformer_whose_norms_come_first_and_of_one_whose_norms_come_last() -> None:
    tokens = torch.randint(0, 20, (2, 5))
    assert readers(TransformerLanguageModel(20, 8, 2, 1, context=5), tokens) == {
        "blocks.0.norm1.weight": ("blocks.0.attention.in_proj_weight",),
        "blocks.0.norm2.weight": ("blocks.0.fc1.weight",),
        "norm.weight": ("head.weight",),
    }
    tied = TransformerLanguageModel(20, 8, 2, 1, context=5, tied=True)
    assert "norm.weight" not in readers(tied, tokens)  # the table must stay what is looked up
    last = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert readers(last, torch.randn(2, 5, 8)) == {}


@pytest.fixture
def net() -> TransformerLanguageModel:
    """A Transformer with a few channels far larger than the others, as trained ones have them."""
    torch.manual_seed(0)
    built = TransformerLanguageModel(20, 32, 2, 2, context=12).eval()
    with torch.no_grad():
        for block in built.blocks:
            for norm in (block.norm1, block.norm2):
                norm.weight[[3, 17]] *= 60
                norm.bias.normal_()
    return built


def texts() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of several lengths."""
    made = torch.Generator().manual_seed(1)
    for steps in (5, 12, 9):
        tokens = torch.randint(0, 20, (16, steps), generator=made)
        yield tokens, tokens


def task() -> taut.Task:
    return taut.Task(train=list(texts()), test=list(texts()))


def test_no_answer_changes_and_ranges_are_shared(net: TransformerLanguageModel) -> None:
    found: Any = taut.apply(clone(net), Equalise(), task())
    for tokens, _ in texts():
        wanted = net(tokens)
        torch.testing.assert_close(found(tokens), wanted, rtol=1e-3, atol=1e-3)
    seen: list[Tensor] = []
    found.blocks[0].norm2.register_forward_hook(lambda m, x, y: seen.append(y.flatten(0, -2)))
    for tokens, _ in texts():
        found(tokens)
    rows, columns = torch.cat(seen).abs().amax(0), found.blocks[0].fc1.weight.abs().amax(0)
    torch.testing.assert_close(rows, columns, rtol=1e-3, atol=1e-3)


def test_it_spares_what_one_step_for_all_channels_loses(net: TransformerLanguageModel) -> None:
    step = Quantize(bits=8, activations=8, only="*fc1.weight")
    tokens = next(texts())[0]

    def error(start: nn.Module) -> float:
        rounded = taut.apply(start, step, task())
        return float((rounded(tokens) - net(tokens)).detach().square().mean())

    plain = error(clone(net))
    assert error(taut.apply(clone(net), Equalise(only="*fc1.weight"), task())) < plain / 4


def test_a_norm_that_is_recoded_is_refused(net: TransformerLanguageModel) -> None:
    traced = taut.trace(net, task().example())
    found = taut.apply(clone(net), CodeLength(only="blocks.0.norm2.weight"), task())
    message = (
        r"equalise: the weight beside site 'blocks\.0\.fc1\.weight' is written in another form "
        "already; put equalise before"
    )
    with pytest.raises(RecipeError, match=message):
        taut.apply(found, Equalise(), task(), traced)
    found = taut.apply(clone(net), Quantize(only="blocks.0.fc1.weight"), task())
    with pytest.raises(RecipeError, match=r"'blocks\.0\.fc1\.weight' is written in another form"):
        taut.apply(found, Equalise(), task(), traced)
