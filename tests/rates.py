"""Hit rates over simulated data sets, for `simulations.py`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chanpatch.statistics import Interval, wilson_interval

Floats = NDArray[np.float64]
Generator = np.random.Generator
Promise = tuple[float, float] | None  # lowest and highest promised rate, or None
Row = Callable[[Any, Generator, int], Any]  # maps a column's size, a generator and a number of trials to the results
GOOD, TEST = (0.93, 1.0), (0.0, 0.05)


class Case(NamedTuple):
    """One cell of a table: `simulate(generator, trials)` returns one number per trial, NaN if withheld."""

    row: str
    column: str
    simulate: Callable[[Generator, int], Any]
    trials: int
    promise: Promise


class Rate(NamedTuple):
    """The number of hits among the `n` trials with a result."""

    hits: int
    n: int
    trials: int

    def __str__(self) -> str:
        if not self.n:
            return "withheld"
        rate = wilson_interval(self.hits, self.n)
        shown = f"{rate.estimate:.1%} ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
        return shown + f", {1 - self.n / self.trials:.0%} withheld" * (self.n < 0.995 * self.trials)

    def keeps(self, promise: tuple[float, float]) -> bool:
        """Return whether the 99.99% interval for the rate overlaps the promise; the tables have hundreds of rates."""
        if not self.n:
            return True
        rate = wilson_interval(self.hits, self.n, confidence=0.9999)
        return rate.low <= promise[1] and rate.high >= promise[0]


def rate_of(part: str, case: Case, scale: float = 1.0) -> Rate:
    """Return the rate for a case, whose seed depends on its part, row and column."""
    trials = max(round(case.trials * scale), 1)
    generator = np.random.default_rng(zlib.crc32(f"{part} {case.row} {case.column}".encode()))
    found = np.asarray(case.simulate(generator, trials), dtype=np.float64)
    known = ~np.isnan(found)
    return Rate(int(found[known].sum()), int(known.sum()), found.size)


def grid(name: str, row: Row, columns: dict[str, Any], trials: int, promise: Any) -> Iterator[Case]:
    """Yield the cases in a row. If `promise` is a function, it maps a size to a promise."""
    for column, size in columns.items():
        yield Case(name, column, partial(row, size), trials, promise(size) if callable(promise) else promise)


def each(trial: Callable[..., Any], *arguments: Any) -> Row:
    """Return a row whose trials run one after another."""
    return lambda size, generator, trials: [trial(*arguments, size, generator) for _ in range(trials)]


def sizes(*numbers: int) -> dict[str, int]:
    return {f"n = {n}": n for n in numbers}


def covers(interval: Interval[Any], truth: Any) -> Floats:
    """Return 1 if an interval contains the truth, 0 if it does not, and NaN if it is withheld."""
    inside = (interval.low <= truth) & (truth <= interval.high)
    return np.where(np.isnan(interval.low), np.nan, inside)


def excludes(interval: Interval[Any], row: Any = slice(None)) -> bool:
    return bool(np.any((interval.low[row] > 0) | (interval.high[row] < 0)))


def least(n: int, promise: Promise) -> Callable[[int], Promise]:
    """Return a promise that holds only for sizes of at least `n`."""
    return lambda size: promise if size >= n else None
