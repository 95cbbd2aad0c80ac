"""Find the distribution, logits and value in a policy's output."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, OneHotCategorical, TanhTransform, TransformedDistribution

from ..engine.paths import inside_vmap
from ..errors import DistributionError, MetricError

Actions: TypeAlias = "int | Sequence[int] | Tensor"


def distribution_in(output: Any) -> Distribution | None:
    """Find the action distribution in an output.

    The action distribution is the output itself, the only distribution that the output contains, or the distribution
    defined by the logits in a field named `logits`. Return None if there is no distribution, or if there are several.
    """
    if isinstance(output, Distribution):
        return output
    if isinstance(output, Mapping):
        held = [value for value in output.values() if isinstance(value, Distribution)]
        return held[0] if len(held) == 1 else _named(output["logits"]) if "logits" in output else None
    for name in ("distribution", "logits"):
        if (found := _named(getattr(output, name, None))) is not None:
            return TransformedDistribution(found, TanhTransform()) if is_squashed(output) else found
    if isinstance(output, (tuple, list)) and output:
        held = [value for value in output if isinstance(value, Distribution)]
        return held[0] if len(held) == 1 else None if held else distribution_in(output[0])
    return None


def _named(found: Any) -> Distribution | None:
    """Return `found` if it is a distribution, `Categorical(logits=found)` if `found` is a tensor, otherwise None."""
    return categorical(found) if isinstance(found, Tensor) else found if isinstance(found, Distribution) else None


def tensor_in(output: Any, least_axes: int = 2) -> Tensor | None:
    """Return `output` if it is a tensor, the first entry if `output` is a pair `(logits, value)`, otherwise None.

    The first entry of a pair must have at least `least_axes` axes; otherwise, the result is None.
    """
    if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(item, Tensor) for item in output):
        first, value = output
        is_value = value.is_floating_point() and value.shape in (first.shape[:1], (*first.shape[:1], 1))
        return first if first.dim() >= least_axes and is_value else None
    return output if isinstance(output, Tensor) else None


def categorical(logits: Tensor) -> Categorical | None:
    """Return the distribution with the given logits, or None if `logits` is not a float tensor with at least one axis.

    Raise DistributionError if there is only one logit per distribution.
    """
    if not logits.is_floating_point() or not logits.dim():
        return None
    if logits.shape[-1] == 1:
        raise DistributionError(
            f"A tensor of shape {tuple(logits.shape)} contains only one logit per input, so the probability of that "
            "action is always 1. If this is the logit of the second of two actions, return "
            "torch.distributions.Bernoulli(logits=...) from the model."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # log_softmax in half precision is inexact
    # Logits inside vmap and empty logits cannot be validated. Pass validate_args explicitly, because the first
    # torch.compile in a process changes the default.
    return Categorical(logits=logits, validate_args=bool(logits.numel()) and not inside_vmap(logits))


def is_squashed(output: Any) -> bool:
    """Return whether Stable-Baselines3 applies a tanh to samples from the output's distribution."""
    return getattr(output, "bijector", None) is not None or type(output).__name__.startswith("Squashed")


def no_distribution(output: Any, subject: str, advice: str) -> DistributionError:
    """Return the error to raise for an output without a distribution.

    The error's message starts with `subject` and ends with `advice`.
    """
    return DistributionError(
        f"{subject} {described(output)}, which contains no action distribution. Expected logits of shape (batch, "
        f"action), a torch.distributions object, a tuple with such an object, a pair (logits, value), or a dict with "
        f"the key 'logits'. {advice}"
    )


def distribution_of(output: Any) -> Distribution:
    """Return the action distribution in an output or, if the output contains logits, the distribution they define.

    Raise DistributionError or MetricError if there is no distribution, or if there are several.
    """
    try:
        found = distribution_in(output)
        if found is None and (logits := tensor_in(output)) is not None:
            found = categorical(logits)
    except ValueError as fault:
        raise DistributionError(
            f"The output is {described(output)} with NaN logits. Find the first NaN activation with recording(...). A "
            "patch may have set values that are too large for later layers."
        ) from fault
    if found is None and isinstance(output, (tuple, list)):
        raise MetricError(
            f"The output is {described(output)}. A metric accepts a tuple that contains one distribution, or a pair "
            "(logits, value) whose value has shape (batch,) or (batch, 1). Select the logits: lambda output: "
            "metric(output[0])."
        )
    if found is None:
        raise no_distribution(output, "The output is", "Use a metric that selects one of these from the output.")
    return found


