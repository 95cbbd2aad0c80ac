"""Results of rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from ..errors import RolloutError
from ..results import Effects, Records, columns, shown_effect
from ..statistics.interval import Interval
from ..statistics.ranking import Rank, ranked_records, ranks_among
from ..statistics.resampling import bootstrap_interval


@dataclass(frozen=True, repr=False, eq=False)
class Rollout(Records):
    """What one policy did: one episode per seed, in the order of the seeds.

    Attributes:
        seeds: The seed of each episode.
        returns: The sum of its rewards.
        lengths: The number of its steps.
        terminated: Whether the environment ended it.
        truncated: Whether it was cut, by the environment or at `max_steps`.
        actions: For each episode an array `(step, ...)` of its actions.
    """

    seeds: tuple[int, ...]
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    actions: tuple[NDArray[Any], ...]

    def __len__(self) -> int:
        return len(self.seeds)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per episode: seed, return, length, terminated, truncated."""
        ends = {"terminated": self.terminated, "truncated": self.truncated}
        return columns(seed=self.seeds, **{"return": self.returns}, length=self.lengths, **ends)

    def _lines(self) -> list[dict[str, Any]]:
        return [{**record, "return": f"{record['return']:g}"} for record in self.to_records()]

    def _title(self) -> str:
        return f"{len(self)} episodes"


@dataclass(frozen=True, repr=False, eq=False)
class PairedRollouts(Effects, Mapping[str, Rollout]):
    """The rollouts of several policies, by name; their arrays match episode by episode.

    The first one is the original, with which the others are compared.
    """

    rollouts: Mapping[str, Rollout]

    def __getitem__(self, name: str) -> Rollout:
        return self.rollouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the policies that are compared with the first, in the order given."""
        return tuple(self)[1:]

    def differences(self) -> NDArray[np.float64]:
        """Return each episode's return minus that under the first policy: `(policy, episode)`."""
        return self._differences([self[label] for label in self.labels])

    def effect(self) -> NDArray[np.float64]:
        """Return the mean over the episodes of the differences: `(policy,)`, in the unit of the return."""
        found: NDArray[np.float64] = self.differences().mean(axis=1)
        return found

    def interval(self, *, seed: int = 0) -> Interval[NDArray[np.float64]]:
        """Return the effects with 95% bootstrap intervals over the episodes, each paired with itself.

        The episodes count as independent of each other. The ends are NaN with fewer than two.

        Args:
            seed: Of the bootstrap.
        """
        return bootstrap_interval(self.differences().T, seed=seed)

    def comparisons(self) -> list[dict[str, Any]]:
        """Return one record per policy but the first.

        A record has the policy's label, the effect with `low` and `high` of its 95% interval, its own mean return
        (`patched`) and that of the first (`original`), and the number of episodes.
        """
        return self._compared({label: self[label] for label in self.labels})

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per policy and episode: policy, seed, return, length, terminated, truncated."""
        return [{"policy": name, **record} for name in self for record in self[name].to_records()]

    @property
    def effect_label(self) -> str:
        """What the effects are, for a figure."""
        return f"difference in mean return, n = {len(self._original)} episodes"

    def _effects(self) -> list[dict[str, Any]]:
        return self.comparisons()

    def _rows(self, rows: NDArray[np.int64]) -> Self:
        first, *others = self
        return replace(self, rollouts={name: self[name] for name in (first, *(others[row] for row in rows))})

    def _lines(self) -> list[dict[str, Any]]:
        compared = [shown_effect("difference", each) for each in self.comparisons()]
        compared.insert(0, dict.fromkeys(compared[0], "") if compared else {})
        return [
            {
                "policy": name,
                "mean return": f"{rollout.returns.mean():.4g}",
                **difference,
                "mean length": f"{rollout.lengths.mean():.4g}",
                "terminated": f"{rollout.terminated.mean():.1%}",
            }
            for (name, rollout), difference in zip(self.rollouts.items(), compared, strict=True)
        ]

    def _title(self) -> str:
        return f"{len(self)} policies over the same {len(self._original)} episodes"

    @property
    def _original(self) -> Rollout:
        return next(iter(self.rollouts.values()))

    def _differences(self, others: Sequence[Rollout]) -> NDArray[np.float64]:
        found = np.zeros((len(others), len(self._original)))
        for row, rollout in enumerate(others):
            if rollout.seeds != self._original.seeds:
                raise RolloutError("The policies were not rolled out over the same episodes: their seeds differ.")
            found[row] = rollout.returns - self._original.returns
        return found

    def _compared(self, others: Mapping[str, Rollout]) -> list[dict[str, Any]]:
        if not others:
            return []
        differences = self._differences([*others.values()])
        interval = bootstrap_interval(differences.T, seed=0)
        return [
            {
                "label": label,
                "effect": float(differences[row].mean()),
                "low": float(interval.low[row]),
                "high": float(interval.high[row]),
                "patched": float(rollout.returns.mean()),
                "original": float(self._original.returns.mean()),
                "n": len(rollout),
            }
            for row, (label, rollout) in enumerate(others.items())
        ]


ORIGINAL = "original"  # the name of the policy without patches in a sweep


@dataclass(frozen=True, repr=False, eq=False)
class SweptRollouts(PairedRollouts):
    """The rollouts of a policy without patches, `"original"`, and with those of each label.

    Attributes:
        rollouts: By label, that of the policy without patches first.
        controls: Those of the control patches, by label, or None. They are not among the rollouts.
    """

    controls: Mapping[str, Rollout] | None = None

    def ranks(self) -> list[Rank | None]:
        """Return where each effect ranks among those of the controls, by absolute value.

        A p-value needs 19 controls or more, and a patch that was not picked for its effect. None for an effect that is
        not finite, and for all where there are no controls or not all of theirs are finite.
        """
        others = self._differences([*(self.controls or {}).values()]).mean(axis=1)
        return ranks_among(self.effect(), others)

    def comparisons(self) -> list[dict[str, Any]]:
        """Return one record per label, those of the controls last.

        Where there are controls, a record also has whether it is one, its rank among them, p and why there is no p.
        """
        records = super().comparisons()
        if self.controls is None:
            return records
        return ranked_records(records, self.ranks(), self._compared(self.controls))

    def _lines(self) -> list[dict[str, Any]]:
        return [
            {
                "label": record["label"],
                **shown_effect("effect", record),
                "patched": record["patched"],
                "original": record["original"],
                **({"rank": record["rank"], "p": record["p"]} if self.controls else {}),
            }
            for record in self.comparisons()
            if not record.get("control")
        ]

    def _title(self) -> str:
        return f"{len(self.labels)} patches, mean return over the same {len(self._original)} episodes"

    def _notes(self) -> list[str]:
        notes = [] if self.controls is None else [f"Ranks are among {len(self.controls)} controls."]
        return notes + sorted({f"No p-values: {rank.no_p}" for rank in self.ranks() if rank and rank.no_p})
