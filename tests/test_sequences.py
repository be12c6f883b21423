"""Sequences through everything: trace, compress, pack, load, run dense and packed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import taut
from taut import edits
from taut.affine_weight import AffineWeight
from taut.data import Batches
from taut.errors import DataError, ZooError
from taut.layers import packed_layers, run_dense
from taut.modules import clone
from taut.pack import inspect
from taut.texts import padded
from taut.zoo import GruLanguageModel, LstmLanguageModel, TransformerLanguageModel

QUANTIZE = "quantize(bits=4)"


class Reader(nn.Module):
    """Stacked and bidirectional, over packed sequences: [n, steps], lengths [n] → [n, 3]."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, words: int = 40) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 8, padding_idx=0)
        self.rnn = kind(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = pack_padded_sequence(self.words(tokens), lengths.cpu(), True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(x)[0], batch_first=True)
        return self.head(states.sum(1) / lengths[:, None])  # type: ignore[no-any-return]


def batch(n: int = 12, words: int = 40) -> tuple[Tensor, Tensor]:
    return padded([torch.randint(1, words, (1 + i % 5,)) for i in range(n)])


def task_of(*inputs: Tensor, targets: Tensor) -> taut.Task:
    data = [(inputs if len(inputs) > 1 else inputs[0], targets)]
    return taut.Task(train=data, test=data)


@torch.no_grad()
def comes_back(net: nn.Module, fresh: nn.Module, folder: Path, *inputs: Tensor) -> nn.Module:
    """Packed and loaded it answers as before; dense and packed; and as one with plain weights."""
    before = net.eval()(*inputs)
    taut.pack(net, folder / "net.taut", precision="float32")
    plain = copy.deepcopy(fresh)
    loaded = taut.load(folder / "net.taut", fresh)
    torch.testing.assert_close(loaded(*inputs), before, rtol=1e-3, atol=1e-3)
    if edits.of(loaded):  # its layers are others than those of a fresh network
        plain = loaded
    else:
        weights = {n: tensor(loaded, n) for n, _ in plain.named_parameters()}
        plain.load_state_dict(weights, strict=False)
    expected = plain.eval()(*inputs)
    for dense in (True, False):
        run_dense(loaded, dense)
        torch.testing.assert_close(loaded(*inputs), expected, rtol=1e-4, atol=1e-5)
    return loaded


def tensor(net: nn.Module, name: str) -> Any:
    path, _, leaf = name.rpartition(".")
    return getattr(net.get_submodule(path), leaf)


# ---- recurrent layers over packed sequences -------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_are_traced_at_full_length(kind: type[nn.RNNBase]) -> None:
    net = Reader(kind)
    tokens, lengths = batch()
    traced = taut.trace(net, ((tokens, lengths), {}))
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    work = {s.name: s.macs for s in traced.sites}
    assert set(work) == {n for n, p in net.named_parameters() if p.dim() > 1}
    assert work["rnn.weight_ih_l0_reverse"] == tokens.shape[1] * gates * 6 * 8
    assert work["rnn.weight_ih_l1"] == tokens.shape[1] * gates * 6 * 12
    sorted_lengths = lengths.sort(descending=True).values
    short = net.eval()(tokens, sorted_lengths)  # traced without a trace: it packs as before
    assert (short != net(tokens, torch.full_like(lengths, 5))).any()
    assert "forward" not in net.rnn.__dict__


class Given(nn.Module):
    """An LSTM whose first state is given, over sequences sorted by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, hidden: Tensor, lengths: Tensor, in_order: bool) -> Tensor:
        packed = pack_padded_sequence(x.transpose(0, 1), lengths.cpu(), enforce_sorted=in_order)
        start = hidden.transpose(0, 1)
        _, (last, _) = self.rnn(packed, (start, start))
        return self.head(last[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences_with_a_first_state_are_traced(in_order: bool) -> None:
    inputs = (torch.randn(3, 5, 4), torch.randn(3, 1, 6), torch.tensor([5, 4, 2]), in_order)
    traced = taut.trace(Given(), (inputs, {}))
    assert {s.name: s.macs for s in traced.sites} == {
        "rnn.weight_ih_l0": 5 * 96, "rnn.weight_hh_l0": 5 * 144, "head.weight": 18,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "recipe", [QUANTIZE, "prune_weights(sparsity=0.5)", "share_values(bits=3)"]
)
def test_bidirectional_stacks_over_packed_sequences(
    kind: type[nn.RNNBase], recipe: str, tmp_path: Path
) -> None:
    net, inputs = Reader(kind), batch()
    taut.apply(net, recipe, task_of(*inputs, targets=torch.randint(0, 3, (12,))))
    loaded = comes_back(net, Reader(kind), tmp_path, *inputs)
    longer = padded([torch.randint(1, 40, (n,)) for n in (1, 17)])  # other lengths, another batch
    alone = padded([longer[0][0, :1]])
    torch.testing.assert_close(loaded(*longer)[:1], loaded(*alone), rtol=1e-4, atol=1e-5)


def test_compress_recovers_over_packed_sequences(tmp_path: Path) -> None:
    tokens, lengths = batch(24)
    task = task_of(tokens, lengths, targets=(tokens[:, 0] % 3))
    recipe = f"prune_weights(sparsity=0.5) > {QUANTIZE} > recover(epochs=1)"
    found = taut.compress(Reader(), task, recipe, folder=tmp_path)
    assert {type(layer).__name__ for layer in packed_layers(found.model).values()} == {
        "PackedEmbedding", "PackedLSTM", "PackedLinear",
    }  # fmt: skip
    assert 0 <= found.measurement.score <= 1
    assert found.measurement.latencies


# ---- attention and its masks ----------------------------------------------------------------


class Attentive(nn.Module):
    """A Transformer's encoder that must not read what lies behind a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        behind = tokens == 0
        x = self.encoder(self.words(tokens), src_key_padding_mask=behind)
        x = x.masked_fill(behind[..., None], 0).sum(1) / (~behind).sum(1, keepdim=True)
        return self.head(x)  # type: ignore[no-any-return]


def test_what_a_padding_mask_hides_changes_nothing(tmp_path: Path) -> None:
    net, (tokens, _) = Attentive(), batch()
    taut.apply(net, QUANTIZE, task_of(tokens, targets=torch.randint(0, 3, (12,))))
    loaded = comes_back(net, Attentive(), tmp_path, tokens)
    wider = torch.cat([tokens, tokens.new_zeros(12, 4)], 1)
    for dense in (True, False):
        run_dense(loaded, dense)
        torch.testing.assert_close(loaded(wider), loaded(tokens), rtol=1e-4, atol=1e-5)


# ---- tied embeddings, and tables written in fewer bits --------------------------------------


def speaker(tied: bool = True) -> TransformerLanguageModel:
    return TransformerLanguageModel(40, width=16, heads=2, layers=1, context=12, tied=tied)


@pytest.mark.parametrize(
    "recipe",
    [
        "hash_weights(ratio=0.25, only='embedding')",
        "share_values(bits=4, vector=4, only='embedding')",
        "quantize(bits=4, only='embedding')",
        "prune_weights(sparsity=0.5, only='embedding') > share_values(bits=4, only='embedding')",
    ],
)
def test_a_tied_table_stays_tied(recipe: str, tmp_path: Path) -> None:
    net, tokens = speaker(), torch.randint(0, 40, (4, 9))
    taut.apply(net, recipe, task_of(tokens, targets=tokens))
    assert net.embedding.parametrizations.weight.original is (
        net.head.parametrizations.weight.original  # type: ignore[union-attr]
    )
    loaded = comes_back(net, speaker(), tmp_path, tokens)
    assert loaded.embedding.packed["weight"] is loaded.head.packed["weight"]  # type: ignore
    (table,) = [t for t in inspect(tmp_path / "net.taut").tensors if "embedding.weight" in t.names]
    assert set(table.names) == {"embedding.weight", "head.weight"}
    taut.pack(loaded, tmp_path / "again.taut", precision="float32")
    assert (tmp_path / "again.taut").read_bytes() == (tmp_path / "net.taut").read_bytes()


def test_a_plain_tied_table_stays_tied(tmp_path: Path) -> None:
    taut.pack(speaker(), tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", speaker())
    assert loaded.embedding.weight is loaded.head.weight  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        ("hash_weights(ratio=0.125, only='words')", 0.55),
        ("share_values(bits=4, vector=8, only='words')", 0.3),
        ("low_rank(rank='ratio', ratio=0.25, only='words')", 0.7),
        ("factor_weights(ratio=0.25, only='words')", 0.7),
        ("quantize(bits=4, only='words')", 0.56),
    ],
)
def test_a_table_is_written_in_less(recipe: str, most: float, tmp_path: Path) -> None:
    torch.manual_seed(0)  # the table has rows of 8, so that their scales weigh much
    net, inputs = Reader(words=2000), batch(words=2000)
    plain = taut.pack(net, tmp_path / "plain.taut", precision="float16")
    taut.apply(net, recipe, task_of(*inputs, targets=torch.randint(0, 3, (12,))))
    comes_back(net, Reader(words=2000), tmp_path, *inputs)
    assert (tmp_path / "net.taut").stat().st_size < most * plain


