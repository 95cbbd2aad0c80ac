"""A comparison of two policies in environments whose seed does not decide the episode is refused."""

import functools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeObservation, NormalizeReward
from policies import same
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from torch import nn
from torch.distributions import Categorical, Normal

from chanpatch import edit, hook_points, paired_rollouts, rollout, zero_ablate
from chanpatch.errors import RolloutError
from chanpatch.policies import PairedRollouts, SweptRollouts, rollout_sweep
from chanpatch.policies.checksums import checksums
from maze.environment.vector_env import MazeVectorEnv
from maze.levels import draw_levels

SEEDS = range(6)
CARELESS = np.random.default_rng(0)  # draws that no seed decides


class Game(gymnasium.Env):
    """Three lives on a level that the seed decides; one part of it may be drawn without the seed."""

    observation_space = spaces.Box(-99, 99, (2,))

    def __init__(self, careless="", continuous=False):
        self.action_space = spaces.Box(-9, 9, (1,)) if continuous else spaces.Discrete(2)
        self.careless, self.ale = careless, self

    def draws(self, part):
        return CARELESS if part == self.careless else self.np_random

    def lives(self):
        return self.left

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.level = 3, self.draws("level").normal()
        return self.observed(), {}

    def observed(self):
        return np.array([self.level, self.draws("observations").normal()], np.float32)

    def step(self, action):
        self.left -= self.draws("end").random() < 0.4
        reward = float(np.sum(action)) + self.draws("rewards").normal()
        return self.observed(), reward, self.left <= 0, False, {}


def games(careless="", **settings):
    return SyncVectorEnv([functools.partial(Game, careless, **settings)] * 4)


def episodic_lives():
    return SyncVectorEnv([lambda: EpisodicLifeEnv(Game())] * 4)


class Careless(MazeVectorEnv):
    """procgen through an adapter that drops the seed."""

    def reset(self, *, seed=None, options=None):
        return super().reset()


def fair(observations):
    return Categorical(logits=torch.zeros(len(observations), 2))


def wandering(observations):
    return Normal(observations[:, :1], 1.0)


