"""Resampling and corrections for many tests: simulated nulls, published numbers, scipy and statsmodels."""

import itertools
import math

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
    reweighted_precision,
    sign_flip_test,
    wilson_interval,
)

# Darwin's maize: heights of crossed minus self-fertilised plants, in eighths of an inch; Fisher (1935), section 17.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
NAN = math.nan


def random(seed=0):
    return np.random.default_rng(seed)


def clustered(clusters, channels):
    """Four rows per cluster that share half of their variance, with mean zero."""
    labels = np.repeat(np.arange(clusters), 4)
    generator = random()
    return generator.normal(size=(clusters, channels))[labels] + generator.normal(size=(4 * clusters, channels)), labels


def covers(interval, truth=0.0):
    return float(np.mean((interval.low <= truth) & (truth <= interval.high)))


# --- bootstrap ---


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_the_bootstrap_interval_is_that_of_scipy_up_to_the_draws(statistic):
    sample = random().exponential(size=40)
    expected = scipy.stats.bootstrap((sample,), statistic, rng=random(1)).confidence_interval
    over_rows = {} if statistic is np.mean else {"statistic": lambda rows: statistic(rows, axis=0)}
    interval = bootstrap_interval(sample, **over_rows, seed=2)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), rel=0.03)
    assert interval.estimate == pytest.approx(statistic(sample))


def test_the_mean_as_a_function_gives_the_very_interval_of_the_default():
    sample = random().exponential(size=(12, 3))
    fast = bootstrap_interval(sample, resamples=99, seed=0)
    slow = bootstrap_interval(sample, lambda rows: rows.mean(axis=0), resamples=99, seed=0)
    np.testing.assert_allclose((fast.low, fast.high), (slow.low, slow.high))


def test_a_statistic_may_join_the_channels():
    sample = random().normal(size=(60, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]])
    interval = bootstrap_interval(sample, lambda rows: np.corrcoef(rows.T)[0, 1], resamples=500, seed=0)
    assert 0.8 < interval.low < interval.estimate < interval.high < 1


def test_a_channel_has_the_same_interval_alone_and_among_others():
    sample = random().normal(size=(20, 300))
    together = bootstrap_interval(sample, resamples=199, seed=0)
    alone = bootstrap_interval(sample[:, 290], resamples=199, seed=0)
    assert (alone.low, alone.high) == pytest.approx((together.low[290], together.high[290]), rel=1e-12)


def test_all_axes_but_the_first_are_kept():
    interval = bootstrap_interval(np.ones((5, 2, 3)), seed=0)
    assert interval.estimate.shape == interval.low.shape == interval.high.shape == (2, 3)


@pytest.mark.parametrize(("rows", "least", "most"), [(10, 0.87, 0.91), (30, 0.92, 0.95), (50, 0.93, 0.96)])
def test_the_bootstrap_interval_covers_a_normal_mean_as_often_as_its_docstring_says(rows, least, most):
    assert least < covers(bootstrap_interval(random().normal(size=(rows, 2000)), resamples=999, seed=1)) < most


def test_clusters_are_drawn_whole_so_that_the_interval_covers():
    sample, labels = clustered(30, channels=1500)
    assert 0.92 < covers(bootstrap_interval(sample, clusters=labels, resamples=999, seed=1)) < 0.96
    assert covers(bootstrap_interval(sample, resamples=999, seed=1)) < 0.85


def test_clusters_may_have_names_and_different_sizes():
    sample = random().normal(size=(9, 2))
    names = np.array(["b", "a", "a", "c", "b", "c", "c", "c", "d"])
    interval = bootstrap_interval(sample, clusters=names, resamples=2000, seed=0)
    rows = [np.flatnonzero(names == name) for name in "abcd"]
    means = [
        sample[np.concatenate([rows[i] for i in drawn])].mean(0) for drawn in itertools.product(range(4), repeat=4)
    ]
    assert np.all(interval.low >= np.min(means, axis=0)) and np.all(interval.high <= np.max(means, axis=0))
    assert np.all(interval.low < interval.estimate) and np.all(interval.estimate < interval.high)


def test_a_channel_in_which_all_rows_are_equal_has_the_width_zero():
    interval = bootstrap_interval(np.full((10, 1), 0.1), seed=0)
    assert (interval.low, interval.high, interval.estimate) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_channel_with_a_number_that_is_not_finite_has_no_ends_and_spoils_no_other(bad):
    sample = random().normal(size=(8, 2))
    sample[3, 1] = bad
    interval = bootstrap_interval(sample, resamples=99, seed=0)
    assert np.isnan([interval.low[1], interval.high[1]]).all()
    assert interval.low[0] == pytest.approx(bootstrap_interval(sample[:, 0], resamples=99, seed=0).low)


@pytest.mark.parametrize(("rows", "clusters"), [(1, None), (4, ["a"] * 4)])
def test_one_row_or_one_cluster_has_an_estimate_and_no_ends(rows, clusters):
    interval = bootstrap_interval(np.arange(rows) + 1.0, clusters=clusters, seed=0)
    assert interval.estimate == (rows + 1) / 2
    assert np.isnan([interval.low, interval.high]).all()


