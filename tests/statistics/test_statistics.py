import itertools
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from chanpatch.errors import StatisticsError
from chanpatch.statistics import (
    auc,
    difference_interval,
    mcnemar_exact,
    paired_counts,
    paired_difference_interval,
    rank_among,
    wilson_interval,
)

# Hanley and McNeil (1982), table 1: how many of 58 normal and 51 abnormal images got the ratings 1 to 5.
NORMAL, ABNORMAL = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
RATINGS = np.repeat([1, 2, 3, 4, 5] * 2, NORMAL + ABNORMAL)
IS_ABNORMAL = np.repeat([False, True], [sum(NORMAL), sum(ABNORMAL)])


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 10), (3, 10), (10, 10), (366, 1000)])
def test_wilson_interval_equals_statsmodels(successes, n, confidence):
    interval = wilson_interval(successes, n, confidence)
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    assert interval.estimate == successes / n
    assert (interval.low, interval.high) == pytest.approx((max(low, 0), min(high, 1)), abs=1e-12)
    assert interval.confidence == confidence


def test_wilson_interval_of_no_success_starts_at_zero_exactly_and_has_a_width():
    interval = wilson_interval(0, 7)
    assert interval.low == 0.0 < interval.high
    assert wilson_interval(7, 7).high == 1.0


def test_paired_counts_count_the_pairs_by_who_succeeded():
    first, second = np.array([1, 1, 0, 0, 1, 0, 0], bool), np.array([1, 0, 1, 0, 1, 0, 0], bool)
    assert paired_counts(first, second) == (2, 1, 1, 3)
    assert paired_counts(first.astype(float), second.astype(np.uint8)) == (2, 1, 1, 3)


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (0, 6), (1, 9), (157, 35), (40, 40)])
def test_mcnemar_exact_equals_statsmodels(only_first, only_second):
    table = [[11, only_first], [only_second, 5]]
    assert mcnemar_exact(only_first, only_second) == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)


def test_mcnemar_exact_is_the_doubled_tail_written_out():
    tail = sum(math.comb(10, k) for k in (0, 1)) / 2**10
    assert mcnemar_exact(1, 9) == pytest.approx(2 * tail)


@pytest.mark.parametrize(
    ("counts", "published"),
    [
        (
            (14, 5, 0, 22),
            (0.122, 0.011, 0.226),
        ),  # Altman et al., Statistics with confidence (2000), table 6.2
        (
            (1, 1, 7, 12),
            (-0.286, -0.507, -0.026),
        ),  # Fagerland, Lydersen and Laake (2014), airway responsiveness
    ],
)
def test_paired_difference_interval_gives_the_published_examples(counts, published):
    interval = paired_difference_interval(*counts)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(published, abs=5e-4)


def test_paired_difference_interval_mirrors_when_the_two_are_exchanged():
    interval = paired_difference_interval(30, 17, 4, 49)
    exchanged = paired_difference_interval(30, 4, 17, 49)
    assert (exchanged.low, exchanged.high) == pytest.approx((-interval.high, -interval.low))


def test_paired_difference_interval_has_a_width_where_all_pairs_agree():
    interval = paired_difference_interval(20, 0, 0, 30)
    assert interval.low < interval.estimate == 0.0 < interval.high


def test_paired_difference_interval_stays_within_minus_one_and_one():
    for counts in itertools.product(range(5), repeat=4):
        if sum(counts) >= 6:
            interval = paired_difference_interval(*counts)
            assert -1 <= interval.low <= interval.estimate <= interval.high <= 1


@pytest.mark.parametrize(
    "probabilities",
    [(0.4, 0.1, 0.1, 0.4), (0.05, 0.3, 0.1, 0.55), (0.7, 0.1, 0.02, 0.18), (0.25, 0.25, 0.25, 0.25)],
)
def test_paired_difference_interval_covers_the_truth_about_as_often_as_it_says(probabilities):
    n = 20
    truth = probabilities[1] - probabilities[2]
    coverage = 0.0  # exact: every table of 20 pairs, weighted by its probability
    for both, only_first, only_second in itertools.product(range(n + 1), repeat=3):
        counts = (both, only_first, only_second, n - both - only_first - only_second)
        if counts[-1] >= 0:
            interval = paired_difference_interval(*counts)
            if interval.low <= truth <= interval.high:
                coverage += scipy.stats.multinomial.pmf(counts, n, probabilities)
    assert 0.93 < coverage < 0.995


def test_auc_of_the_ratings_of_hanley_and_mcneil_is_the_published_one():
    assert auc(RATINGS, IS_ABNORMAL).estimate == pytest.approx(0.893, abs=5e-4)


