"""Sign-flip tests for paired differences, for each channel separately and for all channels at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .interval import FEWEST, Floats, Interval, quantile, whole
from .means import clustered, mean, mean_interval, noted, totals, withheld

_BLOCK = 256  # number of channels to flip at a time, to limit memory
_SIGNS = 2**22  # number of signs to draw at a time, to limit memory to 32 MB
FLIPS = 9_999  # default number of sign patterns to draw; 10,000 with the observed pattern


@dataclass(frozen=True)
class MaxT:
    """Result of `max_t_test`.

    Attributes:
        p: P-value for each channel, corrected for the number of channels.
        interval: Simultaneous interval for each channel's mean. An interval that is not withheld excludes 0 if and only
            if the channel's `p` is at most `1 - confidence`.
    """

    p: Any
    interval: Interval[Any]


def max_t_test(  # noqa: D417  # the other arguments are documented in sign_flip_test
    differences: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    confidence: float = 0.95,
    resamples: int = FLIPS,
    seed: int = 0,
) -> MaxT:
    """Test all channels' mean differences at once. P-values and intervals are corrected for the number of channels.

    The results remain valid if you report only the channels with the largest differences. A sign pattern multiplies all
    differences of a pair or cluster, in every channel, by the same sign, 1 or -1. For each sign pattern, the largest
    absolute t statistic over channels is computed. A channel's corrected p-value is the fraction of sign patterns whose
    largest t is at least as large as the channel's own absolute t. The half-width of the intervals, in standard errors,
    is the `confidence` quantile of the largest t. The test is exact if the differences are symmetric around zero in
    every channel: the probability that any `p` is at most `1 - confidence` is then at most `1 - confidence`.

    Args:
        differences: One difference per pair, with shape `(pair, ...)`. The other axes, such as channel, are kept.
        clusters, resamples, seed: Same as for `sign_flip_test`.
        confidence: Nominal joint coverage of all intervals, between 0 and 1.

    Returns:
        P-values and intervals: floats if `differences` has one axis, otherwise arrays with the remaining axes. P-values
        are NaN for channels that contain NaN or infinity, and for all channels if there are fewer than six pairs or
        clusters. Intervals are withheld for the same reasons as in `mean_interval`.

    Raises:
        StatisticsError: If there are no pairs, or another argument is invalid.

    Example:
        >>> differences = np.random.default_rng(0).normal(loc=[0, 2], size=(12, 2))
        >>> found = max_t_test(differences)
        >>> found.p <= 0.05, found.interval.low > 0
        (array([False,  True]), array([False,  True]))

    References:
        Westfall and Young, "Resampling-based multiple testing" (1993), section 2.3; Nichols and Holmes,
        "Nonparametric permutation tests for functional neuroimaging" (2002), for the maximum statistic.
    """
    quantile(confidence)  # raises an error if the confidence is invalid
    rows, cluster, many = clustered("differences", differences, clusters)
    known, estimate, note = np.isfinite(rows).all(axis=0), mean(rows), withheld(rows, cluster)
    if many < FEWEST:
        nothing = np.full(estimate.shape, np.nan)
        return MaxT(nothing[()], noted(estimate, nothing, nothing, confidence, note))
    sums = totals(np.where(known, rows, 0.0), cluster).reshape(many, -1)
    unit = np.sqrt((sums**2).sum(axis=0))
    scaled = sums / np.where(unit > 0, unit, 1.0)  # flips do not change the unit, and t increases with the sum
    observed = np.abs(scaled.sum(axis=0))
    patterns, exact = _patterns(many, resamples)
    largest = np.zeros(patterns)
    for some, _, flipped in _flipped(scaled, patterns, None if exact else seed):
        largest[some] = np.maximum(largest[some], flipped.max(axis=1))
    largest = np.sort(largest if exact else np.append(largest, observed.max()))
    reached = len(largest) - np.searchsorted(largest, observed * (1 - 1e-9))  # rounding must not break ties
    allowed = int((1 - confidence) * len(largest) + 1e-9)  # number of flips that may exceed the bound
    bound = largest[-1 - allowed] * (1 + 1e-9)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = bound * np.sqrt((many - 1) / np.maximum(many - bound**2, 0.0))
        deviation = np.sqrt(np.maximum(many - observed**2, 0.0) / (many - 1))
        margin = (t * deviation * unit / len(rows)).reshape(known.shape)
    interval = noted(estimate, estimate - margin, estimate + margin, confidence, note)
    return MaxT(np.where(known, (reached / len(largest)).reshape(known.shape), np.nan)[()], interval)


def ranked_interval(differences: Floats, *, clusters: ArrayLike | None = None, seed: int) -> Interval[Floats]:
    """Return an interval for each channel's mean difference. The intervals are valid for channels selected by rank.

    `differences` has shape `(row, channel)`. Each interval contains both the channel's simultaneous interval and the
    channel's individual `mean_interval`, which is corrected for skewness. With more than 3,355 rows, fewer sign
    patterns are drawn than `max_t_test` draws by default, to save time.
    """
    flips = min(FLIPS, max(999, 2**25 // len(differences)))
    one = mean_interval(differences, clusters=clusters)
    every = max_t_test(differences, clusters=clusters, resamples=flips, seed=seed).interval
    low, high = np.minimum(one.low, every.low), np.maximum(one.high, every.high)
    return Interval(one.estimate, low, high, one.confidence, np.where(np.isnan(one.low), one.note, every.note))


def sign_flip_test(
    differences: ArrayLike, *, clusters: ArrayLike | None = None, resamples: int = FLIPS, seed: int = 0
) -> Any:
    """Return each channel's two-sided p-value for the null hypothesis that differences are symmetric around zero.

    A sign pattern multiplies each difference by 1 or -1. The p-value is the fraction of sign patterns for which the
    resulting mean is at least as far from zero as the observed mean. If there are at most `2 * resamples` patterns, all
    patterns are used; otherwise, `resamples` patterns are drawn and the observed pattern is added. For skewed
    differences with mean zero, the test is approximate and improves with more pairs. The p-values are not corrected for
    the number of channels; use `max_t_test` for that.

    Args:
        differences: One difference per pair, with shape `(pair, ...)`. The other axes, such as channel, are kept.
        clusters: Cluster label for each pair, or None if all pairs are independent. Pairs with the same label flip
            together.
        resamples: Number of sign patterns to draw if not all patterns are used.
        seed: Random seed.

    Returns:
        A float if `differences` has one axis, otherwise an array with the remaining axes; NaN for channels that contain
        NaN or infinity. The smallest possible p-value is `2 / 2**k` for k clusters (0.031 for six, 0.063 for five), or
        `1 / (resamples + 1)` if patterns are drawn.

    Raises:
        StatisticsError: If there are no pairs, or another argument is invalid.

    Example:
        >>> float(sign_flip_test([0.2, 0.9, 0.4, 0.3, 0.8, 0.1], seed=0))
        0.03125

    References:
        Fisher, "The design of experiments" (1935), section 21; Winkler et al., "Permutation inference for the
        general linear model" (2014), for sign flipping, and (2015) for flipping whole blocks.
    """
    rows, cluster, many = clustered("differences", differences, clusters)
    known = np.isfinite(rows).all(axis=0)
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
    """Return the number of sign patterns to use for `many` clusters, and whether these patterns are complete.

    The patterns are complete if they include, for every possible pattern, either that pattern or its mirror image,
    which has the same absolute mean.
    """
    drawn = whole("resamples", resamples, least=1)
    exact = many - 1 <= np.log2(drawn)
    return 2 ** (many - 1) if exact else drawn, bool(exact)


def _flipped(sums: Floats, patterns: int, seed: int | None) -> Iterator[tuple[slice, slice, Floats]]:
    """Flip the signs of each cluster's sums, add up the clusters, and yield the absolute totals, block by block.

    `sums` has shape `(cluster, channel)`. For each block, yield the slice of patterns, the slice of channels, and the
    absolute totals with shape `(pattern, channel)`. With a seed, the patterns are drawn at random; without a seed, all
    patterns are used in order.
    """
    many, channels = sums.shape
    generator = None if seed is None else np.random.default_rng(whole("seed", seed))
    step = max(min(10_000, _SIGNS // many), 1)
    for start in range(0, patterns, step):
        numbers = np.arange(start, min(start + step, patterns))
        if generator is None:
            signs = 1.0 - 2.0 * ((numbers[:, None] >> np.arange(many)) & 1)
        else:
            signs = generator.integers(0, 2, size=(len(numbers), many)) * 2.0 - 1.0
        for first in range(0, channels, _BLOCK):
            block = slice(first, first + _BLOCK)
            yield slice(start, start + len(numbers)), block, np.abs(signs @ sums[:, block])
