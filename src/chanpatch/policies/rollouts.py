"""What one policy does, and what several do in the same episodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RolloutError
from .episodes import InitialState, Log, check_environments, play
from .results import PairedRollouts, Rollout

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


def rollout(
    policy: Any,
    envs: VectorEnv[Any, Any, Any],
    seeds: Iterable[int],
    *,
    max_steps: int,
    sampling_seed: int = 0,
    greedy: bool = False,
    initial_state: InitialState | None = None,
    progress: bool | None = None,
) -> Rollout:
    """Return what a policy does in one episode per seed.

    The policy is called once per step, with the rows of the episodes that still run, and patches see the step
    and the numbers of these episodes in their `context`. Where the policy treats its rows one by one, the
    result depends neither on the number of environments nor on the other seeds; a seed that is listed twice
    is the same level with other draws. Actions are passed on as drawn: to keep them in a Box space, wrap the
    environments in gymnasium's ClipAction.

    The training flag stays as it is. Random number generators are put back afterwards, and so is all that the
    policy keeps in buffers and attributes, lists too: also whenever the environments begin new episodes, so
    that none begins with what another one left. A policy's log of its own goes where no attribute holds it,
    such as a list to which a function appends. For a policy that is a function, this holds of the modules in
    its closure, in its defaults and in the globals that it names.

    A recurrent policy is called as `policy(observations, state)` and returns `(output, new state)`. Every
    episode begins with a state of its own, so such a policy needs no flag for the start of an episode. One
    with other arguments goes into a function: of sb3-contrib's RecurrentPPO
    `lambda seen, state: policy.get_distribution(seen, state, seen.new_zeros(len(seen)))`. One that keeps its state
    on itself, a row per environment, is right in one environment only: as episodes end, rows leave the forward.

    Args:
        policy: A module or function from observations to an action distribution, or to anything in which
            `chanpatch.policies.action_distribution` finds one. Observations come on the module's device, and
            numbers with a fraction in its dtype.
        envs: A vector environment whose `reset` takes one seed per sub-environment; any autoreset mode.
        seeds: The seed that each episode is reset with, not negative.
        max_steps: The number of steps at which an episode is cut.
        sampling_seed: The seed of the draws behind the actions.
        greedy: Take the mode of each distribution instead of a draw.
        initial_state: For a recurrent policy, a function from a number of rows to the state at the start of as
            many episodes: a tensor, or tensors in tuples and dicts, such as
            `lambda rows: (torch.zeros(1, rows, 64), torch.zeros(1, rows, 64))` for the `(layer, batch, feature)`
            of an LSTM. The batch axis of each tensor is the one that is as long as there are rows.
        progress: Whether to show a progress bar; by default on a terminal, after two seconds.

    Raises:
        DistributionError: If the policy returns no distribution, or one without a known inverse CDF.
        MissingPackageError: If gymnasium is not installed.
        RolloutError: If seeds, `max_steps`, environments, states and actions do not fit, or the policy refuses
            the dtype of the observations.

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

        A policy that remembers what it did, and pushes to the left and to the right in turn:

        >>> def alternate(x, pushed_right):
        ...     return torch.distributions.Bernoulli(1 - pushed_right), 1 - pushed_right
        >>> rollout(alternate, envs, [3], max_steps=4, initial_state=torch.zeros).actions
        (array([1, 0, 1, 0]),)
    """
    check_environments(envs)
    log = Log(seeds, sampling_seed)
    play(policy, envs, log, max_steps=max_steps, greedy=greedy, initial_state=initial_state, progress=progress)
    return log.rollouts()[0]


def paired_rollouts(
    policies: Mapping[str, Any],
    envs: VectorEnv[Any, Any, Any],
    seeds: Iterable[int],
    *,
    max_steps: int,
    sampling_seed: int = 0,
    greedy: bool = False,
    initial_state: InitialState | None = None,
    progress: bool | None = None,
) -> PairedRollouts:
    """Return what several policies do in the same episodes, with the same draw behind each action.

    The policies are rolled out one after the other, each once.

    Args:
        policies: Policies by name, such as `{"original": policy, "patched": PatchedPolicy(policy, patches)}`. The
            others are compared with the first.
        envs: As for `rollout`.
        seeds: As for `rollout`.
        max_steps: As for `rollout`.
        sampling_seed: As for `rollout`.
        greedy: As for `rollout`.
        initial_state: As for `rollout`; the same for all policies.
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
    if not isinstance(policies, Mapping):
        raise TypeError(
            f"policies is of type {type(policies).__name__}; it takes policies by name, as in "
            '{"original": policy, "patched": twin}.'
        )
    seeds = list(seeds) if isinstance(seeds, Iterable) else seeds
    settings: dict[str, Any] = {
        "max_steps": max_steps,
        "sampling_seed": sampling_seed,
        "greedy": greedy,
        "initial_state": initial_state,
        "progress": progress,
    }
    return PairedRollouts({name: rollout(policy, envs, seeds, **settings) for name, policy in policies.items()})
