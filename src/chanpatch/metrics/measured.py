"""Compute metrics: one number per input, or a single number for all inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..engine.paths import leaves
from ..errors import MetricError
from .outputs import described

Metric: TypeAlias = Callable[..., Tensor]

_EXPECTED = "A metric must return one number per input, with shape (batch,), or a single number."


def measured(
    metric: Metric, output: Any, baseline: Any, name: str = "The metric", *, passes: bool | None = None
) -> Tensor:
    """Compute a metric, check its result, and return the result with shape `(batch,)` or `(1,)`.

    `baseline` is the unpatched output. The baseline is passed to the metric if `passes` is True, or if `passes` is None
    and the metric has a keyword-only parameter `baseline`. If the metric is not callable, modifies its arguments, or
    returns neither one number per input nor a single number, this function raises MetricError with a message that
    begins with `name`.
    """
    if not callable(metric):
        raise MetricError(
            f"{name} must be a function of the model's output; got {type(metric).__name__}. Only sweep() accepts a "
            "dict of several metrics."
        )
    passed = compares(metric) if passes is None else passes
    given = [each for tree in (output, baseline)[: 1 + passed] for _, each in leaves(tree) if not each.is_inference()]
    before = [tensor._version for tensor in given]
    result = metric(output, baseline=baseline) if passed else metric(output)
    if [tensor._version for tensor in given] != before:
        raise MetricError(
            f"{name} modified the output or the baseline in place, but other metrics and patches use the same tensors. "
            "Return new tensors: output - baseline instead of output.sub_(baseline)."
        )
    try:
        numbers = torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError):
        raise MetricError(f"{name} returned {described(result)}. {_EXPECTED}") from None
    if numbers.dim() > 1 or numbers.is_complex():
        advice = " Use .real or .abs()." if numbers.is_complex() else ""
        raise MetricError(f"{name} returned {described(numbers)}. {_EXPECTED}{advice}")
    if not numbers.numel():
        raise MetricError(f"{name} returned no numbers. Pass at least one input to the model.")
    return numbers.reshape(-1)


def compares(metric: Metric) -> bool:
    """Return whether a metric has a keyword-only parameter `baseline`, which receives the unpatched output."""
    try:
        function = metric.forward if isinstance(metric, nn.Module) else metric
        parameter = inspect.signature(function).parameters.get("baseline")
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    given = getattr(inspect.unwrap(metric), "keywords", {})  # arguments that functools.partial has already set
    return "baseline" not in given and parameter is not None and parameter.kind is parameter.KEYWORD_ONLY


class Metrics:
    """One or more named metrics. The attribute `baseline` maps each name to the metric's values without patches.

    The argument `baseline` is the unpatched output, and `inputs` is the number of inputs, or None if unknown.
    """

    def __init__(self, metric: Metric | Mapping[str, Metric], baseline: Any, inputs: int | None) -> None:
        self._functions = dict(metric) if isinstance(metric, Mapping) else {_name(metric): metric}
        if not self._functions:
            raise MetricError("metric is an empty mapping. Pass at least one function of the model's output.")
        self._unpatched = baseline
        self._passes = {name: compares(function) for name, function in self._functions.items()}
        self.baseline: dict[str, Tensor] = {}
        self.baseline = self(baseline)
        for name, before in self.baseline.items():
            if inputs is not None and len(before) not in (1, inputs):
                raise MetricError(
                    f"The metric {name!r} returned {len(before)} numbers for {inputs} inputs. {_EXPECTED}"
                )

    def __call__(self, output: Any) -> dict[str, Tensor]:
        """Compute all metrics for an output. Return a dict from metric names to float64 tensors on the CPU."""
        found = {}
        for name, function in self._functions.items():
            with torch.no_grad():
                numbers = measured(function, output, self._unpatched, f"The metric {name!r}", passes=self._passes[name])
            found[name] = numbers.detach().to("cpu", torch.float64)
            if name in self.baseline and len(numbers) != len(self.baseline[name]):
                raise MetricError(
                    f"The metric {name!r} returned {len(numbers)} numbers for a patched output, but "
                    f"{len(self.baseline[name])} for the unpatched output. {_EXPECTED}"
                )
        return found


def _name(metric: Metric) -> str:
    name = getattr(metric, "__name__", "metric")
    return "metric" if name == "<lambda>" else str(name)
