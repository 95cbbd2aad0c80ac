"""Do the mouse and the channels turn from the cheese as it lies farther from the top right corner?

Method: Size 25, mouse on the decision square, equally many levels for each of {BINS} ranges of the straight distance
from cheese to corner, {WIDTH} cells wide each, 2n in all. Fractions by distance, left out for fewer than {FEWEST}
levels; rank correlations, also within strata of both paths' lengths. The verdict: over all levels, the rank correlation
of the mouse's choice of the cheese with the distance is below 0.

The post: Both fall with the distance: whether the mouse takes the path to the cheese, and whether the channel (121 UP,
73 RIGHT) points along it.

Limits: The result does not show that the policy reads the distance: the places of cheese, corner and square are tied to
each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chanpatch.statistics import bootstrap_interval, rank_correlation
from maze.analysis import decision_squares as squares
from maze.analysis.cells import Flags, Row, Table, Tables, Values, below, chosen, keyed, shown, verdict
from maze.analysis.decision_squares import DIRECTIONS, Decisions, Probes
from maze.analysis.drawing import Panel, chart
from maze.analysis.estimates import intervals, share
from maze.analysis.part import SPLITS, Finding, Study
from maze.levels import REGION
from maze.paths import Direction, top_right
from maze.states import read_mazes

SIZE = 25
WIDTH = 4  # of a bin of the distance from the cheese to the corner, in cells
BINS = 8  # farther than 32 cells there are only the squares around the start
MOUSE = "the mouse takes the way to the cheese"
BOTH = "in and out"  # of distribution
FEWEST = 20  # levels of a bin that has an estimate
RESAMPLES = 999


def measure(study: Study) -> dict[str, Table]:
    """Fractions by distance, and rank correlations with distance, also within strata of the square's own distances."""
    probes = squares.thresholds(study, DIRECTIONS)
    levels = []
    for low in range(0, BINS * WIDTH, WIDTH):
        places = {"size": SIZE, "cheese": (low, low + WIDTH), "mouse": "decision square"}
        levels += study.levels(f"distance from {low}", max(FEWEST, 2 * study.n // BINS), **places)
    both, mazes = squares.at_decision_squares(study.points, levels), read_mazes(levels)
    out = both.rows((top_right(mazes) - mazes.cheese).max(axis=1) >= REGION)
    shares = []
    trends = []
    for population, seen in ((BOTH, both), (SPLITS[1], out)):
        for name, rows, values in _measures(study, seen, probes):
            trends += _trends(name, population, seen.rows(rows), values, study.seed_for("distance bootstrap"))
            if seen is both and values.dtype == np.bool_:
                shares += _shares(name, both.distance(squares.CHEESE_TO_CORNER)[rows], values)
    limits = squares.threshold_rows(study, probes)
    return {"thresholds": limits, "shares": shares, "trends": trends}


def _measures(study: Study, seen: Decisions, probes: Probes) -> Iterator[tuple[str, Flags, NDArray[Any]]]:
    """Yields a quantity's name, the levels that have the quantity, and its values on these levels."""
    yield MOUSE, np.ones(len(seen.chosen), dtype=np.bool_), seen.took_cheese
    for direction, probe in probes.items():
        sums = seen.sums[:, study.channel(direction)]
        for goal, leads in (("cheese", seen.cheese == direction), ("corner", seen.corner == direction)):
            if probe is not None:
                name = f"{direction.name} channel high where the {goal} is {direction.name}"
                yield name, leads, probe.predict(sums[leads])
            yield _sum(direction, goal), leads, sums[leads]


def _sum(direction: Direction, goal: str) -> str:
    return f"sum of the {direction.name} channel where the {goal} is {direction.name}"


def _shares(name: str, distance: Values, values: Flags) -> Table:
    place = (distance // WIDTH).astype(np.int64)
    rows = []
    for each in np.unique(place).tolist():
        n, count = int((place == each).sum()), int(values[place == each].sum())
        edges = {"from": each * WIDTH, "below": (each + 1) * WIDTH}
        if n >= FEWEST:
            rows.append({"measure": name, **edges, "n": n, "count": count, **intervals(share=share(count, n))})
    return rows


def _trends(name: str, population: str, seen: Decisions, values: NDArray[Any], seed: int) -> Table:
    """The rank correlation with the distance, over all levels and within strata of the square's distances."""

    def statistic(sample: Values) -> float:
        return float(np.nan_to_num(rank_correlation(sample[:, 1], sample[:, 2], sample[:, 0])))

    rows = []
    for within, stratum in (("no strata", np.zeros(len(values), dtype=np.int64)), ("strata", squares.strata(seen))):
        sample = np.stack([stratum, seen.distance(squares.CHEESE_TO_CORNER), values], axis=1)
        known = len(values) > 1 and np.ptp(values.astype(np.float64)) > 0
        interval = bootstrap_interval(sample, statistic, resamples=RESAMPLES, seed=seed) if known else None
        row = {"measure": name, "cheese": population, "within": within, "n": len(values)}
        rows.append({**row, "strata": len(np.unique(stratum)), **intervals(correlation=interval)})
    return rows


def finding(tables: Tables) -> Finding:
    trends = keyed(tables["trends"], "measure", "cheese", "within")
    names = [MOUSE, *(_sum(direction, "cheese") for direction in DIRECTIONS)]
    raw, within = ([trends[name, BOTH, kind] for name in names] for kind in ("no strata", "strata"))
    alone = [trends[name, SPLITS[1], "no strata"] for name in names]
    shares = chosen(tables["shares"], measure=MOUSE)
    correlations = "; ".join(f"{row['measure']} {shown(row, 'correlation', '+.2f')} (n={row['n']})" for row in raw)
    return Finding(
        f"The mouse takes the path to the cheese in {shown(shares[0], 'share', '.0%')} of levels with the cheese "
        f"{_bin(shares[0])}, in {shown(shares[-1], 'share', '.0%')} with the cheese {_bin(shares[-1])}. Rank "
        f"correlation with the distance: {correlations}.",
        verdict(below(raw[0], "correlation")),
        f"Out of distribution alone the correlations are {_each(alone)}, and within strata of both path lengths "
        f"{_each(within)}. {_course(shares)}",
    )


def _each(rows: Table) -> str:
    return ", ".join(shown(row, "correlation", "+.2f") for row in rows)


def _bin(row: Row) -> str:
    return f"{row['from']} to under {row['below']} cells from the corner (n={row['n']})"


def _course(shares: Table) -> str:
    """Whether the fraction falls from each bin to the next."""
    lowest = min(shares, key=lambda row: row["share"])
    rises = sum(later["share"] > row["share"] for row, later in zip(shares, shares[1:], strict=False))
    if not rises:
        return f"The mouse's fraction never rises over the {len(shares)} bins."
    return (
        f"The mouse's fraction rises between bins {rises} of {len(shares) - 1} times; the lowest is "
        f"{shown(lowest, 'share', '.0%')}, with the cheese {_bin(lowest)}."
    )


figure = chart(
    Panel("shares", "from", "share", "fraction of levels", "measure", along=True, line=None),
    Panel("trends", "measure", "correlation", "rank correlation with the distance", "within", {"cheese": BOTH}),
    size=(7, 6),
)
