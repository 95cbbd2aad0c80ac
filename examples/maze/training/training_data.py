"""Training data: mazes with the cheese in the top right 5x5, and the first step of the shortest path.

All random draws depend only on a seed and a running number. So the data do not depend on the number of worker
processes, and a resumed run gets the same data as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader, Dataset

from maze.environment.requirements import procgen_mazes
from maze.levels import cheese_squares, draw_levels, observe, random_squares
from maze.paths import START, at_cells, direction_field, distances
from maze.states import FREE, WORLD, Mazes, read_mazes, write_mazes

LEVELS = 64  # levels in a chunk
CHEESES = 2  # cheese squares per level
MICE = 6  # mouse squares per cheese square, half of them on the path
CHUNK = LEVELS * CHEESES * MICE

NO_DIRECTION = -1  # in `Examples.field`, on squares without a label

# Kinds of draws that share a seed: the stream; levels and actions of the walks; actions, minibatches and levels of PPO.
STREAM, WALKED, WALK_DRAWS, REWARD_DRAWS, REWARDED = range(5)


@dataclass(frozen=True, eq=False)
class Examples:
    """Observations with their labels. Maps of the world have the top row first, like the images."""

    frames: NDArray[np.uint8]  # (batch, row=64, col=64, channel=3), procgen's images
    step: NDArray[np.int64]  # (batch,), the first `Direction` of the shortest path to the cheese
    distance: NDArray[np.float32]  # (batch,), steps to the cheese
    field: NDArray[np.int8]  # (batch, row=25, col=25), the `Direction` to take, or `NO_DIRECTION`
    cell: NDArray[np.int64]  # (batch,), the mouse's cell: row * 25 + col

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Examples:
        return Examples(**{name: part[rows] for name, part in vars(self).items()})

    def __add__(self, other: Examples) -> Examples:
        return Examples(*map(np.concatenate, zip(vars(self).values(), vars(other).values(), strict=True)))


def labeled(frames: NDArray[np.uint8], mazes: Mazes) -> Examples:
    """Label images of mazes in which the mice can reach the cheese."""
    moves = direction_field(mazes, mazes.cheese)
    distance = at_cells(distances(mazes, mazes.cheese), mazes.mouse)
    direction = moves.argmax(axis=1)
    margin = (WORLD - mazes.size) // 2
    maze, rows, cols = np.nonzero(moves.any(axis=1))
    field = np.full((len(mazes), WORLD, WORLD), NO_DIRECTION, dtype=np.int8)
    field[maze, WORLD - 1 - margin[maze] - rows, margin[maze] + cols] = direction[maze, rows, cols]
    cell = (WORLD - 1 - margin - mazes.mouse[:, 0]) * WORLD + margin + mazes.mouse[:, 1]
    return Examples(frames, at_cells(direction, mazes.mouse), distance, field, cell)


@lru_cache(maxsize=2)
def fresh_levels(draw: tuple[int, ...], large: float = 0.0) -> list[bytes]:
    """Draw 64 procgen levels with the cheese in the top right 5x5 and the mouse at the start; `draw` is the seed.

    The probability of a side is proportional to side ** large; procgen itself draws all sides equally often.
    """
    rng = np.random.default_rng(draw)
    levels: list[bytes] = []
    while len(levels) < LEVELS:
        drawn = draw_levels(LEVELS, seed=int(rng.integers(2**31)), cheese="in distribution")
        kept = rng.random(LEVELS) < (read_mazes(drawn).size / WORLD) ** large
        levels += itertools.compress(drawn, kept)
    return levels[:LEVELS]


def example_mazes(levels: Sequence[bytes], rng: np.random.Generator) -> Mazes:
    """Mazes for the observations in a chunk: `CHEESES * MICE` rounds, each with all levels in order.

    The mouse is on the path from the start to the cheese in the first half, and on any free square in the second.
    """
    mazes = read_mazes(list(levels) * CHEESES)
    mazes = mazes.moved(cheese=random_squares(cheese_squares(mazes, "in distribution"), rng))
    anywhere = mazes.grid == FREE
    to_cheese = distances(mazes, mazes.cheese)
    on_path = anywhere & (distances(mazes, START) + to_cheese == to_cheese[:, :1, :1])
    squares = np.concatenate([np.tile(each, (MICE // 2, 1, 1)) for each in (on_path, anywhere)])
    repeated = mazes[np.tile(np.arange(len(mazes)), MICE)]
    return repeated.moved(mouse=random_squares(squares, rng), facing_right=rng.random(len(repeated)) < 0.5)


@dataclass
class Chunks(Dataset[Examples]):
    """The endless training data. A chunk is 768 shuffled examples from 64 levels."""

    seed: int
    large: float = 0.0

    def __getitem__(self, number: int) -> Examples:
        draw = (self.seed, STREAM, number)
        levels = fresh_levels(draw, self.large)
        rng = np.random.default_rng((*draw, 1))
        mazes = example_mazes(levels, rng)
        examples = labeled(observe(write_mazes(mazes, levels * (CHEESES * MICE))), mazes)
        return examples[rng.permutation(len(examples))]


def batches(chunks: Dataset[Examples], size: int, *, first: int = 0, workers: int = 0) -> Iterator[Examples]:
    """Yield batches of consecutive examples without end, starting at the example with number `first`.

    Worker processes prepare the examples in advance; their number does not change the examples.
    """
    number, seen = divmod(first, CHUNK)
    loader = DataLoader(
        chunks,
        batch_size=None,  # one chunk at a time, as arrays: tensors would need shared memory
        sampler=itertools.count(number),  # type: ignore[arg-type]  # accepts any iterable, also an endless one
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit this; only the main process stops on Ctrl-C
    try:
        ready = iter(loader)
    finally:
        signal.signal(signal.SIGINT, before)
    rest = next(ready)[seen:]
    while True:
        while len(rest) < size:
            rest += next(ready)
        yield rest[:size]
        rest = rest[size:]


class TrainingMazes:
    """procgen mazes to act in; every level has its cheese in the top right 5x5.

    A level is given up after `patience` steps. `draws` is `WALKED` or `REWARDED`, which differ in their levels.
    """

    def __init__(self, count: int, *, seed: int, large: float = 0.0, patience: int = 500, draws: int = WALKED) -> None:
        self._procgen = procgen_mazes(count)
        self._seed, self._draws, self._large, self._patience = seed, draws, large, patience
        self._age = np.zeros(count, dtype=np.int64)  # steps since the level started
        self._started = 0  # levels so far
        self._start(np.arange(count))

    def frames(self) -> NDArray[np.uint8]:
        """Return the current images: uint8 (batch, row=64, col=64, channel=3)."""
        return self._procgen.observe()[1]["rgb"]

    def mazes(self) -> Mazes:
        return read_mazes(self._procgen.get_state())

    def examples(self) -> Examples:
        return labeled(self.frames(), self.mazes())

    def step(self, actions: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Take one action per maze. Return rewards, and which levels ended and were replaced by the next level."""
        self._procgen.act(np.where(self._age >= self._patience, -1, actions))  # -1 ends the level
        reward, _, ended = self._procgen.observe()
        self._age += 1
        self._start(np.flatnonzero(ended))
        return reward, ended

    def state(self) -> dict[str, Any]:
        """Return a snapshot for `restore` that torch can save."""
        states = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self._procgen.get_state()]
        return {"states": states, "age": self._age.tolist(), "started": self._started}

    def restore(self, state: dict[str, Any]) -> None:
        self._procgen.set_state([each.numpy().tobytes() for each in state["states"]])
        self._age[:] = state["age"]
        self._started = state["started"]

    def _start(self, mazes: NDArray[np.int64]) -> None:
        for index in mazes.tolist():
            chunk, place = divmod(self._started, LEVELS)
            level = fresh_levels((self._seed, self._draws, chunk), self._large)[place]
            self._procgen.call_c_func("set_state", index, level, len(level))
            self._age[index] = 0
            self._started += 1


def sampled(probabilities: NDArray[np.floating[Any]], draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sample one action per row of probabilities, (batch, action), from uniform draws in [0, 1)."""
    cumulated = probabilities.cumsum(axis=1, dtype=np.float64)
    # Scaled, because rounding keeps the sums from being exactly 1.
    return (cumulated > draws[:, None] * cumulated[:, -1:]).argmax(axis=1)
