"""Find the label, or union of labels, that each channel's sum predicts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ProbeError
from ..results import Records, interval_notes, shown_p
from ..statistics.interval import Booleans, Floats, Interval, booleans, finite, interval_columns
from ..statistics.ranking import areas, auc
from ..statistics.resampling import halves

PERMUTATIONS = 9_999  # minimum number of permutations


@dataclass(frozen=True)
class ChannelLabel:
    """Label for one channel. A channel is dead if its sum is constant on either half of the inputs.

    Attributes:
        channel: Index of the channel.
        label: Label such as `"UP"` or `"DOWN or LEFT"`; None if the channel is dead or the held-out half does not
            confirm the candidate.
        candidate: Label chosen on the first half of the inputs, or None for a dead channel.
        auc: Probability that the sum is larger for an input with the candidate label than for an input without this
            label, and the 95% interval, both computed on the held-out half; None for a dead channel.
        p: One-sided permutation p-value for the AUC on the held-out half; NaN for a dead channel.
        adjusted_p: `p` corrected for the number of channels: the fraction of permutations in which the largest
            standardized AUC over all channels is at least as large as this channel's standardized AUC.
        note: Reason for a missing label, or an empty string.
    """

    channel: int
    label: str | None
    candidate: str | None
    auc: Interval | None
    p: float
    adjusted_p: float
    note: str


@dataclass(frozen=True, repr=False)
class ChannelLabels(Records, Sequence[ChannelLabel]):
    """Labels for all channels, in order of channel index. The table lists labeled channels first.

    Attributes:
        channels: Label and scores for each channel.
        chosen_on: Number of inputs used to choose the candidate labels.
        scored_on: Number of held-out inputs used to score the candidate labels.
        level: Largest adjusted p-value at which a channel gets a label.
    """

    channels: tuple[ChannelLabel, ...]
    chosen_on: int
    scored_on: int
    level: float

    def __getitem__(self, channel: Any) -> Any:
        return self.channels[channel]

    def __len__(self) -> int:
        return len(self.channels)

    def best(self, label: str) -> list[ChannelLabel]:
        """Return the channels with the given label, in descending order of AUC."""
        return [each for each in self._ranked() if each.label == label]

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per channel, with keys channel, label, candidate, auc, low, high, p, adjusted p and note."""
        return [
            {"channel": each.channel, "label": each.label or "no label", "candidate": each.candidate}
            | interval_columns(each.auc, "auc", "low", "high")
            | {"p": each.p, "adjusted p": each.adjusted_p, "note": each.note}
            for each in self.channels
        ]

    def _lines(self) -> list[dict[str, Any]]:
        records = self.to_records()
        shown = [{**each, **{name: shown_p(each[name]) for name in ("p", "adjusted p")}} for each in records]
        return [shown[each.channel] for each in self._ranked()]

    def _notes(self) -> list[str]:
        return interval_notes(each.auc.note for each in self if each.auc)

    def _title(self) -> str:
        kinds = Counter("label" if each.label else "dead" if each.auc is None else "no label" for each in self.channels)
        return (
            f"{len(self)} channels: {kinds['label']} with a label, {kinds['no label']} without, {kinds['dead']} dead; "
            f"chosen on {self.chosen_on} inputs, scored on {self.scored_on} others, p adjusted for all channels"
        )

    def _ranked(self) -> list[ChannelLabel]:
        """Return the labeled channels, followed by the unlabeled channels, each group in descending order of AUC."""
        return sorted(self, key=lambda each: (each.label is None, -each.auc.estimate if each.auc else 1.0))