# --- sign flips ---


def test_the_sign_flip_test_gives_fishers_p_for_darwins_maize():
    assert sign_flip_test(MAIZE, resamples=2**14, seed=0) == 1726 / 2**15


def test_drawn_signs_come_close_to_all_signs():
    assert sign_flip_test(MAIZE, resamples=9999, seed=0) == pytest.approx(1726 / 2**15, abs=0.007)


def test_the_sign_flip_test_equals_scipys_permutation_test():
    differences = random().normal(0.5, 1, size=8)
    expected = scipy.stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(differences, seed=0) == pytest.approx(expected.pvalue)


def test_many_flips_are_counted_some_thousand_at_a_time_as_all_at_once():
    differences = random(5).normal(0.2, size=(20, 3))
    signs = random(3).integers(0, 2, size=(25_000, 20)) * 2.0 - 1.0
    reached = (np.abs(signs @ differences) >= np.abs(differences.sum(axis=0))).sum(axis=0)
    assert sign_flip_test(differences, resamples=25_000, seed=3).tolist() == ((reached + 1) / 25_001).tolist()
    every = 1 - 2 * ((np.arange(2**15)[:, None] >> np.arange(15)) & 1)
    share = (np.abs(every @ differences[:15]) >= np.abs(differences[:15].sum(axis=0)) - 1e-9).mean(axis=0)
    assert sign_flip_test(differences[:15], resamples=2**14, seed=3).tolist() == share.tolist()


def test_pairs_of_one_cluster_flip_together():
    differences, labels = np.array([3.0, 1.0, 2.0, -1.0, 4.0, 5.0]), [0, 0, 1, 1, 2, 2]
    totals = [4.0, 1.0, 9.0]
    reached = [abs(np.dot(signs, totals)) >= 14 for signs in itertools.product((-1, 1), repeat=3)]
    assert sign_flip_test(differences, clusters=labels, seed=0) == np.mean(reached)


@pytest.mark.parametrize("clusters", [6, 10, 20])
def test_the_sign_flip_test_rejects_no_more_true_nulls_than_its_level(clusters):
    differences, labels = clustered(clusters, channels=2000)
    p = sign_flip_test(differences, clusters=labels, resamples=999, seed=0)
    assert np.mean(p <= 0.05) < 0.065
    assert np.mean(sign_flip_test(differences, resamples=999, seed=0) <= 0.05) > 0.15


@pytest.mark.parametrize("pairs", [1, 5, 6])
def test_the_smallest_exact_p_is_two_in_all_patterns(pairs):
    assert sign_flip_test(np.arange(pairs) + 1.0, seed=0) == 2 / 2**pairs


def test_the_smallest_drawn_p_is_one_in_all_draws_and_the_real_one():
    assert sign_flip_test(np.ones((40, 2)), resamples=99, seed=0).tolist() == [0.01, 0.01]


def test_a_channel_without_any_difference_has_p_one_and_one_with_nan_has_none():
    p = sign_flip_test(np.stack([np.zeros(8), np.full(8, 0.1), [*np.ones(7), NAN]], axis=1), seed=0)
    assert p[:2].tolist() == [1.0, 2 / 2**8]
    assert np.isnan(p[2])


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
            lambda: bootstrap_interval(np.zeros((0, 3)), seed=0),
            "sample has shape (0, 3): give at least one row, on the first axis.",
        ),
        (
            lambda: sign_flip_test(1.0, seed=0),
            "differences has shape (): give at least one row, on the first axis.",
        ),
        (
            lambda: sign_flip_test([1.0, 2.0], clusters=[1], seed=0),
            "clusters has shape (1,), but there are 2 rows: give one label per row.",
        ),
        (
            lambda: bootstrap_interval([1.0], resamples=0, seed=0),
            "resamples is 0, but it must be a whole number, at least 1.",
        ),
        (lambda: bootstrap_interval([1.0], seed=-1), "seed is -1, but it must be a whole number, at least 0."),
        (
            lambda: bootstrap_interval([1.0], confidence=95, seed=0),
            "confidence is 95, but it must lie between 0 and 1, such as 0.95.",
        ),
        (lambda: holm([0.5, 1.2]), "1.2 is not a p-value: it must lie between 0 and 1."),
        (
            lambda: equivalent(wilson_interval(1, 2), margin=0),
            "margin is 0, but it must be above 0.",
        ),
        (
            lambda: difference_interval(wilson_interval(1, 2), wilson_interval(1, 2, confidence=0.9)),
            "The intervals have confidence 0.95 and 0.9: make both with the same.",
        ),
        (
            lambda: reweighted_precision(wilson_interval(1, 2), wilson_interval(1, 2), base_rate=1),
            "base_rate is 1, but it must lie between 0 and 1.",
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
