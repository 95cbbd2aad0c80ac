"""Bootstrap intervals and sign-flip tests over rows or clusters of rows, for all channels at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StatisticsError
from .interval import Floats, Interval, normal_quantile, whole

Rows = NDArray[np.int64]
Statistic = Callable[[Floats], Any]

_BLOCK = 256  # number of channels whose resamples are in memory at once


def mean(sample: Floats) -> Floats:
    """Return the mean over the rows."""
    # Relative to one of the rows: the mean of equal rows is then exact.
    average: Floats = sample[0] + np.mean(sample - sample[0], axis=0)
    return average


def bootstrap_interval(
    sample: ArrayLike,
    statistic: Statistic = mean,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval[Any]:
    """Return a statistic of a sample and its bootstrap interval, for every channel separately.

    The interval is bias-corrected and accelerated (BCa). All channels share the same resamples, so the interval of a
    channel does not depend on the other channels. With few rows or clusters any bootstrap is too narrow: at nominal
    95%, ten normal rows give a coverage of about 89%, thirty about 93%.

    Args:
        sample: `(row, ...)`: one row per input or, for a paired comparison, one difference per pair. The other axes,
            such as channel, are kept.
        statistic: Function that reduces the first axis of `(row, ...)`; the order of the rows must not matter. The
            mean is fast; any other function is called once per resample.
        clusters: Label per row; rows with one label, such as rotations of one maze, are drawn together. None if all
            rows are independent.
        confidence: Nominal coverage, between 0 and 1.
        resamples: Number of resamples.
        seed: Random seed.

    Returns:
        Floats for a sample with one axis, otherwise arrays of the statistic's shape. The ends are NaN for a channel
        with a NaN or an infinity, and for all channels with fewer than two rows or clusters. Equal rows have width 0.

    Raises:
        StatisticsError: If there are no rows, or another argument is not valid.

    Example:
        >>> differences = np.random.default_rng(0).normal(loc=[0, 1], size=(40, 2))
        >>> interval = bootstrap_interval(differences, seed=0)
        >>> interval.low < interval.estimate
        array([ True,  True])

    References:
        Efron and Tibshirani, "An introduction to the bootstrap" (1993), section 14.3; Davison and Hinkley,
        "Bootstrap methods and their application" (1997), section 3.8, for clusters.
    """
    rows = _rows("sample", sample)
    cluster = _cluster_numbers(clusters, len(rows))
    z = normal_quantile(confidence)
    generator = np.random.default_rng(whole("seed", seed))
    many = int(cluster.max()) + 1
    drawn = generator.multinomial(many, np.full(many, 1 / many), size=whole("resamples", resamples, least=1))
    one_out = 1 - np.eye(many, dtype=np.int64)
    flat = rows.reshape(len(rows), -1)
    blocks = np.split(flat, range(_BLOCK, flat.shape[1], _BLOCK), axis=1) if statistic is mean else [rows]
    with np.errstate(invalid="ignore"):  # of channels with an infinity
        estimate = np.asarray(statistic(rows), dtype=np.float64)
        ends = [_accelerated(block, statistic, drawn[:, cluster], one_out[:, cluster], z) for block in blocks]
    low, high = np.concatenate(ends, axis=-1).reshape(2, *estimate.shape)
    return Interval(estimate[()], low[()], high[()], confidence)


def sign_flip_test(
    differences: ArrayLike, *, clusters: ArrayLike | None = None, resamples: int = 9999, seed: int = 0
) -> Any:
    """Return two-sided p-values for the null that paired differences are symmetric around zero, for every channel.

    The p-value is the share of sign patterns whose mean is at least as far from zero as the observed mean. All patterns
    are used if at most twice `resamples` exist; otherwise `resamples` are drawn and the observed one is added. For
    skewed differences with mean zero the test is approximate, and better with more pairs.

    Args:
        differences: `(pair, ...)`: one difference per pair; the other axes, such as channel, are kept.
        clusters: Label per pair; pairs with one label flip together. None if all pairs are independent.
        resamples: Number of sign patterns to draw if not all are used.
        seed: Random seed.

    Returns:
        A float for differences with one axis, otherwise an array of the other axes; NaN for a channel with a NaN or an
        infinity. The smallest p-value is `2 / 2**k` for k clusters (0.031 for six, 0.063 for five), or
        `1 / (resamples + 1)` if patterns are drawn.

    Raises:
        StatisticsError: If there are no pairs, or another argument is not valid.

    Example:
        >>> float(sign_flip_test([0.2, 0.9, 0.4, 0.3, 0.8, 0.1], seed=0))
        0.03125

    References:
        Fisher, "The design of experiments" (1935), section 21; Winkler et al., "Permutation inference for the
        general linear model" (2014), sign-flipping, and (2015) for flips of whole blocks.
    """
    rows = _rows("differences", differences)
    cluster = _cluster_numbers(clusters, len(rows))
    many, drawn = int(cluster.max()) + 1, whole("resamples", resamples, least=1)
    exact = many - 1 <= np.log2(drawn)
    patterns = 2 ** (many - 1) if exact else drawn  # each pattern represents its mirror image too
    flat = rows.reshape(len(rows), -1)
    known = np.isfinite(flat).all(axis=0)
    totals = np.zeros((many, flat.shape[1]))
    np.add.at(totals, cluster, np.where(known, flat, 0.0))
    # Rounding must not break ties with the observed pattern.
    least = np.abs(totals.sum(axis=0)) - 1e-9 * np.abs(totals).sum(axis=0)
    reached = np.zeros(flat.shape[1])
    for signs in _signs(many, patterns, None if exact else np.random.default_rng(whole("seed", seed))):
        for start in range(0, len(reached), _BLOCK):
            block = slice(start, start + _BLOCK)
            reached[block] += (np.abs(signs @ totals[:, block]) >= least[block]).sum(axis=0)
    p = reached / patterns if exact else (reached + 1) / (patterns + 1)
    return np.where(known, p, np.nan).reshape(rows.shape[1:])[()]


def halves(labels: NDArray[Any], seed: int) -> tuple[Rows, Rows]:
    """Return the rows of two random halves, stratified by the labels: `(input,)` or `(input, label)`."""
    generator = np.random.default_rng(whole("seed", seed))
    kinds = np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)
    order = generator.permutation(len(labels))
    by_kind = order[np.argsort(kinds[order], kind="stable")]
    return np.sort(by_kind[::2]), np.sort(by_kind[1::2])


def _accelerated(rows: Floats, statistic: Statistic, drawn: Rows, one_out: Rows, z: float) -> Floats:
    """Return the two ends of the BCa interval: `(end, ...)`."""
    from scipy.special import ndtr, ndtri

    estimate = np.asarray(statistic(rows), dtype=np.float64)
    if len(one_out) < 2:
        return np.full((2, *estimate.shape), np.nan)
    resampled, jackknife = _replicated(rows, statistic, drawn), _replicated(rows, statistic, one_out)
    known = np.isfinite(estimate) & np.isfinite(resampled).all(axis=0) & np.isfinite(jackknife).all(axis=0)
    resampled, jackknife = np.where(known, resampled, 0.0), np.where(known, jackknife, 0.0)
    below = ((resampled < estimate).sum(axis=0) + (resampled <= estimate).sum(axis=0)) / 2
    bias = ndtri(np.clip(below, 0.5, len(drawn) - 0.5) / len(drawn))
    influence = jackknife.mean(axis=0) - jackknife
    spread = 6 * (influence**2).sum(axis=0) ** 1.5
    acceleration = (influence**3).sum(axis=0) / np.where(spread > 0, spread, 1.0)
    ends = []
    for side in (-z, z):
        stretch = np.maximum(1 - acceleration * (bias + side), 0.01)  # the formula is for small accelerations
        ends.append(_quantile(resampled, ndtr(bias + (bias + side) / stretch)))
    return np.where(known, np.stack(ends), np.nan)


def _replicated(rows: Floats, statistic: Statistic, times: Rows) -> Floats:
    """Return the statistic of resamples, each given by how often it repeats every row: `(resample, ...)`."""
    if statistic is mean:
        offsets = (rows - rows[0]).reshape(len(rows), -1)
        means = times.astype(np.float64) @ offsets / times.sum(axis=1, keepdims=True)
        around: Floats = means.reshape(len(times), *rows.shape[1:]) + rows[0]
        return around
    return np.stack([np.asarray(statistic(np.repeat(rows, each, axis=0)), dtype=np.float64) for each in times])


def _quantile(sample: Floats, level: Floats) -> Floats:
    """Return the interpolated quantile of each channel, at one level per channel."""
    ordered = np.sort(np.moveaxis(sample, 0, -1), axis=-1)
    position = level * (len(sample) - 1)
    under = np.clip(np.floor(position).astype(np.int64), 0, len(sample) - 2)[..., None]
    low, high = np.take_along_axis(ordered, under, -1)[..., 0], np.take_along_axis(ordered, under + 1, -1)[..., 0]
    quantile: Floats = low + (position - under[..., 0]) * (high - low)
    return quantile


def _signs(many: int, patterns: int, generator: np.random.Generator | None) -> Iterator[Floats]:
    """Yield sign patterns, `(pattern, cluster)`, in chunks: drawn, or all in order without a generator."""
    for start in range(0, patterns, 10_000):
        numbers = np.arange(start, min(start + 10_000, patterns))
        if generator is None:
            yield 1.0 - 2.0 * ((numbers[:, None] >> np.arange(many)) & 1)
        else:
            yield generator.integers(0, 2, size=(len(numbers), many)) * 2.0 - 1.0


def _rows(name: str, sample: ArrayLike) -> Floats:
    rows = np.asarray(sample, dtype=np.float64)
    if rows.ndim == 0 or not rows.size:
        raise StatisticsError(f"{name} has shape {rows.shape}: give at least one row, on the first axis.")
    return rows


def _cluster_numbers(clusters: ArrayLike | None, rows: int) -> Rows:
    if clusters is None:
        return np.arange(rows)
    labels = np.asarray(clusters)
    if labels.shape != (rows,):
        raise StatisticsError(f"clusters has shape {labels.shape}, but there are {rows} rows: give one label per row.")
    numbers: Rows = np.unique(labels, return_inverse=True)[1]
    return numbers
