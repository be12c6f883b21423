"""Three small language models: tokens in, scores of each next token out.

They take [n, steps] int64 and give [n, vocabulary, steps]: the classes stand in dimension 1, where
cross-entropy, the default loss of a Task, wants them for targets [n, steps].
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.caches import Cache, attend, counted
from taut.errors import ZooError
from taut.zoo.registry import Rule, architecture


class _Recurrent(nn.Module):
    """An embedding, a recurrent stack under the name of its kind, and a layer over its states.

    [n, steps] → [n, vocabulary, steps]. Parameters: vocabulary · (embedding + hidden + 1), and
    gates · hidden · (inputs + hidden + 2) for each layer of the stack.
    """

    kind: ClassVar[type[nn.LSTM | nn.GRU]]

    def __init__(
        self, vocabulary: int, embedding: int = 64, hidden: int = 256, layers: int = 1,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        between = dropout if layers > 1 else 0.0
        stack = self.kind(embedding, hidden, layers, batch_first=True, dropout=between)
        self.add_module(self.kind.__name__.lower(), stack)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.step(tokens)[0]

    def step(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The scores and the state after the tokens, from the state before them: to generate.

        state: as the stack's own. Raises ZooError for no tokens.
        """
        _check_steps(tokens)
        stack = self.get_submodule(self.kind.__name__.lower())
        states, state = stack(self.drop(self.embedding(tokens)), state)
        return cast(Tensor, self.head(self.drop(states))).transpose(1, 2), state


class LstmLanguageModel(_Recurrent):
    """Its stack, `lstm`, has 4 gates (Zaremba, Sutskever, Vinyals 2014).

    64 · 321 + 329,728 = 350,272 parameters for 64 tokens and the defaults.
    """

    kind = nn.LSTM


class GruLanguageModel(_Recurrent):
    """Its stack, `gru`, has 3 gates (Cho et al. 2014)."""

    kind = nn.GRU


class TransformerLanguageModel(nn.Module):
    """A causal transformer: pre-norm blocks, GELU, learned positions (Radford et al. 2019).

    [n, steps] → [n, vocabulary, steps], steps ≤ context. tied: the head shares the weight of the
    embedding (Press, Wolf 2017). With w for width: 2 · vocabulary · w + vocabulary (tied:
    vocabulary · w) parameters outside the blocks, context · w of positions, 12 w² + 13 w for each
    block and 2 w of the last norm. Raises ValueError where the heads do not divide the width, or
    an input has more steps than the context.
    """

    def __init__(
        self, vocabulary: int, width: int = 128, heads: int = 4, layers: int = 2,
        context: int = 128, dropout: float = 0.0, tied: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise ZooError(
                f"transformer_language_model: heads must divide the width, got width={width} and "
                f"heads={heads}; round the width to a multiple"
            )
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(context, width))
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=not tied)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self._scores(self.blocks(self._places(tokens, 0)))

    def step(
        self, tokens: Tensor, state: tuple[Cache, ...] | None = None
    ) -> tuple[Tensor, tuple[Cache, ...]]:
        """The scores and the state after the tokens, from the state before them: to generate.

        state: the keys and values of each block, [n, steps, width] each. Raises ZooError for no
        tokens, and where they and those before them are more than the context.
        """
        before = state[0][0].shape[1] if state else 0
        x, caches = self._places(tokens, before), []
        for i, block in enumerate(self.blocks):
            held = state[i] if state else None
            if isinstance(block, _Block):
                x, cache = block.step(x, held)
            else:  # drop_blocks has put something in its place
                x, cache = block(x), counted(x, held)
            caches.append(cache)
        return self._scores(x), tuple(caches)

    def _places(self, tokens: Tensor, before: int) -> Tensor:
        """What the blocks read: tokens and their positions, after so many others."""
        _check_steps(tokens)
        steps, context = before + tokens.shape[1], self.positions.shape[0]
        if steps > context:
            raise ZooError(
                f"transformer_language_model: tokens must have at most {context} steps, got "
                f"{steps}; build it with a longer context"
            )
        return cast(Tensor, self.drop(self.embedding(tokens) + self.positions[before:steps]))

    def _scores(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.norm(x))).transpose(1, 2)


def _check_steps(tokens: Tensor) -> None:
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ZooError(
            "a language model takes tokens [n, steps] of at least one step, got shape "
            f"{list(tokens.shape)}; leave empty sequences out"
        )


class _Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), each position seeing none later."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[1]
        later = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu(1)
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, attn_mask=later, need_weights=False)
        return self._fed_forward(x + self.drop(y))

    def step(self, x: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """The same for steps that come after those of the cache."""
        y, cache = attend(self.attention, self.norm1(x), cache)
        return self._fed_forward(x + self.drop(y)), cache

    def _fed_forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + cast(Tensor, self.drop(y))


_POSITIVE = Rule(low=1, remedy="it is a count")
_TOKENS = {
    "vocabulary": Rule(low=2, remedy="it is the number of different tokens, 256 for bytes"),
    "embedding": _POSITIVE, "hidden": _POSITIVE,
}  # fmt: skip


@architecture(**_TOKENS)
def lstm_language_model(
    *, vocabulary: int = 256, embedding: int = 64, hidden: int = 256, layers: int = 1,
    dropout: float = 0.0,
) -> LstmLanguageModel:  # fmt: skip
    """An embedding, an LSTM and a layer over its states.

    [n, steps] → [n, vocabulary, steps]. 411,904 parameters; 393,216 MACs at 1 step. Zaremba,
    Sutskever, Vinyals: Recurrent neural network regularization (2014).
    """
    return LstmLanguageModel(vocabulary, embedding, hidden, layers, dropout)


@architecture(**_TOKENS)
def gru_language_model(
    *, vocabulary: int = 256, embedding: int = 64, hidden: int = 256, layers: int = 1,
    dropout: float = 0.0,
) -> GruLanguageModel:  # fmt: skip
    """An embedding, a GRU and a layer over its states.

    [n, steps] → [n, vocabulary, steps]. 329,472 parameters; 311,296 MACs at 1 step. Cho et al.:
    Learning phrase representations using RNN encoder-decoder for statistical machine translation
    (EMNLP 2014).
    """
    return GruLanguageModel(vocabulary, embedding, hidden, layers, dropout)


@architecture(
    **_TOKENS, width=_POSITIVE, context=_POSITIVE,
    heads=Rule(low=1, remedy="they must divide the width"),
    tied=Rule(choices=(False, True), remedy="True shares the embedding's weight with the head"),
)  # fmt: skip
def transformer_language_model(
    *, vocabulary: int = 256, width: int = 128, heads: int = 4, layers: int = 2,
    context: int = 128, dropout: float = 0.0, tied: bool = False,
) -> TransformerLanguageModel:  # fmt: skip
    """A causal transformer: pre-norm blocks, GELU, learned positions.

    [n, steps] → [n, vocabulary, steps], steps ≤ context. 478,976 parameters; 426,496 MACs at 1
    step. Radford et al.: Language models are unsupervised multitask learners (2019); tied: Press,
    Wolf: Using the output embedding to improve language models (EACL 2017).
    """
    return TransformerLanguageModel(vocabulary, width, heads, layers, context, dropout, tied)
