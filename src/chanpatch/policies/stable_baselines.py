"""Detect Stable-Baselines3 policies and distributions, and clip or rescale actions as `predict` does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..metrics.outputs import is_squashed


def is_sb3_policy(policy: object) -> bool:
    """Return whether a policy is from Stable-Baselines3. The library does not have to be installed."""
    return _is_a(policy, "policies", "BasePolicy")


@contextmanager
def as_in_predict(model: nn.Module) -> Iterator[None]:
    """Switch the Stable-Baselines3 policies in a model to eval mode, as `predict` does. Restore their modes on exit."""
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
    """Return the function that clips or rescales actions to fit a Box, as Stable-Baselines3 does for this output.

    Return None if the output is not a Stable-Baselines3 distribution.
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
