"""Rollouts in environments of other kinds and libraries, each on the real package."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from pettingzoo import AECEnv, ParallelEnv
from policies import same
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)
from torch import nn
from torch.distributions import Categorical

from chanpatch import PatchedPolicy, edit, hook_points, paired_rollouts, rollout, zero_ablate
from chanpatch.errors import RolloutError
from chanpatch.policies import from_gym3, from_pettingzoo, rollout_sweep
from maze.environment.requirements import procgen_mazes

SEEDS = [7, 3, 11, 3, 90]
MODES: Any = {"max_steps": 40, "outputs": "logits"}


def cart_pole() -> Any:
    return gymnasium.make("CartPole-v1")


def policy() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


def vectorized(mode: str | None = None) -> Any:
    return gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode=mode)


def one_native_row() -> Any:
    return gymnasium.make_vec("CartPole-v1", num_envs=1)


KINDS = {
    "gymnasium Env": cart_pole,
    "gymnasium sync": lambda: vectorized("sync"),
    "gymnasium async": lambda: vectorized("async"),
    "gymnasium DISABLED autoreset": lambda: SyncVectorEnv([cart_pole] * 3, autoreset_mode=AutoresetMode.DISABLED),
    "SB3 DummyVecEnv": lambda: DummyVecEnv([cart_pole] * 3),
    "SB3 SubprocVecEnv": lambda: SubprocVecEnv([cart_pole] * 2, start_method="fork"),
    "SB3 VecMonitor": lambda: VecMonitor(DummyVecEnv([cart_pole] * 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_is_the_same_in_every_kind_of_environment(kind):
    expected = rollout(policy(), vectorized("sync"), SEEDS, **MODES)
    envs = KINDS[kind]()
    done = rollout(policy(), envs, SEEDS, **MODES)
    envs.close()
    assert same(done, expected)


def test_make_vec_of_the_default_kind_plays_the_episode_that_one_row_plays_alone():
    envs = vectorized()
    assert isinstance(envs, CartPoleVectorEnv)
    done = rollout(policy(), envs, SEEDS, greedy=True, **MODES)
    for seed, actions in zip(SEEDS, done.actions, strict=True):
        alone = one_native_row()
        observation, _ = alone.reset(seed=seed)
        for action in actions:
            assert policy()(torch.tensor(observation)).argmax() == action
            observation, *_ = alone.step(np.array([action]))


def test_twins_and_sweeps_are_paired_in_make_vec_of_the_default_kind():
    points = hook_points(policy(), torch.zeros(2, 4))
    patch = zero_ablate(points.site("1", feature=[0, 1, 2]))
    pairs = paired_rollouts({"original": points, "patched": PatchedPolicy(points, patch)}, vectorized(), SEEDS, **MODES)
    swept = rollout_sweep(points, vectorized(), SEEDS, {"patched": patch}, **MODES)
    assert all(same(pairs[name], swept[name]) for name in pairs)


REPLACED = (
    "CartPoleVectorEnv accepts only one seed for all sub-environments, so the rollout plays in copies of it. The "
    "policy, a patch or the masks function uses the original environment, in which no episode is played. Pass "
    'gymnasium.make_vec(..., vectorization_mode="sync") instead.'
)


def test_functions_that_read_an_environment_that_was_replaced_by_copies_are_refused():
    envs, network = vectorized(), policy()
    points = hook_points(network, torch.zeros(2, 4))
    reads = edit(points.site("1"), lambda activation: activation + float(envs.state[0, 0]))
    for run in (
        lambda: rollout(lambda seen: network(seen) + envs.state[0, 0], envs, SEEDS, **MODES),
        lambda: rollout(PatchedPolicy(points, reads), envs, SEEDS, **MODES),
        lambda: rollout_sweep(points, envs, SEEDS, {"reads": reads}, **MODES),
        lambda: rollout(network, envs, SEEDS, masks=lambda *_: envs.state[0] > -9, **MODES),
    ):
        with pytest.raises(RolloutError) as caught:
            run()
        assert str(caught.value) == REPLACED


def test_a_single_environment_stays_open():
    env = cart_pole()
    rollout(policy(), env, SEEDS, **MODES)
    closed = []
    env.unwrapped.close = lambda: closed.append(1)
    rollout(policy(), env, SEEDS, **MODES)
    assert not closed


# --- Stable-Baselines3


def normalized(training: bool) -> Any:  # noqa: FBT001
    envs = VecNormalize(DummyVecEnv([cart_pole] * 3))
    envs.obs_rms.mean[:], envs.obs_rms.var[:] = 0.01, 0.3
    envs.training = training
    return envs


def test_frozen_statistics_normalize_observations_and_moving_ones_are_refused():
    seen = []
    rollout(lambda x: seen.append(x) or policy()(x), normalized(training=False), SEEDS, **MODES)
    observation, _ = cart_pole().reset(seed=SEEDS[0])
    np.testing.assert_allclose(seen[0][0], (observation - 0.01) / np.sqrt(0.3), rtol=1e-5)
    pairs = paired_rollouts({"one": policy(), "same": policy()}, normalized(training=False), SEEDS, **MODES)
    assert same(*pairs.values())
    for envs in (normalized(training=True), VecFrameStack(normalized(training=True), 2)):
        with pytest.raises(RolloutError) as caught:
            rollout(policy(), envs, SEEDS, **MODES)
        assert str(caught.value) == (
            "VecNormalize updates its statistics in every step, so an episode would depend on earlier episodes. Freeze "
            "the statistics with envs.training = False; for unscaled rewards, also set envs.norm_reward = False."
        )


def test_stacked_frames_start_empty_in_every_episode():
    seen = []
    envs = VecFrameStack(DummyVecEnv([cart_pole] * 2), 3)
    rollout(lambda x: seen.append(x) or policy()(x[:, -4:]), envs, SEEDS, **MODES)
    starts = [x for x in seen if not x[:, :8].any()]
    assert len(starts) == 3  # waves of two sub-environments
    assert all(x.shape[1] == 12 for x in seen)


class Ending(gymnasium.Env):
    """Ends by termination for even seeds, by truncation for odd seeds; the info counts steps."""

    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (2,)), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.even, self.steps = not (seed or 0) % 2, 0
        return np.zeros(2, np.float32), {"steps": 0}

    def step(self, action):
        self.steps += 1
        over = self.steps == 3
        return (
            np.full(2, self.steps, np.float32),
            1.0,
            over and self.even,
            over and not self.even,
            {"steps": self.steps},
        )

    def action_masks(self):
        return np.array([self.steps % 2 == 0, True])


@pytest.mark.parametrize("kind", [DummyVecEnv, SyncVectorEnv])
def test_ends_infos_and_methods_are_those_of_gymnasium(kind):
    envs, infos = kind([Ending] * 2), []

    def masks(envs, info):
        infos.append(info["steps"].tolist())
        return np.stack(envs.call("action_masks"))

    uniform = lambda x: Categorical(logits=torch.zeros(len(x), 2))  # noqa: E731
    done = rollout(uniform, envs, [0, 1], max_steps=9, masks=masks)
    assert (done.terminated.tolist(), done.truncated.tolist()) == ([True, False], [False, True])
    assert infos == [[0, 0], [1, 1], [2, 2]]
    assert all(actions[1] == 1 for actions in done.actions)


# --- gym3 and procgen


def mazes(num: int = 3) -> Any:
    return procgen_mazes(num)


def coin_runs(num: int = 3, **levels: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        procgen = procgen_mazes.__globals__["_imported"]("procgen")
    return procgen.ProcgenGym3Env(num=num, env_name="coinrun", distribution_mode="easy", **levels)


class Seeing(nn.Module):
    """A small policy for procgen; its actions move to the right more often."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 9, 9), nn.ReLU(), nn.Flatten(), nn.Linear(196, 15))

    def forward(self, seen):
        return self.layers(seen["rgb"].permute(0, 3, 1, 2).float() / 255)


