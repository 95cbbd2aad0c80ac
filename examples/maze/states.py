"""procgen maze states as arrays: read from the state bytes, edited as a batch, written back.

A state is the byte string that procgen's `get_state` returns, about 23 kB. Only the grid, the side length of the inner
maze and the mouse are read and written. Everything else is kept, so an edited level looks and runs like the original.

Layout, little-endian; both generator strings, and a third one before the grid, vary in length:

    offset 84           int length, bytes        first generator string
    after it            int, int length, bytes   second generator string; from its end:
      +60               int                      number of cells, 625
      +64               int                      number of entities, 1: the mouse
      +68, +72          float, float             the mouse's x and y in the world: cell + 0.5
      +128              int                      the mouse sprite is mirrored: it faces right
    end - 2516          int, 625 ints            number of cells, then the grid, row by row from the bottom
    end - 12, -8, -4    int, int, int            side of the inner maze, side of the world, end mark

The side of a maze is determined from its walls. procgen uses the stored side only to generate a level, and
`set_grid` and `venv_from_grid` in procgen-tools replace the grid without updating the stored side.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHEESE, WALL, FREE = 2, 51, 100
WORLD = 25  # side of procgen's world in hard mode; the inner maze is in the middle

_END_MARK = struct.unpack("<i", b"\xfe\xca\xfe\xca")[0]
_CELLS = WORLD * WORLD
_GRID_FROM_END = 12 + 4 * _CELLS
_RING = np.abs(np.indices((WORLD, WORLD)) - WORLD // 2).max(axis=0)  # a cell's distance from the middle of the world
_PICTURE = {"#": WALL, ".": FREE, "M": FREE, "C": CHEESE}


class StateError(ValueError):
    """Raised if bytes are not the state of a hard maze, or if procgen could not have generated a maze."""


@dataclass(frozen=True, eq=False)
class Mazes:
    """A batch of mazes. A cell is a pair (row, col) in the inner maze, and row 0 is at the bottom.

    Attributes:
        grid: `CHEESE`, `WALL` or `FREE` for each cell: int32 with shape (batch, row, col). `grid[i, 0, 0]` is the
            bottom left cell. The grid is as large as the largest maze in the batch; smaller mazes are surrounded by
            walls.
        size: Side length of each inner maze, an odd number from 3 to 25: int with shape (batch,).
        mouse: The mouse's cell: int with shape (batch, 2).
        facing_right: Whether the mouse's last horizontal move, even if into a wall, was to the right: bool with shape
            (batch,). In a new level, the mouse faces left.

    Raises:
        StateError: If procgen could not have generated a maze. The message names all faults of the first bad maze.
    """

    grid: NDArray[np.int32]
    size: NDArray[np.int64]
    mouse: NDArray[np.int64]
    facing_right: NDArray[np.bool_]

    def __post_init__(self) -> None:
        side, size = self.grid.shape[-1], self.size[:, None]
        from_middle = np.abs(2 * np.arange(side) - (size - 1)) + 1
        spanned = np.where(self.free, np.maximum(from_middle[:, :, None], from_middle[:, None, :]), 0).max(axis=(1, 2))
        other_codes = ~np.isin(self.grid, [CHEESE, WALL, FREE]).all(axis=(1, 2))
        inside = np.clip(self.mouse, 0, size - 1)
        under_mouse = self.grid[(np.arange(len(self)), *np.minimum(inside, side - 1).T)]
        faults = {
            "its side length is not an odd number from 3 to 25": (self.size % 2 == 0)
            | (self.size < 3)
            | (self.size > min(side, WORLD)),
            "its grid contains codes other than 2 (cheese), 51 (wall) and 100 (free)": other_codes,
            "its free cells do not span a square with its side length": spanned != self.size,
            "it has more than one cheese": (self.grid == CHEESE).sum(axis=(1, 2)) > 1,
            "its mouse is outside the maze or in a wall": (self.mouse != inside).any(axis=1) | (under_mouse == WALL),
            "its mouse is on the cheese": under_mouse == CHEESE,
        }
        for i in np.flatnonzero(np.any(list(faults.values()), axis=0)):
            named = "; ".join(fault for fault, rows in faults.items() if rows[i])
            raise StateError(
                f"Maze {i} (side {self.size[i]}, mouse at {_cell(self.mouse[i])}) cannot be a procgen maze: {named}."
            )

    def __len__(self) -> int:
        return len(self.size)

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Mazes:
        if not isinstance(rows, slice) and np.ndim(rows) != 1:
            raise TypeError(
                f"Mazes cannot be indexed with {rows!r}. Use a slice, a list of indices or a mask, such as mazes[[0]] "
                "for the first maze."
            )
        return Mazes(self.grid[rows], self.size[rows], self.mouse[rows], self.facing_right[rows])

    @property
    def free(self) -> NDArray[np.bool_]:
        """Whether the mouse can enter each cell, including the cheese's cell: bool with shape (batch, row, col)."""
        return self.grid != WALL

    @property
    def cheese(self) -> NDArray[np.int64]:
        """The cheese's cell, with shape (batch, 2). Raises StateError if a maze has no cheese."""
        for i in np.flatnonzero(~(self.grid == CHEESE).any(axis=(1, 2))):
            raise StateError(f"Maze {i} of {len(self)} has no cheese.")
        return np.argwhere(self.grid == CHEESE)[:, 1:]

    def moved(
        self,
        *,
        cheese: ArrayLike | None = None,
        mouse: ArrayLike | None = None,
        facing_right: ArrayLike | None = None,
    ) -> Mazes:
        """Return copies of the mazes with the given values: one value per maze, or one value for all mazes.

        If an argument is None, the mazes keep their present values.
        """
        changes: dict[str, NDArray[Any]] = {}
        if cheese is not None:
            cells = self._cells(cheese)
            grid, every = self.without_cheese().grid, np.arange(len(self))
            inside = ((cells >= 0) & (cells < self.size[:, None])).all(axis=1)
            for i in np.flatnonzero(~inside | ~self.free[(every, *(cells * inside[:, None]).T)]):
                raise StateError(f"Maze {i}: the cheese cannot be put at {_cell(cells[i])}, which is not a free cell.")
            grid[(every, *cells.T)] = CHEESE
            changes["grid"] = grid
        if mouse is not None:
            changes["mouse"] = self._cells(mouse)
        if facing_right is not None:
            changes["facing_right"] = np.broadcast_to(facing_right, len(self)).astype(bool)
        return replace(self, **changes)

    def without_cheese(self) -> Mazes:
        """Return copies with a free cell in place of the cheese."""
        return replace(self, grid=np.where(self.grid == CHEESE, np.int32(FREE), self.grid))

    def picture(self, index: int) -> str:
        """Draw one maze as text in the format that `mazes_from_pictures` reads, with the top row first."""
        side = self.size[index]
        grid = self.grid[index, :side, :side]
        cells = np.select([grid == CHEESE, grid == FREE], ["C", "."], "#")
        cells[tuple(self.mouse[index])] = "M"
        return "\n".join("".join(row) for row in cells[::-1])

    def _cells(self, cells: ArrayLike) -> NDArray[np.int64]:
        return np.broadcast_to(cells, (len(self), 2)).astype(np.int64, casting="same_kind")


