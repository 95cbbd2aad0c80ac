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
    mean_interval,
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
    interval = auc_difference_interval(first, second, LABELS)
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
    assert str(error.value) == (
        "first, second and strata must have equal lengths, one entry per input; got lengths 3, 2 and 3."
    )


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
    assert str(error.value) == (
        "success and first must have one boolean per input, and strata must have one label per input; got int64 of "
        "shape (2,), int64 of shape (2,) and int64 of shape (2,)."
    )


def test_a_share_interval_contains_the_ratios_for_which_the_mean_interval_contains_0() -> None:
    total = RANDOM.normal(3, 1, size=(60, 2))
    part = total * [0.2, 0.9] + RANDOM.normal(0, 0.1, size=(60, 2))
    for clusters in (None, np.arange(60) // 3):
        interval = share_interval(part, total, clusters=clusters)
        np.testing.assert_allclose(interval.estimate, part.mean(axis=0) / total.mean(axis=0))
        at_low, at_high = (
            mean_interval(part - limit * total, clusters=clusters) for limit in (interval.low, interval.high)
        )
        np.testing.assert_allclose([at_low.low, at_high.high], 0, atol=1e-9)


def test_a_share_without_an_interval_has_the_reason() -> None:
    total = np.arange(1.0, 13)
    notes = {
        "the interval for the total contains 0": (total, total - 6),
        "5 independent rows, fewer than 6": (total[:5], total[:5]),
        "too few rows deviate from the overall fraction": (total / 3, total),
    }
    for note, (part, whole) in notes.items():
        interval = share_interval(part, whole)
        assert interval.note == note and np.isnan([interval.low, interval.high]).all()


def test_an_interval_over_few_inputs_with_one_label_or_outcome_is_marked_or_withheld() -> None:
    scores, strata = RANDOM.normal(size=(2, 60)), np.zeros(60)
    for rare, note in ((5, "5 independent inputs with one {}, fewer than 6"), (6, "few"), (10, "")):
        labels = np.arange(60) % 6 < 1 if rare == 10 else np.arange(60) < rare
        difference = auc_difference_interval(*scores, labels)
        assert difference.note == note.format("label") and np.isnan(difference.low) == (rare == 5)
        rates = stratified_difference_interval(labels, np.arange(60) % 2, strata, resamples=99)
        assert rates.note == note.format("outcome") and np.isnan(rates.low) == (rare == 5)
    equal = auc_difference_interval(scores[0], scores[0], labels)
    assert equal.note == "both scores rank most of the inputs in the same order" and np.isnan(equal.low)


def test_a_share_of_nothing_is_not_a_number_and_one_of_other_inputs_is_refused() -> None:
    assert np.isnan(share_interval([1.0, 2.0], [1.0, -1.0]).estimate)
    with pytest.raises(StatisticsError) as error:
        share_interval([1.0], [1.0, 2.0])
    assert str(error.value) == "part and total must have the same shape; got (1,) and (2,)."
