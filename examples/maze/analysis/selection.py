"""Channels chosen on mazes of their own, by rules that stand here before any result.

- For each direction: the live channel whose sum has the highest AUC for "the way to the cheese starts so", over the
  mazes in which that direction is free.
- The most telling ones overall: by the highest of their four AUCs, either way round (`ranked`).
- A channel is live when its sum is not the same in all mazes. Dead ones are never chosen and never controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chanpatch import HookPoints
from chanpatch.statistics import auc
from maze.analysis.channels import level_sums
from maze.environment.paths import Direction, first_steps, legal_moves
from maze.environment.states import read_mazes


@dataclass(frozen=True, eq=False)
class Selection:
    """What the selection mazes say of every channel at one hook point.

    Attributes:
        site: the hook point.
        sums: (level, channel).
        first: int (level,), the `Direction` in which the way to the cheese starts.
        legal: bool (level, direction), which moves lead to a free square.
        auc: (direction, channel), of the channel's sum for that direction, over mazes in which it is legal; NaN for
            dead channels.
        best: of each direction the channel with the highest AUC.
        live: channels whose sum is not the same in all mazes.
        ranked: all live channels, the most telling first.
    """

    site: str
    sums: NDArray[np.float64]
    first: NDArray[np.int64]
    legal: NDArray[np.bool_]
    auc: NDArray[np.float64]
    best: dict[Direction, int]
    live: tuple[int, ...]
    ranked: tuple[int, ...]


def select_channels(points: HookPoints, site: str, levels: Sequence[bytes]) -> Selection:
    """What the sums of every channel at `site` say on these levels.

    Args:
        points: of the policy.
        site: a hook point with channels.
        levels: the selection mazes, the mouse anywhere.
    """
    mazes = read_mazes(levels)
    first = first_steps(mazes, mazes.cheese).argmax(axis=1)
    legal = legal_moves(mazes)[np.arange(len(mazes)), :, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    sums = level_sums(points, site, levels)
    live = np.flatnonzero(np.ptp(sums, axis=0) > 0)
    areas = np.full((len(Direction), sums.shape[1]), np.nan)
    for direction in Direction:
        rows = legal[:, direction]
        for channel in live:
            areas[direction, channel] = auc(sums[rows, channel], first[rows] == direction).estimate
    best = {direction: int(np.nanargmax(areas[direction])) for direction in Direction}
    telling = np.nanmax(np.abs(areas[:, live] - 0.5), axis=0)
    ranked = live[np.argsort(-telling, kind="stable")]
    return Selection(site, sums, first, legal, areas, best, tuple(map(int, live)), tuple(map(int, ranked)))
