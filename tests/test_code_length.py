"""code_length: what the numbers cost, how the cost is felt, and that the file keeps the word."""

import math

import pytest
import torch
from conftest import digits_task, small_net
from torch import nn

import taut
from taut.aim import Aim, Price, coded_bytes
from taut.container import encode
from taut.errors import RecipeError, TaskError
from taut.layers import run_dense
from taut.modules import clone, tensor_at
from taut.pack import inspect, packed_state
from taut.recoding import chain, chains
from taut.recover import Recover, recover
from taut.row_parts import MOST_PARTS, RowParts
from taut.schedules import advance, settled
from taut.sparse_weight import SparseWeight
from taut.techniques import CodeLength, PruneWeights
from taut.techniques.code_length import Integers, Rounded, _octaves, code_length
from taut.training import Training
from taut.tune import tune
from taut.zoo import TransformerLanguageModel

TRAINING = Recover(epochs=40, learning_rate=5e-3)


def sparse_numbers(*shape, density=0.1):
    """Whole numbers, of which few are not zero, more in some rows and columns than in others."""
    rows, columns = (torch.rand(n) ** 2 for n in (shape[0], math.prod(shape[1:])))
    there = torch.rand(shape[0], math.prod(shape[1:])) < 9 * density * rows[:, None] * columns
    sizes = torch.distributions.Geometric(0.6).sample(there.shape) + 1
    return (there * sizes * torch.randn(there.shape).sign()).reshape(shape)


def coded(model, task, **options):
    net = taut.apply(clone(model), CodeLength(**options), task)
    return net, taut.trace(model, task.example())


# What numbers cost


@pytest.mark.parametrize("shape", [(60, 90), (40, 5, 3, 3), (300, 12), (500,)])
@pytest.mark.parametrize("density", [0.03, 0.2])
def test_the_bits_are_about_those_of_the_file(shape, density):
    q = sparse_numbers(*shape, density=density) if len(shape) > 1 else sparse_numbers(1, *shape)[0]
    layer = nn.Module()
    layer.weight = nn.Parameter(q)
    file = encode({("weight",): Rounded(torch.zeros(())).pack(q, None, None)})
    bits = float(code_length(q)[0])
    assert bits / 8 == pytest.approx(len(file), abs=0.06 * len(file) + 70)


def test_a_number_costs_what_adding_it_adds():
    q = sparse_numbers(30, 40, density=0.2)
    before, first, more = code_length(q)
    for row, column in ((3, 7), (20, 30), (29, 0)):
        added = q.clone()
        added[row, column] = 1.0 if q[row, column] == 0 else q[row, column]
        without = added.clone()
        without[row, column] = 0.0
        step = float(code_length(added)[0] - code_length(without)[0])
        assert float(first[row, column]) == pytest.approx(step, abs=2)
    grown = q.clone()
    there = tuple(q.nonzero()[0])
    grown[there] += q[there].sign()
    assert more == pytest.approx(float(code_length(grown)[0] - before), abs=0.3)


def test_full_rows_are_cheap_and_empty_ones_dear():
    q = torch.zeros(20, 50)
    q[3, ::2] = 1.0
    _, first, _ = code_length(q)
    assert float(first[3, 1]) + 3 < float(first[4, 1])  # the same column, a fuller row
    assert float(first[4, 2]) < float(first[4, 1])


def test_the_gradient_is_that_of_the_expected_length_under_noise():
    core = torch.tensor([[0.3, -0.7, 1.4, 0.0, -2.2, 0.45]])
    form = Rounded(torch.zeros(()))
    core.requires_grad_()
    form.rate(core, None).backward()
    _, first, more = code_length(core.detach().round())
    length = torch.zeros(1, 6, 4)  # of 0, ±1, ±2, ±3 at each place
    length[..., 1:] = first[..., None] + more * torch.arange(3)
    noise = torch.rand(200_000, 1, 1, generator=torch.Generator().manual_seed(1)) - 0.5

    def expected(x):
        index = (x + noise).round().abs().long().clamp(max=3)
        return length.expand(len(noise), 1, 6, 4).gather(-1, index[..., None]).mean((0, 3))

    at, step = core.detach(), 0.2
    slope = (expected(at + step) - expected(at - step)) / (2 * step)
    for i in (0, 1, 2, 4, 5):
        assert float(core.grad[0, i]) == pytest.approx(float(slope[0, i]), rel=0.05, abs=0.05)
    assert float(core.grad[0, 3]) == 0.0


