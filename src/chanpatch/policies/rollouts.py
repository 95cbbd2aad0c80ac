"""Roll out one policy, or several policies in the same episodes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from ..errors import RolloutError
from ..labels import reference_notes, refuse_shared_state
from .checks import SharedState, check_equal, check_modes, refuse_environments_by_rows
from .copies import functions_of, patches_inside
from .decisions import Masks, Outputs
from .episodes import play
from .log import InitialState, Options, by_repetition, checked_seeds
from .parts import opened, played_in_parts
from .results import PairedRollouts, Rollout
from .stable_baselines import policy_of


def rollout(
    policy: Any,
    envs: Any,
    seeds: Iterable[int],
    *,
    max_steps: int,
    sampling_seed: int = 0,
    greedy: bool = False,
    outputs: Outputs | None = None,
    masks: Masks | None = None,
    initial_state: InitialState | None = None,
    keep: Sequence[str] = (),
    executor: Executor | None = None,
    progress: bool | None = None,
) -> Rollout:
    """Play one episode per seed.

    The policy is called once per step on a batch with one row per running episode. Patches receive the step, the
    episode numbers and the sub-environment indices in `context`. If the policy treats each row independently, an
    episode does not depend on the number of environments or on the other seeds. If `seeds` contains a seed twice, the
    two episodes have the same level but different random numbers for sampling actions.

    Stable-Baselines3 and sb3-contrib policies act as in their own `predict`: observations are converted by
    `obs_to_tensor`, actions in a Box are clipped, or rescaled if the policy squashes actions, and policies without a
    distribution act deterministically. Actions from other policies are not clipped: for a Box space, wrap the
    environments in gymnasium's ClipAction.

    Random number generators and the policy's buffers and attributes, including lists, are restored before each new
    batch of episodes and at the end of the rollout. If the policy or its patches use objects of your own classes, the
    attributes of these objects are also restored. Nonlocal and global variables are restored if a function of the
    policy or of a patch assigns to these variables. Environments are not restored. To keep a log, append to a list in a
    closure or a global variable. If several policies share such a list, paired_rollouts plays the episodes twice to
    check that the contents of the list do not affect the episodes.

    A recurrent policy is called as `policy(observations, state)` and must return `(output, new state)`. The initial
    state comes from `initial_state`; for sb3-contrib's RecurrentPPO, the initial state is zero by default. If a policy
    expects other arguments, wrap the policy in a function. A policy that stores its recurrent state internally works
    only with a single environment, because the batch shrinks as episodes end.

    Args:
        policy: Module, HookPoints, Stable-Baselines3 model, or function of observations. The policy's output must be a
            tensor or contain an action distribution (see `chanpatch.policies.action_distribution`). Observations are
            moved to the module's device and, if they are floating point, cast to the module's dtype.
        envs: Environment from gymnasium; vector environment from gymnasium, in any autoreset mode; VecEnv from
            Stable-Baselines3; or procgen environment, in which each seed is a level. Some vector environments, such as
            the default from `make_vec` for CartPole, accept one seed for all sub-environments. Such environments are
            replaced by one copy per sub-environment. See also `from_gym3` and `from_pettingzoo`. `envs` may also be
            a function without arguments that creates environments; the rollout closes these environments at the end.
        seeds: Nonnegative seeds for resetting the environment, one per episode.
        max_steps: Maximum number of steps per episode.
        sampling_seed: Random seed for sampling actions.
        greedy: Whether to use the mode of each distribution instead of sampling.
        outputs: Meaning of a tensor that the policy returns, alone or in a pair `(tensor, value)`: `"logits"`;
            `"values"`, to select the action with the highest value; or `"actions"`, to use the tensor unchanged. If a
            policy samples its own actions, replace `policy` with a function that returns the policy's distribution, so
            that paired rollouts use the same draws.
        masks: Function that receives the environments and the infos from the last step, and returns which actions are
            allowed: a bool array with shape `(environment, action)`. The function is called before each step. Examples:
            `lambda envs, infos: np.stack(envs.call("action_masks"))` or `lambda envs, infos: infos["action_mask"]`.
        initial_state: For a recurrent policy, a function that receives the number of rows and returns the initial
            state: a tensor, or tensors in tuples and dicts. Example for an LSTM:
            `lambda rows: (torch.zeros(1, rows, 64), torch.zeros(1, rows, 64))`. Each tensor must have exactly one batch
            axis, whose length is the number of rows.
        keep: Names of data to keep in `Rollout.kept`: `"observations"`, `"final_state"` (only for a recurrent policy),
            and names of infos.
        executor: Executor whose workers share the episodes, such as a `ProcessPoolExecutor` that spawns its workers or
            dask's `client.get_executor()`. With an executor, `envs` must be a function that creates environments. Each
            worker plays `num_envs` episodes at a time, and the results are the same as without an executor.
        progress: Whether to show a progress bar. By default, a bar is shown in a terminal after two seconds.

    Raises:
        DistributionError: If the policy returns a tensor but `outputs` is None, if the inverse CDF of the policy's
            distribution is not available, or if the output contains neither a tensor nor a distribution.
        MissingPackageError: If gymnasium is not installed or is older than 1.1.
        RolloutError: If seeds, `max_steps`, environments, observations, states, masks or actions are invalid. Also if a
            module such as dropout is in training mode in a twin but not in the original policy, or vice versa.
        ExecutorError: If a function cannot be sent to workers, or if workers are lost. If workers are lost, `partial`
            contains the finished episodes, and the same call with a new executor plays only the lost episodes.

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
    policy, seeds = policy_of(policy), checked_seeds(seeds)
    options = Options(seeds, max_steps, sampling_seed, greedy, outputs, masks, initial_state, progress, keep)
    parts, lost = played_in_parts(executor, _played, policy, envs, options, policy)
    played = by_repetition(parts, len(seeds), complete=False)[0]
    if lost:
        lost.partial = played
        raise lost
    return played