def seeing() -> Any:
    torch.manual_seed(0)
    return Seeing()


def test_a_seed_of_procgen_is_a_level_and_the_episode_is_that_of_the_level_alone():
    done = rollout(seeing(), coin_runs(), SEEDS, **MODES)
    for number, seed in enumerate(SEEDS):
        alone = coin_runs(1, num_levels=1, start_level=seed)
        total = 0.0
        for action in done.actions[number]:
            alone.act(np.array([action]))
            total += float(alone.observe()[0][0])
        assert total == done.returns[number]
    repeated = rollout(seeing(), coin_runs(2), SEEDS, **MODES)
    assert [*map(list, done.seen)] == [*map(list, repeated.seen)]
    assert len({int(seen[0]) for seen in done.seen}) == 4  # seed 3 twice


def test_procgen_with_the_interface_of_baselines_plays_the_same_episodes():
    import gym3

    wanted = rollout(seeing(), coin_runs(), SEEDS, **MODES)
    assert same(rollout(seeing(), gym3.ToBaselinesVecEnv(coin_runs()), SEEDS, **MODES), wanted)


def images_only(envs: Any) -> Any:
    from gym3 import ExtractDictObWrapper

    return ExtractDictObWrapper(envs, key="rgb")


@pytest.mark.parametrize("wrap", [lambda envs: envs, images_only])
def test_patched_episodes_of_procgen_are_paired_by_level_and_by_state(wrap):
    model = seeing()
    acting = {
        "original": model,
        "patched": PatchedPolicy(
            model, zero_ablate(hook_points(model, {"rgb": torch.zeros(2, 64, 64, 3)}).site("layers.1", channel=0))
        ),
    }
    if wrap(coin_runs(1)).ob_space != coin_runs(1).ob_space:
        acting = {name: lambda x, act=act: act({"rgb": x}) for name, act in acting.items()}
    by_level = paired_rollouts(acting, wrap(coin_runs()), SEEDS, **MODES)
    states = [state for seed in (7, 3, 11) for state in coin_runs(1, num_levels=1, start_level=seed).get_state()]
    by_state = paired_rollouts(acting, from_gym3(wrap(coin_runs()), states), range(3), **MODES)
    assert len(by_level) == len(by_state) == 2
    assert [seen[0] for seen in by_state["original"].seen] == [seen[0] for seen in by_level["original"].seen[:3]]
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(*(by_level[n].actions for n in acting), strict=True))


