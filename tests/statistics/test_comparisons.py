"""Comparisons of channels and groups against the same computation written out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from chanpatch.errors import StatisticsError
from chanpatch.statistics import (
    auc,
    auc_difference_interval,
    aucs,
    bootstrap_interval,
    rank_correlation,
    share_interval,
    stratified_difference_interval,
)

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3 == 0


def test_the_areas_of_all_channels_are_those_of_auc_one_by_one() -> None:
    scores = RANDOM.integers(0, 5, size=(60, 4)).astype(float)
    np.testing.assert_allclose(aucs(scores, LABELS), [auc(column, LABELS).estimate for column in scores.T])
    assert np.isnan(aucs(scores, np.zeros(60, bool))).all()


def test_the_difference_of_two_areas_is_paired_over_the_same_inputs() -> None:
    first = LABELS + RANDOM.normal(size=60)
    second = first + 0.1 * RANDOM.normal(size=60)
    interval = auc_difference_interval(first, second, LABELS, resamples=199)
    assert interval.estimate == pytest.approx(auc(first, LABELS).estimate - auc(second, LABELS).estimate)
    apart = auc(first, LABELS).high - auc(first, LABELS).low
    assert interval.low < interval.estimate < interval.high and interval.high - interval.low < apart / 2


@pytest.mark.parametrize(
    ("first", "labels", "message"),
    [
        (np.zeros(59), LABELS, "first and second must have equal lengths; got 59 and 60."),
        (np.zeros(60), np.zeros(60), "labels must have at least 2 positives and 2 negatives; got 0 and 60."),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(first, labels, message) -> None:
    with pytest.raises(StatisticsError) as error:
        auc_difference_interval(first, np.zeros(60), labels)
    assert str(error.value) == message


def test_the_rank_correlation_is_spearmans() -> None:
    first, second = RANDOM.integers(0, 9, size=(2, 40))
    assert rank_correlation(first, second) == pytest.approx(scipy.stats.spearmanr(first, second).statistic)


def test_within_strata_the_rank_correlation_ignores_differences_between_them() -> None:
    strata = np.repeat(["a", "b"], 20)
    within = np.tile(np.arange(20.0), 2)
    assert rank_correlation(within, -within + 100 * (strata == "b"), strata) == pytest.approx(-1)
    assert np.isnan(rank_correlation(within, strata == "b", strata))  # the second varies between strata only


@pytest.mark.parametrize(("first", "second"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])])
def test_two_inputs_or_a_constant_have_no_rank_correlation(first, second) -> None:
    assert np.isnan(rank_correlation(first, second))


def test_samples_of_different_lengths_have_no_rank_correlation() -> None:
    with pytest.raises(StatisticsError) as error:
        rank_correlation([1, 2, 3], [1, 2])
    assert str(error.value) == "first, second and strata must have equal lengths, one entry per input."


def test_the_difference_within_strata_has_mantel_and_haenszels_weights() -> None:
    success, first = RANDOM.random(300) < 0.5, RANDOM.random(300) < 0.4
    strata = RANDOM.choice(["near", "mid", "far"], 300)
    first[strata == "mid"] = True  # one group only: left out
    differences, weights = [], []
    for name in ("near", "far"):
        one, other = (success[(strata == name) & (first == group)] for group in (True, False))
        differences.append(one.mean() - other.mean())
        weights.append(len(one) * len(other) / (len(one) + len(other)))
    interval = stratified_difference_interval(success, first, strata, resamples=99)
    assert interval.estimate == pytest.approx(np.average(differences, weights=weights))
    assert interval.low < interval.estimate < interval.high


def test_groups_without_a_common_stratum_have_no_difference() -> None:
    interval = stratified_difference_interval([1, 0], [1, 0], [0, 1], resamples=9)
    assert np.isnan([interval.estimate, interval.low, interval.high]).all()


def test_a_stratified_difference_of_other_things_than_booleans_is_refused() -> None:
    with pytest.raises(StatisticsError) as error:
        stratified_difference_interval([1, 2], [1, 0], [0, 0])
    assert str(error.value) == ("success and first must have one boolean, and strata one label, per input.")


def test_a_share_is_the_ratio_of_the_means_with_a_bootstrap_interval_for_every_channel() -> None:
    total = RANDOM.normal(3, 1, size=(50, 2))
    part = total * [0.2, 0.9] + RANDOM.normal(0, 0.1, size=(50, 2))
    interval = share_interval(part, total, resamples=199, seed=1)
    np.testing.assert_allclose(interval.estimate, part.mean(axis=0) / total.mean(axis=0))
    by_hand = bootstrap_interval(
        np.stack([part, total], axis=1), lambda rows: rows[:, 0].sum(0) / rows[:, 1].sum(0), resamples=199, seed=1
    )
    np.testing.assert_allclose([interval.low, interval.high], [by_hand.low, by_hand.high])


def test_a_share_of_nothing_is_not_a_number_and_one_of_other_inputs_is_refused() -> None:
    assert np.isnan(share_interval([1.0, 2.0], [1.0, -1.0], resamples=9).estimate)
    with pytest.raises(StatisticsError) as error:
        share_interval([1.0], [1.0, 2.0])
    assert str(error.value) == "part and total must have the same shape; got (1,) and (2,)."
