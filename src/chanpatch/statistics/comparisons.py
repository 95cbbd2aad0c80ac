"""Comparisons of channels and groups: AUCs, rank correlations, success rates, fractions of an effect."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import StatisticsError
from .interval import Floats, Interval, booleans, finite, numbered, too_few, two_groups
from .means import clustered, limited, mean, mean_interval, mean_limits, noted, snapped, withheld
from .ranking import areas, placement_margin, placements, separated
from .resampling import bootstrap_interval

_CONFIDENCE = 0.95
_BISECTIONS = 40
_ROUNDING = 1e-12  # rounding error of `parts - estimate * totals`, relative to the size of both terms


def aucs(scores: ArrayLike, labels: ArrayLike) -> Floats:
    """Compute each channel's area under the ROC curve (AUC), without intervals; fast enough for a bootstrap.

    Args:
        scores: Finite numbers with shape `(input, channel)`, such as the sums from `chanpatch.channel_sums`.
        labels: One boolean (or 0 or 1) per input.

    Returns:
        AUCs from 0 to 1, with shape `(channel,)`; NaN if all labels are equal.

    Raises:
        StatisticsError: If there is not one label per input, or a score is not finite.

    Example:
        >>> aucs([[0.9, 1], [0.8, 1], [0.3, 1], [0.1, 1]], [True, True, False, False])
        array([1. , 0.5])
    """
    score = finite("scores", scores, ("input", "channel"))
    found: Floats = areas(score, two_groups(labels, len(score), fewest=0)[None])[0]
    return found


def auc_difference_interval(first: ArrayLike, second: ArrayLike, labels: ArrayLike) -> Interval:
    """Return the difference in AUC between two scores on the same inputs, first minus second, and its 95% interval.

    If six to nine inputs have the rarer label, the interval's note is `"few"`. The interval is withheld if fewer than
    six inputs have the rarer label, or if both scores rank most of the inputs in the same order.

    Args:
        first: One finite score per input, such as the output of a probe.
        second: One finite score per input to compare with `first`, such as a channel's sum.
        labels: One boolean (or 0 or 1) per input, with at least two positives and two negatives.

    Returns:
        Difference and interval, between -1 and 1.

    Raises:
        StatisticsError: If the lengths differ, a score is not finite, or a label occurs fewer than two times.

    Example:
        >>> labels = np.arange(200) % 2 == 0
        >>> noise = np.random.default_rng(0).normal(size=(2, 200))
        >>> gain = auc_difference_interval(2 * labels + noise[0], noise[1], labels)
        >>> gain.low > 0
        True

    References:
        DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
        characteristic curves: a nonparametric approach" (1988).
    """
    scores = [finite(name, each, ("input",)) for name, each in (("first", first), ("second", second))]
    if len(scores[0]) != len(scores[1]):
        raise StatisticsError(f"first and second must have equal lengths; got {len(scores[0])} and {len(scores[1])}.")
    label = two_groups(labels, len(scores[0]), fewest=2)
    one, other = (placements(score, label) for score in scores)
    positive, negative = one[0] - other[0], one[1] - other[1]
    note = too_few(min(positive.size, negative.size), "inputs with one label")
    if note in ("", "few") and separated(positive, negative):
        note = "both scores rank most of the inputs in the same order"
    estimate, margin = positive.mean(), placement_margin(positive, negative, _CONFIDENCE)
    low, high = np.clip([estimate - margin, estimate + margin], -1.0, 1.0)
    return noted(estimate, low, high, _CONFIDENCE, np.asarray(note, dtype="<U100"))


def rank_correlation(first: ArrayLike, second: ArrayLike, strata: ArrayLike | None = None) -> float:
    """Return the Spearman rank correlation between two samples, with ranks within each stratum if strata are given.

    Args:
        first: One finite number per input.
        second: One finite number per input to correlate with `first`.
        strata: Stratum label for each input, or None if all inputs form one stratum.

    Returns:
        A number from -1 to 1; NaN if there are fewer than three inputs, or if a sample is constant in every stratum.

    Raises:
        StatisticsError: If the lengths differ, or a number is not finite.

    Example:
        >>> rank_correlation([1, 2, 3, 4], [1, 4, 9, 16])
        1.0
    """
    import scipy.stats

    samples = [finite(name, each, ("input",)) for name, each in (("first", first), ("second", second))]
    stratum = numbered(np.zeros(len(samples[0])) if strata is None else strata)[1]
    if not len(samples[0]) == len(samples[1]) == len(stratum):
        raise StatisticsError(
            "first, second and strata must have equal lengths, one entry per input; got lengths "
            f"{len(samples[0])}, {len(samples[1])} and {len(stratum)}."
        )
    size, ranks = np.bincount(stratum), []
    for sample in samples:
        # Rank all inputs, one stratum after the other; subtracting a stratum's mean rank removes its offset.
        rank = scipy.stats.rankdata(np.unique(sample, return_inverse=True)[1] + stratum * len(sample))
        ranks.append((rank - (np.bincount(stratum, rank) / size)[stratum]) / size[stratum])
    scale = float(np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))
    return float(ranks[0] @ ranks[1]) / scale if len(stratum) > 2 and scale > 0 else np.nan


def stratified_difference_interval(
    success: ArrayLike, first: ArrayLike, strata: ArrayLike, *, resamples: int = 9999, seed: int = 0
) -> Interval:
    """Compare the success rates of two groups within strata: return the difference and its 95% bootstrap interval.

    Use this function to compare two groups at equal values of a third quantity, such as the distance to a goal. Strata
    with only one group are excluded; the other strata are combined with Mantel-Haenszel weights. If the rarer outcome
    (success or failure) occurs six to nine times in the combined strata, the interval's note is `"few"`; if the rarer
    outcome occurs fewer than six times, the interval is withheld.

    Args:
        success: One boolean (or 0 or 1) per input.
        first: One boolean (or 0 or 1) per input: whether the input belongs to the first group.
        strata: Stratum label for each input, such as a bin of distances.
        resamples: Number of resamples.
        seed: Random seed.

    Returns:
        First rate minus second rate, between -1 and 1, and its interval. The estimate and the interval are NaN if no
        stratum contains both groups.

    Raises:
        StatisticsError: If the lengths differ, or `success` or `first` is not boolean.

    Example:
        >>> interval = stratified_difference_interval([1, 0, 1, 0], [1, 1, 0, 0], ["near", "far", "near", "near"])
        >>> interval.estimate
        0.5

    References:
        Mantel and Haenszel, "Statistical aspects of the analysis of data from retrospective studies of disease" (1959).
    """
    one, other, stratum = booleans(success), booleans(first), numbered(strata)[1]
    if one is None or other is None or one.ndim != 1 or not one.shape == other.shape == stratum.shape or not one.size:
        kinds = [f"{array.dtype} of shape {array.shape}" for array in map(np.asarray, (success, first, strata))]
        raise StatisticsError(
            "success and first must have one boolean per input, and strata must have one label per input; got "
            f"{kinds[0]}, {kinds[1]} and {kinds[2]}."
        )
    count = int(stratum.max()) + 1

    def difference(rows: Floats) -> float:
        place = (rows[:, 1] * count + rows[:, 2]).astype(np.int64)
        n = np.bincount(place, minlength=2 * count).reshape(2, count)
        rate = np.bincount(place, rows[:, 0], minlength=2 * count).reshape(2, count) / np.maximum(n, 1)
        weight = n.prod(axis=0) / np.maximum(n.sum(axis=0), 1)
        return float((rate[1] - rate[0]) @ weight / weight.sum()) if weight.any() else np.nan

    interval = bootstrap_interval(np.column_stack([one, other, stratum]), difference, resamples=resamples, seed=seed)
    sizes = np.array([np.bincount(stratum[group], minlength=count) for group in (other, ~other)])
    shared = one[sizes.all(axis=0)[stratum]]
    return limited(interval, min(int(shared.sum()), int((~shared).sum())), "inputs with one outcome")


def share_interval(part: ArrayLike, total: ArrayLike, *, clusters: ArrayLike | None = None) -> Interval[Any]:
    """Return the fraction of a total effect that a part accounts for, and its 95% interval.

    The fraction is a ratio of means over the same inputs, such as the effect of patching some channels divided by the
    effect of patching all channels. The fraction may lie below 0 or above 1. The interval contains every ratio r for
    which the `mean_interval` of `part - r * total` contains 0. The interval is withheld if the interval for the total
    contains 0.

    Args:
        part: Effect of the part on each input, such as a change in log odds, with shape `(input, ...)`.
        total: Total effect on each of the same inputs, with the same shape as `part`.
        clusters: Same as for `mean_interval`.

    Returns:
        An interval of floats if `part` and `total` have one axis, otherwise of arrays with the remaining axes. The
        estimate is NaN if the mean of `total` is 0.

    Raises:
        StatisticsError: If the shapes differ, a number is not finite, or there are no inputs.

    Example:
        >>> share_interval([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).estimate
        0.5

    References:
        Fieller, "Some problems in interval estimation" (1954).
    """
    parts, cluster, _ = clustered("part", finite("part", part), clusters)
    totals = finite("total", total)
    if parts.shape != totals.shape:
        raise StatisticsError(f"part and total must have the same shape; got {parts.shape} and {totals.shape}.")
    whole = mean_interval(totals, clusters=clusters)
    average = np.asarray(whole.estimate)
    estimate = mean(parts) / np.where(average == 0, np.nan, average)
    rest = snapped(parts - estimate * totals, np.abs(parts) + np.abs(estimate * totals), _ROUNDING)
    scale, limits = rest.std(axis=0) / np.abs(average), []
    for side in (-1.0, 1.0):
        inside, outside = np.zeros(estimate.shape), np.ones(estimate.shape)  # distances, mapped from (0, inf) to (0, 1)
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            ratio = estimate + side * scale * middle / (1 - middle)
            low, high = mean_limits(parts - ratio * totals, cluster, _CONFIDENCE)
            contained = (low <= 0) & (high >= 0)
            inside, outside = np.where(contained, middle, inside), np.where(contained, outside, middle)
        limits.append(ratio)
    note = withheld(rest, cluster)
    note = np.where(np.isin(note, ("", "few")), note, "too few rows deviate from the overall fraction")
    note = np.where((whole.low <= 0) & (whole.high >= 0), "the interval for the total contains 0", note)
    note = np.where(np.isnan(whole.low), whole.note, note)
    return noted(estimate, limits[0], limits[1], _CONFIDENCE, note)
