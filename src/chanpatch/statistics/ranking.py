"""The area under the ROC curve, and the rank of an effect among controls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from ..errors import StatisticsError, counted
from .interval import FEWEST, Booleans, Floats, Interval, few_others, finite, quantile, too_few, two_groups, wilson

FEWEST_CONTROLS = 19  # with fewer controls, even rank 1 has p above 0.05
Alternative = Literal["two-sided", "greater", "less"]


def auc(scores: ArrayLike, labels: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the area under the ROC curve (the probability that a positive outscores a negative) and its interval.

    Ties count as one half. If the area is below 0.5, positives tend to have the lower scores. The interval lies between
    0 and 1 and allows the two groups to differ in variance. If six to nine inputs have the rarer label, the interval's
    note is `"few"`; if fewer than six inputs have the rarer label, the interval is withheld.

    Args:
        scores: One finite number per input.
        labels: One boolean (or 0 or 1) per input, with at least two positives and two negatives.
        confidence: Nominal coverage, between 0 and 1.

    Raises:
        StatisticsError: If there is not one label per score, a score is not finite, or a label occurs fewer than two
            times.

    Example:
        >>> scores = np.arange(24)
        >>> interval = auc(scores, scores + 5 * (scores % 4) > 19)
        >>> print(f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})")
        0.91 (0.64 to 0.98)

    References:
        DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated receiver operating
        characteristic curves: a nonparametric approach" (1988), for the variance; Qin and Hotilovac, "Comparison of
        non-parametric confidence intervals for the area under the ROC curve of a continuous-scale diagnostic test"
        (2008), for the logit scale.
    """
    import scipy.special

    score = finite("scores", scores, ("input",))
    positive, negative = placements(score, two_groups(labels, len(score), fewest=2))
    area, fewest = float(positive.mean()), min(len(positive), len(negative))
    note, margin = too_few(fewest, "inputs with one label"), placement_margin(positive, negative, confidence)
    if fewest < FEWEST:
        return Interval(area, math.nan, math.nan, confidence, note)
    if separated(positive, negative):
        # The scores are separated or tied, so the variance is unknown. Use Wilson's interval for `fewest` trials.
        return replace(wilson(area, fewest, confidence), note=note)
    ends = np.array([-margin, margin]) / (area * (1 - area))
    low, high = scipy.special.expit(scipy.special.logit(area) + ends)
    return Interval(area, float(low), float(high), confidence, note)


def placements(score: Floats, label: Booleans) -> tuple[Floats, Floats]:
    """Return the placements of the positives and the placements of the negatives. Ties count as one half.

    A positive's placement is the fraction of negatives with a lower score. A negative's placement is the fraction of
    positives with a higher score.
    """
    import scipy.stats

    positive, negative = score[label], score[~label]
    rank = scipy.stats.rankdata(np.concatenate([positive, negative]))
    # An input's rank among all inputs, minus its rank in its own group, is the number of inputs in the other group
    # with a lower score.
    beaten = (rank[: positive.size] - scipy.stats.rankdata(positive)) / negative.size
    beaten_by = 1 - (rank[positive.size :] - scipy.stats.rankdata(negative)) / positive.size
    return beaten, beaten_by


def placement_margin(positive: Floats, negative: Floats, confidence: float) -> float:
    """Return half the width of DeLong's interval for an AUC, given the placements of positives and of negatives.

    For the difference in AUC between two scores, pass the differences between the placements for the two scores.
    """
    variance = positive.var(ddof=1) / positive.size + negative.var(ddof=1) / negative.size
    return quantile(confidence, min(positive.size, negative.size) - 1) * math.sqrt(variance)


