"""Read a policy's decision: a distribution over actions, or the actions themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.nn.functional import pad

from ..errors import ChanpatchError, DistributionError, RolloutError
from ..metrics.outputs import categorical, described, distribution_in, no_distribution, tensor_in
from .stable_baselines import fit, fit_of_distribution, is_sb3_policy

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

Outputs: TypeAlias = Literal["logits", "values", "actions"]
Masks: TypeAlias = Callable[["VectorEnv[Any, Any, Any]", dict[str, Any]], Any]


class Decision(NamedTuple):
    """A distribution over actions or the actions themselves, and optionally a function that maps actions to a Box.

    If the policy returned action values, `values` contains them.
    """

    choice: Distribution | Tensor
    fitted: Callable[[NDArray[Any], Any], NDArray[Any]] | None = None
    values: Tensor | None = None


def action_distribution(
    policy: Callable[..., Any], observations: Any, *, outputs: Outputs | None = None
) -> Distribution:
    """Return a policy's distribution over actions for a batch of observations.

    The policy may return a distribution, a tuple that contains one, or a dict or object with `logits` or a
    distribution; or a list of Categoricals, for the parts of a MultiDiscrete action, which are padded to
    `(row, part, choice)`. Stable-Baselines3 policies, and others with a `get_distribution` method, are also supported.

    Args:
        policy: Module or function of observations.
        observations: Input to the policy.
        outputs: Meaning of a tensor that the policy returns, alone or in a pair `(tensor, value)`: `"logits"`, or
            `"values"`, which select the action with the highest value. Rollouts also accept `"actions"`.

    Raises:
        DistributionError: If the output contains no distribution, or is a tensor and `outputs` is None.
    """
    check_outputs(outputs)
    choice = decision_in(output_of(policy, observations, outputs), type(policy).__name__, outputs).choice
    if isinstance(choice, Tensor):
        raise DistributionError(
            f"{type(policy).__name__} returns actions, not a distribution. Pass a function that returns their logits "
            'or values instead, such as policy.q_net with outputs="values".'
        )
    return choice


def check_outputs(outputs: Any) -> None:
    """Raise DistributionError unless `outputs` is None or one of the accepted strings."""
    if outputs is not None and outputs not in get_args(Outputs):
        raise DistributionError(f'outputs must be "logits", "values" or "actions"; got {outputs!r}.')


def output_of(policy: Callable[..., Any], observations: Any, outputs: Outputs | None = None) -> Any:
    """Return the output of a policy, or the distribution or decision of a Stable-Baselines3 policy."""
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
            f"{type(policy).__name__} has no forward(). Pass rollout() or action_distribution() a function that "
            "returns its logits or distribution, such as lambda observations: agent.actor(observations). Pass "
            "rollout_sweep() a module whose forward() does that."
        ) from error


def _output_of_sb3(policy: Any, observations: Any) -> Any:
    """Return the distribution of a policy without `get_distribution`, or the actions that `predict` postprocesses."""
    actor = getattr(policy, "actor", policy)
    if not hasattr(actor, "get_action_dist_params"):
        return Decision(policy._predict(observations, deterministic=True), fit(squashed=policy.squash_output))
    mean, log_std, more = actor.get_action_dist_params(observations)
    return actor.action_dist.proba_distribution(mean, log_std, **more)


def decision_in(output: Any, subject: str, outputs: Outputs | None, masks: NDArray[np.bool_] | None = None) -> Decision:
    """Return the decision in a policy's output; `subject` is the policy's name in error messages.

    `masks` has axes `(row, action)` and is True for allowed actions.
    """
    try:
        return _decision_in(output, subject, outputs, masks)
    except ValueError as fault:
        if isinstance(fault, ChanpatchError):
            raise
        raise DistributionError(
            f"{subject} returned {described(output)} with NaN, so there is no distribution over actions. Find the "
            "first activation with NaN: recording(...)."
        ) from fault


def _decision_in(output: Any, subject: str, outputs: Outputs | None, masks: NDArray[np.bool_] | None) -> Decision:
    if isinstance(output, Decision):
        decision = output
    elif (found := _joined(output) or distribution_in(output)) is not None:
        if outputs in ("values", "actions"):
            raise DistributionError(
                f"{subject} returned {described(output)}, which contains a distribution, but outputs={outputs!r} only "
                "applies to tensors. Omit outputs, or for several policies pass a dict that omits this one."
            )
        decision = Decision(found, fit_of_distribution(output))
    else:
        choice = _of_tensor(output, subject, outputs, masks)
        return Decision(choice, values=tensor_in(output) if outputs == "values" else None)
    if masks is None:
        return decision
    if not isinstance(decision.choice, Categorical):
        raise RolloutError(
            f"masks only apply to a Categorical, but {subject} returned a {type(decision.choice).__name__}. Pass a "
            "function that returns logits or values."
        )
    return Decision(Categorical(logits=_masked(decision.choice.logits, masks)))


def _joined(output: Any) -> Categorical | None:
    """Return the distributions for the parts of a MultiDiscrete action as one `(row, part, choice)`, else None."""
    parts = getattr(output, "distribution", output)
    if (
        not isinstance(parts, (list, tuple))
        or len(parts) < 2
        or not all(isinstance(each, Categorical) for each in parts)
    ):
        return None
    most = max(each.logits.shape[-1] for each in parts)
    padded = [pad(each.logits, (0, most - each.logits.shape[-1]), value=-torch.inf) for each in parts]
    return Categorical(logits=torch.stack(padded, 1))


def _of_tensor(
    output: Any, subject: str, outputs: Outputs | None, masks: NDArray[np.bool_] | None
) -> Distribution | Tensor:
    tensor = tensor_in(output, 1 if outputs == "actions" else 2)
    if not isinstance(tensor, Tensor):
        example = ": lambda observations: policy(observations)[0]" if isinstance(output, (tuple, list)) else ""
        raise no_distribution(output, f"{subject} returned", f"Pass a function that selects it{example}.")
    if outputs is None:
        raise DistributionError(
            f"{subject} returned {described(output)}, which may contain logits, values or actions. Specify "
            'outputs="logits", outputs="values" (selects the action with the highest value) or outputs="actions".'
        )
    if outputs == "actions":
        if masks is not None:
            raise RolloutError('masks cannot be applied with outputs="actions". Return logits or values instead.')
        return tensor
    found = categorical(tensor)
    if found is None:
        raise DistributionError(
            f"{subject} returned {described(output)}, but outputs={outputs!r} requires a float tensor (row, action)."
        )
    allowed = tensor if masks is None else _masked(tensor, masks)
    if outputs == "values":
        return Categorical(logits=torch.full_like(tensor, -torch.inf).scatter(-1, allowed.argmax(-1, keepdim=True), 0))
    return found if masks is None else Categorical(logits=allowed)


def _masked(logits: Tensor, masks: NDArray[np.bool_]) -> Tensor:
    if masks.shape != logits.shape:
        raise RolloutError(
            f"masks returned shape {masks.shape} for the running episodes, but the policy's logits or values have "
            f"shape {tuple(logits.shape)}. Return one bool per environment and action."
        )
    if not masks.any(axis=-1).all():
        raise RolloutError("masks allows no action in at least one environment. Return True for allowed actions.")
    return logits.masked_fill(~torch.from_numpy(masks).to(logits.device), -torch.inf)


def allowed_actions(masks: Masks | None, envs: VectorEnv[Any, Any, Any], infos: dict[str, Any]) -> Any:
    """Return the bool mask `(environment, action)` of all sub-environments, or None if there are no masks."""
    if masks is None:
        return None
    found = np.array(masks(envs, infos))
    if found.shape[:1] != (envs.num_envs,):
        raise RolloutError(
            f"masks returned shape {found.shape} for {envs.num_envs} environments. Return a row for each."
        )
    others = found[~np.isin(found, (0, 1))]
    if others.size:
        raise RolloutError(
            f"masks must return bools, or 0 and 1; got {others[0]} ({found.dtype}). 1 means that an action is allowed. "
            "If the numbers are added to logits (0 or -inf), return: numbers == 0."
        )
    return found.astype(np.bool_)