ENVIRONMENTS = {
    "a level without a seed": lambda: games("level"),
    "observations without a seed": lambda: games("observations"),
    "rewards without a seed": lambda: games("rewards"),
    "an end without a seed": lambda: games("end"),
    "lives": episodic_lives,
    "observations normalized in training": lambda: NormalizeObservation(games()),
    "rewards normalized in training": lambda: NormalizeReward(games()),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_same_policy_twice_is_an_error_if_the_seed_does_not_decide_the_episode(name):
    with pytest.raises(RolloutError, match="the seed does not determine the episode"):
        paired_rollouts({"one": fair, "same": fair}, ENVIRONMENTS[name](), SEEDS, max_steps=9)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_sweep_in_which_nothing_is_patched_is_an_error_there_too(name):
    policy = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    points = hook_points(policy, torch.zeros(2, 2))
    with pytest.raises(RolloutError, match="'original' and 'nothing' cannot be compared"):
        rollout_sweep(points, ENVIRONMENTS[name](), SEEDS, {"nothing": []}, max_steps=9, outputs="logits")


def test_continuous_actions_are_compared_too():
    with pytest.raises(RolloutError, match="cannot be compared"):
        envs = games("rewards", continuous=True)
        paired_rollouts({"one": wandering, "same": wandering}, envs, SEEDS, max_steps=9)
    pairs = paired_rollouts({"one": wandering, "same": wandering}, games(continuous=True), SEEDS, max_steps=9)
    assert same(pairs["one"], pairs["same"])


def test_procgen_through_an_adapter_that_drops_the_seed_is_an_error():
    envs = Careless(draw_levels(40, size=5, seed=0), num_envs=4)

    def act(images):
        return Categorical(logits=torch.zeros(len(images), 15))

    with pytest.raises(RolloutError, match="cannot be compared"):
        paired_rollouts({"one": act, "same": act}, envs, SEEDS, max_steps=4)


def test_masks_without_a_seed_are_an_error():
    def masks(envs, infos):
        allowed = CARELESS.random((4, 2)) < 0.5
        allowed[:, 0] |= ~allowed.any(axis=1)
        return allowed

    with pytest.raises(RolloutError, match="Likely reasons: masks are random, or the environment"):
        paired_rollouts({"one": fair, "same": fair}, games(), SEEDS, max_steps=9, masks=masks)


def test_zeros_of_either_sign_are_equal():
    class Signed(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Discrete(2)
        sign = 1.0

        def reset(self, *, seed=None, options=None):
            Signed.sign *= -1
            return np.array([0.0, 0.5], np.float32) * [self.sign, 1], {}

        def step(self, action):
            return np.array([0.0, 0.5], np.float32) * [self.sign, 1], 0.0 * self.sign, False, False, {}

    pairs = paired_rollouts({"one": fair, "same": fair}, SyncVectorEnv([Signed]), [1, 2, 3], max_steps=4)
    assert same(pairs["one"], pairs["same"])


@pytest.mark.parametrize("wrapper", [NormalizeObservation, NormalizeReward])
def test_frozen_statistics_make_equal_episodes(wrapper):
    envs = wrapper(games())
    envs.update_running_mean = False
    pairs = paired_rollouts({"one": fair, "same": fair}, envs, SEEDS, max_steps=9)
    assert same(pairs["one"], pairs["same"])


def test_another_policy_is_compared_up_to_its_first_other_action():
    def rightwards(observations):
        return Categorical(logits=torch.tensor([[0.0, 3.0]]).expand(len(observations), 2))

    pairs = paired_rollouts({"fair": fair, "right": rightwards}, games(), SEEDS, max_steps=9)
    assert not same(pairs["fair"], pairs["right"])
    with pytest.raises(RolloutError, match="at step 0"):
        paired_rollouts({"fair": fair, "right": rightwards}, games("level"), SEEDS, max_steps=9)


def test_the_error_names_the_policies_the_episode_and_the_likely_reason():
    with pytest.raises(RolloutError) as caught:
        paired_rollouts({"one": fair, "same": fair}, games("level"), [7, 3], max_steps=9)
    assert str(caught.value) == (
        "'one' and 'same' cannot be compared because episode 0 (seed 7) differs at step 0, before the actions "
        "differ: the seed does not determine the episode. Likely reasons: the environment ignores the seed or has "
        "another source of randomness, or a wrapper carries state across episodes (EpisodicLifeEnv: lives; "
        "NormalizeObservation, NormalizeReward, VecNormalize: running statistics). Remove such a wrapper, or freeze "
        "its statistics (update_running_mean = False)."
    )


@pytest.mark.parametrize(
    ("changed", "shown"),
    [({"sampling_seed": 1}, "sampling_seed differs: 0 vs. 1"), ({"max_steps": 3}, "max_steps differs: 9 vs. 3"),
     ({"greedy": True}, "greedy differs: False vs. True")],
)  # fmt: skip
def test_rollouts_with_other_settings_are_not_compared(changed, shown):
    one, other = (rollout(fair, games(), SEEDS, **{"max_steps": 9, **each}) for each in ({}, changed))
    with pytest.raises(RolloutError) as caught:
        PairedRollouts({"one": one, "other": other})
    assert str(caught.value) == f"'one' and 'other' cannot be compared because {shown}."


def test_controls_are_compared_with_the_original_too():
    one, other = (rollout(fair, games("rewards"), SEEDS, max_steps=9) for _ in range(2))
    with pytest.raises(RolloutError, match="'original' and 'control' cannot be compared"):
        SweptRollouts({"original": one}, {"control": other})


def test_an_effect_is_still_measured_where_the_seed_decides_the_episode():
    policy = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    points = hook_points(policy, torch.zeros(2, 2))
    site = points.site("1")
    patches = {"zero": zero_ablate(site), "large": edit(site, lambda logits: 9 * logits)}
    assert rollout_sweep(points, games(), SEEDS, patches, max_steps=9, outputs="logits").effect().shape == (2,)


COUNT = 3
NUMBERS = np.arange(3 * 5, dtype=np.float32).reshape(3, 5)
OBSERVED = {
    "bytes": NUMBERS.astype(np.uint8),
    "one number each": np.arange(3),
    "flags": np.array([True, False, True]),
    "columns first": np.asfortranarray(NUMBERS),
    "a dict": {"image": NUMBERS, "mission": ("go", "to the", "door")},
    "a tuple": (NUMBERS, {"n": np.arange(3)}),
    "texts": ("go", "to the", "door"),
    "objects": np.array([{"a": 1}, None, (2, 3)], object),
    "a tensor": torch.tensor(NUMBERS),
}


def changed(observed):
    """Return the observations of which the last sub-environment's differ in one place."""
    if isinstance(observed, dict):
        return {**observed, "mission": ("go", "to the", "window")}
    if isinstance(observed, tuple):
        return (*observed[:-1], {"n": np.array([0, 1, 9])} if isinstance(observed[-1], dict) else "window")
    new = observed.clone() if isinstance(observed, torch.Tensor) else observed.copy()
    new[(-1,) * (new.ndim)] = not new[-1] if new.dtype == bool else 7
    return new


@pytest.mark.parametrize("name", OBSERVED)
def test_a_checksum_depends_on_the_observation_of_its_own_sub_environment_alone(name):
    before, after = checksums(OBSERVED[name], COUNT), checksums(changed(OBSERVED[name]), COUNT)
    assert before.tolist() == checksums(OBSERVED[name], COUNT).tolist()
    assert (before == after).tolist() == [True, True, False]
