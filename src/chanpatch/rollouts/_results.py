"""What policies did: results of rollouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._optional import imported
from .._tables import table


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
    """The rollouts of several policies, by name; their arrays match episode by episode."""

    rollouts: Mapping[str, Rollout]

    def __getitem__(self, name: str) -> Rollout:
        return self.rollouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rollouts)

    def __len__(self) -> int:
        return len(self.rollouts)

    def to_records(self) -> list[dict[str, Any]]:
        """Return one dict per policy and episode: policy, seed, return, length, terminated, truncated."""
        return [{"policy": name, **record} for name in self for record in self[name].to_records()]

    def to_pandas(self) -> Any:
        """Return the records as a pandas data frame."""
        return imported("pandas").DataFrame(self.to_records())

    def __repr__(self) -> str:
        means = [
            {
                "policy": name,
                "mean return": f"{rollout.returns.mean():.4g}",
                "mean length": f"{rollout.lengths.mean():.4g}",
                "terminated": f"{rollout.terminated.mean():.1%}",
            }
            for name, rollout in self.rollouts.items()
        ]
        episodes = len(next(iter(self.rollouts.values())))
        return "\n".join([f"{len(self)} policies over the same {episodes} episodes", *table(means)])


_SHOWN = 10  # episodes that a repr lists
