"""Linear probes against cross-validation written out."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from chanpatch import errors
from chanpatch.probes import linear_probe
from chanpatch.statistics import auc, mcnemar_exact, wilson_interval

LABELS = np.arange(20) % 2 == 0
SUMS = np.arange(20.0)


def random(seed=0):
    return np.random.default_rng(seed)


def test_a_linear_probe_tells_what_no_single_channel_tells():
    sums = random().normal(size=(300, 5))
    labels = sums[:, :4].sum(axis=1) > 1
    probe = linear_probe(sums, labels)
    assert probe.accuracy.estimate > 0.93 and probe.auc.estimate > 0.98
    assert probe.base_rate == (~labels).mean()
    assert probe.gain.low > 0 and probe.p < 1e-6
    assert max(auc(sums[:, channel], labels).estimate for channel in range(5)) < 0.85


def test_a_linear_probe_is_cross_validated_logistic_regression_written_out():
    sums = random().normal(size=(60, 3))
    labels = sums[:, 0] + random(1).normal(size=60) > 0.4
    scores = np.empty(60)
    for rest, part in StratifiedKFold(4, shuffle=True, random_state=7).split(sums, labels):
        middle, spread = sums[rest].mean(axis=0), sums[rest].std(axis=0)
        model = LogisticRegression().fit((sums[rest] - middle) / spread, labels[rest])
        scores[part] = model.decision_function((sums[part] - middle) / spread)
    probe = linear_probe(sums, labels, folds=4, seed=7)
    right, base = (scores > 0) == labels, ~labels
    assert probe.accuracy == wilson_interval(int(right.sum()), 60)
    assert probe.auc.estimate == pytest.approx(roc_auc_score(labels, scores))
    assert probe.p == mcnemar_exact(int((right & ~base).sum()), int((~right & base).sum()))


def test_a_linear_probe_of_noise_is_no_better_than_the_base_rate():
    gains = [linear_probe(random(seed).normal(size=(80, 4)), np.arange(80) % 4 == 0).gain for seed in range(20)]
    assert np.mean([gain.low > 0 for gain in gains]) <= 0.1 and np.mean([gain.estimate for gain in gains]) < 0.01


def test_a_linear_probe_prints_as_a_table():
    labels = np.arange(80) % 4 == 0
    probe = linear_probe(random().normal(size=(80, 2)) + 9 * labels[:, None], labels)
    lines = repr(probe).splitlines()
    assert lines[0] == "Linear probe, 5-fold cross-validation on 80 inputs"
    assert lines[3].split() == ["base", "rate", "0.75", "80"]
    assert probe.to_pandas()["quantity"].tolist() == ["accuracy", "base rate", "gain", "AUC"]


def test_a_missing_scikit_learn_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(errors.MissingPackageError) as caught:
        linear_probe(np.zeros((20, 2)), np.arange(20) < 10)
    assert str(caught.value) == "scikit-learn is not installed: pip install scikit-learn"


REFUSED = {
    "a sum that is not finite": (
        lambda: linear_probe(np.where(np.eye(20, 2), math.inf, 0), LABELS),
        "sums[0, 0] must be finite; got inf. Leave out that input, pair or episode.",
    ),
    "one fold": (
        lambda: linear_probe(SUMS[:, None], LABELS, folds=1),
        "folds must be a whole number, at least 2; got 1.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_linear_probe_can_be_fitted_to_is_refused_by_name(name):
    call, message = REFUSED[name]
    with pytest.raises(errors.ProbeError) as caught:
        call()
    assert str(caught.value) == message
