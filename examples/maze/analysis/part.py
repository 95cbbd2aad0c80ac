"""What a part of the study is: a question, measurements as tables, and what is drawn and said of these tables.

The tables go to disk as CSV and come back before anything is drawn or written from them. So every number in the
report is one that a reader finds in a file of the run, and a part that is done is never measured again.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from chanpatch import HookPoints
from chanpatch.statistics import Interval
from maze.analysis.labels import LabelledChannel, labelled_channels
from maze.analysis.selection import Selection, select_channels
from maze.analysis.tables import SITE
from maze.environment.levels import draw_levels
from maze.environment.paths import Direction, first_steps, legal_moves, top_right
from maze.environment.states import read_mazes

Cell: TypeAlias = bool | int | float | str | None
Table: TypeAlias = list[dict[str, Cell]]
Tables: TypeAlias = Mapping[str, Table]
Agrees: TypeAlias = Literal["yes", "in part", "undecided", "no", "not comparable"]

POOL = 3  # how many levels to draw for each in which a given direction is open
SELECTION_LEVELS = 1000  # mazes that channels are chosen on, whatever n is
LABEL_LEVELS = 500  # mazes that labels are chosen on (one half) and tested on (the other), whatever n is


@dataclass(frozen=True, eq=False)
class Study:
    """One policy under study, with the settings that decide every number.

    Attributes:
        points: of the policy, in eval mode.
        weights: what `load_policy` knows of them.
        n: levels of each measurement.
        seed: of everything that is drawn.
    """

    points: HookPoints = field(repr=False)
    weights: Mapping[str, Any]
    n: int
    seed: int

    def seed_for(self, purpose: str) -> int:
        """A seed in procgen's range: another one for every purpose, independent of those of other purposes."""
        words = np.random.SeedSequence([self.seed, zlib.crc32(purpose.encode())]).generate_state(1)
        return int(words[0]) % 2**31

    def levels(self, purpose: str, count: int | None = None, **where: Any) -> list[bytes]:
        """Levels that no other purpose has; `where` is as for `draw_levels`. `n` of them unless a count is given."""
        return draw_levels(self.n if count is None else count, seed=self.seed_for(purpose), **where)

    @cached_property
    def selection(self) -> Selection:
        """The channels that stand for the directions, chosen on mazes that no part measures anything else on.

        Size 25, cheese in the top right 5x5, mouse on a random square.
        """
        levels = self.levels("selection", SELECTION_LEVELS, size=25, cheese="in distribution", mouse="anywhere")
        return select_channels(self.points, SITE, levels)

    @cached_property
    def labels(self) -> list[LabelledChannel]:
        """What every channel stands for, on mazes of the same kind as those of `selection`, and others."""
        levels = self.levels("labels", LABEL_LEVELS, size=25, cheese="in distribution")
        return labelled_channels(self.points, self.selection, levels, self.seed_for("label halves"))

    def channel(self, direction: Direction) -> int:
        """The channel whose sum tells best, on the selection mazes, that the way to the cheese starts so."""
        return self.selection.best[direction]


@dataclass(frozen=True)
class Finding:
    """What came out, in words made from the tables.

    Attributes:
        ours: the figure to stand beside the post's, with its n and interval; what matters most in the first sentence.
        agrees: with the reference, by a rule that stands in the code. The reference is the part's `post`: what the
            post measured, or else what it claims, or else what the work it builds on does. "not comparable" where
            that says nothing of what would come out, or where there is too little data for any claim.
        follows: what follows from it.
        does_not_follow: what one could read into it, and why not.
    """

    ours: str
    agrees: Agrees
    follows: str
    does_not_follow: str

    @property
    def headline(self) -> str:
        """The first sentence of `ours`."""
        return re.split(r"(?<=\.) (?=[A-Z])", self.ours, maxsplit=1)[0]


@dataclass(frozen=True)
class Part:
    """One question of the study.

    Attributes:
        name: as `--only` takes it.
        question: that it answers.
        method: in two lines.
        post: what the post found, in its own figures; where it did not look, what is known instead. The reference.
        measure: gives the tables of a policy; the only thing that takes time.
        figure: drawn from the tables.
        finding: told from the tables.
    """

    name: str
    question: str
    method: str
    post: str
    measure: Callable[[Study], dict[str, Table]] = field(repr=False)
    figure: Callable[[Tables], Figure] = field(repr=False)
    finding: Callable[[Tables], Finding] = field(repr=False)


def open_to(direction: Direction, levels: Sequence[bytes], count: int) -> tuple[list[bytes], NDArray[np.bool_]]:
    """The first `count` levels whose mouse can go in a direction, and in which of them the way to the cheese starts so.

    About half of all squares are open to a side, so draw `POOL` times as many.
    """
    mazes = read_mazes(levels)
    free = legal_moves(mazes)[np.arange(len(mazes)), direction, mazes.mouse[:, 0], mazes.mouse[:, 1]]
    kept = np.flatnonzero(free)[:count]
    return [levels[index] for index in kept], first_steps(mazes, mazes.cheese)[kept, direction]


def towards_corner(direction: Direction, levels: Sequence[bytes]) -> NDArray[np.bool_]:
    """In which levels the way to the top right corner starts in a direction: (level,)."""
    mazes = read_mazes(levels)
    starts: NDArray[np.bool_] = first_steps(mazes, top_right(mazes))[:, direction]
    return starts


def interval_cells(prefix: str, interval: Interval) -> dict[str, Cell]:
    """An estimate with its interval as three cells: `prefix`, `prefix_low`, `prefix_high`."""
    return {prefix: interval.estimate, f"{prefix}_low": interval.low, f"{prefix}_high": interval.high}


def shown(row: Mapping[str, Any], prefix: str, form: str = ".3f") -> str:
    """The three cells of `interval_cells` as text: "0.974 (0.944 to 0.988)"; without ends "0.974 (no interval)"."""
    low, high = row[f"{prefix}_low"], row[f"{prefix}_high"]
    ends = "no interval" if low is None or np.isnan(low) else f"{low:{form}} to {high:{form}}"
    return f"{row[prefix]:{form}} ({ends})"


def above(row: Mapping[str, Any], prefix: str, limit: float = 0.0) -> bool | None:
    """Whether an interval, three cells as of `interval_cells`, lies above a limit; None if on both sides or empty."""
    low, high = row[f"{prefix}_low"], row[f"{prefix}_high"]
    if low is None or high is None:
        return None
    return True if low > limit else False if high < limit else None


def below(row: Mapping[str, Any], prefix: str, limit: float = 0.0) -> bool | None:
    """The same for below."""
    over = above(row, prefix, limit)
    return None if over is None else not over


def verdict(*claims: bool | None) -> Agrees:
    """Whether a result agrees with what the reference claims.

    Too little data never makes a "no": that takes a claim whose interval lies on the other side.

    Args:
        claims: each True if it holds, False if the opposite does, None if that stays open.
    """
    if not claims:
        return "not comparable"
    if all(claims):
        return "yes"
    if any(claims):
        return "in part"
    return "no" if False in claims else "undecided"


def column(table: Sequence[Mapping[str, Any]], name: str) -> NDArray[Any]:
    """One column of a table as an array."""
    return np.array([row[name] for row in table])


def read_table(file: Path) -> Table:
    """A CSV file as a table; cells that look like numbers are numbers, empty ones None."""
    with file.open(newline="") as stream:
        return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(stream)]


def _cell(text: str) -> Cell:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"": None, "True": True, "False": False}.get(text, text)
