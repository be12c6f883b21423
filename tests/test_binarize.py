"""One bit, or three values, for a weight; two levels for an input: definitions, whole runs."""

import pytest
import torch
from torch import nn

import taut
from taut.activations import input_forms
from taut.bit_weight import BitWeight
from taut.container import encode
from taut.errors import FormatError, RecipeError
from taut.kernels import Levels
from taut.layers import packed_layers, run_dense
from taut.modules import clone, tensor_at
from taut.pack import load, pack, packed_state
from taut.packed import Plain
from taut.techniques import Binarize


def bnn():
    """64-48-48-10 with batch norms, and hardtanh where signs read."""
    return nn.Sequential(
        nn.Linear(64, 48, bias=False), nn.BatchNorm1d(48), nn.Hardtanh(),
        nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.Hardtanh(),
        nn.Linear(48, 10),
    )  # fmt: skip


def applied(net, task, **options):
    return taut.apply(net, Binarize(**options), task)


def test_a_sign_and_the_mean_of_each_row(trained, task):
    weight = trained[3].weight.detach().clone()
    net = applied(clone(trained), task)
    scale = weight.abs().mean(1, keepdim=True).bfloat16().float()
    wanted = torch.where(weight >= 0, scale, -scale)
    torch.testing.assert_close(tensor_at(net, "3.weight").detach(), wanted)
    assert torch.equal(net[0].weight, trained[0].weight)  # the ends stay
    assert torch.equal(net[5].weight, trained[5].weight)


def test_three_values_by_the_threshold_of_the_paper(trained, task):
    weight = trained[3].weight.detach().clone()
    net = applied(clone(trained), task, weights="ternary", scale="site")
    threshold = 0.7 * weight.abs().mean()
    used = weight.abs() > threshold
    scale = weight.abs()[used].mean().bfloat16().float()
    wanted = weight.sign() * used * scale
    torch.testing.assert_close(tensor_at(net, "3.weight").detach(), wanted)


def test_two_trained_values(trained, task):
    weight = trained[3].weight.detach().clone()
    net = applied(clone(trained), task, weights="trained")
    threshold = 0.05 * weight.abs().max()
    up, down = weight[weight > threshold].mean(), -weight[weight < -threshold].mean()
    wanted = up.bfloat16().float() * (weight > threshold)
    wanted = wanted - down.bfloat16().float() * (weight < -threshold)
    torch.testing.assert_close(tensor_at(net, "3.weight").detach(), wanted)
    form = net[3].parametrizations.weight[0].forms[0]
    form(core := torch.tensor([2.0, -1.0, 0.01], requires_grad=True)).sum().backward()
    assert [float(form.up.grad), float(form.down.grad)] == [1.0, -1.0]
    assert core.grad.tolist() == [float(v.detach()) for v in (*form._values(), torch.ones(()))]
    packed = packed_state(net)["3.weight",]
    torch.testing.assert_close(packed.dense(), wanted)
    assert packed.planes == 3


