"""Draw random procgen levels with chosen places for the cheese and the mouse, and render observations of levels.

| `cheese=` | its square |
|---|---|
| `"as drawn"` | procgen's own choice: any free square |
| `"in distribution"` | a random free square of the top right 5x5, as in training |
| `"out of distribution"` | a random free square anywhere else |
| `"top left"`, `"top right"`, `"bottom right"` | the corner with that name, which is free in every procgen maze |
| `(low, high)` | a random free square whose distance to the top right corner, in cells, is in [low, high) |

| `mouse=` | its square |
|---|---|
| `"start"` | the bottom left corner, as in procgen |
| `"anywhere"` | a random free square |
| `"decision square"` | see `paths.decision_squares`; levels without a decision square are skipped |

The cheese is never on the start square, and the mouse is never on the cheese.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maze.command import UserError
from maze.environment.requirements import procgen_mazes
from maze.paths import decision_squares
from maze.states import CHEESE, FREE, WORLD, Mazes, read_mazes, write_mazes

REGION = 5  # side of the top right square of the inner maze that held the cheese during training
CHEESE_PLACES = ("as drawn", "in distribution", "out of distribution", "top left", "top right", "bottom right")
MOUSE_PLACES = ("start", "anywhere", "decision square")
CheesePlace: TypeAlias = str | tuple[float, float]

_BATCH = 64  # sub-environments: enough to hide the cost of a call, few enough to stay in the cache


def draw_levels(
    count: int, *, seed: int, size: int | None = None, cheese: CheesePlace = "as drawn", mouse: str = "start"
) -> list[bytes]:
    """Draw random procgen levels, and return their states. A larger count with the same seed only adds levels.

    Args:
        count: Number of levels.
        seed: Random seed, 0 to 2**31 - 1.
        size: Side length of the inner maze, an odd number from 3 to 25. If None, all side lengths are equally likely,
            as in procgen.
        cheese: One of `CHEESE_PLACES`, or a range of distances.
        mouse: One of `MOUSE_PLACES`; the mouse faces left, as in a fresh level.

    Raises:
        UserError: If the seed, the size or a place is invalid, or if no level allows their combination.
    """
    _check_request(seed, size, cheese, mouse)
    rng = np.random.default_rng(seed)
    environment = procgen_mazes(_BATCH, seed=seed)
    drawn: list[bytes] = []
    with tqdm(total=count, desc="levels", unit="level", delay=2, leave=False) as progress:
        while len(drawn) < count:
            drawn += _arranged(environment.get_state(), rng, size, cheese, mouse)
            progress.update(min(len(drawn), count) - progress.n)
            environment.act(np.full(_BATCH, -1))  # the one action that ends every episode at once
    return drawn[:count]


def cheese_squares(mazes: Mazes, place: CheesePlace) -> NDArray[np.bool_]:
    """Return the squares where the cheese may be: bool with shape (batch, row, col)."""
    side = mazes.grid.shape[-1]
    row, col = np.arange(side)[:, None], np.arange(side)
    last = mazes.size[:, None, None] - 1
    region = (row > last - REGION) & (col > last - REGION)
    if isinstance(place, tuple):
        distance = np.hypot(last - row, last - col)
        return (distance >= place[0]) & (distance < place[1]) & mazes.free & ((row > 0) | (col > 0))
    squares = {
        "as drawn": mazes.grid == CHEESE,
        "in distribution": region,
        "out of distribution": ~region,
        "top left": (row == last) & (col == 0),
        "top right": (row == last) & (col == last),
        "bottom right": (row == 0) & (col == last),
    }[place]
    return squares & mazes.free & ((row > 0) | (col > 0))


def random_squares(candidates: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw one of the candidate squares in each maze at random, and return their cells with shape (batch, 2).

    `candidates` is bool with shape (batch, row, col). One random number is drawn per maze, so the squares in the first
    mazes do not depend on the size of the batch.
    """
    batch, rows, cols = candidates.shape
    flat = candidates.reshape(batch, rows * cols)
    counts = flat.sum(axis=1)
    if not counts.all():
        raise UserError(f"Maze {int(np.argmin(counts))} of {batch} has no candidate square.")
    nth = (rng.random(batch) * counts).astype(np.int64)
    chosen = np.argmax(flat.cumsum(axis=1) > nth[:, None], axis=1)
    return np.stack(np.divmod(chosen, cols), axis=1)