def test_entries_that_a_mask_removed_cost_nothing(trained, task):
    net, traced = coded(trained, task)
    masked = taut.apply(clone(trained), PruneWeights(sparsity=0.9, scope="layer"), task)
    taut.apply(masked, CodeLength(resolution=0.5), task, traced)
    assert float(coded_bytes(masked).detach()) < 0.3 * float(coded_bytes(net).detach())


# The trainable form


def test_weights_are_whole_multiples_of_a_step_that_bfloat16_holds(trained, task):
    net, traced = coded(trained, task)
    for site, links in chains(net, traced.places):
        step = links.forms[0].step().detach()
        assert float(step) == float(step.bfloat16())
        whole = tensor_at(net, site.name).detach() / step
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
        assert float(whole.abs().max()) <= 127
    assert {s.name for s, _ in chains(net, traced.places)} == {p.name for p in traced.places}
    plain, _ = coded(trained, task, vectors=False)
    assert chain(plain, traced.site("0.bias")) is None


def test_few_weights_far_outside_are_kept_and_packed(trained, task, tmp_path):
    model = clone(trained)
    weight = model[0].weight
    spread = float(weight.detach().square().mean().sqrt())
    with torch.no_grad():
        weight[3, 5], weight[7, 1] = 80 * spread, -60 * spread
    net, _ = coded(model, task, resolution=0.25, vectors=False)
    assert abs(float(net[0].weight.detach()[3, 5]) / (80 * spread) - 1) < 0.01
    taut.pack(net, tmp_path / "net.taut")
    packed = taut.load(tmp_path / "net.taut", small_net())
    assert inspect(tmp_path / "net.taut").tensors[0].format == "integers.v2"
    x = next(iter(task.batches("test"))).args[0]
    for dense in (True, False):
        run_dense(packed, dense)
        torch.testing.assert_close(packed(x), net.eval()(x).detach(), rtol=0, atol=1e-3)


def test_a_network_in_training_can_be_traced(trained, task):
    net, _ = coded(trained, task)
    found = torch.export.export(net.eval(), task.example()[0]).module()
    x = next(iter(task.batches("test"))).args[0][:2]
    torch.testing.assert_close(found(x), net(x))


def test_many_weights_far_outside_end_at_127():
    core = torch.linspace(-300, 300, 601)
    whole = Rounded(torch.tensor(0.0))(core).detach()
    assert float(whole.abs().max()) == 127
    assert torch.equal(whole, core.clamp(-127, 127))


