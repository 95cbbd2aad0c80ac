"""Vector environments of Stable-Baselines3."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from ...errors import RolloutError
from .converted import Converted


class FromStableBaselines(Converted):
    """Vector environment that wraps a VecEnv, which resets a sub-environment in the same step that ends an episode."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, given: VecEnv) -> None:
        layer = given
        while layer is not layer.unwrapped:
            if isinstance(layer, VecNormalize) and layer.training:
                raise RolloutError(
                    "VecNormalize updates its statistics in every step, so an episode would depend on earlier "
                    "episodes. Freeze the statistics with envs.training = False; for unscaled rewards, also set "
                    "envs.norm_reward = False."
                )
            layer = layer.venv  # type: ignore[attr-defined]
        super().__init__(given, given.num_envs, given.observation_space, given.action_space)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset each sub-environment with the sub-environment's own seed."""
        self.given.unwrapped._seeds = (
            [None] * self.num_envs if seed is None else [*seed]
        )  # VecEnv.seed() accepts only one number
        return self.given.reset(), self.joined(self.given.reset_infos)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all sub-environments."""
        observations, rewards, over, infos = self.given.step(actions)
        truncated = over & np.array([info.get("TimeLimit.truncated", False) for info in infos])
        for number in np.flatnonzero(over):
            infos[number]["final_obs"] = infos[number].pop("terminal_observation")
        return observations, rewards, over & ~truncated, truncated, self.joined(infos)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of each sub-environment, as in gymnasium's vector environments."""
        return tuple(self.given.env_method(name, *args, **kwargs))
