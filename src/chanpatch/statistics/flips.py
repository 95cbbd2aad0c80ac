"""Sign-flip tests of paired differences, for each channel alone and for all channels together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .interval import FEWEST, Floats, Interval, normal_quantile, whole
from .means import cluster_numbers, mean, mean_interval, noted, rows_of, totals, withheld

_BLOCK = 256  # number of channels whose flips are in memory at once
FLIPS = 9_999  # with the observed pattern that is 10,000


@dataclass(frozen=True)
class MaxT:
    """The result of `max_t_test`.

    Attributes:
        p: P-value per channel, corrected for all channels tested.
        interval: Simultaneous interval of each mean. If it is not withheld, it excludes 0 exactly if `p` is at most
            `1 - confidence`.
    """

    p: Any
    interval: Interval[Any]


def max_t_test(
    differences: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = FLIPS,
    seed: int = 0,
) -> MaxT:
    """Return p-values and intervals of mean differences that hold for all channels together, also for the largest.

    The signs of whole pairs are flipped, and the largest absolute t statistic of all channels is noted. A corrected
    p-value is the share of flips whose largest t reaches the channel's own. The intervals reach as many standard
    errors as the largest t exceeds in `1 - confidence` of the flips. If no channel differs, a wrong claim about any of
    them has at most that probability, as the test is exact for differences that are symmetric around zero.

    Args:
        differences: `(pair, ...)`: one difference per pair; the other axes, such as channel, are kept.
        clusters: Label per pair; pairs with one label flip together. None if all pairs are independent.
        confidence: Nominal coverage of all intervals together, between 0 and 1.
        resamples: Number of sign patterns to draw if not all are used, as for `sign_flip_test`.
        seed: Random seed.

    Returns:
        Floats for differences with one axis, otherwise arrays of the other axes. The p-values are NaN for a channel
        with a NaN or an infinity, and for all with fewer than six pairs or clusters. Intervals are withheld as by
        `mean_interval`.

    Raises:
        StatisticsError: If there are no pairs, or another argument is not valid.

    Example:
        >>> differences = np.random.default_rng(0).normal(loc=[0, 2], size=(12, 2))
        >>> found = max_t_test(differences)
        >>> found.p <= 0.05, found.interval.low > 0
        (array([False,  True]), array([False,  True]))

    References:
        Westfall and Young, "Resampling-based multiple testing" (1993), section 2.3; Nichols and Holmes,
        "Nonparametric permutation tests for functional neuroimaging" (2002), for the largest statistic.
    """
    normal_quantile(confidence)  # checks it
    rows = rows_of("differences", differences)
    cluster = cluster_numbers(clusters, len(rows))
    many, known = int(cluster.max()) + 1, np.isfinite(rows).all(axis=0)
    estimate, note = mean(rows), withheld(rows, cluster)
    if many < FEWEST:
        nothing = np.full(estimate.shape, np.nan)
        return MaxT(nothing[()], noted(estimate, nothing, nothing, confidence, note))
    sums = totals(np.where(known, rows, 0.0), cluster).reshape(many, -1)
    unit = np.sqrt((sums**2).sum(axis=0))
    shares = sums / np.where(unit > 0, unit, 1.0)  # flips leave the unit, and t grows with the sum of the shares
    observed = np.abs(shares.sum(axis=0))
    patterns, exact = _patterns(many, resamples)
    largest = np.zeros(patterns)
    for some, _, flipped in _flipped(shares, patterns, None if exact else seed):
        largest[some] = np.maximum(largest[some], flipped.max(axis=1))
    largest = np.sort(largest if exact else np.append(largest, observed.max()))
    reached = len(largest) - np.searchsorted(largest, observed * (1 - 1e-9))  # rounding must not break ties
    allowed = int((1 - confidence) * len(largest) + 1e-9)  # flips that may exceed the bound
    bound = largest[-1 - allowed] * (1 + 1e-9)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = bound * np.sqrt((many - 1) / np.maximum(many - bound**2, 0.0))
        deviation = np.sqrt(np.maximum(many - observed**2, 0.0) / (many - 1))
        margin = (t * deviation * unit / len(rows)).reshape(known.shape)
    interval = noted(estimate, estimate - margin, estimate + margin, confidence, note)
    return MaxT(np.where(known, (reached / len(largest)).reshape(known.shape), np.nan)[()], interval)


def ranked_interval(differences: Floats, *, seed: int) -> Interval[Floats]:
    """Return intervals of mean differences, `(row, channel)`, which may be ranked: none excludes 0 by selection.

    An interval contains the one that holds for all channels together and the one for the channel alone, which allows
    for skewness.
    """
    one, every = mean_interval(differences), max_t_test(differences, seed=seed).interval
    low, high = np.minimum(one.low, every.low), np.maximum(one.high, every.high)
    return Interval(one.estimate, low, high, one.confidence, one.note)


def sign_flip_test(
    differences: ArrayLike, *, clusters: ArrayLike | None = None, resamples: int = FLIPS, seed: int = 0
) -> Any:
    """Return two-sided p-values for the null that paired differences are symmetric around zero, for every channel.

    The p-value is the share of sign patterns whose mean is at least as far from zero as the observed mean. All patterns
    are used if at most twice `resamples` exist; otherwise `resamples` are drawn and the observed one is added. For
    skewed differences with mean zero the test is approximate, and better with more pairs. The p-values are not
    corrected for the number of channels: `max_t_test` corrects them.

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
    rows = rows_of("differences", differences)
    cluster = cluster_numbers(clusters, len(rows))
    many, known = int(cluster.max()) + 1, np.isfinite(rows).all(axis=0)
    sums = totals(np.where(known, rows, 0.0), cluster).reshape(many, -1)
    # Rounding must not break ties with the observed pattern.
    least = np.abs(sums.sum(axis=0)) - 1e-9 * np.abs(sums).sum(axis=0)
    patterns, exact = _patterns(many, resamples)
    reached = np.zeros(sums.shape[1])
    for _, block, flipped in _flipped(sums, patterns, None if exact else seed):
        reached[block] += (flipped >= least[block]).sum(axis=0)
    p = reached / patterns if exact else (reached + 1) / (patterns + 1)
    return np.where(known, p.reshape(known.shape), np.nan)[()]


def _patterns(many: int, resamples: int) -> tuple[int, bool]:
    """Return how many sign patterns to use, and whether these are all; each pattern represents its mirror image too."""
    drawn = whole("resamples", resamples, least=1)
    exact = many - 1 <= np.log2(drawn)
    return 2 ** (many - 1) if exact else drawn, bool(exact)


def _flipped(sums: Floats, patterns: int, seed: int | None) -> Iterator[tuple[slice, slice, Floats]]:
    """Yield some patterns, a block of channels, and the absolute totals of the flipped sums, `(pattern, channel)`.

    The patterns are drawn by the seed, or all in order without one.
    """
    many, channels = sums.shape
    generator = None if seed is None else np.random.default_rng(whole("seed", seed))
    for start in range(0, patterns, 10_000):
        numbers = np.arange(start, min(start + 10_000, patterns))
        if generator is None:
            signs = 1.0 - 2.0 * ((numbers[:, None] >> np.arange(many)) & 1)
        else:
            signs = generator.integers(0, 2, size=(len(numbers), many)) * 2.0 - 1.0
        for first in range(0, channels, _BLOCK):
            block = slice(first, first + _BLOCK)
            yield slice(start, start + len(numbers)), block, np.abs(signs @ sums[:, block])
