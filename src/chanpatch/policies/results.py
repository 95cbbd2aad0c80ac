"""What policies did: results of rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RolloutError
from ..results import imported, table
from ..statistics.interval import Interval
from ..statistics.ranking import Rank, rank_among
from ..statistics.resampling import bootstrap_interval


@dataclass(frozen=True, repr=False, eq=False)
class Rollout:
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
        columns = {
            "seed": self.seeds,
            "return": self.returns.tolist(),
            "length": self.lengths.tolist(),
            "terminated": self.terminated.tolist(),
            "truncated": self.truncated.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        records = [{**record, "return": f"{record['return']:g}"} for record in self.to_records()[:_SHOWN]]
        more = [f"... {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return "\n".join([f"{len(self)} episodes", *table(records), *more])


@dataclass(frozen=True, repr=False, eq=False)
class PairedRollouts(Mapping[str, Rollout]):
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

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        compared = [_shown("difference", each) for each in self.comparisons()]
        compared.insert(0, dict.fromkeys(compared[0], "") if compared else {})
        means = [
            {
                "policy": name,
                "mean return": f"{rollout.returns.mean():.4g}",
                **difference,
                "mean length": f"{rollout.lengths.mean():.4g}",
                "terminated": f"{rollout.terminated.mean():.1%}",
            }
            for (name, rollout), difference in zip(self.rollouts.items(), compared, strict=True)
        ]
        return "\n".join([f"{len(self)} policies over the same {len(self._original)} episodes", *table(means)])

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


def _shown(name: str, record: Mapping[str, Any]) -> dict[str, str]:
    """Return an effect and its interval as a table shows them."""
    return {name: f"{record['effect']:+.3g}", "95%": f"{record['low']:+.3g} to {record['high']:+.3g}"}


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
        ranked = np.isfinite(self.effect()) & (len(others) > 0) & np.isfinite(others).all()
        return [rank_among(float(e), others) if r else None for e, r in zip(self.effect(), ranked, strict=True)]

    def comparisons(self) -> list[dict[str, Any]]:
        """Return one record per label, those of the controls last.

        Where there are controls, a record also has whether it is one, its rank among them, p and why there is no p.
        """
        records = super().comparisons()
        if self.controls is None:
            return records
        none = {"rank": None, "p": None, "no_p": "no rank among the controls"}
        ranks = [none if r is None else {"rank": r.rank, "p": r.p, "no_p": r.no_p} for r in self.ranks()]
        ranked = [record | {"control": False, **rank} for record, rank in zip(records, ranks, strict=True)]
        return ranked + [record | {"control": True, **none} for record in self._compared(self.controls)]

    def __repr__(self) -> str:
        shown = [record for record in self.comparisons() if not record.get("control")]
        lines = [
            {
                "label": record["label"],
                **_shown("effect", record),
                "patched": record["patched"],
                "original": record["original"],
                **({"rank": record["rank"], "p": record["p"]} if self.controls else {}),
            }
            for record in shown[:_SHOWN_PATCHES]
        ]
        title = f"{len(shown)} patches, mean return over the same {len(self._original)} episodes"
        notes = [f"... {len(shown) - _SHOWN_PATCHES} more"] if len(shown) > _SHOWN_PATCHES else []
        notes += [] if self.controls is None else [f"Ranks are among {len(self.controls)} controls."]
        notes += sorted({f"No p-values: {rank.no_p}" for rank in self.ranks() if rank and rank.no_p})
        return "\n".join([title, *table(lines), *notes])


_SHOWN, _SHOWN_PATCHES = 10, 20  # episodes and patches that a repr lists
