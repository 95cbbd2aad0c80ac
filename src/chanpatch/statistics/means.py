"""Confidence intervals for the mean of each channel, and reasons to withhold intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ChanpatchError, StatisticsError
from .interval import FEW, FEWEST, Floats, Interval, few_others, floats, quantile, too_few

Rows = NDArray[np.int64]


def mean_interval(sample: ArrayLike, *, clusters: ArrayLike | None = None, confidence: float = 0.95) -> Interval[Any]:
    """Return the mean of a sample and its confidence interval, for each channel separately.

    With at least ten independent rows, the interval contains both Student's t interval and a t interval corrected for
    skewness by Hall's transformation. Such an interval is valid for symmetric and skewed samples. With six to nine
    independent rows, the interval is Student's t interval, and the note is `"few"`. The interval is withheld if there
    are fewer than six independent rows or clusters, if fewer than six rows or clusters have a nonzero value, or if most
    rows or clusters are equal. A withheld interval has NaN as both endpoints, and the note contains the reason.

    Args:
        sample: One row per input or, for a paired comparison, one difference per pair, with shape `(row, ...)`. The
            other axes, such as channel, are kept.
        clusters: Cluster label for each row, or None if all rows are independent. Rows with the same label, such as
            rotations of one maze, are not independent.
        confidence: Nominal coverage, between 0 and 1.

    Returns:
        An interval of floats, with a string as its note, if `sample` has one axis; otherwise, an interval of arrays
        with the remaining axes.

    Raises:
        StatisticsError: If there are no rows, or another argument is invalid.

    Example:
        >>> interval = mean_interval([0.2, 0.9, 0.4, 0.3, 0.8, 0.1, 0.5])
        >>> print(f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f}), {interval.note}")
        0.46 (0.18 to 0.73), few

    References:
        Hall, "On the removal of skewness by transformation" (1992), for the correction; Cameron and Miller, "A
        practitioner's guide to cluster-robust inference" (2015), section II, for clusters.
    """
    rows, cluster, _ = clustered("sample", sample, clusters)
    limits = mean_limits(rows, cluster, confidence)
    return noted(mean(rows), limits[0], limits[1], confidence, withheld(rows, cluster))


def mean_limits(rows: Floats, cluster: Rows, confidence: float) -> tuple[Floats, Floats]:
    """Return each channel's lower and upper confidence limits, even if `mean_interval` withholds the interval."""
    many = int(cluster.max()) + 1
    estimate, t = mean(rows), quantile(confidence, many - 1)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # Subtract the mean first, so that clusters of different sizes are weighted by their numbers of rows.
        influence = totals(rows - estimate, cluster) * (many / len(rows))
        error = np.sqrt((influence**2).sum(axis=0) / (many * max(many - 1, 1)))
        below, above = np.array(-t), np.array(t)
        if many >= FEW:
            skewness = (influence**3).sum(axis=0) * many**0.5 / (influence**2).sum(axis=0) ** 1.5
            skewness *= math.sqrt(many * (many - 1)) / (many - 2)
            below, above = np.fmin(-t, _uncorrected(-t, skewness, many)), np.fmax(t, _uncorrected(t, skewness, many))
        return estimate - above * error, estimate - below * error


def mean(rows: Floats) -> Floats:
    """Return each channel's mean over the rows."""
    # Average the differences from the first row, so that the mean of equal rows is exact.
    with np.errstate(invalid="ignore"):  # for channels that contain infinity
        average: Floats = rows[0] + np.mean(rows - rows[0], axis=0)
    return average


def _uncorrected(t: float, skewness: Floats, many: int) -> Floats:
    """Return the t statistic that Hall's skewness correction, a cubic transformation, maps to `t`."""
    bend = skewness / (3 * many**0.5)
    shifted = t - skewness / (6 * many**0.5)
    bent: Floats = (np.cbrt(1 + 3 * bend * shifted) - 1) / np.where(bend == 0, 1.0, bend)
    return np.where(np.abs(bend) < 1e-9, shifted, bent)


