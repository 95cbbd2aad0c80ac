"""The bootstrap and corrections for many tests: published numbers, scipy and statsmodels."""

import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep

from chanpatch.errors import StatisticsError
from chanpatch.statistics import (
    Interval,
    benjamini_hochberg,
    bootstrap_interval,
    difference_interval,
    equivalent,
    holm,
    max_t_test,
    mean_interval,
    reweighted_precision,
    sign_flip_test,
    wilson_interval,
)

NAN = math.nan


def random(seed=0):
    return np.random.default_rng(seed)


# --- bootstrap ---


def median(rows):
    return np.median(rows, axis=0)


def test_the_bootstrap_interval_is_that_of_scipy_at_the_expanded_level_up_to_the_draws():
    sample, z = random().exponential(size=40), (40 / 39) ** 0.5 * scipy.stats.t.ppf(0.975, 39)
    level = 1 - 2 * scipy.stats.norm.sf(z)
    expected = scipy.stats.bootstrap((sample,), np.std, confidence_level=level, rng=random(1)).confidence_interval
    interval = bootstrap_interval(sample, np.std, seed=2)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), rel=0.03)
    assert interval.estimate == pytest.approx(np.std(sample))


def test_a_statistic_may_join_the_channels():
    sample = random().normal(size=(60, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]])
    interval = bootstrap_interval(sample, lambda rows: np.corrcoef(rows.T)[0, 1], resamples=500, seed=0)
    assert 0.8 < interval.low < interval.estimate < interval.high < 1


def test_a_statistic_of_each_channel_has_the_same_interval_alone_and_among_others():
    sample = random().normal(size=(20, 3, 2))
    together, alone = (bootstrap_interval(rows, median, resamples=199) for rows in (sample, sample[:, 2, 1]))
    assert together.low.shape == together.note.shape == (3, 2)
    assert (alone.low, alone.high) == pytest.approx((together.low[2, 1], together.high[2, 1]), rel=1e-12)
    assert alone.note == together.note[2, 1] == ""


def test_clusters_are_drawn_whole():
    sample, labels = random().normal(size=(8, 4)), np.repeat(list("hgfedcba"), 3)
    rows = np.repeat(sample, 3, axis=0)
    one, other = bootstrap_interval(rows, np.std, clusters=labels), bootstrap_interval(rows, np.std)
    assert one.note == "few" and other.note == ""
    assert one.high - one.low > 1.5 * (other.high - other.low)


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_channel_with_a_number_that_is_not_finite_has_no_ends_and_spoils_no_other(bad):
    sample = random().normal(size=(8, 2))
    sample[3, 1] = bad
    interval = bootstrap_interval(sample, lambda rows: rows.mean(axis=0), resamples=99)
    assert np.isnan([interval.low[1], interval.high[1]]).all()
    assert interval.note.tolist() == ["few", "a resample gives a number that is not finite"]
    assert interval.low[0] < interval.estimate[0] < interval.high[0]


@pytest.mark.parametrize(
    ("rows", "clusters", "note"),
    [
        (np.arange(5.0), None, "5 independent rows, fewer than 6"),
        (np.arange(20.0), ["a"] * 20, "1 independent row, fewer than 6"),
        (np.full(20, 0.1), None, "every resample gives the same number"),
    ],
)
def test_a_bootstrap_interval_without_enough_rows_or_spread_is_withheld(rows, clusters, note):
    interval = bootstrap_interval(rows, np.median, clusters=clusters, resamples=99)
    assert interval.estimate == np.median(rows) and interval.note == note
    assert np.isnan([interval.low, interval.high]).all()


# --- many tests, and a margin ---


@pytest.mark.parametrize(("adjust", "method"), [(holm, "holm"), (benjamini_hochberg, "fdr_bh")])
def test_adjusted_p_values_are_those_of_statsmodels(adjust, method):
    p = random().uniform(size=50) ** 3
    np.testing.assert_allclose(adjust(p), multipletests(p, method=method)[1], rtol=1e-12)


@pytest.mark.parametrize("adjust", [holm, benjamini_hochberg])
def test_nan_is_no_test_and_the_shape_is_kept(adjust):
    p = np.array([[0.01, NAN], [0.02, 0.5]])
    adjusted = adjust(p)
    assert np.isnan(adjusted[0, 1]) and np.isnan(p[0, 1])
    assert adjusted[~np.isnan(p)].tolist() == adjust([0.01, 0.02, 0.5]).tolist()
    assert np.isnan(adjust([NAN, NAN])).all()
    assert adjust([]).shape == (0,)


def test_holm_keeps_the_chance_of_any_false_claim_below_the_level():
    p = random().uniform(size=(2000, 20))
    assert np.mean([(holm(row) <= 0.05).any() for row in p]) < 0.065


def test_benjamini_hochberg_keeps_the_share_of_false_claims_below_the_level():
    false = np.arange(50) < 40  # of the nulls; the other ten are not
    shares = []
    for _ in range(500):
        z = random(len(shares)).normal(np.where(false, 0, 3))
        claimed = benjamini_hochberg(scipy.stats.norm.sf(z)) <= 0.1
        shares.append((claimed & false).sum() / max(claimed.sum(), 1))
    assert 0.05 < np.mean(shares) < 0.1


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(-0.1, 0.2, True), (-0.1, 0.3, False), (-0.31, 0.1, False), (NAN, NAN, False)]
)
def test_a_difference_is_equivalent_where_its_whole_interval_lies_within_the_margin(low, high, expected):
    assert equivalent(Interval(0.0, low, high, 0.9), margin=0.3) is expected


