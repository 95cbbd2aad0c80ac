"""Reject policies and environments that rollouts do not support, and say how to adapt them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from torch import nn

from ..engine.state import depends_on_training
from ..errors import MissingPackageError, RolloutError
from ..registry.points import HookPoints, no_module
from ..results import imported
from .copies import STATE, held_modules
from .stable_baselines import as_in_predict, is_sb3_policy

_SINGLE = "gymnasium.vector.SyncVectorEnv([lambda: environment])."
_ADVICE = {  # keyed by the library that the environments come from
    "stable_baselines3": "Build one from the function that creates an environment: "
    "gymnasium.vector.SyncVectorEnv([make_environment] * 4).",
    "gym3": "gym3 cannot reset an environment with a seed. Write a gymnasium.Env whose reset(seed=...) loads the level "
    f"for that seed, and pass {_SINGLE}",
    "pettingzoo": "It has several agents. Write a gymnasium.Env for one agent that also runs the others, and pass "
    f"{_SINGLE}",
    "gym": f"Convert an environment to gymnasium, for example with shimmy.GymV26CompatibilityV0, and pass {_SINGLE}",
}


def check_envs(envs: Any) -> None:
    """Raise an error unless `envs` is a vector environment from gymnasium 1.1 or later with numeric observations."""
    vector = imported("gymnasium.vector")
    if not hasattr(vector, "AutoresetMode"):
        version = imported("gymnasium").__version__
        raise MissingPackageError(
            f"gymnasium {version} is installed, but rollouts require 1.1 or later: pip install --upgrade gymnasium"
        )
    if not isinstance(envs, vector.VectorEnv):
        libraries = [kind.__module__.partition(".")[0] for kind in type(envs).__mro__]
        advice = next((_ADVICE[name] for name in libraries if name in _ADVICE), f"For one environment, pass {_SINGLE}")
        raise RolloutError(f"envs must be a gymnasium.vector.VectorEnv; got {type(envs).__name__}. {advice}")
    if getattr(envs, "single_observation_space", None) is None:
        raise RolloutError(
            f"{type(envs).__name__} has no single_observation_space. Set its spaces in __init__, as described "
            "in the documentation of gymnasium.vector.VectorEnv."
        )
    _check_numbers(envs.single_observation_space)


def _check_numbers(space: Any, name: str = "observations") -> None:
    """Raise an error if a space, or part of it, does not produce numeric arrays in a vector environment."""
    spaces = imported("gymnasium.spaces")
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        for key, part in space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces):
            _check_numbers(part, f"{name}[{key!r}]")
    elif space.shape is None or np.dtype(space.dtype).kind not in "biufc":
        raise RolloutError(
            f"{name} is a {type(space).__name__} space, which does not produce numeric arrays. Remove it with "
            "gymnasium.wrappers.FilterObservation(environment, names), or encode it in a wrapper."
        )


def method_of(model: nn.Module, points_or_model: HookPoints | nn.Module) -> Any:
    """Return the traced method of a model or its twin, or the model itself if `__call__` was traced."""
    method = points_or_model.method if isinstance(points_or_model, HookPoints) else "__call__"
    return model if method == "__call__" else getattr(model, method)


def checked_policy(policy: Any, envs: Any, *, stateful: bool, masked: bool) -> Any:
    """Return the function or module that a rollout calls.

    Raises:
        RolloutError: If it is not callable, requires other arguments or masks, or expects other observations.
    """
    if isinstance(policy, HookPoints):
        policy = method_of(policy.model, policy)
    if not callable(policy):
        raise RolloutError(
            f"policy must be a module, HookPoints or a function of observations; got {no_module(policy)}"
        )
    owner = getattr(policy, "__self__", policy)
    if is_sb3_policy(owner):
        _check_observations(owner, envs)
    own = None if stateful else getattr(policy, "get_distribution", None)
    calls_forward = isinstance(policy, nn.Module) and inspect.unwrap(type(policy).__call__) is nn.Module.__call__
    try:
        signature = inspect.signature(own or (policy.forward if calls_forward else policy))
    except (TypeError, ValueError):  # some builtins have no signature
        return policy
    name = type(owner).__name__
    masking = name if "action_masks" in signature.parameters else _masking(policy)
    if masking and not masked:
        raise RolloutError(
            f"{masking} expects action_masks; without them it may choose actions that are not allowed. Pass "
            'masks=lambda envs, infos: np.stack(envs.call("action_masks")).'
        )
    try:
        signature.bind(*[None] * (2 if stateful else 1))
    except TypeError:
        raise RolloutError(
            f"{name} expects ({', '.join(signature.parameters)}), but a rollout passes "
            f"{'(observations, state)' if stateful else '(observations)'}. For a recurrent policy, set initial_state=. "
            "For other arguments, wrap the policy in a function, such as this one for sb3-contrib's RecurrentPPO: "
            "lambda seen, state: policy.get_distribution(seen, state, seen.new_zeros(len(seen)))."
        ) from None
    return policy


def _masking(policy: Any) -> str:
    """Return the class of a module that expects action masks, among those that a policy is or refers to, or ""."""
    for module in (module for held in held_modules(policy) for module in held.modules()):
        own = getattr(module, "get_distribution", None)
        with suppress(TypeError, ValueError):  # some builtins have no signature
            if callable(own) and "action_masks" in inspect.signature(own).parameters:
                return type(module).__name__
    return ""


def _check_observations(policy: Any, envs: Any) -> None:
    """Raise an error if a Stable-Baselines3 policy was built for observations of different shapes."""
    built, given = _shapes(policy.observation_space), _shapes(envs.single_observation_space)
    if built != given:
        raise RolloutError(
            f"{type(policy).__name__} was built for observations of shape {built}, but the environments return "
            f"{given}. In training, Stable-Baselines3 moves image channels first and may stack frames: wrap each "
            "environment to do the same."
        )


def _shapes(space: Any) -> Any:
    parts = getattr(space, "spaces", None)
    return {name: part.shape for name, part in parts.items()} if isinstance(parts, Mapping) else space.shape


def check_modes(policies: Mapping[str, Any]) -> None:
    """Raise RolloutError if a module such as dropout is in training mode in one policy and in eval mode in another.

    The first policy is compared with each of the others, and each twin with its original policy.
    """
    held = {f"'{label}'": nn.ModuleList(held_modules(policy)) for label, policy in policies.items()}
    first, *others = held.items()
    for label, modules in others:
        _check_same_modes(*first, label, modules)
    for modules in held.values():
        for twin in modules.modules():
            if STATE in vars(twin):
                original = nn.ModuleList([vars(twin)[STATE].original])
                _check_same_modes("the original policy", original, "its twin", nn.ModuleList([twin]))


def _check_same_modes(label: str, one: nn.ModuleList, other_label: str, other: nn.ModuleList) -> None:
    with as_in_predict(one), as_in_predict(other):
        _compare_modes(label, one, other_label, other)


def _compare_modes(label: str, one: nn.ModuleList, other_label: str, other: nn.ModuleList) -> None:
    ours, theirs = (
        {name: each for name, each in side.named_modules() if depends_on_training(each)} for side in (one, other)
    )
    pairs = [(name, name) for name in ours if name in theirs]
    if not {each.training for each in ours.values()} & {each.training for each in theirs.values()}:
        pairs += zip(ours, theirs, strict=False)
    for name, other_name in pairs:
        flags = ours[name].training, theirs[other_name].training
        if flags[0] != flags[1]:
            modes = ["in training mode" if flag else "in eval mode" for flag in flags]
            raise RolloutError(
                f"{_module(name, ours)} is {modes[0]} in {label}, but {_module(other_name, theirs)} is {modes[1]} in "
                f"{other_label}. The comparison would measure that difference: call eval() or train() on both."
            )


def _module(name: str, modules: Mapping[str, nn.Module]) -> str:
    inside = name.partition(".")[2]  # drop the index in the ModuleList
    return f"{repr(inside) if inside else 'the module'} ({type(modules[name]).__name__})"
