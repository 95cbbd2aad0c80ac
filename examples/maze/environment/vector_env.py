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


class LevelIndexError(IndexError):
    """A seed that is not the index of a level."""


class MazeVectorEnv(VectorEnv):
    """procgen mazes that start on given levels, as `levels.draw_levels` returns them; a seed is the index of a level.

    An episode ends with reward 10 at the cheese (terminated) or after 500 steps (truncated). procgen then starts
    another level, one of its own, within the same step, and the observation already shows it. The last observation
    of an episode does not exist, so the info holds no `final_obs`.

    Raises:
        StateError: a level that is not a hard maze state.
        ValueError: no levels, or no sub-environments.

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
            raise ValueError(f"Expected at least one level and one sub-environment, got {len(levels)} and {num_envs}.")
        read_mazes(levels)  # procgen ends the process on anything else
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
        """Start every sub-environment on the level with the index of its seed; the info holds `level`, int (batch,).

        An int starts consecutive levels, None random ones. Options are ignored.

        Raises:
            LevelIndexError: an index without a level, or another number of indices than of sub-environments.
        """
        level = self._level_indices(seed)
        self._procgen.set_state([self.levels[index] for index in level])
        return self._observed()[1], {"level": level}

    def step(
        self, actions: ArrayLike
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Take one action in every sub-environment; `policy.network.ACTIONS` gives their directions.

        Raises:
            ValueError: actions of another shape or outside 0 to 14.
        """
        taken = np.asarray(actions)
        integers = taken.shape == (self.num_envs,) and taken.dtype.kind in "iu"
        if not integers or taken.min() < 0 or taken.max() >= ACTION_COUNT:
            raise ValueError(f"Expected {self.num_envs} actions, each 0 to {ACTION_COUNT - 1}, got {taken.tolist()}.")
        self._procgen.act(taken)
        reward, observation, ended = self._observed()
        at_cheese = ended.copy()
        if ended.any():
            at_cheese &= [bool(info["prev_level_complete"]) for info in self._procgen.get_info()]
        return observation, reward, at_cheese, ended & ~at_cheese, {}

    def mouse_cells(self) -> NDArray[np.int64]:
        """The mice's cells: (batch, 2). After the end of an episode they are on the following level."""
        return read_mazes(self._procgen.get_state()).mouse

    def close_extras(self, **kwargs: Any) -> None:
        """Free procgen's environments."""
        self._procgen.close()

    def _observed(self) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.bool_]]:
        reward, observation, ended = self._procgen.observe()
        return reward.astype(np.float64), policy_input(observation["rgb"]), ended.astype(bool)

    def _level_indices(self, seed: int | Sequence[int] | None) -> NDArray[np.int64]:
        count = len(self.levels)
        if seed is None:
            return self.np_random.integers(count, size=self.num_envs)
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))  # makes a following reset without a seed reproducible
            seed = range(int(seed), int(seed) + self.num_envs)
        level = np.array([operator.index(index) for index in seed], dtype=np.int64)
        if len(level) != self.num_envs:
            raise LevelIndexError(f"Got {len(level)} seeds for {self.num_envs} sub-environments; give one for each.")
        for unknown in level[(level < 0) | (level >= count)]:
            raise LevelIndexError(f"No level has index {unknown}; a seed is the index of a level, 0 to {count - 1}.")
        return level
