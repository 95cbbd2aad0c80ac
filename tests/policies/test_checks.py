"""Policies and environments that a rollout refuses, with advice, before the first step."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from stable_baselines3 import DQN, PPO
from torch import nn
from torch.distributions import Categorical

from chanpatch import PatchedPolicy, edit, hook_points, paired_rollouts, rollout, zero_ablate
from chanpatch.errors import MissingPackageError, RolloutError
from chanpatch.policies import rollout_sweep

MODES: Any = {"max_steps": 9, "outputs": "logits"}


@pytest.fixture
def cart_poles() -> Any:
    return gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")


def uniform(observations: Any) -> Any:
    return Categorical(logits=torch.zeros(2, 2))


def refusal(policy: Any, envs: Any, **settings: Any) -> str:
    with pytest.raises(RolloutError) as caught:
        rollout(policy, envs, [0, 1], max_steps=3, **settings)
    return str(caught.value)


def pettingzoo_env() -> Any:
    return type("ParallelEnv", (), {"__module__": "pettingzoo.utils.env"})()


def gym_env() -> Any:
    return type("Env", (), {"__module__": "gym.core"})()


EXPECTED = (
    "envs must be a gymnasium environment or vector environment, a VecEnv from Stable-Baselines3, a procgen "
    "environment, or a function that creates one of these; got "
)


@pytest.mark.parametrize(
    ("envs", "got"),
    [
        (
            pettingzoo_env,
            'ParallelEnv. Select one agent: chanpatch.policies.from_pettingzoo(environment, "player_0", others).',
        ),
        (gym_env, "Env. Convert the environment to gymnasium, for example with shimmy.GymV26CompatibilityV0."),
        (list, "list."),
    ],
)
def test_environments_of_another_kind_get_advice_of_their_own(envs, got):
    assert refusal(uniform, envs()) == EXPECTED + got


def test_a_gymnasium_without_autoreset_modes_is_too_old(cart_poles, monkeypatch):
    monkeypatch.delattr(gymnasium.vector, "AutoresetMode")
    monkeypatch.setattr(gymnasium, "__version__", "1.0.0")
    with pytest.raises(MissingPackageError) as caught:
        rollout(uniform, cart_poles, [0], max_steps=3)
    assert str(caught.value) == (
        "gymnasium 1.0.0 is installed, but rollouts require 1.1 or later: pip install --upgrade gymnasium"
    )


class Sampled(gymnasium.Env):
    action_space = spaces.Discrete(2)

    def __init__(self, observation_space: Any) -> None:
        self.observation_space = observation_space

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("space", "name"),
    [
        (spaces.Text(5), "observation_space is a Text"),
        (spaces.Dict(image=spaces.Box(0, 1, (3,)), mission=spaces.Text(5)), "observation_space['mission'] is a Text"),
        (spaces.Tuple([spaces.Discrete(3), spaces.Dict(a=spaces.Text(5))]), "observation_space[1]['a'] is a Text"),
        (spaces.Sequence(spaces.Discrete(3)), "observation_space is a Sequence"),
        (spaces.OneOf([spaces.Discrete(3), spaces.Discrete(4)]), "observation_space is a OneOf"),
    ],
)
def test_observations_that_are_not_numbers_are_refused(space, name):
    assert refusal(uniform, SyncVectorEnv([lambda: Sampled(space)] * 2)) == (
        f"{name} space, which does not produce numeric arrays. Encode the values as numbers in a wrapper, or keep only "
        "the numeric parts of the observation with gymnasium.wrappers.FilterObservation(environment, names_to_keep)."
    )


def test_observations_without_their_text_can_be_played():
    space = spaces.Dict(image=spaces.Box(0, 1, (3,)), mission=spaces.Text(5))
    filtered = lambda: gymnasium.wrappers.FilterObservation(Sampled(space), ["image"])  # noqa: E731
    head = nn.Linear(3, 2)
    done = rollout(lambda seen: head(seen["image"]), SyncVectorEnv([filtered] * 2), [0], max_steps=3, outputs="logits")
    assert done.lengths.tolist() == [3]


def test_images_whose_channels_come_last_are_refused_by_a_convolution():
    envs = SyncVectorEnv([lambda: Sampled(spaces.Box(0, 1, (12, 10, 3)))] * 2)
    policy = nn.Sequential(nn.Conv2d(3, 2, 10), nn.Flatten(), nn.Linear(6, 2))
    message = refusal(policy, envs, outputs="logits")
    assert message.startswith("The policy failed on channels-last images (Given groups=1")
    assert message.endswith(
        "The convolution expects shape (batch, channel, height, width). Pass lambda observations: "
        "policy(observations.permute(0, 3, 1, 2))."
    )
    turned = lambda seen: policy(seen.permute(0, 3, 1, 2))  # noqa: E731
    assert rollout(turned, envs, [0], max_steps=3, outputs="logits").lengths.tolist() == [3]


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_a_model_plays_as_its_policy(cart_poles, algorithm):
    model = algorithm("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    points = hook_points(model.policy, torch.zeros(2, 4), method="_predict")
    name = next(name for name in points if name.endswith(".1"))
    patch = zero_ablate(points.site(name))
    pairs = paired_rollouts({"model": model, "policy": model.policy}, cart_poles, range(4), max_steps=9)
    swept = rollout_sweep(model, cart_poles, range(4), {"zero": patch}, max_steps=9)
    assert pairs["model"].to_records() == pairs["policy"].to_records() == swept["original"].to_records()
    assert pairs["model"].to_records() == rollout(model, cart_poles, range(4), max_steps=9).to_records()


def test_another_object_that_holds_its_policy_is_not_the_policy(cart_poles):
    holder = type("Algorithm", (), {})()
    holder.policy = nn.Linear(4, 2)
    assert refusal(holder, cart_poles) == (
        "policy must be a module, HookPoints or a function of observations; got Algorithm. Pass its module .policy "
        "instead."
    )


class Recurrent(nn.Module):
    """A policy with the public shape of sb3-contrib's RecurrentPPO."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.LSTM(4, 2)

    def get_distribution(self, obs, lstm_states, episode_starts):
        hidden, state = self.network(obs[None], lstm_states)
        return Categorical(logits=hidden[0]), state

    def forward(self, obs, lstm_states, episode_starts, deterministic=False):
        raise AssertionError


