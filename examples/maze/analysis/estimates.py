"""Estimates with their intervals, as cells of a table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from chanpatch.statistics import (
    Interval,
    difference_interval,
    mean_interval,
    rank_among,
    sign_flip_test,
    wilson_interval,
)
from maze.analysis.cells import Row, Table, Values, cells


def intervals(**named: Interval | None) -> Row:
    """The cells of several estimates, by prefix."""
    return {name: cell for prefix, interval in named.items() for name, cell in cells(prefix, interval).items()}


def share(count: int, n: int) -> Interval | None:
    """A fraction with Wilson's interval; None if n is 0."""
    return wilson_interval(int(count), n) if n else None


def one_by_one(interval: Interval[Values]) -> list[Interval]:
    """The intervals in an interval of arrays."""
    ends = zip(interval.estimate.tolist(), interval.low.tolist(), interval.high.tolist(), strict=True)
    return [Interval(*each, interval.confidence) for each in ends]


def minus(first: Interval | None, second: Interval | None) -> Interval | None:
    """The difference of two independent estimates; None if either is unknown."""
    return None if first is None or second is None else difference_interval(first, second)


def rank_cells(effect: float, controls: ArrayLike, *, ranked: Any = True, increase: bool = False) -> Row:
    """The rank of an effect by size, or by increase, as three cells; None without controls or if not `ranked`."""
    alternative = "greater" if increase else "two-sided"
    rank = rank_among(effect, controls, alternative=alternative) if ranked and np.size(controls) else None
    return {"rank": rank and rank.rank, "controls": rank and rank.controls, "rank_p": rank and rank.p}


def primary(claim: str, differences: Values, *, seed: int) -> Table:
    """The claim that decides a part, and the p-value of the null that the differences, (level,), have mean zero."""
    return [
        {"claim": claim, "n": len(differences), "p": sign_flip_test(differences, seed=seed)}
        | intervals(mean=mean_interval(differences))
    ]
