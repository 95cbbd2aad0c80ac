"""Predict one label from all channels; fit on some inputs and score on other inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ProbeError
from ..results import Records
from ..statistics.interval import Booleans, Floats, Interval, finite, interval_columns, two_groups
from ..statistics.means import limited
from ..statistics.proportions import paired_counts, paired_difference_interval, wilson_interval
from ..statistics.ranking import auc
from ..statistics.resampling import bootstrap_interval

_STEPS = 100  # maximum number of Newton steps; fewer than ten are usually enough
_FLAT = 1e-6  # penalty that keeps the intercept finite if all labels are equal


@dataclass(frozen=True, repr=False)
class ProbeScores(Records):
    """Scores for a probe on held-out inputs, with 95% intervals.

    Attributes:
        accuracy: Fraction of inputs whose label is predicted correctly.
        base_rate: Accuracy, on the same inputs, of always predicting the label that was more frequent in training.
        gain: Accuracy minus base rate on the same inputs.
        auc: Probability that a random positive scores higher than a random negative; None if either label occurs fewer
            than two times.
        n: Number of inputs.
    """

    accuracy: Interval
    base_rate: Interval
    gain: Interval
    auc: Interval | None
    n: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity, with the keys quantity, estimate, low, high and n."""
        rows = {"accuracy": self.accuracy, "base rate": self.base_rate, "gain": self.gain, "AUC": self.auc}
        return [
            {"quantity": name, **interval_columns(each, "estimate", "low", "high"), "n": self.n}
            for name, each in rows.items()
        ]

    def _title(self) -> str:
        return f"Probe scores on {self.n} inputs"


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """A logistic regression on all channels. To measure transfer, score the probe on inputs from another distribution.

    To cross-validate on a single data set, use `chanpatch.probes.linear_probe`.

    Attributes:
        intercept: Log odds of the label if every channel equals its mean over the training inputs.
        coefficients: Change in log odds per standard deviation of the channel, with shape `(channel,)`.
        mean: Mean of each channel over the training inputs, with shape `(channel,)`.
        std: Standard deviation of each channel over the training inputs, with shape `(channel,)`; 1 for channels that
            do not vary.
        majority: The more frequent label in the training data.
        fitted_on: Number of training inputs.

    Example:
        >>> labels = np.arange(200) % 4 == 0
        >>> sums = np.random.default_rng(0).normal(size=(200, 3)) + 2 * labels[:, None]
        >>> probe = LogisticProbe.fit(sums[:100], labels[:100])
        >>> probe.score(sums[100:], labels[100:]).gain.low > 0
        True
    """

    intercept: float
    coefficients: Floats
    mean: Floats
    std: Floats
    majority: bool
    fitted_on: int

    @classmethod
    def fit(cls, sums: ArrayLike, labels: ArrayLike, *, penalty: float = 1.0) -> LogisticProbe:
        """Fit a logistic regression by penalized maximum likelihood, with channels scaled to unit variance.

        Args:
            sums: Channel sums or other features, with shape `(input, channel)`.
            labels: Booleans (or 0 and 1) with shape `(input,)`.
            penalty: L2 penalty: the loss includes `penalty` times half the squared norm of the coefficients.

        Raises:
            ProbeError: If sums or labels are invalid or do not match, or the penalty is not positive and finite.

        References:
            Hastie, Tibshirani and Friedman, "The elements of statistical learning" (2009), section 4.4.
        """
        array, positive = _checked(sums, labels)
        mean, varies = array.mean(axis=0), np.ptp(array, axis=0) > 0
        std = np.where(varies, array.std(axis=0), 1.0)  # rounding can make the std of equal numbers positive
        intercept, *coefficients = _fitted((array - mean) / std, positive, penalty)
        majority = bool(positive.mean() >= 0.5)
        return cls(float(intercept), np.array(coefficients), mean, std, majority, len(array))

    def predict(self, sums: ArrayLike) -> Floats:
        """Return each input's probability of having the label, with shape `(input,)`.

        `sums` has shape `(input, channel)`.
        """
        array = finite("sums", sums, ("input", "channel"), ProbeError)
        return _probability(self.intercept + self._scaled(array) @ self.coefficients)

    def score(self, sums: ArrayLike, labels: ArrayLike) -> ProbeScores:
        """Score the probe's predictions on other inputs.

        Args:
            sums: Sums of the same channels as in `fit`, with shape `(input, channel)`.
            labels: Booleans (or 0 and 1) with shape `(input,)`.

        Raises:
            ProbeError: If sums or labels are invalid, or do not match each other or the probe.
        """
        array, positive = _checked(sums, labels)
        probability = self.predict(array)
        right, base = (probability > 0.5) == positive, positive == self.majority
        n, rarer = len(array), min(positive.sum(), (~positive).sum())
        return ProbeScores(
            accuracy=wilson_interval(int(right.sum()), n),
            base_rate=wilson_interval(int(base.sum()), n),
            gain=paired_difference_interval(*paired_counts(right, base)),
            auc=auc(probability, positive) if rarer > 1 else None,
            n=n,
        )

    def coefficient_interval(
        self, sums: ArrayLike, labels: ArrayLike, *, penalty: float = 1.0, resamples: int = 999, seed: int = 0
    ) -> Interval[Floats]:
        """Return the coefficients and their 95% bootstrap intervals, as arrays with shape `(channel,)`.

        Pass the sums, labels and penalty that were passed to `fit`. All resamples use the channel scaling from `fit`.
        The intervals do not correct for the penalty, which shrinks large coefficients. If six to nine inputs have the
        rarer label, the `note` of each interval is `"few"`. If fewer than six inputs have the rarer label, the
        endpoints are NaN, and `note` contains the reason.
        """
        array, positive = _checked(sums, labels)
        sample = np.column_stack([self._scaled(array), positive])
        interval = bootstrap_interval(
            sample, lambda rows: _fitted(rows[:, :-1], rows[:, -1] > 0, penalty)[1:], resamples=resamples, seed=seed
        )
        return limited(interval, min(int(positive.sum()), int((~positive).sum())), "inputs with one label")

    def _scaled(self, array: Floats) -> Floats:
        if array.shape[1] != len(self.mean):
            raise ProbeError(
                f"sums has {array.shape[1]} channels, but the probe was fitted on {len(self.mean)} channels."
            )
        return (array - self.mean) / self.std