def test_a_missing_state_of_procgen_and_an_environment_without_levels_are_refused():
    with pytest.raises(RolloutError) as caught:
        rollout(seeing(), from_gym3(coin_runs(1), coin_runs(1).get_state()), [0, 1], **MODES)
    assert str(caught.value) == "Seeds must be indices into states, less than 1; got 1."

    import gym3

    with pytest.raises(RolloutError) as caught:
        rollout(seeing(), gym3.Env(gym3.types.discrete_scalar(2), gym3.types.discrete_scalar(2), 1), [0], **MODES)
    assert str(caught.value) == (
        "Env has no set_state or options, so a rollout cannot start an episode on a given level. Only gym3 "
        "environments from procgen are supported; for another environment, write a gymnasium.Env whose "
        "reset(seed=...) loads the level for that seed."
    )


# --- PettingZoo


class Racing(ParallelEnv):
    """Rewards the largest action; agents observe noise and the last actions."""

    metadata, render_mode = {"name": "racing"}, None
    possible_agents = ["first", "second", "third"]

    def observation_space(self, agent):
        return gymnasium.spaces.Box(-9, 9, (4,))

    def action_space(self, agent):
        return gymnasium.spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        self.agents, self.rng, self.steps = [*self.possible_agents], np.random.default_rng(seed), 0
        return self._observed([0, 0, 0]), {agent: {} for agent in self.agents}

    def _observed(self, actions):
        noise = self.rng.normal()
        return {agent: np.array([noise, *actions], np.float32) for agent in self.agents}

    def step(self, actions):
        self.steps += 1
        taken = [int(actions[agent]) for agent in self.agents]
        rewards = {agent: float(actions[agent] == max(taken)) for agent in self.agents}
        over = dict.fromkeys(self.agents, self.steps == 5)
        found = self._observed(taken), rewards, over, dict.fromkeys(self.agents, False), {a: {} for a in self.agents}
        self.agents = [] if self.steps == 5 else self.agents
        return found


class Turns(AECEnv):
    """Two agents add 1 or 2 to a total in turn; who reaches 10 wins. The mask forbids 2 at 8 and more."""

    metadata, render_mode = {"name": "turns"}, None
    possible_agents = ["left", "right"]

    def observation_space(self, agent):
        space = gymnasium.spaces.Box(0, 20, (1,))
        return gymnasium.spaces.Dict(observation=space, action_mask=gymnasium.spaces.MultiBinary(2))

    def action_space(self, agent):
        return gymnasium.spaces.Discrete(2)

    def observe(self, agent):
        mask = np.array([1, self.total < 8], np.int8)
        return {"observation": np.array([self.total], np.float32), "action_mask": mask}

    def reset(self, seed=None, options=None):
        self.agents, self.total = [*self.possible_agents], int(np.random.default_rng(seed).integers(4))
        self.agent_selection = "left"
        self.rewards, self._cumulative_rewards = (dict.fromkeys(self.agents, 0.0) for _ in range(2))
        self.terminations, self.truncations = (dict.fromkeys(self.agents, False) for _ in range(2))
        self.infos = {agent: {} for agent in self.agents}

    def step(self, action):
        agent = self.agent_selection
        if self.terminations[agent]:
            self._was_dead_step(action)
            return
        self._cumulative_rewards[agent] = 0.0
        assert self.observe(agent)["action_mask"][action]
        self.total += 1 + int(action)
        other = "right" if agent == "left" else "left"
        won = float(self.total >= 10)
        self.rewards = {agent: won, other: -won}
        self.terminations = dict.fromkeys(self.agents, bool(won))
        self.agent_selection = other
        self._accumulate_rewards()


