"""Give each sub-environment its own seed in vector environments that accept only one seed for all of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array, iterate

from .converted import Converted


def separated(envs: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """Return `envs`. If `make_vec` created `envs` in a form that accepts only one seed, return a OneByOne instead."""
    mode = getattr(envs.spec, "kwargs", {}).get("vectorization_mode")
    if mode != "vector_entry_point" or envs.unwrapped is not envs:
        return envs
    with suppress(gymnasium.error.Error):
        envs.reset(seed=[0] * envs.num_envs)  # type: ignore[arg-type]
        return envs
    return OneByOne(envs)


class OneByOne(Converted):
    """Vector environment made of copies of another vector environment. Each copy has one row and its own seed."""

    plays_in_copies = True

    def __init__(self, given: VectorEnv[Any, Any, Any]) -> None:
        spec: Any = copy.deepcopy(given.spec)
        spec.kwargs.pop("num_envs", None)
        super().__init__(given, given.num_envs, given.single_observation_space, given.single_action_space)
        self.metadata = given.metadata
        self.rows = [gymnasium.make_vec(spec, num_envs=1) for _ in range(self.num_envs)]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset each row with the row's own seed."""
        seeds = [None] * self.num_envs if seed is None else seed
        options = options or {}
        mask = options.get("reset_mask")
        each = [options if mask is None else {**options, "reset_mask": mask[n : n + 1]} for n in range(self.num_envs)]
        rows = [row.reset(seed=own, options=more) for row, own, more in zip(self.rows, seeds, each, strict=True)]
        return self._joined([observation for observation, _ in rows]), self.joined(
            _first_row(infos) for _, infos in rows
        )

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step each row with the row's own action."""
        each = (actions[number : number + 1] for number in range(self.num_envs))
        columns = [*zip(*(row.step(action) for row, action in zip(self.rows, each, strict=True)), strict=True)]
        rewards, terminated, truncated = map(np.concatenate, columns[1:4])
        return self._joined(columns[0]), rewards, terminated, truncated, self.joined(map(_first_row, columns[4]))

    def close_extras(self, **_: Any) -> None:
        """Close the copies."""
        for row in self.rows:
            row.close()

    def _joined(self, observations: Any) -> Any:
        space = self.single_observation_space
        rows = [next(iterate(row.observation_space, own)) for row, own in zip(self.rows, observations, strict=True)]
        return concatenate(space, rows, create_empty_array(space, self.num_envs))  # type: ignore[arg-type]


def _first_row(infos: Mapping[str, Any]) -> dict[str, Any]:
    parts = {
        name: part for name, part in infos.items() if not name.startswith("_")
    }  # the entry "_name" is a mask, which is True for rows that have the entry "name"
    return {name: _first_row(part) if isinstance(part, Mapping) else part[0] for name, part in parts.items()}