def reader() -> tuple[nn.Module, taut.Task]:
    """An embedding of which few rows are read often, and the matrix that reads it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(300, 24), nn.Flatten(), nn.Linear(5 * 24, 16)).eval()
    words = (300 * torch.rand(256, 5) ** 4).long()
    pairs = [(words, net(words).detach())]
    return net, taut.Task(train=pairs, test=pairs, loss=nn.functional.mse_loss, score=_nearness)


def _nearness(output, target):
    return -(output - target).square().mean()


def test_rows_that_are_seldom_read_have_coarser_steps(tmp_path):
    net, task = reader()
    words = next(iter(task.batches("train"))).args[0]
    options = {"vectors": False, "resolution": 0.2, "only": "0.weight"}
    finer, _ = coded(net, task, by_use=True, **options)
    even, _ = coded(net, task, **options)
    octaves = finer[0].parametrizations.weight[0].forms[0].octaves
    used = words.flatten().bincount(minlength=300)
    assert int(octaves[used.argmax()]) <= -1
    assert int(octaves[used == 0].min()) == int(octaves.max()) >= 2
    assert task.evaluate(finer) > 0.75 * task.evaluate(even)  # of squared errors
    sizes = [taut.pack(n, tmp_path / f"{i}.taut") for i, n in enumerate((finer, even))]
    assert sizes[0] < sizes[1]
    links = finer[0].parametrizations.weight
    packed = links[0].pack(links.original)
    assert isinstance(packed, RowParts)
    torch.testing.assert_close(packed.dense(), finer[0].weight.detach(), rtol=0, atol=0)
    torch.testing.assert_close(packed.rows(words), finer[0].weight.detach()[words], rtol=0, atol=0)
    x = torch.randn(3, 24)
    torch.testing.assert_close(packed.matmul(x), x @ finer[0].weight.detach().T)


def test_rows_of_any_size_make_a_file_that_can_be_read(tmp_path):
    net, task = reader()
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-6, 6, 300)[:, None])
    octaves = _octaves(torch.logspace(-9, 9, 300)[:, None], 1e-6, [])
    assert 8 < octaves.unique().numel() <= MOST_PARTS
    found, _ = coded(net, task, by_use=True, vectors=False, resolution=2**-8, only="0.weight")
    taut.pack(found, tmp_path / "net.taut")
    packed = taut.load(tmp_path / "net.taut", reader()[0])
    assert isinstance(packed[0].packed["weight"], RowParts)
    assert torch.equal(packed[0].packed["weight"].dense(), found[0].weight.detach())


def test_a_row_that_is_multiplied_by_is_as_fine_as_all():
    net = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 30))
    net[1].weight = net[0].weight
    words = (30 * torch.rand(64) ** 4).long()
    task = taut.Task(train=[(words, words)], test=[(words, words)])
    found, _ = coded(net, task, by_use=True)
    assert found[0].parametrizations.weight[0].forms[0].octaves.tolist() == [0] * 30


def test_rounding_by_what_weights_do_answers_nearer(tmp_path):
    net, task = reader()
    options = {"vectors": False, "resolution": 0.5, "only": "2.weight"}
    found, _ = coded(net, task, rounding="gptq", **options)
    plain, _ = coded(net, task, **options)
    assert task.evaluate(found) > 0.6 * task.evaluate(plain)  # of squared errors
    sizes = [taut.pack(n, tmp_path / f"{i}.taut") for i, n in enumerate((found, plain))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    step = float(found[2].parametrizations.weight[0].forms[0].step().detach())
    whole = found[2].weight.detach() / step
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)


def test_rounding_by_what_weights_do_needs_data():
    net, task = reader()
    site = taut.trace(net, task.example()).site("2.weight")
    with pytest.raises(TaskError, match="needs a task with data"):
        CodeLength(rounding="gptq").apply(net, site)


def test_the_steps_gradient_is_lsqs():
    form = Rounded(torch.tensor(0.25).log())
    core = torch.tensor([0.3, -0.45, 0.05])
    upstream = torch.tensor([1.0, 2.0, 3.0])
    form(core).backward(upstream)
    scaled = core / 0.25
    wanted = (upstream * (scaled.round() - scaled)).sum() * 0.25  # of the step's logarithm
    assert float(form.log_step.grad) == pytest.approx(float(wanted), rel=1e-5)


def test_only_the_last_epoch_is_what_was_asked_for(trained, task):
    net, _ = coded(trained, task)
    assert settled(net)
    advance(net, 0.5)
    assert not settled(net)
    advance(net, 1.0)
    assert settled(net)


def test_few_numbers_are_packed_sparse_and_many_dense():
    form = Rounded(torch.zeros(()))
    few, many = sparse_numbers(30, 40), torch.randint(1, 4, (30, 40)).float()
    assert isinstance(form.pack(few, None, None), SparseWeight)
    assert isinstance(form.pack(many, None, None), Integers)


# Training


@pytest.fixture(scope="module")
def small_file():
    """A network that was trained for a short code, and its original."""
    torch.manual_seed(0)
    task, net = digits_task(), small_net()
    recover(net, task, Recover(epochs=12, learning_rate=5e-3, distill=0.0))
    original = clone(net.eval())
    taut.apply(net, CodeLength(), task)
    recover(net, task, TRAINING, settings=[Aim(size_bytes=900)], teacher=original)
    return net, original


def test_the_network_learns_to_be_small(small_file):
    net, original = small_file
    task = digits_task()
    assert len(encode(packed_state(net))) < 0.05 * 4 * sum(p.numel() for p in original.parameters())
    assert task.evaluate(net) > task.evaluate(original) - 0.05


def test_aim_ends_at_the_size_that_was_asked_for(small_file):
    net, _ = small_file
    assert len(encode(packed_state(net))) == pytest.approx(900, rel=0.08)


def test_aim_gets_there_in_a_short_training_without_ruin(trained, task):
    torch.manual_seed(0)
    net, _ = coded(trained, task)
    options = Recover(epochs=2, learning_rate=1e-3)  # weights move by 0.04 at most
    recover(net, task, options, settings=[Aim(size_bytes=900)], teacher=trained)
    assert len(encode(packed_state(net))) == pytest.approx(900, rel=0.1)
    assert task.evaluate(net) > task.evaluate(trained) - 0.1


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_aim_does_not_overshoot_in_a_few_steps(trained, task, steps):
    net, _ = coded(trained, task)
    before = len(encode(packed_state(net)))
    settings = [Aim(size_bytes=1500), Training(accumulate=-(-19 // steps))]
    recover(net, task, Recover(epochs=1, learning_rate=1e-3), settings=settings, teacher=trained)
    assert 1200 < len(encode(packed_state(net))) < 1.2 * before


def test_an_aim_goes_with_a_learning_rate_of_0(trained, task):
    net, _ = coded(trained, task)
    recover(net, task, Recover(learning_rate=0.0), settings=[Aim(size_bytes=1500)])


def test_scales_learn_faster_only_where_a_training_is_short_and_aimed(trained, task):
    net, _ = coded(trained, task)
    aimed, free = Price(net, 0.0, [Aim(size_bytes=1000)]), Price(net, 1e-5, ())
    assert aimed.haste(1e-3, 100) == pytest.approx(50)
    assert aimed.haste(1e-3, 10_000) == 1.0
    assert aimed.haste(1e-3, 1) == pytest.approx(250)
    assert aimed.haste(0.0, 1) == 1.0
    assert free.haste(1e-3, 100) == 1.0


def test_the_estimate_is_within_3_per_cent_of_the_coded_bytes(small_file, tmp_path):
    net, _ = small_file
    taut.pack(net, tmp_path / "net.taut")
    written = sum(t.size_bytes for t in inspect(tmp_path / "net.taut").tensors)
    scales = 4.6 * len(inspect(tmp_path / "net.taut").tensors)  # step and range: not learned
    assert float(coded_bytes(net).detach()) == pytest.approx(written - scales, rel=0.03)


def test_units_that_nothing_reads_leave_the_file(trained, task):
    net, traced = coded(trained, task)
    core = chain(net, traced.site("3.weight")).stages(net[3].parametrizations.weight.original)[0][1]
    with torch.no_grad():
        core[:, 5] = 0.0
    before = net(task.example()[0][0])
    lines = CodeLength().finish(net, traced)
    assert "0.weight: 1 neurons that nothing reads dropped" in lines
    assert not bool(tensor_at(net, "0.weight")[5].any())
    assert float(tensor_at(net, "0.bias").detach()[5]) == 0.0
    torch.testing.assert_close(net(task.example()[0][0]), before)


def test_a_killed_aim_goes_on_where_it_was(trained, task):
    states, results = [], []
    for resumed in (False, True):
        torch.manual_seed(3)
        net, _ = coded(trained, task)
        options = Recover(epochs=4, learning_rate=5e-3)
        settings = [Aim(size_bytes=1500)]
        if resumed:
            recover(net, task, options, settings=settings, resume=states[1])
        else:
            recover(
                net, task, options, settings=settings,
                on_epoch=lambda _, s: states.append(copied(s)),
            )  # fmt: skip
        results.append(encode(packed_state(net)))
    assert results[0] == results[1]


def copied(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {k: copied(v) for k, v in state.items()}
    return [copied(v) for v in state] if isinstance(state, list) else state


def test_a_price_that_nobody_pays_is_refused(trained, task):
    with pytest.raises(RecipeError, match=r"recover: bytes_weight=0\.001 prices the bytes .* put "):
        recover(trained, task, Recover(bytes_weight=1e-3))
    with pytest.raises(RecipeError, match=r"recover: aim\(size_bytes=500\) prices the bytes"):
        recover(trained, task, Recover(), settings=[Aim(size_bytes=500)])


def test_the_price_rises_over_the_first_third_and_is_steered_by_an_aim(trained, task):
    net, _ = coded(trained, task)
    price = Price(net, 6e-5, ())
    assert [price.now(p, 1000.0) for p in (0.0, 1 / 6, 1 / 3, 1.0)] == [
        0.0, pytest.approx(3e-5), pytest.approx(6e-5), pytest.approx(6e-5),
    ]  # fmt: skip
    steered = Price(net, 0.0, [Aim(size_bytes=1000)])
    first = steered.now(0.0, 1e5)
    assert steered.now(0.5, 1e5) > 10 * first  # far too large by now
    assert steered.now(0.9, 100.0) < steered.now(0.9, 1e5)


def test_bare_parameters_are_coded_and_the_layers_beside_them_stay_free_to_choose(tmp_path):
    def fresh():
        return TransformerLanguageModel(40, 32, 4, 1, 16)

    tokens = torch.randint(0, 40, (8, 16))
    task = taut.Task(train=[(tokens, tokens)], test=[(tokens, tokens)])
    model = fresh()
    assert taut.trace(model, task.example()).site("positions").kind == "vector"
    taut.pack(taut.apply(model, CodeLength(), task), tmp_path / "net.taut")
    loaded = taut.load(tmp_path / "net.taut", fresh())
    assert "positions" not in dict(loaded.named_parameters())
    run_dense(loaded, False)
    torch.testing.assert_close(loaded(tokens), model.eval()(tokens))
    assert {"blocks.0.fc1", "head"} <= {choice.layer for choice in tune(loaded, tokens, 0.001)}
