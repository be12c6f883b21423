"""Which networks can be cut: half of the units of every group go, then run, train, save and reload.

Networks of Hugging Face's transformers with small random configurations, recurrent ones, every
network of Taut's zoo, and torchvision's classifiers where that is installed; no hints for any of
them. A row holds where the halved network runs, trains one step, is written, is read back into a
freshly built one and gives the same outputs; what is left of the parameters is then its figure,
and 100 % otherwise. Of a layer that is cut on both sides, a quarter is left.

Two rows more are on what it costs to find the groups, of DenseNet-201 at 224 × 224: the seconds
of one core, and the most memory beyond what the export takes alone, to the bytes of the network.
Each is measured in a process of its own (Linux).
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from taut import zoo
from taut.errors import RecipeError, TautError
from taut.groups import Groups, cut, cut_graph
from taut.pack import load, pack
from taut.trace import export

try:
    from torchvision import models
except ImportError:  # it is no dependency of Taut
    models = None

sys.path.insert(0, str(Path(__file__).parent))
from harness import Figure, run

MOST_LEFT = 60.0  # per cent of the parameters: what meets inputs and outputs is cut on one side
QUICK = ("GPT-2", "ViT", "BiLSTM")
Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Net:
    """How a network is built, and what it is run on."""

    build: Build
    example: tuple[tuple[Any, ...], dict[str, Any]]


class Logits(nn.Module):
    """A network of transformers, of whose outputs the logits count."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        logits: Tensor = self.net(*args, **kwargs).logits
        return logits


class Recurrent(nn.Module):
    """An embedding, a recurrent layer of two levels, and a layer on its last output."""

    def __init__(self, kind: type[nn.RNNBase], both: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.layer = kind(24, 32, 2, batch_first=True, bidirectional=both)
        self.out = nn.Linear(32 * (1 + both), 5)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.layer(self.embedding(words))[0][:, -1])


def nets() -> Iterator[tuple[str, Net]]:
    """Every network, by the name of its row."""
    words, sound = torch.randint(3, 90, (2, 10)), torch.randn(2, 800)
    for name, (kind, config) in _TRANSFORMERS.items():
        size = config.get("image_size", 0)
        example: Any = ((words,), {})
        if name == "T5":
            example = ((), {"input_ids": words, "decoder_input_ids": words})
        elif name == "Wav2Vec2":
            example = ((sound,), {})
        elif size:
            example = ((torch.randn(2, 3, size, size),), {})
        yield name, Net(lambda kind=kind, config=config: _transformer(kind, config), example)
    for name, layer, both in (
        ("LSTM", nn.LSTM, False), ("BiLSTM", nn.LSTM, True), ("GRU", nn.GRU, False)
    ):  # fmt: skip
        yield name, Net(lambda layer=layer, both=both: Recurrent(layer, both), ((words % 50,), {}))
    yield from _of_the_zoo()
    yield from _of_torchvision()


_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertForSequenceClassification", {**_SMALL, "hidden_size": 32, "vocab_size": 99}),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99},
    ),
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "Llama": (
        "LlamaForCausalLM",
        {**_SMALL, "hidden_size": 32, "num_key_value_heads": 2, "vocab_size": 99},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
    ),
    "ViT": ("ViTForImageClassification", {**_SMALL, "hidden_size": 32, "image_size": 32}),
    "Swin": (
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2,
         "image_size": 32},
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 64},
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForSequenceClassification",
        {**_SMALL, "hidden_size": 32, "conv_dim": (16, 16, 16), "conv_stride": (5, 2, 2),
         "conv_kernel": (10, 3, 3), "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16,
         "apply_spec_augment": False},
    ),
}  # fmt: skip