def read_mazes(states: Sequence[bytes]) -> Mazes:
    """Return the mazes in `states`. The side length of each maze is determined from its walls.

    Raises:
        StateError: If bytes are not the state of a hard maze, or if a mouse is not in a free cell of its maze.
    """
    mice = [struct.unpack_from("<ff52xi", state, _mouse_offset(i, state)) for i, state in enumerate(states)]
    x_y_mirrored = np.array(mice, dtype=np.float64).reshape(-1, 3)
    y_x, mirrored = x_y_mirrored[:, 1::-1], x_y_mirrored[:, 2]
    world = np.array([_world(state) for state in states], dtype=np.int32).reshape(-1, WORLD, WORLD)
    _check_mice(world, y_x, mirrored)
    size = _sides(world)
    margin = (WORLD - size) // 2
    grid = _squares(world, margin, int(size.max(initial=3)))
    return Mazes(grid, size, y_x.astype(np.int64) - margin[:, None], mirrored == 1)


def write_mazes(mazes: Mazes, states: Sequence[bytes] | bytes) -> list[bytes]:
    """Return copies of `states` with maze i written into state i, for procgen's `set_state`.

    If `states` is the bytes of a single state, that state is used for all mazes. The stored side length is replaced
    only if the walls now have a different side length.

    Raises:
        StateError: If bytes are not the state of a hard maze, or if the numbers of states and mazes differ.
    """
    if isinstance(states, bytes):
        states = [states] * len(mazes)
    if len(mazes) != len(states):
        raise StateError(
            f"{len(mazes)} mazes cannot be written into {len(states)} states. "
            "Pass one state per maze, or the bytes of a single state."
        )
    margin = (WORLD - mazes.size) // 2
    world = _squares(mazes.grid, -margin, WORLD).astype("<i4")
    y_x = mazes.mouse + margin[:, None] + 0.5
    written = []
    for index, state in enumerate(states):
        mouse_at = _mouse_offset(index, state)
        edited = bytearray(state)
        struct.pack_into("<ff", edited, mouse_at, y_x[index, 1], y_x[index, 0])
        struct.pack_into("<i", edited, mouse_at + 60, int(mazes.facing_right[index]))
        edited[-_GRID_FROM_END:-12] = world[index].tobytes()
        (stored,) = struct.unpack_from("<i", state, len(state) - 12)
        if stored != mazes.size[index] and _sides(_world(state)[None])[0] != mazes.size[index]:
            struct.pack_into("<i", edited, len(edited) - 12, mazes.size[index])
        written.append(bytes(edited))
    return written


