"""Rollouts of one policy, and of several policies in the same episodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RolloutError
from ..labels import refuse_shared_state
from .checks import check_modes
from .copies import patches_inside
from .decisions import Masks, Outputs
from .episodes import InitialState, Settings, play
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
    outputs: Outputs | None = None,
    masks: Masks | None = None,
    initial_state: InitialState | None = None,
    progress: bool | None = None,
) -> Rollout:
    """Play one episode per seed.

    The policy is called once per step, on the rows of the episodes that are still running. Patches get the step, the
    episodes and their sub-environments in their `context`. If the policy treats each row independently, the result
    depends neither on the number of environments nor on the other seeds. A repeated seed gives the same level with
    other draws.

    Policies of Stable-Baselines3 act as their own `predict` does: actions in a Box are clipped, or scaled if they are
    squashed, and policies without a distribution take their deterministic action. Actions of other policies are not
    clipped: for a Box space, wrap the environments in gymnasium's ClipAction.

    Random number generators, buffers and attributes of the policy, including lists, are restored at the end and before
    new episodes. To keep a log, append to a list that is not an attribute of the policy. If the policy is a function,
    the modules in its closure, its defaults and the globals that it names are restored.

    A recurrent policy is called as `policy(observations, state)` and returns `(output, new state)`. Each episode begins
    with its own state. Wrap a policy with other arguments, such as sb3-contrib's RecurrentPPO:
    `lambda seen, state: policy.get_distribution(seen, state, seen.new_zeros(len(seen)))`. A policy that keeps its
    state on itself, one row per environment, works in one environment only: rows leave the forward as episodes end.

    Args:
        policy: Module, its HookPoints or a function of observations, whose output holds an action distribution (see
            `chanpatch.policies.action_distribution`) or is a tensor. Observations are moved to the module's device, and
            to its dtype if they have floating point.
        envs: Vector environment whose `reset` takes one seed per sub-environment; any autoreset mode.
        seeds: One seed per episode, not negative, with which the episode is reset.
        max_steps: Number of steps at which an episode is cut.
        sampling_seed: Random seed of the draws behind the actions.
        greedy: Whether to take the mode of each distribution instead of a draw.
        outputs: Meaning of a tensor that the policy returns, alone or in a pair `(tensor, value)`: `"logits"`;
            `"values"` of the actions, of which the highest is taken; or `"actions"`, which are taken as they are. A
            policy that samples its actions is paired only if it returns their distribution.
        masks: Function of the environments and the infos of their last step, called before each step. It returns a bool
            for each environment and action, True if the action is allowed:
            `lambda envs, infos: np.stack(envs.call("action_masks"))` or `lambda envs, infos: infos["action_mask"]`.
        initial_state: For a recurrent policy, a function from a number of rows to their first state: a tensor, or
            tensors in tuples and dicts, such as `lambda rows: (torch.zeros(1, rows, 64), torch.zeros(1, rows, 64))` for
            an LSTM. The batch axis of each tensor is the one as long as the number of rows.
        progress: Whether to show a progress bar; by default on a terminal, after two seconds.

    Raises:
        DistributionError: If the policy returns no distribution, or one without a known inverse CDF; or a tensor, and
            `outputs` is missing.
        MissingPackageError: If gymnasium is not installed, or older than 1.1.
        RolloutError: If seeds, `max_steps`, environments, observations, states, masks or actions do not fit; or if a
            module that computes otherwise in training is in training mode in a twin but not in its policy.

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
    check_modes({"": policy})
    settings = Settings(max_steps, sampling_seed, greedy, outputs, masks, initial_state, progress)
    return play(policy, envs, seeds, settings)[0]


def paired_rollouts(  # noqa: D417  # the arguments of rollout are documented there
    policies: Mapping[str, Any],
    envs: VectorEnv[Any, Any, Any],
    seeds: Iterable[int],
    *,
    max_steps: int,
    sampling_seed: int = 0,
    greedy: bool = False,
    outputs: Outputs | Mapping[str, Outputs] | None = None,
    masks: Masks | None = None,
    initial_state: InitialState | None = None,
    progress: bool | None = None,
) -> PairedRollouts:
    """Roll out several policies, one after the other, in the same episodes and with the same draws of actions.

    Args:
        policies: Policies by name, such as `{"original": policy, "patched": PatchedPolicy(policy, patches)}`. The
            others are compared with the first.
        outputs: Meaning of tensors, as for `rollout`: one for all policies, or a mapping by name.
        envs, seeds, max_steps, sampling_seed, greedy, masks, initial_state, progress: As for `rollout`, for every
            policy.

    Raises:
        ChanpatchError: As for `rollout`; if there is no policy; if a module that computes otherwise in training is in
            training mode in one of the policies only; if two policies share a callable object as edit or `where`; or if
            an episode of two policies differs before their actions do, as the seed does not decide it.

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
    check_modes(policies)
    each = outputs if isinstance(outputs, Mapping) else dict.fromkeys(policies, outputs)
    if stray := each.keys() - policies.keys():
        raise RolloutError(f"outputs names {min(stray)!r}, but the policies are {', '.join(map(repr, policies))}.")
    settings = Settings(max_steps, sampling_seed, greedy, None, masks, initial_state, progress)
    seeds = [*seeds] if isinstance(seeds, Iterable) else seeds  # an iterator would be exhausted by the first policy
    refuse_shared_state([(name, patches_inside(policy)) for name, policy in policies.items()])
    return PairedRollouts(
        {
            name: play(policy, envs, seeds, settings._replace(outputs=each.get(name)), label=name)[0]
            for name, policy in policies.items()
        }
    )
