"""Results of sweeps and attributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..channels import rounding
from ..errors import MetricError, counted, did_you_mean
from ..labels import reference_notes
from ..patching.patch import Patch
from ..results import ROWS, Effects, Grid, columns, interval_notes, more, shown_effect
from ..statistics.flips import ranked_interval
from ..statistics.interval import Interval, picked
from ..statistics.means import snapped
from ..statistics.ranking import Alternative, Rank, ranked_records, ranks_among

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Swept:
    """The strategy that a sweep used for a group: all entries whose first patch is at one hook point.

    An entry is a label with one or more patches.

    Attributes:
        point: Name of the hook point.
        patches: Number of entries in the group, including controls.
        strategy: `"fold"`, `"vmap"`, `"resume"` or `"loop"`.
        why: Reason why the sweep used this strategy and not a faster strategy.
    """

    point: str
    patches: int
    strategy: str
    why: str


@dataclass(frozen=True, repr=False, eq=False)
class SweepResult(Effects):
    """Effects of patches on one or more metrics: one row per label, in the order of the argument `patches`.

    If there are several metrics, pass a metric's name to the methods below.

    Attributes:
        labels: Label of each row.
        patches: Tuple with one item per row: a tuple of the row's patches, in the order in which they are applied.
        values: Dict that maps each metric's name to the metric's values on the patched outputs, with shape
            `(patch, input)`. If a metric returns a single number, the shape is `(patch, 1)`.
        baseline: Dict that maps each metric's name to the metric's values on the unpatched output, with shape
            `(input,)`.
        controls: SweepResult for the control patches in the same sweep; None if there are no controls.
        groups: Strategy used for each group of finished rows. In a group, the first patch of every row is at the same
            hook point.
        complete: Whether all patches were run. False only in the partial result of an interrupted sweep.
        no_p: Reason why ranks among the controls have no p-values, or an empty string if p-values are available.
    """

    labels: tuple[Any, ...]
    patches: tuple[tuple[Patch, ...], ...]
    values: dict[str, Floats]
    baseline: dict[str, Floats]
    controls: SweepResult | None
    groups: tuple[Swept, ...]
    complete: bool = True
    no_p: str = ""
    _whole: SweepResult | None = None  # the result from which `top` selected the rows
    _by_row = ("labels", "patches", "values")

    def differences(self, metric: str | None = None) -> Floats:
        """Return the metric with each patch minus the metric without the patch, with shape `(patch, input)`.

        Raises:
            MetricError: If no metric is named `metric`, or if `metric` is None and the sweep has several metrics.
        """
        name = self._named(metric)
        return self.values[name] - self.baseline[name]

    def effect(self, metric: str | None = None) -> Floats:
        """Return the mean of `differences` over the inputs, in the metric's unit, with shape `(patch,)`."""
        found: Floats = self.differences(metric).mean(axis=1)
        return found

    def interval(self, metric: str | None = None, *, seed: int = 0) -> Interval[Floats]:
        """Return the effects with 95% confidence intervals, which treat the inputs as independent.

        The intervals hold jointly for all patches in the sweep, so they remain valid for patches selected by `top`. If
        the differences are strongly skewed, measure selected patches again on new inputs (see the page on statistics).
        Each interval contains the intervals from `chanpatch.statistics.mean_interval` and `max_t_test` for the given
        seed. Intervals from six to nine inputs are marked, and intervals from fewer than six inputs are withheld.
        Differences that are equal up to rounding error are treated as equal.
        """
        whole = self._whole or self
        row = {label: number for number, label in enumerate(whole.labels)}
        every = ranked_interval(whole._snapped(metric), seed=seed)
        return picked(every, [row[label] for label in self.labels])

    def ranks(self, metric: str | None = None, *, alternative: Alternative = "two-sided") -> list[Rank | None]:
        """Rank each effect among the control effects, as `chanpatch.statistics.rank_among` does.

        A p-value requires at least 19 controls, and is valid only for a patch that was not selected for its effect. A
        rank is None if the effect is not finite. All ranks are None if there are no controls, or if a control effect is
        not finite.
        """
        effects = np.zeros(0) if self.controls is None else self.controls._snapped(metric).mean(axis=0)
        return ranks_among(self._snapped(metric).mean(axis=0), effects, alternative, self.no_p)

    def top(self, count: int, metric: str | None = None) -> SweepResult:
        """Return the `count` rows with the largest absolute effects, largest first.

        Raises:
            StatisticsError: If `count` is negative.
        """
        return self._top(count, self.effect(metric))

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch and metric, with the controls last.

        Each record contains the `label`, the name of the `metric`, the `effect` with an interval (`low`, `high`,
        `note`), and the mean of the metric with the patch (`patched`) and without the patch (`baseline`). If there are
        controls, each record also contains `control` (True for controls), `rank`, `p`, and `no_p` (the reason for a
        missing p-value).
        """
        if self.controls is None:
            return self._records()
        return ranked_records(self._records(), self._ranks(), self.controls._records())

    def plot(self, metric: str | None = None, ax: Axes | None = None) -> Axes:  # type: ignore[override]
        """Plot the largest effects with their intervals on `ax`, or on new axes if `ax` is None."""
        return super(SweepResult, self._only(self._named(metric))).plot(ax)

    def grid(self, rows: int = 0, cols: int = 1, metric: str | None = None) -> Grid:
        """Arrange the effects in a matrix by two parts of each label; see `Attribution.grid`."""
        return super(SweepResult, self._only(self._named(metric))).grid(rows, cols)

    def to_xarray(self, dims: Sequence[str], metric: str | None = None) -> Any:
        """Return the effects as an `xarray.DataArray` with one dimension per part of the labels, which must be tuples.

        `dims` contains one name per dimension.
        """
        return super(SweepResult, self._only(self._named(metric))).to_xarray(dims)

    @property
    def effect_label(self) -> str:
        """Label of the effect axis in figures."""
        inputs = " and ".join(f"{name}, {counted(len(values), 'input')}" for name, values in self.baseline.items())
        return f"mean change ({inputs})"

    def _table(self) -> tuple[list[dict[str, Any]], list[str]]:
        first = self if len(self) <= ROWS else self.top(ROWS, next(iter(self.values)))
        records = [record for record in first.to_records() if not record.get("control")]
        head = ("label", "metric") if len(self.values) > 1 else ("label",)
        tail = ("patched", "baseline", *(("rank", "p") if self.controls else ()))
        lines = [
            {name: record[name] for name in head}
            | shown_effect("effect", record)
            | {name: record[name] for name in tail}
            for record in records
        ]
        notes = interval_notes(record["note"] for record in records)
        return lines, [*more(len(self) - len(first)), *notes, *self._notes()]

    def _title(self) -> str:
        inputs = " and ".join(f"{name} over {counted(len(values), 'input')}" for name, values in self.baseline.items())
        title = f"{len(self)} patch{'es' * (len(self) != 1)}, {inputs}"
        return title if self.complete else f"INTERRUPTED before all patches were run. {title}"

    def _notes(self) -> list[str]:
        notes = [
            f"{name} is NaN on the unpatched output for {nan} of {counted(len(before), 'input')}."
            for name, before in self.baseline.items()
            if (nan := int(np.isnan(before).sum()))
        ]
        if self.controls is not None:
            notes.append(f"Ranks are among {counted(len(self.controls), 'control')}.")
            notes += sorted({f"No p-values: {rank.no_p}" for rank in self._ranks() if rank and rank.no_p})
        if unmoved := self._without_effect():
            notes.append(
                f"Every effect is exactly 0 at {', '.join(map(repr, unmoved))}. Either the patches do not change the "
                "activation, or the model does not use the activation."
            )
        notes += reference_notes(patch for patches in self.patches for patch in patches)
        for strategy in dict.fromkeys(group.strategy for group in self.groups):
            those = [group for group in self.groups if group.strategy == strategy]
            points = f"{len(those)} hook points" if len(those) > 3 else ", ".join(f"'{group.point}'" for group in those)
            notes.append(f"{strategy} at {points}: {those[0].why}" + (" (see .groups)" if len(those) > 1 else ""))
        return notes

    def _without_effect(self) -> list[str]:
        """Return the names of the hook points at which no patch changed any metric on any input."""
        moved = np.array([(self.differences(name) != 0).any(axis=1) for name in self.values]).any(axis=0)
        names = [{patch.site.name for patch in patches} for patches in self.patches]
        changed = set[str]().union(*(here for here, moves in zip(names, moved, strict=True) if moves))
        return sorted(set[str]().union(*names) - changed)

    def _snapped(self, metric: str | None) -> Floats:
        """Return the differences, with shape `(input, patch)` and rounding error removed as in `snapped`."""
        same = rounding(patch.site for patches in self.patches for patch in patches)
        return snapped(self.differences(metric).T, self.baseline[self._named(metric)][:, None], same)

    def _ranks(self) -> list[Rank | None]:
        """Return a flat list of ranks: the first patch's ranks for all metrics, then the second patch's, and so on."""
        each = [self.ranks(name) for name in self.values]
        return [rank for ranks in zip(*each, strict=True) for rank in ranks]

    def _records(self) -> list[dict[str, Any]]:
        # An interrupted sweep may have no rows, and so no intervals.
        effects = {name: (self.effect(name), self.interval(name)) for name in self.values if len(self)}
        return [
            {
                "label": str(label),
                "metric": name,
                "effect": float(effect[row]),
                "low": float(interval.low[row]),
                "high": float(interval.high[row]),
                "note": str(interval.note[row]),
                "patched": float(self.values[name][row].mean()),
                "baseline": float(self.baseline[name].mean()),
            }
            for row, label in enumerate(self.labels)
            for name, (effect, interval) in effects.items()
        ]

    def _named(self, metric: str | None) -> str:
        names = ", ".join(map(repr, self.values))
        if metric is None and len(self.values) > 1:
            raise MetricError(f"The sweep has several metrics: {names}. Pass the name of one metric as `metric`.")
        name = next(iter(self.values)) if metric is None else metric
        if name not in self.values:
            raise MetricError(
                f"This sweep has no metric {name!r}.{did_you_mean(str(name), self.values)} Its metrics are: {names}."
            )
        return name

    def _only(self, name: str) -> SweepResult:
        controls, whole = (None if each is None else each._only(name) for each in (self.controls, self._whole))
        values, baseline = {name: self.values[name]}, {name: self.baseline[name]}
        return replace(self, values=values, baseline=baseline, controls=controls, _whole=whole)

    def _rows(self, rows: NDArray[np.int64]) -> SweepResult:
        return replace(super()._rows(rows), _whole=self._whole or self)


@dataclass(frozen=True, repr=False, eq=False)
class Attribution(Effects):
    """Estimated effects of patches on a metric, one row per patch, with exact effects for some of the patches.

    Attributes:
        labels: Label of each row.
        patches: The patch for each row.
        exact: Effect of each patch as measured by a forward pass; NaN for patches that were not run.
        drawn: For each row, whether the patch is in the random sample of patches whose exact effects were measured.
        rank_correlation: Spearman correlation between the estimates and the exact effects in the random sample; NaN if
            the correlation is undefined, or if the sample contains fewer than three patches.
        sample: Number of patches in the random sample.
        zeros: Number of patches in the random sample whose exact effect is 0.
        inputs: Number of inputs over which effects are averaged.
        steps: Number of points at which the gradient was computed, on the line from the unpatched to the patched
            activation.
    """

    labels: tuple[Any, ...]
    patches: tuple[Patch, ...]
    exact: Floats
    drawn: NDArray[np.bool_]
    rank_correlation: float
    sample: int
    zeros: int
    inputs: int
    steps: int
    _effect: Floats
    _by_row = ("labels", "patches", "_effect", "exact", "drawn")

    def effect(self) -> Floats:
        """Return the estimated change in the metric, averaged over the inputs, with shape `(patch,)`."""
        return self._effect

    @property
    def effect_label(self) -> str:
        """Label of the effect axis in figures."""
        return f"estimated mean change, {counted(self.inputs, 'input')}"

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch: `label`, `effect` (estimated), `exact` (None if not measured) and `drawn`."""
        exact = [None if np.isnan(each) else each for each in self.exact.tolist()]
        return columns(label=self.labels, effect=self._effect, exact=exact, drawn=self.drawn)

    def _title(self) -> str:
        how = "the unpatched run's gradient" if self.steps == 1 else f"gradients at {self.steps} steps"
        return (
            f"{len(self)} patch{'es' * (len(self) != 1)}, effects estimated from {how}, {counted(self.inputs, 'input')}"
        )

    def _notes(self) -> list[str]:
        if not self.sample:
            return []
        less = f", {self.zeros} of which are 0" if self.zeros else ""
        return [
            f"Spearman rank correlation with the exact effects of {self.sample} random patches{less}: "
            f"{self.rank_correlation:.2f}"
        ]


class SweepInterrupted(KeyboardInterrupt):
    """Raised when a sweep is interrupted with Ctrl-C.

    Attributes:
        partial: SweepResult with one row for each finished entry.
    """

    def __init__(self, partial: SweepResult, asked_for: int) -> None:
        super().__init__(
            f"{len(partial)} of {asked_for} patches finished. Their results are in this exception's attribute "
            "`partial`: `except SweepInterrupted as stopped: stopped.partial`, or `sys.last_value.partial` at a prompt."
        )
        self.partial = partial
