"""Metrics for policies and classifiers: functions that map an output to one number per input.

The metrics accept logits with shape `(batch, action)`, `torch.distributions` objects, pairs `(logits, value)` in which
the value has shape `(batch,)` or `(batch, 1)`, Stable-Baselines3 distributions, and tuples, dicts and objects that
contain one distribution. Each metric returns a tensor with shape `(batch,)`. For sequence logits with shape
`(batch, position, action)`, use `at_position`. All metrics except `action_flip` are differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, kl

from ..errors import DistributionError, MetricError
from .measured import Metric, compares
from .outputs import Actions, Choice, described, distribution_of, is_categorical, logits_of, shown, value_candidates


def logit_difference(correct: Actions, incorrect: Actions) -> Metric:
    """Return a metric: the logit of `correct` minus the logit of `incorrect` (the log odds).

    The logit of a set of actions is the log-sum-exp of the actions' logits, so the difference between two sets is the
    log ratio of the sets' probabilities.

    Args:
        correct: An action, a sequence of actions to treat as a single action, or an int64 tensor of shape `(batch,)`
            with one action per input.
        incorrect: The action or actions to compare with, in the same format as `correct`.

    Raises:
        MetricError: If the actions are invalid. The returned metric raises MetricError if the logits lack one of the
            actions or do not have shape `(batch, action)`.

    Example:
        >>> logit_difference(0, 2)(torch.tensor([[3.0, 0.0, 1.0]]))
        tensor([2.])

    References:
        Wang et al. 2023, "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small".
    """
    return _metric("logit_difference", _difference, Choice("correct", correct), Choice("incorrect", incorrect))


def log_probability(actions: Actions) -> Metric:
    """Return a metric: the log probability, in nats, of an action or of a set of actions combined.

    Arguments and errors are the same as for `logit_difference`.

    Example:
        >>> log_probability([0, 1])(torch.zeros(1, 4)).exp()
        tensor([0.5000])
    """
    return _metric("log_probability", _log_probability, Choice("actions", actions))


def action_probability(actions: Actions) -> Metric:
    """Return a metric: the probability of an action, or the total probability of a set of actions.

    Arguments and errors are the same as for `logit_difference`.

    Example:
        >>> action_probability([0, 1, 2])(torch.zeros(1, 4))
        tensor([0.7500])
    """
    return _metric("action_probability", _probability, Choice("actions", actions))


def kl_divergence(output: Any, *, baseline: Any) -> Tensor:
    """Return the Kullback-Leibler divergence `KL(baseline || output)` between action distributions, in nats.

    The divergence is infinite if the output gives probability 0 to an action that is possible under the baseline. For
    continuous actions, the divergence is summed over action dimensions.

    Args:
        output: Output of the patched model.
        baseline: Output of the unpatched model on the same inputs.

    Raises:
        DistributionError: If an output contains no distribution, or torch has no formula for the divergence.
        MetricError: If the two outputs have different shapes, or logits do not have shape `(batch, action)`.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), baseline=torch.tensor([[100.0, 0.0]]))
        tensor([0.6931])
    """
    found, reference = distribution_of(output), distribution_of(baseline)
    if is_categorical(found) and is_categorical(reference):
        ours, theirs = _compared(output, baseline)
        return _expected(theirs.exp(), theirs - ours)
    _check_same_shape(found.batch_shape + found.event_shape, reference.batch_shape + reference.event_shape)
    return _summed(found, "KL divergence", lambda: kl.kl_divergence(reference, found))


def total_variation(output: Any, *, baseline: Any) -> Tensor:
    """Return the total variation distance between action distributions: 0 if equal, 1 if disjoint.

    The distance is half the sum of the absolute differences in probability. Arguments are the same as for
    `kl_divergence`.

    Raises:
        DistributionError: If either output has no logits.
        MetricError: Same as for `kl_divergence`.

    Example:
        >>> total_variation(torch.tensor([[0.0, 0.0]]), baseline=torch.tensor([[100.0, 0.0]]))
        tensor([0.5000])
    """
    ours, theirs = _compared(output, baseline)
    return (ours.exp() - theirs.exp()).abs().sum(-1) / 2


def action_flip(output: Any, *, baseline: Any) -> Tensor:
    """Return 1 for each input on which the most probable actions of output and baseline differ, otherwise 0.

    The mean is the flip rate. If several actions are equally probable, the first of these actions counts as the most
    probable. Arguments and errors are the same as for `total_variation`.

    Example:
        >>> action_flip(torch.eye(2), baseline=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([0., 1.])
    """
    ours, theirs = _compared(output, baseline)
    return (ours.argmax(-1) != theirs.argmax(-1)).to(ours.dtype)


def entropy(output: Any) -> Tensor:
    """Return the entropy of the output's distribution in nats, summed over the dimensions of a continuous action.

    Raises:
        DistributionError: If the output contains no distribution, or torch has no entropy formula for the distribution.
        MetricError: If the output has logits whose shape is not `(batch, action)`.

    Example:
        >>> entropy(torch.zeros(1, 2))
        tensor([0.6931])
    """
    found = distribution_of(output)
    if not is_categorical(found):
        return _summed(found, "entropy", found.entropy)
    logs = _log_probabilities(output)
    return _expected(logs.exp(), -logs)


def value(output: Any) -> Tensor:
    """Return a policy's value estimate.

    In a dict or an object, the value is the entry or attribute named `value` or `values`. An output tensor with shape
    `(batch,)` or `(batch, 1)` is itself the value. In a tuple, the value is the only tensor with one of these shapes
    after the logits or the distribution.

    Raises:
        MetricError: If no tensor or more than one tensor could be the value.

    Example:
        >>> value((torch.zeros(2, 4), torch.tensor([[0.5], [0.25]])))
        tensor([0.5000, 0.2500])
    """
    candidates = value_candidates(output)
    if len(candidates) != 1:
        raise MetricError(
            f"The output, {described(output)}, contains {len(candidates)} tensors of shape (batch,) or (batch, 1) that "
            "could be the value, but must contain exactly one. Use a metric that selects the value: lambda output: "
            "output[1]."
        )
    return candidates[0].reshape(-1)


def at_position(metric: Metric, position: int | Tensor) -> Metric:
    """Return a metric that applies `metric` at one position of logits with shape `(batch, position, action)`.

    Args:
        metric: Metric for logits with shape `(batch, action)`. If the metric uses a baseline, the same position is
            selected from the baseline.
        position: Position in every sequence, such as -1 for the last position, or an int64 tensor of shape `(batch,)`
            with one position per input, such as `lengths - 1` for padded sequences.

    Raises:
        MetricError: If the position is invalid. The returned metric raises MetricError if the logits have no position
            axis or no such position.

    Example:
        >>> logits = torch.zeros(2, 5, 4)
        >>> lengths = torch.tensor([5, 3])
        >>> at_position(action_probability(1), lengths - 1)(logits)
        tensor([0.2500, 0.2500])
    """
    numbers = position.tolist() if isinstance(position, Tensor) else [position]
    if not numbers or not all(type(number) is int for number in numbers):
        raise MetricError(f"position must be an int or an int64 tensor of shape (batch,); got {shown(position)}.")
    # update_wrapper keeps the signature, in which compares() looks for `baseline`.
    return functools.update_wrapper(functools.partial(_there, metric, position, numbers), metric)


def normalized_effect(metric: Metric, clean: Any, corrupted: Any) -> Metric:
    """Return a rescaled metric whose mean is 0 on the corrupted run and 1 on the clean run.

    On a corrupted run with a patch, the mean is the fraction of the difference between the clean and the corrupted run
    that the patch restores.

    Args:
        metric: Metric without a `baseline` parameter.
        clean: Output of the model on the clean inputs.
        corrupted: Output of the model on the corrupted inputs.

    Raises:
        MetricError: If the metric has equal means on both runs, or has a `baseline` parameter.

    Example:
        >>> clean, corrupted = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> restored = normalized_effect(logit_difference(0, 1), clean, corrupted)
        >>> restored(torch.tensor([[3.0, 0.0]]))
        tensor([0.7500])

    References:
        Zhang and Nanda 2024, "Towards best practices of activation patching in language models: metrics and methods".
    """
    if compares(metric):
        raise MetricError(
            "normalized_effect() needs a metric without a `baseline` parameter, but this metric has one. Use this "
            "metric directly: it is already 0 if the output equals the baseline."
        )
    one, zero = metric(clean).detach().mean(), metric(corrupted).detach().mean()
    if torch.isclose(one, zero, atol=0.0):
        raise MetricError(
            f"The metric's mean is {one:.6g} on the clean run and {zero:.6g} on the corrupted run, so there is no "
            "difference to normalize by. Choose different inputs or a different metric."
        )
    return _metric("normalized_effect", _normalized, metric, zero, one)


def _metric(name: str, compute: Callable[..., Tensor], *settings: Any) -> Metric:
    """Return the metric `compute(*settings, output)`, which can be pickled. `name` becomes the metric's name."""
    metric = functools.partial(compute, *settings)
    vars(metric)["__name__"] = name
    return metric


def _difference(correct: Choice, incorrect: Choice, output: Any) -> Tensor:
    logits = _log_probabilities(output)
    return correct(logits) - incorrect(logits)


def _log_probability(chosen: Choice, output: Any) -> Tensor:
    return chosen(_log_probabilities(output))


def _probability(chosen: Choice, output: Any) -> Tensor:
    return chosen(_log_probabilities(output)).exp()


def _normalized(metric: Metric, zero: Tensor, one: Tensor, output: Any) -> Tensor:
    return (metric(output) - zero) / (one - zero)


def _there(metric: Metric, position: int | Tensor, numbers: Sequence[int], output: Any, **baseline: Any) -> Tensor:
    """Apply a metric at one position of an output and, if the metric uses a baseline, of the baseline."""

    def selected(output: Any) -> Tensor:
        logits = logits_of(output)
        if logits.dim() != 3:
            raise MetricError(
                f"The logits in the output have shape {tuple(logits.shape)}, but must have axes (batch, position, "
                "action)."
            )
        inputs, length, _ = logits.shape
        if not -length <= min(numbers) <= max(numbers) < length:
            raise MetricError(
                f"position must be between {-length} and {length - 1}, because the sequences have length {length}; "
                f"got {shown(position)}."
            )
        if isinstance(position, int):
            return logits[:, position]
        if len(numbers) != inputs:
            raise MetricError(f"position must contain one position for each of {inputs} inputs; got {len(numbers)}.")
        return logits[torch.arange(inputs, device=logits.device), position.to(logits.device)]

    return metric(selected(output), **{name: selected(other) for name, other in baseline.items()})


def _log_probabilities(output: Any) -> Tensor:
    """Return the output's normalized logits; raise MetricError if the logits do not have shape `(batch, action)`."""
    logits = logits_of(output)
    if logits.dim() != 2:
        last = "Use at_position(metric, -1) for the last position."
        advice = last if logits.dim() == 3 else "Reshape the logits to (batch, action)."
        raise MetricError(
            f"The output has logits of shape {tuple(logits.shape)}, but this metric needs shape (batch, action). "
            f"{advice}"
        )
    return logits


def _compared(output: Any, baseline: Any) -> tuple[Tensor, Tensor]:
    ours, theirs = _log_probabilities(output), _log_probabilities(baseline)
    _check_same_shape(ours.shape, theirs.shape)
    return ours, theirs


def _check_same_shape(ours: Sequence[int], theirs: Sequence[int]) -> None:
    if tuple(ours) != tuple(theirs):
        raise MetricError(
            f"The output has shape {tuple(ours)}, but the baseline has shape {tuple(theirs)}. Compare outputs for the "
            "same inputs."
        )


def _expected(probabilities: Tensor, quantity: Tensor) -> Tensor:
    """Return the mean of `quantity`, weighted by action probabilities. Impossible actions contribute 0, never NaN."""
    return (torch.where(probabilities > 0, quantity, 0.0) * probabilities).sum(-1)


def _summed(found: Distribution, what: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return `compute()`, the KL divergence or entropy of the distribution `found`, summed over action dimensions.

    If torch has no formula for `found`, raise DistributionError; `what` names the quantity in the error message.
    """
    try:
        result = compute()
    except NotImplementedError:
        raise DistributionError(
            f"torch.distributions has no formula for the {what} of {type(found).__name__}. Estimate the {what} from "
            "samples."
        ) from None
    return result.flatten(1).sum(-1) if result.dim() > 1 else result
