"""Distances, first steps, paths and decision squares in a batch of mazes.

procgen's mazes are trees, with one path between any two free squares. These functions also support edited mazes with
loops or islands. Targets have shape (batch, 2), with one cell per maze, or shape (2,), with one cell for all mazes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maze.states import Mazes


class Direction(IntEnum):
    """The four moves, in the order in which they appear on every axis named `direction`."""

    LEFT = 0
    DOWN = 1
    UP = 2
    RIGHT = 3


MOVES = np.array([(0, -1), (-1, 0), (1, 0), (0, 1)])  # (direction, row and col); row 0 is the bottom
START = (0, 0)  # the mouse's first cell in procgen: the bottom left one, free in every maze


def top_right(mazes: Mazes) -> NDArray[np.int64]:
    """Return the top right cell of every maze, with shape (batch, 2)."""
    return np.stack([mazes.size - 1, mazes.size - 1], axis=1)


def distances(mazes: Mazes, targets: ArrayLike) -> NDArray[np.float32]:
    """Return the number of steps from every cell to the target, with shape (batch, row, col).

    The number is infinite in walls and in cells without a path to the target.
    """
    # A breadth-first search in all mazes at once. The padding is a wall, so no step leaves the grid.
    free = np.pad(mazes.free, ((0, 0), (1, 1), (1, 1)))
    found = np.full(free.shape, np.inf, dtype=np.float32)
    flat_free, flat_found = free.reshape(-1), found.reshape(-1)
    row, col = np.broadcast_to(targets, (len(mazes), 2)).T + 1
    front = np.ravel_multi_index((np.arange(len(mazes)), row, col), free.shape)
    front = front[flat_free[front]]
    distance = 0
    while len(front):
        flat_found[front] = distance
        distance += 1
        around = (front[:, None] + MOVES @ (free.shape[2], 1)).reshape(-1)
        front = np.unique(around[flat_free[around] & np.isinf(flat_found[around])])  # a loop may lead to a square twice
    return found[:, 1:-1, 1:-1]


def legal_moves(mazes: Mazes) -> NDArray[np.bool_]:
    """Return whether each move leads from a free cell to a free cell: bool with shape (batch, direction, row, col)."""
    return _neighbors(mazes.free, beyond=False) & mazes.free[:, None]


def direction_field(mazes: Mazes, targets: ArrayLike) -> NDArray[np.bool_]:
    """Return whether each move shortens the path to the target: bool with shape (batch, direction, row, col).

    At the target, in walls and in cells without a path, no move shortens the path. At all other cells of a tree,
    exactly one move does.
    """
    distance = distances(mazes, targets)
    here = distance[:, None]
    return np.isfinite(here) & (_neighbors(distance, beyond=np.inf) < here)


def at_cells(values: NDArray[Any], cells: NDArray[np.int64]) -> NDArray[Any]:
    """Return the values at one cell per maze, (batch, ...), from values with shape (batch, ..., row, col)."""
    found: NDArray[Any] = values[(np.arange(len(cells)), ..., *cells.T)]
    return found


def first_steps(mazes: Mazes, targets: ArrayLike) -> NDArray[np.bool_]:
    """Return whether each move shortens the mouse's path to the target: bool with shape (batch, direction)."""
    return at_cells(direction_field(mazes, targets), mazes.mouse)


def legal_first_steps(mazes: Mazes) -> NDArray[np.bool_]:
    """Return whether each move leads from the mouse's cell to a free cell: bool with shape (batch, direction)."""
    return at_cells(legal_moves(mazes), mazes.mouse)


def shortest_paths(mazes: Mazes, targets: ArrayLike) -> list[NDArray[np.int64]]:
    """Return the shortest path from the mouse to the target in every maze.

    Each path is an array of cells with shape (step, 2) that includes both ends. If several paths are equally short, the
    path makes the first possible move, in the order of `Direction`, at every square. Raises `ValueError` if a target
    cannot be reached.
    """
    field, ends = direction_field(mazes, targets), np.broadcast_to(targets, (len(mazes), 2))
    cells = [mazes.mouse]
    while (moves := at_cells(field, cells[-1])).any():
        # A finished path stays at its end, and is cut to its length below.
        cells.append(cells[-1] + np.where(moves.any(axis=1)[:, None], MOVES[moves.argmax(axis=1)], 0))
    for i in np.flatnonzero((cells[-1] != ends).any(axis=1)):
        (row, col), end = mazes.mouse[i], ends[i]
        raise ValueError(f"Maze {i}: there is no path from the mouse at ({row}, {col}) to ({end[0]}, {end[1]}).")
    walked = np.stack(cells, axis=1)
    lengths = (walked != ends[:, None]).any(axis=2).sum(axis=1)
    return [path[: length + 1] for path, length in zip(walked, lengths, strict=True)]


def decision_squares(mazes: Mazes) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Find the square at which the paths from `START` to the cheese and to the top right corner separate.

    This square has the smallest sum of distances to the start, the cheese and the corner. If several squares have the
    smallest sum, the lowest and then the leftmost of these squares is used.

    Returns:
        Cells with shape (batch, 2); and bool with shape (batch,): whether the paths separate, so that neither goal is
        on the path to the other. If the paths do not separate, the cell is that of the nearer goal.
    """
    corner, cheese = top_right(mazes), mazes.cheese
    total = distances(mazes, START) + distances(mazes, cheese) + distances(mazes, corner)
    batch, rows, cols = total.shape
    flat = total.reshape(batch, rows * cols)
    cells = np.stack(np.divmod(flat.argmin(axis=1), cols), axis=1)
    return cells, np.isfinite(flat.min(axis=1)) & (cells != cheese).any(axis=1) & (cells != corner).any(axis=1)


def _neighbors(cells: NDArray[Any], *, beyond: float | bool) -> NDArray[Any]:
    """Return the value of every cell's neighbor in each direction, with shape (batch, direction, row, col).

    Neighbors outside the grid have the value `beyond`.
    """
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)), constant_values=beyond)
    rows, cols = cells.shape[1:]
    return np.stack(
        [padded[:, 1 + row : 1 + row + rows, 1 + col : 1 + col + cols] for row, col in MOVES.tolist()], axis=1
    )