def separated(positive: Floats, negative: Floats) -> bool:
    """Return whether, in either group, too few placements differ from the median to estimate the variance."""
    groups = (positive, negative)
    return any(few_others((each != np.sort(each)[each.size // 2]).sum(), each.size) for each in groups)


def areas(scores: Floats, positive: Booleans) -> Floats:
    """Return each channel's AUC for each set of positives, with shape `(set, channel)`.

    `scores` has shape `(input, channel)`, and `positive` has shape `(set, input)`. An AUC is NaN if its set contains
    all inputs or no inputs.
    """
    import scipy.stats

    every = scipy.stats.rankdata(scores, axis=0)
    positives, ranks = positive.sum(axis=1, keepdims=True), np.stack([every[each].sum(axis=0) for each in positive])
    with np.errstate(invalid="ignore"):
        found: Floats = (ranks - positives * (positives + 1) / 2) / (positives * (positive.shape[1] - positives))
    return found


@dataclass(frozen=True)
class Rank:
    """Rank of an effect among the effects of controls.

    Rank 1 is the effect with the largest absolute value. If the rank was computed with the alternative `"greater"`,
    rank 1 is the largest effect; with `"less"`, rank 1 is the lowest effect.

    Attributes:
        rank: 1 plus the number of controls that rank at least as high as the effect, from 1 to `controls + 1`.
        controls: Number of controls.
        p: `rank / (controls + 1)`, or None if `no_p` gives a reason, such as fewer than 19 controls.
        no_p: Reason why there is no p-value; an empty string if there is a p-value.
    """

    rank: int
    controls: int
    p: float | None
    no_p: str

    def __str__(self) -> str:
        end = f"no p-value: {self.no_p}" if self.p is None else f"p = {self.p:.3g}"
        return f"rank {self.rank} of {self.controls + 1} (the effect and {counted(self.controls, 'control')}), {end}"


def rank_among(effect: float, controls: ArrayLike, *, alternative: Alternative = "two-sided") -> Rank:
    """Rank an effect among the effects of controls, and compute the p-value of the rank.

    The p-value is the fraction of all effects (this effect and the controls) that rank at least as high as this effect.
    The p-value is meaningless if the patched channel was selected for its large effect, or if the patched channel is
    not exchangeable with the controls. For a directional claim, use a one-sided alternative, or exclude controls that
    encode the opposite feature.

    Args:
        effect: Effect of the patch to rank, a finite number.
        controls: Effects of the controls, in the unit of `effect`, with shape `(control,)`. Ties count against the
            effect.
        alternative: Which effect has rank 1: the effect with the largest absolute value (`"two-sided"`), the largest
            effect (`"greater"`) or the lowest effect (`"less"`).

    Raises:
        StatisticsError: If there are no controls, an effect is not finite, or the alternative is unknown.

    Example:
        >>> print(rank_among(-0.6, np.linspace(-0.3, 0.3, 19)))
        rank 1 of 20 (the effect and 19 controls), p = 0.05
        >>> print(rank_among(0.2, [0.1, -0.5, 0.2], alternative="greater"))
        rank 2 of 4 (the effect and 3 controls), no p-value: fewer than 19 controls

    References:
        Phipson and Smyth, "Permutation p-values should never be zero" (2010), for counting the effect itself in
        the p-value.
    """
    others = np.asarray(controls, dtype=np.float64)
    if others.ndim != 1 or not others.size:
        raise StatisticsError(
            f"controls must have shape (control,) with at least one control; got shape {others.shape}."
        )
    if not (math.isfinite(effect) and np.isfinite(others).all()):
        raise StatisticsError(
            f"All effects must be finite to be ranked; got {effect} for the patch, and NaN or infinity for "
            f"{(~np.isfinite(others)).sum()} of {others.size} controls. "
            "Leave out controls whose effects are not finite."
        )
    if alternative not in get_args(Alternative):
        names = ", ".join(map(repr, get_args(Alternative)))
        raise StatisticsError(f"alternative must be one of {names}; got {alternative!r}.")
    every = np.append(others, effect)
    directed = {"two-sided": np.abs(every), "greater": every, "less": -every}[alternative]
    rank = int((directed >= directed[-1]).sum())
    if others.size < FEWEST_CONTROLS:
        return Rank(rank, others.size, None, f"fewer than {FEWEST_CONTROLS} controls")
    return Rank(rank, others.size, rank / (others.size + 1), "")


def without_p(rank: Rank, no_p: str) -> Rank:
    """Return `rank` without a p-value if `no_p` contains a reason to omit it; otherwise, return `rank` unchanged."""
    return replace(rank, p=None, no_p=no_p) if no_p and not rank.no_p else rank


def ranks_among(
    effects: ArrayLike, controls: ArrayLike, alternative: Alternative = "two-sided", no_p: str = ""
) -> list[Rank | None]:
    """Return the rank of each effect, as `rank_among` does, or None if the effect cannot be ranked.

    An effect that is not finite cannot be ranked. No effect can be ranked if there are no controls, or if a control is
    not finite. If `no_p` contains a reason, the ranks have no p-values.
    """
    each, others = np.asarray(effects, dtype=np.float64), np.asarray(controls, dtype=np.float64)
    ranked = np.isfinite(each) & bool(others.size) & np.isfinite(others).all()
    return [
        without_p(rank_among(float(effect), others, alternative=alternative), no_p) if one else None
        for effect, one in zip(each, ranked, strict=True)
    ]


def ranked_records(
    records: Iterable[dict[str, Any]], ranks: Iterable[Rank | None], controls: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the records of effects, with ranks added, followed by the records of controls, which have no ranks."""
    none = {"rank": None, "p": None, "no_p": "no rank among the controls"}
    ranked = [
        {**record, "control": False, **(none if rank is None else {"rank": rank.rank, "p": rank.p, "no_p": rank.no_p})}
        for record, rank in zip(records, ranks, strict=True)
    ]
    return ranked + [{**record, "control": True, **none} for record in controls]
