"""Contrastive pairs: two mazes that differ by one moved wall, which decides the first step to the cheese.

The first pair is modeled on the post's. The cheese is at the end of a dead end with an opening either on the left or
below. All other squares have the same path from the mouse in both mazes, so the activations differ by the path to the
cheese and not by the path to the top right corner. The cheese stays in the top right 5x5 in all four rotations.

The other pairs were made with `moved_walls.py` from procgen levels. The wall also changes other paths, and three
rotations move the cheese out of the top right 5x5.
"""

from __future__ import annotations

from itertools import zip_longest

import numpy as np

from maze.states import Mazes, mazes_from_pictures

# One picture per pair; the first maze has a wall at x, the second at o.
_PAIRS = """
    .......#.#.....  ...#.....C...  .....#C..#.  .#...#C..  .......
    .#.#.###.###.##  ##.###.#.#.##  ##.#####.#.  .#.###.#.  .######
    .#.#.....#.#C..  .......#.#...  ...#.#.o...  .....#.#.  ...oC#.
    .###.#.#.#.###.  ########.#.##  ##.#.#.###.  .#.#.#.##  ##.#x#.
    .#...#.#.#.....  .........#.#.  .......#.#.  .#.#.#.#.  ..M....
    ##.#####.#.####  ######.#.###.  ##.#####.#.  .###.#.#.  .#####.
    ...#...#.......  ...#...#...#.  ..M..x.....  .#.o.....  ...#...
    ####.#.#####.##  ##.#####.###.  .#######.##  ##.#####.
    ...#.#...#.....  .....o.......  .#.........  ..M..x...
    .#.#.#.###o#x##  .#####.#.####  .###.#.###.
    .#...#.....#...  M....#.#...#.  ...#.#.#...
    .###.#.#.#.#.#.  .#.#######.#.
    .#...#.#.#M..#.  .#.....x.....
    .###.###.#.#.#.
    .#.....#.#.#.#.
"""


def contrastive_pairs() -> list[Mazes]:
    """Return five pairs; the path to the cheese starts with UP in the first maze and with RIGHT in the second."""
    columns = zip_longest(*(line.split() for line in _PAIRS.split("\n")[1:-1]), fillvalue="")
    pictures = [" ".join(rows) for rows in columns][::-1]
    marks = [str.maketrans("xo", "#."), str.maketrans("xo", ".#")]
    return [mazes_from_pictures(*(picture.translate(each) for each in marks)) for picture in pictures]


def rotations(pair: Mazes) -> list[Mazes]:
    """Return four rotations, with the first steps UP / RIGHT, RIGHT / DOWN, DOWN / LEFT and LEFT / UP."""
    turned = [pair]
    while len(turned) < 4:
        turned.append(rotated(turned[-1]))
    return turned


def rotated(mazes: Mazes) -> Mazes:
    """Rotate mazes of one size a quarter turn clockwise; the mouse's facing does not change."""
    mouse = np.stack([mazes.size - 1 - mazes.mouse[:, 1], mazes.mouse[:, 0]], axis=1)
    return Mazes(np.rot90(mazes.grid, axes=(1, 2)), mazes.size, mouse, mazes.facing_right)
