"""Predict a label with a threshold on one channel's sum, and measure the threshold's transfer to shifted data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import ProbeError
from ..results import Records, interval_notes
from ..statistics.interval import Booleans, Floats, Interval, finite, interval_columns, two_groups
from ..statistics.means import Rows
from ..statistics.proportions import difference_interval, reweighted_precision, wilson_interval
from ..statistics.ranking import auc
from ..statistics.resampling import halves

Direction = Literal["above", "below"]

_NAMES = {
    "auc": "AUC",
    "recall": "recall (true-positive rate)",
    "false_positive_rate": "false-positive rate",
    "reweighted_precision": "precision at the base rate of the fit",
    "precision": "precision",
    "acceptance": "accepted",
    "base_rate": "base rate",
}
_SIDES = ("fit", "shifted", "drop")
_LEVEL = 0.05  # maximum probability that a threshold from `fit_precision` has a precision below `min_precision`


@dataclass(frozen=True)
class ThresholdScores:
    """Scores for a threshold classifier, each with a 95% interval.

    Attributes:
        auc: Probability that a random positive lies further toward the accepted side than a random negative.
        precision: Fraction of accepted inputs that are positive; NaN, with interval 0 to 1, if no input is accepted.
        recall: Fraction of positives that are accepted (true-positive rate).
        false_positive_rate: Fraction of negatives that are accepted.
        acceptance: Fraction of all inputs that are accepted.
        base_rate: Fraction of all inputs that are positive: the precision of accepting every input.
        n: Number of inputs.
    """

    auc: Interval
    precision: Interval
    recall: Interval
    false_positive_rate: Interval
    acceptance: Interval
    base_rate: Interval
    n: int

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity, with the keys quantity, estimate, low, high, n and note."""
        return [
            {"quantity": _NAMES[field], **interval_columns(each, "estimate", "low", "high")}
            | {"n": self.n, "note": each.note}
            for field in _NAMES
            if (each := getattr(self, field, None))
        ]


