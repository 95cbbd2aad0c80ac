"""Random procgen levels with a chosen place for cheese and mouse, and their observations.

| `cheese=` | its square |
|---|---|
| `"as drawn"` | procgen's own: any free square |
| `"in distribution"` | a random free square of the top right 5x5, as in training |
| `"out of distribution"` | a random free square anywhere else |
| `"top left"`, `"top right"`, `"bottom right"` | that corner, free in every procgen maze |

| `mouse=` | its square |
|---|---|
| `"start"` | the bottom left corner, as in procgen |
| `"anywhere"` | a random free square |
| `"decision square"` | see `paths.decision_squares`; levels without one are skipped |

The cheese is never on the start square and the mouse never on the cheese.
"""

from __future__ import annotations

from collections.abc import Sequence

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

_BATCH = 64  # sub-environments at once: enough to hide the cost of a call, few enough to stay in cache


class LevelError(UserError):
    """Levels that cannot exist, such as cheese outside the top right 5x5 of a 5x5 maze."""


def draw_levels(
    count: int, *, seed: int, size: int | None = None, cheese: str = "as drawn", mouse: str = "start"
) -> list[bytes]:
    """States of `count` procgen levels, for `observe`, `states.read_mazes` and `vector_env.MazeVectorEnv`.

    The first k levels are the same for every count of at least k. Global random generators are not used.

    Args:
        count: number of levels.
        seed: random seed, 0 to 2**31 - 1.
        size: side of the inner maze, odd, 3 to 25; None draws all sides equally often, as procgen does.
        cheese: one of `CHEESE_PLACES`.
        mouse: one of `MOUSE_PLACES`; it faces left, as in a fresh level.

    Raises:
        LevelError: an invalid seed, size or place, or a combination that no level has.
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


def cheese_squares(mazes: Mazes, place: str) -> NDArray[np.bool_]:
    """The possible squares of the cheese: bool (batch, row, col), False on the start square."""
    side = mazes.grid.shape[-1]
    row, col = np.arange(side)[:, None], np.arange(side)
    last = mazes.size[:, None, None] - 1
    region = (row > last - REGION) & (col > last - REGION)
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
    """A uniformly random square of each maze, (batch, 2), from candidates, bool (batch, row, col).

    One number is drawn per maze, so the squares of the first mazes do not depend on the size of the batch.

    Raises:
        LevelError: a maze without candidates.
    """
    batch, rows, cols = candidates.shape
    flat = candidates.reshape(batch, rows * cols)
    counts = flat.sum(axis=1)
    if not counts.all():
        raise LevelError(f"Maze {int(np.argmin(counts))} of {batch} has no square to choose from.")
    nth = (rng.random(batch) * counts).astype(np.int64)
    chosen = np.argmax(flat.cumsum(axis=1) > nth[:, None], axis=1)
    return np.stack(np.divmod(chosen, cols), axis=1)


def observe(states: Sequence[bytes]) -> NDArray[np.uint8]:
    """Images of `states`: uint8 (batch, row=64, col=64, channel=3), the top row first.

    Raises:
        StateError: bytes that are not a hard maze state; procgen itself would end the process.
    """
    frames = np.empty((len(states), 64, 64, 3), dtype=np.uint8)
    width = min(_BATCH, max(len(states), 1))
    environment = procgen_mazes(width)
    with tqdm(total=len(states), desc="observations", unit="state", delay=2, leave=False) as progress:
        for first in range(0, len(states), width):
            batch = list(states[first : first + width])
            read_mazes(batch)
            # A short last batch is filled up: procgen sets all sub-environments at once.
            environment.set_state(batch + batch[:1] * (width - len(batch)))
            frames[first : first + width] = environment.observe()[1]["rgb"][: len(batch)]
            progress.update(len(batch))
    return frames


def policy_input(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Observations as the policy takes them: float32 (batch, channel=3, row=64, col=64) in [0, 1]."""
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def _arranged(states: list[bytes], rng: np.random.Generator, size: int | None, cheese: str, mouse: str) -> list[bytes]:
    """The usable `states`, with cheese and mouse in their places."""
    mazes = read_mazes(states)
    squares = cheese_squares(mazes, cheese)
    # The smallest mazes have no square outside the top right 5x5.
    usable = squares.any(axis=(1, 2)) & (True if size is None else mazes.size == size)
    kept, mazes = np.nonzero(usable)[0], mazes[usable]
    mazes = mazes.moved(cheese=random_squares(squares[usable], rng))
    if mouse == "anywhere":
        mazes = mazes.moved(mouse=random_squares(mazes.grid == FREE, rng))
    elif mouse == "decision square":
        cells, exists = decision_squares(mazes)
        kept, mazes = kept[exists], mazes[exists].moved(mouse=cells[exists])
    return write_mazes(mazes, [states[index] for index in kept])


def _check_request(seed: int, size: int | None, cheese: str, mouse: str) -> None:
    for name, place, places in [("cheese", cheese, CHEESE_PLACES), ("mouse", mouse, MOUSE_PLACES)]:
        if place not in places:
            raise LevelError(f"{name}={place!r} is not one of {', '.join(map(repr, places))}.")
    if not 0 <= seed < 2**31:
        raise LevelError(f"seed={seed}: procgen takes seeds of 0 to {2**31 - 1}.")
    if size is not None and (size % 2 == 0 or not 3 <= size <= WORLD):
        raise LevelError(f"size={size}: procgen's hard mazes have odd sides of 3 to {WORLD}.")
    if size is not None and cheese == "out of distribution" and size <= REGION:
        raise LevelError(f"size={size}: the top right {REGION}x{REGION} is the whole maze, so no cheese is outside.")
    if mouse == "decision square" and cheese == "top right":
        raise LevelError("With the cheese in the top right corner, a maze has no decision square.")
