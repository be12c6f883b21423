"""Quantization: what is rounded to what, which gradients pass, mixed bits, chains, bad input."""

import itertools
import math

import pytest
import torch
from nets import Net
from torch import nn

import taut
from taut.activations import StepCode, input_forms
from taut.affine_weight import AffineWeight
from taut.data import Batches
from taut.errors import RecipeError, TaskError
from taut.fake_quantization import LearnedSteps, Projected, Steps
from taut.layers import packed_layers, run_dense
from taut.modules import clone, tensor_at
from taut.recoding import chain, core
from taut.statistics import Statistics
from taut.techniques import Quantize
from taut.techniques.quantize import share_out
from taut.trace import trace


def linear(values):
    net = nn.Sequential(nn.Linear(values.shape[1], values.shape[0], bias=False))
    with torch.no_grad():
        net[0].weight.copy_(values)
    return net, trace(net, ((torch.zeros(2, values.shape[1]),), {})).sites[0]


def quantized(values, **options):
    net, site = linear(values)
    Quantize(**options).apply(net, site)
    return net, tensor_at(net, site.name).detach()


# Weights


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("per", ["tensor", "channel", 10])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_group_has_its_own_levels(bits, per, symmetric):
    values = torch.randn(6, 40) * torch.logspace(-1, 1, 6)[:, None]
    net, found = quantized(values, bits=bits, per=per, symmetric=symmetric)
    groups = {"tensor": 1, "channel": 6, 10: 24}[per]
    steps = net[0].parametrizations.weight[0].forms[0].step()
    assert len(steps) == groups
    before_after = values.reshape(groups, -1), found.reshape(groups, -1)
    for step, before, after in zip(steps, *before_after, strict=True):
        levels = after.unique()
        assert 2 <= len(levels) <= 2**bits
        whole = levels / step
        torch.testing.assert_close(whole, whole.round(), rtol=1e-5, atol=1e-5)
        inside = (before >= levels[0]) & (before <= levels[-1])
        assert bool(((before - after).abs() <= step * 0.50001)[inside].all())


def test_more_bits_and_finer_groups_err_less():
    values = torch.randn(8, 64) * torch.logspace(-1, 1, 8)[:, None]

    def error(**options):
        return float((quantized(values, **options)[1] - values).square().mean())

    falling = [error(bits=b) for b in range(2, 9)]
    assert all(b < a / 2 for a, b in itertools.pairwise(falling))
    assert error(bits=4, per=8) < error(bits=4) < error(bits=4, per="tensor")


@pytest.mark.parametrize("method", ["float16", "bfloat16"])
def test_halves_are_the_nearest_and_are_stored_so(method, tmp_path):
    values = torch.randn(6, 40)
    net, found = quantized(values, method=method)
    assert torch.equal(found, values.to(getattr(torch, method)).float())
    taut.pack(net, tmp_path / "net.taut", "float32")
    stored = taut.inspect(tmp_path / "net.taut").tensors[0]
    assert stored.size_bytes < 2.1 * values.numel()
    fresh, _ = linear(torch.zeros(6, 40))
    assert torch.equal(taut.load(tmp_path / "net.taut", fresh)[0].weight, found)


def test_gradients_pass_straight_through():
    values = torch.randn(6, 9)
    net, rounded = quantized(values, bits=2)
    x = torch.randn(5, 9)
    net(x).square().sum().backward()
    plain, site = linear(rounded)
    plain(x).square().sum().backward()
    torch.testing.assert_close(core(net, site).grad, plain[0].weight.grad)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        "0.parametrizations.weight.original"
    ]


