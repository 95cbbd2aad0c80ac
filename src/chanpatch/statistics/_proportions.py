"""Intervals and tests for proportions, paired proportions and rankings.

Counts of a paired comparison are named by who succeeded, in the order of the table:
`both`, `only_first`, `only_second`, `neither`.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import StatisticsError


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval, all three in the unit of the estimate."""

    estimate: float
    low: float
    high: float
    confidence: float


class PairedCounts(NamedTuple):
    """The table of a paired comparison; `paired_difference_interval(*counts)` takes it as it is."""

    both: int
    only_first: int
    only_second: int
    neither: int


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return a proportion and its Wilson score interval, within 0 and 1.

    Unlike the interval of the normal approximation it has a width also at 0 and at 1.

    Args:
        successes: How many of the trials succeeded, 0 to `n`.
        n: The number of trials, at least 1.
        confidence: The coverage aimed at, between 0 and 1.

    Raises:
        StatisticsError: If the counts are no counts, or the confidence is not between 0 and 1.

    Example:
        >>> interval = wilson_interval(9, 10)
        >>> print(f"{interval.estimate:.2f} ({interval.low:.3f} to {interval.high:.3f})")
        0.90 (0.596 to 0.982)

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    successes, n = _count("successes", successes), _count("n", n)
    if n == 0:
        raise StatisticsError("n is 0: a proportion needs at least one trial.")
    if successes > n:
        raise StatisticsError(f"successes is {successes}, but there were only n = {n} trials.")
    return _wilson(successes / n, n, confidence)


