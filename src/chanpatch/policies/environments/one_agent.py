"""PettingZoo environments in which the policy controls one agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
from numpy.random import Generator
from pettingzoo import ParallelEnv
from pettingzoo.utils import parallel_to_aec

from ...errors import RolloutError


class OneAgent(gymnasium.Env[Any, Any]):
    """A gymnasium environment for one agent in a PettingZoo environment; see `from_pettingzoo`."""

    def __init__(self, given: Any, agent: str, others: Callable[[str, Any, Generator], Any]) -> None:
        self.environment = parallel_to_aec(given) if isinstance(given, ParallelEnv) else given
        self.agent, self.others = agent, others
        if agent not in self.environment.possible_agents:
            agents = ", ".join(map(repr, self.environment.possible_agents))
            raise RolloutError(f"The environment has no agent {agent!r}. Pass one of its agents: {agents}.")
        self.observation_space, self.action_space = given.observation_space(agent), given.action_space(agent)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode, and let the other agents act until the controlled agent's first turn."""
        super().reset(seed=seed)
        self.environment.reset(seed=seed, options=options)
        # Other agents' first actions may already give a reward, which counts towards the first step.
        observation, self._early, terminated, truncated, info = self._turn()
        if terminated or truncated:
            raise RolloutError(
                f"The episode with seed {seed} is over before the first turn of {self.agent!r}. Leave out this seed."
            )
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take the controlled agent's action, and let the other agents act until the controlled agent's next turn."""
        self.environment.step(action)
        observation, reward, terminated, truncated, info = self._turn()
        reward, self._early = reward + self._early, 0.0
        return observation, reward, terminated, truncated, info

    def _turn(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        while (turn := self.environment.agent_selection) != self.agent:
            observation, _, terminated, truncated, _ = self.environment.last()
            over = terminated or truncated
            self.environment.step(None if over else self.others(turn, observation, self.np_random))
        observation, reward, terminated, truncated, info = self.environment.last()
        if isinstance(observation, Mapping) and "action_mask" in observation:
            info = {"action_mask": observation["action_mask"], **info}
        return observation, float(reward), terminated, truncated, info
