"""The sums of every channel on some levels, beside what they could tell: where the way to the cheese starts.

readings = Readings.of(points, levels)
readings.area(channel, Direction.UP)           # its AUC, over the mazes in which UP is legal
readings[readings.mazes.size == 15].cells(channel, Direction.UP)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import torch
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from chanpatch import HookPoints, recording
from chanpatch.statistics import Interval, auc, difference_interval
from maze.analysis.exact import move_probabilities
from maze.analysis.part import Cell, interval_cells
from maze.analysis.tables import SITE
from maze.environment.levels import observe, policy_input
from maze.environment.paths import Direction, first_steps, legal_moves
from maze.environment.states import Mazes, read_mazes

_RENDERED = 1024  # observations in memory at once
_BATCH = 64  # observations in one forward


@dataclass(frozen=True, eq=False)
class Readings:
    """What the policy makes of levels, and what is right there.

    Attributes:
        mazes: of the levels.
        sums: (level, channel), at `SITE`.
        moves: (level, direction), the policy's probability of each.
        legal: bool (level, direction), which moves lead to a free square.
        first: bool (level, direction), with which moves a shortest way to the cheese starts: one in a tree.
    """

    mazes: Mazes
    sums: NDArray[np.float64]
    moves: NDArray[np.float64]
    legal: NDArray[np.bool_]
    first: NDArray[np.bool_]

    @classmethod
    def of(cls, points: HookPoints, levels: Sequence[bytes]) -> Readings:
        mazes = read_mazes(levels)
        legal = legal_moves(mazes)[np.arange(len(mazes)), :, mazes.mouse[:, 0], mazes.mouse[:, 1]]
        tables = []
        with (
            recording(points, SITE, reduce="sum") as cache,
            torch.no_grad(),
            tqdm(total=len(levels), desc="readings", unit="level", delay=2, leave=False) as progress,
        ):
            for start in range(0, len(levels), _RENDERED):
                frames = torch.from_numpy(policy_input(observe(levels[start : start + _RENDERED])))
                for batch in frames.to(next(points.model.parameters()).device).split(_BATCH):
                    tables.append(points.model(batch)[0].probs.cpu().numpy())
                    progress.update(len(batch))
        moves = move_probabilities(np.concatenate(tables))[:, : len(Direction)]
        return cls(mazes, cache[SITE].cpu().double().numpy(), moves, legal, first_steps(mazes, mazes.cheese))

    def __len__(self) -> int:
        return len(self.mazes)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Readings:
        """The readings of some of the levels."""
        return Readings(self.mazes[rows], self.sums[rows], self.moves[rows], self.legal[rows], self.first[rows])

    def area(self, channel: int, direction: Direction) -> Interval | None:
        """The AUC of a channel's sum for a direction, where that is legal; None with too few mazes of either kind."""
        rows = self.legal[:, direction]
        return area(self.sums[rows, channel], self.first[rows, direction])

    def walls(self, direction: Direction) -> Interval | None:
        """The AUC that the walls around the mouse alone would have: the fewer legal moves, the likelier each is."""
        rows = self.legal[:, direction]
        return area(-self.legal[rows].sum(axis=1).astype(np.float64), self.first[rows, direction])

    def beyond_walls(self, channel: int, direction: Direction) -> Interval | None:
        """How much the AUC of a channel's sum is above that of the walls."""
        told, walls = self.area(channel, direction), self.walls(direction)
        return None if told is None or walls is None else difference_interval(told, walls)

    def cells(self, channel: int, direction: Direction) -> dict[str, Cell]:
        """The same as cells, with the number of mazes, in how many of them the way starts so, and what walls tell."""
        rows = self.legal[:, direction]
        counts: dict[str, Cell] = {"n": int(rows.sum()), "positives": int(self.first[rows, direction].sum())}
        return (
            counts
            | optional_cells("auc", self.area(channel, direction))
            | optional_cells("walls", self.walls(direction))
            | optional_cells("beyond_walls", self.beyond_walls(channel, direction))
        )


def area(sums: NDArray[np.float64], labels: NDArray[np.bool_]) -> Interval | None:
    """The AUC of one channel's sums, (level,), for a label; None with too few mazes of either kind."""
    return None if min(labels.sum(), (~labels).sum()) < 2 else auc(sums, labels)


def areas(sums: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The AUC of every channel without intervals, NaN where one kind of maze is missing.

    Args:
        sums: (level, channel).
        labels: bool (level,).
    """
    positives = int(labels.sum())
    if not 0 < positives < len(labels):
        return np.full(sums.shape[1], np.nan)
    ranks: NDArray[np.float64] = scipy.stats.rankdata(sums, axis=0)[labels].sum(axis=0)
    return (ranks - positives * (positives + 1) / 2) / (positives * (len(labels) - positives))


def optional_cells(prefix: str, interval: Interval | None) -> dict[str, Cell]:
    """Three cells as of `interval_cells`, empty where there is nothing to estimate."""
    if interval is None:
        return {prefix: None, f"{prefix}_low": None, f"{prefix}_high": None}
    return interval_cells(prefix, interval)


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's rank correlation, NaN where either does not vary."""
    ranks = scipy.stats.rankdata([one, other], axis=1)
    if ranks.shape[1] < 2 or not np.ptp(ranks, axis=1).all():
        return np.nan
    return float(np.corrcoef(ranks)[0, 1])