def _played(call: tuple[Any, Options, Any], part: range) -> Rollout:
    """Play a range of the episodes with one policy."""
    envs, options, policy = call
    check_modes({"": policy})
    with opened(envs) as vector:
        refuse_environments_by_rows(patches_inside(policy), vector)
        return play(policy, vector, options, part)


def paired_rollouts(  # noqa: D417  # the arguments of rollout are documented there
    policies: Mapping[str, Any],
    envs: Any,
    seeds: Iterable[int],
    *,
    max_steps: int,
    sampling_seed: int = 0,
    greedy: bool = False,
    outputs: Outputs | Mapping[str, Outputs] | None = None,
    masks: Masks | None = None,
    initial_state: InitialState | None = None,
    keep: Sequence[str] = (),
    executor: Executor | None = None,
    progress: bool | None = None,
) -> PairedRollouts:
    """Roll out several policies, one after another, in the same episodes and with the same random numbers.

    Args:
        policies: Dict that maps names to policies, such as
            `{"original": policy, "patched": PatchedPolicy(policy, patches)}`. The first policy is compared with each of
            the others.
        outputs: Meaning of tensors that policies return, as in `rollout`: one string for all policies, or a dict that
            maps policies' names to strings.
        envs, seeds, max_steps, sampling_seed, greedy, masks, initial_state, keep, executor, progress: Same as in
            `rollout`, for all policies.

    Raises:
        ChanpatchError: For the same reasons as `rollout`; if there are no policies; if a module such as dropout is in
            training mode in one policy but not in another; if two policies use the same callable object as an edit or
            `where`; if an episode differs between two policies before the actions in the episode differ; if policies
            share a list or another container whose contents affect the episodes; or if a policy's first output changes
            when the first forward pass is repeated.

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
        raise RolloutError("policies is empty: pass at least one policy.")
    if not isinstance(policies, Mapping):
        raise TypeError(
            'policies must be a dict that maps names to policies, as in {"original": policy, "patched": twin}; '
            f"got {type(policies).__name__}."
        )
    policies = {name: policy_of(policy) for name, policy in policies.items()}
    each = outputs if isinstance(outputs, Mapping) else dict.fromkeys(policies, outputs)
    if stray := each.keys() - policies.keys():
        raise RolloutError(
            f"outputs has the key {min(stray)!r}, which is not the name of a policy. The names are "
            f"{', '.join(map(repr, policies))}."
        )
    seeds = checked_seeds(seeds)
    options = Options(seeds, max_steps, sampling_seed, greedy, None, masks, initial_state, progress, keep)
    first = next(iter(policies.values()))
    parts, lost = played_in_parts(executor, _played_by_each, first, envs, options, policies, each)
    own = {name: {plays: part[name] for plays, part in parts.items()} for name in policies}
    rollouts = {name: by_repetition(own[name], len(seeds), complete=False)[0] for name in policies}
    remarks = reference_notes(patch for policy in policies.values() for patch in patches_inside(policy))
    pairs = PairedRollouts(rollouts, remarks=tuple(remarks))
    for one, other in itertools.combinations(policies, 2):
        if policies[one] is policies[other] and each.get(one) == each.get(other):
            check_equal(one, other, rollouts)
    if lost:
        lost.partial = pairs
        raise lost
    return pairs


def _played_by_each(call: tuple[Any, Options, Any, Any], part: range) -> dict[str, Rollout]:
    """Play a range of the episodes with each policy."""
    envs, options, policies, outputs = call
    check_modes(policies)
    patches = {name: patches_inside(policy) for name, policy in policies.items()}
    refuse_shared_state(patches.items())
    rollouts = {}
    with opened(envs) as vector:
        refuse_environments_by_rows([patch for own in patches.values() for patch in own], vector)
        shared = SharedState(
            {name: [policy, *functions_of(patches[name])] for name, policy in policies.items()}, vector
        )
        for name, policy in policies.items():
            own = options._replace(outputs=outputs.get(name))
            run = functools.partial(play, policy, vector, own, part, label=name)
            rollouts[name] = shared.checked(f"of {name!r}", run, run)
    return rollouts
