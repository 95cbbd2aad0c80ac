"""Bootstrap intervals for any statistic over rows or clusters of rows, and random halves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .interval import FEWEST, Floats, Interval, quantile, too_few, whole
from .means import Rows, clustered, noted

Statistic = Callable[[Floats], Any]


def bootstrap_interval(
    sample: ArrayLike,
    statistic: Statistic,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval[Any]:
    """Return a statistic of a sample and its bootstrap interval. For a mean, use `mean_interval` instead.

    The interval is bias-corrected and accelerated (BCa), at an expanded level that makes intervals for means of normal
    data as wide as Student's t interval. With six to nine independent rows, the note is `"few"`. The interval is
    withheld if there are fewer than six independent rows or clusters, if all resamples give the same number, or if a
    resample gives a number that is not finite. A withheld interval has NaN as both endpoints, and the note contains the
    reason.

    Args:
        sample: One row per input or, for a paired comparison, one difference per pair, with shape `(row, ...)`.
        statistic: Function that reduces the first axis of an array with shape `(row, ...)`. Row order must not affect
            the result.
        clusters: Cluster label for each row, or None if all rows are independent. Rows with the same label, such as
            rotations of one maze, are drawn together.
        confidence: Nominal coverage, between 0 and 1.
        resamples: Number of resamples.
        seed: Random seed.

    Returns:
        An interval of floats if the statistic is a single number, otherwise of arrays with the statistic's shape.

    Raises:
        StatisticsError: If there are no rows, or another argument is invalid.

    Example:
        >>> differences = np.random.default_rng(0).normal(loc=[0, 1], size=(40, 2))
        >>> interval = bootstrap_interval(differences, lambda sample: np.median(sample, axis=0), seed=0)
        >>> interval.low > 0
        array([False,  True])

    References:
        Efron and Tibshirani, "An introduction to the bootstrap" (1993), section 14.3; Hesterberg (2015), The
        American Statistician 69, section 3.3, for the level; Davison and Hinkley, "Bootstrap methods and their
        application" (1997), section 3.8, for clusters.
    """
    rows, cluster, many = clustered("sample", sample, clusters)
    t, resamples = quantile(confidence, many - 1), whole("resamples", resamples, least=1)
    generator = np.random.default_rng(whole("seed", seed))
    estimate = np.asarray(statistic(rows), dtype=np.float64)
    low, high = np.full((2, *estimate.shape), np.nan)
    note = np.full(estimate.shape, too_few(many), dtype="<U100")
    if many >= FEWEST:
        even = np.full(many, 1 / many)
        drawn = (generator.multinomial(many, even) for _ in range(resamples))  # one at a time, to limit memory
        resampled = _replicated(rows, statistic, (each[cluster] for each in drawn))
        jackknife = _replicated(rows, statistic, ((cluster != each).astype(np.int64) for each in range(many)))
        z = (many / (many - 1)) ** 0.5 * t
        known = np.isfinite(estimate) & np.isfinite(resampled).all(axis=0) & np.isfinite(jackknife).all(axis=0)
        low, high = _accelerated(estimate, np.where(known, resampled, 0.0), np.where(known, jackknife, 0.0), z)
        note[np.ptp(resampled, axis=0) == 0] = "every resample gives the same number"
        note[~known] = "a resample gives a number that is not finite"
    return noted(estimate, low, high, confidence, note)


def halves(labels: NDArray[Any], seed: int) -> tuple[Rows, Rows]:
    """Split inputs into two random halves, stratified by their labels; return the row numbers of each half.

    `labels` has shape `(input,)` or, if an input has several labels, `(input, label)`.
    """
    generator = np.random.default_rng(whole("seed", seed))
    kinds = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    order = generator.permutation(len(labels))
    by_kind = order[np.argsort(kinds[order], kind="stable")]
    return np.sort(by_kind[::2]), np.sort(by_kind[1::2])


def _accelerated(estimate: Floats, resampled: Floats, jackknife: Floats, z: float) -> Floats:
    """Return both endpoints of the BCa interval, in one array with shape `(endpoint, ...)`."""
    from scipy.special import ndtr, ndtri

    below = ((resampled < estimate).sum(axis=0) + (resampled <= estimate).sum(axis=0)) / 2
    bias = ndtri(np.clip(below, 0.5, len(resampled) - 0.5) / len(resampled))
    influence = jackknife.mean(axis=0) - jackknife
    spread = 6 * (influence**2).sum(axis=0) ** 1.5
    acceleration = (influence**3).sum(axis=0) / np.where(spread > 0, spread, 1.0)
    ends = []
    for side in (-z, z):
        stretch = np.maximum(1 - acceleration * (bias + side), 0.01)  # the formula assumes small accelerations
        ends.append(_quantile(resampled, ndtr(bias + (bias + side) / stretch)))
    return np.stack(ends)


def _replicated(rows: Floats, statistic: Statistic, times: Iterable[Rows]) -> Floats:
    """Return the statistic for each resample, with shape `(resample, ...)`.

    For each resample, `times` yields an array with the number of copies of each row.
    """
    return np.stack([np.asarray(statistic(np.repeat(rows, each, axis=0)), dtype=np.float64) for each in times])


def _quantile(sample: Floats, level: Floats) -> Floats:
    """Return each channel's quantile at that channel's own level. `sample` has shape `(resample, ...)`."""
    channels = zip(sample.reshape(len(sample), -1).T, level.reshape(-1), strict=True)
    return np.array([np.quantile(*channel) for channel in channels]).reshape(level.shape)
