"""Reinforcement learning over what to keep: an agent walks the sites and sets each one's share.

    state   the site: which one, its rows, inputs of a row, cost of a unit, cost; the way there:
            cost spent so far, cost of the sites to come, the last action
    action  the share of the site's units that is kept, as far as the budget allows
    reward  the rank of the damage among all episodes, 1 for the least to -1 for the largest

An episode is one candidate; each of its actions is given the reward that comes at its end. A
deterministic actor and a critic learn from all episodes so far (DDPG; Lillicrap et al., ICLR 2016):

    critic  minimises (Q(s, a) - reward)²
    actor   maximises Q(s, actor(s))

When the agent acts, normal noise is added, less of it with every episode.

He, Lin, Liu, Wang, Li, Han: AMC, AutoML for Model Compression and Acceleration (ECCV 2018). Where
we differ: the budget bounds every action from both sides, so that each candidate spends all of it;
the reward is the damage's rank instead of minus the error, so that any damage will do and a few
disasters do not drown the rest; Q learns the reward itself instead of what slow copies of the
networks expect at the next site, which takes more episodes than we have; the first episodes are
the allocations from which every search here starts, instead of a random walk; a state names its
site, whose damage its size need not tell; the networks are smaller and learn more after each
episode, since episodes are what is dear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.errors import RecipeError
from taut.keep_search.problem import Masks, Problem
from taut.keep_search.search import KeepSearch, State, Walk
from taut.technique import option


@dataclass(frozen=True, kw_only=True)
class Reinforcement(KeepSearch):
    """Search by an actor and a critic, over the sites' shares."""

    name = "reinforcement"

    warmup: int = option(24, low=2, high=10_000, unit="episode", help="before the agent acts")
    noise: float = option(0.1, low=0, high=1, help="standard deviation, on its first actions")
    decay: float = option(0.99, low=0, high=1, help="of the noise, from episode to episode")
    updates: int = option(10, low=0, high=10_000, help="after each episode")
    batch: int = option(64, low=1, high=65_536, help="transitions in each update")
    width: int = option(64, low=1, high=4096, help="of both networks' two hidden layers")
    learning_rate: float = option(5e-3, low=0, high=1, help="the critic's; the actor's is half")
    spread: float = option(2.0, low=0, high=10, help="of the first allocations, in logits")

    def start(self, problem: Problem, generator: torch.Generator) -> Walk:
        if problem.genes != "sites":
            raise RecipeError(
                "reinforcement: the agent sets the share of each site, got a problem with "
                "genes='units'; use genes='sites', or search it by particles or evolution"
            )
        return _Episodes(self, problem, generator)


