"""Ways through a batch of mazes: distances, first steps, paths, decision squares.

procgen's mazes are trees, with one path between any two free squares. Edited mazes need not be: all of this
holds for loops and islands too, and says what it does with them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maze.environment.states import Mazes


class Direction(IntEnum):
    """The four moves, in the order of every axis called direction."""

    LEFT = 0
    DOWN = 1
    UP = 2
    RIGHT = 3


MOVES = np.array([(0, -1), (-1, 0), (1, 0), (0, 1)])  # (direction, row and col); row 0 is the bottom
START = (0, 0)  # where procgen puts the mouse: the bottom left cell, free in every procgen maze


class NoPath(ValueError):
    """There is no way from the mouse to the target."""


def top_right(mazes: Mazes) -> NDArray[np.int64]:
    """The top right cell of every maze: (batch, 2)."""
    return np.stack([mazes.size - 1, mazes.size - 1], axis=1)


def distances(mazes: Mazes, targets: ArrayLike) -> NDArray[np.float32]:
    """Number of steps of the shortest way from every cell to the target.

    Args:
        mazes: the mazes.
        targets: (batch, 2), one cell per maze, or (2,), one for all.

    Returns:
        (batch, row, col); infinite in walls and where there is no way.
    """
    # Walls all around, so that a step off the edge needs no check; flat indices, so that all mazes are
    # searched at once.
    free = np.pad(mazes.free, ((0, 0), (1, 1), (1, 1)))
    steps = MOVES @ (free.shape[2], 1)
    found = np.full(free.shape, np.inf, dtype=np.float32)
    flat_free, flat_found = free.reshape(-1), found.reshape(-1)
    row, col = np.broadcast_to(targets, (len(mazes), 2)).T + 1
    front = np.ravel_multi_index((np.arange(len(mazes)), row, col), free.shape)
    front = front[flat_free[front]]
    flat_found[front] = 0
    distance = 0
    while len(front):
        distance += 1
        around = (front[:, None] + steps).reshape(-1)
        around = around[flat_free[around] & np.isinf(flat_found[around])]
        flat_found[around] = distance
        front = np.unique(around)  # a square can be reached from two sides at once where there are loops
    return found[:, 1:-1, 1:-1]


def legal_moves(mazes: Mazes) -> NDArray[np.bool_]:
    """Where each move leads to a free cell: bool (batch, direction, row, col); False in walls."""
    return _neighbours(mazes.free, beyond=False) & mazes.free[:, None]


def direction_field(mazes: Mazes, targets: ArrayLike) -> NDArray[np.bool_]:
    """Which moves shorten the way to the target, from every cell.

    Args:
        mazes: the mazes.
        targets: (batch, 2), one cell per maze, or (2,), one for all.

    Returns:
        bool (batch, direction, row, col). In a tree exactly one move is True at every free square but the
        target; with loops there may be more. All are False at the target, in walls and where there is no way.
    """
    return _downhill(distances(mazes, targets))


def first_steps(mazes: Mazes, targets: ArrayLike) -> NDArray[np.bool_]:
    """Which moves shorten the mouse's way to the target: bool (batch, direction), see `direction_field`.

    Example:
        >>> from maze.environment.states import mazes_from_pictures
        >>> mazes = mazes_from_pictures('..C .#. M#.')
        >>> [move.name for move in Direction if first_steps(mazes, mazes.cheese)[0, move]]
        ['UP']
    """
    return direction_field(mazes, targets)[np.arange(len(mazes)), :, mazes.mouse[:, 0], mazes.mouse[:, 1]]


def shortest_paths(mazes: Mazes, targets: ArrayLike) -> list[NDArray[np.int64]]:
    """The shortest way from the mouse to the target of every maze.

    Where several are equally short the first in the order of `Direction` is taken at every square.

    Args:
        mazes: the mazes.
        targets: (batch, 2), one cell per maze, or (2,), one for all.

    Returns:
        Per maze the cells (step, 2), the mouse's cell first and the target last.

    Raises:
        NoPath: a target cannot be reached.
    """
    every = np.arange(len(mazes))
    row, col = mazes.mouse.T
    distance = distances(mazes, targets)
    lengths = distance[every, row, col]
    if np.isinf(lengths).any():
        i = int(np.argmax(np.isinf(lengths)))
        target = np.broadcast_to(targets, (len(mazes), 2))[i]
        raise NoPath(f"Maze {i}: there is no way from the mouse at ({row[i]}, {col[i]}) to ({target[0]}, {target[1]}).")
    field = _downhill(distance)
    cells = [mazes.mouse]
    for _ in range(int(lengths.max(initial=0))):
        row, col = cells[-1].T
        moves = field[every, :, row, col]
        # A maze that has arrived has no move left and stays; its path is cut to its length below.
        cells.append(cells[-1] + np.where(moves.any(axis=1)[:, None], MOVES[moves.argmax(axis=1)], 0))
    walked = np.stack(cells, axis=1)
    return [path[: int(length) + 1] for path, length in zip(walked, lengths, strict=True)]


def decision_squares(mazes: Mazes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The square where the way to the cheese and the way to the top right corner part, seen from `START`.

    It is the square with the smallest sum of distances to the start, the cheese and the corner: in a tree,
    where the three paths between them meet. Where that is the cheese or the corner itself, one goal lies on
    the way to the other and there is nothing to decide. With loops the sum may have several minima; the
    lowest, leftmost is taken.

    Returns:
        Cells (batch, 2), and bool (batch,): where there is something to decide. Where there is not, the cell
        is the one at which the nearer goal is reached (meaningless if the cheese or the corner cannot be
        reached).
    """
    corner, cheese = top_right(mazes), mazes.cheese
    total = distances(mazes, START) + distances(mazes, cheese) + distances(mazes, corner)
    batch, rows, cols = total.shape
    cells = np.stack(np.divmod(total.reshape(batch, rows * cols).argmin(axis=1), cols), axis=1)
    reachable = np.isfinite(total.min(axis=(1, 2)))
    return cells, reachable & (cells != cheese).any(axis=1) & (cells != corner).any(axis=1)


def _downhill(distance: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which moves lead to a smaller distance: bool (batch, direction, row, col)."""
    here = distance[:, None]
    return np.isfinite(here) & (_neighbours(distance, beyond=np.inf) < here)


def _neighbours(cells: NDArray[Any], *, beyond: float | bool) -> NDArray[Any]:
    """What lies in each direction of every cell: (batch, direction, row, col), `beyond` off the edge."""
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)), constant_values=beyond)
    rows, cols = cells.shape[1:]
    return np.stack(
        [padded[:, 1 + row : 1 + row + rows, 1 + col : 1 + col + cols] for row, col in MOVES.tolist()], axis=1
    )
