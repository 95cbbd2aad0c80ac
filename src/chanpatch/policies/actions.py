"""Sample actions from distributions, using random numbers that depend only on the sampling seed and the episode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
    Transform,
    TransformedDistribution,
)

from ..errors import DistributionError, RolloutError, counted
from ..results import imported
from ..statistics.interval import whole
from .decisions import Decision

if TYPE_CHECKING:
    from gymnasium.spaces import Space
    from gymnasium.vector import VectorEnv


def draw_streams(sampling_seed: int, seeds: Sequence[int]) -> list[np.random.Generator]:
    """Return one random generator per episode. Episodes with the same seed get generators with different streams."""
    whole("sampling_seed", sampling_seed, error=RolloutError)
    keys = zip(seeds, repetitions(seeds), strict=True)
    sources = [np.random.SeedSequence(sampling_seed, spawn_key=key) for key in keys]
    return [np.random.Generator(np.random.Philox(source)) for source in sources]


def repetitions(seeds: Sequence[int]) -> list[int]:
    """Return, for each seed in the list, how many times the same seed occurs earlier in the list."""
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

    `streams` contains one random generator per row, used for sampling. If `streams` is None, the action in each row is
    the mode of that row's distribution. If the policy returned actions instead of a distribution, return these actions.
    """
    choice, space = decision.choice, envs.single_action_space
    if isinstance(choice, Tensor):
        return _checked(_shaped(decision, choice, rows, space), space)
    distribution, transforms = _untransformed(choice)
    if distribution.batch_shape[:1] != (rows,):
        raise RolloutError(
            f"The policy's {type(distribution).__name__} has batch shape {tuple(distribution.batch_shape)} for a batch "
            f"of size {rows}. A policy must return one distribution per observation in the batch: logits with shape "
            "(batch, action), not (action,)."
        )
    if (distribution.loc if isinstance(distribution, Normal) else distribution.probs).isnan().any():
        raise DistributionError(
            f"The policy's {type(distribution).__name__} contains NaN, so no action can be chosen. Use "
            "recording(...) to find the first activation with NaN."
        )
    if streams is None:
        drawn = _mode(distribution)
    else:
        draws = np.stack([stream.random(distribution.batch_shape[1:]) for stream in streams])
        drawn = _inverse_cdf(distribution, torch.from_numpy(draws)).to(numbers_of(distribution)[0].device)
    for transform in transforms:
        drawn = transform(drawn)
    actions = _shaped(decision, drawn, rows, space)
    if wrong := _mismatch(actions, distribution, space):
        raise RolloutError(
            f"The policy's {type(distribution).__name__} {wrong}, but the environment expects {space}. Pass a "
            "function that calls the policy and returns a distribution over the environment's actions."
        )
    return actions.astype(space.dtype, copy=False) + getattr(space, "start", 0)  # Discrete(2, start=1)


def _untransformed(distribution: Distribution) -> tuple[Categorical | Bernoulli | Normal, list[Transform]]:
    """Return the base distribution to sample from, and the elementwise transforms to apply to the sample.

    Raise an error if samples cannot be drawn by inverse CDF.
    """
    transforms: list[Transform] = []
    while isinstance(distribution, (Independent, TransformedDistribution)):
        _refuse_own_samples(distribution)
        transforms = [*getattr(distribution, "transforms", ()), *transforms]
        distribution = distribution.base_dist
    if isinstance(distribution, Normal):
        _refuse_own_samples(distribution)
    is_known = isinstance(distribution, Normal) or (
        isinstance(distribution, (Categorical, Bernoulli)) and not transforms
    )
    if not is_known or any(transform.domain.event_dim for transform in transforms):
        after = ", ".join(type(transform).__name__ for transform in transforms)
        raise DistributionError(
            f"A rollout cannot sample actions from {type(distribution).__name__}{after and f' with {after}'}, because "
            "it samples by inverse CDF. The supported distributions are Categorical, Bernoulli and Normal (also inside "
            "Independent), and Normal with elementwise transforms such as tanh. Pass a function that calls the policy "
            "and returns one of these distributions."
        )
    return distribution, transforms  # type: ignore[return-value]


def _refuse_own_samples(distribution: Distribution) -> None:
    """Raise an error if the class of a distribution, such as a truncated normal, replaces torch's sampling methods."""
    kind: Any = type(distribution)
    if {each.__module__.partition(".")[0] for each in (kind.sample, kind.rsample)} - {"torch", "torchrl"}:
        raise DistributionError(
            f"{kind.__name__} has its own sample() or rsample(), but a rollout samples by inverse CDF. Pass a function "
            f"that calls the policy and returns a distribution from torch.distributions. If {kind.__name__} clips its "
            "samples, clip the actions in a wrapper of the environments."
        )


