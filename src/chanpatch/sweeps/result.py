"""What a sweep found: a metric per patch and input, beside the unpatched one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import plots
from ..errors import MetricError, SweepError
from ..patching.patch import Patch
from ..results import imported, table
from ..statistics.interval import Interval
from ..statistics.ranking import Rank, rank_among
from ..statistics.resampling import bootstrap_interval

Floats = NDArray[np.float64]


_SHOWN = 20


@dataclass(frozen=True)
class Swept:
    """How the patches that begin at one hook point were run.

    Attributes:
        point: The hook point.
        patches: How many begin there, those of controls too.
        strategy: `"vmap"`, `"resume"` or `"loop"`.
        why: Why this one, and what became of those before it.
    """

    point: str
    patches: int
    strategy: str
    why: str


@dataclass(frozen=True, repr=False, eq=False)
class SweepResult:
    """What each patch does to one metric or several; one row per label, in the order given.

    Attributes:
        labels: Of each row.
        patches: Of each row, in the order of application.
        values: By name of the metric, `(patch, input)`; one column for a metric that is one number for all inputs.
        baseline: By name of the metric, `(input,)`: the same without any patch.
        controls: The control patches of the same sweep, or None.
        groups: How the rows were run, by the hook point at which their patches begin; of those that were finished.
        complete: Whether every patch was run. Only the partial result of an interrupted sweep is not complete.
    """

    labels: tuple[Any, ...]
    patches: tuple[tuple[Patch, ...], ...]
    values: dict[str, Floats]
    baseline: dict[str, Floats]
    controls: SweepResult | None
    groups: tuple[Swept, ...]
    complete: bool

    def __len__(self) -> int:
        return len(self.labels)

    def differences(self, metric: str | None = None) -> Floats:
        """Return the metric under each patch minus the metric without: `(patch, input)`.

        Args:
            metric: Its name; needed where there are several.

        Raises:
            MetricError: If there is no such metric, or none is named where there are several.
        """
        name = self._named(metric)
        return self.values[name] - self.baseline[name]

    def effect(self, metric: str | None = None) -> Floats:
        """Return the mean over the inputs of the metric's change: `(patch,)`, in the metric's unit.

        Args:
            metric: As in `differences`.
        """
        found: Floats = self.differences(metric).mean(axis=1)
        return found

    def interval(self, metric: str | None = None, *, seed: int = 0) -> Interval[Floats]:
        """Return the effects with 95% bootstrap intervals over the inputs, each input paired with itself.

        The inputs count as independent of each other. The ends are NaN with fewer than two inputs.

        Args:
            metric: As in `differences`.
            seed: Of the bootstrap.
        """
        return bootstrap_interval(self.differences(metric).T, seed=seed)

    def ranks(self, metric: str | None = None) -> list[Rank | None]:
        """Return where each effect ranks among those of the controls, by absolute value.

        A p-value needs 19 controls or more, and a patch that was not picked for its effect. None for an effect that is
        not finite, and for all where there are no controls or not all of theirs are finite.

        Args:
            metric: As in `differences`.
        """
        others = np.zeros(0) if self.controls is None else self.controls.effect(metric)  # none after an interrupt too
        ranked = np.isfinite(self.effect(metric)) & (len(others) > 0) & np.isfinite(others).all()
        return [rank_among(float(e), others) if r else None for e, r in zip(self.effect(metric), ranked, strict=True)]

    def top(self, count: int, metric: str | None = None) -> SweepResult:
        """Return the rows with the largest absolute effect, the largest first.

        Args:
            count: How many.
            metric: As in `differences`.

        Raises:
            SweepError: If the count is below 0.
        """
        if count < 0:
            raise SweepError(f"top({count}): the count is a number of rows, from 0 on.")
        order = np.argsort(-np.abs(self.effect(metric)), kind="stable")  # NaN comes last
        return self._rows(order[:count])

    def to_records(self) -> list[dict[str, Any]]:
        """Return one record per patch and metric, those of the controls last.

        A record has the label, the metric, its mean value under the patch and without, the effect, `low` and `high` of
        its interval and, where there are controls, whether it is one, its rank among them, p and why there is no p.
        """
        controls = [] if self.controls is None else [*self.controls._records()]
        ranked = [record | rank for record, rank in zip(self._records(), self._ranks(), strict=True)]
        return ranked + [record | {"control": True, **_NO_RANK} for record in controls]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def plot(self, metric: str | None = None, ax: Any = None) -> Any:
        """Return a ranking of the effects as matplotlib axes; see `chanpatch.plots.effect_ranking`.

        Args:
            metric: As in `differences`.
            ax: Where to draw; new axes if None.
        """
        return plots.effect_ranking(self._only(self._named(metric)), ax)

    @property
    def effect_label(self) -> str:
        """What the effects are, for a figure."""
        inputs = " and ".join(f"{name}, {len(values)} inputs" for name, values in self.baseline.items())
        return f"mean change ({inputs})"

    def __repr__(self) -> str:
        shown = self._rows(np.arange(min(len(self), _SHOWN)))
        lines = [
            {
                "label": record["label"],
                **({"metric": record["metric"]} if len(self.values) > 1 else {}),
                "effect": f"{record['effect']:+.3g}",
                "95%": f"{record['low']:+.3g} to {record['high']:+.3g}",
                "patched": record["patched"],
                "baseline": record["baseline"],
                **({"rank": record["rank"], "p": record["p"]} if self.controls else {}),
            }
            for record in shown.to_records()
            if not record.get("control")
        ]
        more = [f"... {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return "\n".join([self._title(), *table(lines), *more, *self._notes()])

    def _title(self) -> str:
        inputs = " and ".join(f"{name} over {len(values)} inputs" for name, values in self.baseline.items())
        title = f"{len(self)} patches, {inputs}"
        return title if self.complete else f"INTERRUPTED, not all patches were run. {title}"

    def _notes(self) -> list[str]:
        notes = [
            f"{name} is NaN without any patch, for {nan} of {len(before)} inputs."
            for name, before in self.baseline.items()
            if (nan := int(np.isnan(before).sum()))
        ]
        if self.controls is not None:
            notes.append(f"Ranks are among {len(self.controls)} controls.")
            notes += sorted({f"No p-values: {rank.no_p}" for rank in self.ranks_of_all() if rank and rank.no_p})
        for strategy in dict.fromkeys(group.strategy for group in self.groups):
            those = [group for group in self.groups if group.strategy == strategy]
            points = f"{len(those)} hook points" if len(those) > 3 else ", ".join(f"'{group.point}'" for group in those)
            notes.append(f"By {strategy} at {points}: {those[0].why}" + (" (see .groups)" if len(those) > 1 else ""))
        return notes

    def ranks_of_all(self) -> list[Rank | None]:
        """Return the ranks for every metric, those of one patch together."""
        each = [self.ranks(name) for name in self.values]
        return [rank for ranks in zip(*each, strict=True) for rank in ranks]

    def _records(self) -> Iterator[dict[str, Any]]:
        # An interrupt may have left no row, of which there is no interval.
        effects = {name: (self.effect(name), self.interval(name)) for name in self.values if len(self)}
        for row, label in enumerate(self.labels):
            for name, (effect, interval) in effects.items():
                yield {
                    "label": str(label),
                    "metric": name,
                    "effect": float(effect[row]),
                    "low": float(interval.low[row]),
                    "high": float(interval.high[row]),
                    "patched": float(self.values[name][row].mean()),
                    "baseline": float(self.baseline[name].mean()),
                }

    def _ranks(self) -> list[dict[str, Any]]:
        """Return what each record says of the controls."""
        ranks = self.ranks_of_all()
        if self.controls is None:
            return [{} for _ in ranks]
        return [
            {"control": False, **(_NO_RANK if r is None else {"rank": r.rank, "p": r.p, "no_p": r.no_p})} for r in ranks
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
        controls = None if self.controls is None else self.controls._only(name)
        return replace(self, values={name: self.values[name]}, baseline={name: self.baseline[name]}, controls=controls)

    def _rows(self, rows: Any) -> SweepResult:
        return replace(
            self,
            labels=tuple(self.labels[row] for row in rows),
            patches=tuple(self.patches[row] for row in rows),
            values={name: values[rows] for name, values in self.values.items()},
        )


_NO_RANK: dict[str, Any] = {"rank": None, "p": None, "no_p": "no rank among the controls"}


class SweepInterrupted(KeyboardInterrupt):
    """An interrupt (Ctrl-C) in the middle of a sweep.

    It is a KeyboardInterrupt, so that it ends what an interrupt ends.

    Attributes:
        partial: The result of the patches that were done; its `complete` is False.
    """

    def __init__(self, partial: SweepResult, asked_for: int) -> None:
        super().__init__(
            f"{len(partial)} of {asked_for} patches are done. Their result is the `partial` of this exception: "
            "`except SweepInterrupted as stopped: stopped.partial`, or `sys.last_value.partial` at a prompt."
        )
        self.partial = partial
