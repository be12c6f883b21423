"""Searches for what to keep: budgets, answers against known optima, seeds, interruptions."""

import io
import itertools
import math
import re

import pytest
import torch

import taut
from taut.errors import RecipeError, RunError
from taut.keep_search import Agent, Evolution, Layer, Particles, Problem, Reinforcement
from taut.keep_search.particles import resample, weights
from taut.keep_search.problem import spread
from taut.modules import clone, tensor_at

UNITS, COSTS, HARM = (10, 12, 8, 14), (4.0, 1.0, 9.0, 2.0), (0.3, 3.0, 0.1, 1.0)
SEARCHES = (Particles(), Evolution(), Reinforcement(width=32))
each_search = pytest.mark.parametrize("search", SEARCHES, ids=lambda s: s.name)


def harm(counts):
    """Separable and convex: the fewer a site keeps, the more one unit less hurts."""
    return sum(h * (n / k - 1) for h, n, k in zip(HARM, UNITS, counts, strict=True))


def by_counts(kept=0.4):
    """Four sites whose best allocation can be found by trying them all."""
    layers = [
        Layer(name=f"site{i}", shape=(n, 3), unit_cost=c, scores=torch.arange(n).double() + 1)
        for i, (n, c) in enumerate(zip(UNITS, COSTS, strict=True))
    ]
    return Problem(layers, lambda masks: harm([int(m.sum()) for m in masks]), kept=kept)


def by_units(kept=0.5):
    """Units whose scores tell little of what they are worth."""
    g = torch.Generator().manual_seed(1)
    worth = [torch.rand(n, generator=g, dtype=torch.float64) for n in (20, 30)]
    layers = [
        Layer(name=f"site{i}", shape=w.shape, unit_cost=1.0,
              scores=w + torch.rand(len(w), generator=g, dtype=torch.float64))
        for i, w in enumerate(worth)
    ]  # fmt: skip

    def damage(masks):
        return float(sum(w[~m].sum() for w, m in zip(worth, masks, strict=True)))

    best = float(torch.cat(worth).sort().values[:25].sum())
    return Problem(layers, damage, kept=kept, genes="units"), best


# What is found


@each_search
def test_it_comes_near_the_best_allocation(search):
    problem = by_counts()
    ways = itertools.product(*(range(1, n + 1) for n in UNITS))
    priced = ((sum(c * k for c, k in zip(COSTS, way, strict=True)), way) for way in ways)
    best = min(harm(way) for price, way in priced if price <= problem.budget)
    uniform = problem.damage(problem.candidate(torch.zeros(4)))
    global_ = problem.damage(problem.by_score())
    found = search.search(problem, evaluations=150, seed=0)
    assert best <= found.damage <= best + 0.1 * (min(uniform, global_) - best)
    assert found.damage == harm([int(m[:, 0].sum()) for m in found.masks.values()])


@pytest.mark.parametrize("search", SEARCHES[:2], ids=lambda s: s.name)
def test_it_finds_single_units_that_scores_do_not_tell(search):
    problem, best = by_units()
    first = min(
        problem.damage(problem.candidate(torch.zeros(50))), problem.damage(problem.by_score())
    )
    found = search.search(problem, evaluations=600, seed=0)
    assert best <= found.damage <= best + 0.5 * (first - best)


@each_search
def test_the_trail_never_rises_and_ends_in_what_was_found(search):
    problem = by_counts()
    found = search.search(problem, evaluations=30, seed=1)
    assert len(found.trail) == 30
    assert list(found.trail) == sorted(found.trail, reverse=True)
    assert found.trail[-1] == found.damage
    assert found.trail[0] == problem.damage(problem.candidate(torch.zeros(4)))  # the uniform one
    assert found.cost == sum(
        c * int(m[:, 0].sum()) for c, m in zip(COSTS, found.masks.values(), strict=True)
    )


def test_the_agent_learns_a_bandit():
    g = torch.Generator().manual_seed(0)
    agent = Agent(2, 32, 5e-3, 0.5, g)
    states = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    aims = torch.tensor([0.2, 0.7])
    for _ in range(600):
        which = torch.randint(2, (64,), generator=g)
        actions = torch.rand(64, generator=g)
        agent.learn(states[which], actions, 1 - 4 * (actions - aims[which]).square())
    for state, aim in zip(states, aims, strict=True):
        assert agent.act(state, 0.0, g) == pytest.approx(float(aim), abs=0.1)