def initial_state(rows: int) -> Any:
    return torch.zeros(1, rows, 2), torch.zeros(1, rows, 2)


@pytest.mark.parametrize(
    ("settings", "taken", "given"),
    [
        ({}, "(obs, lstm_states, episode_starts)", "(observations)"),
        (
            {"initial_state": initial_state},
            "(obs, lstm_states, episode_starts, deterministic)",
            "(observations, state)",
        ),
    ],
)
def test_a_policy_with_other_arguments_is_not_called_without_them(cart_poles, settings, taken, given):
    policy = Recurrent()
    assert refusal(policy, cart_poles, **settings) == (
        f"Recurrent expects the arguments {taken}, but a rollout passes {given}. For a recurrent policy, pass "
        "initial_state. If the policy needs other arguments, wrap it in a function, such as lambda obs, state: "
        "policy.get_distribution(obs, state, obs.new_zeros(len(obs)))."
    )
    wrapped = lambda obs, state: policy.get_distribution(obs, state, obs.new_zeros(len(obs)))  # noqa: E731
    assert len(rollout(wrapped, cart_poles, [0, 1], max_steps=3, initial_state=initial_state)) == 2


class WithMethods(nn.Module):
    """Its forward does the opposite of the method that gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def logits(self, observations: Any) -> Any:
        return self.network(observations)

    def forward(self, observations: Any) -> Any:
        return -self.network(observations)


def test_hook_points_are_played_by_the_method_that_was_traced(cart_poles):
    torch.manual_seed(0)
    policy = WithMethods().double()
    settings: Any = {"max_steps": 50, "outputs": "logits"}
    of = {method: hook_points(policy, torch.zeros(2, 4).double(), method=method) for method in ("logits", "__call__")}
    patch = {name: zero_ablate(points.site("network.1", feature=[0, 1])) for name, points in of.items()}
    swept = {name: rollout_sweep(points, cart_poles, range(6), patch[name], **settings) for name, points in of.items()}
    for name, called in (("logits", policy.logits), ("__call__", policy)):
        original = rollout(called, cart_poles, range(6), **settings)
        assert rollout(of[name], cart_poles, range(6), **settings).to_records() == original.to_records()
        assert swept[name]["original"].to_records() == original.to_records()
        twin = PatchedPolicy(of[name], patch[name])
        patched = rollout(twin.logits if name == "logits" else twin, cart_poles, range(6), **settings)
        (label,) = swept[name].labels
        assert swept[name][label].to_records() == patched.to_records() != original.to_records()
    assert swept["logits"]["original"].to_records() != swept["__call__"]["original"].to_records()


class OwnDropout(nn.Module):
    def forward(self, activation: Any) -> Any:
        return nn.functional.dropout(activation, 0.5, self.training)


class Switching(nn.Module):
    scale = 1

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002
        self.scale = 3 if mode else 1
        return super().train(mode)

    def forward(self, activation: Any) -> Any:
        return self.scale * activation


DEPENDING = {
    "dropout": lambda: nn.Dropout(0.5),
    "batch norm": lambda: nn.BatchNorm1d(16),
    "a dropout of its own": OwnDropout,
    "a train of its own": Switching,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
}


def network(middle: Any) -> Any:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), middle, nn.Linear(16, 2))


@pytest.mark.parametrize("kind", DEPENDING)
def test_a_twin_in_another_mode_than_its_policy_is_not_compared_with_it(cart_poles, kind):
    policy = network(DEPENDING[kind]())
    twin = PatchedPolicy(policy, edit(hook_points(policy, torch.randn(2, 4)).site("1"), torch.clone))
    policy.eval()
    with pytest.raises(RolloutError) as caught:
        paired_rollouts({"policy": policy, "identity": twin}, cart_poles, range(4), **MODES)
    assert "is in eval mode, but in 'identity', '2" in str(caught.value)
    assert "is in training mode. The comparison would" in str(caught.value)
    with pytest.raises(RolloutError, match="^In the original policy, .* is in eval mode, but in its PatchedPolicy, "):
        rollout(twin, cart_poles, range(4), **MODES)
    twin.eval()
    pairs = paired_rollouts({"policy": policy, "identity": twin}, cart_poles, range(4), **MODES)
    assert pairs["policy"].to_records() == pairs["identity"].to_records()


def test_the_module_that_differs_is_named(cart_poles):
    policy = network(nn.Dropout(0.5))
    copied = copy.deepcopy(policy).eval()
    with pytest.raises(RolloutError) as caught:
        paired_rollouts({"one": policy, "copy": copied}, cart_poles, range(4), **MODES)
    assert str(caught.value) == (
        "In 'one', '2' (Dropout) is in training mode, but in 'copy', '2' (Dropout) is in eval mode. The comparison "
        "would measure this difference in mode. Put the two modules in the same mode with eval() or train()."
    )


def test_modes_of_functions_and_of_networks_of_another_shape_are_compared_too(cart_poles):
    one, other = network(nn.Dropout(0.5)), nn.Sequential(network(nn.Dropout(0.5))).eval()
    for policies in ({"one": lambda x: one(x), "other": lambda x: other(x)}, {"one": one, "other": other}):
        with pytest.raises(RolloutError, match=r"In 'one', '2' \(Dropout\) is in training mode, but in 'other', '0.2'"):
            paired_rollouts(policies, cart_poles, range(4), **MODES)


def test_modes_that_change_nothing_and_modes_mixed_alike_on_both_sides_are_compared(cart_poles):
    for middle in (nn.Tanh(), nn.Dropout(0.0), nn.LayerNorm(16)):
        policy = network(middle)
        twin = PatchedPolicy(policy, edit(hook_points(policy, torch.randn(2, 4)).site("1"), torch.clone))
        policy.eval()
        pairs = paired_rollouts({"policy": policy, "identity": twin}, cart_poles, range(4), **MODES)
        assert pairs["policy"].to_records() == pairs["identity"].to_records()
    policy = network(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(16).eval()))
    pairs = paired_rollouts({"policy": policy, "copy": copy.deepcopy(policy)}, cart_poles, range(4), **MODES)
    assert pairs["policy"].to_records() == pairs["copy"].to_records()


@pytest.mark.parametrize("kind", DEPENDING)
def test_a_sweep_refuses_every_kind_in_training_mode(cart_poles, kind):
    policy = network(DEPENDING[kind]())
    patches = {"identity": edit(hook_points(policy, torch.randn(2, 4)).site("1"), torch.clone)}
    with pytest.raises(
        RolloutError, match="in training mode would let patches with different labels affect each other"
    ):
        rollout_sweep(policy, cart_poles, range(4), patches, **MODES)
