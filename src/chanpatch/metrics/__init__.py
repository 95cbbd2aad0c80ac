"""Metrics: functions of a model's output that return one number per input.

    logits = model(observations)
    logit_difference(3, 5)(logits)                  # (batch,)
    kl_divergence(patched_logits, baseline=logits)  # (batch,)

Any function that maps an output to a tensor of shape `(batch,)` is a metric. If a metric has a keyword-only
parameter `baseline`, the parameter receives the unpatched output.
"""

from .measured import Metric
from .metrics import (
    action_flip,
    action_probability,
    at_position,
    entropy,
    kl_divergence,
    log_probability,
    logit_difference,
    normalized_effect,
    total_variation,
    value,
)

__all__ = [
    "Metric", "action_flip", "action_probability", "at_position", "entropy", "kl_divergence", "log_probability",
    "logit_difference", "normalized_effect", "total_variation", "value",
]  # fmt: skip