@dataclass(frozen=True, repr=False)
class ThresholdProbe(Records):
    """A threshold on a channel's sum, fitted on one half of the inputs (the fitting half) and scored on the other half.

    Attributes:
        threshold: Threshold, halfway between two sums in the fitting half.
        direction: `"above"` accepts sums greater than the threshold; `"below"` accepts all other sums.
        criterion: Criterion used to choose the threshold.
        fitted_on: Number of inputs in the fitting half.
        held_out: Scores on the other half of the inputs.

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
        """Choose the threshold and direction that maximize the true-positive rate minus the false-positive rate.

        Args:
            sums: One channel's sums, with shape `(input,)`.
            labels: Booleans (or 0 and 1) with shape `(input,)`, with at least four positives and four negatives. Each
                group is split evenly between the halves.
            seed: Random seed for the split into halves.

        Raises:
            ProbeError: If sums or labels are invalid or do not match, a label is too rare, or the sums do not vary.

        References:
            Youden, "Index for rating diagnostic tests" (1950).
        """
        (fitted, positive), held_out = _halved(sums, labels, seed)
        thresholds, hits, alarms = _candidates(fitted, positive)
        gain = hits / positive.sum() - alarms / (~positive).sum()
        best = int(np.argmax(np.abs(gain)))
        direction: Direction = "above" if gain[best] >= 0 else "below"
        scores = _scores(*held_out, thresholds[best], direction)
        return cls(float(thresholds[best]), direction, "true- minus false-positive rate", len(fitted), scores)

    @classmethod
    def fit_precision(  # noqa: D417  # the other arguments are those of fit
        cls, sums: ArrayLike, labels: ArrayLike, *, min_precision: float = 0.9, seed: int = 0
    ) -> ThresholdProbe:
        """Choose the threshold that accepts the most inputs while reaching the required precision with 95% confidence.

        The confidence holds for the whole search over thresholds: the precision on new inputs is below `min_precision`
        with at most 5% probability. Sums above the threshold are accepted if positives tend to have larger sums;
        otherwise, sums below the threshold are accepted.

        Args:
            sums, labels, seed: Same as in `fit`.
            min_precision: Minimum fraction of accepted inputs that must be positive.

        Raises:
            ProbeError: For the same reasons as `fit`, or if no threshold reaches `min_precision` with 95% confidence.

        References:
            Angelopoulos et al., "Learn then test: calibrating predictive algorithms to achieve risk control" (2021),
            for testing thresholds; Wiens and Dmitrienko, "The fallback procedure for evaluating a single family of
            hypotheses" (2005), for the levels of the tests.
        """
        if not 0 < min_precision <= 1:
            raise ProbeError(f"min_precision must be greater than 0 and at most 1, such as 0.9; got {min_precision!r}.")
        (fitted, positive), held_out = _halved(sums, labels, seed)
        thresholds, hits, alarms = _candidates(fitted, positive)
        direction: Direction = "above" if auc(fitted, positive).estimate >= 0.5 else "below"
        if direction == "above":  # put the strictest threshold first
            thresholds, hits, alarms = thresholds[::-1], hits[::-1], alarms[::-1]
        else:
            hits, alarms = positive.sum() - hits, (~positive).sum() - alarms
        p, precise = _precise(hits, alarms, min_precision)
        if not precise.any():
            best = int(np.argmin(p))
            raise ProbeError(
                f"No threshold reaches precision {min_precision:g} with 95% confidence. The strongest evidence is for "
                f"sums {direction} {thresholds[best]:.4g}, with {hits[best]} positives among "
                f"{hits[best] + alarms[best]} accepted inputs in the half used for fitting. Lower min_precision, "
                "pass more inputs, or use another channel."
            )
        threshold = float(thresholds[precise][-1])
        criterion = f"95% confidence in a precision of at least {min_precision:g}"
        return cls(threshold, direction, criterion, len(fitted), _scores(*held_out, threshold, direction))

    def predict(self, sums: ArrayLike) -> NDArray[np.bool_]:
        """Return the predicted label of each sum, as a boolean array of the same shape.

        True means that the sum is on the accepted side of the threshold. Sums must be finite.
        """
        return _accepted(finite("sums", sums, error=ProbeError), self.threshold, self.direction)

    def transfer(self, sums: ArrayLike, labels: ArrayLike) -> Transfer:
        """Score the threshold on shifted data; return these scores and the scores on the held-out half.

        Args:
            sums: Sums of the same channel for shifted inputs, with shape `(input,)`.
            labels: Booleans (or 0 and 1) with shape `(input,)`, with at least two positives and two negatives.

        Raises:
            ProbeError: If sums or labels are invalid or do not match, or a label is too rare.
        """
        array = finite("sums", sums, ("input",), ProbeError)
        positive = two_groups(labels, len(array), 2, ProbeError)
        return Transfer(self.held_out, _scores(array, positive, self.threshold, self.direction))

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity on the held-out half, with keys quantity, estimate, low, high, n and note."""
        return self.held_out.to_records()

    def _lines(self) -> list[dict[str, Any]]:
        return [{**each, "note": "few" * (each["note"] == "few")} for each in self.to_records()]

    def _notes(self) -> list[str]:
        return interval_notes(each["note"] for each in self.to_records())

    def _title(self) -> str:
        return (
            f"Sums {self.direction} {self.threshold:.4g}: chosen for {self.criterion} on {self.fitted_on} inputs, "
            f"scored on {self.held_out.n} others"
        )


