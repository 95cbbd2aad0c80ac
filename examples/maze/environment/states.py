"""procgen maze states as arrays: read from the state bytes, edited as a batch, written back.

A state is what procgen's `get_state` returns, about 23 kB. Only the grid, the inner maze's side and the mouse
are read and written; everything else of a level (its textures, background, clock and random generators) stays
as it is in the bytes, so an edited level looks and runs like the level that it was made from.

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
from collections.abc import Iterator, Sequence
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
            of inner maze i. As large as the largest maze of the batch; beyond a smaller one there are walls.
        size: int (batch,), side of each inner maze, odd, 3 to 25.
        mouse: int (batch, 2), the mouse's cell.
        facing_right: bool (batch,). The mouse faces the last horizontal move that was tried, also against a
            wall; a fresh level starts facing left. It shows in the observation.

    Raises:
        StateError: a maze that procgen could not hold; all faults of the first bad maze are named.
    """

    grid: NDArray[np.int32]
    size: NDArray[np.int64]
    mouse: NDArray[np.int64]
    facing_right: NDArray[np.bool_]

    def __post_init__(self) -> None:
        batch, side = len(self.size), self.grid.shape[-1]
        expected = {
            "grid": (batch, side, side),
            "size": (batch,),
            "mouse": (batch, 2),
            "facing_right": (batch,),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise StateError(f"Mazes: {name} has shape {getattr(self, name).shape}, expected {shape}.")
        self._check_contents()

    def __len__(self) -> int:
        return len(self.size)

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Mazes:
        """The mazes at `rows` (a slice, a list of indices or a mask), repeats included."""
        chosen = rows if isinstance(rows, slice) else np.asarray(rows)
        if not isinstance(chosen, slice) and chosen.ndim != 1:
            raise TypeError(f"Mazes[{rows!r}]: index with a slice, a list of indices or a mask; one maze is [[i]].")
        return Mazes(self.grid[chosen], self.size[chosen], self.mouse[chosen], self.facing_right[chosen])

    @property
    def free(self) -> NDArray[np.bool_]:
        """Where the mouse can be: (batch, row, col), the cheese's cell included."""
        return self.grid != WALL

    @property
    def cheese(self) -> NDArray[np.int64]:
        """The cheese's cell: (batch, 2).

        Raises:
            StateError: a maze has no cheese.
        """
        maze, rows, cols = np.nonzero(self.grid == CHEESE)
        if len(maze) < len(self):
            missing = np.setdiff1d(np.arange(len(self)), maze)
            raise StateError(f"Maze {missing[0]} of {len(self)} has no cheese.")
        return np.stack([rows, cols], axis=1)

    def moved(
        self,
        *,
        cheese: ArrayLike | None = None,
        mouse: ArrayLike | None = None,
        facing_right: ArrayLike | None = None,
    ) -> Mazes:
        """The same mazes with the cheese or the mouse elsewhere.

        Args:
            cheese: (batch, 2) or one cell (2,) for all; leave out to keep it.
            mouse: (batch, 2) or one cell (2,) for all; leave out to keep it.
            facing_right: bool (batch,) or one for all; leave out to keep it.
        """
        grid = self.grid
        if cheese is not None:
            cells = self._cells("cheese", cheese)
            every = np.arange(len(self))
            walled = ~self.free[every, cells[:, 0], cells[:, 1]]
            if walled.any():
                i = int(np.argmax(walled))
                raise StateError(f"Maze {i}: the cheese cannot be put at {_cell(cells[i])}, which is a wall.")
            grid = np.where(grid == CHEESE, np.int32(FREE), grid)
            grid[every, cells[:, 0], cells[:, 1]] = CHEESE
        return Mazes(
            grid,
            self.size,
            self.mouse if mouse is None else self._cells("mouse", mouse),
            self.facing_right if facing_right is None else np.broadcast_to(facing_right, len(self)).astype(bool),
        )

    def without_cheese(self) -> Mazes:
        """The same mazes with a free cell where the cheese was."""
        return replace(self, grid=np.where(self.grid == CHEESE, np.int32(FREE), self.grid))

    def picture(self, index: int) -> str:
        """One maze as `mazes_from_pictures` reads it, top row first."""
        side = self.size[index]
        cells = np.full((side, side), "#")
        for mark in ".C":
            cells[self.grid[index, :side, :side] == _PICTURE[mark]] = mark
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
        outside = ((every < 0) | (every >= self.size[:, None])).any(axis=1)
        if outside.any():
            i = int(np.argmax(outside))
            raise StateError(
                f"Maze {i}: the {name}'s cell {_cell(every[i])} is outside; "
                f"rows and columns are 0 to {self.size[i] - 1}."
            )
        return every

    def _check_contents(self) -> None:
        # The mouse is looked up with clipped indices, so that one pass finds every kind of fault.
        side = self.grid.shape[-1]
        row, col = np.clip(self.mouse, 0, side - 1).T
        under_mouse = self.grid[np.arange(len(self)), row, col]
        beyond = np.arange(side) >= self.size[:, None]
        outside = beyond[:, :, None] | beyond[:, None, :]
        border = (np.arange(side) == 0) | (np.arange(side) == self.size[:, None] - 1)
        edge = (border[:, :, None] | border[:, None, :]) & ~outside
        faults = {
            "its side is not odd and 3 to 25": (self.size % 2 == 0) | (self.size < 3) | (self.size > min(side, WORLD)),
            "its grid holds other codes than 2 (cheese), 51 (wall) and 100 (free)": ~np.isin(
                self.grid, [CHEESE, WALL, FREE]
            ).all(axis=(1, 2)),
            "it is not walled in": (outside & self.free).any(axis=(1, 2)),
            "its outer rows and columns are all wall, so its side is smaller": ~(self.free & edge).any(axis=(1, 2)),
            "it has more than one cheese": (self.grid == CHEESE).sum(axis=(1, 2)) > 1,
            "its mouse is outside": ((self.mouse < 0) | (self.mouse >= self.size[:, None])).any(axis=1),
            "its mouse is in a wall": under_mouse == WALL,
            "its mouse is on the cheese": under_mouse == CHEESE,
        }
        bad = np.logical_or.reduce(list(faults.values()))
        if bad.any():
            i = int(np.argmax(bad))
            named = "; ".join(fault for fault, where in faults.items() if where[i])
            raise StateError(
                f"Maze {i} cannot be a procgen maze: {named}. (side {self.size[i]}, mouse at {_cell(self.mouse[i])})"
            )


def read_mazes(states: Sequence[bytes]) -> Mazes:
    """The mazes that are in `states`. The side of each one is the side of its walls.

    Args:
        states: procgen states of hard mazes, as `get_state` returns them.

    Raises:
        StateError: bytes that are not a hard maze state, or a mouse that is not in its maze.
    """
    mouse_at = [_checked_mouse_offset(index, state) for index, state in enumerate(states)]
    world = np.array([_world(state) for state in states], dtype=np.int32).reshape(-1, WORLD, WORLD)
    size = _sides(world)
    x_y = [struct.unpack_from("<ff", state, at) for state, at in zip(states, mouse_at, strict=True)]
    mirrored = [struct.unpack_from("<i", state, at + 60)[0] for state, at in zip(states, mouse_at, strict=True)]
    y_x = np.array(x_y, dtype=np.float64).reshape(-1, 2)[:, ::-1]
    _check_mice(world, y_x, mirrored)
    mouse = y_x.astype(np.int64) - (WORLD - size[:, None]) // 2
    side = int(size.max(initial=3))
    inner = np.full((len(states), side, side), WALL, dtype=np.int32)
    for same_side, here, there in _places(size):
        inner[same_side, here, here] = world[same_side, there, there]
    return Mazes(inner, size, mouse, np.array(mirrored, dtype=bool))


def write_mazes(mazes: Mazes, states: Sequence[bytes] | bytes) -> list[bytes]:
    """`states` with their mazes replaced: maze i is written into a copy of state i.

    Args:
        mazes: what to write; sides may differ from those of `states`.
        states: procgen states of hard mazes, one per maze, or a single one for all, so that nothing but
            the maze differs. They give everything else, such as textures and the clock. The stored side is
            written only if the side of the walls changes.

    Returns:
        New states, for procgen's `set_state`.

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
    world = np.full((len(mazes), WORLD, WORLD), WALL, dtype="<i4")
    for same_side, here, there in _places(mazes.size):
        world[same_side, there, there] = mazes.grid[same_side, here, here]
    y_x = mazes.mouse + margin[:, None] + 0.5
    written = []
    for index, state in enumerate(states):
        mouse_at = _checked_mouse_offset(index, state)
        edited = bytearray(state)
        struct.pack_into("<ff", edited, mouse_at, y_x[index, 1], y_x[index, 0])
        struct.pack_into("<i", edited, mouse_at + 60, int(mazes.facing_right[index]))
        edited[-_GRID_FROM_END:-12] = world[index].tobytes()
        (stored,) = struct.unpack_from("<i", state, len(state) - 12)
        if stored != mazes.size[index] and _sides(_world(state)[None])[0] != mazes.size[index]:
            struct.pack_into("<i", edited, len(edited) - 12, mazes.size[index])
        written.append(bytes(edited))
    return written


def mazes_from_pictures(*pictures: str, facing_right: bool = False) -> Mazes:
    """The mazes that `pictures` show.

    Args:
        *pictures: one string per maze, one line per row, the top row first, as it is seen: `#` wall, `.`
            free, `M` the mouse, `C` the cheese. Blanks around lines are ignored.
        facing_right: which way the mice face.

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
    rows = [[line.strip() for line in picture.split()][::-1] for picture in pictures]
    for index, lines in enumerate(rows):
        marks = "".join(lines)
        if any(len(line) != len(lines) for line in lines) or set(marks) - set(_PICTURE) or marks.count("M") != 1:
            raise StateError(
                f"Picture {index} is not a maze: expected a square of '#' (wall), '.' (free), 'C' (cheese) "
                f"and exactly one 'M' (mouse), got {lines[::-1]}."
            )
    size = np.array([len(lines) for lines in rows], dtype=np.int64)
    side = int(size.max(initial=3))
    grid = np.full((len(rows), side, side), WALL, dtype=np.int32)
    mouse = np.empty((len(rows), 2), dtype=np.int64)
    for index, lines in enumerate(rows):
        cells = np.array([list(line) for line in lines])
        grid[index, : len(lines), : len(lines)] = np.vectorize(_PICTURE.__getitem__)(cells)
        mouse[index] = np.argwhere(cells == "M")[0]
    return Mazes(grid, size, mouse, np.full(len(rows), facing_right))


def _places(size: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.bool_], slice, slice]]:
    """For every side among `size`: which mazes have it, and the rows (or columns) of the inner maze and the world."""
    for side in np.unique(size).tolist():
        margin = (WORLD - side) // 2
        yield size == side, slice(side), slice(margin, margin + side)