def paired_counts(first: ArrayLike, second: ArrayLike) -> PairedCounts:
    """Return in how many pairs both succeeded, only the first, only the second, and neither.

    Args:
        first: One boolean per pair: whether the first succeeded.
        second: One boolean per pair: whether the second succeeded.

    Raises:
        StatisticsError: If the two are not booleans, one per pair.

    Example:
        >>> paired_counts([True, True, False], [True, False, False])
        PairedCounts(both=1, only_first=1, only_second=0, neither=1)
    """
    one, other = np.asarray(first), np.asarray(second)
    if one.ndim != 1 or one.shape != other.shape or one.dtype != np.bool_ or other.dtype != np.bool_:
        raise StatisticsError(
            f"first is {one.dtype} of shape {one.shape} and second is {other.dtype} of shape {other.shape}: "
            "give one boolean per pair, such as returns > 0."
        )
    return PairedCounts(
        both=int((one & other).sum()),
        only_first=int((one & ~other).sum()),
        only_second=int((~one & other).sum()),
        neither=int((~one & ~other).sum()),
    )


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value that two paired proportions are equal, between 0 and 1.

    Pairs with equal outcomes say nothing about the difference; of the others, half should favour either side.

    Args:
        only_first: Pairs in which only the first succeeded.
        only_second: Pairs in which only the second succeeded.

    Returns:
        The p-value; 1 where no pair differs.

    Raises:
        StatisticsError: If the counts are no counts.

    Example:
        >>> round(mcnemar_exact(1, 9), 4)
        0.0215

    References:
        McNemar, "Note on the sampling error of the difference between correlated proportions or percentages"
        (1947), with the binomial distribution in place of the normal one.
    """
    import scipy.stats

    only_first, only_second = _count("only_first", only_first), _count("only_second", only_second)
    differing = only_first + only_second
    return float(scipy.stats.binomtest(only_first, differing).pvalue) if differing else 1.0


def paired_difference_interval(
    both: int, only_first: int, only_second: int, neither: int, confidence: float = 0.95
) -> Interval:
    """Return the first proportion minus the second, over the same pairs, and its interval within -1 and 1.

    The Wilson intervals of the two proportions are combined with the correlation of the pairs, so the
    interval has a width also where all pairs agree.

    Args:
        both: Pairs in which both succeeded.
        only_first: Pairs in which only the first succeeded.
        only_second: Pairs in which only the second succeeded.
        neither: Pairs in which neither succeeded.
        confidence: The coverage aimed at, between 0 and 1.

    Returns:
        The difference, positive where the first succeeds more often.

    Raises:
        StatisticsError: If the counts are no counts or all 0, or the confidence is not between 0 and 1.

    Example:
        >>> interval = paired_difference_interval(both=14, only_first=5, only_second=0, neither=22)
        >>> print(f"{interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
        +0.122 (+0.011 to +0.226)

    References:
        Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
        paired data" (1998), section 2, method 10.
    """
    both, neither = _count("both", both), _count("neither", neither)
    only_first, only_second = _count("only_first", only_first), _count("only_second", only_second)
    n = both + only_first + only_second + neither
    if n == 0:
        raise StatisticsError("All four counts are 0: a difference of proportions needs at least one pair.")
    first = wilson_interval(both + only_first, n, confidence)
    second = wilson_interval(both + only_second, n, confidence)
    correlation = _corrected_phi(both, only_first, only_second, neither)

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * correlation * x * y + y * y, 0.0))

    estimate = (only_first - only_second) / n
    low = estimate - distance(first.estimate - first.low, second.high - second.estimate)
    high = estimate + distance(first.high - first.estimate, second.estimate - second.low)
    return Interval(estimate, low, high, confidence)


def auc(scores: ArrayLike, labels: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the probability that a positive scores above a negative, and its interval within 0 and 1.

    Ties count one half, so 0.5 means that the scores say nothing about the labels, and a value below 0.5 that
    low scores are the positives'. The groups may spread differently. With few examples and an area near 0 or
    1 the interval covers less often than it says.

    Args:
        scores: One finite number per example.
        labels: One boolean (or 0 or 1) per example; both must occur twice at least.
        confidence: The coverage aimed at, between 0 and 1.

    Raises:
        StatisticsError: If scores and labels do not match, a score is not finite, or a label is too rare.

    Example:
        >>> interval = auc([0.9, 0.8, 0.4, 0.6, 0.3, 0.1], [True, True, True, False, False, False])
        >>> print(f"{interval.estimate:.3f} ({interval.low:.2f} to {interval.high:.2f})")
        0.889 (0.26 to 0.99)

    References:
        DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver
        operating characteristic curves: a nonparametric approach" (1988), for the variance; Qin and
        Hotilovac, "Comparison of non-parametric confidence intervals for the area under the ROC curve of a
        continuous-scale diagnostic test" (2008), for taking the interval on the logit scale.
    """
    import scipy.special
    import scipy.stats

    positive, negative = _by_label(scores, labels)
    rank = scipy.stats.rankdata(np.concatenate([positive, negative]))
    # What share of the other group an example beats: the ranks above those within its own group.
    beaten = (rank[: positive.size] - scipy.stats.rankdata(positive)) / negative.size
    beaten_by = 1 - (rank[positive.size :] - scipy.stats.rankdata(negative)) / positive.size
    area = float(beaten.mean())
    if np.ptp(beaten) == 0 and np.ptp(beaten_by) == 0:
        # Separated or all tied: no variance to be seen. Disjoint pairs are independent trials of one event.
        return _wilson(area, min(positive.size, negative.size), confidence)
    variance = beaten.var(ddof=1) / positive.size + beaten_by.var(ddof=1) / negative.size
    margin = _quantile(confidence) * math.sqrt(variance) / (area * (1 - area))
    low, high = scipy.special.expit(scipy.special.logit(area) + np.array([-margin, margin]))
    return Interval(area, float(low), float(high), confidence)


def _wilson(proportion: float, n: int, confidence: float) -> Interval:
    z = _quantile(confidence)
    centre = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * math.sqrt(proportion * (1 - proportion) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    # Rounding could leave the estimate 0 or 1 just outside its own interval.
    low, high = min(max(centre - margin, 0.0), proportion), max(min(centre + margin, 1.0), proportion)
    return Interval(proportion, low, high, confidence)


def _corrected_phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Return the correlation of paired outcomes; a continuity correction draws a positive one towards 0.

    It is 0 where one of the proportions is 0 or 1, and thus has no correlation.
    """
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    agreement = both * neither - only_first * only_second
    n = both + only_first + only_second + neither
    corrected = max(agreement - n / 2, 0.0) if agreement > 0 else agreement
    return corrected / math.sqrt(margins)


def _by_label(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if score.ndim != 1 or label.shape != score.shape:
        raise StatisticsError(
            f"scores has shape {score.shape} and labels has shape {label.shape}: give one number and one "
            "label per example."
        )
    if not np.isfinite(score).all():
        raise StatisticsError(f"scores[{int(np.argmin(np.isfinite(score)))}] is not finite: leave that example out.")
    if not np.isin(label, (0, 1)).all():
        raise StatisticsError(
            "labels must be booleans (or 0 and 1); compare them with the label that counts as positive."
        )
    positive = label.astype(bool)
    positives = int(positive.sum())
    if min(positives, positive.size - positives) < 2:
        raise StatisticsError(
            f"There are {positives} positives and {positive.size - positives} negatives: a ranking needs at "
            "least two of each."
        )
    return score[positive], score[~positive]


def _count(name: str, number: int) -> int:
    try:
        count = operator.index(number)
    except TypeError:
        raise StatisticsError(f"{name} is {number!r}, but a count is a whole number.") from None
    if count < 0:
        raise StatisticsError(f"{name} is {count}, but a count is not negative.")
    return count


def _quantile(confidence: float) -> float:
    """Return how many standard deviations around the mean hold that share of a normal distribution."""
    import scipy.stats

    if not 0 < confidence < 1:
        raise StatisticsError(f"confidence is {confidence!r}, but it must lie between 0 and 1, such as 0.95.")
    return float(scipy.stats.norm.ppf((1 + confidence) / 2))