def test_a_learned_step_has_the_gradients_of_lsq():
    """Esser et al., equations 3 and 5, one weight after the other, times 1 / sqrt(N · Q)."""
    form = LearnedSteps(3, torch.tensor([0.5, 0.25]), torch.tensor([4.0, 4.0]), 2)
    w = torch.tensor([[0.3, -0.7, 5.0, -5.0], [0.1, 0.2, -0.3, 0.9]], requires_grad=True)
    upstream = torch.randn(2, 4)
    (form(w) * upstream).sum().backward()
    steps, through = [], []
    for row, grads, step in zip(w.tolist(), upstream.tolist(), (0.5, 0.25), strict=True):
        total = 0.0
        for v, g in zip(row, grads, strict=True):
            scaled = v / step
            clipped = -4 if scaled <= -4 else 3 if scaled >= 3 else round(scaled) - scaled
            total += g * clipped
            through.append(g if -4 <= scaled <= 3 else 0.0)
        steps.append(total / math.sqrt(4 * 3))
    torch.testing.assert_close(form.steps.grad, torch.tensor(steps))
    torch.testing.assert_close(w.grad.flatten(), torch.tensor(through))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_dorefa_projects_by_tanh(bits):
    values = torch.randn(1, 30)
    form = Projected(bits, torch.ones(1), torch.full((1,), (2**bits - 1) / 2), 1)
    form.fit(values, None)
    scale = float(form.step().detach()) * (2**bits - 1) / 2
    w = values.clone().requires_grad_(True)
    found = form(w)
    found.sum().backward()
    most, top = 2**bits - 1, max(math.tanh(abs(v)) for v in values[0].tolist())
    for v, got, slope in zip(
        values[0].tolist(), found[0].tolist(), w.grad[0].tolist(), strict=True
    ):
        share = math.tanh(v) / (2 * top) + 0.5
        level = (v >= 0) if bits == 1 else round(most * share)
        assert got == pytest.approx(scale * (2 * level / most - 1), abs=1e-6)
        by_hand = 2 * scale if bits == 1 else scale * (1 - math.tanh(v) ** 2) / top
        assert slope == pytest.approx(by_hand, rel=1e-4)
    if bits == 1:
        assert scale == pytest.approx(float(values.abs().mean()), rel=0.01)


def test_second_order_rounding_keeps_the_outputs_nearer(trained, task):
    x = next(iter(task.batches("train"))).args[0]

    def error(method):
        net = taut.apply(clone(trained), Quantize(bits=3, method=method), task)
        return float((net(x) - trained(x)).detach().square().mean())

    assert error("gptq") < error("affine") / 2


# Inputs


def reading(values, **options):
    """The code of a layer that reads these values, and the form."""
    net = nn.Sequential(nn.Linear(values.shape[1], 3))
    task = taut.Task(
        train=Batches(values, torch.zeros(len(values)).long(), 50),
        test=Batches(values, torch.zeros(len(values)).long(), 50),
    )
    taut.apply(net, Quantize(**options), task)
    form = dict(input_forms(net))["0"]
    return form.pack(), form, net


def test_inputs_take_the_levels_that_they_need():
    x = torch.randn(100, 8)
    ends = {
        (bits, kind): (code.low, code.high)
        for bits in (2, 4, 8)
        for kind, given in (("signed", x), ("positive", x.abs()))
        for code in [reading(given, activations=bits)[0]]
    }
    assert ends == {
        (2, "signed"): (-2, 1), (2, "positive"): (0, 3), (4, "signed"): (-8, 7),
        (4, "positive"): (0, 15), (8, "signed"): (-128, 127), (8, "positive"): (0, 127),
    }  # fmt: skip
    one = reading(x, bits=1, activations=1, method="dorefa")[0]
    assert (one.low, one.high) == (0, 1)


def test_a_calibrated_step_errs_little_on_what_was_seen():
    x = torch.randn(400, 8).relu()
    for bits, most in ((4, 0.01), (8, 1e-3)):
        code = reading(x, activations=bits)[0]
        assert float((code.rounded(x) - x).square().mean() / x.square().mean()) < most**1.0


def test_a_dynamic_step_follows_each_input():
    code, form, _ = reading(torch.randn(100, 8), activations=8, ranges="dynamic")
    assert code.dynamic
    x = torch.randn(2, 8) * torch.tensor([[1.0], [1000.0]])
    torch.testing.assert_close(form(x), code.rounded(x), rtol=0, atol=0)
    assert bool(((form(x) - x).abs() <= x.abs().amax(1, keepdim=True) / 253).all())


