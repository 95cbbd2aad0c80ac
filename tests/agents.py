"""Agents from other libraries: whether a rollout acts as the agents' own code does.

python tests/agents.py    write docs/agents_table.md
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.wrappers import ClipAction
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from tensordict import TensorDict  # noqa: F401  # in CASES
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import AffineTransform, Categorical, Normal, TanhTransform, TransformedDistribution

from chanpatch import rollout
from chanpatch.policies import Rollout, action_distribution

TABLE = Path(__file__).parents[1] / "docs" / "agents_table.md"
SEEDS, STEPS = range(5), 20


class Walking(gymnasium.Env):
    """Random observations and action masks, which depend only on the seed; the sum of the action is the reward."""

    def __init__(self, action_space: Any, observation_space: Any = None) -> None:
        self.action_space, self.observation_space = action_space, observation_space or spaces.Box(-9, 9, (3,))
        self.choices = getattr(action_space, "nvec", getattr(action_space, "n", 0))

    def _observed(self) -> Any:
        masks = [np.arange(n) != self.np_random.integers(n + 1) for n in np.atleast_1d(self.choices)]
        self.masks, space = np.concatenate(masks), self.observation_space
        if isinstance(space, spaces.Discrete):
            return int(self.np_random.integers(space.n))
        if space.dtype == np.uint8:
            lit = self.np_random.random(space.shape[:1]) < self.np_random.random()
            return self.np_random.integers(256, size=space.shape, dtype=np.uint8) * lit[:, None, None].astype(np.uint8)
        return self.np_random.normal(scale=3, size=space.shape).astype(np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._observed(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        return self._observed(), float(np.sum(action)), False, False, {}

    def action_masks(self) -> Any:
        return self.masks


# Agents, written as in CleanRL's ppo.py, ppo_continuous_action.py, dqn.py and sac_continuous_action.py.


def layer_init(layer: Any, std: float = np.sqrt(2), bias_const: float = 0.0) -> Any:
    torch.nn.init.orthogonal_(layer.weight, std)
    torch.nn.init.constant_(layer.bias, bias_const)
    return layer


def mlp(inputs: int, outputs: int, std: float) -> nn.Sequential:
    first, second = layer_init(nn.Linear(inputs, 64)), layer_init(nn.Linear(64, 64))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), layer_init(nn.Linear(64, outputs), std=std))


class Agent(nn.Module):
    def __init__(self, env: Any) -> None:
        super().__init__()
        inputs = int(np.prod(env.observation_space.shape))
        self.critic, self.actor = mlp(inputs, 1, 1.0), mlp(inputs, env.action_space.n, 0.01)

    def get_value(self, x: Any) -> Any:
        return self.critic(x)

    def get_action_and_value(self, x: Any, action: Any = None) -> Any:
        logits = self.actor(x)
        probs = Categorical(logits=logits)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


class ContinuousAgent(nn.Module):
    def __init__(self, env: Any) -> None:
        super().__init__()
        inputs, actions = int(np.prod(env.observation_space.shape)), int(np.prod(env.action_space.shape))
        self.critic, self.actor_mean = mlp(inputs, 1, 1.0), mlp(inputs, actions, 0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(1, actions))

    def get_action_and_value(self, x: Any, action: Any = None) -> Any:
        action_mean = self.actor_mean(x)
        action_std = torch.exp(self.actor_logstd.expand_as(action_mean))
        probs = Normal(action_mean, action_std)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), self.critic(x)


class QNetwork(nn.Module):
    def __init__(self, env: Any) -> None:
        super().__init__()
        self.network = mlp(int(np.prod(env.observation_space.shape)), env.action_space.n, 1.0)

    def forward(self, x: Any) -> Any:
        return self.network(x)


class Actor(nn.Module):
    def __init__(self, env: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(int(np.prod(env.observation_space.shape)), 64)
        self.fc_mean, self.fc_logstd = nn.Linear(64, 1), nn.Linear(64, 1)
        low, high = env.action_space.low, env.action_space.high
        self.register_buffer("action_scale", torch.tensor((high - low) / 2.0, dtype=torch.float32))
        self.register_buffer("action_bias", torch.tensor((high + low) / 2.0, dtype=torch.float32))

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.fc1(x))
        log_std = torch.tanh(self.fc_logstd(x))
        return self.fc_mean(x), -5 + 0.5 * (2 + 5) * (log_std + 1)

    def get_action(self, x: Any) -> Any:
        mean, log_std = self(x)
        y_t = torch.tanh(Normal(mean, log_std.exp()).rsample())
        return y_t * self.action_scale + self.action_bias, torch.tanh(mean) * self.action_scale + self.action_bias


def squashed(actor: Any, x: Any) -> Any:
    mean, log_std = actor(x)
    fitted = AffineTransform(actor.action_bias, actor.action_scale)
    return TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(), fitted])


def probabilistic_actor(env: Any) -> Any:
    with warnings.catch_warnings():  # TorchRL imports gym and procgen if they are installed
        warnings.simplefilter("ignore")
        from torchrl.modules import ProbabilisticActor
    body = TensorDictModule(mlp(env.observation_space.shape[0], env.action_space.n, 1.0), ["observation"], ["logits"])
    return ProbabilisticActor(body, ["logits"], distribution_class=Categorical)


# Their own actions along an episode: each yields pairs of numbers that must be equal.


def predictions(model: Any, env: Any, seed: int, actions: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the actions of a rollout with those of `predict`, in the same environment."""
    vector = env if hasattr(env, "env_method") else DummyVecEnv([lambda: env])
    vector.seed(seed)
    seen, state, start = vector.reset(), None, np.ones(1, bool)
    for action in actions:
        more = {"action_masks": np.stack(vector.env_method("action_masks"))} if isinstance(model, MaskablePPO) else {}
        own, state = model.predict(seen, state, start, deterministic=True, **more)
        seen, *_ = vector.step(own)
        start[:] = False
        yield action, own[0]


