"""Predict one label from all channels, and cross-validate the predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

from ..errors import ProbeError
from ..results import Records, columns, imported
from ..statistics.interval import Interval, finite, two_groups, whole
from ..statistics.proportions import mcnemar_exact, paired_counts, paired_difference_interval, wilson_interval
from ..statistics.ranking import auc


@dataclass(frozen=True, repr=False)
class LinearProbe(Records):
    """Cross-validated scores for a linear probe that uses all channels.

    The 95% intervals treat the predictions as coming from one fixed classifier and ignore that each fold is fitted
    separately.

    Attributes:
        accuracy: Fraction of inputs whose label is predicted correctly.
        auc: Probability that a random positive scores higher than a random negative.
        base_rate: Fraction of inputs with the more frequent label: the accuracy of always predicting that label.
        gain: Accuracy minus base rate on the same inputs.
        p: Two-sided exact McNemar p-value for the null hypothesis of zero gain.
        n: Number of inputs.
        folds: Number of folds.
    """

    accuracy: Interval
    auc: Interval
    base_rate: float
    gain: Interval
    p: float
    n: int
    folds: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity, with the keys quantity, estimate, low, high, p and n."""
        accuracy, gain, area = self.accuracy, self.gain, self.auc
        return columns(
            quantity=("accuracy", "base rate", "gain", "AUC"),
            estimate=(accuracy.estimate, self.base_rate, gain.estimate, area.estimate),
            low=(accuracy.low, None, gain.low, area.low),
            high=(accuracy.high, None, gain.high, area.high),
            p=(None, None, self.p, None),
            n=[self.n] * 4,
        )

    def _title(self) -> str:
        return f"Linear probe, {self.folds}-fold cross-validation on {self.n} inputs"


def linear_probe(sums: ArrayLike, labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> LinearProbe:
    """Measure by cross-validation how well logistic regression on all channels predicts a label.

    Channels are scaled to unit variance on each fold's training inputs. The regularization is scikit-learn's default,
    C=1.

    Args:
        sums: Channel sums with shape `(input, channel)`.
        labels: Booleans (or 0 and 1) with shape `(input,)`, with at least `folds` positives and `folds` negatives.
        folds: Number of folds, at least 2.
        seed: Random seed for the split into folds.

    Raises:
        MissingPackageError: If scikit-learn is not installed.
        ProbeError: If sums, labels or folds are invalid, sums and labels do not match, or a label is too rare.

    Example:
        >>> import numpy as np
        >>> labels = np.arange(200) % 4 == 0
        >>> sums = np.random.default_rng(0).normal(size=(200, 3)) + labels[:, None]
        >>> probe = linear_probe(sums, labels)
        >>> probe.accuracy.estimate > probe.base_rate
        True

    References:
        Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016), section 3.
    """
    array = finite("sums", sums, ("input", "channel"), ProbeError)
    whole("folds", folds, least=2, error=ProbeError)
    positive = two_groups(labels, len(array), folds, ProbeError)
    regression = imported("sklearn.linear_model", package="scikit-learn").LogisticRegression(max_iter=5000)
    scaler, selection = imported("sklearn.preprocessing").StandardScaler(), imported("sklearn.model_selection")
    model = imported("sklearn.pipeline").make_pipeline(scaler, regression)
    split = selection.StratifiedKFold(folds, shuffle=True, random_state=whole("seed", seed))
    scores = selection.cross_val_predict(model, array, positive, cv=split, method="decision_function")

    right, majority = (scores > 0) == positive, positive.mean() > 0.5
    counts = paired_counts(right, positive == majority)
    return LinearProbe(
        accuracy=wilson_interval(int(right.sum()), len(array)),
        auc=auc(scores, positive),
        base_rate=float((positive == majority).mean()),
        gain=paired_difference_interval(*counts),
        p=mcnemar_exact(counts.only_first, counts.only_second),
        n=len(array),
        folds=folds,
    )
