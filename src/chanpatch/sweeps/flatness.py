"""Inputs at which a metric has no slope, so that a gradient says nothing of them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..metrics.outputs import distribution_in, is_categorical, logits_of
from ..registry.sites import HookPoint

SATURATED = 1e-3  # the probability that is left to the other actions, and the share of its slope that a metric keeps


def log_odds(output: Any) -> Tensor | None:
    """Return the log odds of the most probable action, `(batch,)`; None without a distribution over actions."""
    logits = _logits(output)
    if logits is None:
        return None
    top = logits.argmax(-1, keepdim=True)
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1)
    return logits.gather(-1, top).squeeze(-1) - others


def _logits(output: Any) -> Tensor | None:
    found = distribution_in(output)
    logits = logits_of(found) if found is not None and is_categorical(found) else None
    return logits if logits is not None and logits.dim() == 2 and logits.shape[1] > 1 else None


def warn_of_flat_inputs(
    gradients: Sequence[tuple[HookPoint, Tensor]],
    slopes: Sequence[tuple[HookPoint, Tensor]],
    baseline: Any,
    *,
    compares: bool,
) -> None:
    """Warn of inputs whose metric does not change where the log odds of their action do.

    Args:
        gradients: Of the metric, summed over the inputs, at hook points.
        slopes: Of the log odds, in the same way; none where there are none.
        baseline: The unpatched output.
        compares: Whether the metric compares with that, and so may be at its minimum in the clean run.
    """
    logits = _logits(baseline)
    if logits is None or not slopes:
        return
    steep, left = _largest(slopes, len(logits)), _largest(gradients, len(logits))
    saturated = (logits.exp().amax(-1) > 1 - SATURATED).to(left.device)
    least = 10 * torch.finfo(left.dtype).eps if compares else 0.0
    flat = int((left < steep * torch.where(saturated, SATURATED, least)).sum())
    if flat:
        why = (
            "A metric that compares with the clean output is at its minimum there: take more steps."
            if compares
            else f"They have an action whose probability is above {1 - SATURATED}: take more steps, or a metric of "
            "logits (logit_difference)."
        )
        warnings.warn(
            f"The gradient of the metric is numerically nothing for {flat} of {len(logits)} inputs, so that the "
            f"estimates miss their effects. {why}",
            RuntimeWarning,
            stacklevel=4,  # the caller of attribution(), past its decorator
        )


def warn_of_shared_memory(names: Iterable[str]) -> None:
    """Warn that estimates are of another model, where a module writes in place into what is read elsewhere too."""
    listed = ", ".join(f"'{name}'" for name in sorted(names))
    warnings.warn(
        "The model gives another output when an activation is replaced by its equal: a module writes in place into its "
        f"input, which is read elsewhere too. One of {listed} is such an input, and the estimates are off; the exact "
        "effects are not. Patch what the module returns, or build it without inplace=True.",
        RuntimeWarning,
        stacklevel=6,  # the caller of attribution(), past its decorator and the run
    )


def warn_of_cut_gradients(names: Collection[str]) -> None:
    """Warn of hook points where no gradient arrives, though patches there have effects.

    Args:
        names: Of the hook points.
    """
    if names:
        warnings.warn(
            f"The gradient of the metric is zero everywhere at {', '.join(map(repr, sorted(names)))}, but patches "
            "there change the metric, so that the estimates miss their effects. Something in between has no gradient "
            "(torch.no_grad, .detach(), argmax, rounding): sweep() the patches.",
            RuntimeWarning,
            stacklevel=4,  # as above
        )


def _largest(gradients: Sequence[tuple[HookPoint, Tensor]], inputs: int) -> Tensor:
    """Return the largest element of each input's gradients, over the hook points with a row per input."""
    found = [
        gradient.detach().abs().movedim(point.batch_axis, 0).flatten(1).amax(1)
        for point, gradient in gradients
        if point.batch_axis is not None and gradient.shape[point.batch_axis] == inputs
    ]
    return torch.stack([each.to(found[0]) for each in found]).amax(0) if found else torch.zeros(inputs)
