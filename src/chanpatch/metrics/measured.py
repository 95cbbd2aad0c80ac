"""Metrics of outputs: one number per input, or one for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..engine.attributes import unreadable
from ..engine.paths import leaves
from ..errors import MetricError
from .outputs import described

Metric: TypeAlias = Callable[..., Tensor]


def measured(metric: Metric, output: Any, baseline: Any) -> Tensor:
    """Return a metric of an output, `(batch,)` or `(1,)`, compared with the baseline if it is one that compares.

    Args:
        metric: A function of an output, or of an output and a keyword-only `baseline`.
        output: Of the model.
        baseline: Of the unpatched model, on the same inputs.

    Raises:
        MetricError: If the metric is no function, returns anything else, or writes into what it is given.
    """
    if not callable(metric):
        raise MetricError(f"The metric is a {type(metric).__name__}: give one function. sweep() takes several by name.")
    with unwritten("The metric", output, baseline):
        result = metric(output, baseline=baseline) if compares(metric) else metric(output)
    if not isinstance(result, Tensor) or result.dim() > 1:
        raise MetricError(f"The metric returned {described(result)}: one number per input, (batch,), is expected.")
    return result.reshape(-1)


def compares(metric: Metric) -> bool:
    """Return whether a metric has a keyword-only `baseline` left open, and so compares with the unpatched output."""
    try:
        parameter = inspect.signature(metric).parameters.get("baseline")
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    given = getattr(inspect.unwrap(metric), "keywords", {})  # of a functools.partial
    return "baseline" not in given and parameter is not None and parameter.kind is parameter.KEYWORD_ONLY


@contextmanager
def unwritten(metric: str, *given: Any) -> Iterator[None]:
    """Refuse a metric that writes into what it is given, which is also given to others, and with other patches.

    Args:
        metric: How to call it.
        given: To it.

    Raises:
        MetricError: At the end, if it wrote.
    """
    tensors = [tensor for tree in given for _, tensor in leaves(tree) if not tensor.is_inference()]
    before = [tensor._version for tensor in tensors]
    yield
    if [tensor._version for tensor in tensors] != before:
        raise MetricError(
            f"{metric} wrote into the output or the baseline in place, which others are given too. Return new tensors: "
            "output - baseline instead of output.sub_(baseline)."
        )


class Metrics:
    """Functions of an output, by name.

    Args:
        metric: One function, or several by name. One that takes a keyword-only `baseline` gets the unpatched output.
        baseline: The unpatched output.
        inputs: How many inputs there are; None where that cannot be told.

    Attributes:
        baseline: The metrics of the unpatched output: float64 `(input,)` each.
    """

    def __init__(self, metric: Metric | Mapping[str, Metric], baseline: Any, inputs: int | None) -> None:
        named = metric if isinstance(metric, Mapping) else {_name(metric): metric}
        if not named:
            raise MetricError("There is no metric: the mapping is empty. Give a function of the model's output.")
        wrong = [name for name, function in named.items() if not callable(function)]
        if wrong:
            raise MetricError(f"The metric {wrong[0]!r} is no function. A metric takes the model's output.")
        self._functions = {
            name: (function, {"baseline": baseline} if compares(function) else {}) for name, function in named.items()
        }
        self.baseline: dict[str, Tensor] = {}
        self.baseline = self(baseline)
        for name, before in self.baseline.items():
            if inputs is not None and len(before) not in (1, inputs):
                raise MetricError(
                    f"The metric {name!r} returned {len(before)} numbers for {inputs} inputs. {_EXPECTED}"
                )

    def __call__(self, output: Any) -> dict[str, Tensor]:
        """Return the metrics of an output."""
        with torch.no_grad():
            found = {name: self._measured(name, output) for name in self._functions}
        for name, before in self.baseline.items():
            if found[name].shape != before.shape:
                raise MetricError(
                    f"The metric {name!r} returned {len(found[name])} numbers for a patched output, but {len(before)} "
                    "for the unpatched one. It returns one per input."
                )
        return found

    def refuse_attributes(self, output: Any, rebound: Sequence[tuple[dict[str, Any], str]]) -> None:
        """Raise if a metric reads what each forward sets on a module, which is put back before a metric is asked.

        Args:
            output: The unpatched one.
            rebound: What the forward that returned it set.
        """
        if not rebound:
            return
        for name, before in self.baseline.items():
            with unreadable(rebound):
                try:
                    again = self._measured(name, output)
                except Exception:  # whatever comes of using what is of no use
                    again = None
            if again is None or not torch.allclose(again, before, equal_nan=True):
                names = ", ".join(f"'{attribute}'" for _, attribute in rebound)
                raise MetricError(
                    f"The metric {name!r} depends on more than the output: it reads {names}, which each forward sets "
                    "on its module. Have the model return what is measured."
                )

    def _measured(self, name: str, output: Any) -> Tensor:
        function, keywords = self._functions[name]
        with unwritten(f"The metric {name!r}", output, *keywords.values()):
            return _numbers(name, function(output, **keywords))


def _numbers(name: str, value: Any) -> Tensor:
    try:
        numbers = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise MetricError(f"The metric {name!r} returned {type(value).__name__}. {_EXPECTED}") from None
    if not numbers.numel():
        raise MetricError(f"The metric {name!r} returned no number. Give inputs of one row at least.")
    if numbers.dim() > 1:
        raise MetricError(f"The metric {name!r} returned a tensor of shape {tuple(numbers.shape)}. {_EXPECTED}")
    if numbers.is_complex():
        raise MetricError(f"The metric {name!r} returned {numbers.dtype}. {_EXPECTED} Take .real or .abs() of it.")
    return numbers.to("cpu", torch.float64).reshape(-1)


_EXPECTED = "It returns one number per input, (batch,), or one number."


def _name(metric: Metric) -> str:
    name = getattr(metric, "__name__", "metric")
    return "metric" if name == "<lambda>" else str(name)