def numbers_of(choice: Distribution | Tensor) -> list[Tensor]:
    """Return the tensors that define a choice: the actions, or the parameters of the distribution over actions."""
    if isinstance(choice, Tensor):
        return [choice]
    distribution, _ = _untransformed(choice)
    return [distribution.loc, distribution.scale] if isinstance(distribution, Normal) else [distribution.logits]


def _shaped(decision: Decision, chosen: Tensor, rows: int, space: Any) -> NDArray[Any]:
    """Convert the chosen actions to an array. For a Box action space, apply `decision.to_box` to the array.

    Raise an error if the actions do not have the shape that the action space expects.
    """
    actions = (chosen.float() if chosen.dtype == torch.bfloat16 else chosen).numpy(force=True)
    is_box = isinstance(space, imported("gymnasium.spaces").Box)
    if decision.to_box is not None and is_box and actions.size == len(actions) * space.low.size:
        actions = decision.to_box(actions.reshape(-1, *space.low.shape), space)
    if space.shape is None or actions.shape != (rows, *space.shape):
        raise RolloutError(
            f"The policy's actions have shape {actions.shape} for a batch of size {rows}, but {space} "
            f"{'has no single array shape' if space.shape is None else f'expects shape {(rows, *space.shape)}'}."
        )
    return actions


def _checked(actions: NDArray[Any], space: Space[Any]) -> NDArray[Any]:
    """Convert a policy's actions to the dtype of the action space. Raise an error if the space rejects an action."""
    with np.errstate(invalid="ignore"):  # NaN raises an error below
        found = actions.astype(space.dtype)
    is_box = isinstance(space, imported("gymnasium.spaces").Box)
    is_integer = actions.dtype.kind in "iub" and (found == actions).all()
    if not (np.isfinite(actions).all() if is_box else is_integer and all(map(space.contains, found))):
        raise RolloutError(
            f"The policy returned actions {actions.tolist()} ({actions.dtype}), but the environment expects {space}. "
            "Pass a function that calls the policy and returns actions in this space."
        )
    return found


def _mismatch(actions: NDArray[Any], distribution: Categorical | Bernoulli | Normal, space: Space[Any]) -> str:
    """Return why a distribution does not fit a discrete action space, as a phrase for an error message.

    Return "" if the distribution fits, or if the action space is not discrete.
    """
    spaces = imported("gymnasium.spaces")
    if not isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return ""
    if isinstance(distribution, Normal):
        return "is continuous"
    has = distribution.probs.shape[-1] if isinstance(distribution, Categorical) else 2
    if isinstance(space, spaces.MultiDiscrete):  # the logits of dimensions with fewer choices may be padded
        fits = has >= space.nvec.max() and (actions < space.nvec).all()
    else:
        fits = has == (space.n if isinstance(space, spaces.Discrete) else 2)
    return "" if fits else f"has {counted(has, 'action')}"


def _mode(distribution: Categorical | Bernoulli | Normal) -> Tensor:
    """Return the mode of a distribution. We do not read the attribute `mode`, which is a method in some subclasses."""
    if isinstance(distribution, Normal):
        return distribution.loc
    # torch's Bernoulli.mode is NaN at probability 0.5; Stable-Baselines3 rounds 0.5 to 0.
    return distribution.probs > 0.5 if isinstance(distribution, Bernoulli) else distribution.probs.argmax(-1)


def _inverse_cdf(distribution: Categorical | Bernoulli | Normal, uniform: Tensor) -> Tensor:
    """Apply the inverse CDF of a distribution to random numbers that are uniform in [0, 1). Return the samples."""
    if isinstance(distribution, Categorical):
        cumulative = distribution.probs.cpu().double().cumsum(-1)
        reached = uniform * cumulative[..., -1]  # the last value is 1 up to rounding
        return torch.searchsorted(cumulative, reached.unsqueeze(-1), right=True).squeeze(-1)
    if isinstance(distribution, Bernoulli):
        return uniform >= 1 - distribution.probs.cpu().double()
    mean, spread = distribution.loc.cpu(), distribution.scale.cpu()
    noise: Tensor = torch.special.ndtri(uniform.clamp(min=2.0**-54)).to(mean)
    return mean + spread * noise
