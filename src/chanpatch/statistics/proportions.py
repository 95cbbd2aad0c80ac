"""Intervals and tests for proportions, paired proportions and differences."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import StatisticsError
from .interval import FEWEST, Interval, booleans, too_few, whole, wilson


class PairedCounts(NamedTuple):
    """Numbers of pairs, by outcome, in a paired comparison; unpack them as in `paired_difference_interval(*counts)`."""

    both: int
    only_first: int
    only_second: int
    neither: int


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return a proportion and its Wilson score interval, which lies between 0 and 1 and never has zero width.

    Args:
        successes: Number of successful trials, from 0 to `n`.
        n: Number of trials, at least 1.
        confidence: Nominal coverage, between 0 and 1.

    Raises:
        StatisticsError: If a count or the confidence is invalid.

    Example:
        >>> interval = wilson_interval(9, 10)
        >>> print(f"{interval.estimate:.2f} ({interval.low:.3f} to {interval.high:.3f})")
        0.90 (0.596 to 0.982)

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    successes, n = whole("successes", successes), whole("n", n, least=1)
    if successes > n:
        raise StatisticsError(f"successes must be at most n = {n}; got {successes}.")
    return wilson(successes / n, n, confidence)


def paired_counts(first: ArrayLike, second: ArrayLike) -> PairedCounts:
    """Count the pairs with a success in both arguments, only in `first`, only in `second`, or in neither.

    Each argument has one boolean (or 0 or 1) per pair.

    Raises:
        StatisticsError: If an argument does not have one boolean per pair, or if the lengths differ.

    Example:
        >>> paired_counts([True, True, False], [True, False, False])
        PairedCounts(both=1, only_first=1, only_second=0, neither=1)
    """
    arrays = np.asarray(first), np.asarray(second)
    one, other = map(booleans, arrays)
    if one is None or other is None or one.ndim != 1 or one.shape != other.shape:
        kinds = [f"{array.dtype} of shape {array.shape}" for array in arrays]
        raise StatisticsError(
            f"first and second must have one boolean per pair, such as returns > 0; got {kinds[0]} and {kinds[1]}."
        )
    cells = one & other, one & ~other, ~one & other, ~one & ~other
    return PairedCounts(*(int(cell.sum()) for cell in cells))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value for equality of two paired proportions (McNemar's test).

    The arguments are counts from `paired_counts`. If both counts are 0, the p-value is 1.

    Raises:
        StatisticsError: If a count is invalid.

    Example:
        >>> round(mcnemar_exact(1, 9), 4)
        0.0215

    References:
        McNemar, "Note on the sampling error of the difference between correlated proportions or percentages"
        (1947), with the binomial distribution in place of the normal one.
    """
    import scipy.stats

    differing = whole("only_first", only_first) + whole("only_second", only_second)
    return float(scipy.stats.binomtest(only_first, differing).pvalue) if differing else 1.0


def paired_difference_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> Interval:
    """Return the difference between two paired proportions, first minus second, and its interval in [-1, 1].

    The interval combines the Wilson intervals for both proportions with the correlation between paired outcomes, so the
    interval's width is nonzero even if the two outcomes agree in every pair. With six to nine pairs, the note is
    `"few"`; with fewer than six, the interval is withheld. The counts come from `paired_counts`, and `confidence` is
    the nominal coverage.

    Raises:
        StatisticsError: If a count or the confidence is invalid, or all counts are 0.

    Example:
        >>> interval = paired_difference_interval(both=14, only_first=5, only_second=0, neither=22)
        >>> print(f"{interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
        +0.122 (+0.011 to +0.226)

    References:
        Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
        paired data" (1998), section 2, method 10.
    """
    given = PairedCounts(both, only_first, only_second, neither)._asdict()
    counts = PairedCounts(*(whole(name, number) for name, number in given.items()))
    n = sum(counts)
    if n == 0:
        raise StatisticsError("All four counts are 0, but a difference between proportions needs at least one pair.")
    first = wilson_interval(counts.both + counts.only_first, n, confidence)
    second = wilson_interval(counts.both + counts.only_second, n, confidence)
    low, high = _combined(first, second, _corrected_phi(counts))
    if n < FEWEST:
        low = high = math.nan
    return Interval((counts.only_first - counts.only_second) / n, low, high, confidence, too_few(n, "pairs"))