def _world(state: bytes) -> NDArray[np.int32]:
    """The grid of the whole world: (row, col)."""
    return np.frombuffer(state, "<i4", _CELLS, len(state) - _GRID_FROM_END).reshape(WORLD, WORLD)


def _sides(world: NDArray[np.int32]) -> NDArray[np.int64]:
    """The side of each inner maze: of the smallest square in the middle of the world that holds all free cells."""
    sides: NDArray[np.int64] = 2 * np.where(world == WALL, 1, _RING).max(axis=(1, 2), initial=1) + 1
    return sides


def _check_mice(world: NDArray[np.int32], y_x: NDArray[np.float64], mirrored: Sequence[int]) -> None:
    """Check that each mouse stands in the middle of a cell of its maze and faces left or right."""
    with np.errstate(invalid="ignore"):
        inside = ((y_x > 0) & (y_x < WORLD) & (y_x % 1 == 0.5)).all(axis=1)
    row, col = np.where(inside[:, None], y_x, 0.0).astype(np.int64).T
    walled = ~inside | (world[np.arange(len(world)), row, col] == WALL)
    if walled.any():
        i = int(np.argmax(walled))
        raise StateError(
            f"State {i}: its mouse is at x {y_x[i, 1]:g}, y {y_x[i, 0]:g} of the world, which is not a free cell of "
            "its maze. procgen-tools' set_grid leaves the mouse of the previous level there if the new grid has no "
            "mouse; give it a grid with a mouse."
        )
    if strange := [index for index, flag in enumerate(mirrored) if flag not in (0, 1)]:
        raise StateError(f"State {strange[0]}: its mouse's mirror flag is {mirrored[strange[0]]}; expected 0 or 1.")


def _checked_mouse_offset(index: int, state: bytes) -> int:
    """Where the mouse's x is in `state`, after everything that an edit relies on was verified."""
    try:
        maze_side, world_side, end_mark = struct.unpack_from("<iii", state, len(state) - 12)
        (grid_cells,) = struct.unpack_from("<i", state, len(state) - _GRID_FROM_END - 4)
        (first,) = struct.unpack_from("<i", state, 84)
        (second,) = struct.unpack_from("<i", state, 92 + first)
        mouse_at: int = 164 + first + second
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
