"""The directions that each channel stands for, beyond the walls around the mouse.

The path never leads into a wall, so a channel that responds to walls alone predicts the path a little. Labels are
therefore chosen on squares with at least three legal moves. Labels are scored again on squares from which a move inside
the label and a move outside the label are legal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from chanpatch import HookPoints, label_channels
from chanpatch.statistics import Interval
from maze.analysis.forwards import level_sums
from maze.analysis.readings import area
from maze.analysis.selection import Selection
from maze.levels import random_squares
from maze.paths import Direction, first_steps, legal_moves
from maze.states import FREE, read_mazes, write_mazes

WAYS = 3  # least number of legal moves from a square on which labels are chosen
OPPOSITE = ({Direction.LEFT, Direction.RIGHT}, {Direction.DOWN, Direction.UP})


@dataclass(frozen=True)
class LabelledChannel:
    """The label of one channel."""

    label: str | None = None  # directions joined by " or "; None if the sum does not predict them beyond chance
    candidate: str | None = None  # the best label, beyond chance or not; None for a dead channel
    n: int = 0  # number of squares that the label was scored on
    auc: Interval | None = None  # AUC of the sum for the candidate on these squares
    adjusted_p: float = np.nan  # p-value corrected for the number of live channels; NaN for dead channels
    n_choice: int = 0  # number of selection mazes with legal moves inside and outside the candidate
    auc_choice: Interval | None = None  # AUC of the sum for the candidate on these mazes


def labelled_channels(
    points: HookPoints, selection: Selection, levels: Sequence[bytes], seed: int
) -> list[LabelledChannel]:
    """Label every channel at the selection's hook point, with the mouse on a random junction of each level."""
    at = at_partings(levels, seed)
    mazes = read_mazes(at)
    first = first_steps(mazes, mazes.cheese).argmax(axis=1)
    sums = level_sums(points, selection.site, at)
    found = label_channels(sums, first, names=[direction.name for direction in Direction], seed=seed)
    return [
        LabelledChannel(
            *(each.label, each.candidate, found.scored_on, each.auc, each.adjusted_p),
            *_with_choice(selection, each.channel, each.candidate),
        )
        for each in found
    ]


def at_partings(levels: Sequence[bytes], seed: int) -> list[bytes]:
    """The levels with the mouse on a random square that has at least `WAYS` legal moves."""
    mazes = read_mazes(levels)
    parting = (legal_moves(mazes).sum(axis=1) >= WAYS) & (mazes.grid == FREE)
    return write_mazes(mazes.moved(mouse=random_squares(parting, np.random.default_rng(seed))), levels)


def directions_of(label: str | None) -> set[Direction]:
    return {Direction[name] for name in label.split(" or ")} if label else set()


def is_reading(label: str | None) -> bool:
    """Whether a label is one direction or two that are not opposite, like every label that the post reads off."""
    directions = directions_of(label)
    return 1 <= len(directions) <= 2 and directions not in OPPOSITE


def _with_choice(selection: Selection, channel: int, candidate: str | None) -> tuple[int, Interval | None]:
    if candidate is None:
        return 0, None
    inside = np.isin(list(Direction), list(directions_of(candidate)))
    rows = selection.legal[:, inside].any(axis=1) & selection.legal[:, ~inside].any(axis=1)
    return int(rows.sum()), area(selection.sums[rows, channel], inside[selection.first[rows]])
