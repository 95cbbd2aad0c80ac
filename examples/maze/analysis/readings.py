"""The channel sums and moves of the policy on some levels, beside the first step to the cheese.

readings = Readings.of(points, levels)
readings.area(channel, Direction.UP)           # AUC of the sum, over the mazes in which UP is legal
readings[readings.mazes.size == 15].cells(channel, Direction.UP)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chanpatch import HookPoints
from chanpatch.probes import LogisticProbe
from chanpatch.statistics import Interval, auc, auc_difference_interval
from maze.analysis.cells import Flags, Integers, Row, Values
from maze.analysis.estimates import intervals, minus
from maze.analysis.exact import move_probabilities
from maze.analysis.forwards import SITE, forward
from maze.analysis.selection import Selection
from maze.paths import Direction, first_steps, legal_first_steps
from maze.states import Mazes, read_mazes


@dataclass(frozen=True, eq=False)
class Readings:
    """The policy on some levels."""

    mazes: Mazes  # the mazes
    sums: Values  # (level, channel): channel sums at `SITE`
    moves: Values  # (level, direction): the policy's probability of each move
    legal: Flags  # bool (level, direction): legal moves
    first: Flags  # bool (level, direction): first moves of shortest paths to the cheese; one per level in a tree

    @classmethod
    def of(cls, points: HookPoints, levels: Sequence[bytes]) -> Readings:
        mazes = read_mazes(levels)
        probabilities, cache = forward(points, levels)
        moves = move_probabilities(probabilities)[:, : len(Direction)]
        sums = cache[SITE].cpu().double().numpy()
        return cls(mazes, sums, moves, legal_first_steps(mazes), first_steps(mazes, mazes.cheese))

    def __len__(self) -> int:
        return len(self.mazes)

    def __getitem__(self, rows: Flags | Integers) -> Readings:
        return Readings(self.mazes[rows], self.sums[rows], self.moves[rows], self.legal[rows], self.first[rows])

    def area(self, channel: int, direction: Direction) -> Interval | None:
        """The AUC of a channel's sum for a direction, over the mazes in which the direction is legal."""
        rows = self.legal[:, direction]
        return area(self.sums[rows, channel], self.first[rows, direction])

    def cells(self, channel: int, direction: Direction) -> Row:
        """That AUC, the AUC of the number of walls around the mouse, and their difference, as cells."""
        rows = self.legal[:, direction]
        first = self.first[rows, direction]
        found, walls = self.area(channel, direction), area(-self.legal[rows].sum(axis=1).astype(float), first)
        row = {"n": int(rows.sum()), "positives": int(first.sum())}
        return row | intervals(auc=found, walls=walls, beyond_walls=minus(found, walls))


def area(sums: Values, labels: Flags) -> Interval | None:
    """The AUC of one channel's sums, (level,), for a label; None with fewer than two positives or negatives."""
    return None if min(labels.sum(), (~labels).sum()) < 2 else auc(sums, labels)


def readout(selection: Selection, direction: Direction, channel: int, sums: Values, labels: Flags) -> Row:
    """The AUCs of a logistic probe of all live channels and of one channel, and their paired difference.

    The probe is fitted on the selection mazes in which the direction is legal, and scored on other mazes: sums (level,
    channel), and whether the path starts in the direction, (level,).
    """
    live, rows = list(selection.live), selection.legal[:, direction]
    probe = LogisticProbe.fit(selection.sums[rows][:, live], selection.first[rows] == direction)
    all_live, one = probe.predict(sums[:, live]), sums[:, channel]
    known = area(one, labels) is not None
    more = auc_difference_interval(all_live, one, labels) if known else None
    row = {"channel": channel, "live": len(live), "n_fit": int(rows.sum()), "n": len(labels)}
    return row | intervals(linear=area(all_live, labels), one=area(one, labels), more=more)
