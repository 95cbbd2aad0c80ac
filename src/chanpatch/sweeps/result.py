"""The results of a sweep and of an attribution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import MetricError
from ..patching.edits import Resample, Set
from ..patching.patch import Patch
from ..results import ROWS, Effects, columns, interval_notes, more, shown_effect
from ..statistics.flips import ranked_interval
from ..statistics.interval import Interval, picked
from ..statistics.ranking import Alternative, Rank, ranked_records, ranks_among

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Swept:
    """How the patches that begin at one hook point were run.

    Attributes:
        point: The hook point.
        patches: Number of entries that begin there, controls included.
        strategy: `"vmap"`, `"resume"` or `"loop"`.
        why: The reason for it, and the reasons against faster strategies.
    """

    point: str
    patches: int
    strategy: str
    why: str


@dataclass(frozen=True, repr=False, eq=False)
class SweepResult(Effects):
    """The effects of patches on one metric or several: one row per label, in the order given.

    Methods take the name of a metric. It is needed only if there are several.

    Attributes:
        labels: Label of each row.
        patches: Patches of each row, in the order of application.
        values: The metrics under the patches, by name: `(patch, input)`. A metric of the whole batch has one column.
        baseline: The metrics without any patch, by name: `(input,)`.
        controls: The control patches of the same sweep, or None.
        groups: How the finished rows were run, by the hook point at which their patches begin.
        complete: Whether every patch was run; False only in the partial result of an interrupted sweep.
        no_p: Why ranks among the controls have no p-values, if the controls came with a reason.
    """

    labels: tuple[Any, ...]
    patches: tuple[tuple[Patch, ...], ...]
    values: dict[str, Floats]
    baseline: dict[str, Floats]
    controls: SweepResult | None
    groups: tuple[Swept, ...]
    complete: bool = True
    no_p: str = ""
    _whole: SweepResult | None = None  # the result that `top` took the rows from
    _by_row = ("labels", "patches", "values")

    def __len__(self) -> int:
        return len(self.labels)

    def differences(self, metric: str | None = None) -> Floats:
        """Return the metric under each patch minus the metric without: `(patch, input)`.

        Raises:
            MetricError: If there is no such metric, or there are several and none is named.
        """
        name = self._named(metric)
        return self.values[name] - self.baseline[name]

    def effect(self, metric: str | None = None) -> Floats:
        """Return the mean difference over the inputs: `(patch,)`, in the metric's unit."""
        found: Floats = self.differences(metric).mean(axis=1)
        return found

    def interval(self, metric: str | None = None, *, seed: int = 0) -> Interval[Floats]:
        """Return the effects with 95% intervals over the inputs, which count as independent.

        They hold for all patches of the sweep together, so also for those of `top`. Intervals over six to nine inputs
        are marked, and with fewer they are withheld, as by `chanpatch.statistics.mean_interval`. `seed` is the random
        seed of the sign flips in `chanpatch.statistics.max_t_test`.
        """
        whole = self._whole or self
        row = {label: number for number, label in enumerate(whole.labels)}
        every = ranked_interval(whole.differences(metric).T, seed=seed)
        return picked(every, [row[label] for label in self.labels])

    def ranks(self, metric: str | None = None, *, alternative: Alternative = "two-sided") -> list[Rank | None]:
        """Return the rank of each effect among those of the controls, as `chanpatch.statistics.rank_among` does.

        A p-value needs 19 controls or more, and a patch that was not picked for its effect. A rank is None if the
        effect is not finite; all are None if there are no controls or one of their effects is not finite.
        """
        controls = self.controls
        effects = np.zeros(0) if controls is None else controls.effect(metric)
        return ranks_among(self.effect(metric), effects, alternative, self.no_p)

    def top(self, count: int, metric: str | None = None) -> SweepResult:
        """Return the `count` rows with the largest absolute effects, the largest first.

        Raises:
            StatisticsError: If the count is negative.
        """
        return self._top(count, self.effect(metric))

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch and metric, the controls last.

        It has: label, metric, effect, `low`, `high` and `note` of its interval, the mean metric with (`patched`) and
        without the patch (`baseline`); and with controls: control, rank among them, p, no_p (why there is no p).
        """
        if self.controls is None:
            return self._records()
        return ranked_records(self._records(), self._ranks(), self.controls._records())

    def plot(self, metric: str | None = None, ax: Axes | None = None) -> Axes:  # type: ignore[override]
        """Draw the largest effects with their intervals, into new axes if `ax` is None."""
        return super(SweepResult, self._only(self._named(metric))).plot(ax)

    @property
    def effect_label(self) -> str:
        """Axis label of a figure."""
        inputs = " and ".join(f"{name}, {len(values)} inputs" for name, values in self.baseline.items())
        return f"mean change ({inputs})"

    def _table(self) -> tuple[list[dict[str, Any]], list[str]]:
        first = self._rows(np.arange(min(len(self), ROWS)))
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
        inputs = " and ".join(f"{name} over {len(values)} inputs" for name, values in self.baseline.items())
        title = f"{len(self)} patch{'es' * (len(self) != 1)}, {inputs}"
        return title if self.complete else f"INTERRUPTED, not all patches were run. {title}"

    def _notes(self) -> list[str]:
        notes = [
            f"{name} is NaN without any patch, for {nan} of {len(before)} inputs."
            for name, before in self.baseline.items()
            if (nan := int(np.isnan(before).sum()))
        ]
        if self.controls is not None:
            notes.append(f"Ranks are among {len(self.controls)} controls.")
            notes += sorted({f"No p-values: {rank.no_p}" for rank in self._ranks() if rank and rank.no_p})
        if any(_has_one_reference(patch) for patches in self.patches for patch in patches):
            notes.append(
                "Intervals hold the reference of a mean or resample ablation fixed: they leave out its sampling error."
            )
        for strategy in dict.fromkeys(group.strategy for group in self.groups):
            those = [group for group in self.groups if group.strategy == strategy]
            points = f"{len(those)} hook points" if len(those) > 3 else ", ".join(f"'{group.point}'" for group in those)
            notes.append(f"By {strategy} at {points}: {those[0].why}" + (" (see .groups)" if len(those) > 1 else ""))
        return notes

    def _ranks(self) -> list[Rank | None]:
        """Return the ranks for every metric, those of one patch together."""
        each = [self.ranks(name) for name in self.values]
        return [rank for ranks in zip(*each, strict=True) for rank in ranks]

    def _records(self) -> list[dict[str, Any]]:
        # An interrupt may have left no row, and so no interval.
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
            raise MetricError(f"There are several metrics: {names}. Name one of them.")
        name = next(iter(self.values)) if metric is None else metric
        if name not in self.values:
            raise MetricError(f"There is no metric {name!r}. The sweep has {names}.")
        return name

    def _only(self, name: str) -> SweepResult:
        controls, whole = (None if each is None else each._only(name) for each in (self.controls, self._whole))
        values, baseline = {name: self.values[name]}, {name: self.baseline[name]}
        return replace(self, values=values, baseline=baseline, controls=controls, _whole=whole)

    def _rows(self, rows: NDArray[np.int64]) -> SweepResult:
        return replace(super()._rows(rows), _whole=self._whole or self)


def _has_one_reference(patch: Patch) -> bool:
    """Return whether a patch writes activations that were averaged or drawn over one set of reference inputs."""
    edit, point = patch.edit, patch.site.point
    if isinstance(edit, Resample):
        return True
    batch = None if point is None else point.batch_axis
    return (
        isinstance(edit, Set) and isinstance(edit.value, Tensor) and batch is not None and edit.value.shape[batch] == 1
    )


@dataclass(frozen=True, repr=False, eq=False)
class Attribution(Effects):
    """The estimated effect of each patch on a metric, in the order given, and the exact effects of some.

    Attributes:
        labels: Label of each patch.
        patches: One patch per row.
        exact: Effects measured by real forwards; NaN for patches that were not run.
        drawn: Which rows are in the random sample.
        rank_correlation: Spearman correlation of estimates and exact effects over the random sample. NaN if fewer than
            three patches were drawn, or all have equal effects.
        sample: Number of patches in the random sample.
        inputs: Number of inputs.
        steps: Number of points between clean and patched at which the gradient was taken.
    """

    labels: tuple[Any, ...]
    patches: tuple[Patch, ...]
    exact: Floats
    drawn: NDArray[np.bool_]
    rank_correlation: float
    sample: int
    inputs: int
    steps: int
    _effect: Floats
    _by_row = ("labels", "patches", "_effect", "exact", "drawn")

    def __len__(self) -> int:
        return len(self.labels)

    def effect(self) -> Floats:
        """Return the estimates of the mean change in the metric over the inputs: `(patch,)`."""
        return self._effect

    @property
    def effect_label(self) -> str:
        """Axis label of a figure."""
        return f"estimated mean change, {self.inputs} inputs"

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch: label, effect (the estimate), exact (None if it was not run), drawn."""
        exact = [None if np.isnan(each) else each for each in self.exact.tolist()]
        return columns(label=self.labels, effect=self._effect, exact=exact, drawn=self.drawn)

    def _lines(self) -> list[dict[str, Any]]:
        return self.top(len(self)).to_records()

    def _title(self) -> str:
        how = "the gradient of the clean run" if self.steps == 1 else f"gradients at {self.steps} steps"
        return f"{len(self)} patch{'es' * (len(self) != 1)} estimated by {how}, {self.inputs} inputs"

    def _notes(self) -> list[str]:
        if not self.sample:
            return []
        return [
            f"Rank correlation with the exact effects: {self.rank_correlation:.2f} (Spearman, over {self.sample} "
            "patches drawn at random)"
        ]


class SweepInterrupted(KeyboardInterrupt):
    """A KeyboardInterrupt (Ctrl-C) in the middle of a sweep.

    Attributes:
        partial: The result of the patches that were done.
    """

    def __init__(self, partial: SweepResult, asked_for: int) -> None:
        super().__init__(
            f"{len(partial)} of {asked_for} patches are done. Their result is the `partial` of this exception: "
            "`except SweepInterrupted as stopped: stopped.partial`, or `sys.last_value.partial` at a prompt."
        )
        self.partial = partial
