"""What the policy chooses on decision squares, with what may explain it: sums of channels, and distances.

seen = at_decision_squares(points, study.levels("purpose", size=25, mouse="decision square"))
seen.took_cheese, seen.sums[:, channel], seen.distances[:, DISTANCES.index(TO_CHEESE)]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from chanpatch import HookPoints, ThresholdProbe, recording
from chanpatch.errors import ProbeError
from chanpatch.statistics import Interval, wilson_interval
from maze.analysis.channels import level_sums
from maze.analysis.part import Cell, Study, Table, open_to
from maze.analysis.tables import SITE
from maze.environment.levels import observe, policy_input
from maze.environment.paths import Direction, distances, first_steps, legal_moves, top_right
from maze.environment.states import Mazes, read_mazes
from maze.policy.network import ACTIONS, is_posts

TO_CHEESE = "square to cheese, path"
TO_CORNER = "square to corner, path"
CHEESE_TO_CORNER = "cheese to corner, straight"
DISTANCES = (CHEESE_TO_CORNER, TO_CHEESE, TO_CORNER, "square to cheese, straight", "square to corner, straight")

PRECISION = 0.99  # of the threshold on a channel's sum
POSTS_CHANNELS = {Direction.UP: 121, Direction.RIGHT: 73}  # of its own network
POSTS_THRESHOLD = 30.0  # above which the cheese is "almost certainly" there, on both
POSTS = "the post's, on its own network"
THRESHOLD_LEVELS = 1000  # mazes whose halves thresholds are chosen and scored on, whatever n is
ACCEPTED = "accepted_of_random_squares"  # where the direction is free; fewer are of decision squares
EDGES = (8, 16, 32)  # of the strata of a path's length, in steps
STRATA = (len(EDGES) + 1) ** 2

_BATCH = 64  # observations in one forward

Floats = NDArray[np.float64]


class Decisions(NamedTuple):
    """Mice on decision squares: one row per level in every field.

    Attributes:
        cheese: int (level,), the `Direction` in which the way to the cheese starts.
        corner: int (level,), the same of the top right corner.
        moves: (level, direction), the summed probability of the actions of each legal move; -1 for the others.
        sums: (level, channel), at relu3.
        distances: (level, distance), in cells, in the order of `DISTANCES`.
    """

    cheese: NDArray[np.int64]
    corner: NDArray[np.int64]
    moves: Floats
    sums: Floats
    distances: Floats

    @property
    def chosen(self) -> NDArray[np.int64]:
        """The legal move with the largest summed probability: int (level,)."""
        return self.moves.argmax(axis=1)

    @property
    def took_cheese(self) -> NDArray[np.bool_]:
        """Whether that is the way to the cheese: bool (level,)."""
        return self.chosen == self.cheese

    def rows(self, which: Any) -> Decisions:
        """Some of the levels."""
        return Decisions(*(each[which] for each in self))

    def distance(self, name: str) -> Floats:
        """One of `DISTANCES`: (level,)."""
        return self.distances[:, DISTANCES.index(name)]


def at_decision_squares(points: HookPoints, levels: Sequence[bytes]) -> Decisions:
    """What the policy does on levels whose mouse stands on the decision square.

    Args:
        points: of the policy, in eval mode.
        levels: procgen states, trees with cheese.
    """
    mazes = read_mazes(levels)
    frames = observe(levels)
    actions: list[torch.Tensor] = []
    with recording(points, SITE, reduce="sum") as cache, torch.no_grad():
        for first in tqdm(range(0, len(frames), _BATCH), desc="decisions", unit="batch", delay=2, leave=False):
            categorical, _ = points.model(torch.from_numpy(policy_input(frames[first : first + _BATCH])))
            actions.append(categorical.probs)
    probabilities = torch.cat(actions).double().numpy()
    moves = np.stack([probabilities[:, list(ACTIONS[direction])].sum(axis=1) for direction in Direction], axis=1)
    legal = legal_moves(mazes)[np.arange(len(mazes)), :, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    return Decisions(
        first_steps(mazes, mazes.cheese).argmax(axis=1),
        first_steps(mazes, top_right(mazes)).argmax(axis=1),
        np.where(legal, moves, -1.0),
        cache[SITE].double().numpy(),
        _distances(mazes),
    )


def joined(parts: Iterable[Decisions]) -> Decisions:
    """The levels of all parts, one after the other."""
    return Decisions(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _distances(mazes: Mazes) -> Floats:
    """(level, distance), in the order of `DISTANCES`."""
    every, (row, col) = np.arange(len(mazes)), mazes.mouse.T
    cheese, corner = mazes.cheese, top_right(mazes)
    paths = [distances(mazes, target)[every, row, col] for target in (cheese, corner)]
    straight = [
        np.hypot(*(one - other).T) for one, other in ((cheese, corner), (mazes.mouse, cheese), (mazes.mouse, corner))
    ]
    return np.stack([straight[0], *paths, *straight[1:]], axis=1).astype(np.float64)


def tested_channel(study: Study, direction: Direction) -> int:
    """The channel whose sum is held against a threshold: the post's on its own network, else the direction's."""
    posts = is_posts(study.weights) and direction in POSTS_CHANNELS
    return POSTS_CHANNELS[direction] if posts else study.channel(direction)


def thresholds(study: Study, directions: Sequence[Direction]) -> dict[Direction, ThresholdProbe | None]:
    """Of each direction the threshold on its channel's sum: the post's on its own network, else `precise_threshold`.

    The mazes are those in which the direction is free, and others than the channel was chosen on: the half that a
    threshold is scored on then had no part in the choice of either.
    """
    levels = study.levels("threshold", THRESHOLD_LEVELS, size=25, cheese="in distribution", mouse="anywhere")
    probes = {}
    for direction in directions:
        free, labels = open_to(direction, levels, len(levels))
        sums = level_sums(study.points, SITE, free)[:, tested_channel(study, direction)]
        probe = precise_threshold(sums, labels, seed=study.seed_for("threshold halves"))
        given = is_posts(study.weights) and direction in POSTS_CHANNELS
        probes[direction] = posts_threshold(probe, sums, labels) if given and probe else probe
    return probes


def posts_threshold(probe: ThresholdProbe, sums: Floats, labels: NDArray[np.bool_]) -> ThresholdProbe:
    """The post's threshold in place of a chosen one, scored on all mazes, as it was chosen on none of them."""
    given = replace(probe, threshold=POSTS_THRESHOLD, direction="above", criterion=POSTS, fitted_on=0)
    return replace(given, held_out=given.transfer(sums, labels).shifted)


