"""All channels together against one label, fitted on some inputs and scored on others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ProbeError
from ..results import Records, columns
from ..statistics.interval import Booleans, Floats, Interval, finite, interval_columns, two_groups
from ..statistics.proportions import paired_counts, paired_difference_interval, wilson_interval
from ..statistics.ranking import auc
from ..statistics.resampling import bootstrap_interval

_STEPS = 50  # of Newton's method; fewer than ten are usual
_FLAT = 1e-6  # penalty on the intercept: it stays finite if all labels are equal


@dataclass(frozen=True, repr=False)
class ProbeScores(Records):
    """How well a probe predicts a label on inputs that it was not fitted on; every interval is a 95% interval.

    Attributes:
        accuracy: Share of inputs whose label is predicted.
        base_rate: Accuracy of always predicting the label that was more frequent in the fit.
        gain: Accuracy minus base rate, over the same inputs.
        auc: Probability that a positive scores above a negative; None with fewer than two of either.
        n: Number of inputs.
    """

    accuracy: Interval
    base_rate: Interval
    gain: Interval
    auc: Interval | None
    n: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity: quantity, estimate, low, high, n."""
        quantities = {
            "accuracy": self.accuracy,
            "base rate": self.base_rate,
            "gain": self.gain,
            "AUC": self.auc,
        }
        rows = [interval_columns(each, "estimate", "low", "high") for each in quantities.values()]
        return columns(
            quantity=quantities,
            **{name: [row[name] for row in rows] for name in ("estimate", "low", "high")},
            n=[self.n] * len(rows),
        )

    def _title(self) -> str:
        return f"Scores of a probe on {self.n} inputs"


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """A logistic regression on all channels. Score it on shifted inputs to see how well it transfers.

    `chanpatch.probes.linear_probe` instead scores by cross-validation, on inputs of the same kind.

    Attributes:
        intercept: Log odds of the label if every channel has its mean.
        coefficients: `(channel,)`: log odds per standard deviation of a channel.
        mean: `(channel,)`: mean over the inputs of the fit.
        std: `(channel,)`: standard deviation over these; 1 for a channel that does not vary.
        majority: Label that was more frequent in the fit.
        fitted_on: Number of inputs of the fit.

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
        """Return the regression with the largest penalized likelihood, after scaling each channel to variance 1.

        Args:
            sums: `(input, channel)`: channel sums, or other features.
            labels: `(input,)`: booleans, or 0 and 1.
            penalty: Weight of half the squared coefficients, so that separable labels have finite coefficients.

        Raises:
            ProbeError: If sums and labels do not fit, or the penalty is not above 0.

        References:
            Hastie, Tibshirani and Friedman, "The elements of statistical learning" (2009), section 4.4.
        """
        array, positive = _checked(sums, labels)
        if not penalty > 0:
            raise ProbeError(f"penalty is {penalty!r}, but it must be above 0, such as 1.0.")
        mean, std = array.mean(axis=0), array.std(axis=0)
        std = np.where(std > 0, std, 1.0)
        intercept, *coefficients = _fitted((array - mean) / std, positive, penalty)
        majority = bool(positive.mean() >= 0.5)
        return cls(float(intercept), np.array(coefficients), mean, std, majority, len(array))

    def predict(self, sums: ArrayLike) -> Floats:
        """Return the probability of the label on each input, `(input,)`, from sums `(input, channel)`."""
        array = finite("sums", sums, ("input", "channel"), ProbeError)
        return _probability(self.intercept + self._scaled(array) @ self.coefficients)

    def score(self, sums: ArrayLike, labels: ArrayLike) -> ProbeScores:
        """Return how well the probe predicts the labels of other inputs.

        Args:
            sums: `(input, channel)`, with the channels of the fit.
            labels: `(input,)`: booleans, or 0 and 1.

        Raises:
            ProbeError: If sums and labels do not fit each other or the probe.
        """
        array, positive = _checked(sums, labels)
        shares = self.predict(array)
        right, base = (shares > 0.5) == positive, positive == self.majority
        n, rarer = len(array), min(positive.sum(), (~positive).sum())
        return ProbeScores(
            accuracy=wilson_interval(int(right.sum()), n),
            base_rate=wilson_interval(int(base.sum()), n),
            gain=paired_difference_interval(*paired_counts(right, base)),
            auc=auc(shares, positive) if rarer > 1 else None,
            n=n,
        )

    def coefficient_interval(
        self, sums: ArrayLike, labels: ArrayLike, *, penalty: float = 1.0, resamples: int = 999, seed: int = 0
    ) -> Interval[Floats]:
        """Return the coefficients with their 95% bootstrap intervals, `(channel,)`. Arguments as for `fit`.

        Pass the inputs used for the fit. The scaling from that fit is reused for every resample.
        """
        array, positive = _checked(sums, labels)
        sample = np.column_stack([self._scaled(array), positive])
        return bootstrap_interval(
            sample, lambda rows: _fitted(rows[:, :-1], rows[:, -1] > 0, penalty)[1:], resamples=resamples, seed=seed
        )

    def _scaled(self, array: Floats) -> Floats:
        if array.shape[1] != len(self.mean):
            raise ProbeError(f"sums has {array.shape[1]} channels, but the probe was fitted on {len(self.mean)}.")
        return (array - self.mean) / self.std


def _checked(sums: ArrayLike, labels: ArrayLike) -> tuple[Floats, Booleans]:
    array = finite("sums", sums, ("input", "channel"), ProbeError)
    return array, two_groups(labels, len(array), 0, ProbeError)


def _fitted(scaled: Floats, positive: Booleans, penalty: float) -> Floats:
    """Return the intercept and the coefficients by Newton's method: `(1 + channel,)`."""
    design = np.column_stack([np.ones(len(scaled)), scaled])
    ridge = np.diag([_FLAT, *[penalty] * scaled.shape[1]])
    found = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        shares = _probability(design @ found)
        gradient = design.T @ (positive - shares) - ridge @ found
        step = np.linalg.solve((design * (shares * (1 - shares))[:, None]).T @ design + ridge, gradient)
        found += np.clip(step, -2.0, 2.0)  # a whole step can overshoot if shares are near 0 or 1
        if np.abs(step).max() < 1e-8:
            break
    return found


def _probability(logits: Floats) -> Floats:
    shares: Floats = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    return shares
