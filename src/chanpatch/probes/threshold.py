"""One channel's sum against one label: a threshold, how good it is, and what shifted data leave of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ProbeError
from ..results import imported, table
from ..statistics.interval import Interval
from ..statistics.proportions import difference_interval, reweighted_precision, wilson_interval
from ..statistics.ranking import auc
from .checks import Floats, Rows, checked_booleans, checked_finite, checked_sums, halves

Direction = Literal["above", "below"]


@dataclass(frozen=True)
class ThresholdScores:
    """How well a threshold tells the positives among some inputs; every interval is one of 95%.

    Attributes:
        auc: The probability that a positive lies further on the accepted side than a negative.
        precision: Of the accepted inputs, the share of positives; NaN, within 0 and 1, where none was accepted.
        recall: Of the positives, the share that is accepted: the true-positive rate.
        false_positive_rate: Of the negatives, the share that is accepted.
        acceptance: The share of all inputs that is accepted.
        base_rate: The share of positives, which is also the precision of accepting everything.
        n: The number of inputs.
    """

    auc: Interval
    precision: Interval
    recall: Interval
    false_positive_rate: Interval
    acceptance: Interval
    base_rate: Interval
    n: int

    def named(self) -> list[tuple[str, Interval]]:
        """Return what each quantity is called in a table, and the quantity."""
        return [
            ("AUC", self.auc),
            ("precision", self.precision),
            ("recall (true-positive rate)", self.recall),
            ("false-positive rate", self.false_positive_rate),
            ("accepted", self.acceptance),
            ("base rate", self.base_rate),
        ]


@dataclass(frozen=True, repr=False)
class ThresholdProbe:
    """A threshold on a channel's sum, fitted on one half of the inputs and scored on the other.

    Attributes:
        threshold: Where the two sides meet, halfway between two sums of the fitting half.
        direction: The accepted side: `"above"` means sums greater than the threshold.
        criterion: What the threshold was chosen for.
        fitted_on: Number of inputs it was chosen on.
        held_out: How it does on the other half.

    Example:
        >>> labels = np.arange(200) % 4 == 0
        >>> sums = np.random.default_rng(0).normal(20 + 20 * labels, 5)
        >>> probe = ThresholdProbe.fit(sums, labels)
        >>> probe.direction, probe.predict([10, 50]).tolist()
        ('above', [False, True])
    """

    threshold: float
    direction: Direction
    criterion: str
    fitted_on: int
    held_out: ThresholdScores

    @classmethod
    def fit(cls, sums: ArrayLike, labels: ArrayLike, *, seed: int = 0) -> ThresholdProbe:
        """Return the threshold and the side with the largest true-positive minus false-positive rate.

        Args:
            sums: `(input,)`: one channel's sums.
            labels: `(input,)`: booleans. At least four inputs have either, and each half gets half of both.
            seed: Of the halves.

        Raises:
            ProbeError: If sums and labels do not fit, a label is too rare, or the channel does not vary.

        References:
            Youden, "Index for rating diagnostic tests" (1950).
        """
        sums, labels, fitting, scoring = _halved(sums, labels, seed)
        candidates, hits, alarms = _candidates(sums[fitting], labels[fitting])
        gain = hits / labels[fitting].sum() - alarms / (~labels[fitting]).sum()
        best = int(np.argmax(np.abs(gain)))
        direction: Direction = "above" if gain[best] >= 0 else "below"
        held_out = _scores(sums[scoring], labels[scoring], candidates[best], direction)
        return cls(float(candidates[best]), direction, "true- minus false-positive rate", len(fitting), held_out)

    @classmethod
    def fit_precision(
        cls, sums: ArrayLike, labels: ArrayLike, *, min_precision: float = 0.99, seed: int = 0
    ) -> ThresholdProbe:
        """Return the threshold that accepts most with so high a precision on the fitting half.

        The accepted side is the one on which the positives of the fitting half rank. Above, it is the smallest
        such threshold. `held_out.precision` is what the choice is worth, `held_out.acceptance` what it costs.

        Args:
            sums: As for `fit`.
            labels: As for `fit`.
            min_precision: Of the accepted inputs of the fitting half, the least share of positives.
            seed: Of the halves.

        Raises:
            ProbeError: As for `fit`, and if no threshold is that precise.
        """
        if not 0 < min_precision <= 1:
            raise ProbeError(f"min_precision is {min_precision!r}, but a precision lies between 0 and 1, such as 0.99.")
        sums, labels, fitting, scoring = _halved(sums, labels, seed)
        candidates, hits, alarms = _candidates(sums[fitting], labels[fitting])
        direction: Direction = "above" if auc(sums[fitting], labels[fitting]).estimate >= 0.5 else "below"
        if direction == "below":
            hits, alarms = labels[fitting].sum() - hits, (~labels[fitting]).sum() - alarms
        precision = hits / (hits + alarms)
        precise = np.flatnonzero(precision >= min_precision)
        if not precise.size:
            best = int(np.argmax(precision))
            raise ProbeError(
                f"No threshold has precision {min_precision:g} on the fitting half. The best is {precision[best]:.3g}, "
                f"at sums {direction} {candidates[best]:.4g}, where {hits[best] + alarms[best]} of {len(fitting)} "
                "inputs are accepted. Lower min_precision, or take another channel."
            )
        threshold = float(candidates[precise[0] if direction == "above" else precise[-1]])
        held_out = _scores(sums[scoring], labels[scoring], threshold, direction)
        return cls(threshold, direction, f"precision of at least {min_precision:g}", len(fitting), held_out)

    def predict(self, sums: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each sum lies on the accepted side, in the shape of the sums.

        Raises:
            ProbeError: If a sum is not finite.
        """
        return _accepted(checked_finite(np.asarray(sums, dtype=np.float64)), self.threshold, self.direction)

    def transfer(self, sums: ArrayLike, labels: ArrayLike) -> Transfer:
        """Return how the same threshold does on shifted data, beside how it did on the held-out half.

        Args:
            sums: `(input,)`: the same channel's sums of other inputs.
            labels: `(input,)`: booleans; at least two inputs have either.

        Raises:
            ProbeError: If sums and labels do not fit, or a label is too rare.
        """
        array = checked_sums(sums, ("input",))
        positive = checked_booleans(labels, len(array), fewest=2)
        return Transfer(self.held_out, _scores(array, positive, self.threshold, self.direction))

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity of the held-out half: quantity, estimate, low, high, n."""
        return [
            {"quantity": name, **_columns("", value), "n": self.held_out.n} for name, value in self.held_out.named()
        ]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        title = (
            f"Sums {self.direction} {self.threshold:.4g}: chosen for {self.criterion} on {self.fitted_on} inputs, "
            f"scored on {self.held_out.n} others"
        )
        return "\n".join(
            [title, *table([{"quantity": name, "held out": _shown(value)} for name, value in self.held_out.named()])]
        )


@dataclass(frozen=True, repr=False)
class Transfer:
    """A threshold on shifted data, beside the held-out half of the data it was fitted on.

    The rates and the area do not depend on how many positives the data hold; the precision does. So precisions
    are compared at the base rate of the fitting data, and the raw one is no measure of the shift.

    Attributes:
        fit: How the threshold did on the held-out half.
        shifted: How it does on the shifted data.
    """

    fit: ThresholdScores
    shifted: ThresholdScores

    @property
    def reweighted_precision(self) -> Interval:
        """The precision that the rates on the shifted data give at the base rate of the fitting data."""
        return reweighted_precision(self.shifted.recall, self.shifted.false_positive_rate, self.fit.base_rate.estimate)

    @property
    def drops(self) -> dict[str, Interval]:
        """Fit minus shifted, with an interval: of auc, recall, false_positive_rate and reweighted_precision."""
        return {
            "auc": difference_interval(self.fit.auc, self.shifted.auc),
            "recall": difference_interval(self.fit.recall, self.shifted.recall),
            "false_positive_rate": difference_interval(self.fit.false_positive_rate, self.shifted.false_positive_rate),
            "reweighted_precision": difference_interval(self.fit.precision, self.reweighted_precision),
        }

    def _rows(self) -> list[tuple[str, Interval, Interval, Interval | None]]:
        """Return the name of each quantity, its value in the fit and on the shifted data, and its drop."""
        fit, shifted, drops = self.fit, self.shifted, self.drops
        reweighted, alarms = self.reweighted_precision, "false_positive_rate"
        return [
            ("AUC", fit.auc, shifted.auc, drops["auc"]),
            ("recall (true-positive rate)", fit.recall, shifted.recall, drops["recall"]),
            ("false-positive rate", fit.false_positive_rate, shifted.false_positive_rate, drops[alarms]),
            ("precision at the base rate of the fit", fit.precision, reweighted, drops["reweighted_precision"]),
            ("raw precision (confounded by the base rate)", fit.precision, shifted.precision, None),
            ("accepted", fit.acceptance, shifted.acceptance, None),
            ("base rate", fit.base_rate, shifted.base_rate, None),
        ]

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity: in the fit, on the shifted data, and the drop, each with its interval."""
        return [
            {"quantity": name, **_columns("fit", fit), **_columns("shifted", shifted), **_columns("drop", drop)}
            for name, fit, shifted, drop in self._rows()
        ]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        title = f"A threshold on {self.shifted.n} shifted inputs, against {self.fit.n} held-out inputs of its fit"
        shown = [
            {"quantity": name, "fit": _shown(fit), "shifted": _shown(shifted), "drop": _shown(drop)}
            for name, fit, shifted, drop in self._rows()
        ]
        return "\n".join([title, *table(shown)])


