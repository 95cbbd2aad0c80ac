"""`rollout_sweep` against rollouts of one patched policy after the other, in wall-clock time on one thread.

python -m pytest -s tests/benchmarks/test_rollouts.py
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from torch import nn

from chanpatch import HookPoints, PatchedPolicy, Site, hook_points, rollout, zero_ablate
from chanpatch.policies import rollout_sweep
from maze.environment.vector_env import MazeVectorEnv
from maze.levels import draw_levels
from maze.policy.network import load_policy

LABELS, EPISODES, STEPS, ROUNDS = 16, 8, 60, 3


class Game(NamedTuple):
    """A traced policy, the channels to ablate one at a time, and a function that makes environments."""

    points: HookPoints
    sites: tuple[Site, ...]
    envs: Callable[[int], Any]
    options: dict[str, Any]


def cartpole() -> Game:
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    points = hook_points(policy, torch.zeros(2, 4))
    envs = lambda count: SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * count)  # noqa: E731
    return Game(points, points.site("3", feature=slice(LABELS)).split("feature"), envs, {"outputs": "logits"})


def maze() -> Game:
    policy, _ = load_policy()
    points = hook_points(policy, torch.zeros(2, 3, 64, 64))
    levels = draw_levels(EPISODES, size=13, seed=0)
    sites = points.site("embedder.relu3", channel=slice(LABELS)).split("channel")
    return Game(points, sites, lambda count: MazeVectorEnv(levels, count), {})


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("game", [cartpole, maze])
def test_many_patches_in_one_rollout_are_faster_than_one_rollout_per_patch(game, one_thread):
    points, sites, envs, options = game()
    seeds, options = range(EPISODES), {"max_steps": STEPS, "progress": False, **options}

    def one_by_one(count: int) -> list[Any]:
        policies = [points.model, *(PatchedPolicy(points, zero_ablate(site)) for site in sites)]
        return [rollout(policy, envs(count), seeds, **options).returns for policy in policies]

    def together() -> list[Any]:
        swept = rollout_sweep(points, envs(64), seeds, [zero_ablate(site) for site in sites], **options)
        return [each.returns for each in swept.values()]

    ways = {"one environment": lambda: one_by_one(1), "one rollout per patch": lambda: one_by_one(EPISODES)}
    ways["rollout_sweep"] = together
    taken = {name: [] for name in ways}
    for _ in range(ROUNDS):
        results = []
        for name, play in ways.items():
            start = time.perf_counter()
            results.append(play())
            taken[name].append(time.perf_counter() - start)
        np.testing.assert_array_equal(results[0], results[2])
        np.testing.assert_array_equal(results[1], results[2])
    seconds = {name: float(np.median(each)) for name, each in taken.items()}
    ratios = {name: seconds[name] / seconds["rollout_sweep"] for name in ways}
    print(f"\n{game.__name__}: {LABELS} patches x {EPISODES} episodes, {seconds['rollout_sweep']:.2f} s;", ratios)
    assert ratios["one rollout per patch"] > 1