@dataclass(frozen=True, repr=False)
class Transfer(Records):
    """Scores for a threshold on shifted data, alongside the threshold's scores on held-out inputs that are not shifted.

    Precision depends on the base rate; recall, false-positive rate and AUC do not. Precisions are therefore compared at
    the base rate of the held-out half.

    Attributes:
        fit: Scores on the held-out half of the inputs that were passed to `fit` or `fit_precision`.
        shifted: Scores on shifted data.
    """

    fit: ThresholdScores
    shifted: ThresholdScores

    @property
    def reweighted_precision(self) -> Interval:
        """Precision on the shifted data, reweighted to the base rate of the held-out half."""
        return reweighted_precision(self.shifted.recall, self.shifted.false_positive_rate, self.fit.base_rate.estimate)

    @property
    def drops(self) -> dict[str, Interval]:
        """Differences in score, held-out minus shifted, with intervals.

        The keys are auc, recall, false_positive_rate and reweighted_precision.
        """
        fit, shifted = self._sides
        names = ("auc", "recall", "false_positive_rate", "reweighted_precision")
        return {name: difference_interval(fit[name], shifted[name]) for name in names}

    @property
    def _sides(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scores on the held-out half and on shifted data, by name.

        Both dicts contain the precision at the base rate of the held-out half (`reweighted_precision`).
        """
        return (
            vars(self.fit) | {"reweighted_precision": self.fit.precision},
            vars(self.shifted) | {"reweighted_precision": self.reweighted_precision},
        )

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per quantity, with the scores `fit` and `shifted` and the difference `drop`.

        Both scores and the difference have an interval and a note.
        """
        sides = dict(zip(_SIDES, (*self._sides, self.drops), strict=True))
        names = {**_NAMES, "precision": "raw precision (confounded by the base rate)"}
        records: list[dict[str, Any]] = []
        for field, name in names.items():
            records.append({"quantity": name})
            for side, intervals in sides.items():
                each = intervals.get(field)
                records[-1] |= interval_columns(each, side, f"{side} low", f"{side} high")
                records[-1] |= {f"{side} note": "" if each is None else each.note}
        return records

    def _lines(self) -> list[dict[str, Any]]:
        return [
            {"quantity": each["quantity"], **{side: _shown(each, side) for side in _SIDES}}
            for each in self.to_records()
        ]

    def _notes(self) -> list[str]:
        return interval_notes(each[f"{side} note"] for each in self.to_records() for side in _SIDES)

    def _title(self) -> str:
        return f"Threshold on {self.shifted.n} shifted inputs, compared with {self.fit.n} held-out inputs"


def _halved(sums: ArrayLike, labels: ArrayLike, seed: int) -> tuple[tuple[Floats, Booleans], tuple[Floats, Booleans]]:
    """Validate the sums and labels, then split the inputs into one half for fitting and one half for scoring."""
    array = finite("sums", sums, ("input",), ProbeError)
    positive = two_groups(labels, len(array), 4, ProbeError)
    fitting, scoring = halves(positive, seed)
    if np.ptp(array[fitting]) == 0:
        raise ProbeError(
            f"All {len(fitting)} sums in the half of the inputs used for fitting equal {array[fitting[0]]:g}. Use a "
            "channel that varies, or pass more inputs."
        )
    return (array[fitting], positive[fitting]), (array[scoring], positive[scoring])


def _candidates(sums: Floats, labels: Booleans) -> tuple[Floats, Rows, Rows]:
    """Return all thresholds between neighboring sums, and the numbers of positives and negatives above each threshold.

    The thresholds are in ascending order. Equal sums have no threshold between them.
    """
    order = np.argsort(sums, kind="stable")
    ascending, positive = sums[order], labels[order]
    last = np.flatnonzero(np.diff(ascending))  # last index of each run of equal sums
    under, over = ascending[last], ascending[last + 1]
    halfway = under + (over - under) / 2
    hits, alarms = (each.sum() - each.cumsum()[last] for each in (positive, ~positive))
    return np.where(halfway < over, halfway, under), hits, alarms  # halfway may round up to the upper sum


def _precise(hits: Rows, alarms: Rows, least: float) -> tuple[Floats, Booleans]:
    """Test for each threshold whether the precision is at least `least`; return p-values and a mask of passed tests.

    `hits` and `alarms` are the numbers of positives and negatives that each threshold accepts, with the strictest
    threshold first. Testing starts at the first threshold that accepts enough inputs to be able to pass, starts again
    at the first threshold that accepts twice as many inputs, and so on. Each start receives half of the remaining
    significance level. If a threshold passes, its level carries over to the next threshold.
    """
    import scipy.stats

    accepted = hits + alarms
    p = scipy.stats.binom.sf(hits - 1, accepted, least)
    levels, precise = np.zeros(len(p)), np.zeros(len(p), dtype=np.bool_)
    level = _LEVEL / 4  # half of the level for each direction, and half of that for the first start
    count = math.ceil(math.log(level) / math.log(least)) if least < 1 else math.inf
    while (start := int(np.searchsorted(accepted, count))) < len(p):
        levels[start] += level
        level, count = level / 2, count * 2
    left = 0.0
    for row, (each, new) in enumerate(zip(p, levels, strict=True)):
        left += new
        precise[row] = each <= left
        left *= precise[row]
    return p, precise


def _accepted(sums: Floats, threshold: float, direction: Direction) -> Booleans:
    return sums > threshold if direction == "above" else sums <= threshold


def _scores(sums: Floats, labels: Booleans, threshold: float, direction: Direction) -> ThresholdScores:
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


def _shown(record: Mapping[str, Any], name: str) -> str:
    if record[name] is None:
        return ""
    low, high = record[f"{name} low"], record[f"{name} high"]
    few = ", few" * (record[f"{name} note"] == "few")
    return f"{record[name]:.3f} ({'-' if math.isnan(low) else f'{low:.3f} to {high:.3f}{few}'})"