def test_signs_are_drawn_with_the_chance_that_the_weight_tells(trained, task):
    net = applied(clone(trained), task, weights="stochastic", scale="none").train()
    core = net[3].parametrizations.weight.original
    with torch.no_grad():
        core.fill_(0.5)
        drawn = torch.stack([tensor_at(net, "3.weight") for _ in range(40)])
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert float((drawn > 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert bool((tensor_at(net.eval(), "3.weight") == 1).all())


def test_weights_without_a_scale_stay_within_one(trained, task):
    net = applied(clone(trained), task, scale="none")
    form, core = net[3].parametrizations.weight[0].forms[0], torch.tensor([-3.0, 0.2, 1.5])
    form.advance(core, 0.5)
    assert core.tolist() == [-1.0, pytest.approx(0.2), 1.0]
    beyond = torch.tensor([[2.0, 0.5]], requires_grad=True)
    form.by_row.fill_(False)
    form(beyond).sum().backward()
    assert beyond.grad.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(("gradient", "wanted"), [("clip", [1, 1, 0]), ("bireal", [2, 1, 0])])
def test_gradients_of_signs(gradient, wanted, trained, task):
    net = applied(clone(trained), task, activations="signs", gradient=gradient)
    ((_, form),) = input_forms(net)
    x = torch.tensor([0.0, 0.5, 1.5], requires_grad=True)
    y = form(x)
    assert y.tolist() == [1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == wanted


def test_two_levels_are_fitted_to_what_is_read(trained, task):
    net = applied(clone(trained), task, activations="pair")
    ((path, form),) = input_forms(net)
    assert path == "3"
    x = torch.relu(trained[0](torch.cat([b.args[0] for b in task.batches("test")]))).detach()
    levels = {float(v) for v in form(x).detach().unique()}
    assert len(levels) == 2
    cut = float(form.middle.detach())
    parts = (float(x[x < cut].mean().detach()), float(x[x >= cut].mean().detach()))
    assert min(levels) == pytest.approx(parts[0], abs=0.05)
    assert max(levels) == pytest.approx(parts[1], abs=0.1)


def test_trained_it_runs_by_counting_bits_with_the_same_answers(task, tmp_path):
    torch.manual_seed(3)
    net = bnn()
    taut.recover(net, task, taut.Recover(epochs=6, learning_rate=5e-3, distill=0.0))
    recipe = (
        "binarize(scale='none', activations='signs', only='3') > recover(epochs=4, "
        "learning_rate=0.003)"
    )
    result = taut.compress(net, task, recipe, folder=tmp_path / "run")
    assert result.measurement.score > 0.85
    loaded = load(result.folder / "net.taut", bnn())
    x = torch.cat([b.args[0] for b in task.batches("test")])
    dense = loaded(x)
    run_dense(loaded, False)
    packed = loaded(x)
    torch.testing.assert_close(packed, dense)
    assert torch.equal(packed.argmax(1), dense.argmax(1))
    layer = packed_layers(loaded)["3"]
    assert layer.packed["weight"].format == "bits.v1"
    assert layer.input_code.levels().scale.tolist() == [1.0]
    stored = {t.names[0]: t.size_bytes for t in taut.inspect(result.folder / "net.taut").tensors}
    assert stored["3.weight"] < 48 * 48 / 8 + 10


def test_a_killed_run_goes_on_with_its_inputs(task, tmp_path):
    torch.manual_seed(3)
    net = bnn()
    recipe = "binarize(activations='pair', ends=True) > recover(epochs=2) > recover(epochs=1)"
    whole = taut.compress(net, task, recipe, folder=tmp_path / "whole")

    class Killer(taut.Watch):
        def on_batch(self, epoch, of, batch, batches):
            if epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taut.compress(net, task, recipe, folder=tmp_path / "killed", watch=Killer())
    again = taut.compress(net, task, recipe, folder=tmp_path / "killed")
    assert again.measurement.score == whole.measurement.score
    a, b = (tmp_path / n / "net.taut" for n in ("killed", "whole"))
    assert a.read_bytes() == b.read_bytes()


def test_what_a_mask_keeps_is_binarized(trained, task, tmp_path):
    net = clone(trained)
    traced = taut.trace(net, task.example())
    for step in ("prune_weights(sparsity=0.8, scope='layer')", "binarize()"):
        taut.apply(net, step, task, traced)
    weight = tensor_at(net, "3.weight").detach()
    assert len(weight.unique()) == 3
    packed = packed_state(net)["3.weight",]
    assert (packed.format, packed.values.format) == ("sparse.v1", "bits.v1")
    x = torch.randn(4, 48)
    torch.testing.assert_close(packed.matmul(x), x @ weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_count_bits_too(groups):
    torch.manual_seed(0)
    codes, scale = torch.randint(0, 4, (6, 8 // groups, 3, 3)), torch.rand(2, 6)
    weight = BitWeight(codes, Plain.of(scale, "float32"))
    assert torch.equal(weight.symbols(), codes.to(torch.uint8))
    x, levels = torch.randn(2, 8, 7, 7), Levels.uniform(2, 0.5)
    got = weight.conv2d_levels(x, levels, (2, 1), (1, 1), (1, 1), groups)
    wanted = nn.functional.conv2d(levels.decoded(x), weight.dense(), None, (2, 1), 1, 1, groups)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (5, 7), (17, 65), (16, 64), (4, 3, 3), (33, 5, 2, 2)])
@pytest.mark.parametrize("planes", [1, 2, 4])
def test_the_weight_is_the_sum_of_its_scaled_signs(shape, planes):
    codes = torch.randint(0, 2**planes, shape)
    rows = shape[0] if len(shape) > 1 else 1
    scale = torch.rand(planes, rows)
    weight = BitWeight(codes, Plain.of(scale, "float32"))
    wanted = sum(
        (2.0 * (codes >> p & 1) - 1) * scale[p].reshape(-1, *[1] * (len(shape) - 1))
        for p in range(planes)
    )
    torch.testing.assert_close(weight.dense(), wanted)
    assert torch.equal(weight.symbols(), codes.to(torch.uint8))


def test_the_ends_are_all_there_is(task):
    net = nn.Sequential(nn.Linear(64, 10))
    told = r"binarize: only the first and the last site match only='\*' \(0.weight\).*ends=True"
    with pytest.raises(RecipeError, match=told):
        taut.apply(net, "binarize()", task)


def test_levels_of_inputs_need_data(trained, task):
    site = taut.trace(trained, task.example()).site("3.weight")
    with pytest.raises(RecipeError, match=r"need data, and site '3.weight' was given none; use"):
        Binarize(activations="pair").apply(clone(trained), site)


class Forged(BitWeight):
    """Bits that say of themselves what is not so."""

    format = "bits.v1"

    def __init__(self, shape, meta):
        super().__init__(torch.zeros(shape, dtype=torch.long), Plain.of(torch.ones(1, 1)))
        self._meta = meta

    def meta(self):
        return self._meta


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({"planes": 5}, r"planes must lie in \[1, 4\], got 5"),
        ({"planes": True}, r"planes must lie in \[1, 4\], got True"),
        ({"planes": 1, "rows": 1}, "rows, got 1, needs"),
        ({"planes": 1, "rows": True}, r"needs a shape of two rows or more, got \[1, 4\]"),
    ],
)
def test_forged_bits_are_refused(meta, told, tmp_path):
    net = nn.Linear(4, 1, bias=False)
    (tmp_path / "bad.taut").write_bytes(encode({("weight",): Forged((1, 4), meta)}))
    with pytest.raises(FormatError, match=told):
        load(tmp_path / "bad.taut", net)


def test_it_is_packed_again_alike(trained, task, tmp_path):
    net = applied(clone(trained), task, activations="pair")
    pack(net, tmp_path / "a.taut")
    loaded = load(tmp_path / "a.taut", clone(trained))
    pack(loaded, tmp_path / "b.taut")
    assert (tmp_path / "a.taut").read_bytes() == (tmp_path / "b.taut").read_bytes()