class Agent:
    """An actor and a critic for actions in [0, 1]. Without training it acts near `usual`."""

    def __init__(
        self, features: int, width: int, learning_rate: float, usual: float,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            shares = _network(features, width)
            self.critic = _network(features + 1, width)
        nn.init.constant_(list(shares.parameters())[-1], math.log(usual / (1.001 - usual)))
        self.actor = nn.Sequential(shares, nn.Sigmoid())
        self.optimizers = [
            torch.optim.Adam(net.parameters(), rate, fused=True)
            for net, rate in ((self.actor, learning_rate / 2), (self.critic, learning_rate))
        ]

    @torch.no_grad()
    def act(self, state: Tensor, noise: float, generator: torch.Generator) -> float:
        """The share for a state [features], with noise of this deviation, in [0, 1]."""
        moved = float(self.actor(state)) + noise * float(torch.randn((), generator=generator))
        return min(1.0, max(0.0, moved))

    @torch.enable_grad()
    def learn(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        """One update. states: [n, features]; actions, rewards: [n]."""
        of_actor, of_critic = self.optimizers
        of_critic.zero_grad()
        found = self.critic(torch.cat([states, actions[:, None]], 1)).squeeze(1)
        (found - rewards).square().mean().backward()
        of_critic.step()
        of_actor.zero_grad()
        (-self.critic(torch.cat([states, self.actor(states)], 1)).mean()).backward()
        of_actor.step()

    def state(self) -> State:
        """All that `load` needs to go on from here."""
        return {what: [part.state_dict() for part in parts] for what, parts in self._parts()}

    def load(self, state: State) -> None:
        """Go on from a state."""
        for what, parts in self._parts():
            for part, its_state in zip(parts, state[what], strict=True):
                part.load_state_dict(its_state)

    def _parts(self) -> list[tuple[str, list[Any]]]:
        return [("nets", [self.actor, self.critic]), ("optimizers", self.optimizers)]


class _Episodes(Walk):
    def __init__(
        self, options: Reinforcement, problem: Problem, generator: torch.Generator
    ) -> None:
        self.options, self.problem, self.generator = options, problem, generator
        self.first = problem.first(options.warmup, options.spread, generator)
        self.sites = _features(problem)  # [sites, features that stay the same]
        sites, features = len(self.sites), self.sites.shape[1] + 3
        self.agent = Agent(features, options.width, options.learning_rate, problem.kept, generator)
        self.states = torch.zeros(1, sites, features)  # [episodes, sites, features]
        self.actions = torch.zeros(1, sites)
        self.damages: list[float] = []

    def ask(self) -> Masks:
        acted = len(self.damages) - len(self.first)
        if acted < 0:
            known = self.problem.candidate(self.first[acted])
            return self._episode(lambda site, state: float(known[site].double().mean()))
        noise = self.options.noise * self.options.decay**acted
        return self._episode(lambda site, state: self.agent.act(state, noise, self.generator))

    def tell(self, damage: float) -> None:
        self.damages.append(damage)
        self._learn()
        self.states = torch.cat([self.states, torch.zeros_like(self.states[:1])])
        self.actions = torch.cat([self.actions, torch.zeros_like(self.actions[:1])])

    def _episode(self, policy: Callable[[int, Tensor], float]) -> Masks:
        """Walk the sites; the policy gives each one's share."""
        problem, counts, share = self.problem, list[int](), 1.0
        spent, to_come = 0.0, problem.total
        for i, layer in enumerate(problem.layers):
            to_come -= layer.cost
            way = [spent / problem.budget, to_come / problem.total, share]
            state = torch.cat([self.sites[i], torch.tensor(way)])
            counts.append(problem.within(i, spent, policy(i, state)))
            spent += counts[-1] * layer.unit_cost
            share = counts[-1] / layer.units
            self.states[-1, i], self.actions[-1, i] = state, share
        return problem.ranked(counts)

    def _learn(self) -> None:
        episodes, sites = self.actions.shape
        damages = torch.tensor(self.damages, dtype=torch.float64)
        better = (damages[:, None] < damages).sum(0) + (damages[:, None] <= damages).sum(0) - 1
        rewards = (1 - better / max(1, episodes - 1)).float()  # of equals the mean of their ranks
        for _ in range(self.options.updates):
            drawn = torch.randint(episodes * sites, (self.options.batch,), generator=self.generator)
            self.agent.learn(
                self.states.flatten(0, 1)[drawn], self.actions.flatten()[drawn],
                rewards[drawn // sites],
            )  # fmt: skip

    def state(self) -> State:
        known = {"states": self.states, "actions": self.actions, "damages": self.damages}
        return {**known, "agent": self.agent.state()}

    def load(self, state: State) -> None:
        self.states, self.actions = state["states"], state["actions"]
        self.damages = state["damages"]
        self.agent.load(state["agent"])


def _features(problem: Problem) -> Tensor:
    """What a state says about its site, [sites, 4 + sites], each column scaled to [0, 1]."""
    rows = [
        (math.log(x.shape[0]), math.log(math.prod(x.shape) / x.shape[0]), math.log1p(x.unit_cost),
         x.cost)
        for x in problem.layers
    ]  # fmt: skip
    table = torch.tensor(rows)
    scaled = table / table.max(0).values.clamp(min=1e-9)
    return torch.cat([scaled, torch.eye(len(rows))], 1)


def _network(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