def test_a_learned_step_of_inputs_has_the_gradient_of_lsq():
    form = Steps(torch.tensor([0.5]), 0, 3, learned=True)
    x = torch.tensor([[0.6, -1.0, 9.0, 0.2]], requires_grad=True)
    form(x).sum().backward()
    wanted = ((1 - 1.2) + 0 + 3 + (0 - 0.4)) / math.sqrt(4 * 3)
    assert float(form.step.grad) == pytest.approx(wanted, rel=1e-5)
    assert x.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_gradients_of_inputs_pass_where_nothing_is_clipped():
    form = Steps(torch.tensor([0.5]), -2, 1)
    x = torch.tensor([[0.4, -1.0, 0.6, -1.1]], requires_grad=True)
    form(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert form.step.grad is None


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 3 * 3, 10),
    ).eval()  # fmt: skip


def small_task(task):
    """The digits as images."""
    splits = {
        s: [(b.args[0].reshape(-1, 1, 8, 8), b.target) for b in task.batches(s)]
        for s in ("train", "test")
    }
    return taut.Task(**splits)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "activations": 4},
        {"bits": 2, "activations": 3, "method": "lsq"},
        {"bits": 2, "activations": 2, "method": "dorefa"},
        {"bits": 1, "activations": 1, "method": "dorefa", "per": "tensor"},
        {"bits": 8, "activations": 8},
        {"bits": 8, "activations": 8, "symmetric": False},
        {"bits": 4, "activations": 8, "ranges": "dynamic"},
    ],
    ids=str,
)
def test_packed_it_answers_as_it_trained(options, task, tmp_path):
    images = small_task(task)
    net = taut.apply(small(), Quantize(**options), images)
    taut.recover(net, images, taut.Recover(epochs=1, learning_rate=1e-3, distill=0.0))
    taut.pack(net, tmp_path / "net.taut", "float32")
    loaded = taut.load(tmp_path / "net.taut", small())
    x = next(iter(images.batches("test"))).args[0][:50]
    with torch.no_grad():
        wanted = net.eval()(x)
        torch.testing.assert_close(loaded(x), wanted, rtol=1e-4, atol=1e-4)
        run_dense(loaded, False)
        close = ((loaded(x) - wanted).abs() < 1e-3 * wanted.abs().max()).all(1)
    assert float(close.float().mean()) > 0.9  # a sum next to a threshold may fall on its other side


def test_whole_numbers_and_bits_are_what_runs(task, tmp_path, monkeypatch):
    images, ran = small_task(task), []
    for name in ("matmul_int8", "matmul_levels", "conv2d_levels"):
        kept = getattr(AffineWeight, name)

        def seen(self, *given, kept=kept, name=name):
            found = kept(self, *given)
            ran.append((name, found is not None))
            return found

        monkeypatch.setattr(AffineWeight, name, seen)
    x = next(iter(images.batches("test"))).args[0]
    for bits, expected in (
        (8, {("matmul_int8", True)}),
        (4, {("conv2d_levels", True), ("matmul_levels", True)}),
    ):
        net = taut.apply(small(), Quantize(bits=bits, activations=bits), images)
        taut.pack(net, tmp_path / "net.taut")
        loaded = taut.load(tmp_path / "net.taut", small())
        run_dense(loaded, False)
        ran.clear()
        loaded(x)
        assert set(ran) == expected


def test_layers_whose_inputs_stay_are_still_quantized(task):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 6, batch_first=True)
            self.out = nn.Linear(6, 10)

        def forward(self, x):
            return self.out(self.lstm(x.reshape(-1, 8, 8))[0][:, -1])

    net = taut.apply(Both(), Quantize(activations=8), task)
    assert [path for path, _ in input_forms(net)] == ["out"]
    assert len(net.lstm.parametrizations) == 2


# Mixed bits