def _transformer(kind: str, options: dict[str, Any]) -> nn.Module:
    cls = getattr(transformers, kind)
    config = cls.config_class(**options, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config.use_cache = False
    return Logits(cls(config))


def _of_the_zoo() -> Iterator[tuple[str, Net]]:
    for name in zoo.names():
        if name.endswith("language_model"):
            example = torch.randint(0, 20, (2, 16))
        elif name.startswith("lenet"):
            example = torch.randn(2, 1, 28, 28)
        else:
            side = 96 if name.startswith("inception") else 32 if name == "vgg_small" else 64
            example = torch.randn(2, 3, side, side)
        yield f"zoo: {name}", Net(lambda name=name: zoo.create(name), ((example,), {}))


def _of_torchvision() -> Iterator[tuple[str, Net]]:
    for name in models.list_models(module=models) if models else ():
        size = 299 if name == "inception_v3" else 224
        options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        yield (
            f"torchvision: {name}",
            Net(
                lambda name=name, options=options: models.get_model(name, weights=None, **options),
                ((torch.randn(2, 3, size, size),), {}),
            ),
        )


def halved(model: nn.Module, groups: Groups) -> nn.Module:
    """The network with half of each group's units; its graph where its code cannot follow."""
    halves = {g.name: range(0, g.units, 2)[: max(g.units // 2, 1)] for g in groups.groups}
    try:
        cut(model, groups, halves)
    except RecipeError:
        return cut_graph(model, groups, halves)
    return model


def halve(net: Net) -> tuple[float, str]:
    """What is left of the parameters, in per cent, and the groups and seconds that it took."""
    torch.manual_seed(0)
    model = net.build().eval()
    whole = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    groups = Groups(model, net.example)
    seconds = time.perf_counter() - start
    model = halved(model, groups)
    args, kwargs = net.example
    wanted = model(*args, **kwargs).detach()
    with tempfile.TemporaryDirectory() as folder:
        pack(model, Path(folder) / "net.taut", "float32")
        again = load(Path(folder) / "net.taut", net.build())
    if not torch.allclose(again(*args, **kwargs), wanted, rtol=1e-4, atol=1e-5):
        raise TautError("the network that was read back gives other outputs")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    (model.train()(*args, **kwargs) - 1).square().mean().backward()  # some begin as all zeros
    optimizer.step()
    if torch.equal(model.eval()(*args, **kwargs), wanted):
        raise TautError("a step of training changed nothing")
    left = sum(p.numel() for p in model.parameters())
    return 100 * left / whole, f"{len(groups.groups)} groups, {seconds:.1f} s"


def peak_of(job: str, name: str, side: int) -> tuple[float, int]:
    """Of an export, or of finding groups: seconds of a core, bytes at most beyond those at rest."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(_peak, job, name, side).result()


def _peak(job: str, name: str, side: int) -> tuple[float, int]:
    jobs: dict[str, Callable[..., object]] = {"export": export, "groups": Groups}
    jobs[job](nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ((torch.ones(2, 2),), {}))
    model, example = zoo.create(name).eval(), ((torch.randn(1, 3, side, side),), {})
    torch.set_num_threads(1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = _memory("VmRSS"), time.process_time()
    jobs[job](model, example)
    return time.process_time() - start, _memory("VmHWM") - before


def _memory(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def grouping(name: str, side: int) -> list[Figure]:
    """What it costs to find the groups of a network, beside its export."""
    size = sum(4 * p.numel() for p in zoo.create(name).parameters())
    alone, exported = peak_of("export", name, side)
    seconds, peak = peak_of("groups", name, side)
    return [
        Figure(name=f"{name}, groups found in (of one core)", ours=seconds,
               paper=f"export alone {alone:.1f} s", asked=5.0, at_most=True, unit=" s"),
        Figure(name=f"{name}, memory beyond the export's own, to the network's",
               paper=f"export {exported / 1e6:.0f} MB, groups {peak / 1e6:.0f} MB, network "
               f"{size / 1e6:.0f} MB", ours=(peak - exported) / size, asked=2.0, at_most=True,
               unit="×"),
    ]  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Every network halved."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name, net in nets():
        if options.only not in name or (options.quick and name not in QUICK):
            continue
        try:
            left, told = halve(net)
        except Exception as error:  # a row that does not hold says why
            left, told = 100.0, f"{type(error).__name__}: {str(error)[:200]}"
        yield Figure(name=f"{name}, parameters left", paper=told, ours=left, asked=MOST_LEFT,
                     at_most=True, unit="%")  # fmt: skip
    name, side = ("squeezenet_1_1", 64) if options.quick else ("densenet_201", 224)
    if options.only in name:
        yield from grouping(name, side)


if __name__ == "__main__":
    run("Half of every group cut, without hints", measure, beside="found")
