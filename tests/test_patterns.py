"""Patterns: what stays together, by which score, and what prune_weights makes of it."""

import math

import loops
import pytest
import torch
from torch import Tensor, nn

import taut
from taut.errors import RecipeError
from taut.importance import by_row
from taut.modules import clone, tensor_at
from taut.pattern import Blocks, NOfM, Pattern, largest
from taut.pattern_weights import BlockWeight, NOfMWeight
from taut.plan import check
from taut.products import Product
from taut.recipe import Recipe
from taut.recoding import chain
from taut.schedules import Schedule, attach_schedules, settled
from taut.statistics import Statistics
from taut.techniques import PruneWeights
from taut.types import Site

NAMES = ("0.weight", "3.weight", "5.weight")
WHOLE = "!5.weight"  # ten outputs are fewer than sixteen


def blocks_by_hand(scores: Tensor, rows: int) -> dict[tuple[int, int], float]:
    """The mean score of each block, one after another."""
    flat = scores.flatten(1)
    return {
        (b, c): float(flat[rows * b : rows * (b + 1), c].mean())
        for b in range(-(-len(flat) // rows))
        for c in range(flat.shape[1])
    }


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("shape", [(32, 7), (18, 5), (21, 3, 2, 2), (16, 9)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_blocks_that_stay_have_the_largest_means(
    rows: int, shape: tuple[int, ...], share: float
) -> None:
    scores = torch.rand(shape)
    count = round(share * scores.numel())
    mask = largest(scores, count, pattern=Blocks(rows)).flatten(1)
    assert mask.shape == scores.flatten(1).shape
    kept = set()
    for (b, c), _ in blocks_by_hand(scores, rows).items():
        block = mask[rows * b : rows * (b + 1), c]
        assert bool(block.all()) or not bool(block.any())
        kept |= {(b, c)} if bool(block.any()) else set()
    means = blocks_by_hand(scores, rows)
    assert int(mask.sum()) <= max(count, rows)
    if share == 1.0:
        assert len(kept) == len(means)
    elif share == 0.0:
        assert not kept
    else:
        gone = means.keys() - kept
        assert min(means[k] for k in kept) > max(means[k] for k in gone)
        assert count - int(mask.sum()) < rows  # no other block would fit


def test_one_block_stays_at_least() -> None:
    assert int(largest(torch.rand(32, 3), 5, pattern=Blocks(16)).sum()) == 16


def test_of_blocks_that_an_earlier_mask_cut_only_the_rest_stays() -> None:
    scores, among = torch.ones(8, 2), torch.ones(8, 2, dtype=torch.bool)
    among[:4, 0], among[5, 1] = False, False
    scores[4:, 1], scores[:4, 1] = 2.0, 0.5
    mask = largest(scores, 7, among, Blocks(4))
    assert mask[:, 0].tolist() == [False] * 4 + [True] * 4
    assert mask[:, 1].tolist() == [False] * 4 + [True, False, True, True]


def test_each_weight_is_compared_by_what_its_block_has() -> None:
    scores = torch.arange(12.0).reshape(6, 2)
    assert Blocks(4).compared(scores).tolist() == [[12, 16]] * 4 + [[36, 40]] * 2  # 18, 20 doubled
    assert torch.equal(NOfM(2, 4).compared(scores), scores)


def test_a_group_keeps_more_while_the_count_allows() -> None:
    scores, pattern = torch.rand(5, 18), NOfM(2, 4)
    for count, each in ((0, 2), (40, 2), (50, 2), (pattern.kept((5, 18), 3), 3), (90, 4)):
        mask = largest(scores, count, pattern=pattern)
        groups = [min(each, g.shape[1]) for g in scores.split(4, 1)]
        assert [int(g.sum()) for g in mask.split(4, 1)] == [5 * n for n in groups]
        assert torch.equal(mask[:, :4], largest_of_each(scores[:, :4], each))


def largest_of_each(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(1, scores.topk(count).indices, True)


def test_a_cover_holds_a_mask_and_nothing_it_need_not() -> None:
    mask = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]).bool()
    cover = NOfM(2, 4).cover(mask)
    assert cover is not None
    assert cover.int().tolist() == [[1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1]]
    assert NOfM(2, 4).cover(torch.tensor([[True, True, True, False]])) is None
    tall = torch.zeros(6, 2, dtype=torch.bool)
    tall[2, 0] = tall[5, 1] = True
    covered = Blocks(4).cover(tall)
    assert covered is not None
    assert covered.int().tolist() == [[1, 0]] * 4 + [[0, 1]] * 2


def test_positions_take_the_bits_of_their_number_of_choices() -> None:
    assert NOfM(2, 4).position_bits((6, 10), 36) == pytest.approx(12 * math.log2(6))
    assert NOfM(1, 4).position_bits((6, 7), 12) == pytest.approx(6 * (2 + math.log2(3)))
    assert Blocks(4).position_bits((6, 10), 30) == 20  # two rows of blocks, every other one
    assert Blocks(4).position_bits((8, 10), 80) == 0


@pytest.mark.parametrize("text", ["8x1", "16x2", "1x4", "16x", "x1", "0x1"])
def test_what_is_no_block(text: str) -> None:
    with pytest.raises(RecipeError, match=rf"got '{text}'"):
        PruneWeights(pattern=text)
    with pytest.raises(RecipeError, match=r"blocks are 4x1 or 16x1 .*got '8x1'"):
        Pattern.parse("8x1")


# In a network


def mask_of(net: nn.Module, name: str) -> Tensor:
    return tensor_at(net, name) != 0


def put(trained: nn.Module, task: taut.Task, **options: object) -> nn.Module:
    return taut.apply(clone(trained), PruneWeights(**{"only": WHOLE, **options}), task)


@pytest.mark.parametrize("scope", ["layer", "global", "lamp", "sensitivity"])
@pytest.mark.parametrize("pattern", ["4x1", "16x1"])
def test_a_fraction_of_the_blocks_goes(
    trained: nn.Module, task: taut.Task, scope: str, pattern: str
) -> None:
    net = put(trained, task, pattern=pattern, scope=scope, sparsity=0.75)
    rows, kept, total = int(pattern[:-2]), 0, 0
    for name in NAMES[:2]:
        mask = mask_of(net, name)
        kept, total = kept + int(mask.sum()), total + mask.numel()
        each = mask.split(rows)
        assert all(bool((block.all(0) | ~block.any(0)).all()) for block in each)
    assert 0.25 * total - 2 * rows < kept <= 0.25 * total + 1


def test_globally_a_block_stays_by_the_sum_of_its_squares(
    trained: nn.Module, task: taut.Task
) -> None:
    net = put(trained, task, pattern="16x1", scope="global", sparsity=0.75)
    sums = {n: Blocks(16).compared(tensor_at(trained, n).detach().square()) for n in NAMES[:2]}
    kept = torch.cat([sums[n][mask_of(net, n)] for n in sums])
    gone = torch.cat([sums[n][~mask_of(net, n)] for n in sums])
    assert int((kept < gone.max()).sum()) <= 2 * 16  # each site is rounded down to whole blocks
    assert float(kept.mean()) > 1.5 * float(gone.mean())


def test_sensitivity_scans_whole_blocks(trained: nn.Module, task: taut.Task) -> None:
    site = taut.trace(trained, task.example()).site("0.weight")
    seen: list[Tensor] = []

    def loss(net: nn.Module) -> float:
        seen.append(tensor_at(net, "0.weight").detach() == 0)
        return 0.0

    statistics = Statistics(trained, loss)
    curve = statistics.sensitivity(site, Blocks(16))
    for sparsity, zeros in zip(curve.sparsities, seen[1:], strict=True):
        split = sum(int((b.any(0) & ~b.all(0)).sum()) for b in zeros.split(16))
        assert split <= 1  # the one where the fraction ends
        assert int(zeros.sum()) == round(sparsity * zeros.numel())
    assert statistics.sensitivity(site, Blocks(16)) is curve
    assert statistics.sensitivity(site) is not curve  # single weights are scanned anew
    assert len(seen) == 2 * 14
    assert not torch.equal(seen[5], seen[19])


@pytest.mark.parametrize("criterion", ["taylor", "obd", "obs", "fisher", "wanda", "random"])
def test_every_criterion_cuts_blocks(trained: nn.Module, task: taut.Task, criterion: str) -> None:
    net = put(trained, task, pattern="4x1", scope="layer", sparsity=0.8, criterion=criterion)
    mask = mask_of(net, "0.weight")
    assert all(bool((block.all(0) | ~block.any(0)).all()) for block in mask.split(4))
    assert 0.2 * mask.numel() - 4 < int(mask.sum()) <= 0.2 * mask.numel() + 1
    if criterion == "wanda":
        each = mask.sum(1)
        assert int(each.max() - each.min()) <= 1


def test_the_rows_of_a_block_rank_their_weights_alike() -> None:
    scores = Blocks(4).compared(torch.rand(8, 6))
    product = Product(torch.arange(48).reshape(8, 6), torch.ones(6), torch.ones(6), 1)
    ranked = by_row(scores, [product])
    for rows in ranked.split(4):
        assert torch.equal(rows, rows[:1].expand_as(rows))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("16x1", r"pattern='16x1' needs 16 outputs at least, and has 10 for site '5.weight'; .*"
                 r"only='!5.weight'"),
        ("2:80", r"'2:80' needs rows of 80 inputs at least, and has 64 for site '0.weight'"),
    ],
)  # fmt: skip
def test_a_layer_smaller_than_a_group_is_refused_by_name(
    trained: nn.Module, task: taut.Task, pattern: str, message: str
) -> None:
    technique = PruneWeights(pattern=pattern, scope="layer")
    traced = taut.trace(trained, task.example())
    with pytest.raises(RecipeError, match=message):
        taut.apply(clone(trained), technique, task)
    with pytest.raises(RecipeError, match=message):
        check(Recipe((technique,)), traced)
    vector = Site(name="b", kind="vector", shape=(64,), macs=0)
    with pytest.raises(RecipeError, match=r"16 outputs at least, and has 1 for site 'b'"):
        PruneWeights(pattern="16x1").accepts(vector, (64,))


def test_pruned_again_by_blocks_nothing_comes_back(trained: nn.Module, task: taut.Task) -> None:
    net = put(trained, task, sparsity=0.5, scope="layer")
    before = mask_of(net, "0.weight")
    traced = taut.trace(trained, task.example())
    technique = PruneWeights(pattern="16x1", sparsity=0.9, scope="layer", only=WHOLE)
    taut.apply(net, technique, task, traced)
    after = mask_of(net, "0.weight")
    assert not bool((after & ~before).any())
    links = chain(net, traced.site("0.weight"))
    assert links is not None
    weight = links.pack(net[0].parametrizations.weight.original, "float32")
    assert isinstance(weight, BlockWeight)
    assert weight.values.format == "sparse.v1"  # the blocks have holes
    assert torch.equal(weight.dense(), tensor_at(net, "0.weight").detach())


def test_dead_units_leave_blocks_and_groups_with_holes(task: taut.Task) -> None:
    for pattern, kind in (("4x1", BlockWeight), ("2:4", NOfMWeight)):
        net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        technique = PruneWeights(pattern=pattern, sparsity=0.2, scope="layer")
        traced = taut.trace(net, task.example())
        taut.apply(net, technique, task, traced)
        with torch.no_grad():
            links = chain(net, traced.site("2.weight"))
            assert links is not None
            links.forms[0].mask[:, 3] = False  # type: ignore[index, union-attr]
        technique.finish(net, traced)
        assert not bool(mask_of(net, "0.weight")[3].any())
        first = chain(net, traced.site("0.weight"))
        assert first is not None
        packed = first.pack(net[0].parametrizations.weight.original, "float32")  # type: ignore
        assert isinstance(packed, kind)
        assert torch.equal(packed.dense(), tensor_at(net, "0.weight").detach())
        x = torch.randn(3, 64)
        torch.testing.assert_close(packed.matmul(x), x @ packed.dense().T, atol=1e-5, rtol=1e-5)


# Schedules


def followed(
    trained: nn.Module, task: taut.Task, pattern: str, schedule: str
) -> tuple[list[Tensor], nn.Module]:
    """The masks of 0.weight before and after each of 20 steps."""
    net = put(trained, task, pattern=pattern, sparsity=0.75, scope="layer")
    optimizer = loops.adam(net)
    attach_schedules(net, optimizer, 20, schedule)
    seen = [loops.mask_of(net).mask.clone()]
    loops.train(net, task, optimizer, 20, lambda: seen.append(loops.mask_of(net).mask.clone()))
    return seen, net


@pytest.mark.parametrize("by", ["magnitude", "movement", "rigl", "surgery"])
def test_blocks_come_down_in_steps(trained: nn.Module, task: taut.Task, by: str) -> None:
    seen, net = followed(trained, task, "16x1", f"schedule(steps=3, by='{by}')")
    counts = [int(m.sum()) for m in seen]
    assert counts[0] == (3072 if by == "movement" else counts[1])
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3 + (by == "movement")
    assert counts[-1] == 3072 // 4
    for mask in seen:
        assert all(bool((b.all(0) | ~b.any(0)).all()) for b in mask.split(16))
    assert settled(net)


@pytest.mark.parametrize("by", ["magnitude", "movement", "surgery"])
def test_groups_come_down_in_steps(trained: nn.Module, task: taut.Task, by: str) -> None:
    seen, net = followed(trained, task, "2:8", f"schedule(steps=4, by='{by}')")
    each = [m.unflatten(1, (-1, 8)).sum(2) for m in seen]
    assert all(int(e.min()) == int(e.max()) for e in each)
    found = list(dict.fromkeys(int(e.max()) for e in each))
    assert found == [*([8] if by == "movement" else []), 5, 4, 2]  # of 5.7, 4, 2.8 and 2
    assert settled(net)


def test_groups_do_not_follow_rigl(trained: nn.Module, task: taut.Task) -> None:
    message = r"by='rigl' swaps .* got pattern='2:4' on site '0.weight'.* choose by='magnitude'"
    net = put(trained, task, pattern="2:4")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with pytest.raises(RecipeError, match=message):
        attach_schedules(net, optimizer, 10, Schedule(by="rigl"))
    recipe = Recipe.parse("prune_weights(pattern='2:4') > schedule(by='rigl') > recover()")
    with pytest.raises(RecipeError, match=message):
        check(recipe, taut.trace(trained, task.example()))
    check(
        Recipe.parse("prune_weights(pattern='2:4') > schedule() > recover()"),
        taut.trace(trained, task.example()),
    )
