"""What two checks cost: checksums that verify pairs of episodes, and the comparison of a twin's settings."""

import time
from unittest.mock import patch

import gymnasium
import numpy as np
import pytest
from torch import nn

from chanpatch import rollout
from chanpatch.policies import episodes
from chanpatch.policies.settings import Settings
from maze.environment.vector_env import MazeVectorEnv
from maze.levels import draw_levels
from maze.policy.network import load_policy

MOST_OF_A_ROLLOUT = 0.03
MICROSECONDS_PER_MODULE = 1.0
ROUNDS = 15


def cart_poles(num_envs):
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
    return net, gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="sync")


def maze():
    return load_policy()[0], MazeVectorEnv(draw_levels(8, size=15, seed=0), num_envs=8)


ROLLOUTS = {
    "CartPole, 1 environment": (lambda: cart_poles(1), 1, 60),
    "CartPole, 16 environments": (lambda: cart_poles(16), 16, 60),
    "maze, 8 environments": (maze, 8, 12),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_checksums_take_a_small_part_of_a_rollout(name):
    make, seeds, max_steps = ROLLOUTS[name]
    policy, envs = make()
    outputs = "logits" if isinstance(policy, nn.Sequential) else None
    spent, original, fractions = [0.0], episodes.checksums, []

    def timed(*arguments):
        start = time.perf_counter()
        found = original(*arguments)
        spent[0] += time.perf_counter() - start
        return found

    with patch.object(episodes, "checksums", timed):
        for _ in range(ROUNDS):
            spent[0], start = 0.0, time.perf_counter()
            rollout(policy, envs, range(seeds), max_steps=max_steps, outputs=outputs, progress=False)
            fractions.append(spent[0] / (time.perf_counter() - start))
    fraction = float(np.median(fractions))
    print(f"\n{name}: {fraction:.2%} of a rollout")
    assert fraction <= MOST_OF_A_ROLLOUT


@pytest.mark.parametrize("blocks", [4, 100])
def test_settings_are_compared_in_about_a_microsecond_per_module(blocks):
    policy, twin = (nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(blocks))) for _ in "ab")
    settings = Settings(twin, policy)
    settings.begin("call")
    settings.end("call", runs_modules=True)
    times = []
    for _ in range(ROUNDS * 20):
        start = time.thread_time()
        for _ in range(20):
            settings.begin("call")
        times.append((time.thread_time() - start) / 20)
    modules = sum(next(module.parameters(), None) is not None for module in policy.modules())
    per_module = 1e6 * float(np.median(times)) / modules
    print(f"\n{modules} modules with parameters: {per_module:.2f} us each")
    assert per_module <= MICROSECONDS_PER_MODULE
