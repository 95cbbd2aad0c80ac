"""Actions drawn from the output of a policy; each draw depends on the episode alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from ..errors import DistributionError, RolloutError
from ..metrics.outputs import distribution_in, no_distribution
from ..results import imported
from ..statistics.interval import whole

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv


def action_distribution(policy: Callable[..., Any], observations: Any) -> Distribution:
    """Return a policy's distribution over actions, for a batch of observations.

    The policy may return a distribution, logits, `(distribution or logits, ...)`, or a dict or object that has `logits`
    or a distribution. It may also have a `get_distribution` method (Stable-Baselines3).

    Raises:
        DistributionError: If the output holds no distribution.
    """
    own = getattr(policy, "get_distribution", None)
    try:
        output = own(observations) if callable(own) else policy(observations)
    except NotImplementedError as error:
        if 'missing the required "forward"' not in str(error):
            raise
        raise DistributionError(
            f"{type(policy).__name__} has no forward. Give rollout() or action_distribution() the function that "
            "gives its logits or distribution, such as lambda observations: agent.actor(observations); give "
            "rollout_sweep() a module whose forward does that."
        ) from error
    found = distribution_in(output)  # a ValueError about NaN goes on: the patch that introduced it is named later
    if found is None:
        raise no_distribution(output, f"{type(policy).__name__} returned", "Pass a function that selects it.")
    return found


def draw_streams(sampling_seed: int, seeds: Sequence[int]) -> list[np.random.Generator]:
    """Return one generator per episode; repeated seeds get different ones."""
    whole("sampling_seed", sampling_seed, error=RolloutError)
    times: Counter[int] = Counter()
    streams = []
    for seed in seeds:
        source = np.random.SeedSequence(sampling_seed, spawn_key=(seed, times[seed]))
        streams.append(np.random.Generator(np.random.Philox(source)))
        times[seed] += 1
    return streams


def chosen_actions(
    distribution: Distribution, streams: Sequence[np.random.Generator] | None, rows: int, envs: VectorEnv[Any, Any, Any]
) -> NDArray[Any]:
    """Return one action per row, as the environments take them.

    The next draw of each row's generator selects the action; without generators it is the mode.
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if not isinstance(distribution, (Categorical, Bernoulli, Normal)):
        raise DistributionError(
            f"A rollout cannot draw actions from {type(distribution).__name__}: paired draws need the "
            "inverse CDF, which is known for Categorical, Bernoulli and Normal, alone or inside Independent. "
            "Give the rollout a function that calls the policy and returns one of these."
        )
    if distribution.batch_shape[:1] != (rows,):
        raise RolloutError(
            f"The policy's {type(distribution).__name__} has batch shape {tuple(distribution.batch_shape)} for {rows} "
            "rows. A policy returns one distribution per row: logits (row, action), not (action,)."
        )
    if streams is None:
        # torch's mode of a Bernoulli is NaN at one half.
        mode = distribution.probs >= 0.5 if isinstance(distribution, Bernoulli) else distribution.mode
        actions = mode.cpu().numpy()
    else:
        draws = np.stack([stream.random(distribution.batch_shape[1:]) for stream in streams])
        actions = _inverse_cdf(distribution, torch.from_numpy(draws)).numpy()
    return _fitting(actions, distribution, rows, envs.single_action_space)


def _fitting(
    actions: NDArray[Any], distribution: Categorical | Bernoulli | Normal, rows: int, space: Space[Any]
) -> NDArray[Any]:
    """Return the actions in the dtype of an action space, counted from its start, if they fit."""
    if space.shape is None or actions.shape != (rows, *space.shape):
        raise RolloutError(
            f"The policy's distribution gives actions of shape {actions.shape} for {rows} rows, but {space} "
            f"takes {'no single array' if space.shape is None else f'shape {(rows, *space.shape)}'}."
        )
    wrong = _wrong_actions(actions, distribution, space)
    if wrong:
        raise RolloutError(
            f"The policy's {type(distribution).__name__} {wrong}, but the environment takes {space}. Give the rollout "
            "a function that calls the policy and returns a distribution over those actions."
        )
    return actions.astype(space.dtype, copy=False) + getattr(space, "start", 0)  # a Discrete need not start at 0


def _wrong_actions(actions: NDArray[Any], distribution: Categorical | Bernoulli | Normal, space: Space[Any]) -> str:
    """Return why a distribution does not fit a discrete space; an empty text if it fits."""
    spaces = imported("gymnasium.spaces")
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return ""
    if isinstance(distribution, Normal):
        return "gives fractions"
    has = distribution.probs.shape[-1] if isinstance(distribution, Categorical) else 2
    if isinstance(space, spaces.MultiDiscrete):  # some may have fewer choices, whose logits are padded
        fits = has >= space.nvec.max() and (actions < space.nvec).all()
    else:
        fits = has == (space.n if isinstance(space, spaces.Discrete) else 2)
    return "" if fits else f"has {has} actions"


def _inverse_cdf(distribution: Categorical | Bernoulli | Normal, uniform: Tensor) -> Tensor:
    """Return the values at which the cumulative distribution reaches the draws, which lie in [0, 1)."""
    if isinstance(distribution, Categorical):
        cumulative = distribution.probs.cpu().double().cumsum(-1)
        reached = uniform * cumulative[..., -1]  # the last one is 1 up to rounding
        return torch.searchsorted(cumulative, reached.unsqueeze(-1), right=True).squeeze(-1)
    if isinstance(distribution, Bernoulli):
        return uniform >= 1 - distribution.probs.cpu().double()
    mean, spread = distribution.loc.cpu(), distribution.scale.cpu()
    noise: Tensor = torch.special.ndtri(uniform.clamp(min=2.0**-54)).to(mean)
    return mean + spread * noise
