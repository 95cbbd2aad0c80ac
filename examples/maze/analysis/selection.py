"""Channels chosen on mazes with no other use, by rules fixed before any result.

- For each direction: the live channel with the highest AUC for "the path to the cheese starts in this direction", over
  the mazes in which the direction is legal.
- Overall (`ranked`): by the largest distance from 0.5 of the four AUCs.
- A channel is live if its sum varies over the mazes. Dead channels are neither chosen nor controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chanpatch import HookPoints
from chanpatch.statistics import aucs
from maze.analysis.cells import Flags, Integers, Values
from maze.analysis.forwards import level_sums
from maze.paths import Direction, first_steps, legal_first_steps
from maze.states import read_mazes


@dataclass(frozen=True, eq=False)
class Selection:
    """Channels of one hook point on the selection mazes."""

    site: str  # the hook point
    sums: Values  # (level, channel)
    first: Integers  # int (level,): the `Direction` in which the path to the cheese starts
    legal: Flags  # bool (level, direction): legal moves
    auc: Values  # (direction, channel): AUC over mazes in which the direction is legal; NaN for dead channels
    best: dict[Direction, int]  # the channel with the highest AUC for each direction
    live: tuple[int, ...]  # channels whose sum varies
    ranked: tuple[int, ...]  # live channels, the best predictor first


def select_channels(points: HookPoints, site: str, levels: Sequence[bytes]) -> Selection:
    """Rank the channels of a hook point on levels whose mouse is anywhere."""
    mazes = read_mazes(levels)
    first, legal = first_steps(mazes, mazes.cheese).argmax(axis=1), legal_first_steps(mazes)
    sums = level_sums(points, site, levels)
    live = np.flatnonzero(np.ptp(sums, axis=0) > 0)
    areas = np.full((len(Direction), sums.shape[1]), np.nan)
    for direction in Direction:
        rows = legal[:, direction]
        areas[direction, live] = aucs(sums[rows][:, live], first[rows] == direction)
    best = {direction: int(np.nanargmax(areas[direction])) for direction in Direction}
    distance = np.nanmax(np.abs(areas[:, live] - 0.5), axis=0)
    ranked = live[np.argsort(-distance, kind="stable")]
    return Selection(site, sums, first, legal, areas, best, tuple(map(int, live)), tuple(map(int, ranked)))
