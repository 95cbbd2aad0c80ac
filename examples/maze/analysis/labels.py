"""What each channel stands for, told where the walls do not tell it already.

A channel that only notices which moves are walled off says something of the way too, since the way never leads into a
wall. So labels are chosen on squares where three ways or more part, and scored once more on squares where a move of
the label and a move outside it are both free: what is left there is more than the walls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chanpatch import HookPoints, label_channels
from chanpatch.statistics import Interval, auc
from maze.analysis.channels import level_sums
from maze.analysis.selection import Selection
from maze.environment.levels import random_squares
from maze.environment.paths import Direction, first_steps, legal_moves
from maze.environment.states import FREE, read_mazes, write_mazes

WAYS = 3  # that part at a square on which labels are chosen
OPPOSITE = ({Direction.LEFT, Direction.RIGHT}, {Direction.DOWN, Direction.UP})


@dataclass(frozen=True)
class LabelledChannel:
    """What one channel stands for.

    Attributes:
        label: a direction, or several joined by " or "; None where the sums do not tell it beyond chance.
        candidate: the best label, beyond chance or not; None where the channel is dead.
        n: squares that the label was scored on.
        auc: of the sum for the candidate on these.
        adjusted_p: of that, corrected for the number of live channels; NaN for dead ones.
        n_choice: selection mazes in which a move of the candidate and one outside it are both free.
        auc_choice: of the sum for the candidate on these.
    """

    label: str | None = None
    candidate: str | None = None
    n: int = 0
    auc: Interval | None = None
    adjusted_p: float = np.nan
    n_choice: int = 0
    auc_choice: Interval | None = None


def labelled_channels(
    points: HookPoints, selection: Selection, levels: Sequence[bytes], seed: int
) -> list[LabelledChannel]:
    """What every channel at the selection's hook point stands for.

    Args:
        points: of the policy.
        selection: the sums on other mazes, in which the mouse is anywhere; they give `auc_choice`.
        levels: mazes of size 25, or so large that ways part in each; the mouse is put on a random such square.
        seed: of the squares, the halves and the permutations.
    """
    names = [direction.name for direction in Direction]
    at = at_partings(levels, seed)
    mazes = read_mazes(at)
    first = first_steps(mazes, mazes.cheese).argmax(axis=1)
    told = label_channels(level_sums(points, selection.site, at), first, names=names, seed=seed)
    return [
        LabelledChannel(
            each.label,
            each.candidate,
            told.scored_on,
            each.auc,
            each.adjusted_p,
            *_with_choice(selection, each.channel, each.candidate),
        )
        for each in told
    ]


def at_partings(levels: Sequence[bytes], seed: int) -> list[bytes]:
    """The levels with the mouse on a random square from which `WAYS` ways or more lead."""
    mazes = read_mazes(levels)
    parting = (legal_moves(mazes).sum(axis=1) >= WAYS) & (mazes.grid == FREE)
    return write_mazes(mazes.moved(mouse=random_squares(parting, np.random.default_rng(seed))), levels)


def directions_of(label: str | None) -> set[Direction]:
    """The directions that a label names."""
    return {Direction[name] for name in label.split(" or ")} if label else set()


def is_reading(label: str | None) -> bool:
    """Whether a label is one direction or two that are not opposite, as every reading of the post is."""
    directions = directions_of(label)
    return 1 <= len(directions) <= 2 and directions not in OPPOSITE


def _with_choice(selection: Selection, channel: int, candidate: str | None) -> tuple[int, Interval | None]:
    """In how many selection mazes a move of the label and one outside it are free, and the AUC there."""
    if candidate is None:
        return 0, None
    inside = np.isin(list(Direction), list(directions_of(candidate)))
    rows: NDArray[np.bool_] = selection.legal[:, inside].any(axis=1) & selection.legal[:, ~inside].any(axis=1)
    labels = inside[selection.first[rows]]
    few = min(labels.sum(), (~labels).sum()) < 2
    return int(rows.sum()), None if few else auc(selection.sums[rows, channel], labels)