def drawn(agent, observation, rng):
    return int(rng.integers(3))


def test_one_agent_of_a_parallel_environment_plays_while_a_function_moves_the_others():
    envs = SyncVectorEnv([lambda: from_pettingzoo(Racing(), "second", drawn)] * 2)
    done = rollout(policy_of_three(), envs, SEEDS, **MODES)
    assert done.lengths.tolist() == [5] * 5
    for seed, actions, total in zip(SEEDS, done.actions, done.returns, strict=True):
        game, rng, own = Racing(), gymnasium.utils.seeding.np_random(seed)[0], 0.0
        game.reset(seed=seed)
        for action in actions:
            first, third = drawn("first", None, rng), drawn("third", None, rng)
            _, rewards, *_ = game.step({"first": first, "second": action, "third": third})
            own += rewards["second"]
        assert own == total


def policy_of_three() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_one_agent_of_a_game_in_turns_is_paired_and_its_mask_is_in_the_infos():
    make = functools.partial(from_pettingzoo, agent="right", others=lambda agent, seen, rng: 0)
    envs = SyncVectorEnv([lambda: make(Turns())] * 3)
    head = nn.Linear(1, 2)
    nn.init.constant_(head.bias, 0.5)
    acting = {"one": lambda seen: head(seen["observation"]), "other": lambda seen: -head(seen["observation"])}
    masks = lambda envs, infos: infos["action_mask"]  # noqa: E731
    pairs = paired_rollouts(acting, envs, range(8), masks=masks, **MODES)
    assert {*np.concatenate([pairs["one"].returns, pairs["other"].returns])} == {1.0, -1.0}
    assert pairs["one"].terminated.all()


class Charging(Turns):
    """Each move costs the other agent a point; with `over`, the first move ends the game."""

    over = False

    def step(self, action):
        agent, is_dead = self.agent_selection, self.terminations[self.agent_selection]
        super().step(action)
        if not is_dead:
            self._cumulative_rewards["right" if agent == "left" else "left"] -= 1
            self.moves = [*getattr(self, "moves", []), agent]
            self.terminations |= dict.fromkeys(self.agents, True) if self.over else {}


def test_rewards_before_the_first_turn_of_an_agent_count_towards_its_return():
    game = Charging()
    environment = from_pettingzoo(game, "right", lambda *_: 0)
    played = rollout(lambda seen: seen["action_mask"] * 1.0, environment, [0], max_steps=40, outputs="values")
    won = 1 if game.moves[-1] == "right" else -1
    assert played.returns.tolist() == [won - game.moves.count("left")]


def test_an_episode_without_a_turn_of_the_agent_is_refused():
    game = Charging()
    game.over = True
    with pytest.raises(RolloutError) as caught:
        from_pettingzoo(game, "right", lambda *_: 0).reset(seed=3)
    assert str(caught.value) == "The episode with seed 3 is over before the first turn of 'right'. Leave out this seed."


def test_an_agent_that_an_environment_lacks_is_named():
    with pytest.raises(RolloutError) as caught:
        from_pettingzoo(Racing(), "fourth", drawn)
    assert (
        str(caught.value)
        == "The environment has no agent 'fourth'. Pass one of its agents: 'first', 'second', 'third'."
    )


class Tensors(gymnasium.vector.VectorWrapper):
    """Returns tensors, as simulators on a GPU and gymnasium's NumpyToTorch do."""

    def reset(self, **options: Any) -> Any:
        observations, infos = self.env.reset(**options)
        return torch.from_numpy(observations), infos

    def step(self, actions: Any) -> Any:
        *each, infos = self.env.step(actions)
        return *map(torch.from_numpy, each), infos


def test_environments_that_return_tensors_play_the_same_episodes() -> None:
    envs, head = SyncVectorEnv([cart_pole] * 3), policy()
    wanted = rollout(head, envs, SEEDS, **MODES)
    both = paired_rollouts({"one": head, "other": nn.Sequential(head)}, Tensors(envs), SEEDS, **MODES)
    assert same(both["one"], wanted)
    assert same(both["other"], wanted)