def test_the_agent_acts_near_the_usual_before_it_learns():
    g = torch.Generator().manual_seed(0)
    acts = [Agent(5, 32, 1e-3, 0.1, g).act(torch.rand(5, generator=g), 0.0, g) for _ in range(9)]
    assert max(abs(a - 0.1) for a in acts) < 0.06


# The budget


@pytest.mark.parametrize("genes", ["sites", "units"])
@pytest.mark.parametrize("kept", [0.15, 0.4, 0.9, 1.0])
def test_every_candidate_spends_the_budget_to_within_one_unit(kept, genes):
    layers = by_counts().layers
    seen = []
    problem = Problem(layers, lambda m: seen.append(m) or float(len(seen)), kept=kept, genes=genes)
    for search in SEARCHES[: 3 if genes == "sites" else 2]:
        search.search(problem, evaluations=60, seed=2)
    assert len(seen) >= (1 if kept == 1 else 5)
    for masks in seen:
        left = problem.budget - problem.cost(masks)
        cheapest = min(
            (c for c, m in zip(COSTS, masks, strict=True) if not bool(m.all())), default=math.inf
        )
        assert 0 <= left < cheapest
        assert all(bool(m.any()) for m in masks)


def test_equal_genes_keep_equal_shares():
    for genes in ("sites", "units"):
        layers = [
            Layer(name=f"{n}", shape=(n,), unit_cost=5.0, scores=torch.rand(n)) for n in (40, 80)
        ]
        problem = Problem(layers, lambda m: 0.0, kept=0.25, genes=genes)
        masks = problem.candidate(torch.zeros(problem.size))
        assert [int(m.sum()) for m in masks] == [10, 20]
        for mask, layer in zip(masks, layers, strict=True):
            assert layer.scores[mask].min() >= layer.scores[~mask].max()


def test_what_costs_nothing_stays_whole():
    layers = [Layer(name=f"{c}", shape=(9,), unit_cost=c, scores=torch.rand(9)) for c in (0.0, 2.0)]
    for genes in ("sites", "units"):
        problem = Problem(layers, lambda m: 0.0, kept=0.5, genes=genes)
        free, dear = Evolution().search(problem, evaluations=20).kept.values()
        assert (free, dear) == (1.0, pytest.approx(4 / 9))


def test_by_score_keeps_the_highest_of_all_sites():
    problem, _ = by_units()
    scores = torch.cat([x.scores for x in problem.layers])
    kept = torch.cat(problem.by_score())
    assert int(kept.sum()) == 25
    assert scores[kept].min() > scores[~kept].max()


# Seeds and interruptions


@each_search
def test_the_same_seed_gives_the_same_search_and_another_a_different_one(search):
    torch.manual_seed(5)
    first = search.search(by_counts(), evaluations=40, seed=3)
    torch.manual_seed(6)
    drawn = torch.rand(())
    torch.manual_seed(6)
    again = search.search(by_counts(), evaluations=40, seed=3)
    assert torch.rand(()) == drawn  # the global generator is left alone
    assert again.trail == first.trail
    assert all(torch.equal(again.masks[n], m) for n, m in first.masks.items())
    assert search.search(by_counts(), evaluations=40, seed=4).trail != first.trail