def snapped(differences: Floats, size: Floats, rounding: float) -> Floats:
    """Return differences without rounding error, with shape `(row, ...)`.

    `size` contains the magnitudes of the numbers that were subtracted. A difference close to 0 is set to 0, and a
    difference close to the channel's median difference is set to the median. "Close" means within `rounding` times the
    difference's own size or the channel's median size, whichever is larger.
    """
    size = np.where(np.isfinite(size), np.abs(size), 0.0)
    slack = rounding * np.maximum(size, np.median(size, axis=0))
    middle = np.sort(differences, axis=0)[len(differences) // 2]
    with np.errstate(invalid="ignore"):  # for channels that contain infinity
        snapped = np.where(np.abs(differences - middle) <= slack, middle, differences)
    return np.where(np.abs(snapped) <= slack, 0.0, snapped)


def withheld(rows: Floats, cluster: Rows) -> NDArray[np.str_]:
    """For each channel, return the reason to withhold the interval for the mean, or an empty string."""
    many = int(cluster.max()) + 1
    kind = "rows" if many == len(rows) else "clusters"
    why = np.full(rows.shape[1:], too_few(many, kind), dtype="<U100")
    if many < FEWEST:
        return why
    rows = snapped(rows, rows, 8 * float(np.finfo(np.float64).eps))
    nonzero = _clusters_with(rows != 0, cluster)
    off = _clusters_with(rows != np.sort(rows, axis=0)[len(rows) // 2], cluster)
    why[few_others(off, many)] = f"most of the {many} {kind} are equal"
    why[nonzero < FEWEST] = f"fewer than {FEWEST} of the {many} {kind} have a nonzero value"
    why[~np.isfinite(rows).all(axis=0)] = "a row is not finite"
    return why


def noted(estimate: Floats, low: Floats, high: Floats, confidence: float, note: NDArray[np.str_]) -> Interval[Any]:
    """Return an interval with the given note.

    Both endpoints are set to NaN if the note is a reason to withhold the interval, or if `low` or `high` is not finite.
    In the second case, an empty note or the note `"few"` is replaced by the reason.
    """
    allowed, bounded = np.isin(note, ("", "few")), np.isfinite(low) & np.isfinite(high)
    unbounded = "there are too few rows, or their values are too similar in magnitude, to bound the mean"
    note = np.where(allowed & ~bounded, unbounded, note)
    low, high = (np.where(allowed & bounded, each, np.nan) for each in (low, high))
    return Interval(estimate[()], low[()], high[()], confidence, note[()])


def limited(interval: Interval[Any], independent: int, kind: str) -> Interval[Any]:
    """Return the interval; if there are too few independent inputs, mark the interval `"few"` or withhold it.

    `independent` is the number of independent inputs, and `kind` is the noun for these inputs in the note.
    """
    note = too_few(independent, kind)
    notes = np.where(np.isin(interval.note, ("", "few")) & (note != ""), note, interval.note)
    estimate, low, high = map(np.asarray, (interval.estimate, interval.low, interval.high))
    return noted(estimate, low, high, interval.confidence, notes)


def totals(rows: Floats, cluster: Rows) -> Floats:
    """Return the sum over the rows in each cluster, with shape `(cluster, ...)`."""
    if len(rows) == cluster.max() + 1:
        return rows[np.argsort(cluster)]
    sums = np.zeros((int(cluster.max()) + 1, *rows.shape[1:]))
    np.add.at(sums, cluster, rows)
    return sums


def _clusters_with(marked: NDArray[np.bool_], cluster: Rows) -> Rows:
    """For each channel, return the number of clusters with at least one row that is True in `marked`."""
    count: Rows = (totals(marked.astype(np.float64), cluster) > 0).sum(axis=0)
    return count


def clustered(name: str, sample: ArrayLike, clusters: ArrayLike | None) -> tuple[Floats, Rows, int]:
    """Return a sample's rows as an array of floats, the cluster number of each row, and the number of clusters."""
    rows = floats(sample)
    if rows.ndim == 0 or not rows.size:
        raise StatisticsError(f"{name} must have at least one row on its first axis; got shape {rows.shape}.")
    cluster = cluster_numbers(clusters, len(rows))
    return rows, cluster, int(cluster.max()) + 1


def cluster_numbers(clusters: ArrayLike | None, rows: int, error: type[ChanpatchError] = StatisticsError) -> Rows:
    """Return the cluster number of each row. If `clusters` is None, each row is its own cluster."""
    if clusters is None:
        return np.arange(rows)
    labels = np.asarray(clusters)
    if labels.shape != (rows,):
        raise error(
            f"clusters must have one label for each of the {rows} rows (inputs or pairs); got shape {labels.shape}."
        )
    for row, label in enumerate(labels.tolist()):
        if label is None or label != label:  # NaN
            raise error(f"clusters[{row}] must be a label; got {label}. Label this input or pair, or leave it out.")
    known: dict[Any, int] = {}
    if labels.dtype == object:  # labels of different types cannot be sorted
        return np.array([known.setdefault(label, len(known)) for label in labels.tolist()])
    numbers: Rows = np.unique(labels, return_inverse=True)[1]
    return numbers