# ---- generation -----------------------------------------------------------------------------


GENERATORS = {
    "lstm": lambda: LstmLanguageModel(40, 8, 12, layers=2),
    "gru": lambda: GruLanguageModel(40, 8, 12, layers=2),
    "transformer": lambda: TransformerLanguageModel(40, 16, 2, 2, context=12),
    "tied": lambda: speaker(),
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("dense", [True, False])
@torch.no_grad()
def test_generation_with_a_state_is_that_of_the_whole_text(
    kind: str, dense: bool, tmp_path: Path
) -> None:
    net, tokens = GENERATORS[kind](), torch.randint(0, 40, (2, 6))
    taut.apply(net, QUANTIZE, task_of(tokens, targets=tokens))
    taut.pack(net, tmp_path / "net.taut")
    loaded: Any = taut.load(tmp_path / "net.taut", GENERATORS[kind]())
    run_dense(loaded, dense)
    scores, state = loaded.step(tokens[:, :3])  # a prompt of several tokens, then one by one
    text, told = [tokens[:, :3]], [scores]
    for _ in range(9):
        text.append(scores[:, :, -1].argmax(1, keepdim=True))
        scores, state = loaded.step(text[-1], state)
        told.append(scores)
    whole = loaded(torch.cat(text, 1))
    torch.testing.assert_close(torch.cat(told, 2), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cached_step_after_others_is_that_of_all_at_once() -> None:
    net, tokens = GENERATORS["transformer"]().eval(), torch.randint(0, 40, (3, 12))
    taut.apply(net, "share_values(bits=3)", task_of(tokens, targets=tokens))
    _, state = net.step(tokens[:, :5])  # trainable forms, several steps after several
    scores, state = net.step(tokens[:, 5:], state)
    torch.testing.assert_close(scores, net(tokens)[:, :, 5:], rtol=1e-4, atol=1e-5)
    assert [t.shape for cache in state for t in cache] == [(3, 12, 16)] * 4
    with pytest.raises(ZooError, match="at most 12 steps, got 13; build it with a longer context"):
        net.step(tokens[:, :1], state)
    with pytest.raises(ZooError, match="at least one step"):
        net.step(tokens[:, :0], state)


@pytest.mark.parametrize("of", ["blocks", "branches"])
@torch.no_grad()
def test_a_generator_counts_its_steps_where_blocks_are_gone(of: str) -> None:
    net, tokens = GENERATORS["transformer"](), torch.randint(0, 40, (3, 12))
    count = 4 if of == "branches" else 1
    task = task_of(tokens, targets=tokens)
    net = taut.apply(net, f"drop_blocks(count={count}, of='{of}') > {QUANTIZE}", task).eval()
    state, told = None, []
    for token in tokens.split(1, 1):
        scores, state = net.step(token, state)  # type: ignore[operator]
        told.append(scores)
    torch.testing.assert_close(torch.cat(told, 2), net(tokens), rtol=1e-4, atol=1e-5)


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "net",
    [LstmLanguageModel(20, 8, 12), GruLanguageModel(20, 8, 12), speaker()],
    ids=lambda n: type(n).__name__,
)
def test_one_step_is_enough_and_none_is_refused(net: nn.Module) -> None:
    assert net(torch.zeros(1, 1, dtype=torch.int64)).shape[2] == 1
    with pytest.raises(ZooError, match=r"at least one step, got shape \[3, 0\]; leave empty"):
        net(torch.zeros(3, 0, dtype=torch.int64))


@pytest.mark.parametrize("dense", [True, False])
def test_a_text_beyond_the_context_is_refused_after_load_too(dense: bool, tmp_path: Path) -> None:
    net, tokens = speaker(), torch.randint(0, 40, (2, 13))
    taut.apply(net, QUANTIZE, task_of(tokens[:, :9], targets=tokens[:, :9]))
    taut.pack(net, tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", speaker())
    run_dense(loaded, dense)
    with pytest.raises(ZooError, match="at most 12 steps, got 13; build it with a longer context"):
        loaded(tokens)
    assert loaded(tokens[:, :12]).shape == (2, 40, 12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_packed_recurrent_layer_refuses_no_step(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    net, inputs = Reader(kind), batch()
    taut.apply(net, QUANTIZE, task_of(*inputs, targets=torch.randint(0, 3, (12,))))
    taut.pack(net, tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", Reader(kind))
    run_dense(loaded, False)
    with pytest.raises(DataError, match=r"takes at least one step, got an input of shape \[2, 0,"):
        loaded.rnn(torch.zeros(2, 0, 8))  # type: ignore[operator]


@pytest.mark.parametrize("token", [40, -1])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("recipe", [QUANTIZE, "share_values(bits=3)", "hash_weights()"])
def test_a_token_beyond_the_vocabulary_is_refused(
    token: int, dense: bool, recipe: str, tmp_path: Path
) -> None:
    net, (tokens, lengths) = Reader(), batch()
    taut.apply(net, recipe, task_of(tokens, lengths, targets=torch.randint(0, 3, (12,))))
    taut.pack(net, tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", Reader())
    run_dense(loaded, dense)
    message = f"index out of range: PackedEmbedding has 40 rows, got {token}"
    with pytest.raises(IndexError, match=message):
        loaded(torch.full_like(tokens, token), lengths)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="at least one sequence"):
        padded([])
    with pytest.raises(taut.errors.TaskError, match="yields no batch"):
        list(taut.Task(train=[], test=[]).batches("train"))
    assert len(Batches(torch.zeros(0, 3), torch.zeros(0))) == 0


# ---- weights alone in few bits ----------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> tuple[TransformerLanguageModel, taut.Task]:
    """A Transformer that has learned to say what it read two tokens ago."""
    torch.manual_seed(0)
    net = TransformerLanguageModel(12, width=128, heads=4, layers=1, context=16)
    tokens = torch.randint(0, 12, (256, 16))
    data = Batches(tokens, tokens.roll(2, 1).clone(), 64)
    task = taut.Task(train=data, test=data)
    taut.recover(net, task, taut.Recover(epochs=12, learning_rate=3e-3, distill=0.0))
    return net.eval(), task


def loss(net: nn.Module, task: taut.Task) -> float:
    with torch.no_grad():
        return float(sum(task.loss_of(net(*b.args), b.target) for b in task.batches("test")))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_groups_of_columns_rounded_by_second_order(
    bits: int, reader: tuple[TransformerLanguageModel, taut.Task], tmp_path: Path
) -> None:
    original, task = reader
    before = loss(original, task)
    lost = {}
    for method in ("affine", "gptq"):
        step = f"quantize(bits={bits}, method='{method}', per=128, only='blocks.*')"
        net = taut.apply(clone(original), step, task)
        lost[method] = loss(net, task) - before
    assert lost["gptq"] < 0.7 * lost["affine"]
    fresh = TransformerLanguageModel(12, width=128, heads=4, layers=1, context=16)
    tokens = next(task.batches("test")).args[0][:1]  # a batch of one, as in a generation loop
    loaded = comes_back(net, fresh, tmp_path, tokens)
    run_dense(loaded, False)
    steps = {n: w.steps.numel for n, w in weights_of(loaded) if isinstance(w, AffineWeight)}
    assert steps["blocks.0.fc2.weight"] == 128 * 4  # rows, and groups of 128 of their 512 columns
    assert len(steps) == 4


def weights_of(net: nn.Module) -> list[tuple[str, Any]]:
    return [
        (f"{path}.{n}", w) for path, p in packed_layers(net).items() for n, w in p.packed.items()
    ]
