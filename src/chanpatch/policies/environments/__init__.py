"""Convert environments from other libraries to the vector environments that rollouts use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import MissingPackageError, RolloutError
from ...results import imported

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.vector import VectorEnv
    from numpy.random import Generator

__all__ = ["from_gym3", "from_pettingzoo", "vector_env"]


def vector_env(envs: Any) -> VectorEnv[Any, Any, Any]:
    """Convert environments to a vector environment that accepts one seed per sub-environment.

    Raises:
        MissingPackageError: If gymnasium is not installed or is older than 1.1.
        RolloutError: If the environments cannot be converted.
    """
    gymnasium, vector = imported("gymnasium"), imported("gymnasium.vector")
    if not hasattr(vector, "AutoresetMode"):
        raise MissingPackageError(
            f"gymnasium {gymnasium.__version__} is installed, but rollouts require 1.1 or later: pip install --upgrade "
            "gymnasium"
        )
    if isinstance(envs, vector.VectorEnv):
        from .one_by_one import separated

        inner, mode = envs.unwrapped, envs.metadata.get("autoreset_mode")
        is_late = mode is vector.AutoresetMode.NEXT_STEP and not getattr(inner, "shared_memory", True)
        if is_late and isinstance(inner, vector.AsyncVectorEnv):  # gymnasium 1.4 does not forget pending autoresets
            raise RolloutError(
                "An AsyncVectorEnv with shared_memory=False may reset an episode a second time in its first step. Pass "
                "shared_memory=True or autoreset_mode=AutoresetMode.SAME_STEP to the AsyncVectorEnv."
            )
        return separated(envs)
    if isinstance(envs, gymnasium.Env):
        single: VectorEnv[Any, Any, Any] = vector.SyncVectorEnv([lambda: envs], copy=False)
        single.closed = True  # the user closes the environment
        return single
    if _is_a(envs, "stable_baselines3.common.vec_env", "VecEnv"):
        from .stable_baselines import FromStableBaselines

        return FromStableBaselines(envs)
    if _is_a(envs, "gym3", "Env") or _is_a(envs, "gym3", "ToBaselinesVecEnv"):
        return from_gym3(envs)
    libraries = [kind.__module__.partition(".")[0] for kind in type(envs).__mro__]
    advice = next((_ADVICE[name] for name in libraries if name in _ADVICE), "")
    raise RolloutError(
        "envs must be a gymnasium environment or vector environment, a VecEnv from Stable-Baselines3, a procgen "
        f"environment, or a function that creates one of these; got {type(envs).__name__}.{advice}"
    )


_ADVICE = {  # advice for unsupported environments, by the library that defines them
    "pettingzoo": ' Select one agent: chanpatch.policies.from_pettingzoo(environment, "player_0", others).',
    "gym": " Convert the environment to gymnasium, for example with shimmy.GymV26CompatibilityV0.",
}


def from_gym3(envs: Any, states: Sequence[bytes] | None = None) -> VectorEnv[Any, Any, Any]:
    """Convert a procgen environment with gym3's interface to a vector environment, for `rollout`.

    A rollout also accepts an unconverted procgen environment. Without `states`, each seed is a level number
    (`start_level`). An episode that ends is always reported as terminated, because gym3 does not distinguish truncation
    from termination.

    Args:
        envs: `procgen.ProcgenGym3Env`, possibly in gym3 wrappers, or `procgen.ProcgenEnv`.
        states: List of states from `get_state()`. If given, each seed is an index into this list, and the episode
            starts from the state at that index.

    Raises:
        RolloutError: If the environment cannot load levels or states, or if a seed is not an index into `states`.

    Example:
        `rollout(policy, from_gym3(ProcgenGym3Env(num=2, env_name="maze"), states), range(len(states)), max_steps=500)`
    """
    from .procgen import FromGym3

    return FromGym3(envs, states)


def from_pettingzoo(
    environment: Any, agent: str, others: Callable[[str, Any, Generator], Any]
) -> gymnasium.Env[Any, Any]:
    """Convert a PettingZoo environment to a gymnasium environment for one agent. `others` acts for all other agents.

    If the agent's observation contains an `action_mask`, the infos contain the mask as well. For several
    sub-environments, pass `SyncVectorEnv([lambda: from_pettingzoo(make_environment(), agent, others)] * 8)` to the
    rollout.

    Args:
        environment: AEC or parallel environment.
        agent: Name of the agent that the policy controls.
        others: Function that returns the action of another agent. The function receives the other agent's name, the
            other agent's observation, and a random generator that is seeded with the episode's seed.

    Raises:
        RolloutError: If the environment does not have an agent with the given name.
    """
    from .one_agent import OneAgent

    return OneAgent(environment, agent, others)


def _is_a(envs: Any, module: str, name: str) -> bool:
    return isinstance(envs, getattr(sys.modules.get(module), name, ()))
