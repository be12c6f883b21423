"""Structure that changed, as data: noted, stored, replayed on a fresh network, or refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import taut
from taut import edits
from taut.container import encode
from taut.edits import Edit, Resize
from taut.errors import FormatError, RecipeError
from taut.modules import clone
from taut.pack import load, pack
from taut.packed import Plain
from taut.reshaping import Reshaping
from taut.technique import STEPS, option, register_step


def resize_of(kept):
    """Of small_net: so many units of its first layer."""
    return Resize(
        sizes={"0.weight": [kept, 64], "0.bias": [kept], "3.weight": [32, kept]},
        attributes={"0.out_features": kept, "3.in_features": kept},
    )


@dataclass(frozen=True, kw_only=True)
class FirstUnits(Reshaping):
    """Keep the first units of the first layer of small_net."""

    kept: int = option(24, low=1, high=48)

    def reshape(self, model, trace, statistics):
        assert statistics.loss(model) > 0
        parts = {n: p.detach().clone() for n, p in model.named_parameters()}
        edit = resize_of(self.kept)
        edit.replay(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(parts[name][tuple(slice(n) for n in p.shape)])
        edits.note(model, edit)
        return model


@pytest.fixture(autouse=True)
def _known():
    register_step(FirstUnits)
    yield
    del STEPS["first_units"]


def test_a_whole_run_reshapes_then_recodes(trained, task, tmp_path):
    recipe = "first_units(kept=20) > recover(epochs=1) > share_values(bits=4) > recover(epochs=1)"
    result = taut.compress(trained, task, recipe, folder=tmp_path / "run")
    assert trained[0].weight.shape == (48, 64)
    loaded = taut.load(result.folder / "net.taut", clone(trained))
    assert loaded[0].weight.shape == (20, 64)
    assert loaded[0].out_features == loaded[3].in_features == 20
    x = next(task.batches("test")).args[0]
    assert torch.equal(loaded(x), result.model(x))
    assert task.evaluate(loaded) == result.measurement.score > 0.7
    macs = 64 * 20 + 20 * 32 + 320
    assert result.measurement.macs == macs
    assert result.measurement.parameters == macs + 20 + 32 + 10
    assert taut.inspect(result.folder / "net.taut").edits == ("resize",)
    pack(loaded, tmp_path / "again.taut")
    assert (tmp_path / "again.taut").read_bytes() == (result.folder / "net.taut").read_bytes()


def test_killed_after_its_structure_changed_a_run_goes_on(trained, task, tmp_path):
    recipe = "first_units(kept=20) > recover(epochs=2) > share_values(bits=4)"
    whole = taut.compress(trained, task, recipe, folder=tmp_path / "whole")

    class Killer(taut.Watch):
        def on_batch(self, epoch, of, batch, batches):
            if epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taut.compress(trained, task, recipe, folder=tmp_path / "killed", watch=Killer())
    saved = tmp_path / "killed" / "trials" / "1" / "checkpoint.pt"
    assert torch.load(saved, weights_only=True)["edits"][0][0] == "resize"
    again = taut.compress(trained, task, recipe, folder=tmp_path / "killed")
    assert again.measurement.size_bytes == whole.measurement.size_bytes
    a, b = (tmp_path / n / "net.taut" for n in ("killed", "whole"))
    assert a.read_bytes() == b.read_bytes()


def test_reshaping_comes_first(trained, task, tmp_path):
    told = r"first_units changes the structure of the network, which must come before share_values"
    with pytest.raises(RecipeError, match=told):
        taut.compress(trained, task, "share_values() > first_units()", folder=tmp_path / "run")
    net = taut.apply(clone(trained), "share_values()", task)
    told = r"first_units: the weight of site '0.weight' is recoded already; put first_units first"
    with pytest.raises(RecipeError, match=told):
        taut.apply(net, FirstUnits(), task, taut.trace(trained, task.example()))


def test_it_changes_a_whole_network_not_a_site(trained, task):
    traced = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match=r"a whole network, not site '0.weight' alone"):
        FirstUnits().apply(trained, traced.sites[0])


def test_edits_read_back_as_they_were_written():
    changes = (resize_of(8), Resize(sizes={}, attributes={"a.b": [1, 2]}))
    assert edits.from_json(edits.to_json(changes)) == changes


def test_tied_tensors_stay_tied():
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    net[1].weight = net[0].weight
    edits.replay(net, [Resize(sizes={"1.weight": [3, 3]}, attributes={})])
    assert net[0].weight is net[1].weight
    assert net[0].weight.shape == (3, 3)


def test_buffers_and_recurrent_layers_shrink_too():
    net = nn.ModuleDict({"norm": nn.BatchNorm1d(8), "rnn": nn.GRU(8, 8)})
    sizes = {f"norm.{n}": [4] for n in ("weight", "bias", "running_mean", "running_var")}
    sizes |= {"rnn.weight_ih_l0": [12, 4], "rnn.weight_hh_l0": [12, 4]}
    sizes |= {"rnn.bias_ih_l0": [12], "rnn.bias_hh_l0": [12]}
    attributes = {"norm.num_features": 4, "rnn.input_size": 4, "rnn.hidden_size": 4}
    edits.replay(net, [Resize(sizes=sizes, attributes=attributes)])
    out, _ = net["rnn"](net["norm"](torch.randn(5, 4)))
    assert out.shape == (5, 4)


def stored(net, raw, path):
    """A file that holds a network's tensors and claims these edits."""
    state = {(n,): Plain.of(t) for n, t in net.state_dict().items()}
    path.write_bytes(encode(state, raw))
    return path


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