def difference_interval(first: Interval, second: Interval) -> Interval:
    """Return the difference between two independent estimates, first minus second, and its interval.

    The two estimates may be proportions, areas under the ROC curve, or any numbers in the same unit. For two Wilson
    intervals, the result is Newcombe's interval.

    Raises:
        StatisticsError: If the confidence levels differ.

    Example:
        >>> interval = difference_interval(wilson_interval(56, 70), wilson_interval(48, 80))
        >>> print(f"{interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
        +0.200 (+0.052 to +0.334)

    References:
        Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven
        methods" (1998), method 10; Zou and Donner, "Construction of confidence limits about effect measures: a general
        approach" (2008), section 2, for other estimates.
    """
    _check_one_confidence(first, second)
    low, high = _combined(first, second, correlation=0.0)
    # Keep the longer note: a reason to withhold an interval is longer than "few".
    note = max(first.note, second.note, key=len)
    return Interval(first.estimate - second.estimate, low, high, first.confidence, note)


def reweighted_precision(true_positive_rate: Interval, false_positive_rate: Interval, base_rate: float) -> Interval:
    """Return the precision that a classifier would have at the given base rate, and its interval in [0, 1].

    Precision increases with the fraction of positives in the data, so precisions on two data sets are comparable only
    at the same base rate. The precision is computed by Bayes' rule. The interval treats the base rate as known. If no
    input was accepted, the precision is NaN and its interval is 0 to 1.

    Args:
        true_positive_rate: Fraction of positives that are accepted, and its interval.
        false_positive_rate: Fraction of negatives that are accepted, and its interval.
        base_rate: Fraction of positives in the target population, between 0 and 1.

    Raises:
        StatisticsError: If the confidence levels differ, or the base rate is not between 0 and 1.

    Example:
        >>> interval = reweighted_precision(wilson_interval(45, 50), wilson_interval(5, 50), base_rate=0.25)
        >>> print(f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})")
        0.75 (0.58 to 0.87)

    References:
        Newcombe, "MOVER-R confidence intervals for ratios and products of two independently estimated quantities"
        (2016), for the ratio of the two rates.
    """
    _check_one_confidence(true_positive_rate, false_positive_rate)
    if not 0 < base_rate < 1:
        raise StatisticsError(f"base_rate must be greater than 0 and less than 1; got {base_rate!r}.")
    hit, alarm = true_positive_rate, false_positive_rate
    lowest = _lowest_ratio(hit.estimate, hit.low, alarm.estimate, alarm.high)
    lowest_inverse = _lowest_ratio(alarm.estimate, alarm.low, hit.estimate, hit.high)

    def precision(hits: float, alarms: float) -> float:
        accepted = base_rate * hits + (1 - base_rate) * alarms
        return base_rate * hits / accepted if accepted else math.nan

    return Interval(
        precision(hit.estimate, alarm.estimate), precision(lowest, 1.0), precision(1.0, lowest_inverse), hit.confidence
    )


def _combined(first: Interval, second: Interval, correlation: float) -> tuple[float, float]:
    """Return both endpoints of the interval for a difference, first minus second.

    For each endpoint, each estimate's distance to one endpoint of its own interval is computed, and the two distances
    are combined by the law of cosines, with `correlation` as the cosine.
    """

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    estimate = first.estimate - second.estimate
    return (
        estimate - distance(first.estimate - first.low, second.high - second.estimate),
        estimate + distance(first.high - first.estimate, second.estimate - second.low),
    )


def _lowest_ratio(above: float, above_low: float, below: float, below_high: float) -> float:
    """Return the lower endpoint of the interval for the ratio `above / below`.

    At this ratio, the interval for the difference `above - ratio * below` has 0 as its lower endpoint. `above_low` and
    `below_high` are endpoints of the intervals for `above` and `below`.
    """
    numerator = above_low * (2 * above - above_low)
    squared = (above * below) ** 2 - numerator * below_high * (2 * below - below_high)
    root = math.sqrt(max(squared, 0.0))  # `squared` is 0, up to rounding, if both intervals have zero width
    return numerator / (above * below + root) if numerator else 0.0


def _check_one_confidence(first: Interval, second: Interval) -> None:
    if first.confidence != second.confidence:
        raise StatisticsError(
            f"Both intervals must have the same confidence; got {first.confidence} and {second.confidence}."
        )


def _corrected_phi(counts: PairedCounts) -> float:
    """Return the correlation between paired outcomes. A positive correlation is corrected for continuity.

    The result is 0 if the correlation is undefined.
    """
    both, only_first, only_second, neither = counts
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    agreement = both * neither - only_first * only_second
    corrected = max(agreement - sum(counts) / 2, 0.0) if agreement > 0 else agreement
    return corrected / math.sqrt(margins)
