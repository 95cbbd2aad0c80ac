"""Interpret the output of a policy as a distribution over actions, or as the actions themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution
from torch.nn.functional import pad

from ..errors import ChanpatchError, DistributionError, RolloutError
from ..metrics.outputs import categorical, described, distribution_in, no_distribution, tensor_in
from ..registry.points import HookPoints
from ..results import imported
from .stable_baselines import box_mapping, clipped, is_sb3_policy, owner_of, policy_of, rescaled

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

Outputs: TypeAlias = Literal["logits", "values", "actions"]
Masks: TypeAlias = Callable[["VectorEnv[Any, Any, Any]", dict[str, Any]], Any]


class Decision(NamedTuple):
    """A policy's decision for a batch of observations.

    Attributes:
        choice: Distribution over actions; or the actions themselves, if the policy returned actions.
        to_box: Function that receives actions and a Box, and clips or rescales the actions as Stable-Baselines3 does;
            None if the actions are used unchanged.
        values: Values of all actions, with shape `(row, action)`, or None if the policy did not return values.
    """

    choice: Distribution | Tensor
    to_box: Callable[[NDArray[Any], Any], NDArray[Any]] | None = None
    values: Tensor | None = None


def action_distribution(
    policy: Callable[..., Any] | HookPoints, observations: Any, *, outputs: Outputs | None = None
) -> Distribution:
    """Return a policy's distribution over actions for a batch of observations.

    The policy may return a distribution, a tuple that contains a distribution, or a dict or object that contains
    `logits` or a distribution. For a MultiDiscrete action, the policy may return a list with one Categorical per part.
    The logits of all parts are then padded and stacked, with shape `(row, part, choice)`. Policies with a
    `get_distribution` method, and all Stable-Baselines3 policies, are also supported.

    Args:
        policy: Module, HookPoints, Stable-Baselines3 model, or function that accepts a batch of observations.
        observations: Batch of observations.
        outputs: Meaning of a tensor that the policy returns, alone or in a pair `(tensor, value)`: `"logits"`; or
            `"values"`, to select the action with the highest value. Rollouts also accept `"actions"`.

    Raises:
        DistributionError: If the policy's output does not define a distribution, or if the output is a tensor and
            `outputs` is None.
    """
    check_outputs(outputs)
    called = policy_of(policy)
    if isinstance(called, HookPoints):
        called = method_of(called.model, called)
    name = type(owner_of(called)).__name__
    choice = decision_in(output_of(called, observations, outputs), name, outputs).choice
    if isinstance(choice, Tensor):
        raise DistributionError(
            f"{name} returns actions, not a distribution. Pass a function that returns logits or "
            'action values instead, such as policy.q_net with outputs="values".'
        )
    return choice


def method_of(model: nn.Module, points_or_model: HookPoints | nn.Module) -> Any:
    """Return the method of `model` that has the name of the traced method. For `__call__`, return `model` itself."""
    method = points_or_model.method if isinstance(points_or_model, HookPoints) else "__call__"
    return model if method == "__call__" else getattr(model, method)


def check_outputs(outputs: Any) -> None:
    """Raise DistributionError unless `outputs` is None or one of the accepted strings."""
    if outputs is not None and outputs not in get_args(Outputs):
        raise DistributionError(f'outputs must be "logits", "values" or "actions"; got {outputs!r}.')


def output_of(policy: Callable[..., Any], observations: Any, outputs: Outputs | None = None) -> Any:
    """Run a policy and return the output. For a Stable-Baselines3 policy, the output is a distribution or a Decision.

    The outputs of all other policies are returned unchanged.
    """
    own = getattr(policy, "get_distribution", None)
    try:
        if callable(own):
            return own(observations)
        if outputs in (None, "actions") and is_sb3_policy(policy):
            return _output_of_sb3(policy, observations)
        return policy(observations)
    except NotImplementedError as error:
        if 'missing the required "forward"' not in str(error):
            raise
        raise DistributionError(
            f"{type(policy).__name__} has no forward(). For rollout() or action_distribution(), pass a function that "
            "returns the policy's logits or distribution, such as lambda observations: agent.actor(observations). For "
            "rollout_sweep(), pass a module whose forward() returns the logits or distribution."
        ) from error


def _output_of_sb3(policy: Any, observations: Any) -> Any:
    """Run a Stable-Baselines3 policy that has no `get_distribution`.

    Return the actor's distribution. If the actor has no distribution, return a Decision with the deterministic action.
    """
    actor = getattr(policy, "actor", policy)
    if not hasattr(actor, "get_action_dist_params"):
        return Decision(
            policy._predict(observations, deterministic=True), rescaled if policy.squash_output else clipped
        )
    mean, log_std, more = actor.get_action_dist_params(observations)
    return actor.action_dist.proba_distribution(mean, log_std, **more)


def decision_in(output: Any, subject: str, outputs: Outputs | None, masks: NDArray[np.bool_] | None = None) -> Decision:
    """Convert a policy's output to a Decision. `subject` is the policy's name in error messages.

    `masks` has shape `(row, action)` and is True for allowed actions. If `masks` is None, all actions are allowed.
    """
    try:
        decision = output if isinstance(output, Decision) else _decision_in(output, subject, outputs)
    except ValueError as fault:
        if isinstance(fault, ChanpatchError):
            raise
        raise DistributionError(
            f"{subject} returned {described(output)} that contains NaN, so no action can be chosen. Use recording(...) "
            "to find the first activation with NaN."
        ) from fault
    return decision if masks is None else _masked(decision, masks, subject)


def _decision_in(output: Any, subject: str, outputs: Outputs | None) -> Decision:
    if (found := _joined(output) or distribution_in(output)) is not None:
        if outputs in ("values", "actions"):
            raise DistributionError(
                f"{subject} returned {described(output)}, which contains a distribution, but outputs={outputs!r} only "
                "applies to tensors. Omit outputs. With several policies, pass outputs as a dict without this policy's "
                "name."
            )
        return Decision(found, box_mapping(output))
    output = torch.as_tensor(output) if isinstance(output, np.ndarray) else output
    tensor = tensor_in(output, 1 if outputs == "actions" else 2)
    if not isinstance(tensor, Tensor):
        example = ": lambda observations: policy(observations)[0]" if isinstance(output, (tuple, list)) else ""
        advice = f"Pass a function that selects one of these from the output{example}."
        if example and len(output) == 2:
            advice += " If the policy is recurrent, pass initial_state to the rollout."
        raise no_distribution(output, f"{subject} returned", advice)
    if outputs is None:
        raise DistributionError(
            f"{subject} returned {described(output)}, which may contain logits, values or actions. Specify "
            'outputs="logits", outputs="values" (to select the action with the highest value) or outputs="actions".'
        )
    if outputs == "actions":
        return Decision(tensor)
    if (found := categorical(tensor)) is None:
        raise DistributionError(
            f"{subject} returned {described(output)}, but outputs={outputs!r} requires a float tensor with shape "
            "(batch, action)."
        )
    return Decision(found) if outputs == "logits" else Decision(_greedy(tensor), values=tensor)


def _joined(output: Any) -> Categorical | None:
    """Join the Categoricals for the parts of a MultiDiscrete action into one Categorical.

    The joint logits have shape `(row, part, choice)`. Return None if the output is not a list of two or more
    Categoricals.
    """
    parts = getattr(output, "distributions", None) or getattr(output, "distribution", output)
    is_list = isinstance(parts, (list, tuple)) and len(parts) > 1
    if not is_list or not all(isinstance(each, Categorical) for each in parts):
        return None
    most = max(each.logits.shape[-1] for each in parts)
    padded = [pad(each.logits, (0, most - each.logits.shape[-1]), value=-torch.inf) for each in parts]
    return Categorical(logits=torch.stack(padded, 1))


def _greedy(values: Tensor) -> Categorical:
    """Return a distribution that selects the action with the highest value in each row with probability 1."""
    return Categorical(logits=torch.full_like(values, -torch.inf).scatter(-1, values.argmax(-1, keepdim=True), 0))


def _masked(decision: Decision, masks: NDArray[np.bool_], subject: str) -> Decision:
    """Return `decision` without the actions whose mask is False. `subject` is the policy's name in error messages."""
    choice, values = decision.choice, decision.values
    if not isinstance(choice, Categorical):
        returned = "actions" if isinstance(choice, Tensor) else f"a {type(choice).__name__}"
        raise RolloutError(
            f"masks can be applied only to a Categorical distribution, but {subject} returned {returned}. Pass a "
            "policy that returns logits or values."
        )
    scores = choice.logits if values is None else values
    if masks.shape != scores.shape:
        raise RolloutError(
            f"masks returned an array of shape {masks.shape} for the running episodes, but the policy's logits or "
            f"values have shape {tuple(scores.shape)}. Return one bool per environment and action."
        )
    if not masks.any(axis=-1).all():
        raise RolloutError(
            "masks returned False for all actions in at least one environment. Return True for the allowed actions."
        )
    scores = scores.masked_fill(~torch.from_numpy(masks).to(scores.device), -torch.inf)
    return Decision(Categorical(logits=scores) if values is None else _greedy(scores), values=values)


