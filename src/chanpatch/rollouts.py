"""Rollouts over gymnasium's vector environments, paired so that two of them differ by their policies alone.

Each episode has its own stream of uniform draws, made from the sampling seed and the seed of the episode, and
an action is the inverse CDF of the policy's distribution at the next draw. So nothing depends on how many
environments run side by side, and two policies that agree act alike.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from ._optional import imported
from ._published import forward_context
from ._tables import table
from .errors import DistributionError, RolloutError
from .policies import action_distribution
from .tracing import undisturbed

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


@dataclass(frozen=True, repr=False, eq=False)
class Rollout:
    """What one policy did: one episode per seed, in the order of the seeds.

    Attributes:
        seeds: The seed of each episode.
        returns: The sum of its rewards.
        lengths: The number of its steps.
        terminated: Whether the environment ended it.
        truncated: Whether it was cut, by the environment or at `max_steps`.
        actions: For each episode an array `(step, ...)` of its actions.
    """

    seeds: tuple[int, ...]
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    actions: tuple[NDArray[Any], ...]

    def __len__(self) -> int:
        return len(self.seeds)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per episode: seed, return, length, terminated, truncated."""
        columns = {
            "seed": self.seeds,
            "return": self.returns.tolist(),
            "length": self.lengths.tolist(),
            "terminated": self.terminated.tolist(),
            "truncated": self.truncated.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        records = [{**record, "return": f"{record['return']:g}"} for record in self.to_records()[:_SHOWN]]
        more = [f"... {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return "\n".join([f"{len(self)} episodes", *table(records), *more])


@dataclass(frozen=True, repr=False, eq=False)
class PairedRollouts(Mapping[str, Rollout]):
    """The rollouts of several policies, by name; their arrays match episode by episode."""

    rollouts: Mapping[str, Rollout]

    def __getitem__(self, name: str) -> Rollout:
        return self.rollouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per policy and episode: policy, seed, return, length, terminated, truncated."""
        return [{"policy": name, **record} for name in self for record in self[name].to_records()]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        means = [
            {
                "policy": name,
                "mean return": f"{rollout.returns.mean():.4g}",
                "mean length": f"{rollout.lengths.mean():.4g}",
                "terminated": f"{rollout.terminated.mean():.1%}",
            }
            for name, rollout in self.rollouts.items()
        ]
        episodes = len(next(iter(self.rollouts.values())))
        return "\n".join([f"{len(self)} policies over the same {episodes} episodes", *table(means)])


def rollout(
    policy: Any,
    envs: VectorEnv[Any, Any, Any],
    seeds: Iterable[int],
    *,
    max_steps: int,
    sampling_seed: int = 0,
    greedy: bool = False,
    progress: bool | None = None,
) -> Rollout:
    """Return what a policy does in one episode per seed.

    The policy is called once per step, with the rows of the episodes that still run, and patches see the step
    and the numbers of these episodes in their `context`. Where the policy treats its rows one by one, the
    result depends neither on the number of environments nor on the other seeds; a seed that is listed twice
    is the same level with other draws. The training flag stays as it is; random number generators are put
    back afterwards. Actions are passed on as drawn: to keep them in a Box space, wrap the environments in
    gymnasium's ClipAction.

    Args:
        policy: A module or function from observations to an action distribution, or to anything in which
            `chanpatch.policies.action_distribution` finds one. Observations come on the module's device, and
            numbers with a fraction in its dtype.
        envs: A vector environment whose `reset` takes one seed per sub-environment; any autoreset mode.
        seeds: The seed that each episode is reset with, not negative.
        max_steps: The number of steps at which an episode is cut.
        sampling_seed: The seed of the draws behind the actions.
        greedy: Take the mode of each distribution instead of a draw.
        progress: Whether to show a progress bar; by default on a terminal, after two seconds.

    Raises:
        DistributionError: If the policy returns no distribution, or one without a known inverse CDF.
        MissingPackageError: If gymnasium is not installed.
        RolloutError: If seeds, `max_steps`, environments and actions do not fit.

    Example:
        >>> import gymnasium, torch
        >>> def push_right(x):
        ...     return torch.distributions.Bernoulli(torch.ones(len(x)))
        >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        >>> rollout(push_right, envs, seeds=[3, 4, 5], max_steps=100)
        3 episodes
        seed  return  length  terminated  truncated
        3     10      10      True        False
        4     10      10      True        False
        5     9       9       True        False
    """
    _check_environments(envs)
    seeds = _checked_seeds(seeds)
    if max_steps < 1:
        raise RolloutError(f"max_steps is {max_steps}, but an episode has at least one step.")
    log = _Log(seeds, sampling_seed)
    waves = range(0, len(seeds), envs.num_envs)
    bar = imported("tqdm").tqdm(
        total=len(waves) * max_steps, unit="step", delay=2, disable=None if progress is None else not progress
    )
    with undisturbed(policy if isinstance(policy, nn.Module) else nn.Module()), bar:
        for number, start in enumerate(waves):
            wave = np.arange(start, min(start + envs.num_envs, len(seeds)))
            for _ in _played_steps(policy, envs, wave, log, max_steps=max_steps, greedy=greedy):
                bar.update()
            bar.update((number + 1) * max_steps - bar.n)  # its episodes were over before
    return log.rollout()


def paired_rollouts(
    policies: Mapping[str, Any],
    envs: VectorEnv[Any, Any, Any],
    seeds: Iterable[int],
    *,
    max_steps: int,
    sampling_seed: int = 0,
    greedy: bool = False,
    progress: bool | None = None,
) -> PairedRollouts:
    """Return what several policies do in the same episodes, with the same draw behind each action.

    The policies are rolled out one after the other, each once.

    Args:
        policies: Policies by name, such as `{"original": policy, "patched": PatchedPolicy(policy, patches)}`.
        envs: As for `rollout`.
        seeds: As for `rollout`.
        max_steps: As for `rollout`.
        sampling_seed: As for `rollout`.
        greedy: As for `rollout`.
        progress: As for `rollout`; one bar per policy.

    Raises:
        ChanpatchError: As for `rollout`, and if there is no policy.

    Example:
        >>> import gymnasium, torch
        >>> from chanpatch.statistics import paired_counts
        >>> def push(right):
        ...     return lambda x: torch.distributions.Bernoulli(torch.full((len(x),), right))
        >>> envs = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
        >>> pairs = paired_rollouts({"fair": push(0.5), "loaded": push(0.7)}, envs, range(9), max_steps=100)
        >>> paired_counts(pairs["fair"].lengths > 15, pairs["loaded"].lengths > 15)
        PairedCounts(both=2, only_first=4, only_second=1, neither=2)
    """
    if not policies:
        raise RolloutError("policies is empty: name at least one policy.")
    seeds = _checked_seeds(seeds)
    settings: dict[str, Any] = {"max_steps": max_steps, "sampling_seed": sampling_seed, "greedy": greedy}
    return PairedRollouts(
        {name: rollout(policy, envs, seeds, **settings, progress=progress) for name, policy in policies.items()}
    )


class _Log:
    """What has happened in each episode so far, and its stream of draws."""

    def __init__(self, seeds: Sequence[int], sampling_seed: int) -> None:
        self.seeds, self.streams = tuple(seeds), _streams(sampling_seed, seeds)
        self.returns = np.zeros(len(seeds))
        self.lengths = np.zeros(len(seeds), dtype=np.int64)
        self.terminated = np.zeros(len(seeds), dtype=np.bool_)
        self.truncated = np.zeros(len(seeds), dtype=np.bool_)
        self.actions: list[list[NDArray[Any]]] = [[] for _ in seeds]

    def rollout(self) -> Rollout:
        actions = tuple(np.stack(steps) for steps in self.actions)
        return Rollout(self.seeds, self.returns, self.lengths, self.terminated, self.truncated, actions)


def _played_steps(
    policy: Any,
    envs: VectorEnv[Any, Any, Any],
    wave: NDArray[np.int64],
    log: _Log,
    *,
    max_steps: int,
    greedy: bool,
) -> Iterator[int]:
    """Play the episodes of one wave side by side, until the last one is over, and yield after each step."""
    observations = _reset(envs, [log.seeds[episode] for episode in np.resize(wave, envs.num_envs)])
    disabled = imported("gymnasium.vector").AutoresetMode.DISABLED
    resets_itself = envs.metadata.get("autoreset_mode") is not disabled
    # The sub-environments whose episode goes on. Those that only fill up a last wave idle from the start.
    running = np.arange(len(wave))
    actions: NDArray[Any] | None = None
    for step in range(max_steps):
        episodes = wave[running]
        with forward_context(step=step, rows=episodes):
            distribution = action_distribution(policy, _tensors(observations, running, policy))
        streams = None if greedy else [log.streams[episode] for episode in episodes]
        chosen = _checked_actions(_choose(distribution, streams), len(running), envs)
        if actions is None:
            actions = np.resize(chosen, (envs.num_envs, *chosen.shape[1:]))
        actions[running] = chosen  # a sub-environment that is done repeats its last action
        observations, rewards, terminated, truncated, _ = envs.step(actions)

        log.returns[episodes] += rewards[running]
        log.lengths[episodes] += 1
        log.terminated[episodes], log.truncated[episodes] = terminated[running], truncated[running]
        for episode, action in zip(episodes, chosen, strict=True):
            log.actions[episode].append(action)

        yield step
        over = terminated | truncated
        running = running[~over[running]]
        if not running.size:
            return
        if over.any() and not resets_itself:
            observations, _ = envs.reset(options={"reset_mask": over})
    log.truncated[wave[running]] = True


def _reset(envs: VectorEnv[Any, Any, Any], seeds: list[int]) -> Any:
    try:
        return envs.reset(seed=seeds)[0]  # type: ignore[arg-type]
    except imported("gymnasium").error.Error as error:
        raise RolloutError(
            f"{type(envs.unwrapped).__name__} cannot be reset with one seed per sub-environment. Use a "
            'SyncVectorEnv or an AsyncVectorEnv, such as gymnasium.make_vec(..., vectorization_mode="sync").'
        ) from error


def _tensors(observations: Any, rows: NDArray[np.int64], policy: Any) -> Any:
    """Return the rows of an array, or of a dict or tuple of arrays, as tensors that the policy can take."""
    if isinstance(observations, Mapping):
        return {name: _tensors(part, rows, policy) for name, part in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_tensors(part, rows, policy) for part in observations)
    tensor = torch.as_tensor(observations[rows])
    like = next(policy.parameters(), None) if isinstance(policy, nn.Module) else None
    if like is None:
        return tensor
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)


def _choose(distribution: Distribution, streams: Sequence[np.random.Generator] | None) -> NDArray[Any]:
    """Return one action per row, at the next draw of each row's stream, or the mode without streams."""
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


def _checked_actions(actions: NDArray[Any], rows: int, envs: VectorEnv[Any, Any, Any]) -> NDArray[Any]:
    space = envs.single_action_space
    if space.shape is None or actions.shape != (rows, *space.shape):
        raise RolloutError(
            f"The policy's distribution gives actions of shape {actions.shape} for {rows} rows, but {space} "
            f"takes {'no single array' if space.shape is None else f'shape {(rows, *space.shape)}'}."
        )
    return actions.astype(space.dtype, copy=False) + getattr(space, "start", 0)  # a Discrete may begin elsewhere than 0


def _streams(sampling_seed: int, seeds: Sequence[int]) -> list[np.random.Generator]:
    """Return one generator per episode; episodes with the same seed have different ones."""
    _checked_seed("sampling_seed", sampling_seed)
    times: Counter[int] = Counter()
    streams = []
    for seed in seeds:
        source = np.random.SeedSequence(sampling_seed, spawn_key=(seed, times[seed]))
        streams.append(np.random.Generator(np.random.Philox(source)))
        times[seed] += 1
    return streams


def _checked_seeds(seeds: Iterable[int]) -> list[int]:
    checked = [_checked_seed("A seed", seed) for seed in seeds]
    if not checked:
        raise RolloutError("seeds is empty: name one seed per episode.")
    return checked


def _checked_seed(name: str, seed: int) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if number < 0:
        raise RolloutError(f"{name} is {seed!r}, but it must be a whole number from 0 on.")
    return number


def _check_environments(envs: object) -> None:
    if not isinstance(envs, imported("gymnasium.vector").VectorEnv):
        raise RolloutError(
            f"envs is a {type(envs).__name__}, but a rollout takes a gymnasium.vector.VectorEnv. For a "
            "single environment: gymnasium.vector.SyncVectorEnv([lambda: environment])."
        )


_SHOWN = 10  # episodes that a repr lists