def precise_threshold(sums: Floats, labels: NDArray[np.bool_], *, seed: int) -> ThresholdProbe | None:
    """The smallest threshold with `PRECISION` on one half of the mazes, scored on the other.

    If no threshold is that precise, a precision lower by 0.01 is asked for, and so on; the criterion that was met is
    in the probe. None where the channel has no threshold at all.

    Args:
        sums: (level,), of one channel.
        labels: bool (level,), whether the way to the cheese starts in its direction.
        seed: of the halves.
    """
    for percent in range(round(100 * PRECISION), 0, -1):
        try:
            return ThresholdProbe.fit_precision(sums, labels, min_precision=percent / 100, seed=seed)
        except ProbeError:  # none is that precise
            continue
    return None


def threshold_rows(study: Study, probes: dict[Direction, ThresholdProbe | None]) -> Table:
    """One row per direction: its channel, its threshold, and what that is worth on the half not fitted on."""
    rows: Table = []
    for direction, probe in probes.items():
        rows.append(
            {
                "direction": direction.name,
                "channel": tested_channel(study, direction),
                "threshold": probe and probe.threshold,
                "accepts": probe and probe.direction,
                "criterion": "none: the channel has no threshold" if probe is None else probe.criterion,
                "as_precise_as_asked": None if probe and probe.criterion == POSTS else _precise(probe),
                "n_fit": probe and probe.fitted_on,
                "n_held_out": probe and probe.held_out.n,
                **cells("precision", probe and probe.held_out.precision),
                **cells(ACCEPTED, probe and probe.held_out.acceptance),
            }
        )
    return rows


def _precise(probe: ThresholdProbe | None) -> bool:
    return probe is not None and probe.criterion.endswith(f" {PRECISION:g}")


def strata(seen: Decisions) -> NDArray[np.int64]:
    """The stratum of each level by the path lengths to cheese and corner: int (level,), 0 to `STRATA` - 1."""
    cheese, corner = (np.digitize(seen.distance(name), EDGES) for name in (TO_CHEESE, TO_CORNER))
    return cheese * (len(EDGES) + 1) + corner


def cells(prefix: str, interval: Interval | None) -> dict[str, Cell]:
    """An estimate with its interval as three cells, None where there is nothing to estimate."""
    known = (None,) * 3 if interval is None else (interval.estimate, interval.low, interval.high)
    return {
        f"{prefix}{end}": None if value is None or np.isnan(value) else float(value)
        for end, value in zip(("", "_low", "_high"), known, strict=True)
    }


def share_cells(prefix: str, count: int, n: int) -> dict[str, Cell]:
    """A share with Wilson's interval as three cells, None where n is 0."""
    return cells(prefix, wilson_interval(int(count), n) if n else None)


def said(row: dict[str, Any], prefix: str, form: str = ".0%") -> str:
    """The three cells as text: "97% (94% to 99%)"; what is None is said to be missing."""
    estimate, low, high = (row[f"{prefix}{end}"] for end in ("", "_low", "_high"))
    if estimate is None:
        return "nothing to estimate"
    return f"{estimate:{form}} " + (
        "(no interval)" if low is None or high is None else f"({low:{form}} to {high:{form}})"
    )
