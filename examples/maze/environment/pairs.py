"""Contrastive pairs: two mazes that differ by one moved wall, which decides the first step to the cheese.

The first is made after the post's. The cheese is at the end of a dead end that is open either to its left or
below. Nothing else hangs on that wall: the way from the mouse to every other square, the corners too, is the same
in both mazes. What differs inside the policy between the two is therefore about the way to the cheese, and not
about the way to the top right corner. The cheese stays in the top right 5x5 in all four rotations.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maze.environment.states import WALL, Mazes, mazes_from_pictures

CHEESE_IS_UP = """
    .......
    .######
    ....C#.
    ##.###.
    ..M....
    .#####.
    ...#...
"""

CHEESE_IS_RIGHT = """
    .......
    .######
    ...#C#.
    ##.#.#.
    ..M....
    .#####.
    ...#...
"""


# Like the first, but made by `moved_walls.py` from procgen's levels and kept as pictures; here the way to other
# squares turns with the wall, and three of the rotations take the cheese out of the top right 5x5.
_MORE = (
    """
    .#...#C..   .#...#C..
    .#.###.#.   .#.###.#.
    .....#.#.   .....#.#.
    .#.#.#.##   .#.#.#.##
    .#.#.#.#.   .#.#.#.#.
    .###.#.#.   .###.#.#.
    .#.......   .#.#.....
    ##.#####.   ##.#####.
    ..M..#...   ..M......
    """,
    """
    .....#C..#.   .....#C..#.
    ##.#####.#.   ##.#####.#.
    ...#.#.....   ...#.#.#...
    ##.#.#.###.   ##.#.#.###.
    .......#.#.   .......#.#.
    ##.#####.#.   ##.#####.#.
    ..M..#.....   ..M........
    .#######.##   .#######.##
    .#.........   .#.........
    .###.#.###.   .###.#.###.
    ...#.#.#...   ...#.#.#...
    """,
    """
    ...#.....C...   ...#.....C...
    ##.###.#.#.##   ##.###.#.#.##
    .......#.#...   .......#.#...
    ########.#.##   ########.#.##
    .........#.#.   .........#.#.
    ######.#.###.   ######.#.###.
    ...#...#...#.   ...#...#...#.
    ##.#####.###.   ##.#####.###.
    .............   .....#.......
    .#####.#.####   .#####.#.####
    M....#.#...#.   M....#.#...#.
    .#.#######.#.   .#.#######.#.
    .#.....#.....   .#...........
    """,
    """
    .......#.#.....   .......#.#.....
    .#.#.###.###.##   .#.#.###.###.##
    .#.#.....#.#C..   .#.#.....#.#C..
    .###.#.#.#.###.   .###.#.#.#.###.
    .#...#.#.#.....   .#...#.#.#.....
    ##.#####.#.####   ##.#####.#.####
    ...#...#.......   ...#...#.......
    ####.#.#####.##   ####.#.#####.##
    ...#.#...#.....   ...#.#...#.....
    .#.#.#.###.####   .#.#.#.#####.##
    .#...#.....#...   .#...#.....#...
    .###.#.#.#.#.#.   .###.#.#.#.#.#.
    .#...#.#.#M..#.   .#...#.#.#M..#.
    .###.###.#.#.#.   .###.###.#.#.#.
    .#.....#.#.#.#.   .#.....#.#.#.#.
    """,
)


def contrastive_pairs() -> list[Mazes]:
    """Five pairs of other sizes and shapes: in the first maze the way to the cheese starts UP, in the second RIGHT."""
    sides = ([line.split() for line in picture.strip().splitlines()] for picture in _MORE)
    more = [mazes_from_pictures(*("\n".join(rows) for rows in zip(*lines, strict=True))) for lines in sides]
    return [mazes_from_pictures(CHEESE_IS_UP, CHEESE_IS_RIGHT), *more]


def rotations(pair: Mazes) -> list[Mazes]:
    """A pair in its four rotations, each a quarter turn clockwise from the one before.

    The first steps are UP / RIGHT, RIGHT / DOWN, DOWN / LEFT and LEFT / UP.
    """
    turned = [pair]
    while len(turned) < 4:
        turned.append(rotated(turned[-1]))
    return turned


def rotated(mazes: Mazes) -> Mazes:
    """The mazes with mouse and cheese, a quarter turn clockwise; the mouse faces as before."""
    side = mazes.grid.shape[-1]
    every = np.arange(len(mazes))[:, None, None]
    # Indices beyond a maze that is smaller than the grid wrap around to where there are walls.
    col = (mazes.size[:, None, None] - 1 - np.arange(side)[:, None]) % side
    grid: NDArray[np.int32] = mazes.grid[every, np.arange(side), col]
    row_after, col_after = mazes.size - 1 - mazes.mouse[:, 1], mazes.mouse[:, 0]
    return Mazes(grid, mazes.size, np.stack([row_after, col_after], axis=1), mazes.facing_right)


def moved_wall(pair: Mazes) -> NDArray[np.int64]:
    """Where the wall is in each maze of a pair and not in the other: (maze=2, 2)."""
    walls = pair.grid == WALL
    return np.concatenate([np.argwhere(walls[0] & ~walls[1]), np.argwhere(walls[1] & ~walls[0])])
