"""Actions from distributions, at uniform draws that belong to the episode."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from ..errors import DistributionError, RolloutError

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


def draw_streams(sampling_seed: int, seeds: Sequence[int]) -> list[np.random.Generator]:
    """Return one generator per episode; episodes with the same seed have different ones."""
    checked_seed("sampling_seed", sampling_seed)
    times: Counter[int] = Counter()
    streams = []
    for seed in seeds:
        source = np.random.SeedSequence(sampling_seed, spawn_key=(seed, times[seed]))
        streams.append(np.random.Generator(np.random.Philox(source)))
        times[seed] += 1
    return streams


def checked_seed(name: str, seed: int) -> int:
    """Return a seed as a plain integer.

    Raises:
        RolloutError: If it is none, or negative; `name` says which it is.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if number < 0:
        raise RolloutError(f"{name} is {seed!r}, but it must be a whole number from 0 on.")
    return number


def chosen_actions(distribution: Distribution, streams: Sequence[np.random.Generator] | None) -> NDArray[Any]:
    """Return one action per row, at the next draw of each row's stream, or the mode without streams.

    Raises:
        DistributionError: If the distribution has no known inverse CDF.
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if not isinstance(distribution, (Categorical, Bernoulli, Normal)):
        raise DistributionError(
            f"A rollout cannot draw actions from {type(distribution).__name__}: paired draws need the "
            "inverse CDF, which is known for Categorical, Bernoulli and Normal, alone or inside Independent. "
            "Give the rollout a function that calls the policy and returns one of these."
        )
    if streams is None:
        # torch's mode of a Bernoulli is NaN at one half.
        mode = distribution.probs >= 0.5 if isinstance(distribution, Bernoulli) else distribution.mode
        return mode.cpu().numpy()
    draws = np.stack([stream.random(distribution.batch_shape[1:]) for stream in streams])
    return _inverse_cdf(distribution, torch.from_numpy(draws)).numpy()


def fitting_actions(actions: NDArray[Any], rows: int, envs: VectorEnv[Any, Any, Any]) -> NDArray[Any]:
    """Return the actions in the dtype of the environments' action space, and counted from where that begins.

    Raises:
        RolloutError: If they are of another shape.
    """
    space = envs.single_action_space
    if space.shape is None or actions.shape != (rows, *space.shape):
        raise RolloutError(
            f"The policy's distribution gives actions of shape {actions.shape} for {rows} rows, but {space} "
            f"takes {'no single array' if space.shape is None else f'shape {(rows, *space.shape)}'}."
        )
    return actions.astype(space.dtype, copy=False) + getattr(space, "start", 0)  # a Discrete may begin elsewhere than 0


def _inverse_cdf(distribution: Categorical | Bernoulli | Normal, uniform: Tensor) -> Tensor:
    """Return the values at which the distribution has reached the draws, which lie in [0, 1)."""
    if isinstance(distribution, Categorical):
        cumulative = distribution.probs.cpu().double().cumsum(-1)
        reached = uniform * cumulative[..., -1]  # the last one is 1 up to rounding
        return torch.searchsorted(cumulative, reached.unsqueeze(-1), right=True).squeeze(-1)
    if isinstance(distribution, Bernoulli):
        return uniform >= 1 - distribution.probs.cpu().double()
    mean, spread = distribution.loc.cpu(), distribution.scale.cpu()
    noise: Tensor = torch.special.ndtri(uniform.clamp(min=2.0**-54)).to(mean)
    return mean + spread * noise