def _halved(sums: ArrayLike, labels: ArrayLike, seed: int) -> tuple[Floats, NDArray[np.bool_], Rows, Rows]:
    """Return checked sums and labels, the rows to fit on, and the rows to score on."""
    array = checked_sums(sums, ("input",))
    positive = checked_booleans(labels, len(array), fewest=4)
    fitting, scoring = halves(positive, seed)
    if np.ptp(array[fitting]) == 0:
        raise ProbeError(
            f"All {len(fitting)} sums of the fitting half are {array[fitting[0]]:g}: a channel that does not vary has "
            "no threshold."
        )
    return array, positive, fitting, scoring


def _candidates(sums: Floats, labels: NDArray[np.bool_]) -> tuple[Floats, Rows, Rows]:
    """Return every threshold that divides the sums, ascending, and how many positives and negatives lie above each."""
    order = np.argsort(sums, kind="stable")
    ascending, positive = sums[order], labels[order]
    last = np.flatnonzero(np.diff(ascending))  # the last of each run of equal sums
    under, over = ascending[last], ascending[last + 1]
    halfway = under + (over - under) / 2
    hits, alarms = positive.sum() - positive.cumsum()[last], (~positive).sum() - (~positive).cumsum()[last]
    return np.where(halfway < over, halfway, under), hits, alarms  # rounding could reach the upper sum


