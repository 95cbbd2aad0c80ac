"""Confidence intervals, and input checks shared by several statistics."""

from __future__ import annotations

import operator
import re
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

FEWEST = 6  # minimum number of independent rows for an interval or a sign-flip test: with fewer, every p is above 0.05
FEW = 10  # with fewer independent rows, skewness cannot be estimated


@dataclass(frozen=True)
class Interval(Generic[Number]):
    """An estimate and its confidence interval: three numbers, or three arrays of the same shape for many channels.

    Attributes:
        estimate: Point estimate.
        low, high: Both endpoints of the interval; NaN if the interval is withheld.
        confidence: Nominal coverage.
        note: Reason why the interval is withheld; `"few"` if there are six to nine independent rows; otherwise, an
            empty string. With many channels, an array with one string per channel.
    """

    estimate: Number
    low: Number
    high: Number
    confidence: float
    note: Any = ""


def whole(name: str, number: int, least: int = 0, error: type[ChanpatchError] = StatisticsError) -> int:
    """Return `number` as an int; raise `error` if `number` is not a whole number or is less than `least`."""
    try:
        found = operator.index(number)
    except TypeError:
        found = least - 1
    if found < least:
        raise error(f"{name} must be a whole number, at least {least}; got {number!r}.")
    return found


def picked(interval: Interval[Floats], rows: Sequence[int]) -> Interval[Floats]:
    """Return the intervals for the channels whose indices are given in `rows`."""
    estimate, low, high = (each[list(rows)] for each in (interval.estimate, interval.low, interval.high))
    return Interval(estimate, low, high, interval.confidence, interval.note[list(rows)])


def too_few(independent: int, kind: str = "rows") -> str:
    """Return the note for an interval that is based on the given number of independent rows.

    With fewer than six rows, the note is the reason why the interval is withheld. With six to nine rows, the note is
    `"few"`. With more rows, the note is empty. `kind` is the noun for the rows in the note, such as `"clusters"`.
    """
    if independent < FEWEST:
        noun = re.sub(r"s\b", "", kind, count=1) if independent == 1 else kind
        return f"{independent} independent {noun}, fewer than {FEWEST}"
    return "few" if independent < FEW else ""


def few_others(others: Any, rows: int) -> Any:
    """Return whether so few rows differ from the median row that the spread of the rows cannot be estimated.

    `others` is the number of rows that differ from the median row, and `rows` is the number of all rows.
    """
    return others < min(FEWEST, rows / 2)


def interval_columns(interval: Interval | None, *names: str) -> dict[str, float | None]:
    """Return a dict from three names to an interval's estimate, low and high, or to None if `interval` is None."""
    numbers = (None,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
    return dict(zip(names, numbers, strict=True))


def floats(values: Any) -> Floats:
    """Return numbers as an array of float64. Tensors may require a gradient or have a dtype that NumPy lacks."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=np.float64)


def finite(
    name: str, values: ArrayLike, axes: tuple[str, ...] | None = None, error: type[ChanpatchError] = StatisticsError
) -> Floats:
    """Return `values` as an array of floats; raise `error` if a value is not finite.

    If `axes` is given, also raise `error` if the array does not have exactly one nonempty axis per name.
    """
    array = floats(values)
    if axes is not None and (array.ndim != len(axes) or not array.size):
        raise error(f"{name} must be a nonempty array with axes ({', '.join(axes)}); got shape {array.shape}.")
    for wrong in np.argwhere(~np.isfinite(array))[:1].tolist():
        raise error(
            f"{name}[{', '.join(map(str, wrong))}] must be finite; got {array[tuple(wrong)]}. Leave out that input, "
            "pair or episode."
        )
    return array


def two_groups(labels: ArrayLike, inputs: int, fewest: int, error: type[ChanpatchError] = StatisticsError) -> Booleans:
    """Return labels as booleans, one per input; raise `error` if True or False occurs fewer than `fewest` times."""
    array, positive = np.asarray(labels), booleans(labels)
    if array.shape != (inputs,) or positive is None:
        raise error(
            f"labels must have one boolean for each of the {inputs} inputs, such as directions == 0; got dtype "
            f"{array.dtype} and shape {array.shape}."
        )
    positives = int(positive.sum())
    if min(positives, inputs - positives) < fewest:
        raise error(
            f"labels must have at least {fewest} positives and {fewest} negatives; got {positives} and "
            f"{inputs - positives}."
        )
    return positive


def booleans(labels: ArrayLike) -> Booleans | None:
    """Return labels (booleans, or 0 and 1 in any dtype) as booleans, or None if a label has any other value."""
    array = np.asarray(labels)
    if array.dtype.kind not in "biuf" or not ((array == 0) | (array == 1)).all():
        return None
    return array.astype(np.bool_)


def numbered(labels: ArrayLike) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the distinct labels, and the index of each label among the distinct labels."""
    array = np.asarray(labels)
    # Convert objects to text, because labels of different types cannot be sorted.
    names, numbers = np.unique(array.astype(str) if array.dtype == object else array, return_inverse=True)
    return names, numbers


def quantile(confidence: float, freedom: int | None = None) -> float:
    """Return the two-sided critical value of the normal distribution or, given `freedom`, of Student's t distribution.

    A fraction `confidence` of the distribution lies between minus the critical value and the critical value. `freedom`
    is the number of degrees of freedom.
    """
    import scipy.stats

    if not 0 < confidence < 1:
        raise StatisticsError(f"confidence must be greater than 0 and less than 1, such as 0.95; got {confidence!r}.")
    level = (1 + confidence) / 2
    return float(scipy.stats.norm.ppf(level) if freedom is None else scipy.stats.t.ppf(level, freedom))


def wilson(proportion: float, n: int, confidence: float) -> Interval:
    """Return the Wilson score interval for a proportion observed in n trials."""
    z = quantile(confidence)
    center = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * (proportion * (1 - proportion) / n + (z / (2 * n)) ** 2) ** 0.5 / (1 + z * z / n)
    # Rounding could put an estimate of 0 or 1 just outside its own interval.
    low, high = min(max(center - margin, 0.0), proportion), max(min(center + margin, 1.0), proportion)
    return Interval(proportion, low, high, confidence)
