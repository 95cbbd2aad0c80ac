"""How well a number ranks the examples of a label above the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StatisticsError
from ._interval import Interval, normal_quantile, wilson


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
        return wilson(area, min(positive.size, negative.size), confidence)
    variance = beaten.var(ddof=1) / positive.size + beaten_by.var(ddof=1) / negative.size
    margin = normal_quantile(confidence) * math.sqrt(variance) / (area * (1 - area))
    low, high = scipy.special.expit(scipy.special.logit(area) + np.array([-margin, margin]))
    return Interval(area, float(low), float(high), confidence)


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
