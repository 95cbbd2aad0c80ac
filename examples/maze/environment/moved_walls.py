"""Contrastive pairs made from procgen levels: one wall is moved, which changes the first step to the cheese.

In a tree, closing a square on the mouse's path cuts off the cheese. Opening a wall between the separated squares and
the branch after another first step reconnects them. Both mazes are trees, like procgen's, and differ only in these two
squares. The squares next to the mouse do not change, so both first steps remain legal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maze.paths import MOVES, Direction, direction_field, distances, legal_moves, shortest_paths
from maze.states import FREE, WALL, Mazes, read_mazes


def pairs_with_a_moved_wall(
    levels: Sequence[bytes], *, clean: Direction, corrupted: Direction, seed: int
) -> tuple[Mazes, Mazes, NDArray[np.int64]]:
    """Make a pair from every level that allows one, with a random square for the mouse and a random wall.

    The path to the cheese starts with the step `clean` in the first maze and with `corrupted` in the second. Returns
    the first mazes, the second mazes, and int (pair,): the index of each pair's level.
    """
    rng = np.random.default_rng(seed)
    mazes = read_mazes(levels)
    pairs = {}
    for index in tqdm(range(len(mazes)), desc="pairs", unit="pair", delay=2, leave=False):
        if pair := _pair(mazes[[index]], clean, corrupted, rng):
            pairs[index] = pair
    first, second = (
        Mazes(*(np.concatenate([vars(maze)[name] for maze in side]) for name in vars(mazes)))
        for side in zip(*pairs.values(), strict=True)
    )
    return first, second, np.array(list(pairs), dtype=np.int64)


def _pair(maze: Mazes, clean: Direction, corrupted: Direction, rng: np.random.Generator) -> tuple[Mazes, Mazes] | None:
    """Make a pair from one maze, or return None if no square in the maze allows a pair."""
    squares = direction_field(maze, maze.cheese)[0, clean] & legal_moves(maze)[0, corrupted] & (maze.grid[0] == FREE)
    for square in rng.permutation(np.argwhere(squares)):
        placed = maze.moved(mouse=square[None])
        between = shortest_paths(placed, placed.cheese)[0][2:-1]  # the square beside the mouse stays open
        for closing in rng.permutation(between[_may_be_wall(between)]):
            closed = _with(placed, closing, WALL)
            opening = _openings(closed, square, corrupted)
            if len(opening):
                return placed, _with(closed, opening[rng.integers(len(opening))], FREE)
    return None


def _may_be_wall(cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether procgen makes these squares free or walls: they have one odd coordinate."""
    return cells.sum(axis=1) % 2 == 1


def _openings(closed: Mazes, square: NDArray[np.int64], step: Direction) -> NDArray[np.int64]:
    """The walls between the separated squares and the branch that a step from the square enters: (wall, 2)."""
    separated = closed.free[0] & np.isinf(distances(closed, square[None])[0])
    branching = _with(closed.moved(mouse=square + MOVES[step]), square, WALL)
    branch = np.isfinite(distances(branching, branching.mouse)[0])
    walls = np.argwhere(closed.grid[0] == WALL)
    walls = walls[_may_be_wall(walls) & (walls < closed.size[0]).all(axis=1)]
    # The two free neighbors of such a wall are along the axis of the odd coordinate.
    one, other = tuple((walls - walls % 2).T), tuple((walls + walls % 2).T)
    return walls[(separated[one] & branch[other]) | (separated[other] & branch[one])]


def _with(maze: Mazes, cell: NDArray[np.int64], code: int) -> Mazes:
    grid = maze.grid.copy()
    grid[0, cell[0], cell[1]] = code
    return replace(maze, grid=grid)
