"""Call metrics: one number per input, or one number for all inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..engine.paths import leaves
from ..errors import MetricError
from .outputs import described

Metric: TypeAlias = Callable[..., Tensor]

_EXPECTED = "A metric returns one number per input, (batch,), or one number."


def measured(metric: Metric, output: Any, baseline: Any, name: str = "The metric") -> Tensor:
    """Return a metric of an output, `(batch,)` or `(1,)`; one that compares gets the unpatched output as `baseline`.

    Raises:
        MetricError: If the metric is not a function, returns anything else, or writes into its arguments. `name` is
            the subject of the message.
    """
    if not callable(metric):
        raise MetricError(
            f"{name} is of type {type(metric).__name__}: give a function of the model's output. Only sweep() takes "
            "several, by name."
        )
    given = [tensor for tree in (output, baseline) for _, tensor in leaves(tree) if not tensor.is_inference()]
    before = [tensor._version for tensor in given]
    result = metric(output, baseline=baseline) if compares(metric) else metric(output)
    if [tensor._version for tensor in given] != before:
        raise MetricError(
            f"{name} wrote into the output or the baseline in place, which other metrics and patches get too. Return "
            "new tensors: output - baseline instead of output.sub_(baseline)."
        )
    try:
        numbers = torch.as_tensor(result)
    except (TypeError, ValueError, RuntimeError):
        raise MetricError(f"{name} returned {described(result)}. {_EXPECTED}") from None
    if numbers.dim() > 1 or numbers.is_complex():
        advice = " Take .real or .abs() of it." if numbers.is_complex() else ""
        raise MetricError(f"{name} returned {described(numbers)}. {_EXPECTED}{advice}")
    if not numbers.numel():
        raise MetricError(f"{name} returned no number. Give inputs with at least one row.")
    return numbers.reshape(-1)


def compares(metric: Metric) -> bool:
    """Return whether a metric takes a keyword-only `baseline`, and so compares with the unpatched output."""
    try:
        parameter = inspect.signature(metric).parameters.get("baseline")
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    given = getattr(inspect.unwrap(metric), "keywords", {})  # of a functools.partial
    return "baseline" not in given and parameter is not None and parameter.kind is parameter.KEYWORD_ONLY


class Metrics:
    """One metric or several by name, and `baseline`: those of the unpatched output, float64 `(input,)` each.

    The number of inputs is None if it is not known.
    """

    def __init__(self, metric: Metric | Mapping[str, Metric], baseline: Any, inputs: int | None) -> None:
        self._functions = dict(metric) if isinstance(metric, Mapping) else {_name(metric): metric}
        if not self._functions:
            raise MetricError("There is no metric: the mapping is empty. Give a function of the model's output.")
        self._unpatched = baseline
        self.baseline: dict[str, Tensor] = {}
        self.baseline = self(baseline)
        for name, before in self.baseline.items():
            if inputs is not None and len(before) not in (1, inputs):
                raise MetricError(
                    f"The metric {name!r} returned {len(before)} numbers for {inputs} inputs. {_EXPECTED}"
                )

    def __call__(self, output: Any) -> dict[str, Tensor]:
        """Return the metrics of an output: float64 on the CPU."""
        found = {}
        for name, function in self._functions.items():
            with torch.no_grad():
                numbers = measured(function, output, self._unpatched, f"The metric {name!r}")
            found[name] = numbers.detach().to("cpu", torch.float64)
            if name in self.baseline and len(numbers) != len(self.baseline[name]):
                raise MetricError(
                    f"The metric {name!r} returned {len(numbers)} numbers for a patched output, but "
                    f"{len(self.baseline[name])} for the unpatched one. {_EXPECTED}"
                )
        return found


def _name(metric: Metric) -> str:
    name = getattr(metric, "__name__", "metric")
    return "metric" if name == "<lambda>" else str(name)
