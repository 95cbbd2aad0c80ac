"""Run policies from Stable-Baselines3 and sb3-contrib in the same way as the policies' method `predict`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..metrics.outputs import is_squashed


def is_sb3_policy(policy: object) -> bool:
    """Return whether a policy is from Stable-Baselines3. If Stable-Baselines3 is not installed, return False."""
    return _is_a(policy, "policies", "BasePolicy")


def policy_of(given: Any) -> Any:
    """Return the policy of a Stable-Baselines3 algorithm, such as PPO; return any other policy unchanged."""
    return given.policy if _is_a(given, "base_class", "BaseAlgorithm") else given


def owner_of(policy: Any) -> Any:
    """If `policy` is a bound method, return the object that the method belongs to; otherwise, return `policy`."""
    return getattr(policy, "__self__", policy)


def observed_shape(policy: Any, space: Any) -> Any:
    """Return the shape that observations from an environment must have, for a policy with observation space `policy`.

    `space` is the environment's observation space. If the environment has the channels of images last, and the policy
    moves the channels to the first axis, return `space.shape`. Otherwise, return `policy.shape`.
    """
    shape = policy.shape
    is_moved = shape is not None and len(shape) == 3 and space.shape == (*shape[1:], shape[0])
    is_image = is_moved and sys.modules["stable_baselines3.common.preprocessing"].is_image_space(policy)
    return space.shape if is_image else shape


def to_tensors(policy: Any, observations: Any) -> Any:
    """Convert observations to tensors as `predict` does. Images have shape `(batch, channel, row, col)`."""
    convert = inspect.unwrap(type(policy).obs_to_tensor)  # in a twin, obs_to_tensor counts as a forward pass
    return convert(policy, observations)[0]


def lstm_state(policy: Any) -> Callable[[int], tuple[Tensor, Tensor]] | None:
    """Return a function from the number of rows to zero LSTM states; None if the policy is not from RecurrentPPO."""
    shape = getattr(owner_of(policy), "lstm_hidden_state_shape", None) if is_sb3_policy(owner_of(policy)) else None
    if shape is None:
        return None
    layers, _, size = shape
    return lambda rows: (torch.zeros(layers, rows, size), torch.zeros(layers, rows, size))


def with_state(policy: Any, observations: Any, state: Any, starts: Tensor) -> Any:
    """Call a recurrent policy on observations and a recurrent state, and return the policy's output.

    `starts` is passed only to policies from sb3-contrib, which reset the state in rows in which `starts` is 1.
    `starts` must contain only zeros, because the state of a new episode is already the initial state.
    """
    if not is_sb3_policy(owner_of(policy)):
        return policy(observations, state)
    called: Any = policy.get_distribution if isinstance(policy, nn.Module) else policy
    return called(observations, state, starts)


@contextmanager
def as_in_predict(model: nn.Module) -> Iterator[None]:
    """Switch the Stable-Baselines3 policies in a model to eval mode, as `predict` does. On exit, restore all modes."""
    policies = [each for each in model.modules() if is_sb3_policy(each)]
    flags = [(module, module.training) for policy in policies for module in policy.modules()]
    try:
        for policy in policies:
            policy.set_training_mode(False)  # type: ignore[operator]
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def box_mapping(output: object) -> Callable[[NDArray[Any], Any], NDArray[Any]] | None:
    """Return a function that receives actions and a Box, and returns actions in the Box.

    The function clips or rescales the actions, as Stable-Baselines3 does for the given policy output. Return None if
    the output is not a Stable-Baselines3 distribution.
    """
    while isinstance(output, (tuple, list)) and output:  # (distribution, value)
        output = output[0]
    if not _is_a(output, "distributions", "Distribution"):
        return None
    return rescaled if is_squashed(output) else clipped


def rescaled(actions: NDArray[Any], box: Any) -> NDArray[Any]:
    """Rescale actions from [-1, 1] to the bounds of a Box."""
    found: NDArray[Any] = box.low + 0.5 * (actions + 1) * (box.high - box.low)
    return found


def clipped(actions: NDArray[Any], box: Any) -> NDArray[Any]:
    """Clip actions to the bounds of a Box."""
    return np.clip(actions, box.low, box.high)


def _is_a(thing: object, module: str, name: str) -> bool:
    return isinstance(thing, getattr(sys.modules.get(f"stable_baselines3.common.{module}"), name, ()))
