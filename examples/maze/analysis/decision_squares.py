"""The policy's choices on decision squares, with channel sums and distances.

seen = at_decision_squares(points, study.levels("purpose", size=25, mouse="decision square"))
seen.took_cheese, seen.sums[:, channel], seen.distance(TO_CHEESE)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from chanpatch import HookPoints, ThresholdProbe
from chanpatch.errors import ProbeError
from maze.analysis.cells import Flags, Integers, Table, Values
from maze.analysis.estimates import intervals
from maze.analysis.forwards import SITE, forward, level_sums
from maze.analysis.part import SPLITS, Study, open_to
from maze.paths import Direction, at_cells, distances, first_steps, legal_first_steps, top_right
from maze.policy.network import ACTIONS
from maze.states import Mazes, read_mazes

TO_CHEESE = "square to cheese, path"
TO_CORNER = "square to corner, path"
CHEESE_TO_CORNER = "cheese to corner, straight"
DISTANCES = (CHEESE_TO_CORNER, TO_CHEESE, TO_CORNER, "square to cheese, straight", "square to corner, straight")

DIRECTIONS = (Direction.UP, Direction.RIGHT)  # for which the post has a threshold
PRECISION = 0.99  # required of the threshold on a channel's sum
POSTS_THRESHOLD = 30.0  # for both channels
POSTS = "the post's, on its own network"
THRESHOLD_LEVELS = 1000  # mazes for thresholds, for any n: one half to choose on, one to score on
ACCEPTED = "accepted_of_random_squares"  # fraction of squares from which the direction is legal
EDGES = (8, 16, 32)  # of the bins of path lengths, in steps

Probes = dict[Direction, ThresholdProbe | None]


class Decisions(NamedTuple):
    """Levels whose mouse stands on the decision square: one row per level in every field."""

    cheese: Integers  # int (level,): the `Direction` in which the path to the cheese starts
    corner: Integers  # int (level,): the same for the top right corner
    moves: Values  # (level, direction): probability of each legal move; -1 for illegal moves
    sums: Values  # (level, channel): channel sums at relu3
    distances: Values  # (level, distance): in cells, in the order of `DISTANCES`

    @property
    def chosen(self) -> Integers:
        """The likeliest legal move: int (level,)."""
        return self.moves.argmax(axis=1)

    @property
    def took_cheese(self) -> Flags:
        """Whether the likeliest legal move is the first step to the cheese: bool (level,)."""
        return self.chosen == self.cheese

    def rows(self, which: Any) -> Decisions:
        return Decisions(*(each[which] for each in self))

    def distance(self, name: str) -> Values:
        return self.distances[:, DISTANCES.index(name)]


def at_decision_squares(points: HookPoints, levels: Sequence[bytes]) -> Decisions:
    """Run the policy on levels that are trees, with the mouse on the decision square."""
    mazes = read_mazes(levels)
    probabilities, cache = forward(points, levels)
    moves = [probabilities.astype(np.float64)[:, list(ACTIONS[direction])].sum(axis=1) for direction in Direction]
    return Decisions(
        first_steps(mazes, mazes.cheese).argmax(axis=1),
        first_steps(mazes, top_right(mazes)).argmax(axis=1),
        np.where(legal_first_steps(mazes), np.stack(moves, axis=1), -1.0),
        cache[SITE].cpu().double().numpy(),
        _distances(mazes),
    )


def joined(parts: Iterable[Decisions]) -> Decisions:
    return Decisions(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _distances(mazes: Mazes) -> Values:
    cheese, corner = mazes.cheese, top_right(mazes)
    paths = [at_cells(distances(mazes, target), mazes.mouse) for target in (cheese, corner)]
    ends = ((cheese, corner), (mazes.mouse, cheese), (mazes.mouse, corner))
    straight = [np.hypot(*(one - other).T) for one, other in ends]
    return np.stack([straight[0], *paths, *straight[1:]], axis=1).astype(np.float64)


def thresholds(study: Study, directions: Sequence[Direction]) -> Probes:
    """The threshold of each direction: `precise_threshold` on separate mazes, or the post's on the post's network."""
    levels = study.levels("threshold", THRESHOLD_LEVELS, size=25, cheese=SPLITS[0], mouse="anywhere")
    probes = {}
    for direction in directions:
        free, labels = open_to(direction, levels, len(levels))
        sums = level_sums(study.points, SITE, free)[:, study.channel(direction)]
        probe = precise_threshold(sums, labels, seed=study.seed_for("threshold halves"))
        if probe and study.is_given(direction):
            probe = replace(probe, threshold=POSTS_THRESHOLD, direction="above", criterion=POSTS, fitted_on=0)
            probe = replace(probe, held_out=probe.transfer(sums, labels).shifted)  # no maze was fitted on
        probes[direction] = probe
    return probes


def precise_threshold(sums: Values, labels: Flags, *, seed: int) -> ThresholdProbe | None:
    """The smallest threshold with `PRECISION` on one half of the mazes, scored on the other half.

    If no threshold is that precise, the required precision falls in steps of 0.01. None if no threshold exists at all.
    """
    for percent in range(round(100 * PRECISION), 0, -1):
        try:
            return ThresholdProbe.fit_precision(sums, labels, min_precision=percent / 100, seed=seed)
        except ProbeError:
            continue
    return None


def threshold_rows(study: Study, probes: Probes) -> Table:
    """One row per direction: its channel, the threshold, and its scores on the held-out half."""
    return [
        {
            "direction": direction.name,
            "channel": study.channel(direction),
            "threshold": probe and probe.threshold,
            "accepts": probe and probe.direction,
            "criterion": "none: the channel has no threshold" if probe is None else probe.criterion,
            "as_precise_as_asked": None if probe and probe.criterion == POSTS else _is_precise(probe),
            "n_fit": probe and probe.fitted_on,
            "n_held_out": probe and probe.held_out.n,
            **intervals(
                precision=probe and probe.held_out.precision, **{ACCEPTED: probe and probe.held_out.acceptance}
            ),
        }
        for direction, probe in probes.items()
    ]


def _is_precise(probe: ThresholdProbe | None) -> bool:
    return probe is not None and probe.criterion.endswith(f" {PRECISION:g}")


def strata(seen: Decisions) -> Integers:
    """The stratum of each level by the path lengths to cheese and corner: int (level,)."""
    cheese, corner = (np.digitize(seen.distance(name), EDGES) for name in (TO_CHEESE, TO_CORNER))
    return cheese * (len(EDGES) + 1) + corner
