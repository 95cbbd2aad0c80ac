"""Policies with the environments that they act in: every model fixture, and some not written for the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from models import MODELS, build
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from chanpatch import HookPoints, PatchedPolicy, edit, hook_points, paired_rollouts, rollout, zero_ablate
from chanpatch.policies import PairedRollouts, Rollout, action_distribution
from maze.environment.requirements import policy_models

SEEDS = [3, 11, 4, 90, 2]


class Drifting(gymnasium.Env):
    """Noise around the sum of the actions so far; an action gives a reward and shortens the episode."""

    def __init__(self, shape: tuple[int, ...], actions: int, *, continuous: bool = False) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, shape)
        self.action_space = spaces.Box(-np.inf, np.inf, (actions,)) if continuous else spaces.Discrete(actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.drift = int(self.np_random.integers(4, 12)), 0.0
        return self.observed(), {}

    def observed(self):
        noise = self.np_random.normal(size=self.observation_space.shape)
        return (noise + self.drift).astype(np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        moved = float(np.mean(action))
        self.drift += 0.1 * moved
        self.left -= 1 + (moved > 1)
        return self.observed(), moved, self.left <= 0, False, {}


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.encoder(sequence)[:, -1])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 4)

    def initial_state(self, rows: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, rows, 8), torch.zeros(1, rows, 8)

    def forward(self, vector: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        hidden, state = self.lstm(self.embed(vector).tanh()[None], state)
        return self.head(hidden[0]), state


class Case(NamedTuple):
    """A policy, the environments that it acts in, and a site in its middle."""

    policy: nn.Module
    environment: Callable[..., gymnasium.Env]
    inputs: Callable[[int], tuple[Any, ...]]
    site: str
    method: str = "__call__"
    initial_state: Callable[[int], Any] | None = None

    @property
    def points(self) -> HookPoints:
        return hook_points(self.policy, *self.inputs(2), method=self.method)

    def identity(self) -> Any:
        """Return a twin that puts a copy of each activation in its place."""
        points = self.points
        return PatchedPolicy(
            points, [edit(points.site(name), torch.clone) for name, p in points.items() if not p.read_only]
        )

    def ablated(self) -> Any:
        points = self.points
        return PatchedPolicy(points, zero_ablate(points.site(self.site)))

    def rollout(self, policy: Any, num_envs: int = 3, seeds: Sequence[int] = SEEDS, **settings: Any) -> Rollout:
        envs = SyncVectorEnv([self.environment] * num_envs)
        return rollout(
            policy, envs, seeds, max_steps=20, outputs="logits", initial_state=self.initial_state, **settings
        )

    def pairs(self, policies: dict[str, Any]) -> PairedRollouts:
        envs = SyncVectorEnv([self.environment] * 3)
        return paired_rollouts(policies, envs, SEEDS, max_steps=20, outputs="logits", initial_state=self.initial_state)


def fixture(name: str) -> Case:
    model = build(name)
    observations = model.inputs(2)[0]
    with torch.no_grad():
        actions = action_distribution(model.module, observations, outputs="logits").probs.shape[1]
    environment = functools.partial(Drifting, tuple(observations.shape[1:]), actions)
    return Case(model.module, environment, model.inputs, model.site)


def impala() -> Case:
    models = policy_models()
    policy = models.CategoricalPolicy(models.InterpretableImpalaModel(3), 15)
    inputs = lambda rows: (torch.rand(rows, 3, 64, 64),)  # noqa: E731
    return Case(policy, functools.partial(Drifting, (3, 64, 64), 15), inputs, "embedder.block3.res1.conv1")


def stable_baselines() -> Case:
    environment = functools.partial(gymnasium.make, "CartPole-v1")
    example = environment()
    policy = ActorCriticPolicy(example.observation_space, example.action_space, lambda _: 1e-3, ortho_init=False)
    inputs = lambda rows: (torch.randn(rows, 4),)  # noqa: E731
    return Case(policy, environment, inputs, "mlp_extractor.policy_net.1", method="get_distribution")


def transformer() -> Case:
    inputs = lambda rows: (torch.randn(rows, 5, 8),)  # noqa: E731
    return Case(Attending(), functools.partial(Drifting, (5, 8), 4), inputs, "encoder.layers.0.linear1")


def recurrent() -> Case:
    policy = Recurrent()
    inputs = lambda rows: (torch.randn(rows, 6), policy.initial_state(rows))  # noqa: E731
    drifting = functools.partial(Drifting, (6,), 4)
    return Case(policy, drifting, inputs, "lstm.out[0]", initial_state=policy.initial_state)


CASES = {
    **{name: functools.partial(fixture, name) for name in MODELS},
    "impala": impala,
    "stable baselines": stable_baselines,
    "transformer": transformer,
    "recurrent": recurrent,
}


def case(name: str) -> Case:
    torch.manual_seed(0)
    case = CASES[name]()
    case.policy.eval()
    return case


def same(one: Rollout, other: Rollout) -> bool:
    return one.to_records() == other.to_records() and all(
        np.array_equal(a, b) for a, b in zip(one.actions, other.actions, strict=True)
    )
