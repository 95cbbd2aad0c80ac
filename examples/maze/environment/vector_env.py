"""A gymnasium vector environment over given maze levels."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from maze.environment.requirements import procgen_mazes
from maze.levels import policy_input
from maze.policy.network import ACTION_COUNT
from maze.states import read_mazes


class MazeVectorEnv(VectorEnv):
    """procgen mazes that start on given levels, such as those from `levels.draw_levels`.

    A seed is the index of a level; an int starts consecutive levels, None random ones. The info of `reset` contains
    `level`, int (batch,). `policy.network.ACTIONS` lists the actions that move the mouse.

    An episode ends with reward 10 at the cheese (terminated) or after 500 steps (truncated). procgen then starts
    another level, one of its own, within the same step, and the observation already shows that level. procgen does not
    show the last observation of an episode, so the info has no `final_obs`.

    Raises:
        StateError: A level is not a hard maze state.
        ValueError: There are no levels, no sub-environments, or actions outside 0 to 14.
        IndexError: A seed is not the index of a level.

    Example:
        >>> from maze.levels import draw_levels
        >>> envs = MazeVectorEnv(draw_levels(4, size=5, seed=0), num_envs=2)
        >>> observation, info = envs.reset(seed=[3, 0])
        >>> observation.shape
        (2, 3, 64, 64)
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}

    def __init__(self, levels: Sequence[bytes], num_envs: int) -> None:
        if num_envs < 1 or not levels:
            raise ValueError(f"Expected at least one level and one sub-environment; got {len(levels)} and {num_envs}.")
        read_mazes(levels)  # procgen would end the process if it were given anything but hard mazes
        self.levels = list(levels)
        self.num_envs = num_envs
        self.single_observation_space = Box(0.0, 1.0, (3, 64, 64), np.float32)
        self.single_action_space = Discrete(ACTION_COUNT)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._procgen = procgen_mazes(num_envs)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        level = self._level_indices(seed)
        self._procgen.set_state([self.levels[index] for index in level])
        return self._observed()[1], {"level": level}

    def step(
        self, actions: ArrayLike
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        taken = np.asarray(actions)
        if not self.action_space.contains(taken):
            raise ValueError(f"Expected {self.num_envs} actions, each 0 to {ACTION_COUNT - 1}; got {taken.tolist()}.")
        self._procgen.act(taken)
        reward, observation, ended = self._observed()
        at_cheese = ended.copy()
        if ended.any():
            at_cheese &= [bool(info["prev_level_complete"]) for info in self._procgen.get_info()]
        return observation, reward, at_cheese, ended & ~at_cheese, {}

    def mouse_cells(self) -> NDArray[np.int64]:
        """The mice's cells: (batch, 2). After the end of an episode they are on the next level."""
        return read_mazes(self._procgen.get_state()).mouse

    def close_extras(self, **kwargs: Any) -> None:
        self._procgen.close()

    def _observed(self) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.bool_]]:
        reward, observation, ended = self._procgen.observe()
        return reward.astype(np.float64), policy_input(observation["rgb"]), ended.astype(bool)

    def _level_indices(self, seed: int | Sequence[int] | None) -> NDArray[np.int64]:
        count = len(self.levels)
        if seed is None:
            return self.np_random.integers(count, size=self.num_envs)
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))  # makes the next reset without a seed reproducible
            seed = range(int(seed), int(seed) + self.num_envs)
        level = np.array([operator.index(index) for index in seed], dtype=np.int64)
        if len(level) != self.num_envs:
            raise IndexError(f"Expected {self.num_envs} seeds, one per sub-environment; got {len(level)}.")
        for unknown in level[(level < 0) | (level >= count)]:
            raise IndexError(f"A seed is the index of a level and must be 0 to {count - 1}; got {unknown}.")
        return level
