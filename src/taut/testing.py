"""The contracts that techniques keep, as tests that ship with the package.

An outside author subclasses a suite and names a technique; pytest does the rest:

    class TestMine(taut.testing.RecodingContract):
        under_test = (MyTechnique(bits=3),)

A technique that changes the structure of a network takes the ReshapingContract.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from taut import edits
from taut.activations import place_input
from taut.container import encode
from taut.errors import RecipeError
from taut.layers import packed_layers, run_dense
from taut.modules import clone, tensor_at
from taut.pack import inspect, load, pack, packed_state
from taut.packed import FORMATS
from taut.recipe import Recipe
from taut.recoding import Recoding, chain, core
from taut.reshaping import Reshaping
from taut.schedules import advance
from taut.statistics import Statistics
from taut.technique import techniques
from taut.trace import Trace, trace

__all__ = ["KINDS", "NETS", "RecodingContract", "ReshapingContract", "Sample"]


@dataclass(frozen=True)
class Sample:
    """A network around one kind of site, an input for it, and the site's name."""

    build: Callable[[], nn.Module]
    example: Callable[[], tuple[Any, ...]]
    site: str


class _First(nn.Module):
    """Gives the first of a layer's outputs; feeds attention its input three times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        times = 3 if isinstance(self.layer, nn.MultiheadAttention) else 1
        out = self.layer(*[x] * times)
        first: Tensor = out[0] if isinstance(out, tuple) else out
        return first


KINDS = {
    "linear": Sample(
        lambda: _First(nn.Linear(96, 64)), lambda: (torch.randn(3, 96),), "layer.weight"
    ),
    "conv": Sample(
        lambda: _First(nn.Conv2d(16, 24, 3, padding=1)),
        lambda: (torch.randn(2, 16, 7, 7),),
        "layer.weight",
    ),
    "embedding": Sample(
        lambda: _First(nn.Embedding(120, 48)),
        lambda: (torch.randint(0, 120, (3, 5)),),
        "layer.weight",
    ),
    "lstm": Sample(
        lambda: _First(nn.LSTM(24, 32, num_layers=2, bidirectional=True, batch_first=True)),
        lambda: (torch.randn(2, 6, 24),),
        "layer.weight_hh_l1_reverse",
    ),
    "gru": Sample(
        lambda: _First(nn.GRU(32, 40)), lambda: (torch.randn(6, 2, 32),), "layer.weight_ih_l0"
    ),
    "attention": Sample(
        lambda: _First(nn.MultiheadAttention(48, 4, batch_first=True)),
        lambda: (torch.randn(2, 5, 48),),
        "layer.in_proj_weight",
    ),
}
"""One small network for each kind of site."""


def _sample(kind: str) -> tuple[nn.Module, tuple[Any, ...], Trace, str]:
    torch.manual_seed(0)
    model = KINDS[kind].build().eval()
    traced = _traced(kind)
    return model, traced.example[0], traced, KINDS[kind].site


@functools.cache
def _traced(kind: str) -> Trace:
    return trace(KINDS[kind].build(), (KINDS[kind].example(), {}))


def _close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Raise unless two tensors agree to a tolerance relative to the largest wanted value."""
    torch.testing.assert_close(
        got, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max()))
    )


