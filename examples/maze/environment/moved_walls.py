"""Contrastive pairs made from real levels: one wall is moved, and the first step to the cheese turns.

In a tree, closing a square on the mouse's way to the cheese cuts the cheese off; opening a wall between what was cut
off and the branch that starts with another step joins it again. Both mazes are trees, as procgen's are, and differ in
these two squares and in nothing else. The squares next to the mouse stay as they are, so both moves stay legal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maze.environment.paths import MOVES, Direction, direction_field, distances, legal_moves, shortest_paths
from maze.environment.states import FREE, WALL, Mazes, read_mazes


def pairs_with_a_moved_wall(
    levels: Sequence[bytes], *, clean: Direction, corrupted: Direction, seed: int
) -> tuple[Mazes, Mazes, NDArray[np.int64]]:
    """One pair per level that has any, the mouse and the moved wall drawn at random.

    Args:
        levels: procgen states; the cheese stays where it is, the mouse is put on a square where it can turn.
        clean: the first step of the way to the cheese in the first maze of each pair.
        corrupted: the first step in the second.
        seed: of the draws.

    Returns:
        The first mazes, the second mazes, and int (pair,): the index of each pair's level.
    """
    rng = np.random.default_rng(seed)
    mazes = read_mazes(levels)
    firsts, seconds, kept = [], [], []
    for index in tqdm(range(len(mazes)), desc="pairs", unit="pair", delay=2, leave=False):
        pair = _pair(mazes[[index]], clean, corrupted, rng)
        if pair is not None:
            firsts.append(pair[0])
            seconds.append(pair[1])
            kept.append(index)
    return _joined(firsts), _joined(seconds), np.array(kept, dtype=np.int64)


def _pair(maze: Mazes, clean: Direction, corrupted: Direction, rng: np.random.Generator) -> tuple[Mazes, Mazes] | None:
    """A pair from one maze, or None where no square of it allows one."""
    turns = direction_field(maze, maze.cheese)[0, clean] & legal_moves(maze)[0, corrupted]
    turns &= maze.grid[0] == FREE
    for square in rng.permutation(np.argwhere(turns)):
        placed = maze.moved(mouse=square[None])
        way = shortest_paths(placed, placed.cheese)[0]
        between = way[2:-1]  # the square beside the mouse stays open
        for closing in rng.permutation(between[_may_be_wall(between)]):
            closed = _with(placed, closing, WALL)
            opening = _openings(closed, square, corrupted)
            if len(opening):
                return placed, _with(closed, opening[rng.integers(len(opening))], FREE)
    return None


def _may_be_wall(cells: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which squares procgen's mazes have free or not: those with one odd coordinate."""
    odd: NDArray[np.bool_] = cells.sum(axis=1) % 2 == 1
    return odd


def _openings(closed: Mazes, square: NDArray[np.int64], step: Direction) -> NDArray[np.int64]:
    """Walls between what is cut off and the branch that a step from the square leads into: (wall, 2)."""
    cut_off = closed.free[0] & np.isinf(distances(closed, square[None])[0])
    without_square = replace(closed, grid=_set(closed.grid, square, WALL), mouse=(square + MOVES[step])[None])
    branch = np.isfinite(distances(without_square, without_square.mouse)[0])
    walls = np.argwhere(closed.grid[0] == WALL)
    walls = walls[_may_be_wall(walls) & (walls < closed.size[0]).all(axis=1)]
    # A wall with one odd coordinate has its two free neighbours along the axis of that coordinate.
    along = walls % 2
    near, far = walls - along, walls + along
    sides = [(cut_off[tuple(one.T)], branch[tuple(other.T)]) for one, other in ((near, far), (far, near))]
    joins: NDArray[np.bool_] = np.logical_or.reduce([left & right for left, right in sides])
    return walls[joins]


def _with(maze: Mazes, cell: NDArray[np.int64], code: int) -> Mazes:
    return replace(maze, grid=_set(maze.grid, cell, code))


def _set(grid: NDArray[np.int32], cell: NDArray[np.int64], code: int) -> NDArray[np.int32]:
    edited = grid.copy()
    edited[0, cell[0], cell[1]] = code
    return edited


def _joined(mazes: Sequence[Mazes]) -> Mazes:
    """Mazes of one size in one batch."""
    return Mazes(*(np.concatenate([getattr(maze, name) for maze in mazes]) for name in _FIELDS))


_FIELDS = ("grid", "size", "mouse", "facing_right")