def label_channels(
    sums: ArrayLike,
    labels: ArrayLike,
    *,
    names: Sequence[str],
    seed: int = 0,
    penalty: float = 0.02,
    level: float = 0.05,
) -> ChannelLabels:
    """Find the label, or the union of labels, that each channel's sum predicts best.

    Each channel's candidate is chosen on one half of the inputs. The candidate is the label or union of labels with the
    largest area under the ROC curve (AUC), after subtracting `penalty` for every label beyond the first. On the other
    half, the candidate's AUC is compared with the AUCs for permuted labels. The candidate becomes the channel's label
    if the p-value, corrected for the number of channels, is at most `level`. Channels whose sum is constant on either
    half are dead and get no label.

    Args:
        sums: Channel sums with shape `(input, channel)`.
        labels: Index of each input's label, with shape `(input,)`; or booleans (or 0 and 1) that mark each input's
            labels, with shape `(input, label)`. For each label, at least four inputs must have the label, and at least
            four must not; both groups are split evenly between the halves.
        names: Two to ten names, one per label, such as `("UP", "DOWN", "LEFT", "RIGHT")`.
        seed: Random seed for the split into halves and the permutations.
        penalty: Penalty for every label beyond the first in a union, in units of AUC.
        level: Largest adjusted p-value at which a channel gets a label, between 0 and 1. At least 9,999 permutations
            are drawn; more are drawn if 9,999 could not reach the level.

    Raises:
        ProbeError: If sums, labels and names are invalid or do not match, or if a label is too rare.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> directions = generator.integers(4, size=400)
        >>> sums = generator.normal(size=(400, 3))
        >>> sums[:, 0] += 2 * (directions == 0)
        >>> sums[:, 1] += 2 * np.isin(directions, (1, 2))
        >>> [each.label for each in label_channels(sums, directions, names=("UP", "DOWN", "LEFT", "RIGHT"))]
        ['UP', 'DOWN or LEFT', None]

    References:
        Mann and Whitney, "On a test of whether one of two random variables is stochastically larger than the other"
        (1947), for the AUC; Phipson and Smyth, "Permutation p-values should never be zero" (2010), for the p-value;
        Westfall and Young, "Resampling-based multiple testing" (1993), for the correction.
    """
    array = finite("sums", sums, ("input", "channel"), ProbeError)
    if not 0 < level < 1:
        raise ProbeError(f"level must be greater than 0 and less than 1, such as 0.05; got {level!r}.")
    if not 0 <= penalty < math.inf:
        raise ProbeError(f"penalty must be finite and not negative, such as 0.02; got {penalty!r}.")
    names = tuple(names)
    indicators = _indicators(labels, names, len(array))
    first, second = halves(indicators, seed)
    unions, members = [], []
    for union in _unions(len(names)):
        has_label = indicators[:, list(union)].any(axis=1)
        if all(2 <= has_label[part].sum() <= len(part) - 2 for part in (first, second)):
            unions.append(union)
            members.append(has_label)
    if not unions:
        raise ProbeError(
            "In each half of the inputs, at least two inputs must have a label and at least two must not, but no label "
            "meets this condition. Pass more inputs."
        )
    in_union = np.stack(members)  # (union, input)
    alive = np.flatnonzero((np.ptp(array[first], axis=0) > 0) & (np.ptp(array[second], axis=0) > 0))
    permutations = max(PERMUTATIONS, math.ceil(1 / level) - 1)
    fees = penalty * (np.array([len(union) for union in unions]) - 1)
    best = np.argmax(areas(array[first][:, alive], in_union[:, first]) - fees[:, None], axis=0)
    p, adjusted = _permutation_p(array[second][:, alive], in_union[best][:, second], permutations, seed)

    dead = "dead: its sum does not vary"
    channels = [ChannelLabel(each, None, None, None, math.nan, math.nan, dead) for each in range(array.shape[1])]
    for channel, number, each, corrected in zip(*(found.tolist() for found in (alive, best, p, adjusted)), strict=True):
        candidate = " or ".join(names[label] for label in unions[number])
        label, note = (candidate, "") if corrected <= level else (None, "not significant under label permutation")
        area = auc(array[second, channel], in_union[number, second])
        channels[channel] = ChannelLabel(channel, label, candidate, area, each, corrected, note)
    return ChannelLabels(tuple(channels), len(first), len(second), level)


def _unions(labels: int) -> list[tuple[int, ...]]:
    """Return all nonempty sets of label indices, smallest first."""
    return [union for size in range(1, labels + 1) for union in itertools.combinations(range(labels), size)]


def _indicators(labels: ArrayLike, names: Sequence[str], inputs: int) -> Booleans:
    """Return whether each input has each label, with shape `(input, label)`; check the labels and names."""
    array = np.asarray(labels)
    if not 2 <= len(names) <= 10 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ProbeError(f"names must contain two to ten different strings, one per label; got {names}.")
    if array.shape == (inputs,) and np.issubdtype(array.dtype, np.integer):
        for wrong in array[(array < 0) | (array >= len(names))][:1]:
            raise ProbeError(f"labels contains {wrong}, but the {len(names)} names have indices 0 to {len(names) - 1}.")
        array = array[:, None] == np.arange(len(names))
    indicators = booleans(array)
    if array.shape != (inputs, len(names)) or indicators is None:
        raise ProbeError(
            f"labels has dtype {array.dtype} and shape {array.shape}. For {inputs} inputs and {len(names)} names, pass "
            f"nonnegative integers of shape ({inputs},) or booleans of shape ({inputs}, {len(names)})."
        )
    for name, count in zip(names, indicators.sum(axis=0).tolist(), strict=True):
        if min(count, inputs - count) < 4:
            raise ProbeError(
                f"{count} of {inputs} inputs have label '{name}', but at least four inputs must have the label and at "
                "least four must not. Omit the label, or pass more inputs."
            )
    return indicators


def _permutation_p(sums: Floats, members: Booleans, permutations: int, seed: int) -> tuple[Floats, Floats]:
    """Return each channel's permutation p-value, and the same p-value corrected for the number of channels.

    `sums` has shape `(input, channel)`. `members` has shape `(channel, input)`; each row marks one channel's positives.
    For the correction, each channel's AUC, standardized over permutations, is compared with each permutation's largest
    standardized AUC over all channels.
    """
    import scipy.stats

    ranks = scipy.stats.rankdata(sums, axis=0)
    inputs, positives = len(ranks), members.sum(axis=1)
    spread = np.sqrt(positives * (inputs - positives) / (inputs - 1)) * ranks.std(axis=0)
    scores = (ranks - ranks.mean(axis=0)) / spread  # the sum of the scores over the positives is the standardized AUC
    own = (members.T * scores).sum(axis=0) - 1e-9  # rounding must not break ties
    kinds, kind = np.unique(members, axis=0, return_inverse=True)
    generator = np.random.default_rng((seed, 1))  # independent of the random split into halves
    reached, largest = np.zeros(sums.shape[1]), np.full(permutations, -np.inf)
    for start in range(0, permutations, 1000):
        some = slice(start, min(start + 1000, permutations))
        order = generator.permuted(np.tile(np.arange(inputs), (some.stop - start, 1)), axis=1)
        for number, union in enumerate(kinds):
            channels = np.flatnonzero(kind.reshape(-1) == number)
            permuted = union[order].astype(np.float64) @ scores[:, channels]
            reached[channels] += (permuted >= own[channels]).sum(axis=0)
            largest[some] = np.maximum(largest[some], permuted.max(axis=1))
    exceeded = permutations - np.searchsorted(np.sort(largest), own)
    return (reached + 1) / (permutations + 1), (exceeded + 1) / (permutations + 1)