def allowed_actions(masks: Masks | None, envs: VectorEnv[Any, Any, Any], infos: dict[str, Any]) -> Any:
    """Call `masks`, and return a bool array with shape `(environment, action)`, which is True for allowed actions.

    For a MultiDiscrete or MultiBinary space, the shape is `(environment, part, choice)`. Return None if `masks` is
    None.
    """
    if masks is None:
        return None
    found = _by_part(np.array(masks(envs, infos)), envs.single_action_space)
    if found.shape[:1] != (envs.num_envs,):
        raise RolloutError(
            f"masks returned an array of shape {found.shape} for num_envs={envs.num_envs}. Return an array with one "
            "row per environment."
        )
    others = found[~np.isin(found, (0, 1))]
    if others.size:
        raise RolloutError(
            f"masks must return bools, or 1 for allowed and 0 for disallowed actions; got {others[0]} ({found.dtype}). "
            "For an additive mask (0 or -inf), return mask == 0."
        )
    return found.astype(np.bool_)


def _by_part(masks: NDArray[Any], space: Any) -> NDArray[Any]:
    """Convert masks in MaskablePPO's format for several actions to an array of shape `(row, part, choice)`.

    Return all other masks unchanged.
    """
    is_binary = isinstance(space, imported("gymnasium.spaces").MultiBinary)
    counts = np.full(space.shape, 2) if is_binary else getattr(space, "nvec", None)
    if counts is None or counts.ndim != 1 or masks.shape[1:] != (counts.sum(),):
        return masks
    parts = np.split(masks, counts.cumsum()[:-1], axis=1)
    return np.stack([np.pad(part, ((0, 0), (0, counts.max() - part.shape[1]))) for part in parts], axis=1)
