"""procgen maze states as arrays: read from the state bytes, edited as a batch, written back.

A state is the bytes that procgen's `get_state` returns, about 23 kB. Only the grid, the side of the inner maze and the
mouse are read and written. Textures, background, clock and random generators stay, so an edited level looks and runs
like the original.

Layout, little-endian; both generator strings, and a third one before the grid, vary in length:

    offset 84           int length, bytes        first generator string
    after it            int, int length, bytes   second generator string; from its end:
      +60               int                      number of cells, 625
      +64               int                      number of entities, 1: the mouse
      +68, +72          float, float             the mouse's x and y in the world: cell + 0.5
      +128              int                      the mouse sprite is mirrored: it faces right
    end - 2516          int, 625 ints            number of cells, then the grid, row by row from the bottom
    end - 12, -8, -4    int, int, int            side of the inner maze, side of the world, end mark

The side is read from the walls. procgen uses the stored side only to generate a level, and `set_grid` and
`venv_from_grid` of procgen-tools replace the grid but leave the stored side of the previous level.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHEESE, WALL, FREE = 2, 51, 100
WORLD = 25  # side of procgen's world in hard mode; the inner maze lies in its middle

_END_MARK = struct.unpack("<i", b"\xfe\xca\xfe\xca")[0]
_CELLS = WORLD * WORLD
_GRID_FROM_END = 12 + 4 * _CELLS
_RING = np.abs(np.indices((WORLD, WORLD)) - WORLD // 2).max(axis=0)  # a cell's distance from the middle of the world
_PICTURE = {"#": WALL, ".": FREE, "M": FREE, "C": CHEESE}


class StateError(ValueError):
    """Bytes that are not a hard maze state, or a maze that procgen could not hold."""


@dataclass(frozen=True, eq=False)
class Mazes:
    """A batch of mazes. Cells are (row, col) of the inner maze, row 0 at the bottom.

    Attributes:
        grid: int32 (batch, row, col) of `CHEESE`, `WALL` and `FREE`; `grid[i, 0, 0]` is the bottom left cell
            of inner maze i. As large as the largest maze of the batch; walls surround a smaller one.
        size: int (batch,), side of each inner maze, odd, 3 to 25.
        mouse: int (batch, 2), the mouse's cell.
        facing_right: bool (batch,), the mouse's visible direction: its last horizontal move, even against a wall.
            It faces left in a fresh level.

    Raises:
        StateError: a maze that procgen could not hold; all faults of the first bad maze are named.
    """

    grid: NDArray[np.int32]
    size: NDArray[np.int64]
    mouse: NDArray[np.int64]
    facing_right: NDArray[np.bool_]

    def __post_init__(self) -> None:
        batch, side = len(self.size), self.grid.shape[-1]
        expected = {"grid": (batch, side, side), "size": (batch,), "mouse": (batch, 2), "facing_right": (batch,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise StateError(f"Mazes: {name} has shape {getattr(self, name).shape}, expected {shape}.")
        self._check_contents()

    def __len__(self) -> int:
        return len(self.size)

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Mazes:
        """The mazes at `rows` (a slice, a list of indices or a mask), repeats included."""
        if not isinstance(rows, slice) and np.ndim(rows) != 1:
            raise TypeError(f"Mazes[{rows!r}]: index with a slice, a list of indices or a mask; one maze is [[i]].")
        return Mazes(self.grid[rows], self.size[rows], self.mouse[rows], self.facing_right[rows])

    @property
    def free(self) -> NDArray[np.bool_]:
        """The cells that the mouse can enter, the cheese's included: (batch, row, col)."""
        return self.grid != WALL

    @property
    def cheese(self) -> NDArray[np.int64]:
        """The cheese's cell: (batch, 2).

        Raises:
            StateError: a maze has no cheese.
        """
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
        """Copies with the cheese or the mouse elsewhere, each one per maze or one for all; None keeps it."""
        grid = self.grid
        if cheese is not None:
            cells = self._cells("cheese", cheese)
            at = (np.arange(len(self)), *cells.T)
            for i in np.flatnonzero(~self.free[at]):
                raise StateError(f"Maze {i}: the cheese cannot be put at {_cell(cells[i])}, which is a wall.")
            grid = self.without_cheese().grid
            grid[at] = CHEESE
        return Mazes(
            grid,
            self.size,
            self.mouse if mouse is None else self._cells("mouse", mouse),
            self.facing_right if facing_right is None else np.broadcast_to(facing_right, len(self)).astype(bool),
        )

    def without_cheese(self) -> Mazes:
        """Copies with a free cell in place of the cheese."""
        return replace(self, grid=np.where(self.grid == CHEESE, np.int32(FREE), self.grid))

    def picture(self, index: int) -> str:
        """One maze as `mazes_from_pictures` reads it, top row first."""
        side = self.size[index]
        grid = self.grid[index, :side, :side]
        cells = np.select([grid == CHEESE, grid == FREE], ["C", "."], "#")
        cells[tuple(self.mouse[index])] = "M"
        return "\n".join("".join(row) for row in cells[::-1])

    def _cells(self, name: str, cells: ArrayLike) -> NDArray[np.int64]:
        """`cells` as (batch, 2), inside their mazes."""
        given = np.asarray(cells)
        if given.shape not in [(2,), (len(self), 2)] or given.dtype.kind not in "iu":
            raise StateError(
                f"{name}: expected integer cells of shape ({len(self)}, 2) or (2,), got {given.dtype} {given.shape}."
            )
        every = np.broadcast_to(given, (len(self), 2)).astype(np.int64)
        for i in np.flatnonzero(((every < 0) | (every >= self.size[:, None])).any(axis=1)):
            last = self.size[i] - 1
            raise StateError(
                f"Maze {i}: the {name}'s cell {_cell(every[i])} is outside; rows and columns are 0 to {last}."
            )
        return every

    def _check_contents(self) -> None:
        side, size = self.grid.shape[-1], self.size[:, None]
        cells = np.arange(side)
        outside = (cells >= size)[:, :, None] | (cells >= size)[:, None, :]
        border = (cells == 0) | (cells == size - 1)
        edge = (border[:, :, None] | border[:, None, :]) & ~outside
        other_codes = ~np.isin(self.grid, [CHEESE, WALL, FREE]).all(axis=(1, 2))
        # Clipped, so that one pass finds every kind of fault.
        under_mouse = self.grid[(np.arange(len(self)), *np.clip(self.mouse, 0, side - 1).T)]
        faults = {
            "its side is not odd and 3 to 25": (self.size % 2 == 0) | (self.size < 3) | (self.size > min(side, WORLD)),
            "its grid holds other codes than 2 (cheese), 51 (wall) and 100 (free)": other_codes,
            "it is not walled in": (outside & self.free).any(axis=(1, 2)),
            "its outer rows and columns are all wall, so its side is smaller": ~(self.free & edge).any(axis=(1, 2)),
            "it has more than one cheese": (self.grid == CHEESE).sum(axis=(1, 2)) > 1,
            "its mouse is outside": ((self.mouse < 0) | (self.mouse >= size)).any(axis=1),
            "its mouse is in a wall": under_mouse == WALL,
            "its mouse is on the cheese": under_mouse == CHEESE,
        }
        for i in np.flatnonzero(np.any(list(faults.values()), axis=0)):
            named = "; ".join(fault for fault, rows in faults.items() if rows[i])
            raise StateError(
                f"Maze {i} cannot be a procgen maze: {named}. (side {self.size[i]}, mouse at {_cell(self.mouse[i])})"
            )