def test_bits_go_where_they_spare_most():
    rng = torch.Generator().manual_seed(0)
    numels = {"a": 10, "b": 30, "c": 7}
    for mean in (3, 4, 5):
        sizes = (10 ** (2 * torch.rand(3, generator=rng))).tolist()
        damages = {n: [s / 4**i for i in range(7)] for n, s in zip("abc", sizes, strict=True)}

        def cost(bits, damages=damages):
            return sum(damages[n][b - 2] for n, b in zip("abc", bits, strict=True))

        chosen = share_out(damages, numels, mean)
        room = mean * sum(numels.values())
        fits = [
            bits
            for bits in itertools.product(range(2, 9), repeat=3)
            if sum(b * n for b, n in zip(bits, numels.values(), strict=True)) <= room
        ]
        assert tuple(chosen[n] for n in "abc") in fits
        assert cost([chosen[n] for n in "abc"]) <= 1.02 * min(cost(bits) for bits in fits)
    assert share_out(damages, numels, 8) == {"a": 8, "b": 8, "c": 8}
    assert share_out(damages, numels, 2) == {"a": 2, "b": 2, "c": 2}


def test_what_matters_little_gets_fewer_bits(task):
    torch.manual_seed(0)
    net = Net(lambda n, x: n.a(x) + 0.01 * n.b(x), a=nn.Linear(64, 10), b=nn.Linear(64, 10)).eval()
    x = next(iter(task.batches("train"))).args[0]
    traced = trace(net, task.example())
    mixed = Quantize(bits=4, mixed=True)
    local = mixed.localise(net, traced.sites, Statistics(net, task.calibration_loss()))
    bits = {n: q.bits for n, q in local.items()}
    assert bits["b.weight"] < 4 < bits["a.weight"]
    assert sum(bits.values()) <= 8
    assert not any(q.mixed for q in local.values())

    def error(step):
        found = taut.apply(clone(net), step, task)(x)
        return float((found - net(x)).detach().square().mean())

    assert error(mixed) < error(Quantize(bits=4)) / 2


# Chains


def test_what_a_mask_kept_shares_one_step(trained, task, tmp_path):
    net = taut.apply(
        clone(trained), taut.techniques.PruneWeights(sparsity=0.8, scope="layer"), task
    )
    mask = tensor_at(net, "0.weight") != 0
    taut.apply(net, Quantize(bits=4, method="lsq"), task, trace(trained, task.example()))
    found = tensor_at(net, "0.weight").detach()
    assert bool((found[~mask] == 0).all())
    assert len(found.unique()) <= 16
    taut.recover(net, task, taut.Recover(epochs=1))
    taut.pack(net, tmp_path / "net.taut")
    stored = taut.inspect(tmp_path / "net.taut").tensors[0]
    assert stored.size_bytes < mask.sum() * 4 / 8 + mask.numel() / 8
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    values = packed_layers(loaded)["0"].packed["weight"].values
    assert isinstance(values, AffineWeight)
    assert values.steps.numel == 1


def test_second_order_rounding_respects_a_mask(trained, task):
    net = taut.apply(
        clone(trained), taut.techniques.PruneWeights(sparsity=0.8, scope="layer"), task
    )
    mask = tensor_at(net, "0.weight") != 0
    taut.apply(net, Quantize(bits=4, method="gptq"), task, trace(trained, task.example()))
    assert bool((tensor_at(net, "0.weight")[~mask] == 0).all())


