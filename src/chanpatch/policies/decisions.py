"""Read the decision of any kind of policy: a distribution over actions, or actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Categorical, Distribution

from ..errors import DistributionError, RolloutError
from ..metrics.outputs import categorical, described, distribution_in, no_distribution, tensor_in
from .stable_baselines import fit, fit_of_distribution, is_sb3_policy

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

Outputs: TypeAlias = Literal["logits", "values", "actions"]
Masks: TypeAlias = Callable[["VectorEnv[Any, Any, Any]", dict[str, Any]], Any]


class Decision(NamedTuple):
    """A distribution over actions, or the actions; and a function of actions and a Box that fits them to it, if any."""

    choice: Distribution | Tensor
    fitted: Callable[[NDArray[Any], Any], NDArray[Any]] | None = None


def action_distribution(
    policy: Callable[..., Any], observations: Any, *, outputs: Outputs | None = None
) -> Distribution:
    """Return a policy's distribution over actions, for a batch of observations.

    The policy may return a distribution, a tuple that holds one, or a dict or object that has `logits` or a
    distribution. It may also be a policy of Stable-Baselines3, or have a `get_distribution` method as those do.

    Args:
        policy: Module or function of observations.
        observations: Inputs of the policy.
        outputs: Meaning of a tensor that the policy returns, alone or in a pair `(tensor, value)`: `"logits"`, or
            `"values"` of the actions, which put all probability on the highest. Rollouts also take `"actions"`.

    Raises:
        DistributionError: If the output holds no distribution, or is a tensor and `outputs` is missing.
    """
    check_outputs(outputs)
    choice = decision_in(output_of(policy, observations, outputs), type(policy).__name__, outputs).choice
    if isinstance(choice, Tensor):
        raise DistributionError(
            f"{type(policy).__name__} gives actions, which have no distribution. Give the function that gives their "
            'logits or values instead, such as policy.q_net with outputs="values".'
        )
    return choice


def check_outputs(outputs: Any) -> None:
    """Raise DistributionError for anything but the name of a kind of outputs, or None."""
    if outputs is not None and outputs not in get_args(Outputs):
        raise DistributionError(
            f'outputs is {outputs!r}, but it names the meaning of tensors: "logits", "values" or "actions".'
        )


def output_of(policy: Callable[..., Any], observations: Any, outputs: Outputs | None = None) -> Any:
    """Return the output of a policy; of one of Stable-Baselines3, its distribution or its decision."""
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
            f"{type(policy).__name__} has no forward. Give rollout() or action_distribution() the function that "
            "gives its logits or distribution, such as lambda observations: agent.actor(observations); give "
            "rollout_sweep() a module whose forward does that."
        ) from error


def _output_of_sb3(policy: Any, observations: Any) -> Any:
    """Return the distribution of a policy without `get_distribution`, or the actions that its `predict` begins with."""
    actor = getattr(policy, "actor", policy)
    if not hasattr(actor, "get_action_dist_params"):
        return Decision(policy._predict(observations, deterministic=True), fit(squashed=policy.squash_output))
    mean, log_std, more = actor.get_action_dist_params(observations)
    return actor.action_dist.proba_distribution(mean, log_std, **more)


def decision_in(output: Any, subject: str, outputs: Outputs | None, masks: NDArray[np.bool_] | None = None) -> Decision:
    """Return the decision that an output holds; `subject` is the policy's name in messages.

    `masks` is `(row, action)`, True for the actions that are allowed.
    """
    if isinstance(output, Decision):
        decision = output
    elif (found := distribution_in(output)) is not None:  # a ValueError about NaN goes on: see PatchedPolicy
        if outputs in ("values", "actions"):
            raise DistributionError(
                f"{subject} returned {described(output)}, which holds a distribution, but outputs={outputs!r} is for "
                "tensors. Leave outputs out; for several policies, give it by name."
            )
        decision = Decision(found, fit_of_distribution(output))
    else:
        return Decision(_of_tensor(output, subject, outputs, masks))
    if masks is None:
        return decision
    if not isinstance(decision.choice, Categorical):
        raise RolloutError(
            f"masks leave out actions of a Categorical, but {subject} gives a {type(decision.choice).__name__}. Give "
            "the function that gives its logits, or its values."
        )
    return Decision(Categorical(logits=_masked(decision.choice.logits, masks)))


def _of_tensor(
    output: Any, subject: str, outputs: Outputs | None, masks: NDArray[np.bool_] | None
) -> Distribution | Tensor:
    tensor = output if outputs == "actions" else tensor_in(output)
    if not isinstance(tensor, Tensor):
        example = ": lambda observations: policy(observations)[0]" if isinstance(output, (tuple, list)) else ""
        raise no_distribution(output, f"{subject} returned", f"Pass a function that selects it{example}.")
    if outputs is None:
        raise DistributionError(
            f"{subject} returned {described(output)}. A tensor may hold logits, values or actions. Name its meaning: "
            'outputs="logits", outputs="values" (the action with the highest is taken) or outputs="actions".'
        )
    if outputs == "actions":
        if masks is not None:
            raise RolloutError('masks leave out actions of a distribution, and outputs="actions" gives none.')
        return tensor
    found = categorical(tensor)
    if found is None:
        raise DistributionError(
            f"{subject} returned {described(output)}, but outputs={outputs!r} needs a float tensor (row, action)."
        )
    allowed = tensor if masks is None else _masked(tensor, masks)
    if outputs == "values":
        return Categorical(logits=torch.full_like(tensor, -torch.inf).scatter(-1, allowed.argmax(-1, keepdim=True), 0))
    return found if masks is None else Categorical(logits=allowed)


def _masked(logits: Tensor, masks: NDArray[np.bool_]) -> Tensor:
    if masks.shape != logits.shape:
        raise RolloutError(
            f"masks gives the shape {masks.shape} for the running episodes, but the policy has logits or values of "
            f"shape {tuple(logits.shape)}. Give one bool per environment and action."
        )
    if not masks.any(axis=-1).all():
        raise RolloutError("masks leaves an environment without any action: True means that an action is allowed.")
    return logits.masked_fill(~torch.from_numpy(masks).to(logits.device), -torch.inf)


def allowed_actions(masks: Masks | None, envs: VectorEnv[Any, Any, Any], infos: dict[str, Any]) -> Any:
    """Return the masks of all sub-environments, bool `(environment, action)`; None without masks."""
    if masks is None:
        return None
    found = np.array(masks(envs, infos), dtype=np.bool_)
    if found.shape[:1] != (envs.num_envs,):
        raise RolloutError(f"masks gives the shape {found.shape} for {envs.num_envs} environments: give a row to each.")
    return found
