"""Policies of Stable-Baselines3 act in a rollout as their own `predict` does."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from chanpatch import PatchedPolicy, edit, hook_points, paired_rollouts, rollout
from chanpatch.errors import DistributionError, RolloutError
from chanpatch.policies import action_distribution, rollout_sweep

SEEDS = [4, 9, 1]
SQUASHED = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "DQN": (DQN, "CartPole-v1", {}),
    "discrete PPO": (PPO, "CartPole-v1", {}),
    "PPO": (PPO, "Pendulum-v1", {}),
    "squashed PPO": (PPO, "Pendulum-v1", SQUASHED),
    "SAC": (SAC, "Pendulum-v1", {}),
    "SAC with gSDE": (SAC, "Pendulum-v1", {"use_sde": True}),
    "TD3": (TD3, "Pendulum-v1", {}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    algorithm, environment, more = KINDS[request.param]
    policy_kwargs = {"net_arch": [8], **more.get("policy_kwargs", {})}
    model = algorithm("MlpPolicy", environment, seed=1, device="cpu", **{**more, "policy_kwargs": policy_kwargs})
    model.policy.set_training_mode(False)
    return model.policy, environment


def envs_of(environment: str, num_envs: int = 2) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: gymnasium.make(environment)] * num_envs)


def predicted(policy: Any, environment: str, seed: int, steps: int) -> list[Any]:
    env = gymnasium.make(environment)
    observation, _ = env.reset(seed=seed)
    actions = []
    for _ in range(steps):
        action, _ = policy.predict(observation, deterministic=True)
        actions.append(action)
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    return actions


def test_greedy_actions_are_those_that_predict_gives(kind):
    policy, environment = kind
    done = rollout(policy, envs_of(environment), SEEDS, max_steps=12, greedy=True)
    for seed, actions in zip(SEEDS, done.actions, strict=True):
        np.testing.assert_allclose(actions, predicted(policy, environment, seed, 12), atol=1e-5)


def test_a_twin_with_an_identity_edit_acts_as_its_policy(kind):
    policy, environment = kind
    site = next(
        name for name, module in policy.named_modules() if isinstance(module, nn.Linear) and "value" not in name
    )
    points = hook_points(policy, torch.zeros(2, *policy.observation_space.shape), method="_predict")
    twin = PatchedPolicy(points, edit(points.site(site), torch.clone))
    pairs = paired_rollouts({"policy": policy, "twin": twin}, envs_of(environment), SEEDS, max_steps=12)
    assert twin.ledger.to_records()
    assert pairs["policy"].to_records() == pairs["twin"].to_records()


class Dropping(BaseFeaturesExtractor):
    """A features extractor with dropout, which acts in training mode."""

    def __init__(self, space):
        super().__init__(space, 32)
        self.layers = nn.Sequential(nn.Linear(space.shape[0], 32), nn.Dropout(0.7))

    def forward(self, observations):
        return 5 * self.layers(observations)


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_a_policy_in_training_mode_acts_as_predict_does_and_keeps_its_flags(algorithm):
    environment = "Pendulum-v1" if algorithm is SAC else "CartPole-v1"
    model = algorithm("MlpPolicy", environment, seed=1, policy_kwargs={"features_extractor_class": Dropping})
    policy = model.policy
    site = next(name for name, module in policy.named_modules() if isinstance(module, nn.Dropout))
    method = "get_distribution" if algorithm is PPO else "__call__"
    policy.set_training_mode(False)
    points = hook_points(policy, torch.zeros(2, *policy.observation_space.shape), method=method)
    policy.set_training_mode(True)
    twin = PatchedPolicy(points, edit(points.site(site), torch.clone))
    flags = [module.training for module in policy.modules()]
    acting = {"policy": policy, "twin": twin}
    if algorithm is PPO:
        acting["function"] = lambda seen: model.policy.get_distribution(seen)
    pairs = paired_rollouts(acting, envs_of(environment), SEEDS, max_steps=30, greedy=True)
    swept = rollout_sweep(points, envs_of(environment, 5), SEEDS, {"twin": twin.patches}, max_steps=30, greedy=True)
    assert flags == [module.training for module in policy.modules()]
    for name, done in {**pairs, "swept": swept["twin"]}.items():
        for seed, actions in zip(SEEDS, done.actions, strict=True):
            np.testing.assert_allclose(actions, predicted(policy, environment, seed, 30), atol=1e-5, err_msg=name)
        policy.set_training_mode(True)


@pytest.mark.parametrize("name", ["PPO", "squashed PPO", "SAC", "SAC with gSDE"])
def test_sampled_actions_fill_the_box_and_stay_in_it(name):
    algorithm, environment, more = KINDS[name]
    policy = algorithm("MlpPolicy", environment, seed=1, device="cpu", **more).policy
    if name == "PPO":
        nn.init.constant_(policy.log_std, 1.0)
    actions = np.concatenate(rollout(policy, envs_of(environment), SEEDS, max_steps=60).actions)
    assert 1.5 < np.abs(actions).max() <= 2
    assert len(np.unique(actions)) > 30


def test_actions_are_fitted_also_if_a_function_asks_the_policy_for_its_distribution():
    policy = PPO("MlpPolicy", "Pendulum-v1", seed=1, device="cpu").policy
    nn.init.constant_(policy.log_std, 3.0)
    functions = {
        "policy": policy,
        "function": lambda seen: policy.get_distribution(seen),
        "method": policy.get_distribution,
        "tuple": lambda seen: (policy.get_distribution(seen), policy.predict_values(seen)),
    }
    pairs = paired_rollouts(functions, envs_of("Pendulum-v1"), SEEDS, max_steps=9)
    assert np.abs(np.concatenate(pairs["policy"].actions)).max() == 2
    assert all(pairs[name].to_records() == pairs["policy"].to_records() for name in pairs)


class Moving(gymnasium.Env):
    """Takes actions of two axes."""

    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (3,)), gymnasium.spaces.Box(-0.01, 2.0, (2, 2))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.np_random.normal(size=3).astype(np.float32), float(action.sum()), False, False, {}


gymnasium.register("Moving-v0", Moving)


@pytest.mark.parametrize("algorithm", [PPO, SAC, TD3])
def test_actions_of_two_axes_are_those_that_predict_gives(algorithm):
    policy = algorithm("MlpPolicy", Moving(), seed=1, device="cpu").policy
    policy.set_training_mode(False)
    done = rollout(policy, SyncVectorEnv([Moving] * 2), SEEDS, max_steps=4, greedy=True)
    for seed, actions in zip(SEEDS, done.actions, strict=True):
        np.testing.assert_allclose(actions, predicted(policy, "Moving-v0", seed, 4), rtol=1e-5, atol=1e-6)


def test_a_policy_with_actions_of_another_size_is_refused():
    policy = PPO("MlpPolicy", "Pendulum-v1", seed=1, device="cpu").policy
    with pytest.raises(RolloutError) as caught:
        rollout(policy, SyncVectorEnv([Moving] * 2), SEEDS, max_steps=4)
    assert str(caught.value) == (
        "The policy's actions have shape (2, 1) for a batch of size 2, but Box(-0.01, 2.0, "
        "(2, 2), float32) expects shape (2, 2, 2)."
    )


def test_actions_of_other_policies_are_not_clipped():
    for far in (Normal(torch.full((2, 1), 5.0), 0.1), Independent(Normal(torch.full((2, 1), 5.0), 0.1), 1)):
        done = rollout(lambda _, far=far: far, envs_of("Pendulum-v1"), [0, 1], max_steps=2)
        assert np.concatenate(done.actions).min() > 4


def test_the_tanh_of_a_normal_is_drawn_by_its_inverse_cdf():
    normal = Normal(torch.full((2, 1), 0.5), torch.ones(2, 1))
    squashed = {
        "inside": TransformedDistribution(Independent(normal, 1), TanhTransform()),
        "outside": Independent(TransformedDistribution(normal, [TanhTransform()]), 1),
    }
    for greedy in (False, True):
        plain = rollout(lambda _: normal, envs_of("Pendulum-v1"), [0, 1], max_steps=3, greedy=greedy)
        for each in squashed.values():
            done = rollout(lambda _, each=each: each, envs_of("Pendulum-v1"), [0, 1], max_steps=3, greedy=greedy)
            np.testing.assert_allclose(done.actions, np.tanh(plain.actions), rtol=1e-6)


def test_q_values_are_values_and_a_policy_without_a_distribution_has_none():
    policy = DQN("MlpPolicy", "CartPole-v1", seed=1, device="cpu").policy
    settings: Any = {"envs": envs_of("CartPole-v1"), "seeds": SEEDS, "max_steps": 60}
    done = rollout(policy, **settings)
    assert done.to_records() == rollout(policy.q_net, outputs="values", **settings).to_records()
    assert done.to_records() == rollout(policy, outputs="actions", **settings).to_records()
    assert done.to_records() != rollout(policy.q_net, outputs="logits", **settings).to_records()
    with pytest.raises(DistributionError, match="DQNPolicy returns actions, not a distribution"):
        action_distribution(policy, torch.zeros(2, 4))


class Image(gymnasium.Env):
    observation_space, action_space = gymnasium.spaces.Box(0, 255, (40, 36, 3), np.uint8), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Stacked(Image):
    observation_space = gymnasium.spaces.Box(0, 255, (40, 36, 6), np.uint8)


@pytest.mark.parametrize("architecture", ["CnnPolicy", "MlpPolicy"])
def test_image_channels_move_to_the_first_axis_as_in_predict(architecture):
    policy = PPO(architecture, Image(), seed=1, device="cpu", n_steps=8, batch_size=8).policy
    seen = []
    points = hook_points(policy, torch.zeros(2, 3, 40, 36), method="get_distribution")
    look = edit(points.site("features_extractor.in[0]"), lambda image: seen.append(tuple(image.shape)) or image)
    rollout(PatchedPolicy(points, look), SyncVectorEnv([Image] * 2), SEEDS, max_steps=2)
    assert {*seen} == {(2, 3, 40, 36), (1, 3, 40, 36)}


def test_a_policy_is_not_played_on_images_of_another_shape():
    policy = PPO("CnnPolicy", Image(), seed=1, device="cpu", n_steps=8, batch_size=8).policy
    with pytest.raises(RolloutError) as caught:
        rollout(policy, SyncVectorEnv([Stacked] * 2), SEEDS, max_steps=2)
    assert str(caught.value) == (
        "ActorCriticCnnPolicy was built for observations of shape (3, 40, 36), but the environments return "
        "observations of shape (40, 36, 6). Wrap the environments as in training, for example to stack frames."
    )
