"""Base class of converted vector environments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gymnasium import Space
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space


class Converted(VectorEnv[Any, Any, Any]):
    """Base class of vector environments that wrap the user's environments.

    The attribute `given` contains the user's environments. The user must close them.
    """

    plays_in_copies = False

    def __init__(self, given: Any, num_envs: int, observations: Space[Any], actions: Space[Any]) -> None:
        self.given, self.num_envs = given, num_envs
        self.single_observation_space, self.observation_space = observations, batch_space(observations, num_envs)
        self.single_action_space, self.action_space = actions, batch_space(actions, num_envs)

    def joined(self, each: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Join one dict of infos per sub-environment into one dict, as gymnasium's vector environments do."""
        found: dict[str, Any] = {}
        for number, infos in enumerate(each):
            found = self._add_info(found, {**infos}, number)
        return found
