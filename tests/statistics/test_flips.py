"""Sign flips of one channel and of all channels together, written out by hand and by scipy."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from chanpatch.statistics import max_t_test, mean_interval, sign_flip_test
from chanpatch.statistics.flips import ranked_interval

# Darwin's maize: heights of crossed minus self-fertilised plants, in eighths of an inch; Fisher (1935), section 17.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
NAN = math.nan


def random(seed=0):
    return np.random.default_rng(seed)


def excludes_zero(interval):
    return (np.asarray(interval.low) > 0) | (np.asarray(interval.high) < 0)


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


@pytest.mark.parametrize("pairs", [1, 5, 6])
def test_the_smallest_exact_p_is_two_in_all_patterns(pairs):
    assert sign_flip_test(np.arange(pairs) + 1.0, seed=0) == 2 / 2**pairs


def test_the_smallest_drawn_p_is_one_in_all_draws_and_the_real_one():
    assert sign_flip_test(np.ones((40, 2)), resamples=99, seed=0).tolist() == [0.01, 0.01]


def test_a_channel_without_any_difference_has_p_one_and_one_with_nan_has_none():
    p = sign_flip_test(np.stack([np.zeros(8), np.full(8, 0.1), [*np.ones(7), NAN]], axis=1), seed=0)
    assert p[:2].tolist() == [1.0, 2 / 2**8]
    assert np.isnan(p[2])


# --- all channels together ---


def test_max_t_is_the_share_of_flips_with_a_larger_t_of_any_channel_written_out():
    differences = random(1).normal([0.0, 0.8, 1.5], [1.0, 3.0, 1.0], size=(8, 3))

    def t(rows):
        return np.abs(scipy.stats.ttest_1samp(rows, 0).statistic)

    largest = [t(np.array(signs)[:, None] * differences).max() for signs in itertools.product((-1, 1), repeat=8)]
    found = max_t_test(differences)
    assert found.p.tolist() == [np.mean(np.array(largest) >= each - 1e-9) for each in t(differences)]
    bound = np.sort(largest)[-1 - int(0.05 * 256)]
    margin = bound * differences.std(axis=0, ddof=1) / 8**0.5
    np.testing.assert_allclose(found.interval.low, differences.mean(axis=0) - margin, rtol=1e-6)
    np.testing.assert_allclose(found.interval.high, differences.mean(axis=0) + margin, rtol=1e-6)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("pairs", [6, 7, 10, 16, 40])
def test_a_simultaneous_interval_excludes_zero_exactly_if_the_corrected_p_is_at_most_the_level(pairs, confidence):
    for seed in range(20):
        differences = np.round(random(seed).normal(np.linspace(0, 2, 9), size=(pairs, 9)), seed % 3)
        clusters = np.minimum(np.arange(pairs), pairs - 1 - seed % 2)
        found = max_t_test(differences, confidence=confidence, clusters=clusters, resamples=999, seed=seed)
        shown = np.isin(found.interval.note, ("", "few"))
        assert (excludes_zero(found.interval) == (found.p <= 1 - confidence + 1e-12))[shown].all()
        assert np.isnan(found.interval.low[~shown]).all()


def test_one_channel_alone_has_the_p_of_the_sign_flip_test():
    assert max_t_test(MAIZE, resamples=2**14).p == 1726 / 2**15
    assert max_t_test(MAIZE, resamples=999).p == sign_flip_test(MAIZE, resamples=999)


def test_clusters_of_a_max_t_test_flip_together():
    differences, labels = random().normal(1, size=(8, 2)), np.repeat(np.arange(8), 3)
    together, alone = max_t_test(np.repeat(differences, 3, axis=0), clusters=labels), max_t_test(differences)
    assert together.p.tolist() == alone.p.tolist()
    np.testing.assert_allclose(together.interval.high, alone.interval.high)


def test_neither_channels_of_another_scale_nor_channels_without_numbers_change_the_others():
    differences = random().normal(0.5, size=(12, 4))
    other = np.column_stack([differences * [1, 1000, 1e-6, 1], np.zeros(12), np.full(12, NAN)])
    found, expected = max_t_test(other), max_t_test(differences)
    assert found.p[:4].tolist() == expected.p.tolist()
    assert found.p[4] == 1 and np.isnan(found.p[5])
    assert found.interval.note.tolist()[3:] == [
        "",
        "fewer than 6 of the 12 rows have a nonzero value",
        "a row is not finite",
    ]


def test_fewer_than_six_pairs_have_no_simultaneous_p_and_no_interval():
    found = max_t_test(np.ones((5, 2)))
    assert np.isnan([found.p, found.interval.low, found.interval.high]).all()
    assert found.interval.note.tolist() == ["5 independent rows, fewer than 6"] * 2


def test_a_ranked_interval_is_as_wide_as_the_simultaneous_one_and_the_one_of_the_row_alone():
    differences = random().lognormal(size=(30, 3)) - 1
    found, one, every = (
        ranked_interval(differences, seed=0), mean_interval(differences), max_t_test(differences).interval
    )  # fmt: skip
    np.testing.assert_array_equal(found.low, np.minimum(one.low, every.low))
    np.testing.assert_array_equal(found.high, np.maximum(one.high, every.high))


def test_an_infinite_interval_is_withheld_with_the_reason():
    balanced = np.column_stack([random(seed).permutation(np.repeat([1.0, -1.0], 4)) for seed in range(20)])
    for interval in (max_t_test(balanced).interval, ranked_interval(balanced, seed=0)):
        assert np.isnan([interval.low, interval.high]).all()
        assert set(interval.note.tolist()) == {
            "there are too few rows, or their values are too similar in magnitude, to bound the mean"
        }
    huge = mean_interval(np.arange(12) * 1e200)
    assert (
        math.isnan(huge.low)
        and huge.note == "there are too few rows, or their values are too similar in magnitude, to bound the mean"
    )


def test_repeated_rows_of_one_cluster_do_not_narrow_a_ranked_interval():
    differences, labels = random().normal(1, size=(12, 3)), np.repeat(np.arange(12), 5)
    found = ranked_interval(np.repeat(differences, 5, axis=0), clusters=labels, seed=0)
    expected = ranked_interval(differences, seed=0)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])


def test_flips_of_very_many_rows_take_bounded_memory():
    differences = random().normal(size=(30_000, 2))
    tracemalloc.start()
    interval = ranked_interval(differences, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**27
    alone = mean_interval(differences)
    assert (alone.high <= interval.high).all() and (
        interval.high < alone.estimate + 1.4 * (alone.high - alone.estimate)
    ).all()