def greedy(choose: Callable[[Any, Any], Any], agent: Any, env: Any, seed: int, actions: Any) -> Iterator[Any]:
    """Yield the actions of a rollout with those of a function of the agent and the observation."""
    seen, _ = env.reset(seed=seed)
    for action in actions:
        with torch.no_grad():
            yield action, choose(agent, torch.as_tensor(seen)[None]).numpy()[0]
        seen, *_ = env.step(action)


def log_probabilities(
    policy: Callable[[Any], Any], agent: Any, env: Any, seed: int, actions: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield the log-probability of each action under the rollout's distribution and by `get_action_and_value`."""
    seen, _ = env.reset(seed=seed)
    for action in actions:
        x, taken = torch.as_tensor(seen)[None], torch.as_tensor(action)[None]
        with torch.no_grad():
            own = agent.get_action_and_value(x, taken)[1]
            yield action_distribution(policy, x).log_prob(taken).reshape(1, -1).sum(1).numpy(), own.numpy()
        seen, *_ = env.step(action)


class Case(NamedTuple):
    """An agent in an environment, and the policy and keywords in Python that a rollout receives."""

    agent: str
    build: Callable[[Any], Any]
    environment: str
    env: Callable[[], Any]
    policy: str = "model"
    keywords: str = ""
    own: str = "predict"

    def evaluated(self, code: str, model: Any, env: Any) -> Any:
        return eval(code, {**globals(), "model": model, "env": env})  # noqa: S307

    def played(self, *, sampled: bool = False) -> tuple[Any, Any, Any, Rollout]:
        """Return the agent, the environment, the policy and a rollout."""
        torch.manual_seed(0)
        env = self.env()
        model = self.build(env)
        policy, keywords = self.evaluated(self.policy, model, env), self.evaluated(f"dict({self.keywords})", model, env)
        return model, env, policy, rollout(policy, env, SEEDS, max_steps=STEPS, greedy=not sampled, **keywords)

    def compared(self) -> tuple[int, int]:
        """Return how many numbers are equal, and how many were compared."""
        is_sampled = self.own == "get_action_and_value"
        model, env, policy, done = self.played(sampled=is_sampled)
        owns = {"predict": predictions, "get_action_and_value": functools.partial(log_probabilities, policy)}
        own = owns.get(self.own) or functools.partial(greedy, self.evaluated(self.own, model, env))
        pairs = [pair for seed, acts in zip(SEEDS, done.actions, strict=True) for pair in own(model, env, seed, acts)]
        return sum(np.array_equal(*pair) for pair in pairs), len(pairs)


def sb3(algorithm: Any, policy: str = "MlpPolicy", **settings: Any) -> Callable[[Any], Any]:
    def build(env: Any) -> Any:
        model = algorithm(policy, env, seed=1, device="cpu", **settings)
        for name, weight in model.policy.named_parameters():
            if name == "action_net.weight":
                nn.init.normal_(weight)  # the initial weights are small, so actions would hardly vary
        return model

    return build


def made(name: str) -> Callable[[], Any]:
    return functools.partial(gymnasium.make, name)


def walking(actions: Any, observations: Any = None) -> Callable[[], Any]:
    return functools.partial(Walking, actions, observations)


def normalized() -> Any:
    envs = VecNormalize(DummyVecEnv([made("Pendulum-v1")]))
    envs.obs_rms.mean[:], envs.obs_rms.var[:], envs.training = 0.1, 2.0, False
    return envs


LSTM = {"n_steps": 128, "policy_kwargs": {"lstm_hidden_size": 16, "n_lstm_layers": 2}}
SDE = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
MASKS = 'masks=lambda envs, infos: np.stack(envs.call("action_masks"))'
IMAGE = spaces.Box(0, 255, (40, 36, 3), np.uint8)
TENSORS = 'lambda seen: model.get_dist(TensorDict({"observation": seen}, [len(seen)]))'
CASES = [
    Case("SB3 PPO", sb3(PPO), "Discrete actions", walking(spaces.Discrete(4))),
    Case("SB3 PPO", sb3(PPO), "Pendulum (Box)", made("Pendulum-v1")),
    Case("SB3 PPO, squashed gSDE", sb3(PPO, **SDE), "Pendulum (Box)", made("Pendulum-v1")),
    Case("SB3 PPO", sb3(PPO), "MultiDiscrete actions", walking(spaces.MultiDiscrete([2, 4, 3]))),
    Case("SB3 PPO", sb3(PPO), "MultiBinary actions", walking(spaces.MultiBinary(3))),
    Case("SB3 PPO", sb3(PPO), "Discrete observations", walking(spaces.Discrete(3), spaces.Discrete(5))),
    Case("SB3 PPO, CNN", sb3(PPO, "CnnPolicy"), "images, channels last", walking(spaces.Discrete(3), IMAGE)),
    Case("SB3 PPO", sb3(PPO), "VecNormalize, frozen", normalized),
    Case("SB3 PPO", sb3(PPO), "VecFrameStack", lambda: VecFrameStack(DummyVecEnv([made("CartPole-v1")]), 4)),
    Case("SB3 A2C", sb3(A2C), "Discrete actions", walking(spaces.Discrete(4))),
    Case("SB3 DQN", sb3(DQN), "Discrete actions", walking(spaces.Discrete(4))),
    Case("SB3 SAC", sb3(SAC), "Pendulum (Box)", made("Pendulum-v1")),
    Case("SB3 TD3", sb3(TD3), "Pendulum (Box)", made("Pendulum-v1")),
    Case(
        "sb3-contrib RecurrentPPO",
        sb3(RecurrentPPO, "MlpLstmPolicy", **LSTM),
        "Discrete actions",
        walking(spaces.Discrete(4)),
    ),
    Case("sb3-contrib RecurrentPPO", sb3(RecurrentPPO, "MlpLstmPolicy", **LSTM), "Pendulum (Box)", made("Pendulum-v1")),
    Case("sb3-contrib MaskablePPO", sb3(MaskablePPO), "Discrete actions", walking(spaces.Discrete(4)), keywords=MASKS),
    Case(
        "sb3-contrib MaskablePPO",
        sb3(MaskablePPO),
        "MultiDiscrete actions",
        walking(spaces.MultiDiscrete([2, 4, 3])),
        keywords=MASKS,
    ),
    Case(
        "CleanRL PPO",
        Agent,
        "Discrete actions",
        walking(spaces.Discrete(4)),
        policy="lambda seen: Categorical(logits=model.actor(seen))",
        own="get_action_and_value",
    ),
    Case(
        "CleanRL PPO, continuous",
        ContinuousAgent,
        "Pendulum (Box), ClipAction",
        lambda: ClipAction(gymnasium.make("Pendulum-v1")),
        policy="lambda seen: Normal(model.actor_mean(seen), model.actor_logstd.exp())",
        own="get_action_and_value",
    ),
    Case(
        "CleanRL DQN",
        QNetwork,
        "Discrete actions",
        walking(spaces.Discrete(4)),
        keywords='outputs="values"',
        own="lambda model, seen: model(seen).argmax(1)",
    ),
    Case(
        "CleanRL SAC",
        Actor,
        "Pendulum (Box)",
        made("Pendulum-v1"),
        policy="lambda seen: squashed(model, seen)",
        own="lambda model, seen: model.get_action(seen)[1]",
    ),
    Case(
        "TorchRL ProbabilisticActor",
        probabilistic_actor,
        "Discrete actions",
        walking(spaces.Discrete(4)),
        policy=TENSORS,
        own='lambda model, seen: model(TensorDict({"observation": seen}, [len(seen)]))["action"]',
    ),
]


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| agent | environment | policy | more arguments | compared with | equal |", "|---|---|---|---|---|---|"]
    for case in CASES:
        same, count = case.compared()
        cells = [f"`{code}`" if code else "" for code in (case.policy, case.keywords, case.own)]
        lines.append(f"| {case.agent} | {case.environment} | {' | '.join(cells)} | {same} of {count} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
