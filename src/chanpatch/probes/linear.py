"""All channels together against one label."""

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
    """How well a weighted sum of the channels predicts a label, on inputs that it was not fitted on.

    The 95% intervals are those of one fixed rule: they ignore that each fold has its own fit.

    Attributes:
        accuracy: Share of inputs whose label is predicted.
        auc: Probability that a positive scores above a negative.
        base_rate: Share of the more frequent label: the accuracy of always predicting it.
        gain: Accuracy minus base rate, over the same inputs.
        p: Two-sided exact McNemar p-value that the gain is zero.
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
        """Return one dict per quantity: quantity, estimate, low, high, p, n."""
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
        return f"Linear probe, {self.folds} folds of {self.n} inputs"


def linear_probe(sums: ArrayLike, labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> LinearProbe:
    """Return how well a logistic regression on all channels predicts a label, by cross-validation.

    Channels are scaled to unit variance on the inputs of each fit. The regularization is scikit-learn's default, C = 1.

    Args:
        sums: `(input, channel)`.
        labels: `(input,)`: booleans, or 0 and 1; either on at least as many inputs as there are folds.
        folds: Number of folds, at least 2.
        seed: Random seed of the folds.

    Raises:
        MissingPackageError: If scikit-learn is not installed.
        ProbeError: If sums and labels do not fit, or a label is too rare.

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