def observe(states: Sequence[bytes]) -> NDArray[np.uint8]:
    """Render states as images: uint8 with shape (batch, row=64, col=64, channel=3), the top row first."""
    frames = np.empty((len(states), 64, 64, 3), dtype=np.uint8)
    width = min(_BATCH, max(len(states), 1))
    environment = procgen_mazes(width)
    for first in tqdm(range(0, len(states), width), desc="observations", unit="batch", delay=2, leave=False):
        batch = list(states[first : first + width])
        read_mazes(batch)  # raises an error for bytes that would make procgen end the process
        # Pad a short last batch, because procgen sets the states of all sub-environments at once.
        environment.set_state(batch + batch[:1] * (width - len(batch)))
        frames[first : first + width] = environment.observe()[1]["rgb"][: len(batch)]
    return frames


def policy_input(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert images into the policy's input: float32 in [0, 1] with shape (batch, channel=3, row=64, col=64)."""
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def _arranged(
    states: list[bytes], rng: np.random.Generator, size: int | None, cheese: CheesePlace, mouse: str
) -> list[bytes]:
    """Put the cheese and the mouse in the requested places. Leave out states in which this is impossible."""
    mazes = read_mazes(states)
    squares = cheese_squares(mazes, cheese)  # the smallest mazes have no squares outside the top right 5x5
    usable = squares.any(axis=(1, 2)) & (True if size is None else mazes.size == size)
    kept, mazes = np.nonzero(usable)[0], mazes[usable]
    mazes = mazes.moved(cheese=random_squares(squares[usable], rng))
    if mouse == "anywhere":
        mazes = mazes.moved(mouse=random_squares(mazes.grid == FREE, rng))
    elif mouse == "decision square":
        cells, exists = decision_squares(mazes)
        kept, mazes = kept[exists], mazes[exists].moved(mouse=cells[exists])
    return write_mazes(mazes, [states[index] for index in kept])


def _check_request(seed: int, size: int | None, cheese: CheesePlace, mouse: str) -> None:
    for name, place, places in [("cheese", cheese, CHEESE_PLACES), ("mouse", mouse, MOUSE_PLACES)]:
        if place not in places and not isinstance(place, tuple):
            raise UserError(f"{name} must be one of {', '.join(map(repr, places))}; got {place!r}.")
    if isinstance(cheese, tuple):
        row, col = np.indices((size or WORLD,) * 2)  # from the corner
        distances = np.hypot(row, col)[(row % 2 + col % 2 < 2) & (row + col < row[-1, -1] * 2)]
        if not ((distances >= cheese[0]) & (distances < cheese[1])).any():
            raise UserError(
                f"cheese is {cheese}, but no square's distance (in cells) from the top right corner is in this range."
            )
    if not 0 <= seed < 2**31:
        raise UserError(f"seed must be between 0 and {2**31 - 1}; got {seed}.")
    if size is not None and (size % 2 == 0 or not 3 <= size <= WORLD):
        raise UserError(f"size must be an odd number from 3 to {WORLD}, as in procgen's hard mazes; got {size}.")
    if size is not None and cheese == "out of distribution" and size <= REGION:
        raise UserError(f"Mazes with size={size} have no square outside the top right {REGION}x{REGION}.")
    if mouse == "decision square" and cheese == "top right":
        raise UserError("With the cheese in the top right corner, a maze has no decision square.")
