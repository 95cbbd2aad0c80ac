"""Threshold probes on sums whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from chanpatch import ThresholdProbe, errors
from chanpatch.statistics import auc, wilson_interval
from chanpatch.statistics.resampling import halves

LABELS = np.arange(20) % 2 == 0
SUMS = np.arange(20.0)


def random(seed=0):
    return np.random.default_rng(seed)


def shifted_sums(positives, negatives, distance, seed=0):
    labels = np.arange(positives + negatives) < positives
    return random(seed).normal(distance * labels), labels


def test_a_probe_finds_the_threshold_between_separated_groups_and_its_side():
    labels = np.arange(40) % 2 == 0
    sums = np.where(labels, 10.0, 30.0) + random().uniform(size=40)
    probe = ThresholdProbe.fit(sums, labels)
    assert probe.direction == "below" and 11 < probe.threshold < 30
    assert (probe.fitted_on, probe.held_out.n) == (20, 20)
    assert (probe.held_out.auc.estimate, probe.held_out.precision.estimate, probe.held_out.recall.estimate) == (1, 1, 1)
    assert np.array_equal(probe.predict(sums), labels)


def fitting_half(sums, labels, seed):
    rows = halves(labels, seed)[0]
    distinct = np.unique(sums[rows])
    return sums[rows], labels[rows], (distinct[1:] + distinct[:-1]) / 2


@pytest.mark.parametrize("sign", [1, -1])
def test_no_threshold_between_two_sums_of_the_fitting_half_has_a_larger_youden_index(sign):
    for seed in range(10):
        sums, labels = shifted_sums(12, 20, distance=sign, seed=seed)
        probe = ThresholdProbe.fit(sums, labels, seed=seed)
        fitted, positive, thresholds = fitting_half(sums, labels, seed)
        above = fitted > thresholds[:, None]
        best = np.abs(above[:, positive].mean(axis=1) - above[:, ~positive].mean(axis=1)).max()
        accepted = probe.predict(fitted)
        assert accepted[positive].mean() - accepted[~positive].mean() == pytest.approx(best)
        assert np.isclose(probe.threshold, thresholds).any()


def test_scores_are_those_of_the_held_out_half_counted_by_hand():
    sums, labels = shifted_sums(40, 60, distance=1.5)
    probe = ThresholdProbe.fit(sums, labels, seed=3)
    scores = probe.held_out
    positives = round(scores.base_rate.estimate * scores.n)
    hits = round(scores.recall.estimate * positives)
    alarms = round(scores.false_positive_rate.estimate * (scores.n - positives))
    assert (scores.n, positives) == (50, 20)
    assert scores.recall == wilson_interval(hits, positives)
    assert scores.precision == wilson_interval(hits, hits + alarms)
    assert scores.acceptance == wilson_interval(hits + alarms, 50)


def test_the_held_out_scores_are_those_of_inputs_that_the_fit_never_saw():
    chances = []
    for seed in range(200):
        labels = random(seed).permutation(np.arange(40) < 20)
        held_out = ThresholdProbe.fit(random(seed + 1000).normal(size=40), labels, seed=seed).held_out
        chances.append(held_out.recall.estimate - held_out.false_positive_rate.estimate)
    assert abs(np.mean(chances)) < 0.05  # on the fitting half it would be about 0.4


def fallback(p, accepted, least):
    """The rows that pass, from the strictest on, by the fallback procedure written out."""
    levels, level, count = dict.fromkeys(range(len(p)), 0.0), 0.0125, 1
    while least**count > 0.0125:
        count += 1
    for start in (count * 2**each for each in range(20)):
        if start <= accepted[-1]:
            levels[min(row for row in levels if accepted[row] >= start)] += level
        level /= 2
    passed, carried = [], 0.0
    for row, new in levels.items():
        carried = carried + new if p[row] <= carried + new else 0.0
        passed += [row] if carried else []
    return passed


@pytest.mark.parametrize(("sign", "side"), [(1, "above"), (-1, "below")])
def test_a_chosen_precision_gives_the_most_lenient_threshold_that_passes_the_fallback_procedure(sign, side):
    for seed in range(5):
        sums, labels = shifted_sums(150, 250, distance=2.0, seed=seed)
        probe = ThresholdProbe.fit_precision(sign * sums, labels, min_precision=0.7, seed=seed)
        fitted, positive, thresholds = fitting_half(sums, labels, seed)
        strict = thresholds[::-1]
        accepted = [int((fitted > threshold).sum()) for threshold in strict]
        p = [
            binomtest(int(positive[fitted > threshold].sum()), n, 0.7, "greater").pvalue
            for threshold, n in zip(strict, accepted, strict=True)
        ]
        assert probe.threshold == pytest.approx(sign * strict[fallback(p, accepted, 0.7)[-1]])
        assert probe.direction == side


def test_sums_without_information_seldom_get_a_precision_that_no_threshold_has():
    found = 0
    for seed in range(100):
        labels = random(seed).random(2000) < 0.89
        try:
            ThresholdProbe.fit_precision(random(seed + 1000).normal(size=2000), labels, seed=seed)
        except errors.ProbeError:
            continue
        found += 1
    assert found <= 5  # of 100; with a limit for one threshold alone, 15


def test_no_number_of_inputs_proves_a_precision_of_1():
    with pytest.raises(errors.ProbeError, match="No threshold reaches precision 1 with 95% confidence"):
        ThresholdProbe.fit_precision(np.arange(1000.0), np.arange(1000) > 500, min_precision=1)


def test_a_probe_for_a_chosen_precision_says_what_it_costs():
    sums, labels = shifted_sums(400, 1200, distance=2.5)
    probe = ThresholdProbe.fit_precision(sums, labels)
    assert probe.held_out.precision.estimate > 0.9
    assert 0.05 < probe.held_out.acceptance.estimate < probe.held_out.base_rate.estimate
    assert "chosen for 95% confidence in a precision of at least 0.9 on 800 inputs" in repr(probe)


def test_a_precision_that_no_threshold_has_is_refused_with_the_best_one():
    labels = np.arange(40) % 2 == 0
    sums = np.where(labels, 1.0, np.arange(40) % 4 == 1)  # no sum is larger than that of half of the negatives
    fitted, _, _ = fitting_half(sums, labels, seed=0)
    accepted = int(fitted.sum())
    with pytest.raises(errors.ProbeError) as caught:
        ThresholdProbe.fit_precision(sums, labels, min_precision=0.99, seed=0)
    assert str(caught.value) == (
        "No threshold reaches precision 0.99 with 95% confidence. The strongest evidence is for sums above 0.5, with "
        f"10 positives among {accepted} accepted inputs in the half used for fitting. Lower min_precision, pass more "
        "inputs, or use another channel."
    )


def test_transfer_of_the_same_data_drops_nothing_but_noise():
    sums, labels = shifted_sums(400, 600, distance=1.5)
    transfer = ThresholdProbe.fit(sums, labels).transfer(*shifted_sums(400, 600, distance=1.5, seed=9))
    for drop in transfer.drops.values():
        assert drop.low < 0 < drop.high and abs(drop.estimate) < 0.1


def test_a_base_rate_alone_moves_the_raw_precision_and_not_the_reweighted_one():
    probe = ThresholdProbe.fit(*shifted_sums(200, 600, distance=1.5))
    transfer = probe.transfer(*shifted_sums(3000, 1000, distance=1.5, seed=9))
    assert transfer.shifted.precision.estimate > transfer.fit.precision.estimate + 0.2
    assert abs(transfer.drops["reweighted_precision"].estimate) < 0.1
    base, hits, alarms = 0.25, transfer.shifted.recall.estimate, transfer.shifted.false_positive_rate.estimate
    by_bayes = base * hits / (base * hits + (1 - base) * alarms)
    assert transfer.reweighted_precision.estimate == pytest.approx(by_bayes)


def test_a_signal_that_is_gone_under_shift_drops_recall_and_area():
    probe = ThresholdProbe.fit(*shifted_sums(300, 300, distance=3.0))
    drops = probe.transfer(*shifted_sums(300, 300, distance=0.0, seed=9)).drops
    assert drops["recall"].low > 0.5 and drops["auc"].low > 0.3
    assert drops["false_positive_rate"].low > -0.1


def test_the_area_under_shift_keeps_the_side_that_was_fitted():
    sums, labels = shifted_sums(100, 100, distance=2.0)
    probe = ThresholdProbe.fit(-sums, labels)
    assert probe.transfer(sums, labels).shifted.auc == auc(-sums, labels)


def test_where_nothing_is_accepted_under_shift_the_precision_is_unknown():
    probe = ThresholdProbe.fit(*shifted_sums(50, 50, distance=2.0))
    transfer = probe.transfer(np.full(20, -9.0) + np.arange(20) / 100, np.arange(20) < 10)
    assert math.isnan(transfer.shifted.precision.estimate) and math.isnan(transfer.reweighted_precision.estimate)
    assert (transfer.reweighted_precision.low, transfer.reweighted_precision.high) == (0.0, 1.0)


def test_the_tables_of_a_probe_and_of_a_transfer_name_every_quantity():
    labels = np.arange(40) % 2 == 0
    sums = np.where(labels, 30.0, 10.0) + np.arange(40) / 100
    probe = ThresholdProbe.fit(sums, labels)
    lines = repr(probe).splitlines()
    assert lines[0].startswith("Sums above 20.") and lines[0].endswith(
        ": chosen for true- minus false-positive rate on 20 inputs, scored on 20 others"
    )
    assert lines[1:4] == [
        "quantity                     estimate  low     high    n   note",
        "AUC                          1         0.7225  1       20",
        "recall (true-positive rate)  1         0.7225  1       20",
    ]
    transfer = probe.transfer(sums, labels)
    raw = "raw precision (confounded by the base rate)  1.000 (0.722 to 1.000)  1.000 (0.839 to 1.000)"
    assert raw in repr(transfer)
    frame = transfer.to_pandas().set_index("quantity")
    assert frame.loc["AUC", "drop"] == 0 and math.isnan(
        frame.loc["raw precision (confounded by the base rate)", "drop"]
    )
    assert probe.to_pandas().columns.tolist() == ["quantity", "estimate", "low", "high", "n", "note"]


def test_a_probe_and_a_transfer_give_the_reason_of_an_interval_that_is_withheld_and_mark_few():
    probe = ThresholdProbe.fit(*shifted_sums(8, 8, distance=5.0))
    reason = "4 independent inputs with one label, fewer than 6"
    assert probe.to_records()[0]["note"] == reason and probe.to_records()[1]["note"] == ""
    assert repr(probe).splitlines()[-1] == f"No interval (-): {reason}."
    transfer = ThresholdProbe.fit(*shifted_sums(16, 16, distance=5.0)).transfer(*shifted_sums(4, 4, distance=5.0))
    record = transfer.to_records()[0]
    assert (record["fit note"], record["shifted note"], record["drop note"]) == ("few", reason, reason)
    assert repr(transfer).splitlines()[2] == (
        "AUC                                          1.000 (0.676 to 1.000, few)  1.000 (-)               0.000 (-)"
    )
    assert repr(transfer).splitlines()[-2:] == [
        "few: an interval over fewer than ten independent rows.",
        f"No interval (-): {reason}.",
    ]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, torch.int64])
def test_labels_may_be_zeros_and_ones_of_any_dtype(dtype):
    sums, labels = shifted_sums(12, 20, distance=1.5)
    of_any = torch.tensor(labels).to(dtype) if isinstance(dtype, torch.dtype) else labels.astype(dtype)
    probe = ThresholdProbe.fit(sums, of_any)
    assert probe == ThresholdProbe.fit(sums, labels)
    assert probe.transfer(sums, of_any) == probe.transfer(sums, labels)


REFUSED = {
    "a sum to predict from that is not finite": (
        lambda: ThresholdProbe.fit(SUMS, LABELS).predict([[1.0, math.nan]]),
        "sums[0, 1] must be finite; got nan. Leave out that input, pair or episode.",
    ),
    "sums of many channels": (
        lambda: ThresholdProbe.fit(np.zeros((20, 2)), LABELS),
        "sums must be a nonempty array with axes (input); got shape (20, 2).",
    ),
    "labels that are no booleans": (
        lambda: ThresholdProbe.fit(SUMS, LABELS.astype(int) + 1),
        "labels must have one boolean for each of the 20 inputs, such as directions == 0; got dtype int64 and shape "
        "(20,).",
    ),
    "too few of a label": (
        lambda: ThresholdProbe.fit(SUMS, SUMS < 3),
        "labels must have at least 4 positives and 4 negatives; got 3 and 17.",
    ),
    "too few of a label under shift": (
        lambda: ThresholdProbe.fit(SUMS, LABELS).transfer(SUMS, SUMS < 1),
        "labels must have at least 2 positives and 2 negatives; got 1 and 19.",
    ),
    "a channel that does not vary": (
        lambda: ThresholdProbe.fit(np.full(20, 3.0), LABELS),
        "All 10 sums in the half of the inputs used for fitting equal 3. Use a channel that varies, or pass more "
        "inputs.",
    ),
    "a precision in percent": (
        lambda: ThresholdProbe.fit_precision(SUMS, LABELS, min_precision=99),
        "min_precision must be greater than 0 and at most 1, such as 0.9; got 99.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_threshold_can_be_fitted_to_is_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(errors.ProbeError) as caught:
        call()
    assert str(caught.value) == message


def test_a_negative_seed_is_refused():
    with pytest.raises(errors.StatisticsError) as caught:
        ThresholdProbe.fit(SUMS, LABELS, seed=-1)
    assert str(caught.value) == "seed must be a whole number, at least 0; got -1."