def test_auc_is_the_share_of_pairs_ranked_right_with_ties_as_halves():
    positive, negative = RATINGS[IS_ABNORMAL], RATINGS[~IS_ABNORMAL]
    pairs = [(p > q) + 0.5 * (p == q) for p, q in itertools.product(positive, negative)]
    assert auc(RATINGS, IS_ABNORMAL).estimate == pytest.approx(np.mean(pairs))


def test_auc_interval_is_delong_with_students_t_on_the_logit_scale_written_out():
    positive, negative = RATINGS[IS_ABNORMAL], RATINGS[~IS_ABNORMAL]
    right = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    area = right.mean()
    variance = right.mean(1).var(ddof=1) / len(positive) + right.mean(0).var(ddof=1) / len(negative)
    margin = scipy.stats.t.ppf(0.975, len(positive) - 1) * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    interval = auc(RATINGS, IS_ABNORMAL)
    assert interval.low == pytest.approx(1 / (1 + math.exp(margin - logit)), abs=1e-6)
    assert interval.high == pytest.approx(1 / (1 + math.exp(-margin - logit)), abs=1e-6)


def test_auc_of_exchanged_labels_is_one_minus_the_auc():
    interval, exchanged = auc(RATINGS, IS_ABNORMAL), auc(RATINGS, ~IS_ABNORMAL)
    assert (exchanged.estimate, exchanged.low, exchanged.high) == pytest.approx(
        (1 - interval.estimate, 1 - interval.high, 1 - interval.low)
    )


def test_auc_of_separated_groups_has_the_width_of_as_many_disjoint_pairs():
    interval = auc(np.arange(50), np.arange(50) >= 20)
    pairs = wilson_interval(20, 20)
    assert (interval.estimate, interval.low, interval.high) == (1.0, pairs.low, 1.0)


@pytest.mark.parametrize(("positives", "note"), [(5, "5 independent inputs with one label, fewer than 6"),
                                                 (6, "few"), (9, "few"), (10, "")])  # fmt: skip
def test_the_interval_of_an_auc_is_marked_with_few_examples_and_withheld_with_five(positives, note):
    interval = auc(np.arange(60) % 17, np.arange(60) < positives)
    assert interval.note == note and math.isnan(interval.low) == math.isnan(interval.high) == (positives < 6)
    assert 0 < interval.estimate < 1


def test_auc_of_scores_that_are_mostly_tied_has_the_width_of_disjoint_pairs():
    scores = np.where(np.arange(66) % 11 == 3, np.arange(66), 0)
    interval = auc(scores, np.arange(66) < 16)
    pairs = 16
    center = (interval.estimate + 1.96**2 / 2 / pairs) / (1 + 1.96**2 / pairs)
    assert (interval.low + interval.high) / 2 == pytest.approx(center, abs=1e-4)


@pytest.mark.parametrize(("pairs", "note"), [(5, "5 independent pairs, fewer than 6"), (6, "few"), (10, "")])
def test_the_interval_of_a_paired_difference_is_marked_with_few_pairs_and_withheld_with_five(pairs, note):
    interval = paired_difference_interval(1, 2, 0, pairs - 3)
    assert (interval.estimate, interval.note) == (2 / pairs, note)
    assert math.isnan(interval.low) == math.isnan(interval.high) == (pairs < 6)


def test_a_difference_of_an_interval_that_is_withheld_is_withheld_for_the_same_reason():
    withheld, few = auc([1.0, 2, 3, 4], [0, 1, 0, 1]), auc(np.arange(30) % 7, np.arange(30) < 8)
    for one, other in ((withheld, few), (few, withheld)):
        difference = difference_interval(one, other)
        assert math.isnan(difference.low) and math.isnan(difference.high)
        assert difference.note == "2 independent inputs with one label, fewer than 6"
    assert difference_interval(few, few).note == "few"


def test_auc_of_one_constant_score_is_one_half_and_has_a_width():
    interval = auc(np.full(30, 0.1), np.arange(30) < 7)
    assert interval.estimate == 0.5
    assert interval.low < 0.3 and interval.high > 0.7


@pytest.mark.parametrize("positive_spread", [1.0, 3.0])
@pytest.mark.parametrize("truth", [0.5, 0.8, 0.93])
def test_auc_interval_covers_the_truth_about_as_often_as_it_says(truth, positive_spread):
    generator = np.random.default_rng(5)
    shift = scipy.stats.norm.ppf(truth) * math.hypot(1, positive_spread)
    labels = np.arange(200) < 60
    repeats, covered = 1000, 0
    for _ in range(repeats):
        scores = np.where(labels, generator.normal(shift, positive_spread, 200), generator.normal(0, 1, 200))
        interval = auc(scores, labels)
        covered += interval.low <= truth <= interval.high
    assert 0.925 < covered / repeats < 0.975