class RecodingContract:
    """Subclass this, name the technique in a few strengths, and run it by pytest."""

    under_test: ClassVar[Sequence[Recoding]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if (
            "other" in metafunc.fixturenames
        ):  # the first strength everywhere, the others on one kind
            second = [n for n, c in sorted(techniques().items()) if issubclass(c, Recoding)]
            cases = [
                (technique, kind, other)
                for technique in self.under_test
                for kind in (KINDS if technique is self.under_test[0] else ("linear",))
                for other in second
            ]
            metafunc.parametrize(("technique", "kind", "other"), cases, ids=str)
            return
        if "technique" in metafunc.fixturenames:
            metafunc.parametrize("technique", self.under_test, ids=str)
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", list(KINDS))

    def _applied(self, technique: Recoding, kind: str) -> tuple[nn.Module, Any, Trace, str]:
        """The sample with the technique on all its sites, each by the localised options."""
        model, example, traced, name = _sample(kind)
        _apply(technique, model, traced)
        return model, example, traced, name

    def test_planning_leaves_the_model_untouched(self, technique: Recoding, kind: str) -> None:
        model, example, traced, _ = _sample(kind)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        statistics = Statistics(model, _Loss(example))
        for site in technique.sites(traced):
            local = technique.localise(model, technique.sites(traced), statistics)[site.name]
            assert local.predict(site).size_bytes > 0
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_same_seed_same_bytes(self, technique: Recoding, kind: str) -> None:
        first, second = (encode(packed_state(self._applied(technique, kind)[0])) for _ in range(2))
        assert first == second

    def test_packed_equals_the_trained_form(self, technique: Recoding, kind: str) -> None:
        model, _, traced, _ = self._applied(technique, kind)
        state = packed_state(model, "float32")
        for site in technique.sites(traced):
            dense = state[site.names].dense()
            assert dense.shape == site.shape
            _close(dense, tensor_at(model, site.name).detach())

    def test_matmul_and_rows_follow_dense(self, technique: Recoding, kind: str) -> None:
        model, _, traced, name = self._applied(technique, kind)
        packed = packed_state(model)[traced.site(name).names]
        flat = packed.dense().flatten(1)
        x = torch.randn(2, 3, flat.shape[1])
        _close(packed.matmul(x), (x.double() @ flat.double().T).float())
        index = torch.tensor([[0, 2], [1, 0]])
        _close(packed.rows(index), packed.dense()[index])
        assert packed.count_nonzero() == int(packed.dense().count_nonzero())

    def test_saved_and_loaded_it_answers_the_same(self, technique: Recoding, kind: str) -> None:
        model, example, _, _ = self._applied(technique, kind)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.taut"
            pack(model, path, "float32")
            loaded = load(path, KINDS[kind].build())
            again = Path(folder) / "again.taut"
            pack(loaded, again, "float32")
            assert again.read_bytes() == path.read_bytes()
        assert packed_layers(loaded)
        with torch.no_grad():
            wanted = model(*example)
            _close(loaded(*example), wanted)
            run_dense(loaded, False)
            _close(loaded(*example), wanted)

    def test_predicted_bytes_come_true(self, technique: Recoding, kind: str) -> None:
        model, _, traced, _ = _sample(kind)
        local = _apply(technique, model, traced)
        advance(model, 1.0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.taut"
            pack(model, path)
            tensors = {t.names[0]: t for t in inspect(path).tensors}
        predicted = sum(local[s.name].predict(s).size_bytes for s in technique.sites(traced))
        written = sum(tensors[s.name].size_bytes for s in technique.sites(traced))
        assert abs(predicted - written) <= 0.1 * written, (predicted, written)

    def test_gradients_reach_what_trains(self, technique: Recoding, kind: str) -> None:
        model, example, traced, _ = self._applied(technique, kind)
        output = model.train()(*example)
        output.square().sum().backward()
        for site in traced.sites:
            grad = core(model, site).grad
            assert grad is not None, site.name
            assert bool(grad.isfinite().all())
            assert bool((grad != 0).any()), site.name

    def test_it_learns(self, technique: Recoding, kind: str) -> None:
        model, example, _, _ = self._applied(technique, kind)
        torch.manual_seed(1)
        wanted = KINDS[kind].build().eval()(*example).detach()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (model(*example) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.98 * losses[0]

    def test_a_copy_is_independent(self, technique: Recoding, kind: str) -> None:
        model, example, _, _ = self._applied(technique, kind)
        with torch.no_grad():
            before = model(*example)
            copied = clone(model)
            _close(copied(*example), before)
            for parameter in copied.parameters():
                parameter.zero_()
            _close(model(*example), before)

    def test_a_blank_form_takes_the_state(self, technique: Recoding, kind: str) -> None:
        model, example, traced, _ = self._applied(technique, kind)
        fresh, *_ = _sample(kind)
        sites = technique.sites(traced)
        local = technique.localise(fresh, sites, Statistics(fresh, _Loss(example)))
        with torch.no_grad():
            for site in sites:
                own = local[site.name]
                assert isinstance(own, Recoding)
                form, blank = own.blank(core(fresh, site).detach())
                own.place(fresh, site, form, blank)
                given = own.blank_input(fresh, site)
                if given is not None:
                    place_input(fresh, site.name.rpartition(".")[0], given, str(own))
            fresh.load_state_dict(model.state_dict())
            _close(fresh(*example), model(*example))

    def test_it_stacks_or_refuses_with_a_reason(
        self, technique: Recoding, kind: str, other: str
    ) -> None:
        second = techniques()[other]()
        assert isinstance(second, Recoding)
        model, example, traced, _ = self._applied(technique, kind)
        try:
            _apply(second, model, traced)
        except RecipeError as error:
            reason = str(error)
        else:
            reason = ""
        if reason:
            assert second.name in reason
            assert any(s.name in reason for s in traced.sites)
            return
        for site in traced.sites:
            links = chain(model, site)
            names = {t.name for t in (technique, second) if site in t.sites(traced)}
            assert len(links.recipe if links is not None else ()) == len(names)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "net.taut"
            pack(model, path, "float32")
            _close(load(path, KINDS[kind].build())(*example), model(*example))

    def test_its_text_reads_back(self, technique: Recoding) -> None:
        assert Recipe.parse(str(technique)).steps == (technique,)

    def test_it_refuses_weights_that_are_no_numbers(self, technique: Recoding) -> None:
        model, _, traced, name = _sample("linear")
        with torch.no_grad():
            tensor_at(model, name)[0, 0] = float("nan")
        with pytest.raises(RecipeError, match=name):
            technique.apply(model, traced.site(name))

    def test_its_formats_are_registered(self, technique: Recoding) -> None:
        model, _, traced, name = self._applied(technique, "linear")
        packed = packed_state(model)[traced.site(name).names]
        stack = [packed]
        while stack:
            here = stack.pop()
            assert FORMATS[here.format] is type(here)
            stack.extend(here.nested().values())


def _apply(technique: Recoding, model: nn.Module, traced: Trace) -> dict[str, Any]:
    statistics = Statistics(model, _Loss(traced.example[0]))
    local = technique.localise(model, technique.sites(traced), statistics)
    for site in technique.sites(traced):
        local[site.name].apply(model, site, statistics)
    return local


class _Loss:
    """A stand-in for a task's: it grows as the outputs on the sample's input vanish."""

    def __init__(self, example: tuple[Any, ...]) -> None:
        self.example = example

    def __call__(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float(self._of(model, self.example[0]))

    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        for one in self.example[0].split(1):
            yield self._of(model, one)

    @staticmethod
    def _of(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x)
        return -out.square().mean()


# ---- reshaping ------------------------------------------------------------------------------


class _Block(nn.Module):
    """relu(x + f(x)), f of two convolutions with a norm between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.b = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(torch.relu(self.norm(self.a(x)))))


class _Last(nn.Module):
    """A recurrent stack whose last outputs a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.out = nn.LSTM(12, 12, 2, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.stack(x)[0][:, -1])
        return out


NETS = {
    "mlp": Sample(
        lambda: nn.Sequential(
            nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24),
            nn.ReLU(), nn.Linear(24, 5),
        ),
        lambda: (torch.randn(16, 10),), "2.weight",
    ),
    "residual": Sample(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), _Block(8, 12), _Block(8, 12),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
        ),
        lambda: (torch.randn(16, 3, 6, 6),), "2.a.weight",
    ),
    "lstm": Sample(_Last, lambda: (torch.randn(16, 4, 12),), "stack.weight_hh_l1"),
}  # fmt: skip
"""Small networks of each structure, the input of one batch, and a weight in the midst of each."""


class ReshapingContract:
    """Subclass this, name the technique in a few strengths, and run it by pytest.

    Where it refuses a network, it has to name itself and to leave the network as it was. It must
    change one of the networks, with each of its strengths.
    """

    under_test: ClassVar[Sequence[Reshaping]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "technique" in metafunc.fixturenames:
            metafunc.parametrize("technique", self.under_test, ids=str)
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", list(NETS))

    def _reshaped(self, technique: Reshaping, kind: str) -> tuple[nn.Module, tuple[Any, ...]]:
        """The network after it, and its input; skipped where the network is refused with reason."""
        torch.manual_seed(0)
        model, example = NETS[kind].build().eval(), NETS[kind].example()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        made, reason = model, ""
        try:
            made = _reshape(technique, model, example)
        except RecipeError as error:
            reason = str(error)
        if reason:
            assert technique.name in reason
            assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
            assert not edits.of(model)
            pytest.skip(f"refused: {reason}")
        return made, example

    def test_one_of_the_networks_gets_smaller(self, technique: Reshaping) -> None:
        smaller = []
        for kind in NETS:
            try:
                made = _reshape(technique, NETS[kind].build().eval(), NETS[kind].example())
            except RecipeError:
                continue
            smaller.append(_numbers(made) < _numbers(NETS[kind].build()))
        assert any(smaller)

    def test_saved_and_loaded_it_answers_the_same(self, technique: Reshaping, kind: str) -> None:
        model, example = self._reshaped(technique, kind)
        assert edits.from_json(edits.to_json(edits.of(model))) == edits.of(model)
        with tempfile.TemporaryDirectory() as folder:
            path, again = Path(folder) / "net.taut", Path(folder) / "again.taut"
            pack(model, path, "float32")
            loaded = load(path, NETS[kind].build())
            pack(loaded, again, "float32")
            assert again.read_bytes() == path.read_bytes()
        assert _numbers(loaded) == _numbers(model)
        with torch.no_grad():
            _close(loaded(*example), model.eval()(*example))

    def test_its_outline_has_its_shape(self, technique: Reshaping, kind: str) -> None:
        model, example = self._reshaped(technique, kind)
        torch.manual_seed(0)
        outline = _reshape(technique, NETS[kind].build().eval(), example, outline=True)
        assert edits.of(outline) == edits.of(model)
        assert all(bool(p.isfinite().all()) for p in outline.parameters())

    def test_a_checkpoint_replays(self, technique: Reshaping, kind: str) -> None:
        model, example = self._reshaped(technique, kind)
        again = edits.replay(NETS[kind].build(), edits.of(model)).eval()
        again.load_state_dict(model.state_dict())
        with torch.no_grad():
            _close(again(*example), model.eval()(*example))

    def test_same_seed_same_bytes(self, technique: Reshaping, kind: str) -> None:
        first, second = (encode(packed_state(self._reshaped(technique, kind)[0])) for _ in range(2))
        assert first == second

    def test_it_trains_on(self, technique: Reshaping, kind: str) -> None:
        model, example = self._reshaped(technique, kind)
        optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            loss = (model(*example) - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert all(p.grad is not None for p in model.parameters())
        assert losses[-1] < 0.95 * losses[0]

    def test_a_copy_is_independent(self, technique: Reshaping, kind: str) -> None:
        model, example = self._reshaped(technique, kind)
        with torch.no_grad():
            before = model.eval()(*example)
            copied = clone(model)
            assert edits.of(copied) == edits.of(model)
            for parameter in copied.parameters():
                parameter.zero_()
            _close(model(*example), before)

    def test_what_it_leaves_can_be_recoded(self, technique: Reshaping, kind: str) -> None:
        model, example = self._reshaped(technique, kind)
        second = techniques()["share_values"]()
        assert isinstance(second, Recoding)
        _apply(second, model, trace(model, (example, {})))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            pack(model, Path(folder) / "net.taut", "float32")
            loaded = load(Path(folder) / "net.taut", NETS[kind].build())
            _close(loaded(*example), model.eval()(*example))

    def test_its_text_reads_back(self, technique: Reshaping) -> None:
        assert Recipe.parse(str(technique)).steps == (technique,)


def _reshape(
    technique: Reshaping, model: nn.Module, example: tuple[Any, ...], outline: bool = False
) -> nn.Module:
    traced = trace(model, (example, {}))
    change = technique.outline if outline else technique.reshape
    return change(model, traced, Statistics(model, _Loss(example), traced))


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
