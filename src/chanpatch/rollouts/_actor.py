"""A policy on the rows of the running episodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution

from .._tree import Item, leaves, replace
from ..errors import ChanpatchError, RolloutError
from ..policies import action_distribution
from ._state import BatchAxes, InitialState, new_state, rows_of, state_batch_axes

Around: TypeAlias = Callable[[NDArray[np.int64], tuple[Any, ...], BatchAxes], AbstractContextManager[None]]


class Actor:
    """A policy, and the state that it carries for each episode under way.

    Args:
        policy: As in rollout.
        initial_state: As in rollout.
        around: Opened around every forward; takes the numbers of its rows, the policy's inputs, and which axis of
            each tensor in them is the batch.
    """

    def __init__(self, policy: Any, initial_state: InitialState | None, around: Around) -> None:
        self._policy, self._around, self._initial_state = policy, around, initial_state
        self._state_axes = {} if initial_state is None else state_batch_axes(initial_state)
        self._state: Any = None
        self._like = next(policy.parameters(), None) if isinstance(policy, nn.Module) else None

    def begin(self, rows: int) -> None:
        """Begin so many episodes, each with a fresh state."""
        if self._initial_state is not None:
            self._state = self._initial_state(rows)
            for path, tensor in leaves(self._state):
                self._state = replace(self._state, path, self._placed(tensor))

    def keep(self, running: NDArray[np.bool_]) -> None:
        """Drop the rows of the episodes that are over."""
        self._state = rows_of(self._state, self._state_axes, torch.from_numpy(running))

    def distribution(self, observations: Any, rows: NDArray[np.int64], numbers: NDArray[np.int64]) -> Distribution:
        """Return the distribution over actions in some rows of the observations, and carry the state on.

        Args:
            observations: Arrays with one row per sub-environment.
            rows: Those that run.
            numbers: What `around` is told of each of them.
        """
        inputs: tuple[Any, ...] = (self._tensors(observations, rows),)
        axes: BatchAxes = {path: 0 for path, _ in leaves(inputs)}
        if self._initial_state is not None:
            inputs = (*inputs, self._state)
            axes = {**axes, **{(Item(1), *path): axis for path, axis in self._state_axes.items()}}
        with self._around(numbers, inputs, axes):
            try:
                called = self._policy if self._initial_state is None else self._with_state
                return action_distribution(called, inputs[0])
            except RuntimeError as error:
                self._explain_dtype(error, inputs[0])
                raise

    def _with_state(self, observations: Any) -> Any:
        output, self._state = new_state(self._policy(observations, self._state), self._state)
        return output

    def _tensors(self, observations: Any, rows: NDArray[np.int64]) -> Any:
        """Return the rows of an array, or of a dict or tuple of arrays, as tensors that the policy can take."""
        if isinstance(observations, Mapping):
            return {name: self._tensors(part, rows) for name, part in observations.items()}
        if isinstance(observations, tuple):
            return tuple(self._tensors(part, rows) for part in observations)
        return self._placed(torch.as_tensor(observations[rows]))

    def _placed(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device of a module, and numbers with a fraction in its dtype."""
        if self._like is None:
            return tensor
        return tensor.to(self._like.device, self._like.dtype if tensor.is_floating_point() else tensor.dtype)

    def _explain_dtype(self, error: RuntimeError, observations: Any) -> None:
        """Say what to do where torch refused the dtype that observations have."""
        usual = torch.get_default_dtype() if self._like is None else self._like.dtype
        others = {str(tensor.dtype) for _, tensor in leaves(observations) if tensor.dtype != usual}
        if others and _DTYPE_REFUSED.search(str(error)) and not isinstance(error, ChanpatchError):
            raise RolloutError(
                f"The policy refused observations of {', '.join(sorted(others))} ({error}). A rollout hands them on "
                "as the environments give them: convert them as in training, in the policy or in a function around "
                "it, such as lambda observations: policy(observations.float() / 255)."
            ) from error


_DTYPE_REFUSED = re.compile("dtype|scalar type|Input type|must have the type|not implemented for '")
