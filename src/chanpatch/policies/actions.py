"""Sample actions from a policy's output; each draw depends only on its episode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, TanhTransform

from ..errors import DistributionError, RolloutError
from ..results import imported
from ..statistics.interval import whole
from .decisions import Decision

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv


def draw_streams(sampling_seed: int, seeds: Sequence[int]) -> list[np.random.Generator]:
    """Return one random generator per episode; episodes with the same seed get different generators."""
    whole("sampling_seed", sampling_seed, error=RolloutError)
    keys = zip(seeds, repetitions(seeds), strict=True)
    sources = [np.random.SeedSequence(sampling_seed, spawn_key=key) for key in keys]
    return [np.random.Generator(np.random.Philox(source)) for source in sources]


def repetitions(seeds: Sequence[int]) -> list[int]:
    """Return, for each seed, how many times it occurs earlier in the list."""
    times: Counter[int] = Counter()
    found = []
    for seed in seeds:
        found.append(times[seed])
        times[seed] += 1
    return found


def chosen_actions(
    decision: Decision, streams: Sequence[np.random.Generator] | None, rows: int, envs: VectorEnv[Any, Any, Any]
) -> NDArray[Any]:
    """Return one action per row, in the format that the environments expect.

    Actions are sampled from a distribution with each row's generator; without generators, the mode is used.
    """
    choice, space = decision.choice, envs.single_action_space
    if isinstance(choice, Tensor):
        return _given(_in_box(decision, choice.detach().cpu().numpy(), space), rows, space)
    distribution, squashed = _untransformed(choice)
    if distribution.batch_shape[:1] != (rows,):
        raise RolloutError(
            f"The policy's {type(distribution).__name__} has batch shape {tuple(distribution.batch_shape)} for {rows} "
            "rows. A policy must return one distribution per row: logits of shape (row, action), not (action,)."
        )
    if (distribution.loc if isinstance(distribution, Normal) else distribution.probs).isnan().any():
        raise DistributionError(
            f"The policy's {type(distribution).__name__} contains NaN, so no action can be sampled. Find the first "
            "activation with NaN: recording(...)."
        )
    if streams is None:
        # torch's Bernoulli.mode is NaN at probability 0.5.
        mode = distribution.probs >= 0.5 if isinstance(distribution, Bernoulli) else distribution.mode
        actions = mode.cpu().numpy()
    else:
        draws = np.stack([stream.random(distribution.batch_shape[1:]) for stream in streams])
        actions = _inverse_cdf(distribution, torch.from_numpy(draws)).numpy()
    actions = _in_box(decision, np.tanh(actions) if squashed else actions, space)
    return _fitting(actions, distribution, rows, space)


def _untransformed(distribution: Distribution) -> tuple[Categorical | Bernoulli | Normal, bool]:
    """Return the distribution to sample from, and whether the action is the tanh of the sample."""
    squashed = False
    while isinstance(distribution, Independent) or _is_tanh(distribution):
        squashed |= _is_tanh(distribution)
        distribution = distribution.base_dist  # type: ignore[attr-defined]
    if not isinstance(distribution, (Categorical, Bernoulli, Normal)):
        raise DistributionError(
            f"A rollout cannot sample actions from {type(distribution).__name__}: paired sampling requires the "
            "inverse CDF, which is available for Categorical, Bernoulli and Normal, alone or inside Independent, and "
            "for the tanh of a Normal. Pass a function that calls the policy and returns one of these."
        )
    return distribution, squashed


def numbers_of(choice: Distribution | Tensor) -> list[Tensor]:
    """Return the actions, or the parameters of the distribution that they are drawn from."""
    if isinstance(choice, Tensor):
        return [choice]
    distribution, _ = _untransformed(choice)
    return [distribution.loc, distribution.scale] if isinstance(distribution, Normal) else [distribution.logits]


def _is_tanh(distribution: Distribution) -> bool:
    transforms = getattr(distribution, "transforms", ())
    return [type(transform) for transform in transforms] == [TanhTransform]


def _in_box(decision: Decision, actions: NDArray[Any], space: Space[Any]) -> NDArray[Any]:
    is_box = isinstance(space, imported("gymnasium.spaces").Box)
    if decision.fitted is None or not is_box or actions.size != len(actions) * space.low.size:  # type: ignore[attr-defined]
        return actions
    return decision.fitted(actions.reshape(-1, *space.low.shape), space)  # type: ignore[attr-defined]


def _given(actions: NDArray[Any], rows: int, space: Space[Any]) -> NDArray[Any]:
    """Cast actions that the policy chose itself to the dtype of the action space, and check that they are valid."""
    _check_shape("The policy", actions, rows, space)
    with np.errstate(invalid="ignore"):  # NaN raises an error below
        fitting = actions.astype(space.dtype)
    is_box = isinstance(space, imported("gymnasium.spaces").Box)
    whole = actions.dtype.kind in "iub" and (fitting == actions).all()
    if not (np.isfinite(actions).all() if is_box else whole and all(map(space.contains, fitting))):
        raise RolloutError(
            f"The policy returned actions {actions.tolist()} ({actions.dtype}), but the environment expects {space}."
        )
    return fitting


def _fitting(
    actions: NDArray[Any], distribution: Categorical | Bernoulli | Normal, rows: int, space: Space[Any]
) -> NDArray[Any]:
    """Cast actions to the dtype of the action space, offset them by its start, and check that they are valid."""
    _check_shape("The policy's distribution", actions, rows, space)
    wrong = _wrong_actions(actions, distribution, space)
    if wrong:
        raise RolloutError(
            f"The policy's {type(distribution).__name__} {wrong}, but the environment expects {space}. Pass a "
            "function that calls the policy and returns a distribution over those actions."
        )
    return actions.astype(space.dtype, copy=False) + getattr(space, "start", 0)  # Discrete(2, start=1)


def _check_shape(subject: str, actions: NDArray[Any], rows: int, space: Space[Any]) -> None:
    if space.shape is None or actions.shape != (rows, *space.shape):
        raise RolloutError(
            f"{subject} produces actions of shape {actions.shape} for {rows} rows, but {space} "
            f"{'has no single array shape' if space.shape is None else f'expects shape {(rows, *space.shape)}'}."
        )


def _wrong_actions(actions: NDArray[Any], distribution: Categorical | Bernoulli | Normal, space: Space[Any]) -> str:
    """Return why a distribution does not match a discrete space, or an empty string if it does."""
    spaces = imported("gymnasium.spaces")
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return ""
    if isinstance(distribution, Normal):
        return "is continuous"
    has = distribution.probs.shape[-1] if isinstance(distribution, Categorical) else 2
    if isinstance(space, spaces.MultiDiscrete):  # dimensions with fewer choices may have padded logits
        fits = has >= space.nvec.max() and (actions < space.nvec).all()
    else:
        fits = has == (space.n if isinstance(space, spaces.Discrete) else 2)
    return "" if fits else f"has {has} actions"


def _inverse_cdf(distribution: Categorical | Bernoulli | Normal, uniform: Tensor) -> Tensor:
    """Apply the inverse CDF of a distribution to uniform draws in [0, 1)."""
    if isinstance(distribution, Categorical):
        cumulative = distribution.probs.cpu().double().cumsum(-1)
        reached = uniform * cumulative[..., -1]  # the last value is 1 up to rounding
        return torch.searchsorted(cumulative, reached.unsqueeze(-1), right=True).squeeze(-1)
    if isinstance(distribution, Bernoulli):
        return uniform >= 1 - distribution.probs.cpu().double()
    mean, spread = distribution.loc.cpu(), distribution.scale.cpu()
    noise: Tensor = torch.special.ndtri(uniform.clamp(min=2.0**-54)).to(mean)
    return mean + spread * noise