def _checked(sums: ArrayLike, labels: ArrayLike) -> tuple[Floats, Booleans]:
    array = finite("sums", sums, ("input", "channel"), ProbeError)
    return array, two_groups(labels, len(array), 0, ProbeError)


def _fitted(scaled: Floats, positive: Booleans, penalty: float) -> Floats:
    """Fit the intercept and the coefficients by Newton's method; return one array with shape `(1 + channel,)`."""
    if not 0 < penalty < math.inf:
        raise ProbeError(f"penalty must be positive and finite, such as 1.0; got {penalty!r}.")
    design = np.column_stack([np.ones(len(scaled)), scaled])
    ridge = np.diag([_FLAT, *[penalty] * scaled.shape[1]])

    def loss(found: Floats) -> float:
        logits = np.where(positive, -1.0, 1.0) * (design @ found)
        return float(np.logaddexp(0.0, logits).sum() + found @ ridge @ found / 2)

    found = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        predicted = _probability(design @ found)
        gradient = design.T @ (positive - predicted) - ridge @ found
        step = np.linalg.solve((design * (predicted * (1 - predicted))[:, None]).T @ design + ridge, gradient)
        while np.abs(step).max() > 1e-8 and loss(found + step) > loss(found):  # a full step can overshoot
            step /= 2
        found += step
        if np.abs(step).max() <= 1e-8:
            break
    return found


def _probability(logits: Floats) -> Floats:
    probability: Floats = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    return probability