def test_a_table_of_another_technique_is_quantized(trained, task, tmp_path):
    net = taut.apply(clone(trained), taut.techniques.ShareValues(bits=6), task)
    taut.apply(net, Quantize(bits=8), task, trace(trained, task.example()))
    wanted = tensor_at(net, "0.weight").detach()
    taut.pack(net, tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", clone(trained))
    packed = packed_layers(loaded)["0"].packed["weight"]
    assert packed.table.format == "affine.v1"
    torch.testing.assert_close(packed.dense(), wanted)


def test_again_it_takes_its_own_place(trained, task):
    traced = trace(trained, task.example())
    net = taut.apply(clone(trained), Quantize(bits=8, activations=8), task)
    taut.apply(net, Quantize(bits=2, activations=4), task, traced)
    assert len(chain(net, traced.site("0.weight")).recipe) == 1
    assert {f.pack().high for _, f in input_forms(net)} <= {7, 15}


class Killed(taut.Watch):
    """A machine that stops after an epoch."""

    def on_epoch(self, record):
        if record.epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_a_run_killed_and_restarted_writes_the_same_file(trained, task, tmp_path, method):
    recipe = "prune_weights(sparsity=0.5, scope='layer') > quantize(bits=3, activations=3, "
    recipe += f"method={method!r}) > recover(epochs=2) > recover(epochs=1)"
    for _ in range(2):  # in each of the two recoveries
        with pytest.raises(KeyboardInterrupt):
            taut.compress(trained, task, recipe, folder=tmp_path / "a", watch=Killed())
    again = taut.compress(trained, task, recipe, folder=tmp_path / "a")
    whole = taut.compress(trained, task, recipe, folder=tmp_path / "b")
    assert (tmp_path / "a/net.taut").read_bytes() == (tmp_path / "b/net.taut").read_bytes()
    assert [r.loss for r in again.history] == [r.loss for r in whole.history]
    assert isinstance(packed_layers(whole.model)["0"].input_code, StepCode)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, r"quantize: bits must lie in \[1, 8\], got 9"),
        ({"bits": 0}, r"quantize: bits must lie in \[1, 8\], got 0"),
        (
            {"bits": 1},
            r"bits must lie in \[2, 8\] with method='affine', got 1; use method='dorefa'",
        ),
        ({"activations": 9}, r"activations must lie in \[0, 8\], got 9"),
        (
            {"activations": 1, "method": "lsq"},
            r"activations must lie in \[2, 8\] with method='lsq'",
        ),
        ({"per": "row"}, "per must be 'tensor', 'channel' or a number of columns, got 'row'"),
        ({"per": 0}, r"per must lie in \[1, inf\), got 0"),
        ({"per": 2.5}, "per must be str or int, got 2.5"),
        ({"method": "lqs"}, "method has no choice 'lqs'; did you mean 'lsq'"),
        ({"symmetric": False, "method": "lsq"}, "got symmetric=False; use method='affine'"),
        ({"ranges": "dynamic"}, "ranges='dynamic' needs activations of 2 to 8 bits"),
        ({"ranges": "dynamic", "activations": 8, "method": "lsq"}, "a step that is not trained"),
        ({"mixed": True, "method": "float16"}, "mixed needs whole numbers"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        Quantize(**options)


def test_a_group_must_divide_the_columns():
    net, site = linear(torch.randn(4, 30))
    message = "got per=8 for 30 columns at site '0.weight'; choose a divisor or per='channel'"
    with pytest.raises(RecipeError, match=message):
        Quantize(per=8).apply(net, site)


def test_numbers_too_large_for_halves_are_refused():
    net, site = linear(torch.full((2, 3), 1e6))
    with pytest.raises(RecipeError, match=r"as large as 1e\+06 at site '0.weight'; use .*bfloat16"):
        Quantize(method="float16").apply(net, site)
    Quantize(method="bfloat16").apply(net, site)


def test_calibration_needs_data_that_differ():
    net, site = linear(torch.randn(4, 6))
    with pytest.raises(TaskError, match=r"what the layer of site '0.weight' reads needs a task"):
        Quantize(activations=8).apply(clone(net), site)
    with pytest.raises(TaskError, match=r"the inputs of layer '0' are all 0.5 in the calibration"):
        reading(torch.full((10, 6), 0.5), activations=8)
    with pytest.raises(TaskError, match="the inputs of layer '0' are not all numbers"):
        reading(torch.full((10, 6), torch.nan), activations=8)


def test_second_order_rounding_of_a_table_is_refused(trained, task):
    net = taut.apply(clone(trained), taut.techniques.ShareValues(bits=4), task)
    message = "needs a number for each weight, and site '0.weight' is written in 16 numbers"
    with pytest.raises(RecipeError, match=message):
        taut.apply(net, Quantize(method="gptq"), task, trace(trained, task.example()))


def test_a_mean_needs_numbers_too(trained, task):
    net = clone(trained)
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    with pytest.raises((RecipeError, TaskError), match="NaN"):
        taut.apply(net, Quantize(bits=3, mixed=True), task)
