"""One part of the study: a question, the tables that answer it, and a figure and a finding made from the tables.

Tables are written as CSV and read back before the figure and the finding are made. So every number in the report is in
a file of the run, and a finished part is not measured again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from chanpatch import HookPoints
from chanpatch.controls import random_sets
from maze.analysis.cells import Agrees, Flags, Table, Tables
from maze.analysis.forwards import SITE
from maze.analysis.labels import LabelledChannel, labelled_channels
from maze.analysis.selection import Selection, select_channels
from maze.levels import draw_levels
from maze.paths import Direction, first_steps, legal_first_steps, top_right
from maze.policy.network import is_posts
from maze.states import read_mazes

SPLITS = ("in distribution", "out of distribution")  # places of the cheese: in the top right 5x5, or elsewhere
POOL = 3  # levels drawn per level with a given open direction
SELECTION_LEVELS = 1000  # for choosing channels, for any n
POSTS_CHANNELS = {Direction.UP: 121, Direction.RIGHT: 73}  # on the post's own network
LABEL_LEVELS = 500  # one half for choosing labels and one for testing them, for any n


@dataclass(frozen=True, eq=False)
class Study:
    """One policy and the settings that decide every number: its hook points in eval mode, its facts, n and the seed."""

    points: HookPoints = field(repr=False)
    weights: Mapping[str, Any]
    n: int
    seed: int

    def seed_for(self, purpose: str) -> int:
        """A seed in procgen's range, different for each purpose."""
        words = np.random.SeedSequence([self.seed, zlib.crc32(purpose.encode())]).generate_state(1)
        return int(words[0]) % 2**31

    def levels(self, purpose: str, count: int | None = None, **places: Any) -> list[bytes]:
        """Levels for one purpose, `n` unless a count is given; `places` as in `draw_levels`."""
        return draw_levels(self.n if count is None else count, seed=self.seed_for(purpose), **places)

    @cached_property
    def selection(self) -> Selection:
        """The channel of each direction, chosen on mazes of side 25 that have no other use."""
        levels = self.levels("selection", SELECTION_LEVELS, size=25, cheese=SPLITS[0], mouse="anywhere")
        return select_channels(self.points, SITE, levels)

    @cached_property
    def labels(self) -> list[LabelledChannel]:
        """The label of every channel, on other such mazes."""
        levels = self.levels("labels", LABEL_LEVELS, size=25, cheese=SPLITS[0])
        return labelled_channels(self.points, self.selection, levels, self.seed_for("label halves"))

    def is_given(self, direction: Direction) -> bool:
        """Whether the post names the direction's channel, which it does on its own network."""
        return is_posts(self.weights) and direction in POSTS_CHANNELS

    def channel(self, direction: Direction) -> int:
        """The post's channel for a direction on its own network, else the best predictor on the selection mazes."""
        return POSTS_CHANNELS[direction] if self.is_given(direction) else self.selection.best[direction]

    def best_and_random_sets(self, purpose: str, count: int) -> list[tuple[int, ...]]:
        """The channels of all directions as one set, and random sets of as many other live channels."""
        best = tuple(sorted({self.channel(direction) for direction in Direction}))
        others = [channel for channel in self.selection.live if channel not in best]
        return [best, *random_sets(others, len(best), count=count, seed=self.seed_for(purpose))]


@dataclass(frozen=True)
class Finding:
    """The result in words, made from the tables."""

    ours: str  # the result to compare with the post's
    agrees: Agrees  # whether the result agrees with the part's `post`, by a rule in the code
    follows: str  # interpretation


TOO_FEW = Finding("Too few mazes.", "not comparable", "Raise --n.")


@dataclass(frozen=True)
class Part:
    """One question of the study."""

    name: str  # for `--only`
    question: str
    method: str
    post: str  # the post's own result, or the nearest known one: the reference
    limits: str  # conclusions that the result does not support
    measure: Callable[[Study], dict[str, Table]] = field(repr=False)  # the only slow step
    figure: Callable[[Tables], Figure] = field(repr=False)
    finding: Callable[[Tables], Finding] = field(repr=False)

    @classmethod
    def of(cls, module: ModuleType) -> Part:
        """The part that a module defines by its docstring and by `measure`, `figure` and `finding`.

        The docstring's paragraphs are the question, "Method: ...", "The post: ..." and "Limits: ...". Names in braces
        stand for the module's constants.
        """
        text = (module.__doc__ or "").format_map(vars(module))
        question, *others = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        method, post, limits = (each.partition(": ")[2] for each in others)
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        return cls(name, question, method, post, limits, module.measure, module.figure, module.finding)


def open_to(direction: Direction, levels: Sequence[bytes], count: int) -> tuple[list[bytes], Flags]:
    """The first `count` levels with a legal move, and whether the path to the cheese starts with that move."""
    mazes = read_mazes(levels)
    kept = np.flatnonzero(legal_first_steps(mazes)[:, direction])[:count]
    return [levels[index] for index in kept], first_steps(mazes, mazes.cheese)[kept, direction]


def towards_corner(direction: Direction, levels: Sequence[bytes]) -> Flags:
    """Whether the path to the top right corner starts in a direction: (level,)."""
    mazes = read_mazes(levels)
    return first_steps(mazes, top_right(mazes))[:, direction]
