"""Intervals of means against scipy and formulas written out, and the reasons to withhold them."""

import math

import numpy as np
import pytest
import scipy.stats

from chanpatch.statistics import mean_interval


def random(seed=0):
    return np.random.default_rng(seed)


def t_interval(sample, confidence=0.95):
    return tuple(scipy.stats.ttest_1samp(sample, 0).confidence_interval(confidence))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("rows", [6, 9])
def test_few_rows_give_students_t_interval_and_a_note(rows, confidence):
    sample = random().exponential(size=rows)
    interval = mean_interval(sample, confidence=confidence)
    assert (interval.low, interval.high) == pytest.approx(t_interval(sample, confidence))
    assert (interval.estimate, interval.note) == (pytest.approx(sample.mean()), "few")


def halls_statistic(mean, sample):
    """The t statistic of a mean, corrected for skewness: Hall (1992), the cubic transformation."""
    n, skewness = len(sample), scipy.stats.skew(sample, bias=False)
    t = (sample.mean() - mean) / (sample.std(ddof=1) / n**0.5)
    return t + skewness * t**2 / (3 * n**0.5) + skewness**2 * t**3 / (27 * n) + skewness / (6 * n**0.5)


@pytest.mark.parametrize("sign", [-1, 1])
def test_from_ten_rows_on_the_interval_joins_those_of_t_and_of_t_corrected_for_skewness(sign):
    sample = sign * random().lognormal(size=25)
    interval = mean_interval(sample)
    low, high = t_interval(sample)
    t = scipy.stats.t.ppf(0.975, 24)
    corrected = [
        scipy.optimize.brentq(lambda mean, side=side: halls_statistic(mean, sample) - side, -50, 50) for side in (t, -t)
    ]
    assert (interval.low, interval.high) == pytest.approx((min(low, corrected[0]), max(high, corrected[1])))
    assert interval.high - interval.low > high - low and interval.note == ""


def test_symmetric_rows_give_students_t_interval():
    sample = np.concatenate([half := random().normal(size=8), -half])
    interval = mean_interval(sample)
    assert (interval.low, interval.high) == pytest.approx(t_interval(sample))


def test_a_channel_has_the_same_interval_alone_and_among_others_and_axes_are_kept():
    sample = random().normal(size=(20, 3, 2))
    together, alone = mean_interval(sample), mean_interval(sample[:, 1, 1])
    assert together.estimate.shape == together.low.shape == together.note.shape == (3, 2)
    assert (alone.low, alone.high) == pytest.approx((together.low[1, 1], together.high[1, 1]), rel=1e-12)


def test_clusters_of_equal_size_count_by_their_means():
    sample, labels = random().normal(size=(12, 4)), np.tile(list("dcba"), 12)
    interval = mean_interval(sample.ravel(), clusters=np.repeat(np.arange(12), 4))
    expected = mean_interval(sample.mean(axis=1))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(mean_interval(sample.ravel(), clusters=labels).low)


def test_clusters_of_several_sizes_have_the_robust_standard_error():
    labels = np.repeat(np.arange(8), 1 + np.arange(8))
    sample = random().normal(size=36) + random(1).normal(size=8)[labels]
    interval = mean_interval(sample, clusters=labels)
    apart = np.bincount(labels, sample - sample.mean())
    error = np.sqrt((apart**2).sum() * 8 / 7) / 36
    assert interval.high - interval.estimate == pytest.approx(scipy.stats.t.ppf(0.975, 7) * error)


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ([1.0], "1 independent row, fewer than 6"),
        (np.arange(5.0), "5 independent rows, fewer than 6"),
        (np.zeros(10), "fewer than 6 of the 10 rows have a nonzero value"),
        (np.r_[np.zeros(25), np.arange(1.0, 6)], "fewer than 6 of the 30 rows have a nonzero value"),
        (np.full(10, 0.1), "most of the 10 rows are equal"),
        (np.r_[np.ones(25), np.arange(5.0)], "most of the 30 rows are equal"),
        (0.3 + 5.6e-17 * (np.arange(12) % 2), "most of the 12 rows are equal"),
        (np.r_[np.ones(6), -np.ones(4)], "most of the 10 rows are equal"),
        ([1.0, 2, 3, 4, 5, 6, math.inf], "a row is not finite"),
        ([1.0, 2, 3, 4, 5, 6, math.nan], "a row is not finite"),
    ],
)
def test_an_interval_that_the_rows_cannot_support_is_withheld_with_the_reason(rows, note):
    interval = mean_interval(rows)
    assert np.isnan([interval.low, interval.high]).all() and interval.note == note
    several = mean_interval(np.column_stack([rows, rows]))
    assert np.isnan(several.low).all() and several.note.tolist() == [note] * 2


@pytest.mark.parametrize(
    "rows",
    [
        np.r_[np.zeros(24), np.arange(1.0, 7)],
        np.r_[np.ones(5), -np.ones(5)],
        np.r_[np.ones(24), np.zeros(6)],
        np.arange(1.0, 7),
    ],
)
def test_six_rows_apart_from_the_most_common_one_are_enough(rows):
    interval = mean_interval(rows)
    assert interval.low < interval.estimate < interval.high


def test_a_cluster_of_zeros_counts_as_one():
    labels = np.repeat(np.arange(12), 3)
    sample = np.where(labels < 7, 0.0, random().normal(size=36))
    assert mean_interval(sample, clusters=labels).note == "fewer than 6 of the 12 clusters have a nonzero value"


def test_labels_of_several_types_are_clusters():
    sample = random().normal(size=14)
    labels = [("a", 1), 2, "b", 3.5, "c", True, "e"]
    mixed = np.empty(14, dtype=object)
    mixed[:] = labels * 2
    assert mean_interval(sample, clusters=mixed) == mean_interval(sample, clusters=np.arange(14) % 7)