def test_equivalence_is_told_for_every_channel():
    interval = Interval(np.zeros(2), np.array([-0.1, -0.5]), np.array([0.1, 0.1]), 0.9)
    assert equivalent(interval, margin=0.3).tolist() == [True, False]


# --- differences and reweighted precisions of independent data ---


def test_the_difference_of_two_proportions_is_newcombes_published_example():
    interval = difference_interval(wilson_interval(56, 70), wilson_interval(48, 80))
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_the_difference_of_two_proportions_equals_statsmodels():
    interval = difference_interval(wilson_interval(9, 30), wilson_interval(0, 12))
    expected = confint_proportions_2indep(9, 30, 0, 12, method="newcomb")
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-12)


def test_a_precision_at_its_own_base_rate_is_itself():
    interval = reweighted_precision(wilson_interval(30, 40), wilson_interval(10, 160), base_rate=0.2)
    assert interval.estimate == pytest.approx(30 / 40)
    assert interval.low < 0.65 and interval.high > 0.83


@pytest.mark.parametrize(("hit", "alarm"), [(0.9, 0.1), (0.5, 0.02), (0.3, 0.3)])
def test_the_interval_of_a_reweighted_precision_covers_the_truth_about_as_often_as_it_says(hit, alarm):
    generator, base_rate = random(), 0.25
    truth = base_rate * hit / (base_rate * hit + (1 - base_rate) * alarm)
    intervals = [
        reweighted_precision(wilson_interval(hits, 60), wilson_interval(alarms, 140), base_rate)
        for hits, alarms in zip(generator.binomial(60, hit, 1000), generator.binomial(140, alarm, 1000), strict=True)
    ]
    assert 0.93 < np.mean([interval.low <= truth <= interval.high for interval in intervals]) < 0.98
    assert all(0 <= each.low <= each.estimate <= each.high <= 1 for each in intervals)


def test_a_reweighted_precision_without_false_alarms_is_one_and_has_a_width():
    interval = reweighted_precision(wilson_interval(5, 10), wilson_interval(0, 10), base_rate=0.5)
    assert interval.low < interval.estimate == interval.high == 1.0


def test_a_reweighted_precision_without_any_hit_is_zero_and_has_a_width():
    interval = reweighted_precision(wilson_interval(0, 10), wilson_interval(3, 10), base_rate=0.5)
    assert 0.0 == interval.low == interval.estimate < interval.high


def test_where_nothing_is_accepted_the_precision_may_be_anything():
    interval = reweighted_precision(wilson_interval(0, 10), wilson_interval(0, 10), base_rate=0.5)
    assert math.isnan(interval.estimate)
    assert (interval.low, interval.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bootstrap_interval(np.zeros((0, 3)), np.mean),
            "sample must have at least one row on its first axis; got shape (0, 3).",
        ),
        (
            lambda: max_t_test(1.0),
            "differences must have at least one row on its first axis; got shape ().",
        ),
        (
            lambda: mean_interval([1.0, 2.0], clusters=[1]),
            "clusters must have one label for each of the 2 rows (inputs or pairs); got shape (1,).",
        ),
        (
            lambda: max_t_test([1.0, 2.0], clusters=["a", None]),
            "clusters[1] must be a label; got None. Label this input or pair, or leave it out.",
        ),
        (
            lambda: sign_flip_test([1.0, 2.0], clusters=[math.nan, 1.0]),
            "clusters[0] must be a label; got nan. Label this input or pair, or leave it out.",
        ),
        (
            lambda: bootstrap_interval([1.0], np.mean, resamples=0),
            "resamples must be a whole number, at least 1; got 0.",
        ),
        (lambda: bootstrap_interval([1.0], np.mean, seed=-1), "seed must be a whole number, at least 0; got -1."),
        (
            lambda: mean_interval([1.0], confidence=95),
            "confidence must be greater than 0 and less than 1, such as 0.95; got 95.",
        ),
        (lambda: holm([0.5, 1.2]), "p_values must lie between 0 and 1; got 1.2."),
        (
            lambda: equivalent(wilson_interval(1, 2), margin=0),
            "margin must be positive; got 0.",
        ),
        (
            lambda: difference_interval(wilson_interval(1, 2), wilson_interval(1, 2, confidence=0.9)),
            "Both intervals must have the same confidence; got 0.95 and 0.9.",
        ),
        (
            lambda: reweighted_precision(wilson_interval(1, 2), wilson_interval(1, 2), base_rate=1),
            "base_rate must be greater than 0 and less than 1; got 1.",
        ),
    ],
)
def test_what_cannot_be_resampled_or_combined_is_refused_by_name(call, message):
    with pytest.raises(StatisticsError) as caught:
        call()
    assert str(caught.value) == message


def test_a_reweighted_precision_of_intervals_without_width_has_none():
    sure = [Interval(rate, rate, rate, 0.95) for rate in (0.618, 0.745)]
    interval = reweighted_precision(*sure, base_rate=0.3)
    assert interval.low == pytest.approx(interval.estimate) == pytest.approx(interval.high)
    assert interval.estimate == pytest.approx(0.3 * 0.618 / (0.3 * 0.618 + 0.7 * 0.745))


def test_a_bootstrap_of_many_rows_takes_little_memory():
    tracemalloc.start()
    bootstrap_interval(random().normal(size=4000), np.mean, resamples=99)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