@dataclass(frozen=True, kw_only=True)
class Grow(Edit):
    """Not allowed."""

    def replay(self, model):
        model.more = nn.Linear(100, 100)
        return model


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ([["reshape", {}]], r"no edit is named 'reshape'; did you mean 'resize'"),
        ([["resize", {"sizes": {}}]], "resize: .*missing.*'attributes'"),
        ([["resize", {"size": {}}]], r"resize has no option 'size'; did you mean 'sizes'"),
        ([["resize", {"sizes": {"0.weight": 3}, "attributes": {}}]], "sizes is of another type"),
        (
            [["resize", {"sizes": {"0.weight": [True, 4]}, "attributes": {}}]],
            "sizes is of another type",
        ),
        ([["resize", {"sizes": {}, "attributes": {"0.bias": "x"}}]], "attributes is of another"),
        (
            [["resize", {"sizes": {"0.weight": [5, 4]}, "attributes": {}}]],
            r"0.weight of shape \[4, 4\] cannot become \[5, 4\]",
        ),
        (
            [["resize", {"sizes": {"0.weight": [0, 4]}, "attributes": {}}]],
            r"cannot become \[0, 4\]",
        ),
        ([["resize", {"sizes": {"0.weight": [4]}, "attributes": {}}]], r"cannot become \[4\]"),
        ([["resize", {"sizes": {"0.forward": [4]}, "attributes": {}}]], "of shape method cannot"),
        (
            [["resize", {"sizes": {"no.weight": [4]}, "attributes": {}}]],
            "has no attribute .no.; build the model",
        ),
        (
            [["resize", {"sizes": {}, "attributes": {"0.in_features": 5}}]],
            "0.in_features, which is 4, cannot become 5",
        ),
        ([["resize", {"sizes": {}, "attributes": {"0.training": 0}}]], "which is True, cannot"),
        (
            [["resize", {"sizes": {}, "attributes": {"1.normalized_shape": [2, 2]}}]],
            r"which is \(4,\), cannot become \[2, 2\]",
        ),
        ([["resize", {"sizes": {}, "attributes": {"0.__class__": 1}}]], "which is None, cannot"),
        ([["grow", {}]], "may not make a network larger, and this one makes"),
        (
            [["widen", {"sizes": {"0.weight": [9, 4]}, "attributes": {}}]],
            r"widen: 0.weight of shape \[4, 4\] cannot become \[9, 4\]",
        ),
        ([["widen", {"sizes": {"0.weight": [3, 4]}, "attributes": {}}]], r"become \[3, 4\]"),
        (
            [["widen", {"sizes": {}, "attributes": {"0.in_features": 9}}]],
            "0.in_features, which is 4, cannot become 9",
        ),
        ([["widen", {"sizes": {}, "attributes": {}}]] * 2, "a network is widened once"),
    ],
)
def test_hostile_edits_are_refused_and_the_model_is_untouched(raw, told, tmp_path, monkeypatch):
    monkeypatch.setitem(edits.EDITS, "grow", Grow)
    monkeypatch.setattr(Grow, "kind", "grow", raising=False)
    path, model = stored(net(), raw, tmp_path / "bad.taut"), net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(FormatError, match=told):
        load(path, model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert not edits.of(model)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ([["resize"]], r"an edit is \[kind, options\]"),
        ([["resize", []]], r"an edit is \[kind, options\]"),
        ([["", {}]], r"an edit is \[kind, options\]"),
        ([[f"e{i * i}", {}] for i in range(4097)], "its edits, at most 4096"),
    ],
)
def test_what_are_no_edits_is_not_written(raw, told, tmp_path):
    with pytest.raises(FormatError, match=told):
        stored(net(), raw, tmp_path / "bad.taut")


def test_a_reshaped_model_is_no_fresh_one(tmp_path):
    raw = edits.to_json([Resize(sizes={"0.bias": [2]}, attributes={})])
    small = edits.replay(net(), edits.from_json(raw))
    path = stored(small, raw, tmp_path / "net.taut")
    with pytest.raises(FormatError, match="was reshaped already; load into a freshly built one"):
        load(path, small)
    assert load(path, net())[0].bias.shape == (2,)
