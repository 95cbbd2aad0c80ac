"""One part of the study: a question, the tables that answer it, and a figure and a finding made from them.

Tables are written as CSV and read back before anything is drawn or said. So every number of the report is in a file
of the run, and a part that is done is not measured again.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import HookPoints
from maze.analysis.cells import Agrees, Table, Tables
from maze.analysis.forwards import SITE, legal_at_mouse
from maze.analysis.labels import LabelledChannel, labelled_channels
from maze.analysis.selection import Selection, select_channels
from maze.levels import draw_levels
from maze.paths import Direction, first_steps, top_right
from maze.states import read_mazes

SPLITS = ("in distribution", "out of distribution")  # places of the cheese: in the top right 5x5, or elsewhere
POOL = 3  # levels to draw for each one in which a given direction is open
SELECTION_LEVELS = 1000  # mazes that channels are chosen on, for any n
LABEL_LEVELS = 500  # mazes that labels are chosen on (one half) and tested on (the other), for any n


@dataclass(frozen=True, eq=False)
class Study:
    """One policy and the settings that decide every number.

    Attributes:
        points: hook points of the policy, in eval mode.
        weights: facts from `load_policy`.
        n: number of levels of each measurement.
        seed: seed of everything that is drawn.
    """

    points: HookPoints = field(repr=False)
    weights: Mapping[str, Any]
    n: int
    seed: int

    def seed_for(self, purpose: str) -> int:
        """A seed in procgen's range; every purpose has its own."""
        words = np.random.SeedSequence([self.seed, zlib.crc32(purpose.encode())]).generate_state(1)
        return int(words[0]) % 2**31

    def levels(self, purpose: str, count: int | None = None, **places: Any) -> list[bytes]:
        """Levels for one purpose, `n` unless a count is given; `places` as for `draw_levels`."""
        return draw_levels(self.n if count is None else count, seed=self.seed_for(purpose), **places)

    @cached_property
    def selection(self) -> Selection:
        """The channel of each direction, chosen on mazes of side 25 that no part measures anything else on."""
        levels = self.levels("selection", SELECTION_LEVELS, size=25, cheese=SPLITS[0], mouse="anywhere")
        return select_channels(self.points, SITE, levels)

    @cached_property
    def labels(self) -> list[LabelledChannel]:
        """The label of every channel, on other mazes of that kind."""
        levels = self.levels("labels", LABEL_LEVELS, size=25, cheese=SPLITS[0])
        return labelled_channels(self.points, self.selection, levels, self.seed_for("label halves"))

    def channel(self, direction: Direction) -> int:
        """The best predictor, on the selection mazes, that the path to the cheese starts in a direction."""
        return self.selection.best[direction]


@dataclass(frozen=True)
class Finding:
    """The result in words, made from the tables.

    Attributes:
        ours: the result to compare with the post's; its first sentence goes into the summary.
        agrees: whether it agrees with the reference, the part's `post`, by a rule in the code.
        follows: interpretation.
        does_not_follow: limitations.
    """

    ours: str
    agrees: Agrees
    follows: str
    does_not_follow: str

    @property
    def headline(self) -> str:
        """The first sentence of `ours`."""
        return re.split(r"(?<=\.) (?=[A-Z])", self.ours, maxsplit=1)[0]


TOO_FEW = Finding("Too few mazes.", "not comparable", "Nothing.", "Raise --n.")


@dataclass(frozen=True)
class Part:
    """One question of the study.

    Attributes:
        name: name for `--only`.
        question: the question.
        method: the method in two lines.
        post: the post's own result, or the nearest known one: the reference.
        measure: function that returns the tables of a policy; the only slow step.
        figure: function that draws the tables.
        finding: function that describes the tables.
    """

    name: str
    question: str
    method: str
    post: str
    measure: Callable[[Study], dict[str, Table]] = field(repr=False)
    figure: Callable[[Tables], Figure] = field(repr=False)
    finding: Callable[[Tables], Finding] = field(repr=False)


def open_to(direction: Direction, levels: Sequence[bytes], count: int) -> tuple[list[bytes], NDArray[np.bool_]]:
    """The first `count` levels in which a move is legal, and whether the path to the cheese starts with it."""
    mazes = read_mazes(levels)
    kept = np.flatnonzero(legal_at_mouse(mazes)[:, direction])[:count]
    return [levels[index] for index in kept], first_steps(mazes, mazes.cheese)[kept, direction]


def towards_corner(direction: Direction, levels: Sequence[bytes]) -> NDArray[np.bool_]:
    """Whether the path to the top right corner starts in a direction: (level,)."""
    mazes = read_mazes(levels)
    starts: NDArray[np.bool_] = first_steps(mazes, top_right(mazes))[:, direction]
    return starts
