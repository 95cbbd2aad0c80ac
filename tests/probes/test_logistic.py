"""Logistic probes against scikit-learn's regression with the same penalty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from chanpatch.errors import ProbeError
from chanpatch.probes import LogisticProbe
from chanpatch.statistics import auc, holm, mean_interval, wilson_interval

RANDOM = np.random.default_rng(0)
LABELS = np.arange(200) % 3 == 0
SUMS = RANDOM.normal(5, 2, size=(200, 3)) + LABELS[:, None] * [3, 1, 0]


@pytest.mark.parametrize("penalty", [1e-6, 0.1, 1.0])
def test_a_logistic_probe_is_the_penalized_regression_on_scaled_channels(penalty: float) -> None:
    probe = LogisticProbe.fit(SUMS, LABELS, penalty=penalty)
    scaled = (SUMS - SUMS.mean(axis=0)) / SUMS.std(axis=0)
    model = LogisticRegression(C=1 / penalty, tol=1e-10).fit(scaled, LABELS)
    np.testing.assert_allclose(probe.coefficients, model.coef_[0], rtol=1e-4)
    np.testing.assert_allclose(probe.predict(SUMS), model.predict_proba(scaled)[:, 1], rtol=1e-4)


def test_a_probe_under_a_weak_penalty_is_fitted_to_labels_that_channels_separate() -> None:
    random = np.random.default_rng(6)
    scaled = random.normal(size=(160, 8))
    scaled = (scaled - scaled.mean(axis=0)) / scaled.std(axis=0)
    labels = scaled @ random.normal(size=8) > 0
    model = LogisticRegression(C=1e4, tol=1e-12, max_iter=100_000).fit(scaled, labels)
    np.testing.assert_allclose(LogisticProbe.fit(scaled, labels, penalty=1e-4).coefficients, model.coef_[0], rtol=1e-3)


def test_a_constant_channel_that_has_another_value_later_does_not_change_predictions() -> None:
    constant = np.full((len(SUMS), 1), 0.1)  # numpy's std of equal numbers is positive because of rounding
    probe = LogisticProbe.fit(np.hstack([SUMS, constant]), LABELS)
    expected = LogisticProbe.fit(SUMS, LABELS).predict(SUMS)
    assert probe.std[3] == 1 and abs(probe.coefficients[3]) < 1e-9
    np.testing.assert_allclose(probe.predict(np.hstack([SUMS, 3 * constant])), expected, rtol=1e-6)


def test_a_probe_is_scored_on_other_inputs_beside_the_label_that_was_more_frequent_in_the_fit() -> None:
    probe = LogisticProbe.fit(SUMS[:100], LABELS[:100])
    scores = probe.score(SUMS[100:], LABELS[100:])
    right = (probe.predict(SUMS[100:]) > 0.5) == LABELS[100:]
    assert scores.accuracy == wilson_interval(int(right.sum()), 100)
    assert scores.base_rate == wilson_interval(int((~LABELS[100:]).sum()), 100)
    assert scores.gain.estimate == pytest.approx(scores.accuracy.estimate - scores.base_rate.estimate)
    assert scores.auc == auc(probe.predict(SUMS[100:]), LABELS[100:])
    assert [record["quantity"] for record in scores.to_records()] == ["accuracy", "base rate", "gain", "AUC"]


def test_under_a_rare_label_the_scores_have_no_auc() -> None:
    scores = LogisticProbe.fit(SUMS, LABELS).score(SUMS[1:3], [False, False])
    assert scores.auc is None and scores.to_records()[3]["estimate"] is None


def test_equal_labels_and_constant_channels_give_a_finite_probe() -> None:
    probe = LogisticProbe.fit(np.ones((5, 2)), np.ones(5))
    assert probe.std.tolist() == [1, 1] and (probe.predict(np.ones((2, 2))) > 0.99).all()


def test_coefficients_have_intervals_over_the_inputs_of_the_fit() -> None:
    probe = LogisticProbe.fit(SUMS, LABELS)
    interval = probe.coefficient_interval(SUMS, LABELS, resamples=99)
    np.testing.assert_allclose(interval.estimate, probe.coefficients)
    assert interval.low[0] > 0 and interval.low[2] < 0 < interval.high[2]
    few = LogisticProbe.fit(SUMS, np.arange(len(SUMS)) < 5).coefficient_interval(
        SUMS, np.arange(len(SUMS)) < 5, resamples=9
    )
    assert np.isnan(few.low).all() and set(few.note) == {"5 independent inputs with one label, fewer than 6"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LogisticProbe.fit(SUMS, LABELS).predict(SUMS[:, :2]),
            "sums has 2 channels, but the probe was fitted on 3 channels.",
        ),
        (
            lambda: LogisticProbe.fit(SUMS, LABELS, penalty=0),
            "penalty must be positive and finite, such as 1.0; got 0.",
        ),
        (
            lambda: LogisticProbe.fit(SUMS, LABELS).coefficient_interval(SUMS, LABELS, penalty=float("inf")),
            "penalty must be positive and finite, such as 1.0; got inf.",
        ),
        (
            lambda: LogisticProbe.fit(SUMS, LABELS[:9]),
            "labels must have one boolean for each of the 200 inputs, such as directions == 0; got dtype bool and "
            "shape (9,).",
        ),
    ],
)
def test_sums_that_do_not_fit_are_refused(call, message: str) -> None:
    with pytest.raises(ProbeError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("kind", ["bfloat16", "with a gradient"])
def test_numbers_may_be_tensors_that_numpy_cannot_read(kind: str) -> None:
    tensor = torch.linspace(-1, 1, 40, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    array, labels = tensor.double().numpy(), np.arange(40) % 3 > 0
    tensor.requires_grad_(kind != "bfloat16")
    fitted = [LogisticProbe.fit(sums[:, None], labels).predict(sums[:, None]) for sums in (tensor, array)]
    np.testing.assert_array_equal(*fitted)
    assert mean_interval(tensor) == mean_interval(array)
    np.testing.assert_array_equal(holm(tensor.abs()), holm(abs(array)))
