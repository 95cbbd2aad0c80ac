"""Metrics of policies and classifiers: functions of an output that return `(batch,)`.

They take logits `(batch, action)`, `torch.distributions` objects, pairs `(logits, value)` with a value `(batch,)` or
`(batch, 1)`, tuples that hold one distribution, dicts and objects that hold one, and Stable-Baselines3's distributions.
Logits of sequences, `(batch, position, action)`, need `at_position`: with padding, the last position is not that of the
last token. All but `action_flip` are differentiable.
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
    """Return the metric `logit of correct minus logit of incorrect`: the log odds between the two.

    The logit of a set of actions is the log of the sum of their exponentials, so the difference between two sets is the
    log of the ratio of their probabilities.

    Args:
        correct: Action, sequence of actions that count as one, or int64 tensor `(batch,)` with an action per input.
        incorrect: As for `correct`.

    Raises:
        MetricError: If the actions are not valid; in the call, if the output lacks them or has sequences.

    Example:
        >>> logit_difference(0, 2)(torch.tensor([[3.0, 0.0, 1.0]]))
        tensor([2.])

    References:
        Wang et al. 2023, "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small".
    """
    of_correct, of_incorrect = Choice("correct", correct), Choice("incorrect", incorrect)

    def logit_difference(output: Any) -> Tensor:  # its name is the metric's name in results
        logits = _log_probabilities(output)
        return of_correct(logits) - of_incorrect(logits)

    return logit_difference


def log_probability(actions: Actions) -> Metric:
    """Return the metric `log probability of an action, or of a set of actions together`, in nats.

    The actions and the errors are as for `logit_difference`.

    Example:
        >>> log_probability([0, 1])(torch.zeros(1, 4)).exp()
        tensor([0.5000])
    """
    chosen = Choice("actions", actions)

    def log_probability(output: Any) -> Tensor:
        return chosen(_log_probabilities(output))

    return log_probability


def action_probability(actions: Actions) -> Metric:
    """Return the metric `probability of an action, or of a set of actions together`, between 0 and 1.

    The actions and the errors are as for `logit_difference`.

    Example:
        >>> action_probability([0, 1, 2])(torch.zeros(1, 4))
        tensor([0.7500])
    """
    log_of = log_probability(actions)

    def action_probability(output: Any) -> Tensor:
        return log_of(output).exp()

    return action_probability


def kl_divergence(output: Any, *, baseline: Any) -> Tensor:
    """Return the Kullback-Leibler divergence of the output's distribution from the baseline's, in nats.

    It is the mean under the baseline of `log p_baseline - log p_output`: 0 if the two agree, infinite if the output
    excludes an action that the baseline may take. The dimensions of a continuous action are summed.

    Args:
        output: Output of the patched model.
        baseline: Output of the unpatched model on the same inputs.

    Raises:
        DistributionError: If there is no distribution, or no formula for the divergence between the two kinds.
        MetricError: If the shapes differ, or the logits are of sequences.

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), baseline=torch.tensor([[100.0, 0.0]]))
        tensor([0.6931])
    """
    found, reference = distribution_of(output), distribution_of(baseline)
    if is_categorical(found) and is_categorical(reference):
        ours, theirs = _compared(output, baseline)
        return _expected(theirs.exp(), theirs - ours)
    _check_same_shape(found.batch_shape + found.event_shape, reference.batch_shape + reference.event_shape)
    return _summed(found, "divergence from the baseline's", lambda: kl.kl_divergence(reference, found))


def total_variation(output: Any, *, baseline: Any) -> Tensor:
    """Return half the sum of the absolute differences in probability: 0 if equal, 1 if disjoint.

    The arguments are as for `kl_divergence`.

    Raises:
        DistributionError: If one of them has no logits.
        MetricError: As for `kl_divergence`.

    Example:
        >>> total_variation(torch.tensor([[0.0, 0.0]]), baseline=torch.tensor([[100.0, 0.0]]))
        tensor([0.5000])
    """
    ours, theirs = _compared(output, baseline)
    return (ours.exp() - theirs.exp()).abs().sum(-1) / 2


def action_flip(output: Any, *, baseline: Any) -> Tensor:
    """Return 1 if the most probable action differs from the baseline's, else 0. Its mean is the flip rate.

    Among equally probable actions the first one counts. The gradient is zero everywhere. Arguments and errors are as
    for `total_variation`.

    Example:
        >>> action_flip(torch.eye(2), baseline=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([0., 1.])
    """
    ours, theirs = _compared(output, baseline)
    return (ours.argmax(-1) != theirs.argmax(-1)).to(ours.dtype)


def entropy(output: Any) -> Tensor:
    """Return the entropy of the output's distribution in nats, summed over the dimensions of a continuous action.

    Raises:
        DistributionError: If there is no distribution, or no formula for its entropy.
        MetricError: If the logits are of sequences.

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
    """Return the value estimate of a policy.

    It is the entry `value` or `values` of a dict or an object; in a tuple, the only tensor `(batch,)` or `(batch, 1)`
    beside the distribution (or beside the first entry, the logits); or the output itself if it has such a shape.

    Raises:
        MetricError: If no tensor, or more than one, could be the value.

    Example:
        >>> value((torch.zeros(2, 4), torch.tensor([[0.5], [0.25]])))
        tensor([0.5000, 0.2500])
    """
    candidates = value_candidates(output)
    if len(candidates) != 1:
        raise MetricError(
            f"The output, {described(output)}, holds {len(candidates)} tensors (batch,) or (batch, 1) that could be "
            "the value. Give a metric that selects it: lambda output: output[1]."
        )
    return candidates[0].reshape(-1)


def at_position(metric: Metric, position: int | Tensor) -> Metric:
    """Return a metric of logits `(batch, position, action)` that takes one position of each sequence.

    Args:
        metric: Metric of logits `(batch, action)`. One that compares gets the baseline at the same position.
        position: Position in every sequence, -1 for the last; or an int64 tensor `(batch,)` with one position each,
            such as `lengths - 1` for padded sequences.

    Raises:
        MetricError: If the position is not valid; in the call, if the logits lack such an axis or position.

    Example:
        >>> logits = torch.zeros(2, 5, 4)
        >>> lengths = torch.tensor([5, 3])
        >>> at_position(action_probability(1), lengths - 1)(logits)
        tensor([0.2500, 0.2500])
    """
    numbers = position.tolist() if isinstance(position, Tensor) else [position]
    if not numbers or not all(type(number) is int for number in numbers):
        raise MetricError(f"position is {shown(position)}; it takes an int, or an int64 tensor (batch,).")

    def selected(output: Any) -> Tensor:
        logits = logits_of(output)
        if logits.dim() != 3:
            raise MetricError(
                f"The output has logits of shape {tuple(logits.shape)}, but at_position needs axes (batch, "
                "position, action)."
            )
        inputs, length, _ = logits.shape
        if not -length <= min(numbers) <= max(numbers) < length:
            raise MetricError(f"position is {shown(position)}, but the output has {length} (0 to {length - 1}).")
        if isinstance(position, int):
            return logits[:, position]
        if len(numbers) != inputs:
            raise MetricError(f"There are {len(numbers)} positions, but {inputs} inputs. Give one position per input.")
        return logits[torch.arange(inputs, device=logits.device), position.to(logits.device)]

    @functools.wraps(metric)  # keeps the signature, which shows whether the metric compares
    def there(output: Any, **baseline: Any) -> Tensor:
        return metric(selected(output), **{name: selected(other) for name, other in baseline.items()})

    return there


def normalized_effect(metric: Metric, clean: Any, corrupted: Any) -> Metric:
    """Return a metric rescaled so that its mean is 0 on the corrupted run and 1 on the clean run.

    It is `(metric - corrupted) / (clean - corrupted)`, with the means of the metric over these runs. Its mean over a
    patched corrupted run is the share of the effect that the patch restores.

    Args:
        metric: Metric of one output; not one that compares.
        clean: Output of the model on the clean inputs.
        corrupted: Output of the model on the corrupted inputs.

    Raises:
        MetricError: If the two means agree, or the metric compares.

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
            "normalized_effect takes a metric of one output, but this one compares with a baseline. Use it as it is: "
            "it is 0 if the output equals the baseline."
        )
    one, zero = metric(clean).detach().mean(), metric(corrupted).detach().mean()
    if torch.isclose(one, zero, atol=0.0):
        raise MetricError(
            f"The metric is {one:.6g} on the clean run and {zero:.6g} on the corrupted run, so there is no "
            "difference to normalize by. Choose other inputs or another metric."
        )

    def normalized_effect(output: Any) -> Tensor:
        return (metric(output) - zero) / (one - zero)

    return normalized_effect


def _log_probabilities(output: Any) -> Tensor:
    """Return the normalized logits, `(batch, action)`."""
    logits = logits_of(output)
    if logits.dim() != 2:
        last = "at_position(metric, -1) takes the last position."
        advice = last if logits.dim() == 3 else "Reshape them to these two axes."
        raise MetricError(
            f"The output has logits of shape {tuple(logits.shape)}, but a metric needs (batch, action). {advice}"
        )
    return logits


def _compared(output: Any, baseline: Any) -> tuple[Tensor, Tensor]:
    ours, theirs = _log_probabilities(output), _log_probabilities(baseline)
    _check_same_shape(ours.shape, theirs.shape)
    return ours, theirs


def _check_same_shape(ours: Sequence[int], theirs: Sequence[int]) -> None:
    if tuple(ours) != tuple(theirs):
        raise MetricError(
            f"The output has shape {tuple(ours)} and the baseline {tuple(theirs)}: compare outputs for the same inputs."
        )


def _expected(probabilities: Tensor, quantity: Tensor) -> Tensor:
    """Return an expectation; impossible actions add 0, even if their quantity is infinite."""
    return (torch.where(probabilities > 0, quantity, 0.0) * probabilities).sum(-1)


def _summed(found: Distribution, what: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return a quantity of a continuous distribution, summed over the dimensions of the action."""
    try:
        result = compute()
    except NotImplementedError:
        raise DistributionError(
            f"The {what} of a {type(found).__name__} has no formula in torch.distributions. Estimate it from samples."
        ) from None
    return result.flatten(1).sum(-1) if result.dim() > 1 else result
