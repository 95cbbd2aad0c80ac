"""Confidence intervals, and the checks that several statistics share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import TypeVar

from ..errors import ChanpatchError, StatisticsError

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Number = TypeVar("Number", default=float)

FEWEST = 6  # independent rows of an interval or a sign-flip test: with fewer, no p can be below 0.05
FEW = 10  # with fewer, skewness cannot be estimated


@dataclass(frozen=True)
class Interval(Generic[Number]):
    """An estimate and its confidence interval: three numbers, or three arrays of one shape for many channels.

    Attributes:
        estimate: The estimate.
        low, high: Ends of the interval; NaN if it is withheld.
        confidence: Nominal coverage.
        note: `"few"` for six to nine independent rows, the reason if the interval is withheld, otherwise empty; an
            array of such texts for many channels.
    """

    estimate: Number
    low: Number
    high: Number
    confidence: float
    note: Any = ""


def whole(name: str, number: int, least: int = 0, error: type[ChanpatchError] = StatisticsError) -> int:
    """Return a number as an int; raise the error if it is not whole or is too small."""
    try:
        found = operator.index(number)
    except TypeError:
        found = least - 1
    if found < least:
        raise error(f"{name} is {number!r}, but it must be a whole number, at least {least}.")
    return found


def picked(interval: Interval[Floats], rows: Sequence[int]) -> Interval[Floats]:
    """Return the intervals of some channels, by number."""
    estimate, low, high = (each[list(rows)] for each in (interval.estimate, interval.low, interval.high))
    return Interval(estimate, low, high, interval.confidence, interval.note[list(rows)])


def too_few(independent: int, kind: str = "rows") -> str:
    """Return the note of an interval over a number of independent rows: a reason to withhold it, `"few"`, or ""."""
    if independent < FEWEST:
        return f"{independent} independent {kind}, fewer than {FEWEST}"
    return "few" if independent < FEW else ""


def mostly_equal(values: Floats) -> Any:
    """Return per channel whether more than half of the rows, and all but five or fewer, are equal."""
    return few_others((values != np.sort(values, axis=0)[len(values) // 2]).sum(axis=0), len(values))


def few_others(others: Any, rows: int) -> Any:
    """Return whether so few rows differ from the most common one that their spread is not known."""
    return others < min(FEWEST, rows / 2)


def interval_columns(interval: Interval | None, *names: str) -> dict[str, float | None]:
    """Return estimate, low and high as columns of a record with these names; None without an interval."""
    numbers = (None,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
    return dict(zip(names, numbers, strict=True))


def finite(
    name: str, values: ArrayLike, axes: tuple[str, ...] | None = None, error: type[ChanpatchError] = StatisticsError
) -> Floats:
    """Return finite numbers with these axes, or with any axes if None; raise the error otherwise."""
    array = np.asarray(values, dtype=np.float64)
    if axes is not None and (array.ndim != len(axes) or not array.size):
        raise error(f"{name} has shape {array.shape}, but its axes must be ({', '.join(axes)}), none of length 0.")
    for wrong in np.argwhere(~np.isfinite(array))[:1].tolist():
        raise error(f"{name}[{', '.join(map(str, wrong))}] is not finite: leave that input out.")
    return array


def two_groups(labels: ArrayLike, inputs: int, fewest: int, error: type[ChanpatchError] = StatisticsError) -> Booleans:
    """Return labels as booleans; raise the error unless one per input, with `fewest` positives and negatives."""
    array, positive = np.asarray(labels), booleans(labels)
    if array.shape != (inputs,) or positive is None:
        raise error(
            f"labels is {array.dtype} of shape {array.shape}: give one boolean for each of the {inputs} inputs, "
            "such as directions == 0."
        )
    positives = int(positive.sum())
    if min(positives, inputs - positives) < fewest:
        raise error(
            f"There are {positives} positives and {inputs - positives} negatives, but at least {fewest} of each are "
            "needed."
        )
    return positive


def booleans(labels: ArrayLike) -> Booleans | None:
    """Return labels as booleans: False and True, or 0 and 1 in any dtype; None if they hold anything else."""
    array = np.asarray(labels)
    if array.dtype.kind not in "biuf" or not ((array == 0) | (array == 1)).all():
        return None
    return array.astype(np.bool_)


def normal_quantile(confidence: float) -> float:
    """Return the number of standard deviations around the mean that contain this share of a normal distribution."""
    import scipy.stats

    if not 0 < confidence < 1:
        raise StatisticsError(f"confidence is {confidence!r}, but it must lie between 0 and 1, such as 0.95.")
    return float(scipy.stats.norm.ppf((1 + confidence) / 2))


def wilson(proportion: float, n: int, confidence: float) -> Interval:
    """Return the Wilson score interval around a proportion of n trials."""
    z = normal_quantile(confidence)
    center = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * (proportion * (1 - proportion) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z * z / n)
    # Rounding could put an estimate of 0 or 1 just outside its own interval.
    low, high = min(max(center - margin, 0.0), proportion), max(min(center + margin, 1.0), proportion)
    return Interval(proportion, low, high, confidence)
