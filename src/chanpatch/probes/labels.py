"""The label, or union of labels, that each channel's sum predicts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ProbeError
from ..results import Records, interval_notes, shown_p
from ..statistics.interval import Booleans, Floats, Interval, booleans, finite, interval_columns
from ..statistics.means import Rows
from ..statistics.ranking import auc
from ..statistics.resampling import halves

PERMUTATIONS = 9_999  # at least


@dataclass(frozen=True)
class ChannelLabel:
    """The label of one channel.

    Attributes:
        channel: Number of the channel.
        label: Such as `"UP"` or `"DOWN or LEFT"`; None if the held-out half does not confirm the candidate.
        candidate: Label chosen on the first half; None for a dead channel.
        auc: Probability that the sum is larger for an input with the candidate than for one without, on the held-out
            half, with its 95% interval; None for a dead channel.
        p: Share of permutations of the held-out labels with an AUC at least as large; NaN for a dead channel.
        adjusted_p: `p` corrected for the number of channels: the share of permutations in which any channel's AUC
            stands out as much.
        note: Why there is no label, or an empty string.
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
    """The label of each channel, by channel number. The table has the labeled channels first.

    Attributes:
        channels: One entry per channel.
        chosen_on: Number of inputs that chose the candidates.
        scored_on: Number of other inputs that scored them.
        level: Largest adjusted p-value of a label.
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
        """Return the channels with a label, the largest AUC first."""
        return [each for each in self._ranked() if each.label == label]

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per channel: channel, label, candidate, auc, low, high, p, adjusted p, note."""
        return [
            {
                **{"channel": each.channel, "label": each.label or "no label", "candidate": each.candidate},
                **interval_columns(each.auc, "auc", "low", "high"),
                **{"p": each.p, "adjusted p": each.adjusted_p, "note": each.note},
            }
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
        """Return the labeled channels, then the others, both by falling AUC."""
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
    """Return the label, or the union of labels, that each channel's sum predicts best.

    One half of the inputs chooses each channel's candidate: the union of labels with the largest area under the curve
    (AUC), less `penalty` for every label after the first. The other half compares the candidate's AUC with those of
    permuted labels. The candidate becomes the channel's label if that p-value, corrected for the number of channels, is
    at most `level`. Channels that do not vary within one of the halves are dead and get no label.

    Args:
        sums: `(input, channel)`.
        labels: The number of each input's name: `(input,)`; or booleans, or 0 and 1: `(input, label)`. Each half gets
            half of the inputs with each label, which are four at least.
        names: One name per label, such as `("UP", "DOWN", "LEFT", "RIGHT")`; at most ten.
        seed: Random seed of the halves and of the permutations.
        penalty: Penalty in units of the AUC.
        level: Largest adjusted p-value of a label, between 0 and 1. At least 9,999 permutations are drawn, more if an
            adjusted p-value could not reach the level otherwise.

    Raises:
        ProbeError: If sums, labels and names do not fit, or a label is too rare.

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
        (1947), for the area; Phipson and Smyth, "Permutation p-values should never be zero" (2010), for the p-value;
        Westfall and Young, "Resampling-based multiple testing" (1993), for the correction.
    """
    array = finite("sums", sums, ("input", "channel"), ProbeError)
    if not 0 < level < 1:
        raise ProbeError(f"level is {level!r}, but it must lie between 0 and 1, such as 0.05.")
    indicators = _indicators(labels, names, len(array))
    first, second = halves(indicators, seed)
    unions = list(_unions(indicators, (first, second)))
    if not unions:
        raise ProbeError("No label divides both halves of the inputs: give more inputs.")
    members = np.stack([indicators[:, list(union)].any(axis=1) for union in unions])  # (union, input)
    alive = np.flatnonzero((np.ptp(array[first], axis=0) > 0) & (np.ptp(array[second], axis=0) > 0))
    permutations = max(PERMUTATIONS, math.ceil(1 / level) - 1)
    fees = penalty * (np.array([len(union) for union in unions]) - 1)
    best = np.argmax(_areas(array[first][:, alive], members[:, first]) - fees[:, None], axis=0)
    p, adjusted = np.full((2, array.shape[1]), np.nan)
    p[alive], adjusted[alive] = _permutation_p(array[second][:, alive], members[best][:, second], permutations, seed)
    chosen = dict(zip(alive.tolist(), best.tolist(), strict=True))

    channels = []
    for channel, (each, corrected) in enumerate(zip(p.tolist(), adjusted.tolist(), strict=True)):
        if channel not in chosen:
            channels.append(ChannelLabel(channel, None, None, None, each, corrected, "dead: its sum does not vary"))
            continue
        candidate = " or ".join(names[label] for label in unions[chosen[channel]])
        area = auc(array[second, channel], members[chosen[channel], second])
        label, note = (candidate, "") if corrected <= level else (None, "not above the permuted labels")
        channels.append(ChannelLabel(channel, label, candidate, area, each, corrected, note))
    return ChannelLabels(tuple(channels), len(first), len(second), level)


def _indicators(labels: ArrayLike, names: Sequence[str], inputs: int) -> Booleans:
    """Return which input has which label: `(input, label)`."""
    array = np.asarray(labels)
    if not 2 <= len(names) <= 10 or len(set(names)) < len(names):
        raise ProbeError(f"names is {tuple(names)}: give two to ten different names, one per label.")
    if array.shape == (inputs,) and np.issubdtype(array.dtype, np.integer):
        if array.min() < 0 or array.max() >= len(names):
            wrong = array[(array < 0) | (array >= len(names))][0]
            raise ProbeError(
                f"labels holds {wrong}, but the {len(names)} names have the numbers 0 to {len(names) - 1}."
            )
        array = array[:, None] == np.arange(len(names))
    indicators = booleans(array)
    if array.shape != (inputs, len(names)) or indicators is None:
        raise ProbeError(
            f"labels is {array.dtype} of shape {array.shape}: for {inputs} inputs and {len(names)} names give "
            f"({inputs},) whole numbers of at least 0, or ({inputs}, {len(names)}) booleans."
        )
    for name, count in zip(names, indicators.sum(axis=0).tolist(), strict=True):
        if min(count, inputs - count) < 4:
            raise ProbeError(
                f"Label '{name}' is on {count} of {inputs} inputs, but four with and four without it are needed, half "
                "of them to choose by and half to score. Leave it out, or give more inputs."
            )
    return indicators


def _unions(indicators: Booleans, parts: tuple[Rows, Rows]) -> Iterator[tuple[int, ...]]:
    """Yield the unions of labels with at least two inputs inside and two outside in each half, small ones first."""
    labels = range(indicators.shape[1])
    for size in range(1, len(labels) + 1):
        for union in itertools.combinations(labels, size):
            counts = [(indicators[part][:, list(union)].any(axis=1).sum(), len(part)) for part in parts]
            if all(2 <= positives <= inputs - 2 for positives, inputs in counts):
                yield union


def _areas(sums: Floats, members: Booleans) -> Floats:
    """Return the area under the curve of every union, `(union, channel)`."""
    import scipy.stats

    positives = members.sum(axis=1, keepdims=True)
    ranks = members.astype(np.float64) @ scipy.stats.rankdata(sums, axis=0)
    areas: Floats = (ranks - positives * (positives + 1) / 2) / (positives * (members.shape[1] - positives))
    return areas


def _permutation_p(sums: Floats, members: Booleans, permutations: int, seed: int) -> tuple[Floats, Floats]:
    """Return the p-value of each channel's labels, `(channel, input)`, against permuted labels, and the corrected one.

    The correction compares a channel's AUC, in standard deviations over permutations, with the largest of all channels.
    """
    import scipy.stats

    ranks = scipy.stats.rankdata(sums, axis=0)
    inputs, positives = len(ranks), members.sum(axis=1)
    spread = np.sqrt(positives * (inputs - positives) / (inputs - 1)) * ranks.std(axis=0)
    own = (members.T * ranks).sum(axis=0)
    kinds, kind = np.unique(members, axis=0, return_inverse=True)
    generator = np.random.default_rng((seed, 1))  # other draws than those of the halves
    reached, largest = np.zeros(sums.shape[1]), np.full(permutations, -np.inf)
    for start in range(0, permutations, 1000):
        some = slice(start, min(start + 1000, permutations))
        order = generator.permuted(np.tile(np.arange(inputs), (some.stop - start, 1)), axis=1)
        for number, union in enumerate(kinds):
            channels = np.flatnonzero(kind.reshape(-1) == number)
            permuted = union[order].astype(np.float64) @ ranks[:, channels]
            reached[channels] += (permuted >= own[channels]).sum(axis=0)  # ranks are halves: no rounding
            apart = (permuted - positives[channels] * (inputs + 1) / 2) / spread[channels]
            largest[some] = np.maximum(largest[some], apart.max(axis=1))
    apart = (own - positives * (inputs + 1) / 2) / spread
    exceeded = permutations - np.searchsorted(np.sort(largest), apart - 1e-9)
    return (reached + 1) / (permutations + 1), (exceeded + 1) / (permutations + 1)