def test_the_rank_counts_the_controls_that_are_at_least_as_large_in_absolute_value():
    controls = [-0.9, 0.4, 0.3, -0.2, 0.0]
    for effect, rank in ((-1.0, 1), (0.9, 2), (-0.5, 2), (0.4, 3), (0.1, 5), (0.0, 6)):
        assert rank_among(effect, controls).rank == rank


def test_a_directed_rank_counts_only_controls_as_far_on_that_side():
    controls = [-0.9, 0.4, 0.3, -0.2, 0.0]
    for effect, high, low in ((0.5, 1, 6), (0.35, 2, 5), (-0.5, 5, 2), (-0.9, 6, 2), (-1.0, 6, 1)):
        assert rank_among(effect, controls, alternative="greater").rank == high
        assert rank_among(effect, controls, alternative="less").rank == low
    opposite = np.linspace(-3, -1, 19)
    assert rank_among(0.5, opposite).p == 1 and rank_among(0.5, opposite, alternative="greater").p == 1 / 20


def test_a_rank_has_a_p_value_from_nineteen_controls_on():
    few, enough = rank_among(2.0, np.linspace(-1, 1, 18)), rank_among(2.0, np.linspace(-1, 1, 19))
    assert few.p is None and few.no_p == "fewer than 19 controls"
    assert enough.p == 1 / 20 and not enough.no_p
    assert str(few) == "rank 1 of 19 (the effect and 18 controls), no p-value: fewer than 19 controls"


@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "ties"])
@pytest.mark.parametrize("controls", [19, 25])
def test_the_p_value_of_a_rank_is_below_any_level_no_more_often_than_that_if_the_effect_is_one_of_the_controls(
    draw, controls
):
    rng = np.random.default_rng(0)
    size = (4000, controls + 1)
    effects = rng.integers(-8, 9, size).astype(float) if draw == "ties" else getattr(rng, draw)(size)
    p = np.array([rank_among(effect, others).p for effect, *others in effects])
    for level in (0.05, 0.1, 0.3):
        assert (p <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / len(p))
    if draw != "ties":  # and no less often than the steps of 1 / (controls + 1) allow
        assert (p <= 0.3).mean() > 0.3 - 1 / (controls + 1) - 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(1, 0), "n must be a whole number, at least 1; got 0."),
        (lambda: wilson_interval(5, 4), "successes must be at most n = 4; got 5."),
        (lambda: wilson_interval(-1, 4), "successes must be a whole number, at least 0; got -1."),
        (lambda: wilson_interval(0.5, 4), "successes must be a whole number, at least 0; got 0.5."),
        (
            lambda: wilson_interval(1, 4, confidence=95),
            "confidence must be greater than 0 and less than 1, such as 0.95; got 95.",
        ),
        (
            lambda: paired_counts(np.array([0.5, 1.0]), np.array([True])),
            "first and second must have one boolean per pair, such as returns > 0; got float64 of shape (2,) and bool "
            "of shape (1,).",
        ),
        (lambda: mcnemar_exact(3, -2), "only_second must be a whole number, at least 0; got -2."),
        (
            lambda: paired_difference_interval(0, 0, 0, 0),
            "All four counts are 0, but a difference between proportions needs at least one pair.",
        ),
        (
            lambda: auc([1.0, 2.0, 3.0], [True, False]),
            "labels must have one boolean for each of the 3 inputs, such as directions == 0; got dtype bool and shape "
            "(2,).",
        ),
        (
            lambda: auc([1.0, math.nan, 2.0, 3.0], [True, False, True, False]),
            "scores[1] must be finite; got nan. Leave out that input, pair or episode.",
        ),
        (
            lambda: auc([1.0, 2.0, 3.0, 4.0], [1, 2, 1, 2]),
            "labels must have one boolean for each of the 4 inputs, such as directions == 0; got dtype int64 and shape "
            "(4,).",
        ),
        (
            lambda: auc([1.0, 2.0, 3.0], [True, True, False]),
            "labels must have at least 2 positives and 2 negatives; got 2 and 1.",
        ),
        (
            lambda: rank_among(0.5, []),
            "controls must have shape (control,) with at least one control; got shape (0,).",
        ),
        (
            lambda: rank_among(0.5, [0.1, math.nan]),
            "All effects must be finite to be ranked; got 0.5 for the patch, and NaN or infinity for 1 of 2 controls. "
            "Leave out controls whose effects are not finite.",
        ),
        (
            lambda: rank_among(0.5, [0.1], alternative="larger"),
            "alternative must be one of 'two-sided', 'greater', 'less'; got 'larger'.",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_name(call, message):
    with pytest.raises(StatisticsError) as caught:
        call()
    assert str(caught.value) == message