def _accepted(sums: Floats, threshold: float, direction: Direction) -> NDArray[np.bool_]:
    return sums > threshold if direction == "above" else sums <= threshold


def _scores(sums: Floats, labels: NDArray[np.bool_], threshold: float, direction: Direction) -> ThresholdScores:
    accepted = _accepted(sums, threshold, direction)
    hits, alarms, positives = int((accepted & labels).sum()), int((accepted & ~labels).sum()), int(labels.sum())
    return ThresholdScores(
        auc=auc(sums if direction == "above" else -sums, labels),
        precision=wilson_interval(hits, hits + alarms) if hits + alarms else Interval(math.nan, 0.0, 1.0, 0.95),
        recall=wilson_interval(hits, positives),
        false_positive_rate=wilson_interval(alarms, len(sums) - positives),
        acceptance=wilson_interval(hits + alarms, len(sums)),
        base_rate=wilson_interval(positives, len(sums)),
        n=len(sums),
    )


def _columns(prefix: str, interval: Interval | None) -> dict[str, float | None]:
    """Return an interval as three columns of a record; the first is called as the prefix, or "estimate"."""
    low, high = (f"{prefix} {end}".lstrip() for end in ("low", "high"))
    if interval is None:
        return {prefix or "estimate": None, low: None, high: None}
    return {prefix or "estimate": interval.estimate, low: interval.low, high: interval.high}


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"