def mazes_from_pictures(*pictures: str) -> Mazes:
    """Read mazes from drawings: `#` is a wall, `.` a free cell, `M` the mouse and `C` the cheese.

    A drawing has one line or word per row of the maze, with the top row first.
    """
    rows = [picture.split()[::-1] for picture in pictures]
    size = np.array([len(lines) for lines in rows], dtype=np.int64)
    side = int(size.max(initial=3))
    grid = np.full((len(rows), side, side), WALL, dtype=np.int32)
    mouse = np.empty((len(rows), 2), dtype=np.int64)
    for index, lines in enumerate(rows):
        marks = "".join(lines)
        if any(len(line) != len(lines) for line in lines) or set(marks) - set(_PICTURE) or marks.count("M") != 1:
            raise StateError(
                f"Picture {index} is not a maze: expected a square of '#' (wall), '.' (free), 'C' (cheese) "
                f"and exactly one 'M' (mouse), got {lines[::-1]}."
            )
        grid[index, : len(lines), : len(lines)] = [[_PICTURE[mark] for mark in line] for line in lines]
        mouse[index] = divmod(marks.index("M"), len(lines))
    return Mazes(grid, size, mouse, np.zeros(len(rows), dtype=bool))


def _squares(grid: NDArray[np.int32], first: NDArray[np.int64], side: int) -> NDArray[np.int32]:
    """Cut a square with the given side length out of each grid. Its bottom left cell is (first, first) in the grid.

    Cells of the square that are outside the grid are walls.
    """
    walled = np.pad(grid, ((0, 0), (0, 1), (0, 1)), constant_values=WALL)
    at = np.clip(first[:, None] + np.arange(side), -1, grid.shape[1])
    return walled[np.arange(len(grid))[:, None, None], at[:, :, None], at[:, None, :]]


def _world(state: bytes) -> NDArray[np.int32]:
    return np.frombuffer(state, "<i4", _CELLS, len(state) - _GRID_FROM_END).reshape(WORLD, WORLD)


def _sides(world: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the side length of the smallest square that is centered in each world and contains all free cells."""
    return 2 * np.where(world == WALL, 1, _RING).max(axis=(1, 2), initial=1) + 1


def _check_mice(world: NDArray[np.int32], y_x: NDArray[np.float64], mirrored: NDArray[np.float64]) -> None:
    """Check that each mouse is in the middle of a free cell and faces left or right."""
    inside = np.isin(y_x, np.arange(WORLD) + 0.5).all(axis=1)
    row, col = np.where(inside[:, None], y_x, 0.0).astype(np.int64).T
    free = inside & (world[np.arange(len(world)), row, col] != WALL)
    if not free.all():
        i = int(np.argmin(free))
        raise StateError(
            f"State {i}: its mouse is at x {y_x[i, 1]:g}, y {y_x[i, 0]:g} in the world, which is not a free cell of "
            "the maze. If the new grid has no mouse, procgen-tools' set_grid leaves the mouse where it was in the "
            "previous level: pass a grid with a mouse."
        )
    for i in np.flatnonzero(~np.isin(mirrored, (0, 1))):
        raise StateError(f"State {i}: the mirror flag of its mouse must be 0 or 1; got {mirrored[i]:.0f}.")


def _mouse_offset(index: int, state: bytes) -> int:
    """Check the layout of a state, and return the byte offset of the mouse's x coordinate."""
    try:
        maze_side, world_side, end_mark = struct.unpack_from("<iii", state, len(state) - 12)
        (grid_cells,) = struct.unpack_from("<i", state, len(state) - _GRID_FROM_END - 4)
        (first,) = struct.unpack_from("<i", state, 84)
        (second,) = struct.unpack_from("<i", state, 92 + first)
        mouse_at = 164 + first + second
        cells, entities = struct.unpack_from("<ii", state, mouse_at - 8)
    except struct.error:
        raise StateError(f"State {index} is not a procgen maze state: it has only {len(state)} bytes.") from None
    found = (end_mark, world_side, grid_cells, cells, entities)
    if found != (_END_MARK, WORLD, _CELLS, _CELLS, 1) or maze_side % 2 == 0 or not 3 <= maze_side <= WORLD:
        raise StateError(
            f"State {index} is not a state of procgen's hard maze: end mark {end_mark}, world side "
            f"{world_side}, {grid_cells} and {cells} cells, {entities} entities, maze side {maze_side}; "
            f"expected end mark {_END_MARK}, world side {WORLD}, {_CELLS} and {_CELLS} cells, 1 entity, "
            f"an odd maze side of 3 to {WORLD}."
        )
    return mouse_at


def _cell(cell: NDArray[np.int64]) -> str:
    return f"({cell[0]}, {cell[1]})"
