"""Contrastive pairs: two mazes that differ by one moved wall, which decides the first step to the cheese.

The first pair is modeled on the post's. The cheese is at the end of a dead end that is open either to its left or
below. The wall blocks nothing else: both mazes have the same paths from the mouse to all other squares, corners
included. So the activations differ by the path to the cheese and not by the path to the top right corner. The cheese
stays in the top right 5x5 in all four rotations.

The others were made by `moved_walls.py` from procgen's levels. In them the wall also changes other paths, and three of
the rotations take the cheese out of the top right 5x5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maze.environment.states import Mazes, mazes_from_pictures

_PAIRS = (
    """
    .......   .......
    .######   .######
    ....C#.   ...#C#.
    ##.###.   ##.#.#.
    ..M....   ..M....
    .#####.   .#####.
    ...#...   ...#...
    """,
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
    """Five pairs of other sizes and shapes; the path to the cheese starts UP in the first maze, RIGHT in the second."""
    rows = [picture.split() for picture in _PAIRS]
    return [mazes_from_pictures(" ".join(each[::2]), " ".join(each[1::2])) for each in rows]


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
    # Beyond a maze that is smaller than the grid, indices wrap around to its walls.
    col = (mazes.size[:, None, None] - 1 - np.arange(side)[:, None]) % side
    grid: NDArray[np.int32] = mazes.grid[every, np.arange(side), col]
    mouse = np.stack([mazes.size - 1 - mazes.mouse[:, 1], mazes.mouse[:, 0]], axis=1)
    return Mazes(grid, mazes.size, mouse, mazes.facing_right)