def is_categorical(found: Distribution) -> bool:
    """Return whether a distribution is over discrete actions and has logits."""
    return isinstance(found, (Categorical, OneHotCategorical))


def logits_of(output: Any) -> Tensor:
    """Return an output's normalized logits, with shape `(..., action)`; raise DistributionError if it has no logits."""
    found = distribution_of(output)
    if not is_categorical(found):
        raise DistributionError(
            f"The output's distribution is {type(found).__name__}, but this metric needs a Categorical or "
            "OneHotCategorical. For other distributions, use kl_divergence or entropy."
        )
    logits: Tensor = found.logits  # type: ignore[attr-defined]
    return logits


class Choice:
    """Compute the logit of one action, of a set of actions treated as one, or of one action per input (a tensor).

    The logit of a set is the log-sum-exp of its actions' logits, as in `logit_difference`. If the actions are invalid,
    or the logits lack an action, this class raises a MetricError that refers to the actions as `name`.
    """

    def __init__(self, name: str, actions: Actions) -> None:
        self.name = name
        self.per_input = isinstance(actions, Tensor) and actions.dim() == 1
        each: Any = actions if isinstance(actions, Sequence) or self.per_input else [actions]
        try:
            if any(isinstance(action, bool) or getattr(action, "dtype", None) == torch.bool for action in each):
                raise TypeError("a mask is not an action")
            numbers = [operator.index(action) for action in each]
        except TypeError:
            raise MetricError(
                f"{name} must be an action (an int), a sequence of actions to treat as a single action, or an int64 "
                f"tensor of shape (batch,) with one action per input; got {shown(actions)}."
            ) from None
        if not numbers or min(numbers) < 0:
            raise MetricError(
                f"{name} must contain at least one action and no negative numbers; got {shown(actions)}. Actions are "
                "numbered from 0."
            )
        if not self.per_input and len(set(numbers)) < len(numbers):
            raise MetricError(f"{name} is {actions}, which contains an action twice. List each action once.")
        self._numbers, self._highest = torch.tensor(numbers), max(numbers)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logit of the chosen actions, with shape `(batch,)`, from logits with shape `(batch, action)`."""
        count = logits.shape[-1]
        if self._highest >= count:
            raise MetricError(
                f"{self.name} includes action {self._highest}, but the output has actions 0 to {count - 1}."
            )
        numbers = self._numbers.to(logits.device)
        if not self.per_input:
            return logits.index_select(-1, numbers).logsumexp(-1)
        if len(numbers) != len(logits):
            raise MetricError(
                f"{self.name} has one action for each of {len(numbers)} inputs, but the output has logits for "
                f"{len(logits)} inputs. Pass one action per input, or a list of actions to treat as a single action."
            )
        return logits.gather(-1, numbers.unsqueeze(-1)).squeeze(-1)


def value_candidates(output: Any) -> list[Tensor]:
    """Return the tensors in an output that have shape `(batch,)` or `(batch, 1)` and could be the value estimate."""
    names = ("value", "values")
    entries = output if isinstance(output, Mapping) else {name: getattr(output, name, None) for name in names}
    found: Sequence[Any] = [output] if isinstance(output, Tensor) else [entries.get(name) for name in names]
    if isinstance(output, (tuple, list)) and not any(isinstance(item, Tensor) for item in found):
        found = output if any(isinstance(item, Distribution) for item in output) else output[1:]
    tensors = [item for item in found if isinstance(item, Tensor) and item.is_floating_point()]
    return [tensor for tensor in tensors if tensor.dim() == 1 or (tensor.dim() == 2 and tensor.shape[1] == 1)]


def described(output: Any) -> str:
    """Describe an output briefly, for error messages."""
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a dict of {', '.join(map(repr, output))}"
    if isinstance(output, (tuple, list)):
        return f"({', '.join(type(item).__name__ for item in output)})"
    return type(output).__name__


def shown(argument: Any) -> str:
    """Return an argument's repr or, if the argument is a tensor with at least one axis, its dtype and shape."""
    return described(argument) if isinstance(argument, Tensor) and argument.dim() else repr(argument)