@each_search
@pytest.mark.parametrize("stop", [1, 20, 33])
def test_interrupted_and_taken_up_is_as_uninterrupted(search, stop):
    whole = search.search(by_counts(), evaluations=45, seed=0)
    states = []
    search.search(by_counts(), evaluations=stop, seed=0, on_step=states.append)
    file = io.BytesIO()
    torch.save(states[-1], file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for _ in range(2):  # the state is left as it was
        resumed = search.search(by_counts(), evaluations=45, seed=0, state=state)
        assert resumed.trail == whole.trail
        assert all(torch.equal(resumed.masks[n], m) for n, m in whole.masks.items())


def test_a_state_of_another_search_or_problem_is_refused():
    states = []
    Evolution().search(by_counts(), evaluations=2, on_step=states.append)
    cases = [
        (Evolution(population=9), by_counts(), 0, "another search: 'evolution()', not 'evolution"),
        (Particles(), by_counts(), 0, "another search"),
        (Evolution(), by_counts(kept=0.3), 0, "another problem"),
        (Evolution(), by_counts(), 7, "another seed: 0, not 7"),
    ]
    for search, problem, seed, message in cases:
        with pytest.raises(RunError, match=re.escape(message)):
            search.search(problem, evaluations=5, seed=seed, state=states[0])


def test_an_agent_learns_where_gradients_are_off():
    search = Reinforcement(width=8, warmup=4)
    with torch.no_grad():
        off = search.search(by_counts(), evaluations=12)
    assert off.trail == search.search(by_counts(), evaluations=12).trail


# The particle filter's parts


def test_weights_are_exponential_and_of_the_effective_number_asked_for():
    damages = torch.tensor([0.3, 0.1, 0.9, 0.2, math.inf, 0.4], dtype=torch.float64)
    w = weights(damages, 0.5)
    assert float(w.sum()) == pytest.approx(1)
    assert 1 / float(w.square().sum()) == pytest.approx(3, rel=1e-6)
    b = (w[1] / w[0]).log() / 0.2
    finite = damages.isfinite()
    expected = (-b * damages[finite]).exp()
    assert torch.allclose(w[finite], expected / expected.sum())
    assert w[4] == 0


def test_weights_where_many_are_equal():
    assert torch.allclose(weights(torch.ones(4).double(), 0.3), torch.full((4,), 0.25).double())
    assert torch.allclose(weights(torch.full((4,), math.inf), 0.3), torch.full((4,), 0.25).double())
    w = weights(torch.tensor([1.0, 0.0, 0.0, 2.0]).double(), 0.25)  # two are best: no fewer count
    assert torch.allclose(w, torch.tensor([0.0, 0.5, 0.5, 0.0]).double(), atol=1e-6)


def test_systematic_resampling_keeps_each_as_often_as_it_weighs():
    g = torch.Generator().manual_seed(0)
    for n in (2, 5, 40):
        total = torch.zeros(n, dtype=torch.float64)
        w = torch.rand(n, generator=g, dtype=torch.float64).square()
        w /= w.sum()
        for _ in range(400):
            times = resample(w, g).bincount(minlength=n)
            assert int(times.sum()) == n
            assert bool((times >= (n * w).floor()).all())
            assert bool((times <= (n * w).ceil()).all())
            total += times
        assert torch.allclose(total / 400 / n, w, atol=0.02)


def test_without_noise_the_next_particles_are_the_better_of_the_last():
    states = []
    Particles(particles=12, noise=0.0).search(by_counts(), evaluations=12, on_step=states.append)
    first, last = states[0]["walk"]["genomes"], states[-1]["walk"]["genomes"]
    origin = (last[:, None] - first).abs().sum(-1).min(1)
    assert float(origin.values.max()) < 1e-12  # each is a copy
    damages = torch.tensor(states[-2]["walk"]["damages"])
    left = {i for i in origin.indices.tolist() if i < 11}
    assert 1 < len(left) < 10
    assert damages[list(left)].mean() < damages.mean()


def test_with_noise_the_particles_keep_their_weighted_mean_and_spread():
    states = []
    search = Particles(particles=800, noise=0.8, spread=1.0)
    search.search(by_counts(), evaluations=800, on_step=lambda s: states.append(s["walk"]))
    first, damages = states[-2]["genomes"], states[-2]["damages"]
    damages = torch.tensor([*damages, by_counts().damage(by_counts().candidate(first[-1]))])
    w = weights(damages, search.effective)
    mean = w @ first
    std = (w @ (first - mean).square()).sqrt()
    moved = states[-1]["genomes"]
    assert torch.allclose(moved.mean(0), mean, atol=0.1)
    assert torch.allclose(moved.std(0), std, rtol=0.1)
    assert (std < 0.9 * first.std(0)).any()


def test_a_child_takes_the_place_of_the_worst_where_it_is_better():
    walks = []
    search = Evolution(population=6)
    search.search(by_counts(), evaluations=60, on_step=lambda s: walks.append(s["walk"]["damages"]))
    assert any(a != b for a, b in itertools.pairwise(walks[5:]))
    for before, after in itertools.pairwise(walks[5:]):
        assert sorted(after)[:-1] <= sorted(before)[:-1]
        changed = [i for i in range(6) if before[i] != after[i]]
        assert changed in ([], [before.index(max(before))])
        assert max(after) <= max(before)


# Networks


@pytest.mark.parametrize("unit", ["filter", "weight"])
def test_the_damage_is_that_of_the_masked_network(trained, task, unit):
    sites = taut.trace(trained, task.example()).sites
    loss = task.calibration_loss()
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    problem = Problem.of(trained, sites, loss, kept=0.4, unit=unit)
    found = Evolution(population=4).search(problem, evaluations=6)
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    masked = clone(trained)
    with torch.no_grad():
        for name, mask in found.masks.items():
            tensor_at(masked, name).mul_(mask)
    assert found.damage == loss(masked)
    costs = [float(found.masks[s.name].double().mean()) * s.macs for s in sites]
    assert found.cost == pytest.approx(sum(costs))
    assert found.cost <= 0.4 * sum(s.macs for s in sites)
    if unit == "filter":
        for mask in found.masks.values():
            assert torch.equal(mask.any(1), mask.all(1))


def test_a_search_beats_magnitude_on_a_network(trained, task):
    sites = taut.trace(trained, task.example()).sites
    problem = Problem.of(
        trained, sites, task.calibration_loss(), kept=0.2, cost="parameters", unit="weight"
    )
    uniform = problem.damage(problem.candidate(torch.zeros(3)))
    found = Evolution().search(problem, evaluations=40)
    assert found.damage < min(uniform, problem.damage(problem.by_score()))


def test_scores_decide_which_units_of_a_site_stay(trained, task):
    sites = taut.trace(trained, task.example()).sites[:1]
    score = torch.rand(sites[0].shape)
    problem = Problem.of(trained, sites, lambda net: 0.0, kept=0.5, scores={sites[0].name: score})
    rows = score.mean(1).topk(24).indices
    expected = torch.zeros(48, dtype=torch.bool)
    expected[rows] = True
    assert torch.equal(problem.candidate(torch.zeros(1))[0], expected)


def test_a_candidate_is_measured_once_and_nan_is_the_worst():
    asked = []
    layers = by_counts().layers
    problem = Problem(layers, lambda m: asked.append(1) or math.nan, kept=0.5)
    masks = problem.candidate(torch.zeros(4))
    assert problem.damage(masks) == problem.damage(masks) == math.inf
    assert len(asked) == 1
    assert Particles(particles=4).search(problem, evaluations=20).damage == math.inf


def test_spread_gives_rows_or_single_weights():
    rows = spread(torch.tensor([True, False]), (2, 3, 2))
    assert rows.shape == (2, 3, 2)
    assert bool(rows[0].all())
    assert not bool(rows[1].any())
    single = torch.rand(12) > 0.5
    assert torch.equal(spread(single, (2, 3, 2)).flatten(), single)


# Bad input


def test_what_is_refused_says_why():
    layers = by_counts().layers
    total = sum(x.cost for x in layers)
    with pytest.raises(RecipeError, match=rf"lie in \[{16 / total:.4g}, 1\].*got 0.01.*4 sites"):
        Problem(layers, harm, kept=0.01)
    with pytest.raises(RecipeError, match=r"lie in .*got 1\.5"):
        Problem(layers, harm, kept=1.5)
    with pytest.raises(RecipeError, match=r"needs a site .* got no site"):
        Problem([], harm, kept=0.5)
    free = [Layer(name="embedding", shape=(4,), unit_cost=0.0, scores=torch.ones(4))]
    with pytest.raises(RecipeError, match=r"got embedding; .* parameters instead of MACs"):
        Problem(free, harm, kept=0.5)
    with pytest.raises(RecipeError, match="evaluations must be at least 1, got 0"):
        Evolution().search(by_counts(), evaluations=0)
    with pytest.raises(RecipeError, match=r"reinforcement: .* genes='units'"):
        Reinforcement().search(by_units()[0], evaluations=1)
    for counts in ((10, 12, 8, 14), (0, 1, 1, 1)):
        with pytest.raises(RecipeError, match=r"1 unit or more, .* 60.8 of 152 MACs or parameters"):
            by_counts().ranked(counts)
    with pytest.raises(RecipeError, match=r"genes has no choice 'unit'; did you mean 'units'"):
        Problem(layers, harm, kept=0.5, genes="unit")
    with pytest.raises(RecipeError, match=r"particles must lie in \[2, 10000\], got 1"):
        Particles(particles=1)


def test_a_network_without_proper_scores_is_refused(trained, task):
    sites = taut.trace(trained, task.example()).sites[:1]

    def of(**options):
        return Problem.of(trained, sites, lambda net: 0.0, kept=0.5, **options)

    for scores, got in (
        ({}, "got None"),
        ({"0.weight": torch.ones(3)}, r"got \[3\]"),
        ({"0.weight": torch.full((48, 64), math.nan)}, "NaN in the scores or in the network"),
    ):
        with pytest.raises(RecipeError, match=rf"'0.weight' needs a finite score .*{got}"):
            of(scores=scores)
    with pytest.raises(RecipeError, match=r"unit has no choice 'filters'; did you mean 'filter'"):
        of(unit="filters")
    with pytest.raises(RecipeError, match=r"cost has no choice 'mac'; did you mean 'macs'"):
        of(cost="mac")