def read_mazes(states: Sequence[bytes]) -> Mazes:
    """The mazes in `states`. The side of each one is the side of its walls.

    Raises:
        StateError: bytes that are not a hard maze state, or a mouse that is not in its maze.
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
    """Copies of `states` with their mazes replaced, for procgen's `set_state`: maze i is written into state i.

    One state serves all mazes, too. The stored side is written only if the side of the walls changes.

    Raises:
        StateError: bytes that are not a hard maze state, or another number of states than of mazes.
    """
    if isinstance(states, bytes):
        states = [states] * len(mazes)
    if len(mazes) != len(states):
        raise StateError(
            f"{len(mazes)} mazes cannot be written into {len(states)} states; "
            "give one per maze, or the bytes of a single one."
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
    """Mazes from drawings, a line or word per row, the top row first: `#` wall, `.` free, `M` mouse, `C` cheese.

    Raises:
        StateError: a picture that is not a square of these marks with one mouse.

    Example:
        >>> mazes_from_pictures('''
        ...     ..C
        ...     .#.
        ...     M#.
        ... ''').cheese.tolist()
        [[2, 2]]
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
    """Squares of `side` from each grid, their lowest left cells at (first, first); cells off the grid are walls."""
    walled = np.pad(grid, ((0, 0), (0, 1), (0, 1)), constant_values=WALL)
    at = np.clip(first[:, None] + np.arange(side), -1, grid.shape[1])
    return walled[np.arange(len(grid))[:, None, None], at[:, :, None], at[:, None, :]]


def _world(state: bytes) -> NDArray[np.int32]:
    """The grid of the whole world: (row, col)."""
    return np.frombuffer(state, "<i4", _CELLS, len(state) - _GRID_FROM_END).reshape(WORLD, WORLD)


def _sides(world: NDArray[np.int32]) -> NDArray[np.int64]:
    """The side of the smallest square in the middle of each world that holds all free cells."""
    return 2 * np.where(world == WALL, 1, _RING).max(axis=(1, 2), initial=1) + 1


def _check_mice(world: NDArray[np.int32], y_x: NDArray[np.float64], mirrored: NDArray[np.float64]) -> None:
    """Check that each mouse stands in the middle of a cell of its maze and faces left or right."""
    inside = np.isin(y_x, np.arange(WORLD) + 0.5).all(axis=1)
    row, col = np.where(inside[:, None], y_x, 0.0).astype(np.int64).T
    free = inside & (world[np.arange(len(world)), row, col] != WALL)
    if not free.all():
        i = int(np.argmin(free))
        raise StateError(
            f"State {i}: its mouse is at x {y_x[i, 1]:g}, y {y_x[i, 0]:g} of the world, which is not a free cell of "
            "its maze. procgen-tools' set_grid leaves the mouse of the previous level there if the new grid has no "
            "mouse; give it a grid with a mouse."
        )
    for i in np.flatnonzero(~np.isin(mirrored, (0, 1))):
        raise StateError(f"State {i}: its mouse's mirror flag is {mirrored[i]:.0f}; expected 0 or 1.")


def _mouse_offset(index: int, state: bytes) -> int:
    """The offset of the mouse's x in a state, after a check of everything that an edit relies on."""
    try:
        maze_side, world_side, end_mark = struct.unpack_from("<iii", state, len(state) - 12)
        (grid_cells,) = struct.unpack_from("<i", state, len(state) - _GRID_FROM_END - 4)
        (first,) = struct.unpack_from("<i", state, 84)
        (second,) = struct.unpack_from("<i", state, 92 + first)
        mouse_at = 164 + first + second
        cells, entities = struct.unpack_from("<ii", state, mouse_at - 8)
    except struct.error:
        raise StateError(f"State {index} is not a procgen maze state: its {len(state)} bytes end too early.") from None
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
