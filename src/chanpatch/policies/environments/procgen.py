"""procgen environments, with gym3's interface."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import gym3
import numpy as np
from gymnasium import Space, spaces
from gymnasium.vector import AutoresetMode

from ...errors import RolloutError
from .converted import Converted


class FromGym3(Converted):
    """Vector environment of procgen environments whose episodes start on given levels or from given states.

    The observation that a sub-environment returns at the end of an episode already shows the next level.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, given: Any, states: Sequence[bytes] | None) -> None:
        given = given.env if isinstance(given, gym3.ToBaselinesVecEnv) else given  # from procgen.ProcgenEnv
        super().__init__(given, given.num, _space(given.ob_space), _space(given.ac_space))
        self._states, self._procgen = states, gym3.unwrap(given)
        needed = ["set_state"] if states is not None else ["set_state", "options"]
        if not all(hasattr(self._procgen, name) for name in needed):
            raise RolloutError(
                f"{type(self._procgen).__name__} has no {' or '.join(needed)}, so a rollout cannot start an episode "
                "on a given level. Only gym3 environments from procgen are supported; for another environment, write a "
                "gymnasium.Env whose reset(seed=...) loads the level for that seed."
            )

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode in each sub-environment, on the level or from the state for the sub-environment's seed."""
        if seed is not None:
            self._procgen.set_state([self._level(operator.index(each)) for each in seed])
        return self.given.observe()[1], self.joined(self.given.get_info())

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all sub-environments."""
        self.given.act(actions)
        rewards, observations, first = self.given.observe()
        return (
            observations,
            rewards,
            first.astype(np.bool_),
            np.zeros(self.num_envs, np.bool_),
            self.joined(self.given.get_info()),
        )

    def _level(self, seed: int) -> bytes:
        """Return the state that the episode with the given seed starts from."""
        if self._states is not None:
            if seed >= len(self._states):
                raise RolloutError(f"Seeds must be indices into states, less than {len(self._states)}; got {seed}.")
            return self._states[seed]
        from procgen.env import BaseProcgenEnv

        options = self._procgen.options
        kept = {name: options[name] for name in ("use_sequential_levels", "debug_mode", "resource_root")}
        level = BaseProcgenEnv(
            1, options["env_name"], {**options}, num_levels=1, start_level=seed, rand_seed=0, num_threads=0, **kept
        )
        (state,) = level.get_state()
        level.close()
        return state  # type: ignore[no-any-return]


def _space(kind: Any) -> Space[Any]:
    """Convert a gym3 space to a gymnasium space."""
    if isinstance(kind, gym3.types.DictType):
        return spaces.Dict({name: _space(part) for name, part in kind.items()})
    if isinstance(kind.eltype, gym3.types.Real):
        return spaces.Box(-np.inf, np.inf, kind.shape, np.dtype(kind.eltype.dtype_name))
    if kind.shape:
        return spaces.Box(0, kind.eltype.n - 1, kind.shape, np.dtype(kind.eltype.dtype_name))
    return spaces.Discrete(kind.eltype.n)
